"""The command line. Results go to standard output with --json, everything for people to standard error.

Exit status: 0 done, 1 a check or a training failed, 2 bad use or bad input (one line says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import torch

from convwave import __version__
from convwave.cli.console import ConsoleReporter, number, stderr, table
from convwave.convert import ConversionError
from convwave.data.packing import Vocabulary, pack, split_words
from convwave.data.words import NAMES_URL, DataError, Words, fetch_names, load_words
from convwave.files import CheckpointError, write_atomic
from convwave.infer.generate import sample
from convwave.infer.score import EvaluationSet
from convwave.nn import ConvWave, load
from convwave.ops.library import available_backends
from convwave.runs.registry import device_name, provenance
from convwave.train.loop import (
    MODEL_FILE,
    MODELS,
    STATE_FILE,
    Config,
    Diverged,
    Interrupted,
    UsageError,
    read_config,
    threads,
    train,
)
from convwave.train.recipes import PUBLISHED, RECIPES
from convwave.train.tiers import TIERS

RUNS = Path("runs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = _parser()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a pipe that knows fewer letters than the data has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        arguments = parser.parse_args(argv)
        arguments.command_line = shlex.join(["convwave", *(sys.argv[1:] if argv is None else argv)])
        return int(arguments.run(arguments) or 0)
    except (DataError, CheckpointError, UsageError, ConversionError) as error:
        return _fail(str(error), 2)
    except Diverged as error:
        return _fail(str(error), 1)
    except Interrupted as error:
        return _fail(str(error), 130)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        return _fail(str(error).splitlines()[0], 2)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2)


def _fail(message: str, status: int) -> int:
    print(f"convwave: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convwave", description="Character models of names as dilated causal convolutions.")
    parser.add_argument("--version", action="version", version=f"convwave {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--data", metavar="FILE", help="text of one word a line (default: $CONVWAVE_DATA, ...)")
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        return sub

    p = command("train", _train, "Train a network, evaluate it, and save it with its loss curve.")
    p.add_argument("--model", choices=MODELS, help="default: convwave")
    p.add_argument("--recipe", choices=list(RECIPES), help="default: fast for convwave, blog for the post's networks")
    p.add_argument("--steps", type=int, help="default: the recipe's")
    p.add_argument("--batch", type=int, help="names or windows a step (default: the recipe's)")
    p.add_argument("--n-embd", type=int, help="channels of the embedding (default: the recipe's)")
    p.add_argument("--n-hidden", type=int, help="channels of every level (default: the recipe's)")
    p.add_argument("--levels", type=int, help="the context is 2^levels tokens (default: the recipe's)")
    p.add_argument("--seed", type=int, help="default: 42 for blog, as in the post, else 0")
    p.add_argument("--device", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--tier", choices=["auto", *TIERS], help="how to train it (default: auto, the fastest there is)")
    p.add_argument("--out", type=Path, metavar="DIR", help="where to save (default: a new directory in runs/)")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out, or begin it")
    p.add_argument("--save-every", type=float, default=10.0, metavar="S", help="seconds between savings (default: 10)")

    p = command("evaluate", _evaluate, "Exact loss of a network on every split.")
    _checkpoint_argument(p)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")

    p = command("sample", _sample, "Invent names.")
    _checkpoint_argument(p)
    p.add_argument("-n", "--count", type=int, default=20, help="how many (default: 20)")
    p.add_argument("--prefix", default="", help="every name begins with this")
    p.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest letter (default: 1)")
    p.add_argument("--top-k", type=int, help="draw among this many likeliest letters")
    p.add_argument("--max-length", type=int, default=100, help="letters after which a name is cut (default: 100)")
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")

    p = command("reproduce", _reproduce, "Train the post's three networks and the convolution; compare the losses.")
    p.add_argument("--out", type=Path, default=RUNS / "reproduce", metavar="DIR", help="default: runs/reproduce")
    p.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    p.add_argument("--blog-steps", type=int, help="steps of the post's recipe (default: 200000)")
    p.add_argument("--fast-steps", type=int, help="steps of the recipe fast (default: the recipe's)")
    p.add_argument("--seed", type=int, help="default: 42 for the post's networks, as in the post, and 0 for fast")

    p = command("verify", _verify, "Prove on this machine that the convolution is the windowed network.")
    _checkpoint_argument(p, "default: a freshly initialised and a briefly trained network")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--seed", type=int, default=0, help="of the networks and batches (default: 0)")
    p.add_argument("--out", type=Path, default=RUNS / "verify", metavar="DIR", help="for the certificate")

    p = command("bench", _bench, "Measure convwave against the windowed MLP and torch.nn (needs a checkout).")
    p.add_argument("studies", nargs="*", metavar="STUDY", help="which (default: all); --list shows them")
    p.add_argument("--list", action="store_true", help="measure nothing: list the studies and what they answer")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: runs/bench; with --report benchmarks/results")
    p.add_argument("--resume", action="store_true", help="pass over studies that --out holds complete")
    p.add_argument("--quick", action="store_true", help="small sizes, few samples, nothing compiled")
    p.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1, the steadiest)")
    p.add_argument("--budget", type=float, metavar="S", help="seconds for all studies; the rest is not measured")
    p.add_argument("--bundle", action="store_true", help="all studies in one JSON and one PNG")
    p.add_argument("--report", action="store_true", help="measure nothing: make the page and the README's tables")

    p = command("data", _data, "Show which words are used; 'data fetch' downloads the post's.")
    p.add_argument("action", nargs="?", choices=["show", "fetch"], default="show")
    p.add_argument("--url", default=NAMES_URL, help="where 'fetch' finds names.txt")
    return parser


def _checkpoint_argument(parser: argparse.ArgumentParser, default: str = "default: the newest in runs/") -> None:
    text = f"a model file or the directory of a run ({default})"
    parser.add_argument("checkpoint", nargs="?", type=Path, help=text)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def _train(args: argparse.Namespace) -> None:
    if not args.save_every >= 0:
        raise UsageError(f"--save-every: expected at least 0, got {args.save_every}")
    if args.resume and args.out is None:
        raise UsageError("--resume: needs --out DIR, the run to go on with")
    names = ("model", "recipe", "steps", "batch", "n_embd", "n_hidden", "levels", "seed", "device", "tier")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.resume and (args.out / STATE_FILE).exists():
        config = read_config(args.out)
        for name, value in given.items():
            if getattr(config, name) != value and (name, value) != ("tier", "auto"):
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{flag}: {args.out} was begun with {getattr(config, name)}, cannot go on with {value}"
                )
    else:
        config = Config.make(**given)
    _check_device(config.device)
    out = args.out or RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{config.model}-{config.recipe}-{config.seed}"
    words = _words(args)
    result = train(config, words, out, resume=args.resume, save_every=args.save_every, reporter=ConsoleReporter())

    rows = [
        [f"{config.model}, {config.recipe}", *map(number, _three(result.splits)), number(result.seconds, 1)],
        *(
            [network.title + ", the post", number(network.train), number(network.val), "", ""]
            for network in _published()
        ),
    ]
    console = stderr()
    console.print(table("Loss in nats", ["", "train", "val", "novel val", "seconds"], rows))
    if not words.is_names_txt:
        console.print(
            f"The post's figures are for names.txt; this run used {words.source}, so they are not comparable.\n"
            "'convwave data fetch' downloads the post's list."
        )
    console.print(f"model {out / MODEL_FILE}\nloss curve {out / 'loss.png'}, {out / 'loss.csv'}")
    _print_json(args, {**result.summary(), "data": words.source})


def _evaluate(args: argparse.Namespace) -> None:
    _check_device(args.device)
    path, model = _load(args)
    started = time.perf_counter()
    words = _words(args)
    same = _trained_on(model, path, words)
    prepared = EvaluationSet(split_words(words.words), _vocabulary(model, path), model.factors, args.device)
    ready = time.perf_counter()
    splits = prepared.losses(model.to(args.device))
    seconds = time.perf_counter() - ready
    rows = [[name, number(split.loss), f"{split.positions:,}"] for name, split in splits.items()]
    console = stderr()
    console.print(table(f"Loss of {path} in nats", ["split", "loss", "positions"], rows))
    console.print(f"prepared in {1000 * (ready - started):.0f} ms, evaluated in {1000 * seconds:.0f} ms")
    _print_json(
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


def _sample(args: argparse.Namespace) -> None:
    _check_device(args.device)
    if args.count < 0:
        raise UsageError(f"--count: expected at least 0, got {args.count}")
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed: expected 0 to 2**63 - 1, got {args.seed}")
    path, model = _load(args)
    vocabulary = _vocabulary(model, path)
    words = _words(args)
    same = _trained_on(model, path, words)
    splits = split_words(words.words)
    started = time.perf_counter()
    try:
        names = sample(
            model.to(args.device),
            args.count,
            seed=args.seed,
            prefix=args.prefix,
            temperature=args.temperature,
            top_k=args.top_k,
            max_length=args.max_length,
            vocabulary=vocabulary,
        )
    except DataError as error:
        raise UsageError(f"--prefix: {error}") from None
    except ValueError as error:
        raise UsageError(str(error)) from None
    seconds = time.perf_counter() - started
    train_set, val_set = set(splits.train), set(splits.val)
    status = ["train" if name in train_set else "val" if name in val_set else "new" for name in names]
    if not args.json:
        _print("".join(f"{name}\t{mark}\n" for name, mark in zip(names, status, strict=True)))
    new = status.count("new")
    stderr().print(f"{len(names):,} names in {seconds:.2f} s ({len(names) / seconds:,.0f}/s), {new:,} of them new")
    _print_json(
        args,
        {
            "checkpoint": str(path),
            "trained_on_this_data": same,
            "names": [{"name": name, "status": mark} for name, mark in zip(names, status, strict=True)],
            "seconds": seconds,
        },
    )


def _reproduce(args: argparse.Namespace) -> None:
    from convwave.runs.plots import reproduction_plot

    if not args.resume and (args.out / "reproduce.json").exists():
        raise UsageError(f"--out: {args.out} holds a reproduction already; pass --resume or choose another directory")
    words = _words(args)
    configs = [Config.make(name, "blog", steps=args.blog_steps, seed=args.seed) for name in PUBLISHED]
    configs.append(Config.make("convwave", "fast", steps=args.fast_steps, seed=args.seed))
    rows: list[dict[str, Any]] = []
    for config in configs:
        result = train(config, words, args.out / config.model, resume=args.resume, reporter=ConsoleReporter())
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
    _print_json(args, report)


def _verify(args: argparse.Namespace) -> int:
    from convwave.verify.certificate import Check, verify, weights_sha256

    _check_device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    words = _words(args)
    splits = split_words(words.words)
    networks: dict[str, ConvWave] = {}
    if args.checkpoint is not None:
        path, model = _load(args)
        networks[str(path)] = model
        vocabulary = _vocabulary(model, path)
    else:
        vocabulary = Vocabulary.from_words(words.words)
        torch.manual_seed(args.seed)
        networks["fresh"] = ConvWave(len(vocabulary), vocabulary=vocabulary)
        networks["trained"] = train(Config.make(steps=60, seed=args.seed), words).model
    console = stderr()
    started = time.perf_counter()
    checks: list[Check] = []
    for name, model in networks.items():
        label = name if args.checkpoint is None else ""
        for check in verify(model, splits, vocabulary, network=label, device=args.device, seed=args.seed):
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
    _print_json(args, certificate)
    write_atomic(args.out / "certificate.json", (json.dumps(certificate, indent=2) + "\n").encode())
    console.print(f"certificate {args.out / 'certificate.json'}")
    return 1 if failed else 0


def _bench(args: argparse.Namespace) -> int:
    _find_benchmarks()
    from benchmarks.command import list_studies, run_studies
    from benchmarks.documents import RESULTS
    from benchmarks.report import write_report
    from benchmarks.studies import STUDIES

    console = stderr()
    if args.list:
        list_studies(console)
        _print_json(args, {"studies": {study.name: study.question for study in STUDIES.values()}})
        return 0
    if args.report:
        if args.studies:
            raise UsageError("--report: makes the report of all studies, takes no STUDY")
        written = write_report(args.out or RESULTS)
        console.print("\n".join(f"written: {path}" for path in written))
        _print_json(args, {"written": [str(path) for path in written]})
        return 0
    unknown = [name for name in args.studies if name not in (*STUDIES, "all")]
    if unknown:
        raise UsageError(f"STUDY: expected some of {', '.join(STUDIES)}, or all, got {unknown[0]!r}")
    names = list(STUDIES) if "all" in args.studies or not args.studies else list(dict.fromkeys(args.studies))
    if args.threads < 1:
        raise UsageError(f"--threads: expected at least 1, got {args.threads}")
    if args.budget is not None and not args.budget > 0:
        raise UsageError(f"--budget: expected more than 0 seconds, got {args.budget:g}")
    _check_device(args.device)
    with threads(args.threads):
        documents = run_studies(
            names,
            _words(args),
            args.out or RUNS / "bench",
            console,
            device=args.device,
            quick=args.quick,
            budget=args.budget,
            bundle=args.bundle,
            resume=args.resume,
        )
    _print_json(args, {"studies": {document["study"]: document for document in documents}})
    return int(any(row["status"] == "wrong" for document in documents for row in document["rows"]))


def _find_benchmarks() -> None:
    """Make the checkout's benchmarks/ importable; it is not installed with the library."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks/command.py").is_file():
        raise UsageError("bench: needs a checkout of convwave, benchmarks/ is not installed with the library")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def _data(args: argparse.Namespace) -> None:
    if args.action == "fetch":
        path = fetch_names(args.url)
        stderr().print(f"{path}: the post's names.txt, checksum verified")
        args.data = args.data or path
    words = _words(args)
    vocabulary = Vocabulary.from_words(words.words)
    splits = split_words(words.words)
    rows = [[n, f"{len(w):,}", f"{len(pack(w, vocabulary)):,}"] for n, w in splits._asdict().items()]
    console = stderr()
    console.print(table(words.source, ["split", "words", "positions"], rows))
    console.print(f"{len(vocabulary)} symbols: {''.join(vocabulary.symbols)}")
    _print_json(
        args,
        {
            "source": words.source,
            "sha256": words.sha256,
            "words": len(words.words),
            "is_names_txt": words.is_names_txt,
            "vocabulary": "".join(vocabulary.symbols),
            "splits": {name: len(value) for name, value in splits._asdict().items()},
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Shared pieces


def _words(args: argparse.Namespace) -> Words:
    words = load_words(args.data)
    note = f", {words.blank_lines} blank lines skipped" if words.blank_lines else ""
    stderr().print(f"data: {words.source}, {len(words.words):,} words{note}")
    return words


def _trained_on(model: ConvWave, path: Path, words: Words) -> bool | None:
    """Whether this is the text that the model was trained on, None where that is unknown; says so when it is not."""
    if model.data_sha256 is None:
        return None
    if model.data_sha256 != words.sha256:
        stderr().print(f"note: {path} was trained on another text; train and val below are the split of {words.source}")
    return model.data_sha256 == words.sha256


def _load(args: argparse.Namespace) -> tuple[Path, ConvWave]:
    path = args.checkpoint
    if path is None:
        found = sorted(RUNS.glob(f"**/{MODEL_FILE}"), key=lambda file: file.stat().st_mtime)
        if not found:
            raise UsageError(f"checkpoint: none given and no {RUNS}/**/{MODEL_FILE} here; run 'convwave train' first")
        path = found[-1]
    elif path.is_dir():
        path = path / MODEL_FILE
    return path, load(path)


def _vocabulary(model: ConvWave, path: Path) -> Vocabulary:
    if model.vocabulary is None:
        raise CheckpointError(f"{path}: was saved without a vocabulary")
    return model.vocabulary


def _check_device(device: str) -> None:
    try:
        if torch.empty(0, device=device).device.type not in ("cpu", "cuda"):
            raise UsageError(f"--device: expected cpu or cuda, got {device!r}")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: {device!r} is not available: {str(error).splitlines()[0]}") from None


def _three(splits: dict[str, Any]) -> list[float | None]:
    return [splits[name].loss for name in ("train", "val", "novel_val")]


def _published() -> list[Any]:
    return list(PUBLISHED.values())


def _print_json(args: argparse.Namespace, value: dict[str, Any]) -> None:
    if args.json:
        _print(json.dumps(value, allow_nan=False) + "\n")


def _print(text: str) -> None:
    """Write to standard output; a reader that has gone, as in `convwave sample | head`, is no error."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
