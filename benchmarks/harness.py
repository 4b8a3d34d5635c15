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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

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


class Work(NamedTuple):
    """A competitor that is ready: the action that is timed, what it computes, by name, and what it trains."""

    run: Callable[[], Any]
    result: Callable[[], Results]
    parameters: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Competitor:
    """One way to compute something.

    Attributes:
        provider: its name in tables and files.
        make: builds and compiles it; may raise `Unavailable`.
        dtype: of its arithmetic; sets the precision that the check expects.
        positions: that one run handles, when it is another number than its rivals'.
        expected: what it must compute, when that is not what its rivals compute.
        group: competitors of a group share one error bound, derived from its first member, the baseline of errors.
        exact: of a baseline of errors, the result of the same code in float64: proof that its error is rounding alone.
        replays: it replays CUDA graphs by itself, so no other CUDA graph is made of it.
        captures: a CUDA graph can be made of it; one that fails may spoil what is captured after it.
    """

    provider: str
    make: Callable[[], Work]
    dtype: torch.dtype = torch.float32
    positions: int | None = None
    expected: Results | None = None
    group: str = ""
    exact: Callable[[], Results] | None = None
    replays: bool = False
    captures: bool = True


@dataclass(frozen=True)
class Settings:
    """How long to measure.

    Attributes:
        device: "cpu", "cuda", ...
        rounds: samples of every competitor.
        least_rounds: taken even when the time is up; two halves of two samples each need 4.
        seconds: after which no further round begins.
        sample_seconds: calls are repeated within a sample until it lasts this long.
        deadline: on `time.monotonic`'s clock, after which nothing more is built.
    """

    device: str = "cpu"
    rounds: int = 15
    least_rounds: int = 4
    seconds: float = 12.0
    sample_seconds: float = 0.004
    deadline: float | None = None

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Row:
    """One figure. `status` is "ok", "wrong" or "not measured"; only the first has numbers."""

    study: str
    provider: str
    mode: str
    metric: str
    unit: str
    device: str
    x_name: str | None = None
    x: float | str | None = None
    median: float | None = None
    p05: float | None = None
    p25: float | None = None
    p75: float | None = None
    p95: float | None = None
    n: int = 0
    noise: float | None = None
    status: str = "ok"
    error: float | None = None
    bound: float | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Point(NamedTuple):
    """Where in a study a comparison stands: repeated in each of its rows."""

    study: str
    mode: str
    x_name: str | None = None
    x: float | str | None = None
    device: str = "cpu"

    def row(self, provider: str, metric: str, unit: str, **values: Any) -> Row:
        return Row(self.study, provider, self.mode, metric, unit, self.device, self.x_name, self.x, **values)

    def absent(self, provider: str, reason: str, metric: str = "seconds") -> Row:
        """The row of something that was not measured."""
        return self.row(provider, metric, "s", status="not measured", note=reason)


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """Median and quantiles by linear interpolation between the ordered samples."""
    ordered = sorted(samples)

    def at(q: float) -> float:
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {name: at(q) for name, q in QUANTILES.items()}


def noise(samples: Sequence[float]) -> float:
    """How far the median may be off, relative to it; 0 for less than four samples, which cannot say.

    The larger of two estimates: by how much the medians of the earlier and the later half differ, and 1.57
    interquartile ranges over the square root of the number of samples, McGill's 95 % interval of a median.
    """
    half = len(samples) // 2
    if half < 2:
        return 0.0
    first, second = (quantiles(part)["median"] for part in (samples[:half], samples[-half:]))
    apart = max(first, second) / max(min(first, second), 1e-300) - 1
    whole = quantiles(samples)
    return max(apart, 1.57 * (whole["p75"] - whole["p25"]) / len(samples) ** 0.5 / max(whole["median"], 1e-300))


def statistics(samples: Sequence[float]) -> dict[str, Any]:
    """The fields of a row that samples determine."""
    return {**quantiles(samples), "n": len(samples), "noise": noise(samples)}


# ---------------------------------------------------------------------------------------------------------------------
# Checking


def relative_error(got: Results, expected: Results) -> float:
    """Largest, over all named tensors, of the norm of the difference over the norm of what was expected."""
    if got.keys() != expected.keys():
        raise ValueError(f"result: expected {sorted(expected)}, got {sorted(got)}")
    worst = 0.0
    for name, truth in expected.items():
        if got[name].shape != truth.shape:
            raise ValueError(f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got[name].shape)}")
        exact = truth.detach().double()
        error = (got[name].detach().to(exact.device, torch.float64) - exact).norm() / exact.norm().clamp(min=1e-300)
        worst = max(worst, float(error)) if math.isfinite(float(error)) else math.inf
    return worst


def error_bound(baseline: float, dtype: torch.dtype) -> float:
    """Four times the error of PyTorch's own result in the same precision, at least sixteen roundings."""
    return max(4 * baseline, 16 * torch.finfo(dtype).eps)


def baseline_bound(competitor: Competitor, expected: Results) -> float:
    """Error bound of a baseline of errors.

    Half of the digits; or, where its code gives the expected result in float64, a tenth: nn.BatchNorm1d on a CPU adds
    up row by row, and over a million float32 rows 0.4 % is what that costs.
    """
    if competitor.exact is None:
        tf32 = competitor.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
        return (2.0**-10 if tf32 else torch.finfo(competitor.dtype).eps) ** 0.5
    return 0.1 if relative_error(competitor.exact(), expected) <= EXACT else 0.0


# ---------------------------------------------------------------------------------------------------------------------
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


def capture(run: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of a CUDA graph of `run`.

    Raises:
        Unavailable: it cannot be captured.
    """
    current = torch.cuda.current_stream()
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        current.wait_stream(stream)
        torch.cuda.synchronize()
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph):
            run()
        cuda_graph.replay()
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError) as error:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
        raise Unavailable(f"cannot be captured: {first_line(error)}") from None
    return cuda_graph.replay


def kernel_launches(run: Callable[[], Any], calls: int = 5) -> list[tuple[str, float]]:
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


def kernel_seconds(run: Callable[[], Any], calls: int = 5) -> list[float]:
    """Seconds that kernels were running, of each of some calls; their mean where the calls cannot be told apart."""
    return per_call([seconds for _, seconds in kernel_launches(run, calls)], calls)


def per_call(launches: Sequence[float], calls: int) -> list[float]:
    """Sums over the launches of each call, when every call has equally many; else their mean alone."""
    each, rest = divmod(len(launches), calls)
    if rest:
        return [sum(launches) / calls]
    return [sum(launches[i * each : (i + 1) * each]) for i in range(calls)]


def operators(run: Callable[[], Any]) -> int:
    """Operators that a call hands to the CPU, those inside other operators not counted."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = [event.name for event in profiler.events() or [] if not event.cpu_children]
    return sum(not name.startswith(("autograd::", "[memory]", "ProfilerStep")) for name in names)


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Bytes that a call holds at its worst moment, above those held before it."""
    run()
    gc.collect()
    if device.startswith("cuda"):
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warning that gradients of an earlier call are released, which no Python filter reaches."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


@dataclass
class _Entry:
    """A competitor that passed its check."""

    competitor: Competitor
    work: Work
    calls: int
    checked: dict[str, float]
    positions: int
    seconds: list[float] = field(default_factory=list)
    replay: Callable[[], Any] | None = None
    replay_seconds: list[float] = field(default_factory=list)


def compare(
    competitors: Sequence[Competitor],
    expected: Results,
    point: Point,
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
    for competitor in competitors:
        provider = competitor.provider
        try:
            if settings.deadline is not None and time.monotonic() > settings.deadline:
                raise Unavailable(TIME_UP)
            work = competitor.make()
            truth = expected if competitor.expected is None else competitor.expected
            error = relative_error(work.result(), truth)
            if competitor.group in errors:
                bound = error_bound(errors[competitor.group], competitor.dtype)
            else:
                bound = baseline_bound(competitor, truth)
        except Unavailable as reason:
            rows.append(point.absent(provider, str(reason)))
        except torch.OutOfMemoryError:
            rows.append(point.absent(provider, "out of memory"))
        except ValueError as reason:
            rows.append(point.row(provider, "seconds", "s", status="wrong", note=first_line(reason)))
        except Exception as reason:  # a peer may fail in any way; the others are still to be measured
            rows.append(point.absent(provider, f"{type(reason).__name__}: {first_line(reason)}"))
        else:
            checked = {"error": error, "bound": bound}
            if error <= bound:
                errors.setdefault(competitor.group, error)
                calls = calls_for(work.run, settings)
                entries.append(_Entry(competitor, work, calls, checked, competitor.positions or positions))
            else:
                note = "differs from the float64 result"
                rows.append(point.row(provider, "seconds", "s", status="wrong", note=note, **checked))
    for entry in entries if settings.cuda else ():
        try:
            if entry.competitor.replays:
                raise Unavailable("replays CUDA graphs already")
            if not entry.competitor.captures:
                raise Unavailable("copies from the host in every run")
            entry.replay = capture(entry.work.run)
        except Unavailable as reason:
            rows.append(point.absent(entry.competitor.provider, str(reason), "graph_seconds"))

    order = random.Random(0)
    for _ in rounds(settings):
        for entry in order.sample(entries, len(entries)):
            entry.seconds.append(sample(entry.work.run, entry.calls, settings.device))
            if entry.replay is not None:
                entry.replay_seconds.append(sample(entry.replay, entry.calls, settings.device))

    base = next((entry for entry in entries if entry.competitor.provider == baseline), None)
    return [row for entry in entries for row in _rows(entry, base, point, settings, memory)] + rows


def rounds(settings: Settings) -> Iterator[int]:
    """Count the rounds, until there are enough or the time is up."""
    started = time.perf_counter()
    for i in range(settings.rounds):
        if i >= settings.least_rounds and time.perf_counter() - started > settings.seconds:
            return
        yield i


def _rows(entry: _Entry, base: _Entry | None, point: Point, settings: Settings, memory: bool) -> list[Row]:
    rows: list[Row] = []

    def add(metric: str, unit: str, values: Mapping[str, Any], note: str = "") -> None:
        rows.append(point.row(entry.competitor.provider, metric, unit, **values, **entry.checked, note=note))

    seconds = statistics(entry.seconds)
    add("seconds", "s", seconds)
    if entry.positions:
        turned = dict(zip(QUANTILES, reversed(QUANTILES), strict=True))  # the fastest run has the shortest time
        add("positions_per_second", "1/s", seconds | {q: entry.positions / seconds[turned[q]] for q in QUANTILES})
    if base is not None and entry is not base:
        add("speedup", "x", speedup(entry, base), f"over {base.competitor.provider}")
    if entry.replay_seconds:
        add("graph_seconds", "s", statistics(entry.replay_seconds))
    if settings.cuda:
        add("kernel_seconds", "s", statistics(kernel_seconds(entry.work.run)))
    if memory:
        peak = float(peak_bytes(entry.work.run, settings.device))
        add("peak_bytes", "B", statistics([peak]))
        if entry.positions:
            add("bytes_per_position", "B", statistics([peak / entry.positions]))
    return rows


def speedup(entry: _Entry, base: _Entry) -> dict[str, Any]:
    """The ratio of the two rates, with the quantiles of the ratios within rounds, widened where they do not hold it.

    How far the median of those ratios is from the ratio counts as noise.
    """
    scale = (entry.positions or 1) / (base.positions or 1)
    ratios = [scale * b / e for b, e in zip(base.seconds, entry.seconds, strict=True)]
    found = statistics(ratios)
    ratio = scale * quantiles(base.seconds)["median"] / quantiles(entry.seconds)["median"]
    apart = max(ratio, found["median"]) / min(ratio, found["median"]) - 1
    found |= {q: (min if share < 0.5 else max)(found[q], ratio) for q, share in QUANTILES.items()}
    return found | {"median": ratio, "noise": max(found["noise"], apart)}


# ---------------------------------------------------------------------------------------------------------------------
# The same numeric flags for everybody

PRECISIONS = {
    "float64": (torch.float64, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
}


@contextmanager
def numeric_flags(precision: str = "float32", deterministic: bool = False) -> Iterator[torch.dtype]:
    """Set precision and determinism for everything that runs inside; yields the dtype."""
    dtype, matmul = PRECISIONS[precision]
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic
    torch.set_float32_matmul_precision(matmul)
    cudnn.allow_tf32, cudnn.deterministic = matmul == "high", deterministic
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32, cudnn.deterministic = before[1:]


def flags() -> dict[str, Any]:
    """The numeric flags as they are now, for the record."""
    cudnn = ("allow_tf32", "benchmark", "deterministic")
    return {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **{f"cudnn.{name}": getattr(torch.backends.cudnn, name) for name in cudnn},
        "threads": torch.get_num_threads(),
    }


def first_line(error: BaseException | str) -> str:
    """The first line of a message, short enough for a table and without paths of this machine."""
    line = next((part for part in str(error).strip().splitlines() if part.strip()), type(error).__name__)
    words = [word.rsplit("/", 1)[-1] if word.count("/") > 1 else word for word in line.split()]
    return " ".join(words)[:160]
