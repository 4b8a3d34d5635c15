"""The op boundary: what autograd, torch.compile, torch.export and CUDA graphs see of the kernels.

`torch.ops.convwave.stack_forward`, `stack_inference` and `stack_backward` are registered with shapes for tracing; CUDA
tensors go to the Triton kernels, CPU tensors and float64 to `convwave.eager`. Autograd is added outside the ops. One op
is a whole stack; a single layer is a stack of one.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convwave.data.graph import Consumers
from convwave.ops import stack as twin

BACKENDS = ("auto", "eager", "triton")
PRECISIONS = ("auto", "ieee", "tf32x3", "tf32")


def available_backends() -> list[str]:
    """The backends that this machine has: "triton" needs triton, and a CUDA device (or TRITON_INTERPRET=1)."""
    return ["eager"] if _why_not_triton() else ["eager", "triton"]


def choose_backend(backend: str) -> str:
    """The backend that "auto", "eager" or "triton" means on this machine.

    "auto" is "triton" where there is a CUDA device, and never triton's interpreter.

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
    """Whether the ops compute with kernels where `x` is: on a CUDA device (or in the interpreter), not in float64."""
    return x.dtype != torch.float64 and (x.is_cuda or (x.device.type == "cpu" and _interpreting()))


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whichever its tensors lie on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# Definitions

_LEVELS = "Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] fixed, Tensor[] taps"
_library = torch.library.Library("convwave", "DEF")
_library.define(
    f"stack_forward(Tensor x, {_LEVELS}, Tensor[] counts, float[] eps, bool unbiased, str precision)"
    " -> (Tensor, Tensor[], Tensor[])"
)
_library.define(f"stack_inference(Tensor x, {_LEVELS}, float[] eps, str precision) -> Tensor")
_library.define(
    "stack_backward(Tensor dh, Tensor x, Tensor[] weights, Tensor[] betas, Tensor[] zs, Tensor[] stats, Tensor[] taps, "
    "Tensor[] counts, Tensor[] ranges, Tensor[] orders, int[] most, bool training, bool unbiased, bool needs_dx, "
    "str precision) -> (Tensor, Tensor[], Tensor[], Tensor[])"
)


def _stack_forward(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    fixed: list[Tensor],
    taps: list[Tensor],
    counts: list[Tensor],
    eps: list[float],
    unbiased: bool,
    precision: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    if runs_kernels(x):
        from convwave.kernels import stack

        with _on_device_of(x):
            h, zs, stats = stack.stack_forward(x, weights, gammas, betas, fixed, taps, counts, eps, unbiased, precision)
    else:
        h, zs, stats = twin.stack_forward(x, weights, gammas, betas, fixed, taps, counts, eps, unbiased)
    # an op may not return its own inputs
    return h, zs, [s.clone() for s in stats] if fixed else stats


def _stack_inference(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    fixed: list[Tensor],
    taps: list[Tensor],
    eps: list[float],
    precision: str,
) -> Tensor:
    if runs_kernels(x):
        from convwave.kernels import stack

        with _on_device_of(x):
            return stack.stack_inference(x, weights, gammas, betas, fixed, taps, eps, precision)
    return twin.stack_forward(x, weights, gammas, betas, fixed, taps, [], eps, True)[0]


def _stack_backward(
    dh: Tensor,
    x: Tensor,
    weights: list[Tensor],
    betas: list[Tensor],
    zs: list[Tensor],
    stats: list[Tensor],
    taps: list[Tensor],
    counts: list[Tensor],
    ranges: list[Tensor],
    orders: list[Tensor],
    most: list[int],
    training: bool,
    unbiased: bool,
    needs_dx: bool,
    precision: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    if runs_kernels(x):
        from convwave.kernels import stack

        consumers = [Consumers(*c) for c in zip(ranges, orders, most, strict=True)]
        with _on_device_of(x):
            dx, dweights, dgammas, dbetas = stack.stack_backward(
                dh, x, weights, betas, zs, stats, taps, counts, training, unbiased, precision, consumers, needs_dx
            )
    else:
        dx, dweights, dgammas, dbetas = twin.stack_backward(
            dh, x, weights, betas, zs, stats, taps, counts, training, unbiased
        )
        dx = dx if needs_dx else x.new_empty(0)
    return (
        dx,
        [d.to(w.dtype).contiguous() for d, w in zip(dweights, weights, strict=True)],
        [d.to(b.dtype).clone() for d, b in zip(dgammas, betas, strict=True)],
        [d.to(b.dtype).clone() for d, b in zip(dbetas, betas, strict=True)],
    )


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("convwave::stack_forward", lib=_library)
def _stack_forward_fake(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    fixed: list[Tensor],
    taps: list[Tensor],
    counts: list[Tensor],
    eps: list[float],
    unbiased: bool,
    precision: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    zs = [x.new_empty(tap.shape[1], w.shape[0]) for tap, w in zip(taps, weights, strict=True)]
    stats = [x.new_empty(5, w.shape[0], dtype=_wide_dtype(x)) for w in weights]
    return torch.empty_like(zs[-1]), zs, stats


@torch.library.register_fake("convwave::stack_inference", lib=_library)
def _stack_inference_fake(
    x: Tensor,
    weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    fixed: list[Tensor],
    taps: list[Tensor],
    eps: list[float],
    precision: str,
) -> Tensor:
    return x.new_empty(taps[-1].shape[1], weights[-1].shape[0])


@torch.library.register_fake("convwave::stack_backward", lib=_library)
def _stack_backward_fake(
    dh: Tensor,
    x: Tensor,
    weights: list[Tensor],
    betas: list[Tensor],
    zs: list[Tensor],
    stats: list[Tensor],
    taps: list[Tensor],
    counts: list[Tensor],
    ranges: list[Tensor],
    orders: list[Tensor],
    most: list[int],
    training: bool,
    unbiased: bool,
    needs_dx: bool,
    precision: str,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return (
        dx,
        [w.new_empty(w.shape) for w in weights],
        [torch.empty_like(b) for b in betas],
        [torch.empty_like(b) for b in betas],
    )


for _name, _implementation in (
    ("stack_forward", _stack_forward),
    ("stack_inference", _stack_inference),
    ("stack_backward", _stack_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")


# ---------------------------------------------------------------------------------------------------------------------
# Autograd


class _Options(NamedTuple):
    """What `_Stack` is given besides tensors."""

    levels: int
    training: bool
    has_counts: bool
    most: tuple[int, ...]  # of the consumers; empty without any
    eps: tuple[float, ...]
    unbiased: bool
    precision: str


def _split(options: _Options, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """weights, gammas, betas, fixed, taps, counts, ranges, orders: one list for each, of `levels` tensors or none."""
    L = options.levels
    present = [True, True, True, not options.training, True, options.has_counts, bool(options.most), bool(options.most)]
    lists, start = [], 0
    for there in present:
        lists.append(list(tensors[start : start + L]) if there else [])
        start += L if there else 0
    return lists


class _Stack(torch.autograd.Function):
    """h, pre-activations and statistics of a stack; gradients for x, weights, gammas and betas."""

    @staticmethod
    def forward(x: Tensor, options: _Options, *tensors: Tensor) -> tuple[Tensor, ...]:
        weights, gammas, betas, fixed, taps, counts, _, _ = _split(options, tensors)
        h, zs, stats = torch.ops.convwave.stack_forward(
            x,
            weights,
            gammas,
            betas,
            fixed,
            taps,
            counts,
            list(options.eps),
            options.unbiased,
            options.precision,
        )
        return (h, *zs, *stats)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, options, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *tensors, *output[1:])
        ctx.options = options

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dh: Tensor | None, *others: None) -> tuple[Tensor | None, ...]:
        options: _Options = ctx.options
        L = options.levels
        x, *saved = ctx.saved_tensors
        tensors, zs, stats = saved[: -2 * L], saved[-2 * L : -L], saved[-L:]
        if dh is None:
            return (None,) * (2 + len(tensors))
        weights, _, betas, _, taps, counts, ranges, orders = _split(options, tensors)
        dx, *lists = torch.ops.convwave.stack_backward(
            dh,
            x,
            weights,
            betas,
            zs,
            stats,
            taps,
            counts,
            ranges,
            orders,
            list(options.most),
            options.training,
            options.unbiased,
            ctx.needs_input_grad[0],
            options.precision,
        )
        rest = (None,) * (len(tensors) - 3 * L)
        return (dx if ctx.needs_input_grad[0] else None, None, *(d for tensors in lists for d in tensors), *rest)


def stack(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    fixed: Sequence[Tensor],
    taps: Sequence[Tensor],
    counts: Sequence[Tensor],
    eps: Sequence[float],
    unbiased: bool,
    precision: str = "auto",
    consumers: Sequence[Consumers] = (),
) -> tuple[Tensor, list[Tensor]]:
    """L levels through the ops, differentiable in x, weights, gammas and betas.

    Args:
        fixed: statistics (5, H) per level, see `fold.fixed_stats`; none in training mode.
        consumers: per level; found out in the backward pass where not given.
        others: see `twin.stack_forward`.

    Returns:
        (N_L, H_L) activations; statistics (5, H) per level.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, *gammas, *betas))
    if fixed and not differentiable:
        h = torch.ops.convwave.stack_inference(
            x, list(weights), list(gammas), list(betas), list(fixed), list(taps), list(eps), precision
        )
        return h, list(fixed)
    options = _Options(
        len(weights),
        not fixed,
        bool(counts),
        tuple(c.most for c in consumers),
        tuple(eps),
        unbiased,
        precision,
    )
    lists = (weights, gammas, betas, fixed, taps, counts, [c.ranges for c in consumers], [c.order for c in consumers])
    h, *rest = _Stack.apply(x, options, *(tensor for tensors in lists for tensor in tensors))
    return h, rest[len(weights) :]
