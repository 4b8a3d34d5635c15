"""Tier "fused": the step of tier "cpu" as compiled loops, see `ops.loops`, with batches cut by loops too.

Parameters, gradients and running means lie in two arrays, one for the convolution matrices (Muon's) and one for all
else (Adam's), in the order of tier "cpu", so that the states of both tiers have the same tensors.

Shapes: L levels, C channels below, H channels, V tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from convwave.data.batches import StepReader
from convwave.data.packing import Packed, Vocabulary
from convwave.nn import ConvWave
from convwave.ops import loops
from convwave.ops.compiled import MOST_ROWS, everything, memory_for, part_of, prepare, room, text_of, threads_of_torch
from convwave.train.config import Config
from convwave.train.optim import ADAM_BETA2
from convwave.train.setup import (
    check_like,
    convolution,
    network_state,
    observe,
    prefixed,
    ready,
    restore_network,
    without_prefix,
)
from convwave.train.tiers import Run, Watch


class Parameters:
    """Parameters, gradients and running means of a network whose levels have two taps and the same width, in float32.

    Args:
        model: its parameters are copied.

    Attributes:
        vectors: (4, n) parameters, gradients, Adam's means and mean squares of all that is no matrix.
        matrices: (3, m) parameters, gradients and Muon's momenta.
        net, grad, means: `loops.Network` views of the first three rows of both.
    """

    def __init__(self, model: ConvWave) -> None:
        widths, norms = set(model.widths), [block.norm for block in model.layers]
        kinds = {(norm.unbiased, norm.eps) for norm in norms}
        plain = set(model.factors) == {2} and len(widths) == 1 and model.statistics == "windows"
        if not plain or len(kinds) != 1 or not norms[0].unbiased or model.embedding.weight.dtype != torch.float32:
            raise ValueError(
                "model: expected float32, two taps at every level, one width, one eps, the unbiased variance and "
                "statistics='windows'"
            )
        self.eps = float(norms[0].eps)
        L, H, E, V = model.levels, model.widths[0], model.n_embd, model.vocab_size
        vectors = [(V, E), (L, 2, H), (V, H), (V,)]
        matrices = [(2, E, H), (L - 1, 2, H, H)]
        self.vectors = np.zeros((4, sum(map(np.prod, vectors))), np.float32)
        self.matrices = np.zeros((3, sum(map(np.prod, matrices))), np.float32)
        self.net, self.grad, self.means = (
            loops.Network(*_views(self.vectors[i], vectors), *_views(self.matrices[i], matrices)) for i in range(3)
        )
        self.load(model)

    def by_level(self, row: int) -> list[Tensor]:
        """A row of `matrices` as (2, C, H) views, one per level."""
        of = (self.net, self.grad, self.means)[row]
        return [torch.from_numpy(matrix) for matrix in (of.first, *of.rest)]

    def named(self, row: int = 0) -> dict[str, Tensor]:
        """Parameters (0) or gradients (1) under their names and in their layouts in the state dict, as views."""
        of = (self.net, self.grad)[row]
        tensors = {"embedding.weight": of.embedding, "head.weight": of.head, "head.bias": of.bias}
        for level, norm in enumerate(of.norms):
            tensors |= {f"blocks.{level}.norm.weight": norm[0], f"blocks.{level}.norm.bias": norm[1]}
        views = {name: torch.from_numpy(array) for name, array in tensors.items()}
        conv = {f"blocks.{i}.conv.weight": matrix.permute(2, 1, 0) for i, matrix in enumerate(self.by_level(row))}
        return views | conv

    @torch.no_grad()
    def load(self, model: ConvWave) -> None:
        """Copy the parameters of another network of the same shape."""
        for name, value in self.named().items():
            value.copy_(model.get_parameter(name))


def _views(flat: loops.Floats, shapes: list[tuple[int, ...]]) -> list[loops.Floats]:
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    return [flat[end - np.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)]


class Parts:
    """What `StepReader.batch` reads, cut by compiled loops.

    Args:
        reader: of any plan.
    """

    def __init__(self, reader: StepReader) -> None:
        self.reader, self.plan, self.vocab_size = reader, reader.plan, reader.vocab_size
        self._levels = len(reader.factors)
        self._whole: loops.Part | None = None
        self._text: loops.Text | None = None
        self._part: loops.Part | None = None

    def text(self) -> tuple[loops.Text, loops.Part]:
        """The whole text, made on first use, and room for any part of it."""
        if self._text is None or self._part is None:
            graph, packed = self.reader.everything, self.reader.packed
            self._text = text_of(graph)
            rows, targets = self._text.taps.shape[1], max(graph.target_ids.numel(), len(packed))
            self._part = room(self._levels, self.vocab_size, rows, targets)
            if self.plan.batch_of == "names":
                assert graph.inverse is not None
                arrays = (graph.inverse.int(), packed.targets.int(), packed.cu_seqlens)
                self._rows, self._targets, self._starts = (array.numpy() for array in arrays)
        return self._text, self._part

    @property
    def whole(self) -> loops.Part:
        """The whole text as a part, made on first use."""
        if self._whole is None:
            self._whole = everything(self.text()[0], self.vocab_size)
        return self._whole

    def __call__(self, i: int) -> loops.Part:
        """The part of step i; the next call may overwrite it."""
        if self.plan.token_noise:
            return part_of(self.reader.graph(i), self.vocab_size)
        contexts = self.plan.batch_of == "contexts"
        if self.reader.reads_all and not contexts:
            return self.whole
        text, part = self.text()
        if contexts:
            positions, probabilities, steps = self.reader.sampler.phases(i)
            loops.take_contexts(text, part, positions.numpy(), probabilities.numpy(), steps)
        else:
            names = self.reader.names(i, self.plan.batch).numpy()
            loops.take_names(text, part, self._rows, self._targets, self._starts, names)
        return part


class FusedRun(Run):
    """The same batches and the same step as `autograd.ConvolutionRun`, in compiled loops."""

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        self.config = config
        self.net, self.reader = convolution(config, train, vocabulary)
        self.weights = Parameters(self.net)
        self.parts = Parts(self.reader)
        self.positions = config.batch
        self._done = 0
        self._work = _work(config.levels, 0, config.n_hidden)
        channels = max(config.n_hidden, config.n_embd)
        self._scratch = np.empty((2, 2 * channels * config.n_hidden), np.float32)

    def prepare(self, message: Callable[[str], None]) -> None:
        weights, one, two = self.weights, np.zeros(1), np.zeros((2, 1, 1), np.float32)
        part = room(self.config.levels, self.reader.vocab_size, 1, 1)
        rows, table, places = np.zeros(1, np.int32), np.zeros((1, 1), np.int32), np.zeros(1, np.int64)
        text = loops.Text(table[None], rows, table, table, table, np.zeros((1, 8), np.uint8))
        steps = loops.Muon(0.1, 0.9, 0.1, 3), loops.Adam(0.1, 0.9, 0.95, 0.1, 1e-8, 1)
        prepare(
            [
                (loops.take_contexts, (text, part, one, one, 1)),
                (loops.take_names, (text, part, rows, rows, places, places)),
                (loops.take_everything, (text, part)),
                (loops.gradients, (weights.net, weights.grad, part, self._work, weights.eps)),
                (loops.update, (weights.net, weights.grad, weights.means, *steps, weights.vectors, self._scratch)),
                (loops.statistics, (weights.net, part, two, two, weights.eps, two[0], two[0])),
                (loops.losses, (weights.net, part, two, two, weights.vectors[0])),
            ],
            message,
        )

    def step(self, i: int, watch: Watch | None = None) -> float:
        if watch is not None:
            drawn = self.reader.generator.get_state()
            observe(self.model(), self.reader.graph(i), watch)
            self.reader.generator.set_state(drawn)  # the step itself reads the same
        recipe, rate, weights = self.config.recipe, self.config.rate(i), self.weights
        part = self.parts(i)
        top, total = int(part.rows[-2]), float(part.totals[-1])
        if total <= 1:
            raise ValueError(f"batch: an unbiased variance needs a total count above 1, got {total:g}")
        self.positions = self.reader.count(top, total)
        most = max(int(part.rows[:-1].max()), self.reader.vocab_size)
        if most > self._work.z.shape[1]:
            self._work = _work(self.config.levels, most + most // 4, self.config.n_hidden)
        self._done += 1
        muon = loops.Muon(recipe.lr * rate, recipe.momentum, recipe.weight_decay, recipe.orthogonal_steps)
        adam = loops.Adam(recipe.adam_lr * rate, recipe.adam_beta, ADAM_BETA2, recipe.weight_decay, 1e-8, self._done)
        with threads_of_torch():
            loss = loops.gradients(weights.net, weights.grad, part, self._work, weights.eps)
            loops.update(weights.net, weights.grad, weights.means, muon, adam, weights.vectors, self._scratch)
        return loss

    @torch.no_grad()
    def model(self) -> ConvWave:
        for name, value in self.weights.named().items():
            self.net.get_parameter(name).copy_(value)
        return self.net

    def finish(self) -> ConvWave:
        net = copy.deepcopy(self.model())
        if max(weights.numel() for weights in self.reader.everything.weights) > MOST_ROWS:
            return ready(net, self.reader)
        part = self.parts.whole
        memory = memory_for(part, self.config.n_hidden, self.reader.vocab_size, loops.CHUNK)
        moments = np.empty((2, self.config.levels, self.config.n_hidden), np.float32)
        with threads_of_torch():
            loops.statistics(self.weights.net, part, *memory, self.weights.eps, *moments)
        for block, mean, var in zip(net.layers, *torch.from_numpy(moments), strict=True):
            block.norm.reset_running_stats()
            block.norm.running_mean.copy_(mean)
            block.norm.running_var.copy_(var)
            block.norm.num_batches_tracked.add_(1)
        return net.eval()

    def _optimizer(self) -> dict[str, Tensor]:
        """The state of Muon and Adam but for the number of steps, as views."""
        _, _, mean, square = torch.from_numpy(self.weights.vectors)
        momenta = {f"momentum.{level}": momentum for level, momentum in enumerate(self.weights.by_level(2))}
        return {"exp_avg": mean, "exp_avg_sq": square, **momenta}

    def state(self) -> dict[str, Tensor]:
        optimizer = {
            "steps": torch.tensor(self._done, device="cpu"),
            **{n: t.clone() for n, t in self._optimizer().items()},
        }
        return network_state(self.model(), self.reader, ()) | prefixed("optimizer", optimizer)

    def restore(self, state: dict[str, Tensor]) -> None:
        restore_network(state, self.net, self.reader, ())
        self.weights.load(self.net)
        optimizer = without_prefix("optimizer", state)
        self._done = int(optimizer["steps"])
        for name, value in self._optimizer().items():
            check_like(name, optimizer[name], value)
            value.copy_(optimizer[name])

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        self.net.load_state_dict(weights)
        self.weights.load(self.net)


def _work(levels: int, rows: int, width: int) -> loops.Work:
    each = (levels, levels, 2, 2)
    return loops.Work(*(np.empty((number, rows, width), np.float32) for number in each))
