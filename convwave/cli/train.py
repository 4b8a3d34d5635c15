"""The commands that train: ``train`` and ``reproduce``. What needs torch is imported when they run."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convwave.files import write_atomic
from convwave.runs.folder import LOSS_PICTURE, LOSS_TABLE, MODEL_FILE, STATE_FILE, clear_partials, new_folder
from convwave.train.config import Config, UsageError
from convwave.train.recipes import PUBLISHED, Recipe, named, parse_field, read_recipe, vary

if TYPE_CHECKING:
    from convwave.data.packing import Corpus
    from convwave.nn import ConvWave

_FEW = 20  # validation words, fewer of which measure little

_OPTIONS = ("model", "recipe", "steps", "batch", "n_embd", "n_hidden", "levels", "seed", "device", "tier", "keep")


def train(args: argparse.Namespace) -> None:
    """``convwave train``."""
    if not args.save_every >= 0:
        raise UsageError(f"--save-every: expected at least 0, got {args.save_every}")
    if args.resume and args.out is None:
        raise UsageError("--resume: needs --out DIR, the run to continue")
    try:
        changes = dict(parse_field(text) for text in args.set)
    except ValueError as error:
        raise UsageError(f"--set: {error}") from None
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    own_steps = "steps" in given or "steps" in changes
    if given.get("recipe", "").endswith(".toml"):
        own_steps = True
        try:
            given["recipe"] = read_recipe(given["recipe"])
        except ValueError as error:
            raise UsageError(f"--recipe: {error}") from None
    begun = args.resume and (args.out / STATE_FILE).exists()
    init = None
    if begun:
        config = _begun(args.out, given, changes)
    elif args.init is not None:
        from convwave.cli.model import load_network

        path, init = load_network(args.init, None)
        shape = {} if "model" in given else _shape(init)
        config = _new(shape | given | {"init": str(path)}, changes)
    else:
        config = _new(given, changes)
    _check_memory(config)
    from convwave.cli.console import ConsoleReporter, check_device, number, print_json, stderr, table
    from convwave.cli.model import run_words
    from convwave.train import loop
    from convwave.train.diagnostics import default_interval

    check_device(config.device)
    words = run_words(args, args.out if begun else None)
    if not begun:
        config = config.suited(words, steps=not own_steps, keep=args.keep is None)
    console, recipe = stderr(), config.recipe.name
    for note in _doubts(words):
        console.print(note)
    out = args.out or new_folder(f"{datetime.now():%Y%m%d-%H%M%S}-{config.model}-{recipe}-{config.seed}")
    result = loop.train(
        config,
        words,
        out,
        resume=args.resume,
        save_every=args.save_every,
        reporter=ConsoleReporter(),
        init=init,
        diagnostics=default_interval(config) if args.diagnostics == 0 else args.diagnostics or 0,
        track=args.track,
    )

    losses = [number(result.splits[name].loss) for name in ("train", "val", "novel_val")]
    rows = [[f"{config.model}, {recipe}", *losses, number(result.seconds, 1)]]
    if words.is_names_txt:
        rows += [[f"{p.title}, the post", number(p.train), number(p.val), "", ""] for p in PUBLISHED.values()]
    console.print(table("Loss in nats", ["", "train", "val", "novel val", "seconds"], rows))
    if result.kept_step < result.config.steps:
        console.print(
            f"kept: the network after step {result.kept_step:,} of {result.config.steps:,}, the best on the validation "
            "words (--keep last keeps the last)"
        )
    if not words.is_names_txt:
        console.print(
            f"The post's figures are for names.txt, not for {words.source}; 'convwave data fetch' downloads the list."
        )
    files = [out / name for name in (LOSS_PICTURE, LOSS_TABLE) if (out / name).exists()]
    console.print(f"model {out / MODEL_FILE}\nloss curve {', '.join(map(str, files))}")
    print_json(args, {**result.summary(), "data": words.source})


def _doubts(words: Corpus) -> list[str]:
    """Notes about data from which little can be learned."""
    splits, notes = words.splits, []
    if len(splits.val) < _FEW:
        notes.append(
            f"note: {len(words.words):,} words are few: {len(splits.train)} to train on, {len(splits.val)} to validate "
            "with, so the losses say little"
        )
    unseen = sorted(set(words.vocabulary.symbols[1:]) - set("".join(splits.train)))
    if unseen:
        some = "".join(unseen[:20]) + ("..." if len(unseen) > 20 else "")
        notes.append(f"note: no word to train on has {some!r}: the network cannot learn them")
    return notes


def _shape(model: ConvWave) -> dict[str, Any]:
    """The options that make a network of the same shape."""
    for name, post in PUBLISHED.items():
        if len(post.factors) == 1 and (post.factors, (post.n_hidden,)) == (model.factors, model.widths):
            return {"model": name}
    return {"n_embd": model.n_embd, "n_hidden": model.widths[0], "levels": model.levels}


def _new(given: dict[str, Any], changes: Mapping[str, Any]) -> Config:
    """The configuration of a new run from the options given and the fields of its recipe that --set changes."""
    default = "fast" if given.get("model", "convwave") == "convwave" else "blog"
    try:
        recipe = vary(named(given.pop("recipe", default)), changes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Config.make(recipe=recipe, **given)


def _check_memory(config: Config) -> None:
    """Refuse networks and batches that are larger than this machine's memory, which would be filled to the end.

    Raises:
        UsageError: weights, gradients and two moments, or the ids and activations of a batch.
    """
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return
    levels, width = len(config.factors), config.n_hidden
    network = 4 * 4 * 2 * width * (config.n_embd + (levels - 1) * width)
    step = config.batch * (8 * 4 + 4 * levels * width)
    for names, needed in (("n_embd, n_hidden, levels", network), ("batch", step)):
        if needed > memory:
            raise UsageError(f"{names}: needs at least {needed // 10**9:,} GB of memory, there are {memory // 10**9:,}")


def _begun(out: Path, given: dict[str, Any], changes: Mapping[str, Any]) -> Config:
    """The configuration that a run was begun with, perhaps with more steps; other options given must be those."""
    from convwave.train.loop import read_config

    config = read_config(out)
    steps = max(config.steps, given.get("steps", 0))
    if given.get("steps", steps) < steps:
        raise UsageError(f"--steps: {out} was begun with {steps}, expected at least as many, got {given['steps']}")
    given.pop("steps", None)
    asked: dict[str, tuple[Any, Any]] = {}  # by option: what was, what is to be
    if "recipe" in given:
        recipe = _new({"recipe": given.pop("recipe")}, changes).recipe
        asked |= {"--recipe": (config.recipe.name, recipe.name)}
        changes = {field.name: getattr(recipe, field.name) for field in fields(Recipe)}
    asked |= {f"--set {name}": (getattr(config.recipe, name), value) for name, value in changes.items()}
    asked |= {"--" + name.replace("_", "-"): (getattr(config, name), value) for name, value in given.items()}
    for option, (before, now) in asked.items():
        if before != now and (option, now) != ("--tier", "auto"):
            raise UsageError(f"{option}: {out} was begun with {before}, cannot continue with {now}")
    return replace(config, steps=steps)


def reproduce(args: argparse.Namespace) -> None:
    """``convwave reproduce``."""
    if not args.resume and (args.out / "reproduce.json").exists():
        raise UsageError(f"--out: {args.out} holds a reproduction already; pass --resume or choose another directory")
    from convwave.cli.console import ConsoleReporter, corpus, number, print_json, stderr, table
    from convwave.runs.plots import drawn, reproduction_plot
    from convwave.runs.registry import provenance
    from convwave.train import loop

    configs = [Config.make(name, "blog", steps=args.blog_steps, seed=args.seed) for name in PUBLISHED]
    configs.append(Config.make("convwave", "fast", steps=args.fast_steps, seed=args.seed))
    words = corpus(args)
    rows: list[dict[str, Any]] = []
    for config in configs:
        result = loop.train(config, words, args.out / config.model, resume=args.resume, reporter=ConsoleReporter())
        post = PUBLISHED.get(config.model)
        published = post if words.is_names_txt else None
        rows.append(
            {
                **result.summary(),
                "title": post.title if post else "convolution, recipe fast",
                "published_train": published.train if published else None,
                "published_val": published.val if published else None,
                "test_loss": result.splits["test"].loss,
            }
        )
    console = stderr()
    console.print(
        table(
            "The post's figures and ours (loss in nats)",
            ["", "train, post", "train", "val, post", "val", "novel val", "steps", "seconds"],
            [
                [
                    row["title"],
                    number(row["published_train"]),
                    number(row["train_loss"]),
                    number(row["published_val"]),
                    number(row["val_loss"]),
                    number(row["novel_val_loss"]),
                    f"{row['steps']:,}",
                    number(row["train_seconds"], 1),
                ]
                for row in rows
            ],
        )
    )
    if not words.is_names_txt:
        console.print(f"The post's figures are for names.txt, not for {words.source}.")
    report = {
        "provenance": provenance(args.command_line),
        "data": Path(words.source).name,
        "data_sha256": words.sha256,
        "rows": rows,
    }
    clear_partials(args.out, ("reproduce.json", "reproduce.png"))
    written, picture = args.out / "reproduce.json", args.out / "reproduce.png"
    write_atomic(written, (json.dumps(report, indent=2) + "\n").encode())
    note = drawn(picture, lambda: reproduction_plot(rows, picture))
    console.print(note or f"written: {written}, {picture}")
    print_json(args, report)
