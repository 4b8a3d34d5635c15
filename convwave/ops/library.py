"""The op boundary: what autograd, torch.compile, torch.export and CUDA graphs see of a stack of levels.

`conv_stack` is the one way in. It chooses who computes:

- "triton": `torch.ops.convwave.stack_forward`, `stack_inference` and `stack_backward`, registered with shapes for
  tracing; they run the kernels on CUDA tensors of up to 32 bits, and `convwave.ops.stack` elsewhere;
- "eager": `convwave.ops.stack` without an op in between, `convwave.ops.sequences` for sequences of one length on a CPU;
- `convwave.ops.naive`, the definition, for all that only autograd can do: second derivatives, `torch.func`,
  forward-mode differentiation, and, on the eager backend, `torch.compile` and `torch.export`.

`score_names` is the other way in, for whole names without gradients.

Only the ops' schemas list a stack's tensors one kind after another: they are flattened and put together again here.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convwave.data.graph import Consumers, Rows
from convwave.data.packing import Packed
from convwave.ops import naive, sequences
from convwave.ops import stack as twin
from convwave.ops.fold import folded
from convwave.ops.level import ACTIVATIONS, Level, Stats, check_total, track
from convwave.ops.sequences import Shift

BACKENDS = ("auto", "eager", "triton")
PRECISIONS = ("auto", "ieee", "tf32x3", "tf32")


def available_backends() -> list[str]:
    """The backends available on this machine: "triton" needs triton, and a CUDA device (or TRITON_INTERPRET=1)."""
    return ["eager"] if _why_not_triton() else ["eager", "triton"]


def choose_backend(backend: str) -> str:
    """Resolve a backend's name to "eager" or "triton".

    "auto" is "triton" if there is a CUDA device; it never chooses triton's interpreter.

    Raises:
        ValueError: another name.
        RuntimeError: "triton" where it is not available.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto', 'eager' or 'triton', got {backend!r}")
    reason = _why_not_triton()
    if backend == "triton" and reason:
        raise RuntimeError(f"backend: 'triton' is not available: {reason}")
    if backend == "auto":
        return "triton" if not reason and torch.cuda.is_available() else "eager"
    return backend


@torch.compiler.assume_constant_result
@functools.cache
def _why_not_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    if not torch.cuda.is_available() and not _interpreting():
        return "there is no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
    return ""


@torch.compiler.assume_constant_result
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(x: Tensor) -> bool:
    """Whether the ops run kernels on `x`: on a CUDA device (or in the interpreter), not in float64."""
    return x.dtype != torch.float64 and (x.is_cuda or (x.device.type == "cpu" and _interpreting()))


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever its tensors are."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Flattening: a stack's tensors for the ops' schemas, and back


class _Options(NamedTuple):
    """What a stack has besides tensors, one entry per level."""

    eps: list[float]
    training: list[bool]  # whether the statistics are those of the rows
    unbiased: list[bool]
    activations: list[str]
    totals: list[float]  # 0 where unknown
    most: list[int]  # of the consumers


class _Tensors(NamedTuple):
    """A stack's tensors, one entry per level; the optional ones are none or one per level."""

    weights: list[Tensor]
    gammas: list[Tensor]
    betas: list[Tensor]
    means: list[Tensor]  # running statistics; empty tensors where none are tracked
    variances: list[Tensor]
    taps: list[Tensor]
    counts: list[Tensor]
    ranges: list[Tensor]  # of the consumers
    orders: list[Tensor]


def _flatten(levels: Sequence[Level], rows: Sequence[Rows]) -> tuple[_Tensors, _Options]:
    consumers = [row.consumers for row in rows if row.consumers is not None]
    counts = [row.counts for row in rows if row.counts is not None]
    assert len(consumers) in (0, len(rows))
    assert len(counts) in (0, len(rows))
    tensors = _Tensors(
        [level.weight for level in levels],
        [level.gamma for level in levels],
        [level.beta for level in levels],
        [_or_empty(level.running_mean, level) for level in levels],
        [_or_empty(level.running_var, level) for level in levels],
        [row.taps for row in rows],
        counts,
        [c.ranges for c in consumers],
        [c.order for c in consumers],
    )
    options = _Options(
        [level.eps for level in levels],
        [level.of_rows for level in levels],
        [level.unbiased for level in levels],
        [level.activation.name for level in levels],
        [row.total or 0.0 for row in rows],
        [c.most for c in consumers],
    )
    return tensors, options


def _or_empty(statistic: Tensor | None, level: Level) -> Tensor:
    """A copy: an op that is differentiated may keep it, and training moves the original in place."""
    return level.weight.new_empty(0) if statistic is None or level.of_rows else statistic.detach().clone()


def _unflatten(t: _Tensors, o: _Options) -> tuple[list[Level], list[Rows]]:
    levels, rows = [], []
    for i, name in enumerate(o.activations):
        fixed = not o.training[i]
        levels.append(
            Level(
                t.weights[i],
                t.gammas[i],
                t.betas[i],
                t.means[i] if fixed else None,
                t.variances[i] if fixed else None,
                o.eps[i],
                training=o.training[i],
                unbiased=o.unbiased[i],
                activation=ACTIVATIONS[name],
            )
        )
        consumers = Consumers(t.ranges[i], t.orders[i], o.most[i]) if t.ranges else None
        rows.append(Rows(t.taps[i], t.counts[i] if t.counts else None, o.totals[i] or None, consumers))
    return levels, rows


# ---------------------------------------------------------------------------------------------------------------------
# Ops

_TENSORS = ", ".join(f"Tensor[] {name}" for name in _Tensors._fields)
_OPTIONS = "float[] eps, bool[] training, bool[] unbiased, str[] activations, float[] totals, int[] most"
_STACK = f"{_TENSORS}, {_OPTIONS}, str precision"
_library = torch.library.Library("convwave", "DEF")
_library.define(f"stack_forward(Tensor x, {_STACK}) -> (Tensor, Tensor[], Tensor[])")
_library.define(f"stack_inference(Tensor x, {_STACK}) -> Tensor")
_library.define(
    f"stack_backward(Tensor dh, Tensor x, Tensor[] zs, Tensor[] stats, bool needs_dx, {_STACK})"
    " -> (Tensor, Tensor[], Tensor[], Tensor[])"
)


def _parse(flat: Sequence[Any]) -> tuple[list[Level], list[Rows], str]:
    n = len(_Tensors._fields)
    levels, rows = _unflatten(_Tensors(*flat[:n]), _Options(*flat[n:-1]))
    return levels, rows, flat[-1]


def _stack_forward(x: Tensor, *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    levels, rows, precision = _parse(flat)
    if not runs_kernels(x):
        return twin.stack_forward(x, levels, rows)
    from convwave.kernels import stack as kernels

    with _on_device_of(x):
        return kernels.stack_forward(x, levels, rows, precision)


def _stack_inference(x: Tensor, *flat: Any) -> Tensor:
    levels, rows, precision = _parse(flat)
    if not runs_kernels(x):
        return twin.inference(x, levels, rows)
    from convwave.kernels import stack as kernels

    with _on_device_of(x):
        return kernels.stack_inference(x, levels, rows, precision)


def _stack_backward(
    dh: Tensor, x: Tensor, zs: list[Tensor], stats: list[Tensor], needs_dx: bool, *flat: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    levels, rows, precision = _parse(flat)
    if runs_kernels(x):
        from convwave.kernels import stack as kernels

        with _on_device_of(x):
            dx, *lists = kernels.stack_backward(dh, x, levels, zs, stats, rows, precision, needs_dx)
    else:
        dx, *lists = twin.stack_backward(dh, x, levels, zs, stats, rows, needs_dx)
    parameters = ([getattr(level, name) for level in levels] for name in ("weight", "gamma", "beta"))
    dweights, dgammas, dbetas = (
        [d.to(p.dtype).clone(memory_format=torch.contiguous_format) for d, p in zip(gradients, of, strict=True)]
        for gradients, of in zip(lists, parameters, strict=True)
    )
    return (dx if needs_dx and dx is not None else x.new_empty(0)), dweights, dgammas, dbetas


def _stack_forward_fake(x: Tensor, *flat: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    levels, rows, _ = _parse(flat)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    zs = [x.new_empty(row.taps.shape[1], level.weight.shape[0]) for level, row in zip(levels, rows, strict=True)]
    stats = [x.new_empty(5, level.weight.shape[0], dtype=wide) for level in levels]
    return _top(x, levels, rows), zs, stats


def _top(x: Tensor, levels: list[Level], rows: list[Rows]) -> Tensor:
    return x.new_empty(rows[-1].taps.shape[1], levels[-1].weight.shape[0] // levels[-1].activation.parts)


def _stack_inference_fake(x: Tensor, *flat: Any) -> Tensor:
    return _top(x, *_parse(flat)[:2])


def _stack_backward_fake(
    dh: Tensor, x: Tensor, zs: list[Tensor], stats: list[Tensor], needs_dx: bool, *flat: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    levels, _, _ = _parse(flat)
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return (
        dx,
        [level.weight.new_empty(level.weight.shape) for level in levels],
        [level.gamma.new_empty(level.gamma.shape) for level in levels],
        [level.beta.new_empty(level.beta.shape) for level in levels],
    )


for _name, _implementation, _fake in (
    ("stack_forward", _stack_forward, _stack_forward_fake),
    ("stack_inference", _stack_inference, _stack_inference_fake),
    ("stack_backward", _stack_backward, _stack_backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"convwave::{_name}", _fake, lib=_library)


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class _Call(NamedTuple):
    """How a stack is computed."""

    options: _Options
    sizes: tuple[int, ...]  # tensors of each kind, in the order of `_Tensors`
    precision: str
    op: bool  # through the ops; else directly in plain PyTorch


def _grouped(call: _Call, tensors: Sequence[Tensor]) -> _Tensors:
    lists, start = [], 0
    for size in call.sizes:
        lists.append(list(tensors[start : start + size]))
        start += size
    return _Tensors(*lists)


class _Stack(torch.autograd.Function):
    """h, statistics, and what the backward pass keeps; gradients for x, weights, gammas and betas."""

    @staticmethod
    def forward(x: Tensor, call: _Call, *tensors: Tensor) -> tuple[Tensor | None, ...]:
        t = _grouped(call, tensors)
        if call.op:
            h, zs, stats = torch.ops.convwave.stack_forward(x, *t, *call.options, call.precision)
            return (h, *stats, *zs)
        tape = twin.forward(x, *_unflatten(t, call.options))
        return (tape.h[-1], *tape.stats, *tape.deviation, *tape.h[:-1], *tape.read)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        x, call, *tensors = inputs
        ctx.mark_non_differentiable(*(kept for kept in output[1:] if kept is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, *output)
        ctx.call = call

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        L, n = len(call.options.eps), sum(call.sizes)
        x, *saved = ctx.saved_tensors
        nothing = (None,) * (2 + n)
        if dh is None:
            return nothing
        t, (h, *kept) = _grouped(call, saved[:n]), saved[n:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative is to follow
            levels, rows = _unflatten(t, call.options)
            variables = [x, *t.weights, *t.gammas, *t.betas]
            needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
            found = _differentiable_backward(dh, variables, needed, levels, rows)
            return (found[0], None, *found[1:], *(None,) * (n - 3 * L))
        stats, zs, hs, read = kept[:L], kept[L : 2 * L], kept[2 * L : 3 * L - 1], kept[3 * L - 1 :]
        needs_dx = ctx.needs_input_grad[0]
        if call.op:
            dx, *lists = torch.ops.convwave.stack_backward(
                dh, x, zs, stats, needs_dx, *t, *call.options, call.precision
            )
        else:
            levels, rows = _unflatten(t, call.options)
            tape = twin.Tape([*hs, h], zs, stats, read, [])
            dx, *lists = twin.backward(dh, x, levels, tape, rows, needs_dx)
        gradients = [d for tensors in lists for d in tensors]
        gradients = [d.to(p.dtype) for d, p in zip(gradients, (*t.weights, *t.gammas, *t.betas), strict=True)]
        return (dx if needs_dx else None, None, *gradients, *(None,) * (n - 3 * L))


def _differentiable_backward(
    dh: Tensor, variables: Sequence[Tensor], needed: Sequence[bool], levels: Sequence[Level], rows: Sequence[Rows]
) -> list[Tensor | None]:
    """The definition's gradients of x and the parameters where they are needed; autograd can differentiate them."""
    needed = needed[: len(variables)]
    x = variables[0]
    h, _ = naive.stack(x.reshape(-1, x.shape[-1]), levels, rows)
    wanted = [v for v, needs in zip(variables, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(h, wanted, dh.reshape(h.shape), create_graph=True))
    return [next(found) if needs else None for needs in needed]


class _Sequences(torch.autograd.Function):
    """A stack over sequences (B, T, C); its parameters are weight, gamma and beta of level after level."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift], *parameters: Tensor
    ) -> Tensor:
        h, kept = sequences.forward(x, levels, shifts)
        ctx.save_for_backward(x, h, *parameters, *(tensor for level in kept for tensor in level))
        ctx.levels, ctx.shifts = levels, shifts
        return h

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        L = len(ctx.levels)
        x, h, *saved = ctx.saved_tensors
        levels = [
            level._replace(weight=weight, gamma=gamma, beta=beta)
            for level, weight, gamma, beta in zip(ctx.levels, saved[::3], saved[1::3], saved[2::3], strict=False)
        ]
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # a second derivative is to follow
            rows = [shift.rows(x.shape[:-1], x.device) for shift in ctx.shifts]
            dx, *gradients = _differentiable_backward(dh, [x, *saved[: 3 * L]], needed, levels, rows)
            return (dx, None, None, *gradients)
        kept = [sequences.Kept(*saved[i : i + 4]) for i in range(3 * L, 7 * L, 4)]
        parameters = saved[: 3 * L]
        del saved, x
        ctx.maybe_clear_saved_tensors()  # `kept` holds them now, level by level
        lowest = -1 if needed[0] else needed[1:].index(True) // 3
        dx, gradients = sequences.backward(dh, h, levels, kept, ctx.shifts, lowest, needed[1::3])
        gradients = [d if d is None else d.to(p.dtype) for d, p in zip(gradients, parameters, strict=True)]
        return (dx if needed[0] else None, None, None, *gradients)


def _only_autograd_can(x: Tensor, levels: Sequence[Level]) -> bool:
    """Whether `torch.func` or forward-mode differentiation is at work, which no hand-written backward pass serves."""
    if torch.compiler.is_compiling():
        return False
    tensors = (x, *(t for level in levels for t in (level.weight, level.gamma, level.beta)))
    if any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        return True
    return torch._C._are_functorch_transforms_active()


def conv_stack(
    x: Tensor, levels: Sequence[Level], rows: Sequence[Rows], backend: str = "eager", precision: str = "auto"
) -> Tensor:
    """Levels one above the other; moves the running statistics of those in training mode.

    Differentiable, to any order, in x and in each level's weight, gamma and beta.

    Args:
        x: (N_0, C) bottom rows.
        levels, rows: from the bottom up; every level obeys its own mode, eps, momentum and kind of variance.
        backend: "eager" or "triton".
        precision: of float32 products in kernels, see `PRECISIONS`.

    Returns:
        (N_L, H_L) of x's dtype.

    Raises:
        ValueError: too few rows for a variance (as far as totals are known without waiting for a GPU; NaN where not),
            or an unknown precision.
    """
    _check(levels, rows, precision)
    op = backend == "triton" and runs_kernels(x)
    if _only_autograd_can(x, levels) or (not op and torch.compiler.is_compiling()):
        h, taken = naive.stack(x, levels, rows)
        for level, stats in zip(levels, taken, strict=True):
            if stats is not None and level.training:
                track(level, stats.mean.detach(), stats.var.detach(), stats.total)
        return h
    tensors, options = _flatten(levels, rows)
    if not _keeps(x, levels):
        if op:
            return torch.ops.convwave.stack_inference(x, *tensors, *options, precision)
        return twin.inference(x, levels, rows)
    call = _Call(options, tuple(len(kind) for kind in tensors), precision, op)
    h, *rest = _Stack.apply(x, call, *(t for kind in tensors for t in kind))
    for level, row, found in zip(levels, rows, rest, strict=False):
        if level.training:
            s = Stats(*found.detach())
            track(level, s.mean, s.var, s.total if row.total is None else row.total)
    return h


def conv_sequences(
    x: Tensor, levels: Sequence[Level], shifts: Sequence[Shift], backend: str = "eager", precision: str = "auto"
) -> Tensor:
    """`conv_stack` over sequences.

    Args:
        x: (B, T, C) sequences of one length; (N, C) those that the shifts' `cu_seqlens` mark.
        levels, shifts: from the bottom up.
        backend, precision: see `conv_stack`.

    Returns:
        (B, T, H_L) or (N, H_L).
    """
    traced = torch.compiler.is_compiling() or _only_autograd_can(x, levels)
    if backend == "eager" and x.device.type == "cpu" and x.ndim == 3 and x.numel() and not traced:
        shifts = [replace(shift, total=_total_of(shift, x.shape[0] * x.shape[1])) for shift in shifts]
        _check(levels, shifts, precision)
        if not _keeps(x, levels):
            return sequences.inference(x, levels, shifts)
        return _Sequences.apply(x, _frozen(levels), shifts, *(t for level in levels for t in level[:3]))
    if any(shift.padding == "zeros" for shift in shifts[1:]):  # rows read zeros at the bottom only
        for level, shift in zip(levels, shifts, strict=True):
            x = conv_sequences(x, [level], [shift], backend, precision)
        return x
    consumers = backend == "triton" and runs_kernels(x) and torch.is_grad_enabled()
    rows = [shift.rows(x.shape[:-1], x.device, consumers) for shift in shifts]
    h = conv_stack(x.reshape(-1, x.shape[-1]), levels, rows, backend, precision)
    return h.view(*x.shape[:-1], h.shape[1])


def _check(levels: Sequence[Level], rows: Sequence[Rows | Shift], precision: str) -> None:
    """Raise ValueError where counts are known to be too few, or for an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    for level, row in zip(levels, rows, strict=True):
        if level.of_rows:
            total = row.total if isinstance(row, Shift) else _known_total(row)
            if total is not None:
                check_total(total, level.unbiased)


def _keeps(x: Tensor, levels: Sequence[Level]) -> bool:
    """Whether anything is kept of a pass: for gradients, or for running statistics."""
    variables = [x, *(t for level in levels for t in (level.weight, level.gamma, level.beta))]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in variables)
    return differentiable or any(level.of_rows for level in levels)


def _frozen(levels: Sequence[Level]) -> list[Level]:
    """Levels with copies of the running statistics that they normalise with: training moves the originals in place."""
    return [
        level
        if level.of_rows
        else level._replace(running_mean=level.running_mean.clone(), running_var=level.running_var.clone())  # type: ignore[union-attr]
        for level in levels
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Whole names, without gradients

_WIDEST, _CONTEXT, _TABLE = 128, 64, 2**16  # channels or tokens; tokens; rows of level 0's table


def why_not_score_names(levels: Sequence[Level], vocab_size: int) -> str:
    """What keeps a network out of the kernel of `score_names`; empty where nothing does."""
    factors, widths = [level.weight.shape[2] for level in levels], [level.weight.shape[0] for level in levels]
    above = {level.activation.name for level in levels[1:]}
    if any(level.of_rows for level in levels):
        return "levels: expected running statistics and training=False at every level"
    if max(widths) > _WIDEST or vocab_size > _WIDEST:
        return f"levels, head_bias: expected up to {_WIDEST} channels and tokens, got {max(widths)} and {vocab_size}"
    if math.prod(factors) > _CONTEXT:
        return f"levels: expected a context of up to {_CONTEXT} tokens, got {math.prod(factors)}"
    if vocab_size ** factors[0] > _TABLE:
        return f"levels: expected up to {_TABLE} contexts of the first level, got {vocab_size}^{factors[0]}"
    if len(set(factors[1:])) > 1 or len(above) > 1 or any(level.activation.parts > 1 for level in levels):
        return f"levels: expected equal taps and activations of one part above the first, got {factors[1:]}, {above}"
    return ""


@torch.no_grad()
def score_names(
    embedding: Tensor,
    levels: Sequence[Level],
    head_weight: Tensor,
    head_bias: Tensor,
    packed: Packed,
    *,
    losses: bool = True,
    precision: str = "auto",
) -> Tensor:
    """Every position of packed words in one launch: embedding, levels of a tree, head, log_softmax.

    On a CUDA device, and not in float64, this is `kernels.score`; elsewhere `ops.stack`.

    Args:
        embedding: (V, C).
        levels: from the bottom up, with running statistics; level l has dilation ``prod(taps of the levels below)``.
        head_weight, head_bias: (V, H_L), (V,).
        packed: N positions, tokens and targets below V, int64 or int32.
        losses: minus the log-probability of each position's target, instead of those of all tokens.
        precision: of float32 products in kernels, see `PRECISIONS`.

    Returns:
        (N,) losses or (N, V) log-probabilities, in float32; of a float64 network in float64.

    Raises:
        ValueError: no positions, or for the kernel what `why_not_score_names` says.
        IndexError: a token or target that is not below V; on a CUDA device an assertion there, which does not wait.
    """
    V = head_bias.numel()
    if len(packed) == 0:
        raise ValueError("packed: expected at least one position, got none")
    inside = torch.stack([((ids >= 0) & (ids < V)).all() for ids in (packed.tokens, packed.targets)]).all()
    if inside.is_cuda:
        torch._assert_async(inside)
    elif not bool(inside):
        raise IndexError(f"packed: expected tokens and targets from 0 to {V - 1}")
    if not runs_kernels(embedding):
        return twin.score_names(embedding, levels, head_weight, head_bias, packed, losses)
    reason = why_not_score_names(levels, V)
    if reason:
        raise ValueError(reason)
    from convwave.kernels import configs, score
    from convwave.kernels import stack as kernels

    factors = [level.weight.shape[2] for level in levels]
    steps = V ** torch.arange(factors[0] - 1, -1, -1, device=embedding.device)
    contexts = torch.arange(V ** factors[0], device=embedding.device) // steps[:, None] % V
    precision = configs.resolve_precision(precision, embedding.dtype)
    above = [folded(level) for level in levels[1:]]
    with _on_device_of(embedding):
        return score.score_names(
            packed.tokens,
            packed.age,
            kernels.stack_inference(embedding, levels[:1], [Rows(contexts)], precision),
            [weight for weight, _ in above],
            [shift for _, shift in above],
            head_weight,
            head_bias,
            factors=factors,
            activation=levels[-1].activation.name,
            precision=precision,
            longest=packed.longest,
            targets=packed.targets if losses else None,
        )


def _known_total(row: Rows) -> float | None:
    """The sum of a level's counts, None where finding it would wait for a GPU or a trace."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if row.total is None and row.counts is not None and (row.counts.is_cuda or traced):
        return None
    return _total_of(row, row.taps.shape[1])


def _total_of(row: Rows | Shift, number: int) -> float:
    """The sum of the counts of a number of rows."""
    if row.total is not None:
        return row.total
    return float(number) if row.counts is None else float(row.counts.double().sum())
