"""Whole names in one launch against the network in float64: in triton's interpreter, or compiled with CONVWAVE_PTX.

The rule is that of test_kernels.py: against float64, at most four times PyTorch's error in the same precision on the
same inputs, or that of independent roundings of the longest sum's terms.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import convwave as cw
from convwave.ops import library
from convwave.ops import stack as twin
from convwave.ops.level import Level

pytest.importorskip("triton")

from convwave.kernels import configs, score
from convwave.kernels.configs import Launch, interpreting

from tests.test_kernels import (
    DEVICE,
    UNIT,
    RoundedProducts,
    column_by_column,
    every_second,
    in_nan,
    poison,
)

__all__ = ["poison"]  # a fixture: memory that kernels allocate is NaN, between canaries

PRECISIONS = ["ieee"] if interpreting() else ["ieee", "tf32x3"]
NAMES = (3, 9, 0, 14, 1)  # letters


@pytest.fixture(autouse=True)
def kernels_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "runs_kernels", lambda x: x.dtype != torch.float64)


@dataclass
class Network:
    """What `library.score_names` takes; running statistics in float32."""

    embedding: Tensor
    levels: list[Level]
    head_weight: Tensor
    head_bias: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Network:
        """With every tensor changed."""

        def changed(level: Level) -> Level:
            tensors = {name: value for name, value in level._asdict().items() if isinstance(value, Tensor)}
            return level._replace(**{name: change(value) for name, value in tensors.items()})

        tensors = (change(tensor) for tensor in (self.embedding, self.head_weight, self.head_bias))
        embedding, head_weight, head_bias = tensors
        return Network(embedding, [changed(level) for level in self.levels], head_weight, head_bias)

    def __call__(self, packed: cw.Packed, losses: bool = True, precision: str = "auto") -> Tensor:
        arguments = (self.embedding, self.levels, self.head_weight, self.head_bias, packed)
        return library.score_names(*arguments, losses=losses, precision=precision)

    def in_pytorch(self, packed: cw.Packed, losses: bool = True) -> Tensor:
        return twin.score_names(self.embedding, self.levels, self.head_weight, self.head_bias, packed, losses)


def network(
    widths: Sequence[int], factors: Sequence[int], V: int = 27, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Network:
    """Levels differ in every value. `widths` are those of the embedding and of every level."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)

    levels = [
        Level(
            in_nan((normal(h, c, k) * (c * k) ** -0.5).to(dtype)),
            in_nan((1 + 0.3 * normal(h)).to(dtype)),
            in_nan((0.5 * normal(h)).to(dtype)),
            in_nan(normal(h).float()),
            in_nan((0.5 + normal(h) ** 2).float()),
            eps=10.0 ** -(i + 1),
        )
        for i, ((c, h), k) in enumerate(zip(itertools.pairwise(widths), factors, strict=True))
    ]
    head = in_nan((2 * normal(V, widths[-1]) * widths[-1] ** -0.5).to(dtype))
    return Network(in_nan(normal(V, widths[0]).to(dtype)), levels, head, in_nan(normal(V).to(dtype)))


def names(lengths: Sequence[int], V: int = 27, seed: int = 0) -> cw.Packed:
    generator = torch.Generator().manual_seed(seed)
    packed = cw.pack_ids([torch.randint(0, V, (n,), generator=generator).tolist() for n in lengths])
    return cw.Packed(*(in_nan(ids.to(DEVICE)) for ids in (packed.tokens, packed.targets)), packed.cu_seqlens.to(DEVICE))


def check(net: Network, packed: cw.Packed, precision: str = "ieee") -> None:
    exact = net.mapped(Tensor.double)
    longest = max(net.head_weight.shape[1], *(level.weight[0].numel() for level in net.levels))
    for losses in (True, False):
        truth, got = exact.in_pytorch(packed, losses), net(packed, losses, precision)
        with RoundedProducts() if precision == "tf32" else nullcontext():
            plain = net.in_pytorch(packed, losses)
        assert got.dtype == torch.float32
        assert got.shape == truth.shape
        scale = float(truth.abs().max())
        error = float((got.double() - truth).abs().max()) / scale
        independent = UNIT[net.embedding.dtype] * longest**0.5
        bound = 4 * max(float((plain.double() - truth).abs().max()) / scale, independent)
        assert error <= bound, f"error {error:.2e}, at most {bound:.2e} expected"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "widths",
    [
        *((10, h, h, h) for h in (1, 17, 64, 68, 90, 128)),
        (1, 1, 1, 1),
        (7, 20, 68, 33),
        (7, 128, 3, 66),
        (130, 9, 9, 9),
    ],
)
def test_widths(widths: tuple[int, ...], precision: str) -> None:
    check(network(widths, (2, 2, 2)), names(NAMES), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("factors", [(2,), (2, 2), (2,) * 4, (2,) * 5, (2,) * 6, (3,), (4, 2, 2), (2, 5), (3, 4, 4)])
def test_contexts_and_names_longer_than_a_tile(factors: tuple[int, ...], precision: str) -> None:
    """Tiles of 128 rows, of which up to 63 are computed twice; the second name fills several."""
    widths = [6, *range(18, 18 + len(factors))]
    check(network(widths, factors, V=6), names((9, 300, 0, 64, 63, 130), V=6), precision)


@pytest.mark.parametrize("V", [2, 3, 16, 17, 100])
def test_vocabularies(V: int) -> None:
    check(network((5, 20, 20), (2, 2), V), names(NAMES, V))


@pytest.mark.parametrize("lengths", [(0,), (1,), (12,), (0, 0, 0), (127,), (128,), (7,) * 60])
def test_numbers_of_names(lengths: tuple[int, ...]) -> None:
    check(network((5, 20, 20, 20), (2, 2, 2)), names(lengths))


def test_real_names(packed: cw.Packed) -> None:
    check(network((10, 68, 68, 68), (2, 2, 2)), packed.to(DEVICE), PRECISIONS[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_storage(dtype: torch.dtype) -> None:
    check(network((10, 68, 68, 68), (2, 2, 2), dtype=dtype), names(NAMES))


def test_tf32() -> None:
    check(network((10, 68, 68, 68), (2, 2, 2)), names((3, 9, 0, 14) * 5), "tf32")


@pytest.mark.parametrize("launch", [Launch(64, 16, 32, per_sm=2), Launch(32, 32, 32), Launch(128, 16, 64, per_sm=4)])
def test_neither_tiles_nor_neighbours_matter(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, a name by itself has the same losses to the last bit; the interpreter's BLAS adds in varying order."""
    net, lengths = network((5, 20, 20, 20), (2, 2, 2)), (5, 70, 0, 40, 3, 90)
    packed = names(lengths)
    monkeypatch.setattr(score, "score_launch", lambda *_: launch)
    check(net, packed)
    if not interpreting():
        for word, rows in enumerate(net(packed).split([n + 1 for n in lengths])):
            assert torch.equal(net(packed.select(torch.tensor([word], device=DEVICE))), rows)


def test_columns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """68 as 64 + 16 and as 128."""
    net, packed = network((5, 68, 68), (2, 2)), names(NAMES)
    chosen = configs.score_launch(68, torch.float32, "ieee", net.embedding.device)
    assert chosen.columns == 64
    monkeypatch.setattr(score, "score_launch", lambda *_: replace(chosen, columns=128))
    check(net, packed)


@pytest.mark.parametrize("view", [every_second, column_by_column])
def test_tensors_of_any_strides(view: Callable[[Tensor], Tensor]) -> None:
    net, packed = network((5, 20, 20), (2, 2)), names(NAMES)
    viewed = cw.Packed(view(packed.tokens), view(packed.targets), packed.cu_seqlens)
    assert torch.equal(net.mapped(view)(viewed, False), net(packed, False))
    assert torch.equal(net.mapped(view)(viewed), net(packed))


def test_narrow_tokens() -> None:
    net, packed = network((5, 20, 20), (2, 2)), names(NAMES)
    narrow = cw.Packed(packed.tokens.int(), packed.targets.int(), packed.cu_seqlens)
    assert torch.equal(net(narrow), net(packed))
    torch.testing.assert_close(net.mapped(Tensor.double)(narrow), net.mapped(Tensor.double)(packed), rtol=0, atol=0)


def test_results_repeat_to_the_last_bit() -> None:
    net, packed = network((5, 68, 68), (2, 2)), names((30, 9, 200))
    assert torch.equal(net(packed), net(packed))


@pytest.mark.skipif("CONVWAVE_PTX" not in os.environ, reason="compiled code only")
def test_a_race_in_the_scratch_memory_would_be_seen() -> None:
    """Both ways, without any barrier: the kernel's own, and those that triton happens to put beside them."""
    from tests.ptx.launch import on_emulator

    def without_barriers(name: str, ptx: str) -> str:
        return re.sub(r"bar\.sync[^;]*;", "", ptx) if name == "score_names_kernel" else ptx

    with on_emulator(os.environ["CONVWAVE_PTX"], patch=without_barriers) as log:
        network((5, 20, 20, 20), (2, 2, 2))(names(NAMES))
    kinds = {kind for _, kind, _ in log.problems() if "scratch_ptr" in kind}
    race = "global race on scratch_ptr"
    assert kinds == {f"{race}: read after write, no barrier", f"{race}: write after read, no barrier"}


def of_rows(net: Network) -> Network:
    return replace(net, levels=[*net.levels[:-1], net.levels[-1]._replace(training=True)])


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: of_rows(network((5, 20, 20), (2, 2))), "levels: expected running statistics"),
        (lambda: network((5, 20, 129), (2, 2)), "expected up to 128 channels and tokens, got 129 and 27"),
        (lambda: network((5, 20), (2,), 129), "expected up to 128 channels and tokens, got 20 and 129"),
        (lambda: network((5, *[20] * 7), (2,) * 7), "levels: expected a context of up to 64 tokens, got 128"),
        (lambda: network((5, 20, 20), (4, 2)), "levels: expected up to 65536 contexts of the first level, got 27\\^4"),
        (lambda: network((5, 20, 20, 20), (2, 2, 3), 5), "levels: expected equal taps and activations"),
    ],
)
def test_what_the_kernel_does_not_take(net: Callable[[], Network], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        net()(names((3,), 5))


@pytest.mark.skipif(DEVICE == "cuda", reason="an assertion on the device, which ends the process")
@pytest.mark.parametrize(("tokens", "targets"), [([0, 27], [1, 0]), ([0, 1], [27, 0]), ([0, -1], [1, 0])])
def test_tokens_outside(tokens: list[int], targets: list[int]) -> None:
    packed = cw.Packed(torch.tensor(tokens), torch.tensor(targets), torch.tensor([0, 2]))
    with pytest.raises(IndexError, match="packed: expected tokens and targets from 0 to 26"):
        network((5, 20), (2,))(packed)


def test_no_positions() -> None:
    with pytest.raises(ValueError, match="packed: expected at least one position, got none"):
        network((5, 20), (2,))(names(()))
