"""Measuring: check first, then time all competitors in turn, and say how far the figures can be trusted.

- *Check before time.* Every result is compared with one computed in float64 before any clock runs. A competitor that is
  wrong is reported with its error, and is never timed.
- *Interleaved.* A round times every competitor once, in an order that is drawn anew, so a machine whose speed drifts
  slows all of them alike.
- *One set of samples.* Time, rate and speed-up of a competitor come from the same rounds: the rate is positions over
  the median time, the speed-up the ratio of two such rates. Its quantiles are those of the ratios within rounds.
- *Noise.* How far another run's median may lie from this one, as far as one run can tell. Above 10 % every figure of
  the competitor is marked, and the study says "machine too noisy".

On CUDA a sample is wall time between synchronisations; next to it stand the replay of the same work as a CUDA graph,
which has no launch overhead, and the time that kernels were running, from the profiler.

Peak memory is what a run holds above what was there before it: on CUDA from the caching allocator's high-water mark;
on a CPU from the profiler's record of PyTorch's own allocator. Scratch memory of BLAS is in neither.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

QUANTILES = {"p05": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95}
TOO_NOISY = 0.10
TIME_UP = "the time was up"
EXACT = 1e-8  # relative, in float64, with room for what BatchNorm amplifies
Results = Mapping[str, Tensor]


class Unavailable(Exception):
    """A competitor that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Work:
    """A competitor that is ready. Those of a group share one error bound, derived from the first, its baseline."""

    run: Callable[[], Any]  # what is timed
    result: Callable[[], Results]  # what it computes, by name
    parameters: Sequence[Tensor] = ()  # what it trains
    dtype: torch.dtype = torch.float32  # sets the precision that the check expects
    positions: int | None = None  # that one run handles, when it is another number than its rivals'
    expected: Results | None = None  # what it must compute, when that is not what its rivals compute
    group: str = ""
    exact: Callable[[], Results] | None = None  # of a baseline: the same code in float64, to prove that it only rounds
    no_capture: str = ""  # why no CUDA graph is made of it; a capture that fails may spoil those after it
    unseen: str = ""  # why its peak memory cannot be measured


Competitor = tuple[str, Callable[[], Work]]  # its name in tables and files, and what builds it or raises `Unavailable`


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    device: str = "cpu"
    rounds: int = 15  # samples of every competitor
    least_rounds: int = 4  # taken even when the time is up; two halves of two samples each need 4
    seconds: float = 12.0  # after which no further round begins
    sample_seconds: float = 0.004  # that a sample lasts at least, by repeated calls
    deadline: float = math.inf  # on `time.monotonic`'s clock, after which nothing more is built

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


NUMBERS = (*QUANTILES, "noise", "error", "bound")


class Row(dict[str, Any]):
    """One figure as a file holds it; without a provider, the point of a study at which a comparison stands.

    `status` is "ok", "wrong" or "not measured"; only the first has numbers.
    """

    def row(self, provider: str, metric: str = "seconds", unit: str = "s", **values: Any) -> Row:
        """A figure at this point; of one number, unless `values` say otherwise."""
        found = {"provider": provider, "metric": metric, "unit": unit, **dict.fromkeys(NUMBERS)}
        return Row(self | found | {"n": int("median" in values), "status": "ok", "note": ""} | values)

    def absent(self, provider: str, reason: Exception | str, metric: str = "seconds") -> Row:
        """The row of something that was not measured."""
        return self.row(provider, metric, status="not measured", note=why(reason))


def why(reason: Exception | str) -> str:
    """A reason in one line, short enough for a table and without paths of this machine."""
    if isinstance(reason, torch.OutOfMemoryError):
        return "out of memory"
    line = next((part for part in str(reason).strip().splitlines() if part.strip()), "")
    words = [word.rsplit("/", 1)[-1] if word.count("/") > 1 else word for word in line.split()]
    known = isinstance(reason, str | Unavailable)
    return " ".join(words if known else [f"{type(reason).__name__}:", *words])[:160]


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median and quantiles by linear interpolation between the ordered samples."""
    return dict(zip(QUANTILES, np.quantile(samples, list(QUANTILES.values())).tolist(), strict=True))


def noise(samples: Sequence[float]) -> float:
    """How far the median may be off, relative to it; 0 for less than four samples, which cannot say.

    The larger of two estimates: by how much the medians of the earlier and the later half differ, and 1.57
    interquartile ranges over the square root of the number of samples, McGill's 95 % interval of a median.
    """
    half = len(samples) // 2
    if half < 2:
        return 0.0
    low, high = sorted(quantiles(part)["median"] for part in (samples[:half], samples[-half:]))
    whole, least = quantiles(samples), 1e-300  # where a profiler saw no kernels, all are 0
    spread = 1.57 * (whole["p75"] - whole["p25"]) / len(samples) ** 0.5
    return max(max(high, least) / max(low, least) - 1, spread / max(whole["median"], least))


def statistics(samples: Sequence[float]) -> dict[str, Any]:
    """The fields of a row that samples determine."""
    return {**quantiles(samples), "n": len(samples), "noise": noise(samples)}


# Checking


def relative_error(got: Results, expected: Results) -> float:
    """Largest, over all named tensors, of the norm of the difference over the norm of what was expected."""
    shapes, wanted = ({name: tuple(t.shape) for name, t in results.items()} for results in (got, expected))
    if shapes != wanted:
        raise ValueError(f"result: expected shapes {wanted}, got {shapes}")
    worst = 0.0
    for name, truth in expected.items():
        exact = truth.detach().double()
        error = float((got[name].detach().to(exact) - exact).norm() / exact.norm().clamp(min=1e-300))
        worst = max(worst, error) if math.isfinite(error) else math.inf
    return worst


def error_bound(baseline: float, dtype: torch.dtype) -> float:
    """Four times the error of PyTorch's own result in the same precision, at least sixteen roundings."""
    return max(4 * baseline, 16 * torch.finfo(dtype).eps)


def baseline_bound(work: Work, expected: Results) -> float:
    """Error bound of a baseline of errors.

    Half of the digits; or, where its code gives the expected result in float64, a tenth: nn.BatchNorm1d on a CPU adds
    up row by row, and over a million float32 rows 0.4 % is what that costs.
    """
    if work.exact is not None:
        return 0.1 if relative_error(work.exact(), expected) <= EXACT else 0.0
    tf32 = work.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return (2.0**-10 if tf32 else torch.finfo(work.dtype).eps) ** 0.5


# Clocks


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def sample(run: Callable[[], Any], calls: int, device: str) -> float:
    """Seconds of one call, from `calls` of them between two synchronisations."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / calls


def calls_for(run: Callable[[], Any], settings: Settings) -> int:
    """How many calls make a sample long enough to time; warms up on the way."""
    run()
    seconds = min(sample(run, 1, settings.device) for _ in range(2))
    return max(1, min(10_000, round(settings.sample_seconds / max(seconds, 1e-9))))


def capture(run: Callable[[], Any], reason: str = "") -> Callable[[], Any]:
    """The replay of a CUDA graph of `run`; raises `Unavailable` where it cannot be captured, or for a known reason."""
    if reason:
        raise Unavailable(reason)
    current = torch.cuda.current_stream()
    try:
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph):
            run()
        cuda_graph.replay()
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError) as error:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        raise Unavailable(f"cannot be captured: {why(str(error))}") from None
    return cuda_graph.replay


def kernel_launches(run: Callable[[], Any], calls: int) -> list[tuple[str, float]]:
    """Name and device seconds of every kernel that `calls` calls start, in the order in which they ran. CUDA only."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    return device_launches(profiler.events())


def device_launches(events: Any) -> list[tuple[str, float]]:
    """Name and seconds of what ran on the device, in order, of a profiler's events; annotations are no kernels."""
    found = [e for e in events if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)]
    found.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() * 1e-6) for event in found]


def kernel_seconds(run: Callable[[], Any], calls: int = 5) -> float:
    """Seconds that kernels are running in a call, the mean of some."""
    return sum(seconds for _, seconds in kernel_launches(run, calls)) / calls


def operators(run: Callable[[], Any]) -> int:
    """Operators that a call hands to the CPU, those inside other operators not counted."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = [event.name for event in profiler.events() or [] if not event.cpu_children]
    return sum(not name.startswith(("autograd::", "[memory]", "ProfilerStep")) for name in names)


def peak_bytes(work: Work, device: str) -> float:
    """Bytes that a call holds at its worst moment, above those held before it."""
    work.run()
    gc.collect()
    if device.startswith("cuda"):
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work.run()
        synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    for p in work.parameters:  # released here: the profiler warns of what it sees go but did not see come
        p.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work.run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = accumulate(event.nbytes() for event in sorted(events, key=lambda e: e.start_ns()))
    return float(max(live, default=0))


# Comparing


@dataclass
class _Entry:
    """A competitor that passed its check: what is timed and its samples, by metric."""

    provider: str
    work: Work
    calls: int
    checked: dict[str, Any]
    positions: int
    timed: dict[str, Callable[[], Any]]
    samples: dict[str, list[float]]


def compare(
    competitors: Iterable[Competitor],
    expected: Results,
    point: Row,
    settings: Settings,
    *,
    positions: int = 0,
    baseline: str | None = None,
    memory: bool = True,
) -> list[Row]:
    """Check, then time competitors against each other.

    Args:
        competitors: the first that can run of each group is the baseline of that group's errors.
        expected: results in float64.
        point: where in the study this stands.
        settings: how long to measure.
        positions: that one run handles; gives rows of positions per second.
        baseline: provider that the others' speed-ups refer to; without a correct baseline there are none.
        memory: whether to measure the peak.

    Returns:
        Rows of metrics "seconds", "positions_per_second", "speedup", "peak_bytes", "bytes_per_position", on CUDA
        "graph_seconds" and "kernel_seconds" too. A competitor that is wrong, or cannot run, has one row of metric
        "seconds" without numbers.
    """
    rows: list[Row] = []  # of those that cannot be timed
    entries: list[_Entry] = []
    errors: dict[str, float] = {}
    for provider, make in competitors:
        try:
            if time.monotonic() > settings.deadline:
                raise Unavailable(TIME_UP)
            work = make()
            truth = expected if work.expected is None else work.expected
            error = relative_error(work.result(), truth)
            known = work.group in errors
            bound = error_bound(errors[work.group], work.dtype) if known else baseline_bound(work, truth)
        except ValueError as reason:
            rows.append(point.row(provider, status="wrong", note=why(str(reason))))
            continue
        except Exception as reason:  # a peer may fail in any way; the others are still to be measured
            rows.append(point.absent(provider, reason))
            continue
        checked: dict[str, Any] = {"error": error, "bound": bound}
        if error > bound:
            rows.append(point.row(provider, status="wrong", note="differs from the float64 result", **checked))
            continue
        errors.setdefault(work.group, error)
        calls, timed = calls_for(work.run, settings), {"seconds": work.run}
        if settings.cuda:
            try:
                timed["graph_seconds"] = capture(work.run, work.no_capture)
            except Unavailable as reason:
                rows.append(point.absent(provider, reason, "graph_seconds"))
        handled = work.positions or positions
        entries.append(_Entry(provider, work, calls, checked, handled, timed, {metric: [] for metric in timed}))

    order = random.Random(0)
    for _ in rounds(settings):
        for entry in order.sample(entries, len(entries)):
            for metric, run in entry.timed.items():
                entry.samples[metric].append(sample(run, entry.calls, settings.device))

    base = next((entry for entry in entries if entry.provider == baseline), None)
    return [row for entry in entries for row in _rows(entry, base, point, settings, memory)] + rows


def rounds(settings: Settings) -> Iterator[int]:
    """Count the rounds, until there are enough or the time is up."""
    started = time.perf_counter()
    for i in range(settings.rounds):
        if i >= settings.least_rounds and time.perf_counter() - started > settings.seconds:
            return
        yield i


def _rows(entry: _Entry, base: _Entry | None, point: Row, settings: Settings, memory: bool) -> Iterator[Row]:
    row: Callable[..., Row] = partial(point.row, entry.provider, **entry.checked)
    found = {metric: statistics(samples) for metric, samples in entry.samples.items()}
    for metric, numbers in found.items():
        yield row(metric, "s", **numbers)
    if entry.positions:
        seconds, turned = found["seconds"], zip(QUANTILES, reversed(QUANTILES), strict=True)  # the fastest is shortest
        yield row("positions_per_second", "1/s", **seconds | {q: entry.positions / seconds[p] for q, p in turned})
    if base is not None and entry is not base:
        yield row("speedup", "x", **speedup(entry, base), note=f"over {base.provider}")
    if settings.cuda:
        yield row("kernel_seconds", "s", median=kernel_seconds(entry.work.run))
    if memory and entry.work.unseen:
        yield point.absent(entry.provider, entry.work.unseen, "peak_bytes")
    elif memory:
        peak = peak_bytes(entry.work, settings.device)
        yield row("peak_bytes", "B", median=peak)
        if entry.positions:
            yield row("bytes_per_position", "B", median=peak / entry.positions)


def speedup(entry: _Entry, base: _Entry) -> dict[str, Any]:
    """The ratio of the two rates, with the quantiles of the ratios within rounds, widened where they do not hold it.

    How far the median of those ratios is from the ratio counts as noise.
    """
    scale = (entry.positions or 1) / (base.positions or 1)
    slow, fast = base.samples["seconds"], entry.samples["seconds"]
    found = statistics([scale * b / e for b, e in zip(slow, fast, strict=True)])
    ratio = scale * quantiles(slow)["median"] / quantiles(fast)["median"]
    apart = max(ratio, found["median"]) / min(ratio, found["median"]) - 1
    found |= {q: (min if share < 0.5 else max)(found[q], ratio) for q, share in QUANTILES.items()}
    return found | {"median": ratio, "noise": max(found["noise"], apart)}


# The same numeric flags for everybody

PRECISIONS = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}


@contextmanager
def numeric_flags(precision: str = "float32") -> Iterator[torch.dtype]:
    """Set the precision of everything that runs inside; yields the dtype."""
    (dtype, matmul), cudnn = PRECISIONS[precision], torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32 = matmul == "high"
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]


def flags() -> dict[str, Any]:
    """The numeric flags as they are now, for the record."""
    cudnn = ("allow_tf32", "benchmark", "deterministic")
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{f"cudnn.{name}": getattr(torch.backends.cudnn, name) for name in cudnn},
        "threads": torch.get_num_threads(),
    }
