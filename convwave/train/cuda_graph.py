"""Tier "cuda-graph": the fused kernels and both optimisers, a step as one CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from convwave.data.packing import Packed, Vocabulary
from convwave.nn import ConvWave
from convwave.ops import functional
from convwave.train.config import Config
from convwave.train.optim import make_optimizers
from convwave.train.setup import convolution, network_state, observe, ready, restore_network
from convwave.train.tiers import Run, Watch


class GraphedRun(Run):
    """Forward, backward, both optimisers and the schedule of a step are one CUDA graph.

    The whole text in every step makes all steps alike: the host replays the CUDA graph and reads the losses of a block
    of steps. On a CPU the same step runs without a CUDA graph, for tests.
    """

    block = 50

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        self.config, device = config, torch.device(config.device)
        self.net, self.reader = convolution(config, train, vocabulary)
        self.optimizers = _with_rates_as_tensors(make_optimizers(config.recipe, self.net), device)
        rates = [config.rate(i) for i in range(config.steps)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self._losses = torch.zeros(config.steps, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the step that comes next
        self._next = 0  # the same, as the host knows it
        self._replay: Callable[[], None] | None = None

    def _step(self) -> None:
        """One step, which asks the device for no value."""
        rate = self._rates.index_select(0, self._at).squeeze(0)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"].copy_(group["base_lr"] * rate)
        graph = self.reader.everything
        loss = functional.loss(self.net(graph), graph)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self._losses.index_copy_(0, self._at, loss.detach().unsqueeze(0))
        self._at.add_(1)

    def _captured(self) -> Callable[[], None]:
        """What replays the step."""
        if self._replay is None and not self.config.device.startswith("cuda"):
            self._replay = self._step
        if self._replay is None:
            with torch.cuda.device(self._at.device):
                self._replay = self._capture()
        return self._replay

    def _rehearse(self) -> None:
        """Two steps that leave no trace: kernels are compiled, and what is made on first use is made."""
        before = [tensor.detach().clone() for tensor in self._tensors()]
        for _ in range(2):
            self._at.zero_()
            self._step()
        with torch.no_grad():
            after = self._tensors()
            for tensor, value in zip(after, before, strict=False):
                tensor.copy_(value)
            for tensor in after[len(before) :]:  # of optimisers that had not begun
                tensor.zero_()

    def _capture(self) -> Callable[[], None]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._rehearse()
        torch.cuda.current_stream().wait_stream(side)
        graph, (_, adam) = torch.cuda.CUDAGraph(), self.optimizers
        with torch.cuda.graph(graph):
            for group in adam.param_groups:  # no sooner: torch warns of capturable steps that are not captured
                group["capturable"] = True
            self._step()
        for group in adam.param_groups:
            group["capturable"] = False
        return graph.replay

    def _tensors(self) -> list[Tensor]:
        """All that a step changes; what optimisers keep comes last."""
        kept = [
            value
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            for value in optimizer.state.get(parameter, {}).values()
        ]
        return [self._at, self._losses, *self.net.parameters(), *self.net.buffers(), *kept]

    def steps(self, first: int, stop: int) -> list[float]:
        replay = self._captured()
        if first != self._next:
            self._at.fill_(first)
        for _ in range(first, stop):
            replay()
        self._next, self.positions = stop, self.reader.count(0, self.reader.everything.totals[-1])
        return self._losses[first:stop].tolist()

    def step(self, i: int, watch: Watch | None = None) -> float:
        if watch is not None:
            observe(self.net, self.reader.everything, watch)
        return self.steps(i, i + 1)[0]

    def finish(self) -> ConvWave:
        return ready(copy.deepcopy(self.net), self.reader)

    def model(self) -> ConvWave:
        return self.net

    def state(self) -> dict[str, Tensor]:
        return network_state(self.net, self.reader, self.optimizers)

    def restore(self, state: dict[str, Tensor]) -> None:
        self._replay = None
        restore_network(state, self.net, self.reader, self.optimizers)

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        self._replay = None
        self.net.load_state_dict(weights)


def _with_rates_as_tensors(
    optimizers: list[torch.optim.Optimizer], device: torch.device
) -> list[torch.optim.Optimizer]:
    """Muon and Adam with learning rates that a CUDA graph can change."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
    return optimizers
