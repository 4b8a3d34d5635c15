"""What tiers share: the network before the first step, what its steps read, exact statistics after the last."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from convwave import reference
from convwave.convert import from_windowed
from convwave.data.batches import Plan, StepReader
from convwave.data.graph import Graph
from convwave.data.packing import Packed, Vocabulary
from convwave.nn import ConvWave
from convwave.ops import functional
from convwave.train.config import Config
from convwave.train.recipes import PUBLISHED
from convwave.train.tiers import Activations, Watch


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
        with torch.random.fork_rng(devices=[]):
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
    """Set the running statistics to the exact ones of a graph, in one pass in training mode.

    Every module keeps its own mode, and every level its own momentum.
    """
    modes = {module: module.training for module in model.modules()}
    norms = [block.norm for block in model.layers]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(graph)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    for module, training in modes.items():
        module.training = training


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
                optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
    reader.generator.set_state(state["generator"])
