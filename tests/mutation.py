"""A suite that can fail: plausible faults planted one at a time, each of which the tests must catch.

    python -m tests.mutation NAME      plant one fault, run the tests in a process of its own
    python -m tests.mutation --report  plant every fault, write tests/MUTANTS.md, also with what `convwave verify` sees

`test_mutation.py` plants them all. The faults live in memory only: files are not touched.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = [
    f"tests/test_{name}.py"
    for name in ("equivalence", "graph", "generation", "convert", "evaluation", "data", "closed_form")
]


@dataclass(frozen=True)
class Mutant:
    """One fault: a piece of a module's source replaced by another."""

    name: str
    module: str
    old: str
    new: str


MUTANTS = [
    Mutant("taps swapped", "eager", "weight.permute(2, 1, 0)", "weight.flip(2).permute(2, 1, 0)"),
    Mutant(
        "one tap's matrix used twice where products are gathered",
        "eager",
        "(h @ weight[:, :, j].T)",
        "(h @ weight[:, :, j - 1].T)",
    ),
    Mutant(
        "zero padding at the first position",
        "eager",
        "[h.index_select(0, tap) for tap in taps]",
        "[h.index_select(0, t) * (1 - (t == taps[-1]).to(h) * (j + 1 < k))[:, None] for j, t in enumerate(taps)]",
    ),
    Mutant("weights ignored in the mean", "eager", "(w * z).sum(0) / total", "z.mean(0)"),
    Mutant("weights ignored in the variance", "eager", "(w * deviation.square()).sum(0) / divisor", "z.var(0)"),
    Mutant("weights squared in the variance", "eager", "(w * deviation.square())", "((w * deviation).square())"),
    Mutant("weights ignored in the backward pass", "eager", "correction.mul_(weights.to(g.dtype)[:, None])", "pass"),
    Mutant(
        "weights multiply the gradient too",
        "eager",
        "g.sub_(correction)",
        "g.mul_(weights.to(g.dtype)[:, None] if weights is not None else 1).sub_(correction)",
    ),
    Mutant("no gradient through the mean", "eager", "torch.addcmul(dbeta / ctx.total,", "torch.addcmul(0 * dbeta,"),
    Mutant("no gradient through the variance", "eager", "dgamma * rstd / ctx.divisor)", "0 * dgamma)"),
    Mutant(
        "biased for unbiased in the backward pass",
        "eager",
        "dgamma * rstd / ctx.divisor)",
        "dgamma * rstd / ctx.total)",
    ),
    Mutant("derivative of tanh forgotten", "eager", "torch.ops.aten.tanh_backward(dh, h)", "dh.clone()"),
    Mutant("biased for unbiased", "eager", "total - 1 if unbiased else total\n", "total\n"),
    Mutant("unbiased for biased", "eager", "total - 1 if unbiased else total\n", "total - 1\n"),
    Mutant(
        "running variance biased",
        "eager",
        "    tracked = var\n",
        "    tracked = var * (total - 1) / total\n",
    ),
    Mutant(
        "running variance of the biased kind not corrected",
        "eager",
        "elif total > 1:",
        "elif False:",
    ),
    Mutant("running mean not tracked", "eager", "running_mean.lerp_", "running_mean.clone().lerp_"),
    Mutant("momentum of the wrong side", "eager", "running_var.dtype), momentum)", "running_var.dtype), 1 - momentum)"),
    Mutant("eps forgotten", "eager", "rstd = torch.rsqrt(var + eps)", "rstd = torch.rsqrt(var)"),
    Mutant("eps outside the root", "eager", "rstd = torch.rsqrt(var + eps)", "rstd = 1 / (var.sqrt() + eps)"),
    Mutant(
        "eps forgotten in evaluation",
        "eager",
        "norm_weight * torch.rsqrt(running_var + eps)",
        "norm_weight * torch.rsqrt(running_var)",
    ),
    Mutant("running mean forgotten in evaluation", "eager", "norm_bias - running_mean * scale", "norm_bias"),
    Mutant("loss ignores the counts", "functional", "nll * graph.target_counts.to(nll.dtype)", "nll"),
    Mutant("loss divided by the rows", "functional", "/ graph.totals[-1]", "/ nll.numel()"),
    Mutant(
        "clamp off by one",
        "graph",
        "torch.maximum(row, first)",
        "torch.maximum(row, (first - 1).clamp(min=0))",
    ),
    Mutant(
        "boundary of a packed name crossed",
        "graph",
        "torch.maximum(row, first)",
        "row.clamp(min=0)",
    ),
    Mutant("dilation not multiplied", "graph", "factor, math.prod(factors[:level])", "factor, level + 1"),
    Mutant(
        "newest tap one late",
        "graph",
        "range((kernel_size - 1) * dilation, -1, -dilation)",
        "range(kernel_size * dilation, 0, -dilation)",
    ),
    Mutant("counts not propagated", "graph", "below.index_add_(0, tap, weights[0])", "below.fill_(1)"),
    Mutant("counts propagated along one tap", "graph", "for tap in taps[level]:", "for tap in taps[level][:1]:"),
    Mutant("totals not multiplied", "graph", "totals.insert(0, totals[0] * factor)", "totals.insert(0, totals[0])"),
    Mutant("distinct contexts collide", "graph", "key * bound + row", "key * (bound // 2) + row"),
    Mutant(
        "counts ignored in the distinct graph",
        "graph",
        ".index_add_(0, ids, counts)",
        ".index_add_(0, ids, counts.sign())",
    ),
    Mutant(
        "counts ignored in the targets",
        "graph",
        ".index_add_(0, target, counts)",
        ".index_add_(0, target, counts.sign())",
    ),
    Mutant(
        "a window drawn twice counts once",
        "graph",
        "torch.bincount(inverse, minlength=kept.numel())",
        "torch.ones(kept.numel())",
    ),
    Mutant("windows one token early", "graph", "torch.arange(context - 1, -1, -1,", "torch.arange(context, 0, -1,"),
    Mutant(
        "targets not shifted", "data", "torch.cat([tokens[1:], tokens.new_zeros(min(len(words), 1))])", "tokens.clone()"
    ),
    Mutant(
        "last position of a name dropped",
        "data",
        "self.cu_seqlens[words + 1] - starts",
        "self.cu_seqlens[words + 1] - starts - 1",
    ),
    Mutant(
        "first position of a name dropped",
        "data",
        "starts = self.cu_seqlens[words]\n",
        "starts = self.cu_seqlens[words] + 1\n",
    ),
    Mutant("statistics over positions for windows", "nn", "block(h, taps, weights, total) if", "block(h, taps) if"),
    Mutant("tap and channel mixed up in conversion", "convert", "view(H, k, C).transpose(1, 2)", "view(H, C, k)"),
    Mutant(
        "tap and channel mixed up in conversion back",
        "convert",
        "block.conv.weight.transpose(1, 2).flatten(1)",
        "block.conv.weight.flatten(1)",
    ),
    Mutant("bias folded with the wrong sign", "convert", "running_mean -= level.shift", "running_mean += level.shift"),
    Mutant("running statistics not converted", "convert", '"bias", "running_mean", "running_var"]', '"bias"]'),
    Mutant(
        "cache filled with zeros",
        "generation",
        "padding.expand((k - 1) * d, batch, -1).clone()",
        "padding.expand((k - 1) * d, batch, -1).clone().zero_()",
    ),
    Mutant(
        "cache filled with one level's padding",
        "generation",
        "padding = torch.tanh(padding.repeat(k) @ weight + self.levels[-1][1])",
        "padding = torch.tanh(padding.repeat(k) @ weight)",
    ),
    Mutant(
        "cache written one slot late",
        "generation",
        "ring[self.position % length] = h",
        "ring[(self.position + 1) % length] = h",
    ),
    Mutant(
        "cache reads the wrong row after a name has ended",
        "generation",
        "[ring[:, rows] for ring in self.rings]",
        "[ring[:, : int(rows.sum())] for ring in self.rings]",
    ),
    Mutant(
        "logits multiplied by the temperature",
        "generation",
        "keepdim=True)).double() / temperature",
        "keepdim=True)).double() * temperature",
    ),
    Mutant("novel names are the seen ones", "evaluation", "word not in train for", "word in train for"),
    Mutant(
        "closed form: weights ignored in the mean", "closed_form", "torch.mul(z, w[:, None], out=scratch).sum", "z.sum"
    ),
    Mutant("closed form: no gradient through the mean", "closed_form", ".addr_(w, dbeta, alpha=-1 / n)", ""),
    Mutant("closed form: no gradient through the variance", "closed_form", "gy.addcmul_(wz, correction)", "gy"),
    Mutant(
        "closed form: the logistic's half forgotten",
        "closed_form",
        "torch.sub(bias, weight.sum(1)",
        "torch.sub(bias, 0",
    ),
    Mutant("closed form: all taps read one range", "closed_form", "tap.sub_(begin)", "pass"),
    Mutant(
        "closed form: a row that both ends read kept twice",
        "closed_form",
        "for code in (1, 3, 2)]",
        "for code in (1, 3, 3)]",
    ),
    Mutant("closed form: no momentum in Muon's gradient", "closed_form", "grad.lerp_(momentum, self.momentum)", "grad"),
    Mutant(
        "closed form: Adam's second moment not corrected", "closed_form", ".div_((1 - beta2**self.steps) ** 0.5)", ""
    ),
    Mutant(
        "closed form: Adam's decay at a constant rate",
        "closed_form",
        "1 - adam_lr * self.weight_decay",
        "1 - self.adam_lr * self.weight_decay",
    ),
    Mutant(
        "contexts drawn are not weighted",
        "closed_form",
        "targets = self._targets.index_select(0, kept).mul_(scale[:, None])",
        "targets = self._targets.index_select(0, kept)",
    ),
    Mutant(
        "contexts that always come are drawn rarely",
        "batches",
        "torch.ones_like(shares).scatter_",
        "(0.5 * torch.ones_like(shares)).scatter_",
    ),
    Mutant(
        "a stage of contexts begins where the text does",
        "batches",
        "alpha=step - self._begin[stage] + 1",
        "alpha=step % 3",
    ),
    Mutant("inference: BatchNorm's mean not subtracted", "inference", " - norm.running_mean * scale", ""),
    Mutant(
        "inference: the last block cut short", "inference", "n = min(rows, N - start)", "n = min(rows, N - start - 1)"
    ),
]


# No fault at all: the tests must pass with it, or what they say of the others means nothing.
CONTROL = Mutant("no fault", "eager", "total - 1 if unbiased", "total - 1 if unbiased")


class _Plant(importlib.machinery.SourceFileLoader, MetaPathFinder):
    """Imports one module of convwave with the fault in its source."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(f"convwave.{mutant.module}", str(ROOT / f"convwave/{mutant.module}.py"))
        self.mutant = mutant

    def find_spec(  # type: ignore[override]
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)

    def get_code(self, fullname: str):  # type: ignore[no-untyped-def]
        source = Path(self.path).read_text(encoding="utf-8")
        assert self.mutant.old in source, f"{self.mutant.name}: {self.mutant.module}.py has no {self.mutant.old!r}"
        return compile(source.replace(self.mutant.old, self.mutant.new), self.path, "exec")


class Outcome(NamedTuple):
    """How the tests took a fault."""

    caught: bool
    by: str  # the first test that failed, or what went wrong with the experiment


def run(mutant: Mutant, mode: str = "tests") -> Outcome:
    """Plant a fault in a new process; `mode` is "tests" or "verify"."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CONVWAVE_MUTATION": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.mutation", mutant.name, mode]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|CAUGHT) (.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and found:
        return Outcome(True, found[1])
    reason = "survived" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]
    return Outcome(False, reason)


def run_all(mode: str = "tests") -> dict[str, Outcome]:
    """Every fault, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        mutants = [CONTROL, *MUTANTS]
        return dict(zip((m.name for m in mutants), pool.map(lambda m: run(m, mode), mutants), strict=True))


def report() -> str:
    """The table of MUTANTS.md."""
    tests, verify = run_all("tests"), run_all("verify")
    assert not tests.pop(CONTROL.name).caught, "the tests fail without a fault"
    assert not verify.pop(CONTROL.name).caught, "verify fails without a fault"
    lines = [
        "# Planted faults",
        "",
        "`make test` plants each of these faults, one at a time, and requires a test to fail. The last column says",
        "whether `convwave verify` alone, in small, sees it too; it looks at a network, not at reading or sampling.",
        "Made by `python -m tests.mutation --report`.",
        "",
        f"Caught by the tests: {sum(o.caught for o in tests.values())} of {len(MUTANTS)}. "
        f"Seen by verify: {sum(o.caught for o in verify.values())} of {len(MUTANTS)}.",
        "",
        "| fault | module | first test that fails | first check of verify that fails |",
        "|---|---|---|---|",
    ]
    for mutant in MUTANTS:
        assert tests[mutant.name].caught or tests[mutant.name].by == "survived", tests[mutant.name].by
        by = tests[mutant.name].by.removeprefix("tests/")
        seen = verify[mutant.name].by if verify[mutant.name].caught else "-"
        lines.append(f"| {mutant.name} | {mutant.module} | `{by}` | {seen} |")
    return "\n".join(lines) + "\n"


def _run_verify() -> int:
    """verify in small: 300 names, a network with other widths at every level."""
    import torch

    import convwave as cw
    from convwave.verification import verify

    words = cw.load_words().words
    torch.manual_seed(0)
    model = cw.ConvWave(len(cw.Vocabulary.from_words(words)), 10, [20, 24, 27])
    with torch.no_grad():  # no parameter and no running statistic at its neutral value
        for tensor in model.state_dict().values():
            tensor.add_(0.2 * torch.rand_like(tensor))
    try:
        for check in verify(model, cw.split_words(words[:300]), cw.Vocabulary.from_words(words), trajectory_steps=20):
            if not check.passed:
                print(f"CAUGHT {check.name}")
                return 1
    except (ValueError, IndexError, RuntimeError) as error:
        print(f"CAUGHT {type(error).__name__}")
        return 1
    return 0


def main(arguments: Sequence[str]) -> int:
    if arguments[0] == "--report":
        (ROOT / "tests/MUTANTS.md").write_text(report(), encoding="utf-8")
        return 0
    mutant = next(m for m in [CONTROL, *MUTANTS] if m.name == arguments[0])
    sys.meta_path.insert(0, _Plant(mutant))
    if arguments[1:] == ["verify"]:
        return _run_verify()
    import pytest

    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", *TESTS]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
