"""Plausible faults planted one at a time, each of which the tests must catch.

    python -m tests.mutation NAME ..   plant some faults, each in a process of its own, and print what sees them
    python -m tests.mutation --report  plant every fault, write tests/MUTANTS.md (--verify: and what `verify` sees)

`test_mutation.py` plants them all. The faults live in memory only: files are not touched.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests/MUTANTS.md"
GENERATED = ROOT / "tests/generated_mutants.json"  # by generate_mutants.py
UNJUDGED = "not judged"
SECONDS = 150  # of CPU time, after which a fault is taken to hang
PATIENCE = 3600  # seconds for a process that does not even compute

# Where to look for a fault that MUTANTS.md names no test for: by the beginning of its module's name, test files,
# without "test_", what is likely to see it first.
_FILES = {
    "data.packing": "graph batches data evaluation frozen per_level equivalence",
    "data": "graph batches data frozen per_level equivalence distribution",
    "ops.functional": "ops sequences per_level nn equivalence",
    "ops.library": "sequences per_level nn ops evaluation equivalence closed_form",
    "ops.sequences": "sequences",
    "ops.loops": "fused",
    "ops.compiled": "fused",
    "ops.level": "evaluation per_level nn ops equivalence",
    "ops.stack": "per_level equivalence kernels ops nn",
    "ops": "per_level equivalence nn ops closed_form",
    "kernels": "per_level kernels",
    "files": "checkpoint runs",
    "runs.metrics": "metrics",
    "runs": "runs training cli",
    "cli": "runs sampling cli",
    "train.fused": "fused",
    "train.loop": "runs training",
    "train.config": "training cli",
    "train.tiers": "training",
    "train.diagnostics": "metrics",
    "train": "frozen per_level training closed_form",
    "sweep": "sweep",
    "infer.generate": "generation sampling",
    "infer.score": "evaluation per_level training",
    "convert": "convert nn equivalence",
    "nn": "nn per_level ops equivalence convert",
}
_ALL = "per_level graph batches generation sampling runs evaluation equivalence convert data frozen closed_form ops nn"
_SLOW = ["tiers_end_at_the_same_losses", "killed"]


def tests_for(module: str) -> list[str]:
    """Arguments of pytest."""
    if module == "kernels.score":
        return ["tests/test_score_names.py", "-k", "longer_than or numbers_of_names or vocabularies or real_names"]
    names = next((names for prefix, names in _FILES.items() if module.startswith(prefix)), _ALL)
    files = [f"tests/test_{name}.py" for name in names.split()]
    return ["tests/test_training.py::test_schedules", *files, "-k", f"not ({' or '.join(_SLOW)})"]


@dataclass(frozen=True)
class Mutant:
    """One fault: a piece of a module's source, which occurs there once, replaced by another."""

    name: str
    module: str
    old: str
    new: str


def source_of(module: str) -> Path:
    """The file of a module of convwave."""
    where = module.replace(".", "/")
    return (ROOT / (where if where.startswith("kernels/") else f"convwave/{where}")).with_suffix(".py")


MUTANTS = [
    Mutant(
        "taps swapped",
        "ops.stack",
        "weight.permute(2, 1, 0).reshape(k * C, H)",
        "weight.flip(2).permute(2, 1, 0).reshape(k * C, H)",
    ),
    Mutant("definition: taps swapped", "ops.naive", "weight.permute(2, 1, 0)", "weight.flip(2).permute(2, 1, 0)"),
    Mutant(
        "one tap's matrix used twice where products are gathered",
        "ops.stack",
        "z.add_((x @ weight[:, :, j].T)",
        "z.add_((x @ weight[:, :, j - 1].T)",
    ),
    Mutant(
        "zero padding at the first position",
        "ops.stack",
        "[x.index_select(0, tap) for tap in taps]",
        "[x[t] * (1 - (t == taps[-1]).to(x) * (j + 1 < len(taps)))[:, None] for j, t in enumerate(taps)]",
    ),
    Mutant(
        "weights ignored in the mean",
        "ops.stack",
        "mean = z.mean(0) if w is None else (w * z).sum(0) / total",
        "mean = z.mean(0)",
    ),
    Mutant("definition: counts ignored in the mean", "ops.naive", "mean = (w * z).sum(0) / total", "mean = z.mean(0)"),
    Mutant(
        "weights ignored in the variance",
        "ops.stack",
        "squares = deviation.square() if w is None else w * deviation.square()",
        "squares = deviation.square()",
    ),
    Mutant(
        "definition: counts ignored in the variance",
        "ops.naive",
        "(w * (z - mean).square()).sum(0)",
        "(z - mean).square().sum(0)",
    ),
    Mutant(
        "weights squared in the variance", "ops.stack", "else w * deviation.square()", "else (w * deviation).square()"
    ),
    Mutant("weights ignored in the backward pass", "ops.stack", "correction.mul_(w)", "correction"),
    Mutant(
        "weights multiply the gradient too",
        "ops.stack",
        "g = g.sub_(correction",
        "g = (g if w is None else g * w).sub_(correction",
    ),
    Mutant("no gradient through the mean", "ops.stack", "torch.addcmul(dbeta / total,", "torch.addcmul(0 * dbeta,"),
    Mutant("no gradient through the variance", "ops.stack", "dgamma * s.rstd / divisor)", "0 * dgamma)"),
    Mutant(
        "biased for unbiased in the backward pass",
        "ops.stack",
        "divisor = total - 1 if level.unbiased else total",
        "divisor = total",
    ),
    Mutant(
        "unbiased for biased in the backward pass",
        "ops.stack",
        "divisor = total - 1 if level.unbiased else total",
        "divisor = total - 1",
    ),
    Mutant("derivative of tanh forgotten", "ops.level", "torch.ops.aten.tanh_backward(da, a)", "da.clone()"),
    Mutant(
        "biased for unbiased",
        "ops.stack",
        "squares.sum(0) / (total - 1 if level.unbiased else total)",
        "squares.sum(0) / total",
    ),
    Mutant("definition: biased for unbiased", "ops.naive", "total - 1 if unbiased else total", "total"),
    Mutant(
        "unbiased for biased",
        "ops.stack",
        "squares.sum(0) / (total - 1 if level.unbiased else total)",
        "squares.sum(0) / (total - 1)",
    ),
    Mutant("definition: unbiased for biased", "ops.naive", "total - 1 if unbiased else total", "total - 1"),
    Mutant(
        "running variance biased",
        "ops.level",
        "level.running_var.lerp_(var.to(",
        "level.running_var.lerp_((var * (total - 1) / total if level.unbiased else var).to(",
    ),
    Mutant(
        "running variance of the biased kind not corrected",
        "ops.level",
        "elif total > 1:",
        "elif False:",
    ),
    Mutant("running mean not tracked", "ops.level", "running_mean.lerp_", "running_mean.clone().lerp_"),
    Mutant(
        "momentum of the wrong side",
        "ops.level",
        "level.running_var.dtype), level.momentum)",
        "level.running_var.dtype), 1 - level.momentum)",
    ),
    Mutant("eps forgotten", "ops.stack", "rstd = torch.rsqrt(var + level.eps)", "rstd = torch.rsqrt(var)"),
    Mutant("definition: eps forgotten", "ops.naive", "rstd = torch.rsqrt(var + level.eps)", "rstd = torch.rsqrt(var)"),
    Mutant(
        "eps outside the root",
        "ops.stack",
        "rstd = torch.rsqrt(var + level.eps)",
        "rstd = 1 / (var.sqrt() + level.eps)",
    ),
    Mutant(
        "eps forgotten in evaluation",
        "ops.fold",
        "scale = level.gamma * torch.rsqrt(var + level.eps)",
        "scale = level.gamma * torch.rsqrt(var)",
    ),
    Mutant(
        "eps forgotten in evaluation with gradients",
        "ops.fold",
        "rstd = torch.rsqrt(var + level.eps)",
        "rstd = torch.rsqrt(var)",
    ),
    Mutant("running mean forgotten in evaluation", "ops.fold", "level.beta - mean * scale", "level.beta"),
    Mutant("loss ignores the counts", "ops.functional", "nll * graph.target_counts.to(nll.dtype)", "nll"),
    Mutant(
        "loss ignores the counts of a distinct graph",
        "ops.functional",
        "counts = counts.to(logits.dtype)",
        "counts = counts.sign().to(logits.dtype)",
    ),
    Mutant(
        "loss divided by the rows",
        "ops.functional",
        "nll.dtype)).sum() / graph.totals[-1]",
        "nll.dtype)).sum() / nll.numel()",
    ),
    Mutant(
        "loss of a distinct graph divided by the rows",
        "ops.functional",
        "return nll.sum() / graph.totals[-1]",
        "return nll.sum() / nll.shape[0]",
    ),
    Mutant(
        "clamp off by one",
        "data.graph",
        "torch.maximum(row, first)",
        "torch.maximum(row, (first - 1).clamp(min=0))",
    ),
    Mutant(
        "boundary of a packed name crossed",
        "data.graph",
        "torch.maximum(row, first)",
        "row.clamp(min=0)",
    ),
    Mutant("dilation not multiplied", "data.graph", "factor, math.prod(factors[:level])", "factor, level + 1"),
    Mutant(
        "newest tap one late",
        "data.graph",
        "range((kernel_size - 1) * dilation, -1, -dilation):\n        row",
        "range(kernel_size * dilation, 0, -dilation):\n        row",
    ),
    Mutant("counts not propagated", "data.graph", "below.index_add_(0, tap, weights[0])", "below.fill_(1)"),
    Mutant("counts propagated along one tap", "data.graph", "for tap in taps[level]:", "for tap in taps[level][:1]:"),
    Mutant(
        "totals not multiplied", "data.graph", "totals.insert(0, totals[0] * factor)", "totals.insert(0, totals[0])"
    ),
    Mutant("distinct contexts collide", "data.graph", ".long() * bound + right", ".long() * (bound // 2) + right"),
    Mutant(
        "contexts of other blocks are numbered one too high",
        "data.graph",
        "torch.searchsorted(unique, block, out_int32=True)",
        "torch.searchsorted(unique, block, out_int32=True, right=True)",
    ),
    Mutant(
        "counts ignored in the distinct graph",
        "data.graph",
        "_summed(counts, ids, rows)",
        "_summed(None, ids, rows)",
    ),
    Mutant(
        "counts ignored in the targets",
        "data.graph",
        "_summed(counts, target, keys.numel())",
        "_summed(None, target, keys.numel())",
    ),
    Mutant(
        "a window drawn twice counts once",
        "data.graph",
        "torch.bincount(inverse, minlength=kept.numel())",
        "torch.ones(kept.numel())",
    ),
    Mutant(
        "windows one token early", "data.graph", "torch.arange(context - 1, -1, -1,", "torch.arange(context, 0, -1,"
    ),
    Mutant(
        "targets not shifted",
        "data.packing",
        "torch.cat([tokens[1:], tokens.new_zeros(min(len(words), 1))])",
        "tokens.clone()",
    ),
    Mutant(
        "last position of a name dropped",
        "data.packing",
        "self.cu_seqlens[words + 1] - starts",
        "self.cu_seqlens[words + 1] - starts - 1",
    ),
    Mutant(
        "first position of a name dropped",
        "data.packing",
        "starts = self.cu_seqlens[words]\n",
        "starts = self.cu_seqlens[words] + 1\n",
    ),
    Mutant("statistics over positions for windows", "nn", 'counted = self.statistics == "windows"', "counted = False"),
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
        "infer.generate",
        "padding.expand((k - 1) * d, batch, -1).clone()",
        "padding.expand((k - 1) * d, batch, -1).clone().zero_()",
    ),
    Mutant(
        "cache filled with one level's padding",
        "infer.generate",
        "padding = torch.tanh(padding.repeat(k) @ weight + self.levels[-1][1])",
        "padding = torch.tanh(padding.repeat(k) @ weight)",
    ),
    Mutant(
        "cache written one slot late",
        "infer.generate",
        "ring[self.position % length] = h",
        "ring[(self.position + 1) % length] = h",
    ),
    Mutant(
        "cache reads the wrong row after a name has ended",
        "infer.generate",
        "[ring[:, rows] for ring in self.rings]",
        "[ring[:, : int(rows.sum())] for ring in self.rings]",
    ),
    Mutant(
        "logits multiplied by the temperature",
        "infer.generate",
        "keepdim=True)).double() / temperature",
        "keepdim=True)).double() * temperature",
    ),
    Mutant("novel names are the seen ones", "infer.score", "word not in train for", "word in train for"),
    Mutant(
        "closed form: weights ignored in the mean",
        "train.closed_form",
        "torch.mul(z, w[:, None], out=scratch).sum",
        "z.sum",
    ),
    Mutant("closed form: no gradient through the mean", "train.closed_form", ".addr_(w, dbeta, alpha=-1 / n)", ""),
    Mutant("closed form: no gradient through the variance", "train.closed_form", "gy.addcmul_(wz, correction)", "gy"),
    Mutant(
        "closed form: the logistic's half forgotten",
        "ops.fold",
        "torch.sub(bias, weight.sum(1)",
        "torch.sub(bias, 0",
    ),
    Mutant("closed form: all taps read one range", "data.batches", "tap.sub_(begin)", "pass"),
    Mutant(
        "closed form: a row that both ends read kept twice",
        "data.batches",
        "for code in (1, 3, 2)]",
        "for code in (1, 3, 3)]",
    ),
    Mutant(
        "closed form: no momentum in Muon's gradient",
        "train.closed_form",
        "grad.lerp_(momentum, self.momentum)",
        "grad",
    ),
    Mutant(
        "closed form: Adam's second moment not corrected",
        "train.closed_form",
        ".div_((1 - beta2**self.steps) ** 0.5)",
        "",
    ),
    Mutant(
        "closed form: Adam's decay at a constant rate",
        "train.closed_form",
        "1 - adam_lr * self.weight_decay",
        "1 - self.adam_lr * self.weight_decay",
    ),
    Mutant(
        "contexts drawn are not weighted",
        "data.batches",
        ".index_select(0, entry).mul_(scale.index_select(0, row))",
        ".index_select(0, entry)",
    ),
    Mutant(
        "contexts that always come are drawn rarely",
        "data.batches",
        "torch.ones_like(shares).scatter_",
        "(0.5 * torch.ones_like(shares)).scatter_",
    ),
    Mutant(
        "a stage of contexts begins where the text does",
        "data.batches",
        "self._probabilities[stage], step - self._begin[stage] + 1",
        "self._probabilities[stage], step % 3",
    ),
    Mutant(
        "inference: BatchNorm's mean not subtracted",
        "infer.score",
        "2 * matrix.permute(2, 1, 0), 2 * shift",
        "2 * matrix.permute(2, 1, 0), 2 * block.norm.bias",
    ),
    Mutant(
        "inference: the last block cut short",
        "infer.score",
        "part = slice(start, min(start + rows, N))",
        "part = slice(start, min(start + rows, N - 1))",
    ),
    Mutant(
        "statistics of blocks: their distance forgotten",
        "ops.level",
        "other.squares + apart.square() * self.total * share",
        "other.squares",
    ),
    Mutant(
        "statistics of blocks: means not weighted", "ops.level", "self.mean + apart * share", "self.mean + apart / 2"
    ),
    Mutant(
        "diagnostics of steps that are done again stay",
        "runs.metrics",
        "for step, record in looks.items() if step <= len(losses)]",
        "for step, record in looks.items()]",
    ),
    Mutant(
        "losses of another run stay",
        "runs.metrics",
        'record if record.get("loss") == loss else',
        "record if record else",
    ),
    Mutant(
        "lines are written when the run ends",
        "runs.metrics",
        "if time.perf_counter() - self._written > _SECONDS:",
        "if False:",
    ),
    Mutant(
        "a row of many windows is looked at once",
        "train.diagnostics",
        "shares = counts.to(h.dtype)",
        "shares = torch.ones_like(h[:, 0])",
    ),
    Mutant(
        "an update over the parameter after it",
        "train.diagnostics",
        "_ratio(p - before[name], before[name])",
        "_ratio(p - before[name], p)",
    ),
    Mutant(
        "a channel is dead where one row is saturated",
        "train.diagnostics",
        "far[counts > 0].all(0)",
        "far[counts > 0].any(0)",
    ),
    Mutant(
        "closed form: activations are the logistic's", "train.closed_form", "H).mul(2).sub_(1), w)", "H).clone(), w)"
    ),
    Mutant(
        "a look draws random numbers",
        "train.diagnostics",
        '            found["gradient_norm"] =',
        '            self._run.reader.generator.manual_seed(1)\n            found["gradient_norm"] =',
    ),
    Mutant(
        "names held out are trained on",
        "sweep.plan",
        "rest, out = [n for n in names if n not in held], [n",
        "rest, out = list(names), [n",
    ),
    Mutant(
        "a range forgets its logarithm",
        "sweep.plan",
        " if log else generator.uniform(low, high)",
        " if False else generator.uniform(low, high)",
    ),
    Mutant(
        "the ends of a whole range are drawn half as often",
        "sweep.plan",
        "low, high = low - 0.5, high + 0.5",
        "low, high = float(low), float(high)",
    ),
    Mutant(
        "a result is of any seed",
        "sweep.plan",
        "json.dumps([self.parameters, self.seed], sort_keys=True)",
        "json.dumps([self.parameters, 0], sort_keys=True)",
    ),
    Mutant(
        "the claim of a killed worker holds",
        "sweep.study",
        "        return False\n\n    @contextmanager\n    def _alive",
        "        return True\n\n    @contextmanager\n    def _alive",
    ),
    Mutant("two workers claim one trial", "sweep.study", "if pair.key in keys or len(keys)", "if len(keys)"),
    Mutant(
        "a trial is judged on what it has learned",
        "sweep.study",
        "Splits([], self.held_out, [])",
        "Splits([], self.corpus.splits.train, [])",
    ),
    Mutant(
        "pruned configurations go on with other seeds",
        "sweep.study",
        "in pruned or pair.key in results",
        "in () or pair.key in results",
    ),
    Mutant("every comparison is corrected for all", "sweep.statistics", "(len(p) - rank) * p[i]", "len(p) * p[i]"),
    Mutant(
        "intervals of the normal distribution",
        "sweep.statistics",
        "float(stats.t.ppf(1 - LEVEL / 2, n - 1))",
        "float(stats.norm.ppf(1 - LEVEL / 2))",
    ),
    Mutant("medians are permuted", "sweep.statistics", "np.mean(x, axis=axis)", "np.median(x, axis=axis)"),
    Mutant(
        "pairs of different seeds",
        "sweep.statistics",
        "[loss - baseline[seed] for seed, loss in one.items() if seed in baseline]",
        "[a - b for a, b in zip(one.values(), baseline.values(), strict=False)]",
    ),
    Mutant(
        "as many seeds as one comparison needs",
        "sweep.statistics",
        "    level = LEVEL / comparisons\n",
        "    level = LEVEL\n",
    ),
    Mutant(
        "the Pareto front is the worst",
        "sweep.report",
        "line.loss.mean < front[-1].loss.mean",
        "line.loss.mean > front[-1].loss.mean",
    ),
]

MUTANTS += [
    Mutant("kernel: taps swapped", "kernels.forward", "w_ptr + j * (H * C)", "w_ptr + (K - 1 - j) * (H * C)"),
    Mutant(
        "kernel: channels beyond the last are read",
        "kernels.forward",
        "m_x = (o_x >= 0)[:, None] & m_c[None, :]",
        "m_x = (o_x >= 0)[:, None] & (o_c >= 0)[None, :]",
    ),
    Mutant("kernel: rows beyond the last count", "kernels.primitives", "tl.where(m_n, 1.0, 0.0)", "m_n * 0.0 + 1.0"),
    Mutant(
        "kernel: weights ignored in the statistics",
        "kernels.forward",
        "load_counts(counts_ptr, o_t, m_t)",
        "load_counts(None, o_t, m_t)",
    ),
    Mutant(
        "kernel: means of tiles taken for equal",
        "kernels.primitives",
        "b_m2 + b_m2_new + b_delta * b_delta * (n * share)",
        "b_m2 + b_m2_new",
    ),
    Mutant(
        "kernel: only the first program's statistics",
        "kernels.primitives",
        'b_n = tl.load(p_p, mask=m_p, other=0, cache_modifier=".cg")  # [BP, BH]',
        "b_n = tl.load(p_p, mask=m_p & (o_p < 1)[:, None], other=0)",
    ),
    Mutant("kernel: finished by the first program", "kernels.primitives", "== programs - 1", "== 0"),
    Mutant("kernel: biased for unbiased", "kernels.primitives", "b_var = b_m2 / (n - 1)", "b_var = b_m2 / n"),
    Mutant("kernel: a tanh that is 1e-4 off", "kernels.primitives", "+ s * 0.01643758", "+ s * 0.02"),
    Mutant("kernel: TF32 operands truncated", "kernels.primitives", "(bits + 0x1000) & -0x2000", "bits & -0x2000"),
    Mutant("kernel: a NaN rounded to 0", "kernels.primitives", 'tl.abs(b_x) < float("inf")', "b_x != 0"),
    Mutant(
        "kernel: rows not rounded to TF32",
        "kernels.forward",
        "b_x = operand(b_x, x_ptr.dtype.element_ty, PRECISION, WIDEN)",
        'b_x = operand(b_x, x_ptr.dtype.element_ty, "ieee", WIDEN)',
    ),
    Mutant(
        "kernel: collected gradients not rounded to TF32",
        "kernels.backward",
        "b_g = operand(b_g, store, PRECISION, WIDEN)",
        'b_g = operand(b_g, store, "ieee", WIDEN)',
    ),
    Mutant("kernel: weights ignored in the backward pass", "kernels.backward", "b_w * (b_center", "1.0 * (b_center"),
    Mutant(
        "kernel: no gradient through the variance",
        "kernels.backward",
        "+ (b_z - b_mean[None, :]) * b_spread[None, :]",
        "+ 0 * b_spread[None, :]",
    ),
    Mutant(
        "kernel: the last part of a block forgotten",
        "kernels.backward",
        "b_entries = b_head + (b_end - b_last)",
        "b_entries = b_head",
    ),
    Mutant(
        "kernel: entries taken for rows",
        "kernels.backward",
        "o_n = tl.load(order_ptr + (o_wide + j) * N + o_e, mask=m_e, other=0)",
        "o_n = o_e",
    ),
    Mutant(
        "kernel: derivative of the tanh below forgotten",
        "kernels.backward",
        "b_dx = BELOW_GRADIENT(b_dx, b_y, BELOW_ACTIVATION(b_y))",
        "b_dx = b_dx * 1.0",
    ),
    Mutant(
        "kernel: one tap's weight gradient for both", "kernels.backward", "p_w + H * C, b_dw1", "p_w + H * C, b_dw0"
    ),
    Mutant(
        "kernel: gradient taken for contiguous",
        "kernels.activate",
        "dh = dh if dh.stride(-1) == 1 else dh.contiguous()",
        "pass",
    ),
    Mutant("kernel: gradient's row stride ignored", "kernels.activate", "dh.stride(0),", "C,"),
    Mutant(
        "op: gradient of gamma is beta's",
        "ops.library",
        "in zip(lists, parameters, strict=True)",
        "in zip([lists[0], lists[2], lists[2]], parameters, strict=True)",
    ),
    Mutant("op: statistics recomputed in evaluation mode", "ops.library", "training=o.training[i],", "training=True,"),
]

MUTANTS += [
    # what is common to all tiers, which are compared with one another elsewhere
    Mutant("draws: contexts ignore the seed", "data.batches", "manual_seed(seed)", "manual_seed(0)"),
    Mutant(
        "draws: the order of names is of seed + epoch",
        "data.batches",
        "self.plan.seed * 1_000_003 + epoch",
        "self.plan.seed + epoch",
    ),
    Mutant("draws: the order of names ignores the seed", "data.batches", "self.plan.seed * 1_000_003 + epoch", "epoch"),
    Mutant(
        "draws: every epoch in the same order",
        "data.batches",
        "self.plan.seed * 1_000_003 + epoch",
        "self.plan.seed * 1_000_003",
    ),
    Mutant("draws: batches do not grow", "data.batches", "round(plan.growth * plan.batch)", "plan.batch"),
    Mutant(
        "draws: the power of contexts is ignored", "data.batches", "counts.double() ** power", "counts.double() ** 0.5"
    ),
    Mutant(
        "draws: growth in even leaps instead of even ratios",
        "data.batches",
        "first * (last / first) ** (stage / max(stages - 1, 1))",
        "first + (last - first) * (stage / max(stages - 1, 1))",
    ),
    Mutant(
        "draws: noise at the square of its rate",
        "data.batches",
        "< self.plan.token_noise\n",
        "< self.plan.token_noise**2\n",
    ),
    Mutant(
        "draws: noise on the opening 0", "data.batches", "replace &= names.tokens != 0", "replace &= names.tokens >= 0"
    ),
    Mutant(
        "draws: noise is one letter",
        "data.batches",
        "torch.randint(0, len(self.packed), (n,)",
        "torch.randint(0, 1, (n,)",
    ),
    Mutant(
        "draws: windows of the first half only",
        "data.batches",
        "torch.randint(0, len(packed), (plan.batch,)",
        "torch.randint(0, len(packed) // 2, (plan.batch,)",
    ),
    Mutant("draws: the recipe's noise forgotten", "train.setup", "recipe.token_noise,", "0.0,"),
    Mutant("Muon: no weight decay", "train.optim", '1 - lr * group["weight_decay"]', "1"),
    Mutant("Adam: no weight decay", "train.optim", "betas=betas, weight_decay=decay", "betas=betas, weight_decay=0.0"),
    Mutant("closed form: Muon's decay forgotten", "train.closed_form", "1 - lr * self.weight_decay", "1"),
    Mutant("closed form: the recipe's decay forgotten", "train.closed_form", "recipe.weight_decay,", "0.0,"),
    Mutant(
        "closed form: the recipe's beta forgotten",
        "train.closed_form",
        "(recipe.adam_beta, ADAM_BETA2),",
        "(0.9, 0.95),",
    ),
    Mutant(
        "closed form: the recipe's number of orthogonal steps forgotten",
        "train.closed_form",
        "recipe.orthogonal_steps,",
        "5,",
    ),
    Mutant(
        "Muon: tall matrices are moved as far as wide ones",
        "train.optim",
        "max(1.0, update.shape[0] / update.shape[1]) ** 0.5",
        "max(1.0, update.shape[1] / update.shape[0]) ** 0.0",
    ),
    Mutant(
        "closed form: tall matrices are moved as far as wide ones",
        "train.closed_form",
        "max(1.0, rows / columns) ** 0.5",
        "1.0",
    ),
    Mutant("start: the head of full size", "nn", "std=0.1 * widths[-1] ** -0.5", "std=widths[-1] ** -0.5"),
    Mutant("start: the head's fan-in forgotten", "nn", "std=0.1 * widths[-1] ** -0.5", "std=0.1"),
    Mutant("start: one tap's fan-in", "nn", "(self.in_channels * self.kernel_size) ** -0.5", "self.in_channels**-0.5"),
    Mutant(
        "start: another seed for the weights", "train.setup", "torch.manual_seed(config.seed)", "torch.manual_seed(0)"
    ),
    # generation
    Mutant(
        "generation: every batch repeats the names of the first",
        "infer.generate",
        "    while True:\n",
        "    while generator.manual_seed(seed) is not None:\n",
    ),
    Mutant(
        "generation: temperature ignored together with top_k",
        "infer.generate",
        ".double() / temperature",
        ".double() / (temperature if candidates is None else 1.0)",
    ),
    Mutant(
        "generation: top_k takes one more",
        "infer.generate",
        "logits.topk(top_k, dim=1)",
        "logits.topk(top_k + 1, dim=1)",
    ),
    Mutant(
        "generation: draws of top_k taken for letters",
        "infer.generate",
        "drawn if candidates is None else candidates.gather(1, drawn)",
        "drawn",
    ),
    # tests weaker than their names
    Mutant("keys of contexts overflow", "data.graph", "span * bound >= 2**62", "span * bound >= 2**4096"),
    Mutant("the oldest run taken for the newest", "runs.registry", "st_mtime, default", "st_mtime * -1, default"),
    Mutant("the last run by name taken for the newest", "runs.registry", "file.stat().st_mtime", "str(file)"),
    Mutant(
        "names of the validation split not marked",
        "cli.model",
        "for name in getattr(words.splits, mark)}",
        "for name in words.splits.train}",
    ),
    Mutant("infinite weights are loaded", "nn", "tensor.isfinite().all()", "(tensor == tensor).all()"),
    Mutant(
        "infinite counts are taken", "data.graph", "((counts >= 0) & counts.isfinite()).all()", "(counts >= 0).all()"
    ),
    # values that are equal at every level
    Mutant("the eps of the first level at every level", "nn", "epsilons[i],", "epsilons[0],"),
    Mutant("the momentum of the last level at every level", "nn", "momenta[i],", "momenta[-1],"),
    Mutant("the variance of the first level at every level", "nn", "kinds[i],", "kinds[0],"),
    Mutant("op: the eps of the first level at every level", "ops.library", "o.eps[i],", "o.eps[0],"),
    Mutant(
        "op: the variance of the first level at every level",
        "ops.library",
        "unbiased=o.unbiased[i],",
        "unbiased=o.unbiased[0],",
    ),
    Mutant(
        "closed form: the eps of the first level at every level",
        "train.closed_form",
        "self._eps[level]",
        "self._eps[0]",
    ),
    Mutant(
        "closed form: the variance of the first level backward",
        "train.closed_form",
        "div_(-_variance_divisor(n, self._unbiased[level]))",
        "div_(-_variance_divisor(n, self._unbiased[0]))",
    ),
    Mutant(
        "momentum of 0.1 whatever is asked for",
        "ops.level",
        "level.running_mean.dtype), level.momentum)",
        "level.running_mean.dtype), 0.1)",
    ),
    # seconds, and the split
    Mutant(
        "seconds before a resume are lost",
        "train.loop",
        "self.losses, self.seconds, self.validation = state.losses, state.seconds, state.validation",
        "self.losses, self.validation = state.losses, state.validation",
    ),
    Mutant("the split rounds to the nearest", "data.packing", "int(0.8 * len(shuffled))", "round(0.8 * len(shuffled))"),
    Mutant("the validation split rounds up", "data.packing", "int(0.9 * len(shuffled))", "-(-9 * len(shuffled) // 10)"),
    Mutant("another shuffle of the words", "data.packing", "seed: int = 42", "seed: int = 43"),
    # partial results of more programs than are merged at once, tiles that count 0 times
    Mutant(
        "kernel: only 16 programs' sums",
        "kernels.primitives",
        "    b_dgamma = tl.zeros([BC], dtype=tl.float32)\n    for i_p in range(0, P, BP):",
        "    b_dgamma = tl.zeros([BC], dtype=tl.float32)\n    for i_p in range(0, BP, BP):",
    ),
    Mutant(
        "kernel: only 16 programs' means",
        "kernels.primitives",
        "    b_sum = tl.zeros([BH], dtype=tl.float32)\n    for i_p in range(0, P, BP):",
        "    b_sum = tl.zeros([BH], dtype=tl.float32)\n    for i_p in range(0, BP, BP):",
    ),
    Mutant(
        "kernel: only 16 programs' squares",
        "kernels.primitives",
        "    b_m2 = tl.zeros([BH], dtype=tl.float32)\n    for i_p in range(0, P, BP):",
        "    b_m2 = tl.zeros([BH], dtype=tl.float32)\n    for i_p in range(0, BP, BP):",
    ),
    Mutant(
        "kernel: a tile that counts 0 times makes NaN",
        "kernels.primitives",
        "tl.div_rn(n_new, tl.maximum(total, 1e-30))",
        "tl.div_rn(n_new, total)",
    ),
    Mutant(
        "kernel: the mean of a tile that counts 0 times is NaN",
        "kernels.forward",
        "/ tl.maximum(n_new, 1e-30)",
        "/ n_new",
    ),
    Mutant("whole names: one dilation for all levels", "kernels.score", "dilation *= K", "dilation *= 1"),
    Mutant("whole names: dilations begin at 1", "kernels.score", "dilation = K0", "dilation = 1"),
    Mutant("whole names: taps swapped", "kernels.score", "(level * K + j) *", "(level * K + K - 1 - j) *"),
    Mutant(
        "whole names: taps reach into the name before",
        "kernels.score",
        "tl.minimum(b_age, (K - 1 - j) * dilation)",
        "((K - 1 - j) * dilation + tl.zeros_like(b_age))",
    ),
    Mutant("whole names: the halo is a row short", "kernels.score", "longest or N, N) - 1", "longest or N, N) - 2"),
    Mutant("whole names: the halo is written", "kernels.score", "m_n &= o_t >= halo", "m_n &= o_t >= 0"),
    Mutant("whole names: both taps are the newest", "kernels.score", "tl.maximum(o_t - b_back, 0)", "o_t"),
    Mutant("whole names: one shift for all levels", "kernels.score", "shift_ptr + level * W", "shift_ptr"),
    Mutant(
        "whole names: no shift beyond 64 columns", "kernels.score", "b_ze + tl.load(p_shift + o_e)[None, :]", "b_ze"
    ),
    Mutant("whole names: no bias", "kernels.score", "b_y += tl.load(bias_ptr + o_v)[None, :]", "b_y += 0"),
    Mutant("whole names: tokens beyond the last count", "kernels.score", "value=-math.inf", "value=0.0"),
    Mutant("whole names: the next token's loss", "kernels.score", "== b_target[:, None]", "== b_target[:, None] + 1"),
    Mutant(
        "whole names: contexts in another order",
        "ops.library",
        "torch.arange(factors[0] - 1, -1, -1, device=embedding.device)",
        "torch.arange(factors[0], device=embedding.device)",
    ),
    Mutant("whole names: a watched head is passed over", "infer.score", "kernels and model.plain and", "kernels and"),
    Mutant(
        "whole names: names begin half as far back",  # not further back, where rows of nobody may be read
        "data.packing",
        "device=starts.device) - starts).int()",
        "device=starts.device) - starts).int() // 2",
    ),
    # the compiled loops, which numba compiles anew for every fault: its cache lies beside the planted file
    Mutant(
        "loops: counts ignored in the mean",
        "ops.loops",
        "c[part.taps[level, j, n]] += weights[n]",
        "c[part.taps[level, j, n]] += 1",
    ),
    Mutant("loops: no gradient through the variance", "ops.loops", "w * (a[h] + b[h] * z[n, h])", "w * a[h]"),
    Mutant(
        "loops: biased for unbiased in the backward pass",
        "ops.loops",
        "rstd[level, h] / np.float32(total - 1)",
        "rstd[level, h] / np.float32(total)",
    ),
    Mutant("loops: tanh ends too early", "ops.loops", "_TANH_END = np.float32(9.01)", "_TANH_END = np.float32(8.0)"),
    Mutant("loops: ln 2 in one piece", "ops.loops", " - k * _LN2_LOW", ""),
    Mutant("loops: the newer tap reads from row 0", "ops.loops", "newer[n] -= only_older", "newer[n] -= 0"),
    Mutant(
        "loops: targets of drawn contexts are not scaled",
        "ops.loops",
        "text.targets[k, 1] * np.float32(scale)",
        "np.float32(text.targets[k, 1])",
    ),
    Mutant("loops: Muon without Nesterov", "ops.loops", "np.float32(muon.momentum) * (m", "np.float32(1) * (m"),
    Mutant(
        "loops: the head's gradient is that of the last block",
        "ops.loops",
        "False, 0 if start == 0 else 1, grad.head)",
        "False, 0, grad.head)",
    ),
    Mutant(
        "fused: contexts of few names are all contexts",
        "train.fused",
        "if self.reader.reads_all and not contexts:",
        "if self.reader.reads_all:",
    ),
    Mutant(
        "windows end with the statistics they began with",
        "train.tiers",
        '_BATCHES = ("names",',
        '_BATCHES = ("windows", "names",',
    ),
    Mutant("fused: Adam's steps start anew", "train.fused", 'self._done = int(optimizer["steps"])', "self._done = 0"),
]

MUTANTS += [
    Mutant(
        "a row that counts nothing may matter",
        "ops.functional",
        "not traced and bool((counts > 0).all())",
        "True",
    ),
    Mutant("taps outside the rows are not seen", "ops.functional", "elif not bool(inside):", "elif False:"),
    Mutant("counts of a wrong shape are taken", "ops.functional", "if found not in (shape, (number,)):", "if False:"),
    Mutant("hooks are not seen", "nn", "return any(getattr(module, name) for name in hooks) or", "return False and"),
    Mutant(
        "a cumulative average counts one batch too many", "nn", "1 / (1 + float(tracked))", "1 / (2 + float(tracked))"
    ),
    Mutant("batches are not counted", "nn", "self.num_batches_tracked.add_(1)", "self.num_batches_tracked.add_(0)"),
    Mutant("running statistics follow half()", "nn", "setattr(self, name, old.to(new.device, torch.float32))", "pass"),
    Mutant("a converted norm loses its mode", "convert", "block.train(level.training)", "pass"),
    Mutant(
        "second derivatives take statistics for constants",
        "ops.library",
        "if torch.is_grad_enabled() and not torch.compiler.is_compiling():",
        "if False:",
    ),
    Mutant(
        "torch.func goes through the closed form",
        "ops.library",
        "return torch._C._are_functorch_transforms_active()",
        "return False",
    ),
    Mutant(
        "the norm by itself divides biased", "ops.naive", "(total - 1 if unbiased else total), total", "total, total"
    ),
    # sequences of one length
    Mutant(
        "sequences: taps in reverse",
        "ops.sequences",
        "joined = x.new_empty(B, T, k, C)\n    for j, tap in enumerate(joined.unbind(2)):",
        "joined = x.new_empty(B, T, k, C)\n    for j, tap in enumerate(reversed(joined.unbind(2))):",
    ),
    Mutant(
        "sequences: zeros precede what repeats",
        "ops.sequences",
        'before.copy_(x.narrow(1, 0, 1)) if shift.padding == "replicate" else before.zero_()',
        "before.zero_()",
    ),
    Mutant(
        "sequences: what precedes gives no gradient",
        "ops.sequences",
        'enumerate(backs if shift.padding == "replicate" else ())',
        "enumerate(())",
    ),
    Mutant(
        "sequences: zeros give a gradient",
        "ops.sequences",
        'enumerate(backs if shift.padding == "replicate" else ())',
        "enumerate(backs)",
    ),
    Mutant(
        "sequences: gradients from beyond the end",
        "ops.sequences",
        "tap.narrow(1, T - back, back).zero_()",
        "tap.narrow(1, T - back, back).copy_(dz.narrow(1, 0, back))",
    ),
    Mutant(
        "sequences: the first row's gradient from one row too few",
        "ops.sequences",
        "early = dz.narrow(1, 0, back).sum(1)",
        "early = dz.narrow(1, 0, max(back - 1, 1)).sum(1)",
    ),
    Mutant(
        "sequences: counts left out of the mean",
        "ops.sequences",
        "[(part * w).sum((0, 1)) for part, w in _parts(z, *counts)]",
        "[part.sum((0, 1)) for part, w in _parts(z, *counts)]",
    ),
    Mutant(
        "sequences: counts left out of the variance",
        "ops.sequences",
        "(squares.mul_(w[0]) if w else squares)",
        "squares",
    ),
    Mutant(
        "sequences: counts left out of the correction",
        "ops.sequences",
        "correction.mul_(w[0]) if w else",
        "correction if w else",
    ),
    Mutant(
        "sequences: the biased variance",
        "ops.sequences",
        "shift.total - 1 if level.unbiased else",
        "shift.total if level.unbiased else",
    ),
    Mutant("sequences: the biased correction", "ops.sequences", "(1 if level.unbiased else 0)", "0"),
    Mutant(
        "sequences: no mean in the correction",
        "ops.sequences",
        "offset = (dbeta * scale).div_(-shift.total)",
        "offset = torch.zeros_like(dbeta)",
    ),
    Mutant(
        "sequences: no variance in the correction",
        "ops.sequences",
        "torch.addcmul(offset, y, slope)",
        "offset.expand_as(y).clone()",
    ),
    Mutant(
        "sequences: dgamma of the deviations", "ops.sequences", "_total(sums[1::2]).mul_(rstd)", "_total(sums[1::2])"
    ),
    Mutant(
        "sequences: a frozen level is corrected",
        "ops.sequences",
        "        if level.of_rows:\n            assert shift",
        "        if shift.total is not None:\n            assert shift",
    ),
    Mutant("sequences: the last part of sums alone", "ops.sequences", "torch.stack(list(sums)).sum(0)", "sums[-1]"),
    Mutant(
        "sequences: half of tanh's argument",
        "ops.sequences",
        "torch.addcmul(beta * 2, part, scale * 2)",
        "torch.addcmul(beta, part, scale)",
    ),
    Mutant(
        "sequences: tanh from a logistic, which cancels near 0",
        "ops.sequences",
        "e = twice.clamp_(max=40).expm1_()\n    return e.div_(e + 2)",
        "return twice.sigmoid_().mul_(2).sub_(1)",
    ),
    Mutant(
        "sequences: statistics that normalise may move",
        "ops.library",
        "_Sequences.apply(x, _frozen(levels), shifts",
        "_Sequences.apply(x, levels, shifts",
    ),
    Mutant(
        "sequences: torch.func goes through the closed form",
        "ops.library",
        "traced = torch.compiler.is_compiling() or _only_autograd_can(x, levels)\n    if backend",
        "traced = torch.compiler.is_compiling()\n    if backend",
    ),
    Mutant(
        "sequences: of unequal length taken for equal",
        "ops.functional",
        "even = x.numel() > 0 and bool((lengths == lengths[0]).all())",
        "even = x.numel() > 0 and x.shape[0] % len(lengths) == 0",
    ),
]
# what a run remembers, which network it keeps, files, sampling, refusals, devices, rows that count nothing
MUTANTS += [
    Mutant(
        "a run forgets where its words are",
        "runs.folder",
        "str(Path(name).resolve()) if Path(name).is_file() else None",
        "None",
    ),
    Mutant(
        "words that have changed are taken for a run's own",
        "cli.model",
        "if words.sha256 != source.sha256:",
        "if False:",
    ),
    Mutant(
        "an extended run goes on in its old schedule",
        "train.loop",
        "self.config = replace(self.config, start=done)",
        "self.config = replace(self.config)",
    ),
    Mutant(
        "a network without a state is overwritten",
        "train.loop",
        "if folder is not None and folder.holds_run() and not folder.state.exists():",
        "if False:",
    ),
    Mutant("two runs of one second share a folder", "runs.folder", "path.mkdir()", "path.mkdir(exist_ok=True)"),
    Mutant(
        "a file system without locks taken for another process",
        "runs.folder",
        "ours = error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)",
        "ours = False",
    ),
    Mutant("left-overs of others are removed", "runs.folder", "if ours.fullmatch(file.name):", "if True:"),
    Mutant("names of the test split not marked", "cli.model", "reversed(Splits._fields)", '("val", "train")'),
    Mutant(
        "an extended run is sampled from its older network",
        "cli.model",
        "(model.exists() and not _is_extended(path))",
        "model.exists()",
    ),
    Mutant("fine-tuning begins at random", "train.loop", "self.run.begin_with(init.state_dict())", "pass"),
    Mutant(
        "the worst network is kept", "train.loop", "better = all(loss < point.loss", "better = all(loss > point.loss"
    ),
    Mutant("the best network is kept and not used", "train.loop", "self.model.load_state_dict(self.best)", "pass"),
    Mutant("steps do not follow the data", "train.config", "max(0.025, len(corpus.words) / _NAMES_TXT_WORDS)", "1.0"),
    Mutant("the post's data has defaults of its own forgotten", "train.config", "if corpus.is_names_txt:", "if False:"),
    Mutant("the checksum is not compared", "files", "if kept != checksum:", "if False:"),
    Mutant(
        "a damaged key hides the checksum",
        "files",
        "text.get(_CHECKSUM) or next((value for value in text.values() if value.startswith('\"sha256:')), checksum)",
        "text.get(_CHECKSUM, checksum)",
    ),
    Mutant(
        "a negative variance is loaded",
        "nn",
        'if kind in ("running_var", "num_batches_tracked") and bool((tensor < 0).any()):',
        "if False:",
    ),
    Mutant(
        "shapes of a model file are not compared first",
        "nn",
        "    check_shapes(shapes, vocab_size, n_embd, widths, factors)\n",
        "    pass\n",
    ),
    Mutant(
        "shapes of a state are not compared first",
        "train.loop",
        "check_network(folder, state, self.config, self.vocabulary)",
        "pass",
    ),
    Mutant(
        "moments of another shape are taken",
        "train.setup",
        "if (value.shape, value.dtype) != (like.shape, like.dtype):",
        "if False:",
    ),
    Mutant(
        "a state of NaN is called good",
        "runs.folder",
        "(tensor.element_size() == 1 or not bool(tensor.isfinite().all()))",
        "tensor.element_size() == 1",
    ),
    Mutant(
        "names without a seed are the same each time",
        "cli.model",
        "secrets.randbelow(2**32) if args.seed is None else args.seed",
        "args.seed or 0",
    ),
    Mutant("another seed is printed than was used", "cli.model", "--seed {seed} draws", "--seed {seed + 1} draws"),
    Mutant("unique names repeat", "infer.generate", "not (unique and name in seen)", "True"),
    Mutant("names of the data are taken for new", "infer.generate", "name not in exclude and ", ""),
    Mutant(
        "a rate is printed for a handful of names", "cli.model", 'if len(names) >= _MANY else ""', 'if names else ""'
    ),
    Mutant("no memory is a traceback", "cli.main", 'return _fail("out of memory", 2)', "raise"),
    Mutant("an empty path is the folder here", "cli.main", 'if not text or "\\0" in text:', 'if "\\0" in text:'),
    Mutant("a seed has no upper bound", "train.config", "if self.seed >= 2**64:", "if False:"),
    Mutant("(C, T) is read as rows", "nn", "return self(h[None])[0]", "pass"),
    Mutant(
        "a level takes (C, T) for rows",
        "ops.functional",
        'if x.ndim == 2 and self.layout == "BCT" and taps is None and cu_seqlens is None:',
        "if False:",
    ),
    Mutant(
        "a new network is made on the default device",
        "train.setup",
        "with torch.random.fork_rng(devices=[]), on_device():",
        "with torch.random.fork_rng(devices=[]):",
    ),
    Mutant("uncounted windows reach the gradients", "nn", "if counted and not graph.all_count:", "if False:"),
    Mutant(
        "uncounted rows reach the loss's gradient",
        "ops.functional",
        "if not graph.all_count:  # what",
        "if False:  # what",
    ),
    Mutant("numbers of uncounted rows overflow", "ops.functional", "(x.abs() <= most)", "x.isfinite()"),
    Mutant("all rows are said to count", "data.graph", "all_count = bool((counts > 0).all())", "all_count = True"),
]


def generated() -> list[Mutant]:
    """The faults that `generate_mutants.py` has drawn and a test has seen."""
    entries = json.loads(GENERATED.read_text(encoding="utf-8"))
    fields = ("name", "module", "old", "new")
    return [Mutant(*(entry[name] for name in fields)) for entry in entries if "survives" not in entry]


IN_SUITE = [*MUTANTS, *generated()[::6]]  # of the generated ones every sixth: all take minutes

# No fault at all: the tests must pass with it, or what they say of the others means nothing.
CONTROL = Mutant("no fault", "ops.naive", "total - 1 if unbiased", "total - 1 if unbiased")


def published() -> dict[str, str]:
    """By fault, the test that MUTANTS.md says catches it."""
    if not TABLE.exists():
        return {}
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {row[0].removeprefix("| "): f"tests/{row[2].strip('`')}" for row in rows if row[2].startswith("`test_")}


class _Plant(importlib.machinery.SourceFileLoader, MetaPathFinder):
    """Imports one module of convwave with the fault in its source."""

    def __init__(self, mutant: Mutant) -> None:
        source = source_of(mutant.module)
        text = source.read_text(encoding="utf-8")
        assert text.count(mutant.old) == 1, f"{mutant.name}: {source.name} does not have {mutant.old!r} once"
        # a file, because triton reads the source of its kernels again
        self.folder = tempfile.TemporaryDirectory()
        planted = Path(self.folder.name) / source.name
        planted.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        super().__init__(f"convwave.{mutant.module}", str(planted))

    def find_spec(  # type: ignore[override]
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        return importlib.util.spec_from_file_location(fullname, self.path, loader=self)


class Outcome(NamedTuple):
    """How the tests took a fault."""

    caught: bool
    by: str  # the first test that failed, or what went wrong with the experiment


def run_all(mode: str = "tests", mutants: Sequence[Mutant] = IN_SUITE, control: bool = True) -> dict[str, Outcome]:
    """Every fault in a process of its own, two at a time, and the control first.

    Args:
        mode: "tests", or "verify" for what `convwave verify` sees.
        mutants: the faults.
        control: also all tests that are known to catch something, without a fault.
    """
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):  # half of what a process costs is importing these
        context.set_forkserver_preload(["torch", "torch._dynamo", "hypothesis", "pytest"])
    planted = [*([CONTROL] if control else []), *mutants]
    with ThreadPool(2) as pool:
        outcomes = pool.map(lambda mutant: _apart(context, mutant, mode), planted, chunksize=1)
    return {m.name: outcome for m, outcome in zip(planted, outcomes, strict=True)}


def _apart(context: Any, mutant: Mutant, mode: str) -> Outcome:
    """In a process of its own, which may hang or die."""
    import torch

    if not torch.cuda.is_available():  # before the processes are made: they import triton before conftest.py can say so
        os.environ["TRITON_INTERPRET"] = "1"
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(mutant, mode, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(PATIENCE) else Outcome(False, f"hangs: no end after {PATIENCE} s")
    except EOFError:
        process.join()
        hangs = hasattr(signal, "SIGXCPU") and process.exitcode == -signal.SIGXCPU
        return Outcome(False, f"hangs: no end after {SECONDS} s of computing" if hangs else "dies")
    finally:
        process.kill()
        process.join()


def _run(mutant: Mutant, mode: str, result: Any) -> None:
    """In the process that is to have the fault."""
    import torch

    with suppress(ImportError):  # Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    os.environ["CONVWAVE_MUTATION"] = "1"
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    with tempfile.TemporaryFile("w+") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        try:
            status = _verify(mutant) if mode == "verify" else _test(mutant)
        except BaseException:
            traceback.print_exc()
            status = 2
        sys.stdout.flush()
        sys.stderr.flush()
        printed.seek(0)
        output = printed.read()
    found = re.search(r"^(?:FAILED|CAUGHT) (.*?)(?: - .*)?$", output, re.MULTILINE)
    if status == 1 and found:
        result.send(Outcome(True, found[1]))
    else:
        result.send(Outcome(False, "survived" if status == 0 else output[-2000:]))


def _verify(mutant: Mutant) -> int:
    sys.meta_path.insert(0, _Plant(mutant))
    return _run_verify()


def _test(mutant: Mutant) -> int:
    """pytest's status: of the test that is known to catch the fault, and of all others if it does not."""
    sys.meta_path.insert(0, _Plant(mutant))
    import pytest

    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-o", "addopts=", "--no-header", "--tb=no"]
    options.append("-rf")
    known = published()
    if mutant == CONTROL:
        return int(pytest.main([*options, *(sorted(set(known.values())) or tests_for(CONTROL.module))]))
    if mutant.name in known and pytest.main([*options, known[mutant.name]]) == 1:
        return 1
    return int(pytest.main([*options, *tests_for(mutant.module)]))


def report(tests: dict[str, Outcome], verify: dict[str, Outcome]) -> str:
    """The table of MUTANTS.md, from what `run_all` found; `verify` may be empty."""
    everything = [*MUTANTS, *generated()]
    assert not tests[CONTROL.name].caught, "the tests fail without a fault"
    assert not verify or not verify[CONTROL.name].caught, "verify fails without a fault"
    seen = f"{sum(verify[m.name].caught for m in MUTANTS)} of {len(MUTANTS)}" if verify else "not run on this version"
    lines = [
        "# Planted faults",
        "",
        "Each of these faults was planted, one at a time, and a test failed. `make test` plants those chosen by hand",
        "and every sixth of those that `python -m tests.generate_mutants` drew, whose names begin with their module.",
        "The last column says whether `convwave verify` alone, in small, sees a fault too; it looks at a network, not",
        "at files, reading or sampling. Made by `python -m tests.mutation --report`, with that column by `--verify`.",
        "",
        f"Caught by the tests: {sum(o.caught for o in tests.values())} of {len(everything)}, "
        f"{len(everything) - len(MUTANTS)} of them generated. "
        f"Seen by verify: {seen}.",
        "",
        "| fault | module | first test that fails | first check of verify that fails |",
        "|---|---|---|---|",
    ]
    for mutant in everything:
        assert tests[mutant.name].caught or tests[mutant.name].by == "survived", tests[mutant.name].by
        by = tests[mutant.name].by.removeprefix("tests/")
        outcome = verify.get(mutant.name)
        check = "not run" if outcome is None else outcome.by if outcome.caught else "-"
        lines.append(f"| {mutant.name} | {mutant.module} | `{by}` | {check} |")
    survivors = [entry for entry in json.loads(GENERATED.read_text(encoding="utf-8")) if "survives" in entry]
    lines += ["", "Generated by `python -m tests.generate_mutants` and seen by no test, and why each is no fault:", ""]
    lines += [f"- {entry['name']}: {entry['survives']}" for entry in survivors] or ["none."]
    return "\n".join(lines) + "\n"


def _run_verify() -> int:
    """verify in small: 300 names, a network with other widths at every level."""
    import torch

    import convwave as cw
    from convwave.verify.certificate import verify

    words = cw.load_words().words
    torch.manual_seed(0)
    model = cw.ConvWave(len(cw.Vocabulary.from_words(words)), 10, [20, 24, 27])
    with torch.no_grad():  # no parameter and no running statistic at its neutral value
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
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
        verify = run_all("verify", MUTANTS) if "--verify" in arguments else {}
        TABLE.write_text(report(run_all("tests", [*MUTANTS, *generated()]), verify), encoding="utf-8")
        return 0
    print(run_all("tests", [mutant for mutant in [*MUTANTS, *generated()] if mutant.name in arguments]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
