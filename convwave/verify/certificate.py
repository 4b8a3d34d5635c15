"""A certificate that the convolution is the windowed network: on this machine, with these weights, on this text.

The windowed network of `reference`, in float64, is the truth. Every other way to evaluate the same weights (windowed,
dense and distinct graphs, cached generation; float64 and float32) is compared with it. Bounds are derived:

- float64: 1e-10 of the largest value, the contract (rounding alone stays below 1e-13 on names);
- float32: four times the error that the windowed network itself makes in float32, against the same truth; on a CUDA
device the fused kernels must meet it too, in every precision that claims float32 accuracy;
- trajectory: 1e-9 after 1,000 steps, over which rounding grows;
- causality: exactly 0.
"""

from __future__ import annotations

import copy
import hashlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convwave import reference
from convwave.convert import to_windowed
from convwave.data.graph import Graph, dense_graph, distinct_graph, select_windows, windowed_graph
from convwave.data.packing import Packed, Splits, Vocabulary, pack, pack_ids
from convwave.infer.generate import GenerationCache
from convwave.nn import ConvWave
from convwave.ops import functional
from convwave.ops.library import available_backends
from convwave.train.loop import threads
from convwave.verify.compare import (
    CONTRACT,
    first_row,
    float32_bound,
    graph_activations,
    largest,
    literal_rows,
    named_pairs,
    per_position,
    relative_error,
    windowed_activations,
    windowed_gradients,
    windowed_logits,
    windowed_step,
    windowed_weights,
)

GRAPHS: dict[str, Callable[..., Graph]] = {
    "windowed": windowed_graph,
    "dense": dense_graph,
    "distinct": distinct_graph,
}
TRAJECTORY = 1e-9
# window tokens evaluated at once, which bounds the memory of the windowed network
MOST_TOKENS = 2**16
# window tokens evaluated in total: names.txt at context 8 has 1.8 million
ALL_TOKENS = 2**22


class Arithmetic(NamedTuple):
    """How a network is evaluated: `ConvWave`'s backend and precision, and the dtype of its parameters."""

    dtype: torch.dtype
    backend: str = "eager"
    precision: str = "auto"

    def __str__(self) -> str:
        short = {torch.float64: "f64", torch.float32: "f32"}[self.dtype]
        return short if self.backend == "eager" else f"{short} kernels {self.precision}"


PLAIN = (Arithmetic(torch.float64), Arithmetic(torch.float32))
KERNELS = tuple(Arithmetic(torch.float32, "triton", precision) for precision in ("ieee", "tf32x3"))


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: of the check: what, mode, graph, precision, network.
        compared: what is compared with what, as text.
        max_abs_error: largest absolute difference.
        relative_error: the same over the largest absolute value of the truth in float64.
        bound: the largest max_abs_error that passes.
        origin: where the bound comes from.
        where: the first failing place, or the worst tensor.
    """

    name: str
    compared: str
    max_abs_error: float
    relative_error: float
    bound: float
    origin: str
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.max_abs_error <= self.bound  # False for NaN

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite error is null."""
        values = {**asdict(self), "passed": self.passed}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def verify(
    model: ConvWave,
    splits: Splits,
    vocabulary: Vocabulary,
    *,
    network: str = "",
    device: torch.device | str = "cpu",
    seed: int = 0,
    trajectory_steps: int = 1000,
    kernels: Sequence[Arithmetic] | None = None,
) -> Iterator[Check]:
    """Run all checks on one network, one after another.

    Args:
        model: not modified.
        splits, vocabulary: the text.
        network: label added to the names of the checks.
        device: where the convolution is evaluated; the truth is computed on the CPU.
        seed: of the random batches.
        trajectory_steps: steps of the post's recipe to follow.
        kernels: how the kernels are asked to compute; None means `KERNELS` on a CUDA device with triton, else nothing.

    Yields:
        Checks, the failed ones included.

    Raises:
        ConversionError: a network that has no windowed counterpart.
    """
    device = torch.device(device)
    if kernels is None:
        kernels = KERNELS if device.type == "cuda" and "triton" in available_backends() else ()
    verifier = _Verifier(model, splits, vocabulary, network, device, seed, [*PLAIN, *kernels])
    yield from verifier.evaluation()
    yield from verifier.training()
    yield from verifier.generation()
    yield from verifier.causality()
    yield from verifier.trajectory(trajectory_steps)


def weights_sha256(model: ConvWave) -> str:
    """SHA-256 over names and bytes of all parameters and running statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Verifier:
    def __init__(
        self,
        model: ConvWave,
        splits: Splits,
        vocabulary: Vocabulary,
        network: str,
        device: torch.device,
        seed: int,
        arithmetics: Sequence[Arithmetic],
    ) -> None:
        self.arithmetics = arithmetics
        self.model, self.splits, self.vocabulary = model, splits, vocabulary
        self.suffix = f" ({network})" if network else ""
        self.device = device
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        words, self.part = self._affordable([*splits.train, *splits.val, *splits.test])
        self.evaluated = pack(words, vocabulary)
        self._truths: dict[torch.dtype, tuple[Tensor, float]] = {}

    # -----------------------------------------------------------------------------------------------------------------
    # Evaluation mode: every position of every split

    def evaluation(self) -> Iterator[Check]:
        packed = self.evaluated
        for arithmetic in self.arithmetics:
            dtype = arithmetic.dtype
            expected, bound = self._truth(dtype)
            model = self._model(arithmetic).eval()
            for kind, make in GRAPHS.items():
                if kind == "distinct":
                    got = self._logits(make(packed, factors=model.factors), model)
                else:
                    got = _in_chunks(packed, model.context, partial(self._logits_of, make, model))
                yield self._check(
                    f"logits, evaluation, {kind}, {arithmetic}",
                    f"{len(packed):,} positions{self.part}, {kind} graph with the windowed network",
                    got,
                    expected,
                    bound,
                    dtype,
                    partial(self._locate, make, packed, model, None),
                )

    def _truth(self, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Logits (N, V) of the windowed network in float64, and the relative bound for `dtype`; computed once."""
        if dtype not in self._truths:
            truth, own = self._references(dtype)
            rounded = dtype != self.model.head.weight.dtype and dtype != torch.float64
            if torch.float64 in self._truths and not rounded:  # the same weights, so the same truth
                expected = self._truths[torch.float64][0]
            else:
                expected = _in_chunks(self.evaluated, self.model.context, partial(windowed_logits, truth.eval()))
            bound = CONTRACT
            if dtype != torch.float64:
                theirs = _in_chunks(self.evaluated, self.model.context, partial(windowed_logits, own.eval()))
                bound = float32_bound(relative_error(theirs, expected))
            self._truths[dtype] = expected, bound
        return self._truths[dtype]

    # -----------------------------------------------------------------------------------------------------------------
    # Training mode: logits, loss, gradients, running statistics

    def training(self) -> Iterator[Check]:
        # real names, some of them twice, a name of one letter and an empty one, and random ones, so that even a text
        # of two words gives a batch whose variances are not close to 0, where float32 would only compare rounding
        # errors
        most = max(2, MOST_TOKENS // self.model.context // 8)
        words = self.random.sample(self.splits.train, min(256, most, len(self.splits.train)))
        packed = pack(
            [*words, *words[:8], self.vocabulary.symbols[-1], "", *self._made(min(64, most))], self.vocabulary
        )
        counts = torch.randint(0, 4, (len(packed),), generator=self.generator, device="cpu")
        counts[:2] += 1
        for arithmetic in self.arithmetics:
            for title, weights in (("once each", None), ("random counts", counts)):
                yield from self._training(arithmetic, packed, title, weights)
            yield from self._statistics(arithmetic, packed)

    def _training(self, arithmetic: Arithmetic, packed: Packed, title: str, counts: Tensor | None) -> Iterator[Check]:
        dtype = arithmetic.dtype
        truth, own = self._references(dtype)
        expected, expected_loss, expected_gradients = windowed_step(truth.train(), packed, counts)
        bounds = dict.fromkeys(("logits", "loss", "gradients"), CONTRACT)
        if dtype != torch.float64:
            theirs, their_loss, their_gradients = windowed_step(own.train(), packed, counts)
            worst = max(relative_error(a, b) for a, b in zip(their_gradients, expected_gradients, strict=True))
            bounds = {
                "logits": float32_bound(relative_error(theirs, expected)),
                "loss": float32_bound(relative_error(their_loss, expected_loss)),
                "gradients": float32_bound(worst),
            }
        rows = literal_rows(len(packed), counts)
        for kind, make in GRAPHS.items():
            model = self._model(arithmetic).train()
            graph = make(packed, factors=model.factors, counts=counts).to(self.device)
            logits = model(graph)
            loss = functional.loss(logits, graph)
            loss.backward()
            got = per_position(logits, graph).detach().cpu()[rows]
            where = f"{kind}, {title}, {arithmetic}"

            text = f"{len(rows):,} windows {title}, {kind} graph with the windowed network"
            locate = partial(self._locate, make, packed, self._model(arithmetic).train(), counts)
            yield self._check(f"logits, training, {where}", text, got, expected, bounds["logits"], dtype, locate)
            yield self._check(
                f"loss, training, {where}", text, loss.detach().cpu(), expected_loss, bounds["loss"], dtype
            )
            yield self._tensors(
                f"gradients, training, {where}",
                f"all {len(expected_gradients)} parameters, {text}",
                named_pairs(model, windowed_gradients(model), expected_gradients),
                bounds["gradients"],
                dtype,
            )

    def _statistics(self, arithmetic: Arithmetic, packed: Packed, steps: int = 5) -> Iterator[Check]:
        """Running mean and variance after several steps of the post's SGD on the whole batch."""
        dtype = arithmetic.dtype

        def run_windowed(mlp: reference.Sequential) -> list[Tensor]:
            windows = reference.build_windows(packed, mlp.block_size)
            for _ in range(steps):
                reference.sgd_step(mlp.train(), windows.inputs, windows.targets, 0.1)
            return [statistic for norm in mlp.norms() for statistic in (norm.running_mean, norm.running_var)]

        truth, own = self._references(dtype)
        expected = run_windowed(truth)
        bound = CONTRACT
        if dtype != torch.float64:
            bound = float32_bound(max(relative_error(a, b) for a, b in zip(run_windowed(own), expected, strict=True)))
        for kind, make in GRAPHS.items():
            model = self._model(arithmetic).train()
            graph = make(packed, factors=model.factors).to(self.device)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(steps):
                optimizer.zero_grad()
                functional.loss(model(graph), graph).backward()
                optimizer.step()
            pairs = {}
            for level, block in enumerate(model.layers):
                for i, name in enumerate(("running_mean", "running_var")):
                    pairs[f"level {level} {name}"] = (getattr(block.norm, name).cpu(), expected[2 * level + i])
            yield self._tensors(
                f"running statistics, {kind}, {arithmetic}",
                f"after {steps} SGD steps on {len(packed):,} windows, {kind} graph with the windowed network",
                pairs,
                bound,
                dtype,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Cached generation

    def generation(self) -> Iterator[Check]:
        """The last words that `evaluation` saw, letter by letter."""
        packed = self.evaluated
        words = torch.arange(max(0, packed.num_words - 4000), packed.num_words, device="cpu")
        first = int(packed.cu_seqlens[words[0]])
        lengths = packed.cu_seqlens.diff()[words]
        columns = torch.arange(int(lengths.max()), device="cpu")
        inside = columns < lengths[:, None]  # (B, T)
        tokens = torch.zeros(inside.shape, dtype=torch.int64, device="cpu")
        tokens[inside] = packed.tokens[first:]
        for arithmetic in PLAIN:  # there are no kernels for the cache
            dtype = arithmetic.dtype
            expected, bound = self._truth(dtype)
            cache = GenerationCache(self._model(arithmetic).eval(), len(words))
            cut = max(1, len(columns) // 3)  # in two calls, as a prefix and a continuation
            placed = tokens.to(self.device)
            got = torch.cat([cache.extend(placed[:, :cut]), cache.extend(placed[:, cut:])], dim=1).cpu()
            yield self._check(
                f"cached generation, {arithmetic}",
                f"{len(packed) - first:,} positions read letter by letter, with the windowed network",
                got[inside],
                expected[first:],
                bound,
                dtype,
                lambda row: _place(packed, first + row, self.vocabulary),
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Causality

    @torch.no_grad()
    def causality(self) -> Iterator[Check]:
        words = self.random.sample(self.splits.train, min(32, len(self.splits.train)))
        ids = [self.vocabulary.encode(word) for word in words]
        V = len(self.vocabulary)
        ids.append([1 + i % (V - 1) for i in range(2 * self.model.context + 5)] if self.model.context <= 64 else [1])
        packed = pack_ids(ids)
        lengths = packed.cu_seqlens.diff()
        offset = torch.arange(len(packed), device="cpu") - torch.repeat_interleave(packed.cu_seqlens[:-1], lengths)
        longest = int(lengths.max())
        steps = range(1, longest)
        model = self._model(Arithmetic(torch.float64)).eval()
        poisoned = copy.deepcopy(model)  # with one extra token, whose embedding is NaN
        row = torch.full((1, model.n_embd), float("nan"), dtype=torch.float64, device=self.device)
        poisoned.embedding = nn.Embedding.from_pretrained(torch.cat([model.embedding.weight, row]))

        for kind, make in GRAPHS.items():
            base = self._logits_of(make, model, packed)
            changed, leaked, lost, first = 0.0, 0, 0, ""
            for t in steps:
                here = offset == t
                if kind != "distinct":  # the same shapes, so the same sums in the same order: equal to the last bit
                    other = torch.where(here, (packed.tokens + 1) % V, packed.tokens)
                    altered = Packed(other, packed.targets, packed.cu_seqlens)
                    got = self._logits_of(make, model, altered)
                    before = offset < t
                    change = float((got - base)[before].abs().max())
                    if not change <= changed:
                        changed = math.inf if math.isnan(change) else change
                        first = first or _place(packed, first_row(got, base, before), self.vocabulary)
                planted = Packed(torch.where(here, V, packed.tokens), packed.targets, packed.cu_seqlens)
                got = self._logits_of(make, poisoned, planted)
                affected = got.isnan().any(1)
                long_enough = torch.repeat_interleave(lengths > t, lengths)
                sees = long_enough & (offset >= t) & (offset < t + model.context)
                if bool((affected & ~sees).any()):
                    leaked += int((affected & ~sees).sum())
                    first = first or _place(packed, int((affected & ~sees).nonzero()[0]), self.vocabulary)
                lost += int((sees & ~affected).sum())
            text = f"{len(ids)} words, {kind} graph, every t in 1 .. {longest - 1}"
            exact = "exact: a position does not see later tokens"
            if kind != "distinct":
                yield Check(
                    f"causality, changed token, {kind}{self.suffix}",
                    f"logits before t when token t changes; {text}",
                    changed,
                    changed / max(float(base.abs().max()), 1e-300),
                    0.0,
                    exact,
                    first,
                )
            yield Check(
                f"causality, planted NaN, {kind}{self.suffix}",
                f"positions outside t .. t + {model.context - 1} of its word that a NaN at t reaches, and positions "
                f"inside that it does not; {text}",
                float(leaked + lost),
                float(leaked + lost),
                0.0,
                exact,
                first,
            )

    # -----------------------------------------------------------------------------------------------------------------
    # A training trajectory

    def trajectory(self, steps: int, batch: int = 32) -> Iterator[Check]:
        """The post's recipe on the same random windows: as windows for the MLP, as counts for the convolution."""
        words, _ = self._affordable(self.splits.train)
        packed = pack(words if len(words) >= 64 else [*words, *self._made(64)], self.vocabulary)
        everything = distinct_graph(packed, factors=self.model.factors)
        windows = reference.build_windows(packed, self.model.context)
        mlp = to_windowed(self._model(Arithmetic(torch.float64)).cpu()).train()
        model = self._model(Arithmetic(torch.float64)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        largest_loss = 0.0
        with threads(1):
            for _ in range(steps):
                drawn = torch.randint(0, len(packed), (batch,), generator=self.generator, device="cpu")
                expected = reference.sgd_step(mlp, windows.inputs[drawn], windows.targets[drawn], 0.1)
                graph = select_windows(everything, drawn, packed.targets[drawn]).to(self.device)
                optimizer.zero_grad()
                loss = functional.loss(model(graph), graph)
                loss.backward()
                optimizer.step()
                largest_loss = max(largest_loss, largest(loss.detach().cpu() - expected))
        pairs = named_pairs(model, windowed_weights(model), mlp.parameters())
        error, where = 0.0, ""
        for name, (got, truth) in pairs.items():
            difference = largest(got.detach().cpu() - truth.detach())
            if difference > error:
                error, where = difference, f"{name}; losses differ by up to {largest_loss:.1e}"
        scale = max(float(truth.detach().abs().max()) for _, truth in pairs.values())
        yield Check(
            f"trajectory, {steps} steps, f64{self.suffix}",
            f"weights after {steps:,} steps of the post's SGD on {batch} random windows, as counts with as windows",
            error,
            error / max(scale, 1e-300),
            TRAJECTORY,
            f"{TRAJECTORY:g} absolute: rounding grows over the steps",
            where,
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Pieces

    def _model(self, arithmetic: Arithmetic) -> ConvWave:
        model = copy.deepcopy(self.model).to(self.device, arithmetic.dtype)
        return model.use(arithmetic.backend, arithmetic.precision)

    def _references(self, dtype: torch.dtype) -> tuple[reference.Sequential, reference.Sequential]:
        """The windowed network of the same weights: in float64, and in `dtype`."""
        rounded = copy.deepcopy(self.model).cpu().to(dtype)
        return to_windowed(copy.deepcopy(rounded).double()), to_windowed(rounded)

    @torch.no_grad()
    def _logits(self, graph: Graph, model: ConvWave) -> Tensor:
        return per_position(model(graph.to(self.device)), graph).cpu()

    def _logits_of(self, make: Callable[..., Graph], model: ConvWave, packed: Packed) -> Tensor:
        return self._logits(make(packed, factors=model.factors), model)

    def _made(self, number: int) -> list[str]:
        """Words of random letters."""
        letters = self.vocabulary.symbols[1:]
        return ["".join(self.random.choices(letters, k=self.random.randint(1, 12))) for _ in range(number)]

    def _affordable(self, words: Sequence[str]) -> tuple[list[str], str]:
        """Words whose windows fit the budget (all, or a random sample), and a note if it is a sample."""
        positions = sum(len(word) + 1 for word in words)
        if positions * self.model.context <= ALL_TOKENS:
            return list(words), ""
        chosen, used = [], 0
        for word in self.random.sample(list(words), len(words)):
            chosen.append(word)
            used += len(word) + 1
            if used * self.model.context > ALL_TOKENS:
                break
        return chosen, f" of {positions:,}"

    def _check(
        self,
        name: str,
        compared: str,
        got: Tensor,
        expected: Tensor,
        bound: float,
        dtype: torch.dtype,
        locate: Callable[[int], str] | None = None,
    ) -> Check:
        scale = float(expected.abs().max())
        difference = (got.double() - expected.double()).abs()
        error = largest(difference)
        where = ""
        if locate is not None and error > bound * scale:
            bad = ~(difference <= bound * scale)
            where = locate(int(bad.flatten(1).any(1).nonzero()[0]))
        relative = relative_error(got, expected)
        return Check(name + self.suffix, compared, error, relative, bound * scale, _origin(dtype, bound), where)

    def _tensors(
        self, name: str, compared: str, pairs: dict[str, tuple[Tensor, Tensor]], bound: float, dtype: torch.dtype
    ) -> Check:
        """Check several tensors; returns the worst, relative to its largest value."""
        worst = None
        for tensor, (got, expected) in pairs.items():
            check = self._check(name, compared, got.detach().cpu(), expected.detach(), bound, dtype)
            if worst is None or check.relative_error > worst.relative_error:
                worst = replace(check, where=f"worst: {tensor}")
        assert worst is not None
        return worst

    def _locate(
        self, make: Callable[..., Graph], packed: Packed, model: ConvWave, counts: Tensor | None, index: int
    ) -> str:
        """Where a compared row first differs from the windowed network: level, node and channel.

        In training mode compared rows are windows, each as often as it counts; otherwise they are positions.
        """
        training, dtype = model.training, model.head.weight.dtype
        rows = literal_rows(len(packed), counts)
        position = int(rows[index])
        if not training:
            rows, index = torch.tensor([position], device="cpu"), 0
        truth, _ = self._references(dtype)
        windows = reference.build_windows(packed, model.context).inputs
        expected = windowed_activations(truth.train(training), windows[rows])
        graph = make(packed, factors=model.factors, counts=counts)
        got = graph_activations(copy.deepcopy(model), graph.to(self.device))
        nodes = torch.tensor([position if graph.inverse is None else int(graph.inverse[position])], device="cpu")
        of_level: list[Tensor] = []
        for taps in reversed(graph.taps):
            of_level.insert(0, nodes)
            nodes = taps[:, nodes].T.flatten()
        tolerance = 1e-9 if dtype == torch.float64 else 1e-3
        place = _place(packed, position, self.vocabulary)
        for level, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
            mine = ours.cpu().double()[of_level[level]]
            bad = ~((mine - theirs.view(len(rows), -1, theirs.shape[-1])[index]).abs() <= tolerance)
            if bool(bad.any()):
                node, channel = bad.nonzero()[0].tolist()
                return f"{place}, level {level}, node {node}, channel {channel}"
        return f"{place}, head"


def _in_chunks(packed: Packed, context: int, evaluate: Callable[[Packed], Tensor]) -> Tensor:
    """(N, V) logits, computed in chunks of words whose windows fit MOST_TOKENS."""
    size = max(1, MOST_TOKENS // context * packed.num_words // len(packed))
    words = torch.arange(packed.num_words, device="cpu")
    return torch.cat([evaluate(packed.select(part)) for part in words.split(size)])


def _origin(dtype: torch.dtype, bound: float) -> str:
    if dtype == torch.float64:
        return f"contract: {CONTRACT:g} relative"
    return f"4 x the windowed network's own float32 error ({bound / 4:.1e} relative)"


def _place(packed: Packed, row: int, vocabulary: Vocabulary) -> str:
    """Name and position of a packed row."""
    word = int(torch.searchsorted(packed.cu_seqlens, row, right=True)) - 1
    start, end = packed.cu_seqlens[word : word + 2].tolist()
    return f"name {vocabulary.decode(packed.tokens[start + 1 : end].tolist())!r}, position {row - start}"
