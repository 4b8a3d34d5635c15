"""Tier "reference": steps by autograd, of the post's windowed networks and of the convolution."""

from __future__ import annotations

import copy
import math
from functools import cached_property

import torch
from torch import Tensor

from convwave import reference
from convwave.convert import from_windowed, to_windowed
from convwave.data.graph import Graph, distinct_graph, select_windows
from convwave.data.packing import Packed, Vocabulary
from convwave.nn import ConvWave
from convwave.ops import functional
from convwave.train.config import Config
from convwave.train.optim import make_optimizers
from convwave.train.recipes import PUBLISHED
from convwave.train.setup import (
    convolution,
    network_state,
    observe,
    prefixed,
    ready,
    restore_network,
    windowed_network,
    without_prefix,
)
from convwave.train.tiers import Run, Watch


def begin(config: Config, train: Packed, vocabulary: Vocabulary) -> Run:
    """The run of a configuration, before its first step."""
    kind = WindowedRun if config.model in PUBLISHED else ConvolutionRun
    return kind(config, train, vocabulary)


class WindowedRun(Run):
    """The post's own loop: random windows, the from-scratch network, plain SGD."""

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        self.config, self._train = config, train
        self.windows = reference.build_windows(train, math.prod(config.factors))
        self.windows = reference.Windows(*(t.to(config.device) for t in self.windows))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.mlp = windowed_network(config, len(vocabulary), self.generator).to(config.device)
        self.positions = config.batch

    def step(self, i: int, watch: Watch | None = None) -> float:
        ix = torch.randint(0, len(self.windows.targets), (self.config.batch,), generator=self.generator, device="cpu")
        ix = ix.to(self.windows.targets.device)
        lr = self.config.recipe.lr * self.config.rate(i)
        if watch is not None:
            graph = select_windows(self._everything, ix, self.windows.targets[ix])
            observe(self.model(), graph, watch)
        return reference.sgd_step(self.mlp, self.windows.inputs[ix], self.windows.targets[ix], lr)

    @cached_property
    def _everything(self) -> Graph:
        return distinct_graph(self._train, factors=self.config.factors).to(self.config.device)

    def finish(self) -> ConvWave:
        return self.model().eval()

    def model(self) -> ConvWave:
        return from_windowed(self.mlp)

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), **prefixed("model", self.model().state_dict())}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.begin_with(without_prefix("model", state))
        self.generator.set_state(state["generator"])

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        model = self.model()
        model.load_state_dict(weights)
        self.mlp = to_windowed(model).to(self.config.device)


class ConvolutionRun(Run):
    """The convolution, on whole names, on contexts, on the text, or on the post's random windows fed as counts."""

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        self.config = config
        self.net, self.reader = convolution(config, train, vocabulary)
        self.optimizers = make_optimizers(config.recipe, self.net)
        self.positions = config.batch

    def step(self, i: int, watch: Watch | None = None) -> float:
        graph = self.reader.graph(i)
        self.positions = self.reader.count(graph.num_rows, graph.totals[-1])
        rate = self.config.rate(i)
        if watch is not None:
            observe(self.net, graph, watch)
        loss = functional.loss(self.net(graph), graph)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * rate
            optimizer.step()
        return loss.item()

    def finish(self) -> ConvWave:
        return ready(copy.deepcopy(self.net), self.reader)

    def model(self) -> ConvWave:
        return self.net

    def state(self) -> dict[str, Tensor]:
        return network_state(self.net, self.reader, self.optimizers)

    def restore(self, state: dict[str, Tensor]) -> None:
        restore_network(state, self.net, self.reader, self.optimizers)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        self.net.load_state_dict(weights)
