"""The command line. Results go to standard output with --json, everything for people to standard error.

Exit status: 0 done, 1 a check or a training failed, 2 bad usage or bad input (one line says what is wrong), 130
interrupted.
Each command is named as text and loaded when it runs: ``--version``, ``--help`` and usage errors need no torch.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from convwave import __version__
from convwave._lazy import load
from convwave.data.words import NAMES_URL, DataError, fetch_names
from convwave.files import CheckpointError, quoted
from convwave.runs.folder import RUNS
from convwave.runs.track import TRACKERS
from convwave.train.config import KEEP, MODELS, Diverged, Interrupted, UsageError
from convwave.train.recipes import RECIPES
from convwave.train.tiers import TIERS


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # closed ones, as under cron and pythonw
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115 (for the rest of the process)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the encoding of standard output may lack characters of the data
        sys.stdout.reconfigure(errors="backslashreplace")
    if given[:1] == ["bench"]:
        return _bench(given[1:])
    try:
        arguments = _parser().parse_args(given)
        arguments.command_line = shlex.join(["convwave", *given])
        return int(load(arguments.run)(arguments) or 0)
    except (DataError, CheckpointError, UsageError) as error:
        return _fail(str(error), 2)
    except Diverged as error:
        return _fail(str(error), 1)
    except Interrupted as error:
        return _fail(str(error), 130)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        return _fail(f"{error.filename or 'system'}: {error.strerror or error}", 2)
    except MemoryError:
        return _fail("out of memory", 2)
    except Exception as error:
        if not _is_refusal(error):
            raise
        return _fail(str(error).splitlines()[0], 2)


def _is_refusal(error: Exception) -> bool:
    """Whether it is a conversion that cannot be, or too little memory: torch raises RuntimeErrors for that of a CPU."""
    import torch

    from convwave.convert import ConversionError

    texts = ("can't allocate memory", "not enough memory", "calculation overflowed", "multiplication overflow")
    of_memory = type(error) is RuntimeError and any(text in str(error) for text in texts)
    return of_memory or isinstance(error, ConversionError | torch.OutOfMemoryError)


def _fail(message: str, status: int) -> int:
    with suppress(OSError):  # standard error may be a full disk
        print(f"convwave: {_one_line(message)}", file=sys.stderr)
    return status


def _one_line(message: str, most: int = 1000) -> str:
    line = " ".join(message.splitlines())
    return line if len(line) <= most else line[:most] + "..."


def _whole(low: int, high: int) -> Callable[[str], int]:
    """An option's whole number in a range."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid int value: {quoted(text)}") from None
        if not low <= value <= high:
            limit = "2**64 - 1" if high == 2**64 - 1 else f"{high:,}"
            raise argparse.ArgumentTypeError(f"expected {low:,} to {limit}, got {quoted(text)[1:-1]}")
        return value

    return parse


def _path(text: str) -> Path:
    """An option's path: "" would be the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected a path, got {quoted(text)}")
    return Path(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message, 300)} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="convwave", description="Character models of names as dilated causal convolutions.")
    parser.add_argument("--version", action="version", version=f"convwave {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)

    def command(name: str, run: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=f"convwave.cli.{run}")
        sub.add_argument("--data", metavar="FILE", help="text with one word per line (default: $CONVWAVE_DATA, ...)")
        sub.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        return sub

    p = command("train", "train:train", "Train a network, evaluate it, and save it with its loss curve.")
    p.add_argument("--model", choices=MODELS, help="default: convwave")
    text = f"{', '.join(RECIPES)}, or a .toml file of a recipe's fields (default: fast, blog for the post's networks)"
    p.add_argument("--recipe", metavar="NAME", help=text)
    text = "another value in a field of the recipe, such as adam_lr=0.02; may be repeated"
    p.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=text)
    p.add_argument(
        "--steps", type=_whole(1, 2**31 - 1), help="default: the recipe's on names.txt, else in proportion to the words"
    )
    p.add_argument("--batch", type=_whole(1, 2**31 - 1), help="names or windows per step (default: the recipe's)")
    p.add_argument("--n-embd", type=_whole(1, 2**31 - 1), help="channels of the embedding (default: the recipe's)")
    p.add_argument("--n-hidden", type=_whole(1, 2**31 - 1), help="channels of every level (default: the recipe's)")
    p.add_argument("--levels", type=_whole(1, 2**31 - 1), help="the context is 2^levels tokens (default: the recipe's)")
    p.add_argument("--seed", type=int, help="default: 42 for blog, as in the post, else 0")
    p.add_argument("--device", help="cpu (default), cuda, cuda:1, ...")
    p.add_argument("--tier", choices=["auto", *TIERS], help="implementation (default: auto, the fastest available)")
    p.add_argument("--out", type=_path, metavar="DIR", help="where to save (default: a new directory in runs/)")
    p.add_argument("--keep", choices=KEEP, help="default: best by validation, on names.txt last, as published")
    text = "continue the run in --out, or begin it; with more --steps than it has, extend it"
    p.add_argument("--resume", action="store_true", help=text)
    p.add_argument("--init", type=_path, metavar="RUN", help="begin with the weights of another run")
    p.add_argument("--save-every", type=float, default=10.0, metavar="S", help="seconds between saves (default: 10)")
    text = "look at gradients, updates and activations every STEPS steps (default: some 20 times), for 'convwave plot'"
    p.add_argument("--diagnostics", nargs="?", const=0, type=_whole(1, 2**31 - 1), metavar="STEPS", help=text)
    p.add_argument("--track", choices=TRACKERS, help="also write losses and diagnostics through this library")

    p = command("runs", "runs:runs", "List runs; 'runs show RUN' prints one, 'runs compare RUN ..' draws several.")
    p.add_argument("action", nargs="?", choices=["list", "show", "compare"], default="list")
    p.add_argument("runs", nargs="*", metavar="RUN", help="a run's folder, or its name in --dir")
    p.add_argument("--dir", type=_path, default=RUNS, metavar="DIR", help=f"where the runs are (default: {RUNS})")
    text = "list by this: run, state, done, val_loss, seconds, any field of the configuration (default: changed)"
    p.add_argument("--sort", default="changed", metavar="FIELD", help=text)
    p.add_argument("--reverse", action="store_true", help="the other way round")
    text = "list only runs that are so, such as recipe=fast, state=finished or val_loss<2.03; may be repeated"
    p.add_argument("--where", action="append", default=[], metavar="CONDITION", help=text)
    p.add_argument(
        "--out", type=_path, metavar="FILE", help="picture of compare, .png or .svg (default: DIR/compare.png)"
    )

    p = command("plot", "runs:plot", "Draw a run: losses, activations, updates, embedding, weights.")
    p.add_argument("folder", type=_path, metavar="RUN", help="the folder of a run")
    p.add_argument("--out", type=_path, metavar="DIR", help="for the pictures (default: RUN/plots)")

    p = command("evaluate", "model:evaluate", "Exact loss of a network on every split.")
    _checkpoint_argument(p)
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")

    p = command("sample", "model:sample", "Invent names.")
    _checkpoint_argument(p)
    p.add_argument("-n", "--count", type=_whole(0, 10_000_000), default=20, help="how many (default: 20)")
    p.add_argument("--prefix", default="", help="every name begins with this")
    p.add_argument("--temperature", type=float, default=1.0, help="0: always the most likely letter (default: 1)")
    p.add_argument("--top-k", type=_whole(1, 2**31 - 1), help="draw from this many most likely letters")
    p.add_argument(
        "--max-length", type=_whole(1, 100_000), default=100, help="maximum letters of a name (default: 100)"
    )
    p.add_argument("--unique", action="store_true", help="every name once")
    p.add_argument("--new-only", action="store_true", help="no name of the data")
    p.add_argument("--seed", type=_whole(0, 2**64 - 1), help="to repeat the names (default: another in every run)")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")

    text = "Train many variations of a recipe; 'sweep report DIR' says what they show."
    p = command("sweep", "sweep:sweep", text)
    p.add_argument("file", metavar="FILE.toml", help="what to try (see convwave/sweep/plan.py), or 'report'")
    p.add_argument("folder", nargs="?", type=_path, metavar="DIR", help="of report: a sweep's folder or its .json")
    text = "for journal, results and pictures; a sweep that is there is continued, also by several processes at once"
    p.add_argument("--out", type=_path, metavar="DIR", help=text)
    p.add_argument("--workers", type=_whole(1, 1000), default=1, metavar="N", help="processes (default: 1)")
    text = "of Optuna, instead of a journal in DIR: grpc://HOST:PORT, postgresql://.., sqlite:///FILE, redis://.."
    p.add_argument("--storage", metavar="URL", help=text)
    text = "of report: compare with this configuration (default: the recipe's own values)"
    p.add_argument("--baseline", action="append", default=[], metavar="FIELD=VALUE", help=text)
    p.add_argument("--worker", type=int, help=argparse.SUPPRESS)  # of --workers

    p = command(
        "reproduce",
        "train:reproduce",
        "Train the post's three networks and the convolution; compare the losses.",
    )
    p.add_argument("--out", type=_path, default=RUNS / "reproduce", metavar="DIR", help="default: runs/reproduce")
    p.add_argument("--resume", action="store_true", help="continue the runs in --out")
    p.add_argument("--blog-steps", type=_whole(1, 2**31 - 1), help="steps of the post's recipe (default: 200000)")
    p.add_argument("--fast-steps", type=_whole(1, 2**31 - 1), help="steps of the recipe fast (default: the recipe's)")
    p.add_argument("--seed", type=int, help="default: 42 for the post's networks, as in the post, and 0 for fast")

    p = command("verify", "model:verify", "Prove on this machine that the convolution is the windowed network.")
    _checkpoint_argument(p, "default: a freshly initialised and a briefly trained network")
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--seed", type=_whole(0, 2**64 - 1), default=0, help="of the networks and batches (default: 0)")
    p.add_argument("--out", type=_path, default=RUNS / "verify", metavar="DIR", help="for the certificate")
    text = "execute the kernels as compiled for this GPU too, without one (default: sm_90; needs a checkout, minutes)"
    p.add_argument("--compiled", nargs="?", const="sm_90", choices=["sm_80", "sm_90"], help=text)

    # not parsed here: everything behind it is for the checkout's `python -m benchmarks`
    text = "Measure convwave against the windowed MLP and torch.nn (needs a checkout)."
    commands.add_parser("bench", help=text, add_help=False)

    p = command("data", "main:show_data", "Show which words are used; 'data fetch' downloads the post's.")
    p.add_argument("action", nargs="?", choices=["show", "fetch"], default="show")
    p.add_argument("--url", default=NAMES_URL, help="where 'fetch' finds names.txt")
    return parser


def _checkpoint_argument(parser: argparse.ArgumentParser, default: str = "default: the newest in runs/") -> None:
    text = f"a model file or the directory of a run ({default})"
    parser.add_argument("checkpoint", nargs="?", type=_path, help=text)


def _bench(arguments: list[str]) -> int:
    """``convwave bench``: ``python -m benchmarks`` of the checkout that this package lies in, in the same folder."""
    from convwave.cli import checkout

    root = checkout.find("benchmarks/__main__.py")
    if root is None:
        return _fail("bench: needs a checkout of convwave, benchmarks/ is not installed with the library", 2)
    # -P: a folder "benchmarks" where the user stands is another one
    command = [sys.executable, "-P", "-m", "benchmarks", *arguments]
    with subprocess.Popen(command, env=checkout.environment(root)) as process:
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # the child has it too, and ends in its own way
                continue
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def show_data(args: argparse.Namespace) -> None:
    """``convwave data``."""
    from convwave.cli.console import corpus, print_json, stderr, table

    if args.action == "fetch":
        path = fetch_names(args.url)
        stderr().print(f"{path}: the post's names.txt, checksum verified")
        args.data = args.data or path
    words = corpus(args)
    splits = words.splits._asdict()
    rows = [[name, f"{len(value):,}", f"{len(getattr(words, name)):,}"] for name, value in splits.items()]
    console = stderr()
    console.print(table(words.source, ["split", "words", "positions"], rows))
    symbols = "".join(words.vocabulary.symbols)
    console.print(f"{len(symbols)} symbols: {symbols}")
    print_json(
        args,
        {
            "source": words.source,
            "sha256": words.sha256,
            "words": len(words.words),
            "is_names_txt": words.is_names_txt,
            "vocabulary": symbols,
            "splits": {name: len(value) for name, value in splits.items()},
        },
    )


if __name__ == "__main__":
    sys.exit(main())
