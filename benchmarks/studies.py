"""The studies of `convwave bench`: what is compared with what, at which sizes.

A study is a list of steps, the most telling first. The driver runs one after the other, writes the file after each, and
where the time is up it records the rest as not measured.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

import convwave as cw
from benchmarks import breakeven as prediction
from benchmarks import ladder as rungs
from benchmarks import roofline as limits
from benchmarks.competitors import MAX_AUTOTUNE, Network, Stack, compiled
from benchmarks.harness import (
    Competitor,
    Point,
    Row,
    Settings,
    Unavailable,
    Work,
    absent,
    compare,
    kernel_launches,
    numeric_flags,
    operators,
    statistics,
)


@dataclass(frozen=True)
class Plan:
    """What a study is run with.

    Attributes:
        words: of the vocabulary and the batches.
        device: "cpu", "cuda", ...
        quick: small sizes, few samples, nothing compiled.
        settings: how long each comparison may take.
    """

    words: Sequence[str]
    device: str = "cpu"
    quick: bool = False
    settings: Settings = field(default_factory=Settings)

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @functools.cached_property
    def vocabulary(self) -> cw.Vocabulary:
        return cw.Vocabulary.from_words(self.words)

    def names(self, count: int) -> cw.Packed:
        """The first names of the post's shuffle, packed."""
        return cw.pack(cw.split_words(list(self.words)).train[:count], self.vocabulary)

    def document(self, positions: int) -> cw.Packed:
        """One text of so many positions: the letters of name after name."""
        text = "".join(self.words)
        while len(text) < positions:
            text += text
        return cw.pack([text[: positions - 1]], self.vocabulary)

    def network(self, n_embd: int = 10, n_hidden: int = 68, levels: int = 3) -> cw.ConvWave:
        """A network with the biased variance, which nn.BatchNorm1d shares; its statistics are those of some names."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = cw.ConvWave(len(self.vocabulary), n_embd, n_hidden, levels, unbiased=False, backend="eager")
        with torch.no_grad():
            for _ in range(8):
                model.train()(cw.distinct_graph(self.names(200), levels))
        return model


class Step(NamedTuple):
    """A part of a study that is measured, and written, at one go."""

    point: Point
    measure: Callable[[], list[Row]]


class Figure(NamedTuple):
    """A picture of a study: one metric of one mode; lines over x, or bars where there is no x to speak of."""

    title: str
    metric: str
    mode: str
    label: str
    kind: str = "lines"


class Study(NamedTuple):
    """A named study: the question that it answers, its steps, its pictures."""

    name: str
    question: str
    steps: Callable[[Plan], list[Step]]
    figures: tuple[Figure, ...]


MODES = {"train": True, "eval": False}


# ---------------------------------------------------------------------------------------------------------------------
# names, context, train: the network


def names(plan: Plan) -> list[Step]:
    """The post's size, every way to evaluate it."""
    steps = []
    for count in (128,) if plan.quick else (512, 4096):
        for mode, training in MODES.items():
            point = Point("names", mode, "names", count, plan.device)
            with_compiled = not plan.quick and count == 512
            steps.append(Step(point, functools.partial(_names, plan, point, count, training, with_compiled)))
    return steps


def _names(plan: Plan, point: Point, count: int, training: bool, with_compiled: bool) -> list[Row]:
    task = Network(plan.names(count), plan.network(), training, plan.device)
    competitors = [
        task.windowed(),
        task.reference(),
        task.convolution("windowed", "windowed graph"),
        task.convolution("dense"),
        task.convolution("distinct"),
        task.padded_conv1d("Conv1d, padded names"),
    ]
    if plan.cuda:
        competitors += [task.convolution(kind, f"{kind}, triton", backend="triton") for kind in ("dense", "distinct")]
    if with_compiled:
        competitors += [
            task.windowed("windowed MLP, compiled", compile=True),
            task.convolution("dense", "dense, compiled", compile=True),
            task.padded_conv1d("Conv1d, padded names, compiled", compile=True),
        ]
        if plan.cuda:
            competitors.append(task.windowed("windowed MLP, max-autotune", MAX_AUTOTUNE, compile=True))
    return _network_rows(task, competitors, point, plan.settings)


def context(plan: Plan) -> list[Step]:
    """Width 128, contexts from 8 tokens: windows against the convolution, with the ratio of their FLOP beside."""
    levels: tuple[int, ...] = (10, 3, 6, 8, 4, 5, 7, 9, 11, 12)
    positions, nodes = 4096, 2**21 if plan.cuda else 2**18
    if plan.quick:
        levels, positions, nodes = (3, 5, 7), 256, 2**12
    steps = []
    for level in levels:
        for mode, training in MODES.items():
            point = Point("context", mode, "context", 2**level, plan.device)
            windows = min(positions, nodes // 2**level)
            measure = functools.partial(_context, plan, point, level, positions, windows, training)
            steps.append(Step(point, measure))
    return steps


def _context(plan: Plan, point: Point, levels: int, positions: int, windows: int, training: bool) -> list[Row]:
    """The convolution over one long text; the windowed MLP over as many of its last windows as have so many nodes."""
    width = 32 if plan.quick else 128
    task = Network(plan.document(positions), plan.network(width, width, levels), training, plan.device, windows)
    competitors = [task.windowed(), task.convolution("dense")]
    if plan.cuda:
        competitors.append(task.convolution("dense", "dense, triton", backend="triton"))
    rows = _network_rows(task, competitors, point, plan.settings)
    note = f"{positions} positions, {windows} windows, width {width}"
    ratio = {"median": (2**levels - 1) / levels, "n": 1, "note": f"(2^{levels} - 1) / {levels}"}
    return [replace(row, note=row.note or note) for row in rows] + [point.row("FLOP ratio", "speedup", "x", **ratio)]


def train(plan: Plan) -> list[Step]:
    """Loss, gradients and an SGD step by batch size, building the batch's graph included where it changes."""
    steps = []
    for count in (32, 128) if plan.quick else (512, 32, 2048, 128, 8192):
        point = Point("train", "step", "names", count, plan.device)
        steps.append(Step(point, functools.partial(_train, plan, point, count)))
    return steps


def _train(plan: Plan, point: Point, count: int) -> list[Row]:
    task = Network(plan.names(count), plan.network(), True, plan.device)
    competitors = [
        task.windowed(),
        task.convolution("dense"),
        task.convolution("distinct"),
        task.convolution("distinct", "distinct, graph built each step", rebuilt=True),
    ]
    if plan.cuda:
        competitors += [task.convolution(kind, f"{kind}, triton", backend="triton") for kind in ("dense", "distinct")]
    return _network_rows(task, [_with_sgd(c) for c in competitors], point, plan.settings)


def _with_sgd(competitor: Competitor) -> Competitor:
    """The same with an update of all weights after the gradients; the rate is 0, so that every call does the same."""

    def make() -> Work:
        work = competitor.make()
        optimizer = torch.optim.SGD(work.parameters, lr=0.0)

        def step() -> None:
            work.run()
            optimizer.step()

        return work._replace(run=step)

    return replace(competitor, make=make)


def _network_rows(task: Network, competitors: list[Competitor], point: Point, settings: Settings) -> list[Row]:
    with numeric_flags():
        return compare(competitors, task.expected(), point, settings, positions=task.positions, baseline="windowed MLP")


# ---------------------------------------------------------------------------------------------------------------------
# width: the stack, beside what one would write with torch.nn


def width(plan: Plan) -> list[Step]:
    """Three levels on sequences of one length: widths and precisions."""
    widths = (16, 32) if plan.quick else (128, 64, 256, 512, 1024)
    precisions = ("float32", "tf32", "bfloat16", "float16") if plan.cuda else ("float32", "bfloat16", "float64")
    steps = []
    for channels in widths:
        for precision in precisions[:1] if plan.quick else precisions:
            for mode, training in MODES.items():
                point = Point("width", f"{mode}, {precision}", "channels", channels, plan.device)
                steps.append(Step(point, functools.partial(_width, plan, point, channels, precision, training)))
    for precision in ("float32", "bfloat16") if plan.cuda and not plan.quick else ():
        for mode, training in MODES.items():
            point = Point("width", f"{mode}, {precision}, {MAX_AUTOTUNE}", "channels", 128, plan.device)
            steps.append(Step(point, functools.partial(_tuned, plan, point, 128, precision, training)))
    return steps


def _stack(plan: Plan, channels: int, dtype: torch.dtype, training: bool) -> Stack:
    batch, length = (64, 1024) if plan.cuda else (4, 64) if plan.quick else (8, 128)
    return Stack(batch, length, channels, 3, dtype, training, plan.device)


def _width(plan: Plan, point: Point, channels: int, precision: str, training: bool) -> list[Row]:
    with numeric_flags(precision) as dtype:
        task = _stack(plan, channels, dtype, training)
        competitors = [task.matmul(), task.conv1d(), task.convwave("convwave, eager"), task.pytorch_tcn()]
        if plan.cuda:
            competitors.append(task.convwave("convwave, triton", backend="triton"))
            if precision == "float32":
                competitors.append(task.convwave("convwave, triton, ieee", backend="triton", precision="ieee"))
            competitors.append(_deterministic(task.conv1d("Conv1d + BatchNorm1d + tanh, deterministic")))
        if not plan.quick and channels == 128 and precision in (("float32", "bfloat16") if plan.cuda else ("float32",)):
            competitors += [
                task.matmul("two shifted matmuls, compiled", compile=True),
                task.conv1d("Conv1d + BatchNorm1d + tanh, compiled", compile=True),
            ]
        return _stack_rows(task, competitors, point, plan.settings)


def _tuned(plan: Plan, point: Point, channels: int, precision: str, training: bool) -> list[Row]:
    """Beside what takes a minute to compile, so last."""
    with numeric_flags(precision) as dtype:
        task = _stack(plan, channels, dtype, training)
        competitors = [
            task.matmul(),
            task.convwave("convwave, triton", backend="triton"),
            task.matmul(f"two shifted matmuls, {MAX_AUTOTUNE}", compile=True, mode=MAX_AUTOTUNE),
            task.conv1d(f"Conv1d + BatchNorm1d + tanh, {MAX_AUTOTUNE}", compile=True, mode=MAX_AUTOTUNE),
        ]
        return _stack_rows(task, competitors, point, plan.settings)


def _stack_rows(task: Stack, competitors: list[Competitor], point: Point, settings: Settings) -> list[Row]:
    baseline = "two shifted matmuls"
    return compare(competitors, task.expected(), point, settings, positions=task.positions, baseline=baseline)


def _deterministic(competitor: Competitor) -> Competitor:
    """The same with cudnn's deterministic algorithms."""

    def make() -> Work:
        work = competitor.make()

        def run() -> None:
            before = torch.backends.cudnn.deterministic
            torch.backends.cudnn.deterministic = True
            try:
                work.run()
            finally:
                torch.backends.cudnn.deterministic = before

        return work._replace(run=run)

    return replace(competitor, make=make)


# ---------------------------------------------------------------------------------------------------------------------
# sample: generation


CHARACTERS = 16  # that every sequence reads and continues


def sample(plan: Plan) -> list[Step]:
    """Reading sequences letter by letter, each time asking what comes next."""
    steps = []
    for batch in (1, 32) if plan.quick else (1024, 1, 32, 8192):
        point = Point("sample", "eval", "sequences", batch, plan.device)
        steps.append(Step(point, functools.partial(_sample, plan, point, batch)))
    return steps


def generation(plan: Plan, batch: int) -> tuple[list[Competitor], dict[str, Tensor]]:
    """Who reads `batch` sequences, and the logits that they must arrive at."""
    model = plan.network().eval()
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(1, len(plan.vocabulary), (batch, CHARACTERS), generator=generator)
    letters[:, 0] = 0
    packed = cw.pack_ids(letters[:, 1:].tolist())
    exact = Network(packed, model, False, plan.device).expected()["logits"]
    tokens = letters.to(plan.device)
    competitors = [
        Competitor("windowed MLP", lambda: _windowed_reader(model, tokens, False)),
        Competitor("dense, no cache", lambda: _dense_reader(model, tokens)),
        Competitor("cached", lambda: _cached_reader(model, tokens)),
        Competitor("windowed MLP, compiled", lambda: _windowed_reader(model, tokens, True)),
    ]
    return competitors, {"logits": exact.view(batch, CHARACTERS, -1)[:, -1]}


def _sample(plan: Plan, point: Point, batch: int) -> list[Row]:
    competitors, expected = generation(plan, batch)
    if plan.quick or batch not in (1, 1024):
        competitors.pop()
    with numeric_flags():
        positions = batch * CHARACTERS
        return compare(competitors, expected, point, plan.settings, positions=positions, baseline="windowed MLP")


def _reader(run: Callable[[], Tensor]) -> Work:
    """Work whose result are the logits after the last letter."""
    inference = torch.no_grad()(run)
    return Work(inference, lambda: {"logits": inference()})


def _windowed_reader(model: cw.ConvWave, tokens: Tensor, compile: bool) -> Work:
    mlp = cw.to_torch(model).to(tokens.device).eval()
    call = compiled(mlp) if compile else mlp
    padded = torch.nn.functional.pad(tokens, (model.context - 1, 0))

    def read() -> Tensor:
        for t in range(tokens.shape[1]):
            logits = call(padded[:, t : t + model.context])
        return logits

    return _reader(read)


def _cached_reader(model: cw.ConvWave, tokens: Tensor) -> Work:
    model = copy.deepcopy(model).to(tokens.device)
    columns = list(tokens.T)

    def read() -> Tensor:
        cache = cw.GenerationCache(model, tokens.shape[0])
        for column in columns:
            logits = cache.step(column)
        return logits

    return _reader(read)


def _dense_reader(model: cw.ConvWave, tokens: Tensor) -> Work:
    """All that was read so far, again for every letter."""
    model = copy.deepcopy(model).to(tokens.device)
    graphs = []
    for t in range(tokens.shape[1]):
        packed = cw.pack_ids(tokens[:, 1 : t + 1].tolist())
        graphs.append(cw.dense_graph(packed, factors=model.factors).to(tokens.device))

    def read() -> Tensor:
        for graph in graphs:
            logits = model(graph)
        return logits.view(*tokens.shape, -1)[:, -1]

    return _reader(read)


# ---------------------------------------------------------------------------------------------------------------------
# roofline, ladder, launches


def roofline(plan: Plan) -> list[Step]:
    """Every kernel as a fraction of what the hardware allows, with the ceilings measured among the kernels."""
    precisions = ("float32", "tf32", "bfloat16") if plan.cuda else ("float32",)
    steps = []
    for precision in precisions:
        for channels in (32,) if plan.quick else (128, 512):
            point = Point("roofline", precision, "channels", channels, plan.device)
            steps.append(Step(point, functools.partial(_roofline, plan, point, channels, precision)))
    return steps


def _roofline(plan: Plan, point: Point, channels: int, precision: str) -> list[Row]:
    batch, length = (128, 1024) if plan.cuda else (8, 64) if plan.quick else (64, 512)
    size, megabytes = (8192, 1024) if plan.cuda else (256, 16) if plan.quick else (1024, 256)
    with numeric_flags(precision) as dtype:
        itemsize = torch.finfo(dtype).bits // 8
        shape = (batch * length, channels, channels, 2, itemsize)
        copying, moved = limits.copy_work(plan.device, megabytes)
        multiplying, flop = limits.product_work(plan.device, size, dtype)
        train, evaluate = (Stack(batch, length, channels, 1, dtype, mode, plan.device) for mode in (True, False))
        backends = ["eager", "triton"] if plan.cuda else ["eager"]
        items: dict[str, tuple[Competitor, limits.Cost, Stack]] = {}
        for backend in backends:
            training, evaluating = (s.convwave(f"level, {m}, {backend}", backend) for s, m in _modes(train, evaluate))
            items[training.provider] = training, limits.level_train(*shape), train
            items[evaluating.provider] = evaluating, limits.level_eval(*shape), evaluate
        matmul = evaluate.matmul("level, eval, two shifted matmuls")
        items[matmul.provider] = matmul, limits.level_eval(*shape), evaluate
        ceilings = [_ceiling("copy", copying), _ceiling("product", multiplying)]
        competitors = [replace(c, expected=task.expected(), group=c.provider) for c, _, task in items.values()]
        rows = compare([*ceilings, *competitors], {}, point, plan.settings, memory=False)
        seconds = {row.provider: row.median for row in rows if row.metric == "seconds" and row.median}
        bandwidth, rate = moved / seconds["copy"], flop / seconds["product"]
        rows.append(point.row("copy", "bandwidth", "B/s", median=bandwidth, n=1, note=f"{megabytes} MiB"))
        rows.append(point.row("product", "rate", "FLOP/s", median=rate, n=1, note=f"{size} x {size} x {size}"))
        for provider, (_, cost, _) in items.items():
            if provider in seconds:
                rows += _limits(point, provider, seconds[provider], cost, bandwidth, rate)
        if plan.cuda:
            rows += _kernel_limits(point, train, bandwidth, rate, shape)
        return rows


def _modes(train: Stack, evaluate: Stack) -> list[tuple[Stack, str]]:
    return [(train, "train"), (evaluate, "eval")]


def _ceiling(name: str, run: Callable[[], object]) -> Competitor:
    return Competitor(name, lambda: Work(run, dict), expected={}, group=name)


def _limits(
    point: Point, provider: str, seconds: float, cost: limits.Cost, bandwidth: float, rate: float, note: str = ""
) -> list[Row]:
    limit = cost.limit(bandwidth, rate)
    bound = "bytes" if cost.bytes / bandwidth >= cost.flop / rate else "FLOP"
    return [
        point.row(provider, "bytes", "B", median=cost.bytes, n=1, note="counted"),
        point.row(provider, "flop", "FLOP", median=cost.flop, n=1, note="counted"),
        point.row(provider, "limit_seconds", "s", median=limit, n=1, note=f"set by {bound}"),
        point.row(provider, "fraction", "of limit", median=limit / seconds, n=1, note=note or f"set by {bound}"),
    ]


def _kernel_limits(
    point: Point, task: Stack, bandwidth: float, rate: float, shape: tuple[int, int, int, int, int]
) -> list[Row]:
    """The library's kernels one by one, as the profiler times them within a training step."""
    try:
        launched = kernel_launches(task.convwave("triton", "triton").make().run, 20)
    except Unavailable as reason:
        return [absent(point, "kernels", str(reason))]
    rows = []
    separate = any("conv_weight_kernel" in kernel for kernel, _ in launched)
    for name, cost in limits.kernels(*shape, separate).items():
        launches = [seconds for kernel, seconds in launched if name in kernel]
        if not launches:
            rows.append(absent(point, name, "no kernel of this name ran"))
            continue
        row = point.row(name, "kernel_seconds", "s", **statistics(launches))
        rows += [row, *_limits(point, name, float(row.median or 0), cost, bandwidth, rate, "one launch")]
    return rows


def ladder(plan: Plan) -> list[Step]:
    """The kernels with one idea more at every step; only a GPU can tell."""
    precisions = ("float32", "tf32", "bfloat16")
    steps = []
    for precision in precisions[:1] if plan.quick else precisions:
        for name in rungs.RUNGS:
            point = Point("ladder", f"{name}, {precision}", None, None, plan.device)
            steps.append(Step(point, functools.partial(_ladder, plan, point, name, precision)))
    return steps


def _ladder(plan: Plan, point: Point, name: str, precision: str) -> list[Row]:
    if not plan.cuda:
        return [absent(point, "kernels", "needs a CUDA device")]
    batch, length, channels = (4, 64, 32) if plan.quick else (64, 1024, 128)
    with numeric_flags(precision) as dtype:
        task = Stack(batch, length, channels, 1 if name == "tiles" else 3, dtype, True, plan.device)
        competitors, expected = rungs.RUNGS[name](task)
        return compare(competitors, expected, point, plan.settings, positions=task.positions, baseline="PyTorch")


def launches(plan: Plan) -> list[Step]:
    """Kernels of one step by the profiler; on a CPU, operators."""
    steps = []
    for mode, training in MODES.items():
        point = Point("launches", mode, None, None, plan.device)
        steps.append(Step(point, functools.partial(_launches, plan, point, training)))
    return steps


def _launches(plan: Plan, point: Point, training: bool) -> list[Row]:
    task = Network(plan.names(128), plan.network(), training, plan.device)
    competitors = [task.windowed(), task.convolution("dense"), task.convolution("distinct")]
    if plan.cuda:
        competitors += [
            task.convolution("dense", "dense, compiled", compile=True),
            task.convolution("dense", "dense, triton", backend="triton"),
        ]
    rows = []
    for competitor in competitors:
        try:
            run = competitor.make().run
        except Unavailable as reason:
            rows.append(absent(point, competitor.provider, str(reason), "launches"))
            continue
        count = len(kernel_launches(run, 1)) if plan.cuda else operators(run)
        unit = "kernels" if plan.cuda else "operators"
        rows.append(point.row(competitor.provider, "launches", unit, median=float(count), n=1))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# breakeven: is the winner predictable?


class Scenario(NamedTuple):
    """A training step that the prediction is tried on."""

    name: str
    levels: int
    n_hidden: int
    text: str  # "names", "document" (one long text) or "syllables" (few letters, many repeats)
    size: int  # names, positions or words

    def packed(self, plan: Plan) -> cw.Packed:
        if self.text == "names":
            return plan.names(self.size)
        if self.text == "document":
            return plan.document(self.size)
        generator = torch.Generator().manual_seed(self.size)
        lengths = torch.randint(2, 12, (self.size,), generator=generator).tolist()
        return cw.pack_ids([torch.randint(1, 4, (n,), generator=generator).tolist() for n in lengths])


def _scenarios(quick: bool) -> list[Scenario]:
    sizes = {"names": (32, 2048), "document": (256, 8192), "syllables": (64, 2048)}
    grid = [
        Scenario(f"{text}, {size:,}, context {2**levels}, width {n_hidden}", levels, n_hidden, text, size)
        for text, both in sizes.items()
        for size in both
        for levels in (1, 3, 5)
        for n_hidden in (16, 128)
    ]
    return grid[::9] if quick else grid


def breakeven(plan: Plan) -> list[Step]:
    """Predict which graph wins, then measure how often that is right and what it costs where it is wrong."""
    point = Point("breakeven", "train", "scenario", None, plan.device)
    constants: list[prediction.Constants] = []

    def calibrate() -> list[Row]:
        rows, found = _calibrate(plan, point._replace(mode="calibration"))
        constants.extend(found)
        return rows

    def try_on(scenario: Scenario, here: Point) -> list[Row]:
        if not constants:
            return [absent(here, "prediction", "the constants were not measured", "right")]
        return _scenario(plan, here, scenario, constants[0])

    steps = [Step(point._replace(mode="calibration"), calibrate)]
    scenarios = _scenarios(plan.quick)
    order = torch.randperm(len(scenarios), generator=torch.Generator().manual_seed(0)).tolist()
    for scenario in (scenarios[i] for i in order):  # drawn, so that a run cut short has seen some of each kind
        here = point._replace(x=scenario.name)
        steps.append(Step(here, functools.partial(try_on, scenario, here)))
    return steps


def _calibrate(plan: Plan, point: Point) -> tuple[list[Row], list[prediction.Constants]]:
    """Dense steps of other sizes than the scenarios', from tiny (overhead) to wide (products); none when cut short."""
    shapes = [(64, 16, 2), (64, 16, 4), (4000, 16, 4), (1000, 64, 2), (4000, 64, 3), (1000, 256, 2)]
    rows, works, seconds = [], [], []
    with numeric_flags():
        for positions, n_hidden, levels in shapes[:4] if plan.quick else shapes:
            packed = plan.document(positions)
            task = Network(packed, plan.network(n_hidden=n_hidden, levels=levels), True, plan.device)
            here = point._replace(x=f"{positions:,} positions, context {2**levels}, width {n_hidden}")
            dense = task.convolution("dense")
            found = compare([dense], task.expected(), here, _short(plan), memory=False)
            rows += found
            if found[0].median is None:
                return rows, []
            seconds.append(found[0].median)
            works.append(prediction.work_of([float(positions)] * (levels + 1), 10, n_hidden, len(plan.vocabulary)))
    constants = prediction.fit(works, seconds)
    units = ("s per level", "s per element", "s per FLOP")
    for name, value, unit in zip(constants._fields, constants, units, strict=True):
        rows.append(point.row("prediction", name, unit, median=value, n=len(works)))
    return rows, [constants]


def _scenario(plan: Plan, point: Point, scenario: Scenario, constants: prediction.Constants) -> list[Row]:
    packed = scenario.packed(plan)
    task = Network(packed, plan.network(n_hidden=scenario.n_hidden, levels=scenario.levels), True, plan.device)
    competitors = [task.convolution(kind) for kind in prediction.STRATEGIES]
    with numeric_flags():
        rows = compare(competitors, task.expected(), point, _short(plan), positions=task.positions, memory=False)
    lengths: dict[int, int] = {}
    for length in packed.cu_seqlens.diff().tolist():
        lengths[length] = lengths.get(length, 0) + 1
    letters = prediction.effective_letters(packed)
    predicted = prediction.predict(
        constants, scenario.levels, lengths, letters, 10, scenario.n_hidden, len(plan.vocabulary)
    )
    rows += [point.row(name, "predicted_seconds", "s", median=value, n=1) for name, value in predicted.items()]
    measured = {row.provider: row.median for row in rows if row.metric == "seconds" and row.median}
    if len(measured) < len(prediction.STRATEGIES):
        return [*rows, absent(point, "prediction", "not every strategy was measured", "right")]
    chosen = min(predicted, key=predicted.__getitem__)
    best = min(measured, key=measured.__getitem__)
    regret = measured[chosen] / measured[best] - 1
    note = f"predicted {chosen}, fastest {best}"
    rows.append(point.row("prediction", "right", "", median=float(chosen == best), n=1, note=note))
    rows.append(point.row("prediction", "regret", "of the fastest", median=regret, n=1, note=note))
    return rows


def _short(plan: Plan) -> Settings:
    return replace(plan.settings, seconds=min(plan.settings.seconds, 2.0))


# ---------------------------------------------------------------------------------------------------------------------

RATE = "positions per second"
TIMES = "times faster than PyTorch, eager"
STUDIES = {
    study.name: study
    for study in (
        Study(
            "names",
            "Names at the post's size: which way of evaluating the network is fastest?",
            names,
            (
                Figure("Training step", "positions_per_second", "train", RATE, "bars"),
                Figure("Evaluation", "positions_per_second", "eval", RATE, "bars"),
            ),
        ),
        Study(
            "context",
            "How does the gain of the convolution over windows grow with the context?",
            context,
            (
                Figure("Training: speed-up over the windowed MLP", "speedup", "train", "times faster"),
                Figure("Evaluation: speed-up over the windowed MLP", "speedup", "eval", "times faster"),
                Figure("Training: rate", "positions_per_second", "train", RATE),
                Figure("Training: peak memory", "bytes_per_position", "train", "bytes per position"),
            ),
        ),
        Study(
            "width",
            "Three levels on full sequences: how do widths and precisions compare with torch.nn?",
            width,
            (
                Figure("Training, float32", "positions_per_second", "train, float32", RATE),
                Figure("Evaluation, float32", "positions_per_second", "eval, float32", RATE),
                Figure("Training, bfloat16", "positions_per_second", "train, bfloat16", RATE),
                Figure("Training, float32: peak memory", "peak_bytes", "train, float32", "bytes"),
            ),
        ),
        Study(
            "train",
            "A whole training step, update included: which graph for which batch of names?",
            train,
            (Figure("Training step", "positions_per_second", "step", RATE),),
        ),
        Study(
            "sample",
            "Generation: what does the cache save?",
            sample,
            (Figure("Reading letter by letter", "positions_per_second", "eval", "characters per second"),),
        ),
        Study(
            "roofline",
            "How close to the hardware's limit is each piece of work?",
            roofline,
            (Figure("Fraction of the limit, float32", "fraction", "float32", "limit / time", "bars"),),
        ),
        Study(
            "ladder",
            "What is each idea of the kernels worth?",
            ladder,
            (
                Figure("Forward, training mode, float32", "speedup", "forward, float32", TIMES, "bars"),
                Figure("Backward, float32", "speedup", "backward, float32", TIMES, "bars"),
                Figure("Evaluation, float32", "speedup", "eval, float32", TIMES, "bars"),
                Figure("Tiles of the forward kernel, float32", "speedup", "tiles, float32", TIMES, "bars"),
                Figure("Forward, training mode, bfloat16", "speedup", "forward, bfloat16", TIMES, "bars"),
                Figure("Backward, bfloat16", "speedup", "backward, bfloat16", TIMES, "bars"),
            ),
        ),
        Study(
            "launches",
            "How many kernels does one step start?",
            launches,
            (
                Figure("Training step", "launches", "train", "kernels (CPU: operators)", "bars"),
                Figure("Evaluation", "launches", "eval", "kernels (CPU: operators)", "bars"),
            ),
        ),
        Study(
            "breakeven",
            "Can context, word lengths and width tell beforehand which graph wins?",
            breakeven,
            (Figure("Time lost by the predicted choice", "regret", "train", "of the fastest", "bars"),),
        ),
    )
}
