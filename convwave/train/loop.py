"""Training: one loop for the post's windowed networks and for the convolution, which survives being killed.

A `Run` holds everything that changes from step to step and can write it down and take it up again; `train` drives it,
saves it now and then to ``state.safetensors``, and at the end writes the results. On a CPU a run that was killed at
any moment and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from convwave import reference
from convwave.convert import from_windowed, to_windowed
from convwave.data.batches import Batch, ContextBatches, ContextSampler, NameBatches, graph_batch
from convwave.data.graph import Graph, distinct_graph, select_contexts, select_windows
from convwave.data.packing import Packed, Vocabulary, pack, split_words
from convwave.data.words import Words
from convwave.files import CheckpointError, read_tensors, write_atomic, write_tensors
from convwave.infer.score import EvaluationSet, SplitLoss
from convwave.nn import ConvWave
from convwave.ops import functional
from convwave.runs import plots as plotting
from convwave.train.closed_form import ClosedForm, MuonAdam
from convwave.train.optim import Muon
from convwave.train.recipes import PUBLISHED, RECIPES
from convwave.train.tiers import choose_tier

_AT_ONCE = 50  # steps between two looks at the losses, where nobody watches
STATE_FORMAT = "convwave.state.1"
STATE_FILE, MODEL_FILE, RESULT_FILE = "state.safetensors", "model.safetensors", "result.json"
MODELS = ("convwave", *PUBLISHED)


class UsageError(ValueError):
    """Arguments that do not go together; the message is one line."""


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


class Interrupted(RuntimeError):
    """The user asked to stop; the state is saved."""


@dataclass(frozen=True)
class Config:
    """What is trained and how. Two runs of equal configuration on equal data and machine give equal weights.

    Attributes:
        model: "convwave", or one of the post's windowed networks: "mlp3", "mlp8", "hierarchical".
        recipe: a name in `recipes.RECIPES`.
        steps, batch: of the recipe unless given.
        seed: of weights and batches; the windowed networks draw both from one generator, as the post does.
        tier: of `tiers.TIERS`: which implementation trains it.
    """

    model: str
    recipe: str
    steps: int
    batch: int
    seed: int
    n_embd: int
    n_hidden: int
    levels: int
    device: str = "cpu"
    tier: str = "reference"

    @classmethod
    def make(
        cls,
        model: str = "convwave",
        recipe: str | None = None,
        *,
        steps: int | None = None,
        batch: int | None = None,
        seed: int | None = None,
        n_embd: int | None = None,
        n_hidden: int | None = None,
        levels: int | None = None,
        device: str | None = None,
        tier: str | None = None,
    ) -> Config:
        """Fill in what is None from the recipe; the tier is the fastest of this device unless given.

        Raises:
            UsageError: an unknown name, a number out of range, or a recipe or a tier that does not train this network.
        """
        if model not in MODELS:
            raise UsageError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
        recipe = recipe or ("fast" if model == "convwave" else "blog")
        if recipe not in RECIPES:
            raise UsageError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        chosen = RECIPES[recipe]
        if model in PUBLISHED:
            if recipe != "blog":
                raise UsageError(f"recipe: {model} is trained by 'blog' only, got {recipe!r}")
            if (n_embd, n_hidden, levels) != (None, None, None):
                raise UsageError(f"n_embd, n_hidden, levels: fixed for {model}, they are the post's")
        device = device or "cpu"
        try:
            tier = choose_tier(tier or "auto", model, recipe, device)
        except ValueError as error:
            raise UsageError(str(error)) from None
        width, depth = chosen.n_hidden, chosen.levels
        if model in PUBLISHED:
            width, depth = PUBLISHED[model].n_hidden, len(PUBLISHED[model].factors)
        config = cls(
            model=model,
            recipe=recipe,
            steps=chosen.steps if steps is None else steps,
            batch=chosen.batch if batch is None else batch,
            seed=(42 if recipe == "blog" else 0) if seed is None else seed,
            n_embd=chosen.n_embd if n_embd is None else n_embd,
            n_hidden=width if n_hidden is None else n_hidden,
            levels=depth if levels is None else levels,
            device=device,
            tier=tier,
        )
        if batch is not None and chosen.batch_of == "text":
            raise UsageError(f"batch: recipe {recipe!r} reads the whole text in every step, got {batch}")
        if config.batch < 2 and chosen.batch_of == "windows":
            raise UsageError("batch: expected at least 2 windows, the variance of one is not defined, got 1")
        if config.seed >= 2**63:
            raise UsageError(f"seed: expected below 2**63, got {config.seed}")
        for name, low in {"steps": 1, "batch": 1, "n_embd": 1, "n_hidden": 1, "levels": 1, "seed": 0}.items():
            if getattr(config, name) < low:
                raise UsageError(f"{name}: expected at least {low}, got {getattr(config, name)}")
        if config.levels > 12:
            raise UsageError(f"levels: expected at most 12 (a context of 4096), got {config.levels}")
        return config

    @property
    def factors(self) -> tuple[int, ...]:
        return PUBLISHED[self.model].factors if self.model in PUBLISHED else (2,) * self.levels


# ---------------------------------------------------------------------------------------------------------------------
# What changes from step to step


class Run(Protocol):
    """A training under way."""

    positions: int  # predicted by the last step

    def step(self, i: int) -> float:
        """Do step `i`, return its loss."""

    def steps(self, first: int, stop: int) -> list[float]:
        """Do steps `first` to ``stop - 1``, return their losses."""
        return [self.step(i) for i in range(first, stop)]

    def finish(self) -> ConvWave:
        """The trained network, ready to evaluate."""

    def model(self) -> ConvWave:
        """The network as it is now, a copy or itself."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""


class WindowedRun(Run):
    """The post's own loop: random windows, the from-scratch network, plain SGD."""

    def __init__(self, config: Config, train: Packed, vocab_size: int) -> None:
        self.config, self.recipe = config, RECIPES[config.recipe]
        self.windows = reference.build_windows(train, math.prod(config.factors))
        self.windows = reference.Windows(*(t.to(config.device) for t in self.windows))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.mlp = _published_network(config, vocab_size, self.generator).to(config.device)
        self.positions = config.batch

    def step(self, i: int) -> float:
        ix = torch.randint(0, len(self.windows.targets), (self.config.batch,), generator=self.generator)
        ix = ix.to(self.windows.targets.device)
        lr = self.recipe.lr * self.recipe.rate(i, self.config.steps)
        return reference.sgd_step(self.mlp, self.windows.inputs[ix], self.windows.targets[ix], lr)

    def finish(self) -> ConvWave:
        return self.model().eval()

    def model(self) -> ConvWave:
        return from_windowed(self.mlp)

    def state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), **_prefixed("model", self.model().state_dict())}

    def restore(self, state: dict[str, Tensor]) -> None:
        model = self.model()
        model.load_state_dict(_without_prefix("model", state))
        self.mlp = to_windowed(model).to(self.config.device)
        self.generator.set_state(state["generator"])


class ConvolutionRun(Run):
    """The convolution, on whole names, on contexts, or on the post's random windows fed as counts."""

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        self.config, self.recipe = config, RECIPES[config.recipe]
        self.train, self.vocabulary = train, vocabulary
        self.generator = torch.Generator().manual_seed(config.seed)
        if self.recipe.batch_of == "windows":  # the weights and the draws of the windowed network, number for number
            self.net = from_windowed(_published_network(config, len(vocabulary), self.generator))
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.net = ConvWave(len(vocabulary), config.n_embd, config.n_hidden, config.levels)
        self.net.vocabulary = vocabulary
        self.net.to(config.device).train()
        self.optimizers = self._optimizers()
        self.positions = config.batch
        self._everything: Graph | None = None
        self._sampler: ContextSampler | None = None
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        recipe = self.recipe
        if recipe.optimizer == "sgd":
            return [torch.optim.SGD(self.net.parameters(), lr=recipe.lr)]
        matrices = [p for name, p in self.net.named_parameters() if name.endswith("conv.weight")]
        rest = [p for name, p in self.net.named_parameters() if not name.endswith("conv.weight")]
        decay, betas = recipe.weight_decay, (recipe.adam_beta, 0.95)
        return [
            Muon(matrices, recipe.lr, recipe.momentum, decay, recipe.orthogonal_steps),
            torch.optim.AdamW(rest, lr=recipe.adam_lr, betas=betas, weight_decay=decay, fused=True),
        ]

    def _all(self) -> Graph:
        """The whole training split over its distinct subcontexts."""
        if self._everything is None:
            self._everything = distinct_graph(self.train, factors=self.config.factors).to(self.config.device)
        return self._everything

    def _batch(self, i: int) -> Graph:
        batch = self.config.batch
        if self.recipe.batch_of == "windows":
            positions = torch.randint(0, len(self.train), (batch,), generator=self.generator)
            return select_windows(self._all(), positions, self.train.targets.index_select(0, positions))
        if self.recipe.batch_of == "text":
            return self._all()
        if self.recipe.batch_of == "contexts":
            rows, scale = self._contexts()(i)
            return select_contexts(self._all(), rows, scale)
        if self.recipe.token_noise:
            names = self._noisy(self.train.select(self._names(i, min(batch, self.train.num_words))))
            return distinct_graph(names, factors=self.config.factors).to(self.config.device)
        if batch >= self.train.num_words:
            return self._all()
        # of the graph of all names, the part that these need: half the time of a graph of their own
        positions, _ = self.train.positions(self._names(i, batch))
        return select_windows(self._all(), positions, self.train.targets.index_select(0, positions))

    def _contexts(self) -> ContextSampler:
        """What draws the contexts of every step."""
        if self._sampler is None:
            config, counts = self.config, self._all().weights[-1].cpu()
            last = round(self.recipe.growth * config.batch)
            power = self.recipe.context_power
            self._sampler = ContextSampler(counts, config.batch, last, config.steps, power, config.seed)
        return self._sampler

    def _names(self, i: int, batch: int) -> Tensor:
        """Indices of the names of step `i`."""
        epoch, part = divmod(i, self.train.num_words // batch)
        if epoch != self._epoch:  # the order depends on seed and epoch alone, so resuming needs no more than the step
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.train.num_words, generator=generator)
        return self._order[part * batch : (part + 1) * batch]

    def _noisy(self, names: Packed) -> Packed:
        """Names of which some letters read are replaced; what is to be predicted stays."""
        n = len(names)
        replace = torch.rand(n, generator=self.generator) < self.recipe.token_noise
        replace &= names.tokens != 0  # the opening 0 is what fills the context
        random = self.train.tokens[torch.randint(0, len(self.train), (n,), generator=self.generator)]
        return Packed(torch.where(replace, random, names.tokens), names.targets, names.cu_seqlens)

    def step(self, i: int) -> float:
        graph = self._batch(i)
        self.positions = graph.num_rows if self.recipe.batch_of == "contexts" else round(graph.totals[-1])
        rate = self.recipe.rate(i, self.config.steps)
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
        """But for windows: replace the running statistics by the exact ones of the whole training split."""
        if self.recipe.batch_of != "windows":
            recompute_statistics(self.net, self._all())
        return self.net.eval()

    def model(self) -> ConvWave:
        return self.net

    def state(self) -> dict[str, Tensor]:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.net.named_parameters()}
        tensors = {"generator": self.generator.get_state(), **_prefixed("model", self.net.state_dict())}
        for optimizer in self.optimizers:
            for parameter, values in optimizer.state.items():
                tensors |= _prefixed(f"optimizer.{names[parameter]}", values)
        return tensors

    def restore(self, state: dict[str, Tensor]) -> None:
        self.net.load_state_dict(_without_prefix("model", state))
        if self.recipe.optimizer != "sgd":  # which keeps nothing from step to step
            for name, _ in self.net.named_parameters():
                if not _without_prefix(f"optimizer.{name}", state):
                    raise KeyError(f"no optimizer state of {name}")
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.net.named_parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    values = _without_prefix(f"optimizer.{names[parameter]}", state)
                    optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}
        self.generator.set_state(state["generator"])


class ClosedFormRun(ConvolutionRun):
    """Tier "cpu": the same batches and the same step as `ConvolutionRun`, without autograd."""

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        super().__init__(config, train, vocabulary)
        recipe = self.recipe
        self.form = ClosedForm(self.net)
        self.optimizer = MuonAdam(
            self.form,
            recipe.lr,
            recipe.adam_lr,
            recipe.momentum,
            recipe.weight_decay,
            (recipe.adam_beta, 0.95),
            recipe.orthogonal_steps,
        )
        self._read: Callable[[int], Batch] | None = None

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    def reader(self) -> Callable[[int], Batch]:
        """What makes the batch of a step."""
        vocab_size, graph = self.net.vocab_size, self._all()
        if self.recipe.batch_of == "contexts":
            return ContextBatches(self._contexts(), graph, vocab_size)
        if self.recipe.token_noise:
            return lambda i: graph_batch(self._batch(i), vocab_size)
        if self.recipe.batch_of == "text" or self.config.batch >= self.train.num_words:
            full = graph_batch(graph, vocab_size)
            return lambda i: full
        batches = NameBatches(self.train, graph, vocab_size)
        return lambda i: batches(self._names(i, self.config.batch))

    def step(self, i: int) -> float:
        if self._read is None:
            self._read = self.reader()
        batch = self._read(i)
        self.positions = batch.weights[-1].numel() if self.recipe.batch_of == "contexts" else round(batch.totals[-1])
        loss = self.form.gradients(batch)
        self.optimizer.step(self.recipe.rate(i, self.config.steps))
        return loss.item()

    @torch.no_grad()
    def model(self) -> ConvWave:
        values = self.form.parameters()
        for name, parameter in self.net.named_parameters():
            parameter.copy_(values[name])
        return self.net

    def finish(self) -> ConvWave:
        self.model()
        return super().finish()

    def state(self) -> dict[str, Tensor]:
        self.model()
        return super().state() | _prefixed("optimizer", self.optimizer.state())

    def restore(self, state: dict[str, Tensor]) -> None:
        self.net.load_state_dict(_without_prefix("model", state))
        self.form.load(self.net)
        self.optimizer.load(_without_prefix("optimizer", state))
        self.generator.set_state(state["generator"])


class GraphedRun(ConvolutionRun):
    """Tier "cuda-graph": forward, backward, both optimisers and the schedule of a step are one CUDA graph.

    The whole text in every step makes all steps alike: the host replays the graph and reads the losses at the end. On a
    CPU the same step runs without a graph, for tests.
    """

    def __init__(self, config: Config, train: Packed, vocabulary: Vocabulary) -> None:
        super().__init__(config, train, vocabulary)
        device = torch.device(config.device)
        rates = [self.recipe.rate(i, config.steps) for i in range(config.steps)]
        self._rates = torch.tensor(rates, dtype=torch.float32, device=device)
        self._losses = torch.zeros(config.steps, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)  # the step that comes next
        self._next = 0  # the same, as the host knows it
        self._replay: Callable[[], None] | None = None

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        muon, adam = super()._optimizers()
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["base_lr"] = group["lr"]
                group["lr"] = torch.tensor(float(group["lr"]), device=self.config.device)
        for group in adam.param_groups:
            group["capturable"] = self.config.device.startswith("cuda")
        return [muon, adam]

    def _step(self) -> None:
        """One step, without a word to the host."""
        rate = self._rates.index_select(0, self._at).squeeze(0)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"].copy_(group["base_lr"] * rate)
        graph = self._all()
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
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
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
        self._next, self.positions = stop, round(self._all().totals[-1])
        return self._losses[first:stop].tolist()

    def step(self, i: int) -> float:
        return self.steps(i, i + 1)[0]

    def restore(self, state: dict[str, Tensor]) -> None:
        self._replay = None
        super().restore(state)


def recompute_statistics(model: ConvWave, graph: Graph) -> None:
    """Set the running statistics to the exact ones of a graph, in one pass in training mode."""
    training = model.training
    norms = [block.norm for block in model.layers]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(graph)
    for norm, value in zip(norms, momentum, strict=True):
        norm.momentum = value
    model.train(training)


def _published_network(config: Config, vocab_size: int, generator: torch.Generator) -> reference.Sequential:
    if config.model in PUBLISHED and len(config.factors) == 1:
        network = PUBLISHED[config.model]
        return reference.MLP(
            vocab_size,
            config.n_embd,
            config.n_hidden,
            network.factors[0],
            uniform_embedding=network.uniform_embedding,
            generator=generator,
        )
    return reference.HierarchicalMLP(
        vocab_size, config.n_embd, config.n_hidden, factors=config.factors, generator=generator
    )


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def begin(config: Config, train: Packed, vocabulary: Vocabulary) -> Run:
    """The run of a configuration, before its first step.

    Args:
        config: what and how.
        train: the words to train on.
        vocabulary: theirs.
    """
    if config.model in PUBLISHED:
        return WindowedRun(config, train, len(vocabulary))
    runs = {"cpu": ClosedFormRun, "cuda-graph": GraphedRun, "reference": ConvolutionRun}
    return runs[config.tier](config, train, vocabulary)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def fit(config: Config, train: Packed, vocabulary: Vocabulary) -> ConvWave:
    """The network that `train` ends with, and nothing else: no files, no evaluation, nobody told.

    Args:
        config: what and how.
        train: the words to train on.
        vocabulary: theirs.

    Raises:
        Diverged: a loss that is not finite.
    """
    run = begin(config, train, vocabulary)
    with few_threads(config, run.model().num_parameters, train):
        for first in range(0, config.steps, _AT_ONCE):
            for i, loss in enumerate(run.steps(first, min(first + _AT_ONCE, config.steps)), first + 1):
                if not math.isfinite(loss):
                    raise Diverged(f"the loss is {loss} at step {i}")
        return run.finish()


class Reporter:
    """What a run tells the outside; does nothing by itself."""

    def start(self, config: Config, parameters: int, done: int) -> None:
        """Before the first step of this process."""

    def step(self, done: int, loss: float, positions: int) -> None:
        """After every step."""

    def stop(self) -> None:
        """After the last one, however it ended."""

    def message(self, text: str) -> None:
        """A line for a person."""


@dataclass(frozen=True)
class Result:
    """A finished training."""

    config: Config
    parameters: int
    seconds: float  # wall time of the training loop, interrupted runs added up
    losses: list[float]  # of every step
    splits: dict[str, SplitLoss]
    model: ConvWave
    checkpoint: Path | None

    def summary(self) -> dict[str, Any]:
        """Plain JSON values."""
        splits = self.splits
        return {
            **asdict(self.config),
            "parameters": self.parameters,
            "train_seconds": self.seconds,
            "train_loss": splits["train"].loss,
            "val_loss": splits["val"].loss,
            "novel_val_loss": splits["novel_val"].loss,
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
        }


def train(
    config: Config,
    words: Words,
    out: Path | None = None,
    *,
    resume: bool = False,
    save_every: float = 10.0,
    reporter: Reporter | None = None,
) -> Result:
    """Train a network and evaluate it.

    Args:
        config: what and how.
        words: the data; its split is the post's.
        out: directory for ``state.safetensors`` (to resume), ``model.safetensors``, ``loss.csv``, ``loss.png`` and
            ``result.json``; None writes nothing.
        resume: go on with the state in `out`, or begin where there is none.
        save_every: seconds between two savings of the state.
        reporter: told about progress.

    Raises:
        DataError: no word is left to train on.
        UsageError: `out` holds a run already and `resume` is False.
        CheckpointError: a state that cannot be used, or one of another configuration or other data.
        Diverged: a loss or a weight that is not finite; the last good state stays on the disk.
        Interrupted: Ctrl-C; the state is saved.
    """
    with nullcontext() if out is None else locked(out):
        return _train(config, words, out, resume, save_every, reporter or Reporter())


def _train(
    config: Config, words: Words, out: Path | None, resume: bool, save_every: float, reporter: Reporter
) -> Result:
    if out is not None:
        if not resume and ((out / STATE_FILE).exists() or (out / MODEL_FILE).exists()):
            raise UsageError(f"out: {out} holds a run already; continue it with --resume or choose another directory")
        for partial in out.glob(".*.partial"):  # of a run that was killed while it wrote
            partial.unlink()
    splits = split_words(words.words)
    vocabulary = Vocabulary.from_words(words.words)
    packed = pack(splits.train, vocabulary)
    run = begin(config, packed, vocabulary)

    losses: list[float] = []
    seconds = 0.0
    if resume and out is not None and (out / STATE_FILE).exists():
        losses, seconds = _load_state(out / STATE_FILE, run, config, words)
        reporter.message(f"resuming {out} after step {len(losses)} of {config.steps}")

    def save() -> None:
        if out is not None:
            _save_state(out / STATE_FILE, run, config, words, losses, seconds + time.perf_counter() - started)

    parameters = run.model().num_parameters
    started = last_save = time.perf_counter()
    try:
        reporter.start(config, parameters, len(losses))
        with _interruptible() as interrupted, few_threads(config, parameters, packed):
            if not losses:
                save()  # so that even a run killed in its first second leaves something to resume
            for i in range(len(losses), config.steps):
                loss = run.step(i)
                if not math.isfinite(loss):
                    raise Diverged(f"the loss is {loss} at step {i + 1}{_kept(out)}")
                losses.append(loss)
                reporter.step(i + 1, loss, run.positions)
                if interrupted():
                    save()
                    raise Interrupted(f"stopped after step {i + 1} of {config.steps}{_kept(out)}")
                if time.perf_counter() - last_save >= save_every:
                    save()
                    last_save = time.perf_counter()
            save()
            model = run.finish()
            seconds += time.perf_counter() - started
            if interrupted():
                raise Interrupted(f"stopped after the last step{_kept(out)}")
    finally:
        reporter.stop()

    model.vocabulary, model.data_sha256 = vocabulary, words.sha256
    evaluation = EvaluationSet(splits, vocabulary, config.factors, config.device)
    checkpoint = None if out is None else out / MODEL_FILE
    result = Result(config, model.num_parameters, seconds, losses, evaluation.losses(model), model, checkpoint)
    for name, split in result.splits.items():
        if split.loss is not None and not math.isfinite(split.loss):
            raise Diverged(f"the loss of split {name} is {split.loss}{_kept(out)}")
    if out is not None and checkpoint is not None:
        model.save(checkpoint)
        curve = plotting.block_means(losses)
        write_atomic(out / "loss.csv", plotting.loss_csv(curve).encode())
        plotting.loss_plot(curve, out / "loss.png", result)
        summary = {**result.summary(), "data": words.source, "data_sha256": words.sha256}
        write_atomic(out / RESULT_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    return result


def read_config(out: Path) -> Config:
    """The configuration of the run in a directory; raises CheckpointError where there is none."""
    _, metadata = read_tensors(out / STATE_FILE, STATE_FORMAT)
    return _config_of(out / STATE_FILE, metadata)


def _config_of(path: Path, metadata: dict[str, Any]) -> Config:
    try:
        return Config(**metadata["config"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is not a usable state: {error}") from None


def _save_state(path: Path, run: Run, config: Config, words: Words, losses: list[float], seconds: float) -> None:
    tensors = run.state()
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise Diverged(f"{name} is no longer finite after step {len(losses)}{_kept(path.parent)}")
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    metadata = {
        "format": STATE_FORMAT,
        "config": asdict(config),
        "data_sha256": words.sha256,
        "seconds": seconds,
    }
    write_tensors(path, tensors, metadata)


def _load_state(path: Path, run: Run, config: Config, words: Words) -> tuple[list[float], float]:
    tensors, metadata = read_tensors(path, STATE_FORMAT)
    saved = asdict(_config_of(path, metadata))
    for name, value in asdict(config).items():
        if saved[name] != value:
            raise CheckpointError(f"{path}: was made with {name} {saved[name]}, cannot go on with {value}")
    if metadata.get("data_sha256") != words.sha256:
        raise CheckpointError(f"{path}: was trained on other data than {words.source}")
    try:
        losses = tensors.pop("losses").tolist()
        if losses:
            run.restore(tensors)
        return losses, float(metadata["seconds"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: is not a usable state: {str(error).splitlines()[0]}") from None


def _kept(out: Path | None) -> str:
    if out is None:
        return ""
    return f"; {out / STATE_FILE} holds the last good state, --resume continues from it"


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other processes from training in the same directory; the lock ends with the process, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:  # Windows
        yield
        return
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"out: another process is training in {out}") from None
        yield


def few_threads(config: Config, parameters: int, train: Packed) -> AbstractContextManager[None]:
    """One thread where a step is so little work that several gain nothing, and lose much where a core is busy.

    22,397 parameters and 512 names, 80 million multiply-adds forward: 9.5 ms a step on one thread, 8.4 on two idle
    cores, 50 with another process on the second.
    """
    of_names = RECIPES[config.recipe].batch_of == "names"
    positions = config.batch * (len(train) / train.num_words if of_names else 1)
    return threads(1) if parameters * positions < 2e8 else nullcontext()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use so many threads: on batches of some dozen rows, one is faster than several."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a flag that the loop reads between two steps; a second one interrupts at once."""
    seen = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, previous)
