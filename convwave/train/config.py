"""What is trained and how, and how that can be refused or end."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from convwave.train.recipes import BLOG, PUBLISHED, Recipe, named
from convwave.train.tiers import choose_tier

if TYPE_CHECKING:
    from convwave.data.packing import Corpus

MODELS = ("convwave", *PUBLISHED)
KEEP = ("best", "last")
_LOWEST = {"steps": 1, "batch": 1, "n_embd": 1, "n_hidden": 1, "levels": 1, "seed": 0, "start": 0}
_NAMES_TXT_WORDS = 32_033  # what the recipes' steps were chosen for


class UsageError(ValueError):
    """Arguments that do not go together; the message is one line."""


class Diverged(RuntimeError):
    """The loss or the weights are no longer finite."""


class Interrupted(RuntimeError):
    """The user asked to stop; the state is saved."""


class Sizes(TypedDict, total=False):
    """Of the network, where they are not the recipe's."""

    n_embd: int | None
    n_hidden: int | None
    levels: int | None


@dataclass(frozen=True)
class Config:
    """What is trained and how. Two runs of equal configuration on equal data and machine give equal weights.

    Attributes:
        model: "convwave", or one of the post's windowed networks: "mlp3", "mlp8", "hierarchical".
        recipe: a value, so that any field can be varied.
        steps, batch: of the recipe unless given.
        seed: of weights and batches, 0 to 2**64 - 1, of which torch's generator for CPUs reads the last 32 bits; the
            windowed networks draw both from one generator, as the post does.
        tier: of `tiers.TIERS`: which implementation trains it.
        keep: the network that a run ends with: "last", or "best" by the validation losses measured on the way.
        start: the step at which the schedule began: what a run had done before it was extended.
        init: the run whose weights it began from; None is a random start.
    """

    model: str
    recipe: Recipe
    steps: int
    batch: int
    seed: int
    n_embd: int
    n_hidden: int
    levels: int
    device: str = "cpu"
    tier: str = "reference"
    keep: str = "last"
    start: int = 0
    init: str | None = None

    @classmethod
    def make(
        cls,
        model: str = "convwave",
        recipe: str | Recipe | None = None,
        *,
        steps: int | None = None,
        batch: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        tier: str | None = None,
        keep: str | None = None,
        init: str | None = None,
        **sizes: Unpack[Sizes],
    ) -> Config:
        """Fill in what is None from the recipe; the tier is the fastest of this device unless given.

        Raises:
            UsageError: an unknown name, a number out of range, or a recipe or a tier that does not train this network.
        """
        if model not in MODELS:
            raise UsageError(f"model: expected one of {', '.join(MODELS)}, got {model!r}")
        device = "cpu" if device is None else device
        n_embd, n_hidden, levels = sizes.get("n_embd"), sizes.get("n_hidden"), sizes.get("levels")
        if unknown := sizes.keys() - Sizes.__annotations__:
            raise TypeError(f"make: unexpected arguments {sorted(unknown)}")
        try:
            chosen = named(recipe or ("fast" if model == "convwave" else "blog"))
            if model in PUBLISHED and (chosen.optimizer, chosen.batch_of) != ("sgd", "windows"):
                raise UsageError(
                    f"recipe: {model} is trained by SGD on windows only, as in 'blog', got {chosen.name!r}"
                )
            tier = choose_tier(tier or "auto", model, chosen, device)
        except ValueError as error:
            raise UsageError(str(error)) from None
        width, depth = chosen.n_hidden, chosen.levels
        if model in PUBLISHED:
            network = (chosen.n_embd, chosen.n_hidden, chosen.levels)
            if {n_embd, n_hidden, levels} != {None} or network != (BLOG.n_embd, BLOG.n_hidden, BLOG.levels):
                raise UsageError(f"n_embd, n_hidden, levels: fixed for {model}, they are the post's")
            width, depth = PUBLISHED[model].n_hidden, len(PUBLISHED[model].factors)
        config = cls(
            model=model,
            recipe=chosen,
            steps=chosen.steps if steps is None else steps,
            batch=chosen.batch if batch is None else batch,
            seed=(42 if chosen.batch_of == "windows" else 0) if seed is None else seed,
            n_embd=chosen.n_embd if n_embd is None else n_embd,
            n_hidden=width if n_hidden is None else n_hidden,
            levels=depth if levels is None else levels,
            device=device,
            tier=tier,
            keep=keep or "last",
            init=init,
        )
        if batch is not None and chosen.batch_of == "text":
            raise UsageError(f"batch: recipe {chosen.name!r} reads the whole text in every step, got {batch}")
        if config.batch < 2 and chosen.batch_of == "windows":
            raise UsageError("batch: expected at least 2 windows, the variance of one is not defined, got 1")
        config._check()
        return config

    def _check(self) -> None:
        """Raises UsageError for a number out of range."""
        if self.keep not in KEEP:
            raise UsageError(f"keep: expected one of {', '.join(KEEP)}, got {self.keep!r}")
        if self.seed >= 2**64:
            raise UsageError(f"seed: expected at most 2**64 - 1, got {self.seed}")
        for name, low in _LOWEST.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if self.levels > 12:
            raise UsageError(f"levels: expected at most 12 (a context of 4096), got {self.levels}")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Config:
        """The configuration that ``dataclasses.asdict`` gave `values` of.

        Raises:
            KeyError, TypeError, ValueError: something is missing, unknown or out of range.
        """
        config = cls(**{**values, "recipe": Recipe(**values["recipe"])})
        for name in _LOWEST:
            if type(getattr(config, name)) is not int:
                raise TypeError(f"{name}: expected a whole number, got {getattr(config, name)!r}")
        for name in ("device", "tier", *(["init"] if config.init is not None else [])):
            if not isinstance(getattr(config, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(config, name)!r}")
        if config.model not in MODELS or config.start > config.steps:
            raise ValueError(f"model, start: expected a known one and at most {config.steps}")
        choose_tier(config.tier, config.model, config.recipe, config.device)
        config._check()
        return config

    def suited(self, corpus: Corpus, *, steps: bool = True, keep: bool = True) -> Config:
        """The configuration with the defaults that depend on the data.

        On the post's names.txt nothing changes: the recipes were made for it, and their published figures are those of
        the last step. Elsewhere steps grow with the number of words, but are a fortieth of the recipe's at least, and
        the best network is kept where there are validation words to choose it by.

        Args:
            corpus: the words.
            steps, keep: False leaves what the user asked for.
        """
        if corpus.is_names_txt:
            return self
        number = self.steps
        if steps:
            number = max(1, round(self.steps * max(0.025, len(corpus.words) / _NAMES_TXT_WORDS)))
        chosen = "best" if keep and corpus.splits.val else self.keep
        return replace(self, steps=number, keep=chosen)

    def rate(self, step: int) -> float:
        """What the learning rates are multiplied by at a step; an extension's schedule begins anew."""
        return self.recipe.rate(step - self.start, self.steps - self.start)

    def summary(self) -> dict[str, Any]:
        """Plain JSON values; `recipe` is its name, `recipe_fields` all of it."""
        values = asdict(self)
        return {**values, "recipe": self.recipe.name, "recipe_fields": values["recipe"]}

    @property
    def factors(self) -> tuple[int, ...]:
        return PUBLISHED[self.model].factors if self.model in PUBLISHED else (2,) * self.levels
