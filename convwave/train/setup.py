"""What tiers share: the network before the first step, what its steps read, exact statistics after the last."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from convwave import reference
from convwave.convert import from_windowed
from convwave.data.batches import Plan, StepReader
from convwave.data.graph import Graph, Rows
from convwave.data.packing import Packed, Vocabulary
from convwave.nn import ConvWave, on_device
from convwave.ops import functional
from convwave.ops.level import Level, Moments, check_total, track, wide
from convwave.ops.stack import conv
from convwave.train.config import Config
from convwave.train.recipes import PUBLISHED
from convwave.train.tiers import Activations, Watch

_BLOCK = 2**18  # rows of a graph whose statistics are computed at once


def windowed_network(config: Config, vocab_size: int, generator: torch.Generator) -> reference.Sequential:
    """The post's network of a configuration's name and sizes."""
    if config.model in PUBLISHED and len(config.factors) == 1:
        return reference.MLP(
            vocab_size,
            config.n_embd,
            config.n_hidden,
            config.factors[0],
            uniform_embedding=PUBLISHED[config.model].uniform_embedding,
            generator=generator,
        )
    return reference.HierarchicalMLP(
        vocab_size, config.n_embd, config.n_hidden, factors=config.factors, generator=generator
    )


def convolution(config: Config, train: Packed, vocabulary: Vocabulary) -> tuple[ConvWave, StepReader]:
    """A new `ConvWave` in training mode on the configuration's device, and what its steps read."""
    recipe, generator = config.recipe, torch.Generator().manual_seed(config.seed)
    if recipe.batch_of == "windows":  # the weights and the draws of the windowed network, number for number
        net = from_windowed(windowed_network(config, len(vocabulary), generator))
    else:
        with torch.random.fork_rng(devices=[]), on_device():
            torch.manual_seed(config.seed)
            net = ConvWave(len(vocabulary), config.n_embd, config.n_hidden, config.levels)
    net.vocabulary = vocabulary
    plan = Plan(
        recipe.batch_of,
        config.batch,
        config.steps,
        config.seed,
        recipe.growth,
        recipe.context_power,
        recipe.token_noise,
    )
    reader = StepReader(plan, train, len(vocabulary), config.factors, generator, config.device)
    return net.to(config.device).train(), reader


def network(
    config: Config, train: Packed, vocabulary: Vocabulary, weights: dict[str, Tensor], exact: bool = True
) -> ConvWave:
    """The network of a run that has these parameters and statistics, ready to evaluate, on the CPU.

    Args:
        config: of the run.
        train: its words.
        vocabulary: of the network.
        weights: by their names in the state dict.
        exact: compute the statistics from the words, as at the end of a run; False takes those in `weights`.

    Raises:
        RuntimeError: parameters of other names or shapes.
    """
    if config.model in PUBLISHED:
        net = from_windowed(windowed_network(config, len(vocabulary), torch.Generator()))
        net.load_state_dict(weights)
        return net.eval()
    net, reader = convolution(replace(config, device="cpu"), train, vocabulary)
    net.load_state_dict(weights)
    return ready(net, reader) if exact else net.eval()


def ready(net: ConvWave, reader: StepReader) -> ConvWave:
    """The trained network in evaluation mode, with exact statistics of all words unless batches are windows."""
    if reader.plan.batch_of != "windows":
        recompute_statistics(net, reader.everything)
    return net.eval()


def recompute_statistics(model: ConvWave, graph: Graph) -> None:
    """Set the running statistics to the exact ones of a graph.

    In one pass in training mode; level by level in blocks of rows, which keeps memory small, where the graph has more
    than `_BLOCK` of them. Every module keeps its own mode, and every level its own momentum.
    """
    norms = [block.norm for block in model.layers]
    for norm in norms:
        norm.reset_running_stats()
    if max(counts.numel() for counts in graph.weights) > _BLOCK:
        _statistics_by_blocks(model, graph)
        return
    modes = {module: module.training for module in model.modules()}
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(graph)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    for module, training in modes.items():
        module.training = training


@torch.no_grad()
def _statistics_by_blocks(model: ConvWave, graph: Graph) -> None:
    """`recompute_statistics` with no more in memory than the activations of two levels."""
    x = model.embedding(graph.tokens)
    for block, rows in zip(model.layers, graph.rows(model.statistics == "windows"), strict=True):
        level = block.level()._replace(training=True, momentum=1.0)

        def parts(x: Tensor = x, level: Level = level, rows: Rows = rows) -> Iterator[tuple[slice, Tensor]]:
            for start in range(0, rows.taps.shape[1], _BLOCK):
                part = slice(start, start + _BLOCK)
                yield part, wide(conv(x, level.weight.to(x.dtype), rows.taps[:, part]))

        moments = None
        for part, z in parts():
            of_part = Moments.of(z, None if rows.counts is None else rows.counts[part])
            moments = of_part if moments is None else moments.merged(of_part)
        assert moments is not None
        check_total(float(moments.total), level.unbiased)
        var = moments.squares / (moments.total - int(level.unbiased))
        track(level, moments.mean, var, moments.total)
        if block.norm.num_batches_tracked is not None:
            block.norm.num_batches_tracked.add_(1)
        if block is model.layers[-1]:
            break  # nothing reads the top activations
        mean, scale = moments.mean, level.gamma * torch.rsqrt(var + level.eps)
        above = x.new_empty(rows.taps.shape[1], level.weight.shape[0] // level.activation.parts)
        for part, z in parts():
            above[part] = level.activation.value(torch.addcmul(level.beta, z - mean.to(z.dtype), scale.to(z.dtype)))
        x = above


def observe(net: ConvWave, graph: Graph, watch: Watch) -> None:
    """Show `watch` the gradients and activations of a step on a graph; the network stays as it is."""
    twin = copy.deepcopy(net)
    rows: list[Tensor] = []
    for block in twin.layers:
        block.register_forward_hook(lambda module, given, out: rows.append(out.detach()))
    functional.loss(twin(graph), graph).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    watch(gradients, [Activations(*level) for level in zip(rows, graph.weights, strict=True)])


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ``prefix.name``."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those under ``prefix.name``, by name."""
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def network_state(net: ConvWave, reader: StepReader, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Everything that the next step depends on."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    tensors = {"generator": reader.generator.get_state(), **prefixed("model", net.state_dict())}
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            tensors |= prefixed(f"optimizer.{names[parameter]}", values)
    return tensors


def check_like(name: str, value: Tensor, like: Tensor) -> None:
    """Raise RuntimeError for a saved tensor of another shape or dtype than the one that it is for."""
    if (value.shape, value.dtype) != (like.shape, like.dtype):
        got = f"{tuple(value.shape)} of {value.dtype}"
        raise RuntimeError(f"{name}: expected {tuple(like.shape)} of {like.dtype}, got {got}")


def restore_network(
    state: dict[str, Tensor], net: ConvWave, reader: StepReader, optimizers: Iterable[torch.optim.Optimizer]
) -> None:
    """Continue from what `network_state` returned.

    Raises:
        KeyError: something is missing.
        RuntimeError: something is of another shape.
    """
    net.load_state_dict(without_prefix("model", state))
    names: dict[Tensor, str] = {parameter: name for name, parameter in net.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                values = without_prefix(f"optimizer.{names[parameter]}", state)
                if not values and not isinstance(optimizer, torch.optim.SGD):  # which keeps nothing between steps
                    raise KeyError(f"no optimizer state of {names[parameter]}")
                for key, value in values.items():
                    matrix = parameter.flatten(1) if parameter.ndim > 1 and key == "momentum" else parameter  # Muon's
                    check_like(key, value, torch.zeros((), device="cpu") if key == "step" else matrix)
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
    reader.generator.set_state(state["generator"])
