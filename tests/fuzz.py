"""Damaged model files, states and texts, and odd command lines: each is used or refused in one line.

    python -m tests.fuzz                     all (`make fuzz`)
    python -m tests.fuzz --commands 50       fewer of one kind
    python -m tests.fuzz --seed 7            others

A failure is an exception that reaches the user, more than one line of refusal, a status that is not 0, 1, 2 or 130, a
case that computes for 20 seconds or waits for 300, or an allocation above 1 GB (the address space is limited to that
much more). Equal seeds and numbers give equal cases. `convwave bench`, which is a process of its own, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import convwave as cw
from convwave import cli
from convwave.files import CheckpointError, read_tensors, write_tensors
from convwave.nn import MODEL_FORMAT
from convwave.runs.folder import MODEL_FILE, STATE_FILE, STATE_FORMAT
from convwave.train.loop import read_config

SECONDS, PATIENCE = 20.0, 300.0  # of computing, and in all: a busy machine makes nothing fail
MOST = 2**30
WORDS = ["anna", "berta", "carla", "dora", "emma", "frida", "gerda", "hanna"] * 20

# odd values for a number, a path or a word
ODD = [
    "",
    "0",
    "-1",
    "1",
    "2",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "1.5",
    "0x10",
    "1_0",
    "\u0663",
    "x",
    ".",
    "..",
    "/",
]
ODD += [str(2**n + d) for n in (31, 32, 53, 63, 64) for d in (-1, 0)] + ["9" * 5000, "-" + "9" * 400, str(25 * 10**9)]
ODD += [
    "\0",
    "a\0b",
    "\udcff",
    "\ud800",
    "\n",
    "a\nb",
    "é",
    "語" * 300,
    "a" * 3000,
    "--",
    "-n",
    "cpu",
    "cpu:99",
    "cuda:99",
]
ODD += ["/dev/null", "/dev/zero", "/nowhere/x", "true", "none", "[]", "{}", "=", "adam_lr=", "levels=13", "[" * 10_000]
JSON: list[Any] = [None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53, 2**63, 2**64, 10**300, 1.5, 1e308, -1e308, 5e-324]
JSON += [
    float("nan"),
    float("inf"),
    "",
    "x",
    ".",
    ".a",
    "\ud800",
    "a" * 10_000,
    [],
    {},
    [2] * 1000,
    [1] * 60,
    [[2]],
    {"a": 1},
]


class Hang(BaseException):
    """A case took too long. Not an Exception, so that no handler mistakes it for a refusal."""


class Case:
    """The outcome of one command or call."""

    def __init__(self, run: Callable[[], int | None]) -> None:
        out, err = io.StringIO(), io.StringIO()
        self.failure: str | None = None
        self.status: int | None = None

        def stop(signum: int, frame: Any) -> None:
            raise Hang

        timers = ((signal.ITIMER_PROF, signal.SIGPROF, SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, PATIENCE))
        previous = [signal.signal(number, stop) for _, number, _ in timers]
        for timer, _, seconds in timers:
            signal.setitimer(timer, seconds)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                self.status = run()
        except SystemExit as error:
            self.status = error.code if isinstance(error.code, int) else 1
        except Hang:
            self.failure = f"hangs, stopped after {SECONDS:g} seconds of computing, or {PATIENCE:g} in all"
        except Exception:
            self.failure = traceback.format_exc(limit=-6)
        finally:
            for (timer, number, _), handler in zip(timers, previous, strict=True):
                signal.setitimer(timer, 0)
                signal.signal(number, handler)
        self.out, self.err = out.getvalue(), err.getvalue()

    def check(self, limited: bool = True) -> str | None:
        """What is wrong with it, None where nothing is; `limited`: it may not ask for more than 1 GB."""
        if self.failure is not None:
            return self.failure
        if self.status not in (0, 1, 2, 130):
            return f"status {self.status}"
        told = [line for line in self.err.split("\n") if line.startswith("convwave")]
        if self.status and len(told) != 1:
            return f"status {self.status} with {len(told)} lines: {self.err[-500:]}"
        # "needs at least" is what a configuration is told before anything is asked for
        if limited and any(("memory" in line or "allocate" in line) and "needs at least" not in line for line in told):
            return f"asks for more than 1 GB: {told[0]}"
        return None


def command(*arguments: str) -> Case:
    return Case(lambda: cli.main(arguments))


class Fuzz:
    """Cases of every kind, in a folder of their own.

    Args:
        folder: to work in; what fails is kept in ``folder / "failed"``.
        seed: of all cases.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.text, self.run, self.file = folder / "words.txt", folder / "run", folder / "case"
        self.text.write_text("\n".join(WORDS))
        train = ["train", "--steps", "3", "--batch", "8", "--n-hidden", "6", "--n-embd", "3", "--data", str(self.text)]
        done = command(*train, "--out", str(self.run))
        assert done.status == 0, done.err or done.failure
        unfinished = folder / "state"
        tensors, metadata = read_tensors(self.run / STATE_FILE, STATE_FORMAT)
        metadata["config"]["steps"] += 1
        write_tensors(unfinished, tensors, metadata)
        self.kinds = {"model": self.run / MODEL_FILE, "state": unfinished}
        self.whole = {kind: path.read_bytes() for kind, path in self.kinds.items()}
        self.failures: list[str] = []
        self.seen: Counter[str] = Counter()

    def note(self, kind: str, what: str, case: Case, *, file: Path | None = None, limited: bool = True) -> None:
        wrong = case.check(limited)
        self.seen[f"{kind}: {'used' if case.status == 0 else 'refused' if wrong is None else 'failed'}"] += 1
        if wrong is not None:
            kept = ""
            if file is not None:
                target = self.folder / "failed" / f"{kind}-{len(self.failures)}"
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
                kept = f" ({target})"
            self.failures.append(f"{kind}: {what}{kept}\n{wrong}")

    # checkpoints

    def checkpoints(self, count: int) -> None:
        """Three models for every state."""
        for i in range(count):
            kind = "state" if i % 4 == 3 else "model"
            how, content = self._damaged(kind)
            self.file.write_bytes(content)
            if kind == "state":
                folder = self.folder / "resumed"
                folder.mkdir(exist_ok=True)
                for left in folder.iterdir():
                    left.unlink()
                shutil.copy(self.file, folder / STATE_FILE)
                self.note(kind, how, self._state(folder, resume=i % 16 == 3), file=self.file)
                continue
            data = ["--data", str(self.text)]
            case = command("evaluate", str(self.file), *data, "--json")
            if case.status == 0 and case.failure is None:
                with contextlib.suppress(ValueError):
                    json.loads(case.out)
                case = command("sample", str(self.file), "-n", "3", "--max-length", "9", *data)
            self.note(kind, how, case, file=self.file)

    def _state(self, folder: Path, resume: bool) -> Case:
        """Evaluate an interrupted run, or go on with it if it wants few steps."""
        data = ["--data", str(self.text)]
        if resume:
            with contextlib.suppress(CheckpointError):
                resume = read_config(folder).steps < 10
        return command(*(["train", "--resume", "--out"] if resume else ["evaluate"]), str(folder), *data)

    def _damaged(self, kind: str) -> tuple[str, bytes]:
        how = self.random.choice(
            ["bits", "bytes", "cut", "header", "header", "config", "config", "values", "shape", "odd"]
        )
        content = bytearray(self.whole[kind])
        if how == "bits":
            for _ in range(self.random.choice([1, 1, 2, 8])):
                content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        elif how == "bytes":
            start = self.random.choice([0, 8, self.random.randrange(len(content))])
            content[start : start + self.random.randrange(1, 64)] = self.random.randbytes(self.random.randrange(64))
        elif how == "cut":
            start, length = self.random.randrange(len(content)), self.random.randrange(2000)
            content[start : start + length] = content[:length] if self.random.random() < 0.5 else b""
        elif how == "header":
            content = bytearray(self._other_header(bytes(content)))
        else:
            content = bytearray(self._other_tensors(kind, how))
        return how, bytes(content)

    def _other_header(self, content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        if self.random.random() < 0.7:
            header["__metadata__"].pop("checksum", None)
        for _ in range(self.random.choice([1, 1, 3])):
            if self.random.random() < 0.3:  # text that is JSON within JSON
                text = self.random.choice(
                    ["[" * 100_000, "{", "9" * 5000, "NaN", json.dumps(self.random.choice(JSON)), "\x00"]
                )
                header["__metadata__"] = {**header.get("__metadata__", {}), "config": text}
            else:
                header = self._changed(header)
                if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
                    break
        text = json.dumps(header).encode()
        if self.random.random() < 0.02:
            text = b'{"a":' + b"[" * 100_000
        if self.random.random() < 0.02:
            return self.random.choice([2**63, 2**64 - 1, 2**40, len(text) + len(content)]).to_bytes(8, "little") + text
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    def _changed(self, value: Any) -> Any:
        """The JSON with one value changed, removed or added."""
        if isinstance(value, dict) and value and self.random.random() < 0.9:
            key = self.random.choice(sorted(value))
            fate = self.random.random()
            if fate < 0.1:
                return {k: v for k, v in value.items() if k != key}
            if fate < 0.2:
                return {**value, self.random.choice(["x", "levels", "backend", key + "2"]): self.random.choice(JSON)}
            return {**value, key: self._changed(value[key])}
        if isinstance(value, list) and value and self.random.random() < 0.7:
            i = self.random.randrange(len(value))
            return [*value[:i], self._changed(value[i]), *value[i + 1 :]]
        return self.random.choice(JSON)

    def _other_tensors(self, kind: str, how: str) -> bytes:
        """A file whose checksum is right and whose content is not."""
        text_format = {"model": MODEL_FORMAT, "state": STATE_FORMAT}[kind]
        if how == "odd" and kind == "model":  # valid, of odd sizes
            vocabulary = cw.Vocabulary(["." if i == 0 else chr(96 + i) for i in range(27)])
            factors = [self.random.choice([2, 2, 3, 50]) for _ in range(self.random.choice([1, 2, 5, 20, 60]))]
            network = cw.ConvWave(27, 1, self.random.choice([1, 2]), factors=factors, vocabulary=vocabulary)
            network.save(self.folder / "odd")
            return (self.folder / "odd").read_bytes()
        tensors, metadata = read_tensors(self.kinds[kind], text_format)
        if how == "config":
            for _ in range(self.random.choice([1, 1, 2])):
                metadata["config"] = self._changed(metadata["config"])
        name = self.random.choice(sorted(tensors))
        tensor = tensors[name]
        if how == "values":
            odd = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -1.0, 0.0, 1e20]
            for chosen in self.random.sample(sorted(tensors), self.random.choice([1, 2, len(tensors)])):
                if tensors[chosen].is_floating_point():
                    changed = tensors[chosen].clone().reshape(-1)
                    changed[: self.random.choice([1, changed.numel()])] = self.random.choice(odd)
                    tensors[chosen] = changed.view(tensors[chosen].shape)
        elif how in ("shape", "odd"):
            size = self.random.choice([0, 1, 2, 7, 1000])
            fates: list[Callable[[], torch.Tensor]] = [
                lambda: tensor.reshape(-1),
                lambda: tensor.reshape(-1)[:size].clone(),
                lambda: tensor.new_zeros(size, size),
                lambda: tensor.new_zeros(()),
                lambda: tensor[None],
                *(lambda dtype=dtype: tensor.to(dtype) for dtype in _DTYPES),
            ]
            tensors[name] = self.random.choice(fates)()
            if self.random.random() < 0.2:
                del tensors[name]
            if self.random.random() < 0.2:
                tensors = {key: value.to(self.random.choice(_DTYPES)) for key, value in tensors.items()}
        write_tensors(
            self.folder / "other",
            tensors,
            {"format": text_format, **{k: v for k, v in metadata.items() if k != "format"}},
        )
        return (self.folder / "other").read_bytes()

    # texts

    def files(self, count: int) -> None:
        """Every text is read; one of 20 is evaluated, one of 40 trained on."""
        for i in range(count):
            self.file.write_bytes(self._text())
            data = ["--data", str(self.file)]
            self.note("text", "data", command("data", *data, "--json"), file=self.file)
            if i % 20 == 0:
                self.note("text", "evaluate", command("evaluate", str(self.run), *data, "--json"), file=self.file)
            if i % 40 == 0:
                out = self.folder / "trained"
                shutil.rmtree(out, ignore_errors=True)
                options = ["--steps", "2", "--batch", "8", "--out", str(out)]
                self.note("text", "train", command("train", *data, *options), file=self.file)

    def _text(self) -> bytes:
        pick = self.random
        if pick.random() < 0.1:
            return pick.randbytes(pick.choice([0, 1, 2, 3, 50, 5000]))
        if pick.random() < 0.1:
            letters = [
                chr(pick.choice([pick.randrange(33, 0xD800), pick.randrange(0xE000, 0x110000)])) for _ in range(3000)
            ]
            return "\n".join("".join(pick.sample(letters, 6)) for _ in range(pick.choice([1, 11, 400]))).encode()
        lines: list[bytes] = [pick.choice(WORDS).encode() for _ in range(pick.choice([0, 1, 2, 9, 10, 11, 300]))]
        odd = [
            b"",
            b" ",
            b"\t",
            b"\0",
            b".",
            b"a.b",
            b"\xff",
            b"\xed\xa0\x80",
            b"\xef\xbb\xbf",
            b"\x1b[2J",
            b"\x85",
            b"\xc2\x85",
        ]
        odd += ["\u2028".encode(), "\u200b".encode(), "é".encode(), "e\u0301".encode(), "\U0010ffff".encode()]
        odd += [b"a" * 100_000, b"a." * 50_000, b"\r", b"\r\r\n", b"\x1a", b"\xf4\x90\x80\x80", b"a b", b"\xc3"]
        for _ in range(pick.choice([0, 1, 1, 3])):
            place = pick.randrange(len(lines) + 1)
            lines.insert(place, pick.choice(odd))
            if pick.random() < 0.3 and place < len(lines):
                lines[place] = pick.choice(WORDS).encode() + lines[place]
        return pick.choice([b"\n", b"\n", b"\r\n", b"\r", b"\n\n"]).join(lines) + pick.choice([b"", b"\n"])

    # command lines

    def commands(self, count: int) -> None:
        """A valid command with one to three odd options."""
        for i in range(count):
            name = self.random.choices(list(_OPTIONS), [40, 1, 15, 25, 3, 16])[0]
            right = {
                "train": ["--steps", "2", "--batch", "8", "--out", str(self.folder / f"out{i}")],
                "reproduce": ["--blog-steps", "2", "--fast-steps", "2", "--out", str(self.folder / f"out{i}")],
                "evaluate": [str(self.run)],
                "sample": [str(self.run)],
                "verify": [str(self.run), "--out", str(self.folder / f"out{i}")],
                "data": [],
            }[name]
            if name == "train" and self.random.random() < 0.2:
                right = ["--resume", "--out", str(self.run)]
            arguments = [name, *right, "--data", str(self.text)]
            for _ in range(self.random.choice([1, 1, 2, 3])):
                option = self.random.choice(_OPTIONS[name])
                value = self.random.choice(ODD if self.random.random() < 0.6 else _PLAUSIBLE)
                if option == "--set":
                    value = self.random.choice([value, f"{self.random.choice(_FIELDS)}={value}"])
                if option == "--recipe" and self.random.random() < 0.8:  # of a file
                    value = str(self.folder / "recipe.toml")
                    fields = [self.random.choice(_FIELDS) for _ in range(self.random.choice([1, 1, 2]))]
                    values = [self.random.choice(ODD if self.random.random() < 0.6 else _PLAUSIBLE) for _ in fields]
                    lines = [f"{f} = {v}" for f, v in zip(fields, values, strict=True) if f != "steps" or len(v) < 6]
                    Path(value).write_bytes("\n".join(['base = "fast"', *lines]).encode(errors="surrogatepass"))
                if "steps" in option + value and ("=" in option + value or value == str(2**31 - 1)) and len(value) > 5:
                    continue  # a long training, as asked for
                arguments += [option, value] if option and self.random.random() < 0.9 else [option or value]
            self.note("command", shlex.join(arguments)[:300], command(*arguments), limited=False)
            shutil.rmtree(self.folder / f"out{i}", ignore_errors=True)


_DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.bool,
    torch.uint8,
]
_FIELDS = [
    "steps",
    "batch",
    "lr",
    "adam_lr",
    "adam_beta",
    "momentum",
    "weight_decay",
    "warmup",
    "token_noise",
    "growth",
]
_FIELDS += [
    "context_power",
    "n_embd",
    "n_hidden",
    "levels",
    "orthogonal_steps",
    "optimizer",
    "batch_of",
    "name",
    "colour",
]
_PLAUSIBLE = [
    "1",
    "2",
    "3",
    "0.5",
    "1",
    "a",
    "an",
    "cpu",
    "cpu:0",
    "auto",
    "reference",
    "cpu",
    "convwave",
    "mlp3",
    "fast",
    "blog",
]
_OPTIONS = {
    name: options.split(" ")
    for name, options in {
        "train": "--model --recipe --set --set --steps --batch --n-embd --n-hidden --levels --seed --device --tier "
        "--out --save-every --data --json ",
        "reproduce": "--out --resume --blog-steps --fast-steps --seed --data ",
        "evaluate": "--device --data --json --resume ",
        "sample": "--count --prefix --temperature --top-k --max-length --seed --device --data "
        "--unique --new-only --json ",
        "verify": "--seed --device --out --data",
        "data": "--url --data --json show ",
    }.items()
}  # the last of most is "": a value without an option


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Let the process have 1 GB of addresses more than it has."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MOST, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=4_000)
    parser.add_argument("--commands", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="convwave-fuzz-"))
    os.chdir(folder)  # runs/ is made in the current folder
    fuzz = Fuzz(folder, args.seed)
    with limited():
        for name in ("checkpoints", "files", "commands"):
            began, before = time.perf_counter(), len(fuzz.failures)
            getattr(fuzz, name)(getattr(args, name))
            seconds = time.perf_counter() - began
            failed = len(fuzz.failures) - before
            print(f"{getattr(args, name):,} {name}: {failed} failures in {seconds:.0f} s", flush=True)
    print(", ".join(f"{what} {number:,}" for what, number in sorted(fuzz.seen.items())))
    for failure in fuzz.failures:
        print(f"\n{failure}")
    if not fuzz.failures:
        shutil.rmtree(folder)
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    sys.exit(main())
