"""Tiers: implementations of one training, from the plainest to the fastest.

Every tier runs the same recipe on the same batches and ends at the same losses, up to the noise between seeds. For a
given seed, device and tier the weights are the same bits every time (except on a GPU for batches of contexts, whose
counts are summed in no fixed order); between tiers they differ by rounding, which grows over the steps. A tier
names its file as text, which is loaded when the tier is asked for; tiers never import one another.

| tier | what runs | where |
|---|---|---|
| ``reference`` | `ConvWave`, autograd, `optim.Muon`, torch's AdamW and SGD | everywhere, every recipe |
| ``cpu`` | `closed_form`: the same step without autograd | recipes that take Muon, on a CPU |
| ``fused`` | `ops.loops`: that step as compiled loops, extra ``fast`` | the same, unless batches are windows |
| ``cuda-graph`` | the fused kernels and both optimisers, a step as one CUDA graph | recipe ``full``, on CUDA |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

from convwave._lazy import load
from convwave.train.recipes import Recipe, named

if TYPE_CHECKING:
    from torch import Tensor

    from convwave.data.packing import Packed, Vocabulary
    from convwave.nn import ConvWave
    from convwave.train.config import Config


class Activations(NamedTuple):
    """What a level puts out in a step.

    Attributes:
        rows: (N, H).
        counts: (N,) how many windows contain each row.
    """

    rows: Tensor
    counts: Tensor


# gets the gradients by their parameters' names, and the activations of every level; both are valid during the call
Watch = Callable[[Mapping[str, "Tensor"], Sequence[Activations]], None]


class Run(Protocol):
    """A training under way: what every tier implements."""

    block: int = 1  # steps that it can do before it has to wait for their losses
    positions: int  # predicted by the last step

    def prepare(self, message: Callable[[str], None]) -> None:
        """Do what takes long the first time on a machine, and say so; the steps would do it otherwise."""
        return

    def step(self, i: int, watch: Watch | None = None) -> float:
        """Do step `i`, return its loss; `watch` sees its gradients and activations before the parameters move."""

    def steps(self, first: int, stop: int) -> list[float]:
        """Do steps `first` to ``stop - 1``, return their losses."""
        return [self.step(i) for i in range(first, stop)]

    def finish(self) -> ConvWave:
        """The network as training would end now, a copy ready to evaluate; the run can go on."""

    def model(self) -> ConvWave:
        """The network as it is now, a copy or itself."""

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned."""

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Before the first step: take the parameters and statistics of another network, by their names in `model`."""


class Tier(NamedTuple):
    """What a tier can train.

    Attributes:
        begin: ``"module:name"`` of what makes a `Run` of a `Config`, the packed training words and their vocabulary.
        device: device type, None for any.
        models: names in `config.MODELS`, None for any.
        optimizers, batches: `optimizer` and `batch_of` of `recipes.Recipe`, None for any.
        packages: modules that have to be installed.
        extra: of convwave, which installs them.
    """

    begin: str
    device: str | None = None
    models: tuple[str, ...] | None = None
    optimizers: tuple[str, ...] | None = None
    batches: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()
    extra: str = ""

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if find_spec(name) is None]

    def runs(self, model: str, recipe: Recipe, device: str) -> bool:
        """Whether it trains this model by this recipe on this device, its packages installed."""
        return (
            self.device in (None, device.partition(":")[0])
            and (self.models is None or model in self.models)
            and (self.optimizers is None or recipe.optimizer in self.optimizers)
            and (self.batches is None or recipe.batch_of in self.batches)
        )


# those whose running statistics are computed at the end; windows move them in every step
_BATCHES = ("names", "contexts", "text")

# the fastest first
TIERS = {
    "cuda-graph": Tier("convwave.train.cuda_graph:GraphedRun", "cuda", ("convwave",), ("muon",), ("text",)),
    "fused": Tier(
        "convwave.train.fused:FusedRun",
        "cpu",
        ("convwave",),
        ("muon",),
        _BATCHES,
        ("numba", "scipy", "threadpoolctl"),
        "fast",
    ),
    "cpu": Tier("convwave.train.closed_form:ClosedFormRun", "cpu", ("convwave",), ("muon",), _BATCHES),
    "reference": Tier("convwave.train.autograd:begin"),
}


def available_tiers(model: str = "convwave", recipe: str | Recipe = "fast", device: str = "cpu") -> list[str]:
    """The tiers that train a model by a recipe on a device, the fastest first."""
    chosen = named(recipe)
    return [name for name, tier in TIERS.items() if tier.runs(model, chosen, device) and not tier.missing]


def choose_tier(tier: str, model: str, recipe: str | Recipe, device: str) -> str:
    """Resolve a tier's name: "auto" is the fastest available.

    Raises:
        ValueError: an unknown name, or a tier that cannot run this.
    """
    recipe = named(recipe)
    available = available_tiers(model, recipe, device)
    if tier == "auto":
        return available[0]
    if tier not in TIERS:
        raise ValueError(f"tier: expected auto or one of {', '.join(TIERS)}, got {tier!r}")
    if tier not in available:
        if TIERS[tier].runs(model, recipe, device):
            packages, extra = ", ".join(TIERS[tier].missing), TIERS[tier].extra
            raise ValueError(f"tier: {tier} needs {packages}, which is not installed: pip install 'convwave[{extra}]'")
        by = f"{model} by recipe {recipe.name} on {device}"
        raise ValueError(f"tier: expected one of {', '.join(available)} for {by}, got {tier!r}")
    return tier


def begin(config: Config, train: Packed, vocabulary: Vocabulary) -> Run:
    """The run of a configuration, before its first step.

    Args:
        config: what and how; `config.tier` says which file trains it.
        train: the words to train on.
        vocabulary: theirs.
    """
    run: Run = load(TIERS[config.tier].begin)(config, train, vocabulary)
    return run
