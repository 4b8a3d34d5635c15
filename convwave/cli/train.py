"""The commands that train: ``train`` and ``reproduce``. What needs torch is imported when they run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from convwave.files import write_atomic
from convwave.runs.folder import MODEL_FILE, RUNS, STATE_FILE
from convwave.train.config import Config, UsageError
from convwave.train.recipes import PUBLISHED, Recipe, named, parse_field, read_recipe, vary

_OPTIONS = ("model", "recipe", "steps", "batch", "n_embd", "n_hidden", "levels", "seed", "device", "tier")


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
    if given.get("recipe", "").endswith(".toml"):
        try:
            given["recipe"] = read_recipe(given["recipe"])
        except ValueError as error:
            raise UsageError(f"--recipe: {error}") from None
    if args.resume and (args.out / STATE_FILE).exists():
        config = _begun(args.out, given, changes)
    else:
        config = _new(given, changes)
    from convwave.cli.console import ConsoleReporter, check_device, corpus, number, print_json, stderr, table
    from convwave.train import loop

    check_device(config.device)
    now, recipe = f"{datetime.now():%Y%m%d-%H%M%S}", config.recipe.name
    out = args.out or RUNS / f"{now}-{config.model}-{recipe}-{config.seed}"
    words = corpus(args)
    result = loop.train(config, words, out, resume=args.resume, save_every=args.save_every, reporter=ConsoleReporter())

    losses = [number(result.splits[name].loss) for name in ("train", "val", "novel_val")]
    rows = [
        [f"{config.model}, {recipe}", *losses, number(result.seconds, 1)],
        *([post.title + ", the post", number(post.train), number(post.val), "", ""] for post in PUBLISHED.values()),
    ]
    console = stderr()
    console.print(table("Loss in nats", ["", "train", "val", "novel val", "seconds"], rows))
    if not words.is_names_txt:
        console.print(
            f"The post's figures are for names.txt; this run used {words.source}, so they are not comparable.\n"
            "'convwave data fetch' downloads the post's list."
        )
    console.print(f"model {out / MODEL_FILE}\nloss curve {out / 'loss.png'}, {out / 'loss.csv'}")
    print_json(args, {**result.summary(), "data": words.source})


def _new(given: dict[str, Any], changes: Mapping[str, Any]) -> Config:
    """The configuration of a new run from the options given and the fields of its recipe that --set changes."""
    default = "fast" if given.get("model", "convwave") == "convwave" else "blog"
    try:
        recipe = vary(named(given.pop("recipe", default)), changes)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Config.make(recipe=recipe, **given)


def _begun(out: Path, given: dict[str, Any], changes: Mapping[str, Any]) -> Config:
    """The configuration that a run was begun with; options and fields given must be those."""
    from convwave.train.loop import read_config

    config = read_config(out)
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
    return config


def reproduce(args: argparse.Namespace) -> None:
    """``convwave reproduce``."""
    if not args.resume and (args.out / "reproduce.json").exists():
        raise UsageError(f"--out: {args.out} holds a reproduction already; pass --resume or choose another directory")
    from convwave.cli.console import ConsoleReporter, corpus, number, print_json, stderr, table
    from convwave.runs.plots import reproduction_plot
    from convwave.runs.registry import provenance
    from convwave.train import loop

    configs = [Config.make(name, "blog", steps=args.blog_steps, seed=args.seed) for name in PUBLISHED]
    configs.append(Config.make("convwave", "fast", steps=args.fast_steps, seed=args.seed))
    words = corpus(args)
    rows: list[dict[str, Any]] = []
    for config in configs:
        result = loop.train(config, words, args.out / config.model, resume=args.resume, reporter=ConsoleReporter())
        published = PUBLISHED.get(config.model)
        rows.append(
            {
                **result.summary(),
                "title": published.title if published else "convolution, recipe fast",
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
        console.print(f"The post's figures are for names.txt; this used {words.source}: not comparable.")
    report = {
        "provenance": provenance(args.command_line),
        "data": Path(words.source).name,
        "data_sha256": words.sha256,
        "rows": rows,
    }
    write_atomic(args.out / "reproduce.json", (json.dumps(report, indent=2) + "\n").encode())
    reproduction_plot(rows, args.out / "reproduce.png")
    console.print(f"written: {args.out / 'reproduce.json'}, {args.out / 'reproduce.png'}")
    print_json(args, report)
