"""What `loops` reads and writes, as arrays made from graphs; the threads of its BLAS; when it is compiled.

numba, SciPy and threadpoolctl are imported here, so this file is imported inside functions and by tier "fused" only.

Shapes: L levels, M rows of the largest level, H channels, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np
import torch
from numba.core import event
from threadpoolctl import ThreadpoolController

from convwave.data.graph import Graph
from convwave.ops import loops

MOST_ROWS = 2**18  # of a level of a text that `loops` computes at once; beyond, PyTorch does it in blocks

_BLAS = ThreadpoolController()  # of SciPy, which `loops` has loaded


@contextmanager
def threads_of_torch() -> Iterator[None]:
    """Let BLAS use as many threads as torch does: one where a step is little work."""
    with _BLAS.limit(limits=torch.get_num_threads(), user_api="blas"):
        yield


def prepare(calls: list[tuple[Any, tuple[Any, ...]]], message: Callable[[str], None]) -> None:
    """Read compiled functions from numba's files, or compile them, which takes seconds and is announced.

    Args:
        calls: functions of `loops`, each with arguments of the types that it will be called with.
        message: told once, before anything is compiled.
    """

    class Announce(event.Listener):  # type: ignore[misc]
        said = False

        def on_start(self, _: Any) -> None:
            if not self.said:
                message("tier fused: compiling its loops, once on this machine; later runs read them from files")
                self.said = True

        def on_end(self, _: Any) -> None: ...

    with event.install_listener("numba:compile", Announce()):
        for function, arguments in calls:
            function.compile(tuple(numba.typeof(argument) for argument in arguments))


def text_of(graph: Graph) -> loops.Text:
    """A distinct graph of whole numbers of windows, with two taps a level; the rows of its targets ascend."""
    assert graph.target_rows is not None
    L, M = graph.levels, max(weights.numel() for weights in graph.weights)
    taps = np.zeros((L, M, 2), np.int32)
    for level, rows in enumerate((graph.tokens[graph.taps[0]], *graph.taps[1:])):
        taps[level, : rows.shape[1]] = rows.T.numpy()
    targets = torch.stack([graph.target_ids, graph.target_counts.long()], 1)
    return loops.Text(
        taps,
        torch.searchsorted(graph.target_rows, torch.arange(graph.num_rows + 1, device="cpu")).int().numpy(),
        targets.int().numpy(),
        np.empty((L, M), np.int32),
        np.empty((L, M), np.int32),
        np.zeros((L, -(-M // 8) * 8), np.uint8),
    )


def room(levels: int, vocab_size: int, rows: int, targets: int) -> loops.Part:
    """An empty part with memory for that many rows in a level and that many targets."""
    return loops.Part(
        np.zeros(levels + 1, np.int64),
        np.empty((levels, 2, rows), np.int32),
        np.tile(np.array([0, vocab_size]), (levels, 2, 1)),
        np.empty((levels, rows), np.float32),
        np.zeros(levels),
        np.empty(targets, np.int32),
        np.empty(targets, np.int32),
        np.empty(targets, np.float32),
    )


def everything(text: loops.Text, vocab_size: int) -> loops.Part:
    """A whole text as a part."""
    part = room(text.taps.shape[0], vocab_size, text.taps.shape[1], text.targets.shape[0])
    loops.take_everything(text, part)
    return part


def part_of(graph: Graph, vocab_size: int) -> loops.Part:
    """A graph of any kind with two taps a level as a part."""
    part = room(graph.levels, vocab_size, max(w.numel() for w in graph.weights), graph.target_ids.numel())
    below = (vocab_size, *(weights.numel() for weights in graph.weights))
    for level, taps in enumerate((graph.tokens[graph.taps[0]], *graph.taps[1:])):
        n = taps.shape[1]
        part.rows[level], part.totals[level], part.ranges[level, :, 1] = n, graph.totals[level], below[level]
        part.taps[level, :, :n], part.weights[level, :n] = taps.numpy(), graph.weights[level].numpy()
    rows = torch.arange(graph.num_rows, device="cpu") if graph.target_rows is None else graph.target_rows
    rows, order = rows.sort(stable=True)
    part.rows[-1] = rows.numel()
    part.target_rows[:], part.target_ids[:] = rows.numpy(), graph.target_ids[order].numpy()
    part.target_counts[:] = graph.target_counts[order].numpy()
    return part


def memory_for(part: loops.Part, width: int, vocab_size: int, kept: int) -> tuple[loops.Floats, loops.Floats]:
    """Products (2, M, H) of each tap and activations (2, M', H) of two levels for a pass without gradients.

    Args:
        kept: rows of the top level that are in memory at once.
    """
    below = part.rows[:-2].tolist()
    products, h = max([vocab_size, *below]), max([kept, *below])
    return np.empty((2, products, width), np.float32), np.empty((2, h, width), np.float32)
