"""Modules behave as torch.nn's do: torch's own inputs, state, tools and sizes."""

from __future__ import annotations

import copy
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import convwave as cw
from convwave import reference
from convwave.train.config import Config
from convwave.train.loop import train
from convwave.train.recipes import RECIPES
from convwave.train.tiers import available_tiers, begin
from convwave.verify.certificate import verify
from tests.helpers import GRAPHS, disturb, relative_error

DEVICE = "cpu"


def inputs_of(name: str, training: bool) -> list:
    """What torch tests its own module with."""
    pytest.importorskip("expecttest", reason="torch's own inputs need the package expecttest")
    from torch.testing._internal.common_modules import module_db

    (info,) = [info for info in module_db if info.name == name]
    return info.module_inputs_func(info, DEVICE, torch.float64, requires_grad=True, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d"])
def test_batch_norm_with_torchs_own_inputs(name: str, training: bool) -> None:
    cases = inputs_of(name, training)
    assert len(cases) >= 5
    for case in cases:
        arguments, options = case.constructor_input.args, case.constructor_input.kwargs
        theirs = getattr(nn, name.removeprefix("nn."))(*arguments, **options, dtype=torch.float64)
        ours = cw.nn.BatchNorm(*arguments, **options, dtype=torch.float64, unbiased=False, layout="BCT")
        disturb(theirs, 0)
        ours.load_state_dict(theirs.state_dict())
        (given,) = case.forward_input.args
        if training and not given.numel():
            with pytest.raises(ValueError, match="needs a total count above 0, got 0"):
                ours.train()(given)
            continue
        results = []
        for module in (theirs.train(training), ours.train(training)):
            x = given.detach().clone().requires_grad_()
            y = module(x)
            (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
            results.append([y, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9, msg=lambda m, d=case.desc: f"{d}: {m}")
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("layout", ["BTC", "BCT"])
@pytest.mark.parametrize(("kernel_size", "dilation", "bias"), itertools.product((1, 2, 3), (1, 4), (True, False)))
def test_the_convolution_by_itself_is_a_left_padded_conv1d(
    kernel_size: int, dilation: int, bias: bool, layout: str
) -> None:
    ours = cw.nn.CausalConv1d(5, 7, kernel_size, dilation, bias=bias, padding="zeros", layout=layout)  # type: ignore[arg-type]
    theirs = nn.Conv1d(5, 7, kernel_size, dilation=dilation, bias=bias)
    disturb(theirs, 1)
    ours.load_state_dict(theirs.state_dict())
    ours, theirs = ours.double(), theirs.double()
    x = torch.randn(3, 5, 11, dtype=torch.float64)
    y = ours(x if layout == "BCT" else x.transpose(1, 2))
    expected = theirs(F.pad(x, ((kernel_size - 1) * dilation, 0)))
    torch.testing.assert_close(y if layout == "BCT" else y.transpose(1, 2), expected)


# arguments of nn.Conv1d that a causal convolution cannot have, and how they are refused
NO_CAUSAL_ARGUMENTS = [
    ({"stride": 2}, "stride"),  # every position has an output, so that levels can be stacked and rows packed
    ({"padding": 1}, "padding: expected 'replicate' or 'zeros', got 1"),  # what precedes a sequence, always k - 1 taps
    ({"padding": "same"}, "padding: expected 'replicate' or 'zeros', got 'same'"),  # "same" reads what is to come
    ({"padding": "valid"}, "padding: expected 'replicate' or 'zeros', got 'valid'"),  # would have fewer positions
    ({"groups": 2}, "groups"),  # one matrix per tap, in kernels too
    ({"padding_mode": "circular"}, "padding_mode"),  # the end of a sequence, which is to come, before its beginning
    ({"kernel_size": (3,)}, r"kernel_size: expected a whole number, got \(3,\)"),
]


@pytest.mark.parametrize(("arguments", "message"), NO_CAUSAL_ARGUMENTS)
def test_arguments_that_no_causal_convolution_has_are_refused(arguments: dict, message: str) -> None:
    nn.Conv1d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments})
    with pytest.raises((TypeError, ValueError), match=message) as refusal:
        cw.nn.CausalConv1d(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("training", [True, False])
def test_the_convolution_with_torchs_own_inputs(training: bool) -> None:
    """(B, C, T) and (C, T) with torch's arguments; "same" padding is refused above."""
    results = []
    for case in inputs_of("nn.Conv1d", training):
        arguments, options = case.constructor_input.args, dict(case.constructor_input.kwargs)
        if options.get("padding") == "same":
            with pytest.raises(ValueError, match="padding: expected 'replicate' or 'zeros', got 'same'"):
                cw.nn.CausalConv1d(*arguments, **options)
            continue
        theirs = nn.Conv1d(*arguments, **options, dtype=torch.float64).train(training)
        options = {"bias": True, "padding": "zeros", "layout": "BCT", "dtype": torch.float64} | options
        ours = cw.nn.CausalConv1d(*arguments, **options).train(training)
        ours.load_state_dict(theirs.state_dict())
        (given,) = case.forward_input.args
        weight = torch.randn(given.shape[-1], dtype=torch.float64)
        found = []
        for module, pad in ((ours, 0), (theirs, theirs.kernel_size[0] - 1)):
            x = given.detach().clone().requires_grad_()
            y = module(F.pad(x, (pad, 0)))
            (y * weight).sum().backward()
            found.append([y, x.grad, *(p.grad for p in module.parameters())])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        results.append(given.ndim)
    assert set(results) == {2, 3}


def test_channels_and_positions_are_not_guessed() -> None:
    """A square (C, T): nn.Conv1d's reading for the convolution, a refusal where BatchNorm's reading would differ."""
    x = torch.randn(4, 4)
    conv = cw.nn.CausalConv1d(4, 6, padding="zeros", layout="BCT")
    torch.testing.assert_close(conv(x), F.conv1d(F.pad(x, (1, 0)), conv.weight))
    with pytest.raises(ValueError, match=r"x: expected \(B, C, T\), or rows .* got \(4, 4\)"):
        cw.nn.ConvBatchNormTanh(4, 6, layout="BCT")(x)


@pytest.mark.parametrize("padding", ["replicate", "zeros"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("backend", cw.available_backends())
def test_a_stack_is_its_levels_one_after_another(padding: str, packed: bool, backend: str) -> None:
    torch.manual_seed(0)
    fused = disturb(cw.nn.ConvStack([4, 6, 5, 3], 2, [1, 3, 2], padding=padding, backend=backend), 0)  # type: ignore[arg-type]
    plain = copy.deepcopy(fused)
    x, mask = torch.randn(22, 4), torch.randint(1, 3, (22,))
    cu_seqlens = torch.tensor([0, 9, 9, 22]) if packed else None
    if not packed:
        x, mask = x.view(2, 11, 4), mask.view(2, 11)
    y, h = fused(x, mask, cu_seqlens=cu_seqlens), x
    for block in plain.blocks:
        h = block(h, weights=mask, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(y, h, rtol=2e-5, atol=2e-5)
    for ours, expected in zip(fused.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_averaged_weights_get_new_statistics() -> None:
    """swa_utils.update_bn finds our norms: the average of two batches' statistics, each counted once."""
    layer = cw.nn.ConvBatchNormTanh(4, 6)
    batches = [torch.randn(2, 9, 4), torch.randn(2, 9, 4) + 2]
    means = []
    for batch in batches:
        z = layer.conv(batch).flatten(0, 1)
        means.append(z.mean(0))
    torch.optim.swa_utils.update_bn(batches, layer)
    torch.testing.assert_close(layer.norm.running_mean, (means[0] + means[1]) / 2, rtol=1e-5, atol=1e-5)
    assert layer.norm.momentum == 0.1
    assert int(layer.norm.num_batches_tracked) == 2


def test_a_sync_batch_norm_in_its_place_is_refused_in_clear_words() -> None:
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(cw.nn.ConvBatchNormTanh(4, 6))
    with pytest.raises(TypeError, match=r"norm: expected a convwave\.nn\.BatchNorm, .* got SyncBatchNorm"):
        layer(torch.randn(2, 5, 4))


def test_sizes_may_be_numpys(tmp_path: Path) -> None:
    made = [
        cw.ConvWave(np.int64(5), np.int32(3), np.int64(6)),
        cw.ConvWave(5, 3, np.array([4, 5, 6]), eps=np.float32(1e-5), momentum=np.float64(0.2)),
        cw.ConvWave(5, factors=np.array([2, 4])),
    ]
    for i, model in enumerate(made):
        model.save(tmp_path / f"{i}.safetensors")
        again = cw.load(tmp_path / f"{i}.safetensors")
        assert again.config() == model.config()


def test_arguments_are_checked_when_a_module_is_made() -> None:
    bad = [
        (lambda: cw.nn.CausalConv1d(0, 6), "in_channels: expected at least 1, got 0"),
        (lambda: cw.nn.CausalConv1d(4, 2.5), "out_channels: expected a whole number, got 2.5"),
        (lambda: cw.nn.CausalConv1d(4, 6, 0), "kernel_size: expected at least 1, got 0"),
        (lambda: cw.nn.CausalConv1d(4, 6, 2, 0), "dilation: expected at least 1, got 0"),
        (lambda: cw.nn.CausalConv1d(4, 6, padding="same"), "padding: expected 'replicate' or 'zeros', got 'same'"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, layout="TBC"), "layout: expected 'BTC' or 'BCT', got 'TBC'"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, momentum=1.5), "momentum: expected a number from 0 to 1, or None"),
        (lambda: cw.nn.ConvBatchNormTanh(4, 6, eps=-1.0), "eps: expected a number >= 0, got -1.0"),
        (lambda: cw.nn.BatchNorm(0), "num_features: expected at least 1, got 0"),
        (lambda: cw.nn.ConvStack([4]), "channels: expected at least 2 numbers"),
        (lambda: cw.nn.ConvStack([4, 5, 6], dilations=[1]), "dilations: expected one number or 2"),
    ]
    for function, message in bad:
        with pytest.raises(ValueError, match=message):
            function()


def test_shapes_of_the_norm_are_checked() -> None:
    norm = cw.nn.BatchNorm(7)
    for z, weights in (
        (torch.randn(5, 6), None),
        (torch.randn(5, 1), None),
        (torch.randn(7), None),
        (torch.randn(5, 7), torch.ones(5, 1)),
        (torch.randn(5, 7), torch.ones(1)),
        (torch.randn(2, 5, 7), torch.ones(10)),
    ):
        with pytest.raises(ValueError, match=r"expected shape \("):
            norm(z, weights)


class Embedding:
    def __init__(self, n: int, d: int) -> None:
        self.weight = torch.randn(n, d)

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight[x]


class BatchNorm1d(reference.BatchNorm1d):
    """As the lecture's notebook keeps it after three-dimensional inputs."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.running_mean, self.running_var = torch.randn(1, 1, dim), torch.rand(1, 1, dim) + 0.5


class Notebook:
    """A network of the user's own classes."""

    def __init__(self, layers: list) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(1)


def test_a_notebooks_own_classes_convert() -> None:
    generator = torch.Generator().manual_seed(0)
    layers: list = [Embedding(27, 10)]
    for below, width in ((10, 8), (8, 6)):
        layers += [
            reference.FlattenConsecutive(2),
            reference.Linear(2 * below, width, False, generator),
            BatchNorm1d(width),
            reference.Tanh(),
        ]
    net = Notebook([*layers, reference.Linear(6, 27, True, generator)])
    for layer in net.layers:
        if isinstance(layer, BatchNorm1d):
            layer.training = False
    packed = cw.pack_ids([[1, 2, 3, 4, 5], [6], []])
    model = cw.from_windowed(net)  # type: ignore[arg-type]
    assert not model.layers[0].norm.training
    logits = model(cw.dense_graph(packed, factors=(2, 2)))
    assert relative_error(logits, net(reference.build_windows(packed, 4).inputs)) < 1e-5


def test_making_networks_of_others_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    mlp = reference.HierarchicalMLP()
    cw.ConvWave(5).save(tmp_path / "m.safetensors")
    for make in (lambda: cw.from_windowed(mlp), lambda: cw.load(tmp_path / "m.safetensors")):
        torch.manual_seed(1)
        expected = torch.rand(3)
        torch.manual_seed(1)
        make()
        assert torch.equal(torch.rand(3), expected)


def test_the_whole_network_exports() -> None:
    net = disturb(cw.ConvWave(5, 3, 6, backend="eager"), 0).eval()
    graph = cw.dense_graph(cw.pack_ids([[1, 2, 3], [4]]))
    program = torch.export.export(net, (graph,))
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        torch.export.save(program, file.name)
        again = torch.export.load(file.name)
    torch.testing.assert_close(again.module()(graph), net(graph))


class NoDefaultDevice(TorchFunctionMode):
    """Fails where the library makes a tensor without saying on which device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        caller = str(sys._getframe(1).f_globals["__name__"])
        if function in _device_constructors() and caller.startswith("convwave."):
            assert "device" in (kwargs or {}), f"{function.__name__} in {caller}"
        return function(*args, **(kwargs or {}))


def what_the_library_does(folder: Path) -> list:
    """Data, graphs, networks, conversions, files, training, evaluation, sampling: everything on the CPU."""
    folder.mkdir(exist_ok=True)
    words = cw.Words(["anna", "bob", "carla", "dora", "eve", "bea"] * 5, "some words", "0" * 64, 0)
    corpus = cw.Corpus(words)
    vocabulary, packed = corpus.vocabulary, corpus.train
    results: list = [packed.tokens, packed.targets, packed.cu_seqlens]
    mlp = reference.HierarchicalMLP(len(vocabulary), 3, 5)
    net = cw.from_windowed(mlp)
    net.vocabulary = vocabulary
    net.save(folder / "m.safetensors")
    net = cw.load(folder / "m.safetensors").train()
    counts = torch.arange(len(packed), device="cpu") % 3
    for make in GRAPHS:
        graph = make(packed, counts=counts)
        loss = cw.loss(net(graph), graph)
        loss.backward()
        results += [loss.detach(), *(p.grad for p in net.parameters())]
    results += cw.to_windowed(net).parameters()
    biased = cw.from_windowed(cw.to_windowed(net))
    for norm in (block.norm for block in biased.layers):
        norm.unbiased = False
    results += cw.from_windowed(cw.to_torch(biased)).state_dict().values()
    with torch.device("cpu"):
        torch.manual_seed(0)
        stacks = [disturb(cw.nn.ConvStack([3, 4, 5], backend=backend), 0) for backend in cw.available_backends()]
        x, mask = torch.linspace(-1, 1, 21).view(7, 3), torch.tensor([1, 0, 2, 1, 1, 1, 0])
        cu_seqlens = torch.tensor([0, 3, 7])
    for stack in stacks:
        y = stack(x, mask, cu_seqlens=cu_seqlens)
        y.sum().backward()
        results += [y.detach(), *(p.grad for p in stack.parameters()), stack(x[None], mask[None]).detach()]
        results += [stack.eval()(x).detach(), *stack.buffers()]
    for recipe in RECIPES:
        for tier in available_tiers(recipe=recipe):
            config = Config.make(recipe=recipe, steps=2, n_hidden=4, levels=2, tier=tier, keep="best")
            results += begin(config, corpus.train, vocabulary).model().state_dict().values()
            results += train(config, words).model.state_dict().values()
    out = folder / "run"
    for steps in (2, 3):
        config = Config.make(recipe="fast", steps=steps, n_hidden=4, levels=2)
        results += train(config, words, out, resume=True).model.state_dict().values()
    results += train(Config.make("mlp3", steps=2), words).model.state_dict().values()
    names = cw.sample(net, 5, seed=3, max_length=6)
    checks = verify(net, corpus.splits, vocabulary, trajectory_steps=2)
    results += [torch.tensor(check.max_abs_error, device="cpu") for check in checks]
    return [*results, cw.pack(names, vocabulary).tokens]


def test_another_default_device_changes_nothing_but_new_modules(tmp_path: Path) -> None:
    """A default device "meta" holds no numbers: whatever is made there by mistake shows."""
    expected = what_the_library_does(tmp_path / "cpu")
    torch.set_default_device("meta")
    try:
        results = what_the_library_does(tmp_path / "meta")
        made = [cw.ConvWave(5, 3, 6), cw.nn.ConvStack([3, 4]), cw.nn.CausalConv1d(3, 4, bias=True)]
        assert {t.device.type for module in made for t in module.state_dict().values()} == {"meta"}
        graph = cw.dense_graph(cw.pack_ids([[1, 2], [3]]))
        assert made[0](graph.to("meta")).shape == (5, 5)
        assert {block.conv.weight.device.type for block in cw.load(tmp_path / "meta/m.safetensors").layers} == {"cpu"}
    finally:
        torch.set_default_device(None)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_every_new_tensor_says_on_which_device(tmp_path: Path) -> None:
    with NoDefaultDevice():
        what_the_library_does(tmp_path)


def test_every_public_name_of_nn_exists() -> None:
    for name in cw.nn.__all__:
        assert getattr(cw.nn, name).__doc__, name
