"""What a sweep tries: a TOML file as a value, its configurations, and the names held out of the training split.

    recipe = "sprint"             # a built-in one, or a .toml file beside this one
    seeds = 5                     # a number, or a list of seeds
    sampler = "grid"              # "grid" (all combinations), "random" or "tpe"
    trials = 200                  # at most that many trainings; needed by random and tpe
    seconds = 3600                # begin no other training after that many seconds of training in all
    steps = 200                   # of every training (default: the recipe's)
    model = "convwave"            # as in `convwave train`; also: device
    split = "held-out"            # where the loss is from: a tenth of the training split's names, the only choice
    prune_at = [50, 100]          # steps after which a training worse than the median of the others ends

    [parameters]                  # any field of a recipe, and the recipe itself
    adam_lr = [0.03, 0.05, 0.08]  # values
    lr = { low = 0.05, high = 0.5, log = true }   # or a range, for random and tpe

    [[variants]]                  # instead of parameters: the recipe as it is, then with these changes, one by one
    adam_lr = 0.02
    steps = 500

A trial is one training: a configuration, that is a value for every parameter, with one seed.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convwave.train.config import MODELS, Config, UsageError
from convwave.train.recipes import RECIPES, Recipe, named, read_recipe, vary

if TYPE_CHECKING:
    from convwave.data.packing import Corpus

SAMPLERS = ("grid", "random", "tpe")
HELD_OUT = 0.1  # of the distinct names of the training split
_MOST = 1_000_000  # trials
_WHOLE = {entry.name for entry in fields(Recipe) if entry.type == "int"}
_LISTS = ("seeds", "prune_at", "variants")
_FIELDS = [entry.name for entry in fields(Recipe) if entry.name != "name"]


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included; evenly over their logarithms where `log`."""

    low: float
    high: float
    log: bool = False


class Pair(NamedTuple):
    """What a trial trains: a configuration's parameters by name, and a seed."""

    parameters: dict[str, Any]
    seed: int

    @property
    def key(self) -> str:
        """The same for the same configuration and seed."""
        return json.dumps([self.parameters, self.seed], sort_keys=True)


@dataclass(frozen=True)
class Plan:
    """A sweep, as its file says; see the top of this file.

    Attributes:
        recipe: that parameters vary.
        parameters: by name, values or a range; with variants, all values that occur.
        variants: configurations of a grid that is not all combinations; empty otherwise.
    """

    recipe: Recipe
    model: str = "convwave"
    steps: int | None = None
    seeds: tuple[int, ...] = (0,)
    sampler: str = "grid"
    trials: int | None = None
    seconds: float | None = None
    split: str = "held-out"
    prune_at: tuple[int, ...] = ()
    device: str = "cpu"
    parameters: dict[str, tuple[Any, ...] | Range] = field(default_factory=dict)
    variants: tuple[dict[str, Any], ...] = ()

    @property
    def number(self) -> int:
        """How many trials there will be at most."""
        sizes = [len(values) for values in self.parameters.values() if not isinstance(values, Range)]
        every = (len(self.variants) or math.prod(sizes)) * len(self.seeds)
        unlimited = self.trials is not None and len(sizes) < len(self.parameters)
        return self.trials or every if unlimited else min(every, self.trials or every)

    @property
    def own(self) -> dict[str, Any] | None:
        """The recipe's own values of the parameters, with which random and tpe begin; None where they are no choice."""
        values = _own(self.recipe, self.steps)
        own = {name: values[name] for name in self.parameters}
        inside = (
            choice.low <= own[name] <= choice.high if isinstance(choice, Range) else own[name] in choice
            for name, choice in self.parameters.items()
        )
        return own if all(inside) else None

    def pairs(self) -> list[Pair]:
        """All trials of a grid or of random draws, in order: every configuration once, then every one once more."""
        number = -(-self.number // len(self.seeds))
        chosen = itertools.islice(self._grid() if self.sampler == "grid" else self._draws(), number)
        configurations = list(chosen)
        return [Pair(c, seed) for seed in self.seeds for c in configurations][: self.number]

    def _grid(self) -> Iterator[dict[str, Any]]:
        if self.variants:
            return iter(self.variants)
        choices = [values for values in self.parameters.values() if not isinstance(values, Range)]
        return (dict(zip(self.parameters, values, strict=True)) for values in itertools.product(*choices))

    def _draws(self) -> Iterator[dict[str, Any]]:
        """The recipe's own, then configurations drawn at random, none twice; the same ones every time."""
        generator, seen, fruitless = random.Random(0), set[str](), 0
        if self.own is not None:
            seen.add(json.dumps(self.own))
            yield self.own
        while fruitless < 10_000:
            drawn = {name: _draw(values, name in _WHOLE, generator) for name, values in self.parameters.items()}
            key = json.dumps(drawn)
            fruitless = fruitless + 1 if key in seen else 0
            if key not in seen:
                seen.add(key)
                yield drawn

    def config(self, pair: Pair, corpus: Corpus | None = None) -> Config:
        """The training of a trial; steps follow the number of words as in `convwave train`, unless the file says them.

        Raises:
            UsageError: values that do not go together.
        """
        changes = dict(pair.parameters)
        try:
            base = named(changes.pop("recipe", self.recipe))
            steps = {} if self.steps is None else {"steps": self.steps}
            recipe = vary(base, {"name": base.name, **steps, **changes})
        except ValueError as error:
            raise UsageError(str(error)) from None
        config = Config.make(self.model, recipe, seed=pair.seed, device=self.device)
        own = self.steps is not None or "steps" in changes
        return config if corpus is None else config.suited(corpus, steps=not own, keep=False)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        ranges = {name: v._asdict() if isinstance(v, Range) else list(v) for name, v in self.parameters.items()}
        lists = {name: list(getattr(self, name)) for name in _LISTS}
        return {**asdict(self), **lists, "parameters": ranges}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` gave `values` of."""
        parameters = {n: Range(**v) if isinstance(v, dict) else tuple(v) for n, v in values["parameters"].items()}
        lists = {name: tuple(values.get(name, ())) for name in _LISTS}
        return cls(**{**values, **lists, "parameters": parameters, "recipe": Recipe(**values["recipe"])})


def read_plan(path: Path) -> Plan:
    """The sweep in a TOML file.

    Raises:
        UsageError: no such file, not TOML, or what cannot be swept; the message begins with the path.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return _plan(values, path.parent)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # tomllib's, UnicodeDecodeError and UsageError are ValueErrors
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None


def _plan(values: dict[str, Any], folder: Path) -> Plan:
    """Raises ValueError."""
    known = [entry.name for entry in fields(Plan)]
    for name in values:
        if name not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}")
    given = dict(values)
    given["recipe"] = _recipe(given.get("recipe", "fast"), folder)
    for name, choices in (("model", MODELS), ("sampler", SAMPLERS), ("device", None), ("split", ("held-out",))):
        value = given.get(name, Plan.__dataclass_fields__[name].default)
        if not isinstance(value, str) or (choices and value not in choices):
            why = "; the validation split is not for choosing" if name == "split" else ""
            raise ValueError(f"{name}: expected {' or '.join(choices or ['text'])}, got {value!r}{why}")
    for name, least in (("trials", 1), ("steps", 1), ("seconds", 0)):
        if name in given and not _is_number(given[name], whole=name != "seconds", low=least, high=_MOST * 1000):
            raise ValueError(f"{name}: expected a number from {least} on, got {given[name]!r}")
    seeds = given.get("seeds", 1)
    given["seeds"] = tuple(range(seeds)) if _is_number(seeds, True, 1, _MOST) else seeds
    for name, low, high in (("seeds", 0, 2**64 - 1), ("prune_at", 1, 2**31 - 1)):
        many = given.get(name, ())
        if not isinstance(many, list | tuple) or not all(_is_number(value, True, low, high) for value in many):
            expected = "a number of seeds, or a list of seeds" if name == "seeds" else "a list of steps"
            raise ValueError(f"{name}: expected {expected}, got {many!r}")
        if len(set(many)) < len(many) or (name == "seeds" and not many):
            raise ValueError(f"{name}: expected each once, and at least one seed, got {many!r}")
        given[name] = tuple(many) if name == "seeds" else tuple(sorted(many))
    sampler, table = given.get("sampler", "grid"), given.get("parameters", {})
    if not isinstance(table, dict):
        raise ValueError(f"parameters: expected a table, got {table!r}")
    if "variants" in given:
        given["variants"] = _variants(given["variants"], given["recipe"], given.get("steps"))
        if table or sampler != "grid":
            raise ValueError("variants: expected neither parameters nor another sampler than grid beside them")
        names = given["variants"][0]
        table = {name: list(dict.fromkeys(variant[name] for variant in given["variants"])) for name in names}
    given["parameters"] = {name: _choices(name, choice, sampler) for name, choice in table.items()}
    plan = Plan(**given)
    ranged = any(isinstance(choice, Range) for choice in plan.parameters.values())
    if plan.trials is None and (ranged or sampler == "tpe"):
        raise ValueError(f"trials: expected a number, which sampler {sampler!r} needs")
    if plan.number > _MOST:
        raise ValueError(f"parameters: expected at most {_MOST:,} trials, got {plan.number:,}; set trials")
    for parameters in _corners(plan):
        config = plan.config(Pair(parameters, plan.seeds[0]))
        if plan.prune_at and plan.steps is not None and plan.prune_at[-1] >= config.steps:
            raise ValueError(f"prune_at: expected steps before the last, {config.steps}, got {plan.prune_at[-1]}")
    return plan


def _own(recipe: Recipe, steps: int | None) -> dict[str, Any]:
    """The values of a recipe that can be varied."""
    return {**asdict(recipe), "recipe": recipe.name, **({} if steps is None else {"steps": steps})}


def _variants(value: Any, recipe: Recipe, steps: int | None) -> tuple[dict[str, Any], ...]:
    """The recipe's own values of all fields that occur, then those of every variant; raises ValueError."""
    if not isinstance(value, list) or not all(isinstance(variant, dict) for variant in value):
        raise ValueError(f"variants: expected tables [[variants]], got {value!r}")
    checked = [{n: _choices(n, [v], "grid")[0] for n, v in variant.items()} for variant in value]
    own = _own(recipe, steps)
    base = {name: own[name] for name in dict.fromkeys(name for variant in checked for name in variant)}
    configurations = [base, *({**base, **variant} for variant in checked)]
    distinct = {json.dumps(one) for one in configurations}
    if len(distinct) < len(configurations):
        raise ValueError("variants: expected each once, and none that is the recipe itself")
    return tuple(configurations)


def _recipe(value: Any, folder: Path) -> Recipe:
    if isinstance(value, str) and value.endswith(".toml"):
        return read_recipe(folder / value)
    if not isinstance(value, str):
        raise ValueError(f"recipe: expected a name or a .toml file, got {value!r}")
    return named(value)


def _choices(name: str, choice: Any, sampler: str) -> tuple[Any, ...] | Range:
    where = f"parameters.{name}"
    if name not in (*_FIELDS, "recipe"):
        raise ValueError(f"{where}: expected a field of a recipe ({', '.join(_FIELDS)}) or recipe")
    if isinstance(choice, list):
        if not choice or any(not isinstance(value, int | float | str) or isinstance(value, bool) for value in choice):
            raise ValueError(f"{where}: expected a list of numbers or names, got {choice!r}")
        if name == "recipe" and any(value not in RECIPES for value in choice):
            raise ValueError(f"{where}: expected names among {', '.join(RECIPES)}, got {choice!r}")
        values = choice if name in _WHOLE else [float(v) if isinstance(v, int) else v for v in choice]
        if len(set(values)) < len(values):
            raise ValueError(f"{where}: expected each value once, got {choice!r}")
        return tuple(values)
    if not isinstance(choice, dict) or not {"low", "high"} <= choice.keys() <= {"low", "high", "log"}:
        raise ValueError(f"{where}: expected a list of values or {{low, high, log}}, got {choice!r}")
    low, high, log = choice["low"], choice["high"], choice.get("log", False)
    whole = name in _WHOLE
    if not all(_is_number(edge, whole, -math.inf, math.inf) for edge in (low, high)) or not isinstance(log, bool):
        kind = "whole numbers" if whole else "numbers"
        raise ValueError(f"{where}: expected low and high as {kind}, log as true or false, got {choice!r}")
    if not low < high or (log and low <= 0):
        raise ValueError(f"{where}: expected low < high{' and above 0 for log' if log else ''}, got {choice!r}")
    if sampler == "grid":
        raise ValueError(f"{where}: expected a list of values; a range needs sampler random or tpe")
    return Range(low, high, log) if whole else Range(float(low), float(high), log)


def _corners(plan: Plan) -> Iterator[dict[str, Any]]:
    """Configurations that hold every value and both ends of every range, to find at once what cannot be trained."""
    if plan.variants:
        yield from plan.variants
        return
    choices = {n: (v.low, v.high) if isinstance(v, Range) else v for n, v in plan.parameters.items()}
    for turn in range(max((len(values) for values in choices.values()), default=1)):
        yield {name: values[turn % len(values)] for name, values in choices.items()}


def _is_number(value: Any, whole: bool, low: float, high: float) -> bool:
    kinds = int if whole else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high


def _draw(values: tuple[Any, ...] | Range, whole: bool, generator: random.Random) -> Any:
    if not isinstance(values, Range):
        return generator.choice(values)
    low, high, log = values
    if whole:  # each whole number owns the unit around it
        low, high = low - 0.5, high + 0.5
    drawn = math.exp(generator.uniform(math.log(low), math.log(high))) if log else generator.uniform(low, high)
    return min(max(round(drawn), int(values.low)), int(values.high)) if whole else min(max(drawn, low), high)


def held_out(names: list[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """A tenth of the distinct names, with all their repeats, held out of the rest; (rest, held out), in their order.

    Raises:
        UsageError: too few names.
    """
    distinct = sorted(set(names))
    random.Random(seed).shuffle(distinct)
    held = set(distinct[: round(HELD_OUT * len(distinct))])
    rest, out = [n for n in names if n not in held], [n for n in names if n in held]
    if not out or not rest:
        raise UsageError(f"data: expected at least 5 distinct names to train on, to hold some out, got {len(distinct)}")
    return rest, out
