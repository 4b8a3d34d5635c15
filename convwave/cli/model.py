"""The commands that use a trained network: ``evaluate``, ``sample`` and ``verify``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from convwave.cli.checkout import check_compiled, compiled_checks
from convwave.cli.console import announced, check_device, corpus, number, print_json, stderr, table, write
from convwave.data.packing import Corpus, Splits, Vocabulary
from convwave.data.words import DataError, Words, bundled_words, load_words, read_words
from convwave.files import CheckpointError, write_atomic
from convwave.infer import generate
from convwave.infer.score import EvaluationSet
from convwave.nn import ConvWave, load
from convwave.ops.library import available_backends
from convwave.runs.folder import MODEL_FILE, RUNS, STATE_FILE, Folder, clear_partials
from convwave.runs.registry import device_name, newest_run, provenance
from convwave.train.config import Config, UsageError
from convwave.train.loop import read_network, train

if TYPE_CHECKING:
    from convwave.verify.certificate import Check

_MANY = 1000  # names from which on their rate says something


def evaluate(args: argparse.Namespace) -> None:
    """``convwave evaluate``."""
    check_device(args.device)
    path, model = _load(args)
    words = run_words(args, path.parent)
    started = time.perf_counter()
    same = _trained_on(model, path, words)
    prepared = EvaluationSet(words.splits, _vocabulary(model, path), model.factors, args.device)
    ready = time.perf_counter()
    splits = prepared.losses(model.to(args.device))
    seconds = time.perf_counter() - ready
    for name, split in splits.items():
        if split.loss is not None and not math.isfinite(split.loss):
            raise CheckpointError(
                f"{path}: the loss of split {name} is {split.loss}: its weights make no probabilities"
            )
    rows = [[name, number(split.loss), f"{split.positions:,}"] for name, split in splits.items()]
    console = stderr()
    console.print(table(f"Loss of {path} in nats", ["split", "loss", "positions"], rows))
    console.print(f"prepared in {1000 * (ready - started):.0f} ms, evaluated in {1000 * seconds:.0f} ms")
    print_json(
        args,
        {
            "checkpoint": str(path),
            "data": words.source,
            "trained_on_this_data": same,
            "splits": {name: split._asdict() for name, split in splits.items()},
            "seconds": seconds,
            "prepare_seconds": ready - started,
        },
    )


def sample(args: argparse.Namespace) -> None:
    """``convwave sample``."""
    check_device(args.device)
    seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    path, model = _load(args)
    vocabulary = _vocabulary(model, path)
    words = run_words(args, path.parent)
    same = _trained_on(model, path, words)
    marks = {name: mark for mark in reversed(Splits._fields) for name in getattr(words.splits, mark)}
    started = time.perf_counter()
    try:
        names = generate.sample(
            model.to(args.device),
            args.count,
            seed=seed,
            prefix=args.prefix,
            temperature=args.temperature,
            top_k=args.top_k,
            max_length=args.max_length,
            vocabulary=vocabulary,
            unique=args.unique,
            exclude=marks if args.new_only else (),
        )
    except DataError as error:
        raise UsageError(f"--prefix: {error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    seconds = time.perf_counter() - started
    status = [marks.get(name, "new") for name in names]
    if not args.json:
        write("".join(f"{name}\t{mark}\n" for name, mark in zip(names, status, strict=True)))
    rate = f" in {seconds:.2f} s ({len(names) / seconds:,.0f}/s)" if len(names) >= _MANY else ""
    console = stderr()
    console.print(f"{len(names):,} names{rate}, {status.count('new'):,} of them new")
    if len(names) < args.count:
        console.print(f"note: {generate.FRUITLESS:,} draws in a row brought no other name")
    if args.seed is None:
        console.print(f"seed {seed}: --seed {seed} draws these names again")
    print_json(
        args,
        {
            "checkpoint": str(path),
            "trained_on_this_data": same,
            "seed": seed,
            "names": [{"name": name, "status": mark} for name, mark in zip(names, status, strict=True)],
            "seconds": seconds,
        },
    )


def verify(args: argparse.Namespace) -> int:
    """``convwave verify``; 1 where a check fails."""
    from convwave.verify.certificate import verify as checks_of
    from convwave.verify.certificate import weights_sha256

    check_device(args.device)
    if not 0 <= args.seed < 2**64:
        raise UsageError(f"--seed: expected 0 to 2**64 - 1, got {args.seed}")
    if args.compiled is not None:
        check_compiled()
    args.out.mkdir(parents=True, exist_ok=True)
    clear_partials(args.out, ("certificate.json",))
    networks: dict[str, ConvWave] = {}
    if args.checkpoint is not None:
        path, model = _load(args)
        words = run_words(args, path.parent)
        networks[str(path)] = model
        vocabulary = _vocabulary(model, path)
    else:
        words = corpus(args)
        vocabulary = words.vocabulary
        torch.manual_seed(args.seed)
        networks["fresh"] = ConvWave(len(vocabulary), vocabulary=vocabulary)
        networks["trained"] = train(Config.make(steps=60, seed=args.seed), words).model
    console = stderr()
    started = time.perf_counter()
    checks: list[Check] = []
    for name, model in networks.items():
        label = name if args.checkpoint is None else ""
        found = checks_of(model, words.splits, vocabulary, network=label, device=args.device, seed=args.seed)
        compiled = _compiled(model, vocabulary, words, label, args) if args.compiled is not None else ()
        for check in itertools.chain(found, compiled):
            checks.append(check)
            if console.is_terminal:
                console.print(f"{'ok    ' if check.passed else 'FAILED'} {check.name}")
    seconds = time.perf_counter() - started
    rows = [
        [
            check.name,
            check.compared,
            *(f"{value:.1e}" for value in (check.max_abs_error, check.relative_error, check.bound)),
            check.origin,
            "pass" if check.passed else "FAIL",
        ]
        for check in checks
    ]
    columns = [
        "check",
        "what is compared",
        "max abs error",
        "relative to f64",
        "bound",
        "where the bound comes from",
        "result",
    ]
    console.print(table("The convolution against the windowed network", columns, rows))
    failed = [check for check in checks if not check.passed]
    for check in failed:
        console.print(f"FAILED {check.name}: {check.compared}; first at {check.where or 'no single place'}")
    console.print(f"{len(checks) - len(failed)} of {len(checks)} checks passed in {seconds:.1f} s")
    certificate = {
        "passed": not failed,
        "seconds": seconds,
        "networks": {
            name: {"config": model.config(), "weights_sha256": weights_sha256(model)}
            for name, model in networks.items()
        },
        "data": Path(words.source).name,
        "data_sha256": words.sha256,
        "device": device_name(args.device),
        "backends": available_backends(),
        "provenance": provenance(args.command_line),
        "checks": [check.to_json() for check in checks],
    }
    print_json(args, certificate)
    write_atomic(args.out / "certificate.json", (json.dumps(certificate, indent=2) + "\n").encode())
    console.print(f"certificate {args.out / 'certificate.json'}")
    return 1 if failed else 0


def _compiled(
    model: ConvWave, vocabulary: Vocabulary, words: Corpus, label: str, args: argparse.Namespace
) -> Iterator[Check]:
    """The checks of ``--compiled``, when they are asked for: after the others."""
    suffix = f" ({label})" if label else ""
    for check in compiled_checks(model, vocabulary, words.words, args.compiled, args.seed):
        yield replace(check, name=check.name + suffix)


def _trained_on(model: ConvWave, path: Path, words: Corpus) -> bool | None:
    """Whether this is the text that the model was trained on, None where that is unknown; says so when it is not."""
    if model.data_sha256 is None:
        return None
    if model.data_sha256 != words.sha256:
        stderr().print(f"note: {path} was trained on another text; train and val below are the split of {words.source}")
    return model.data_sha256 == words.sha256


def run_words(args: argparse.Namespace, run: Path | None) -> Corpus:
    """The words of ``--data``, else those that a run was trained on, else the default; says what is missing."""
    if run is None or args.data is not None:
        return corpus(args)
    words, missing = _own_words(run)
    if words is not None:
        return announced(words)
    _say_missing(run, missing)
    return corpus(args)


def load_network(path: Path, data: str | None) -> tuple[Path, ConvWave]:
    """The network of a model file or of a run, also of one that was interrupted, and the file that it is from.

    Args:
        path: the file or the folder of the run.
        data: the words to compute statistics of, if the run needs its own and they are gone; None is the default.
    """
    if not path.is_dir():
        return path, load(path)
    model, state = path / MODEL_FILE, path / STATE_FILE
    if not state.exists() or (model.exists() and not _is_extended(path)):
        return model, load(model)

    def learned() -> Corpus:
        words, missing = _own_words(path)
        _say_missing(path, missing)
        return Corpus(words or load_words(data))

    network = read_network(path, learned)
    older = f", not the one of before it was extended, {MODEL_FILE}" if model.exists() else ""
    stderr().print(f"note: {path} was interrupted; this is its network so far{older}")
    return state, network


def _is_extended(run: Path) -> bool:
    """Whether a run's state is later than its network; one that cannot be read is not."""
    folder = Folder(run)
    with suppress(CheckpointError):
        return folder.is_extended(folder.load())
    return False


def _say_missing(run: Path, missing: str | None) -> None:
    if missing is not None:
        stderr().print(f"note: the words that {run} was trained on are not there ({missing}); pass --data FILE")


def _own_words(run: Path) -> tuple[Words | None, str | None]:
    """The words that a run was trained on, or why they are not there; neither where the run does not tell."""
    source = Folder(run).source()
    if source is None:
        return None, None
    try:
        words = bundled_words() if source.path is None else read_words(source.path)
    except DataError as error:
        return None, str(error)
    if words.sha256 != source.sha256:
        return None, f"{source.path or source.name} is not what it was"
    return words, None


def _load(args: argparse.Namespace) -> tuple[Path, ConvWave]:
    path = args.checkpoint or newest_run(RUNS)
    if path is None:
        raise UsageError(f"checkpoint: none given and no {RUNS}/**/{MODEL_FILE} here; run 'convwave train' first")
    return load_network(path, args.data)


def _vocabulary(model: ConvWave, path: Path) -> Vocabulary:
    if model.vocabulary is None:
        raise CheckpointError(f"{path}: was saved without a vocabulary")
    return model.vocabulary
