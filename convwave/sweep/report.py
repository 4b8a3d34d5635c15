"""What a sweep shows: a table of its configurations against a baseline, what matters, and pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from convwave.runs.plots import BLUE, GREY, ORANGE, colours, save_figure
from convwave.sweep.plan import Plan, Range
from convwave.sweep.statistics import Comparison, Estimate, compare, estimate
from convwave.sweep.study import RESULTS, Row
from convwave.train.config import UsageError


class Line(NamedTuple):
    """A configuration of a sweep.

    Attributes:
        parameters: its values.
        losses: held-out, by seed, of the trainings that are complete.
        loss: over seeds; None where no training is complete.
        seconds, cpu_seconds: of a training, medians.
        states: how many trainings are complete, pruned, diverged.
        comparison: with the baseline; None for the baseline itself and where there is no loss.
    """

    parameters: dict[str, Any]
    losses: dict[int, float]
    loss: Estimate | None
    seconds: float
    cpu_seconds: float
    states: dict[str, int]
    comparison: Comparison | None


class Report(NamedTuple):
    """A sweep's answers.

    Attributes:
        lines: the baseline first, then by mean loss.
        comparisons: how many were made, for which p is corrected.
        importance: by parameter, shares that sum to 1; empty where there are too few trials.
    """

    plan: Plan
    rows: list[Row]
    lines: list[Line]
    comparisons: int
    importance: dict[str, float]


def read_results(path: Path) -> tuple[Plan, list[Row]]:
    """The plan and the trials in a sweep's JSON.

    Raises:
        UsageError: no such file, or another kind of file.
    """
    try:
        content = json.loads(path.read_bytes())
        return Plan.from_json(content["plan"]), [Row(**row) for row in content["trials"]]
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: is not a sweep's {RESULTS}: {' '.join(str(error).split())[:200]}") from None


def make_report(plan: Plan, rows: Sequence[Row], baseline: dict[str, Any] | None = None) -> Report:
    """Answers from results.

    Args:
        plan: of the sweep.
        rows: its results.
        baseline: values of some parameters that pick the configuration to compare with; None is the recipe's own
            values, or where they were not tried the first configuration of the best loss.

    Raises:
        UsageError: no result yet, or not one configuration has these values.
    """
    if not any(row.loss is not None for row in rows):
        raise UsageError("report: no trial is complete yet")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps(row.parameters, sort_keys=True), []).append(row)
    lines = [_line(group) for group in groups.values()]
    done = [line for line in lines if line.loss is not None]
    first = _baseline(plan, done, baseline)
    # a configuration of which some seeds were pruned has lost its worst ones
    others = [line for line in done if line is not first and not line.states["pruned"]]
    comparisons = dict(zip(map(id, others), compare([line.losses for line in others], first.losses), strict=True))
    lines = [line._replace(comparison=comparisons.get(id(line))) for line in lines]
    lines.sort(key=lambda line: (line.parameters != first.parameters, line.loss.mean if line.loss else math.inf))
    return Report(plan, list(rows), lines, len(others), importance(plan, rows))


def _line(group: list[Row]) -> Line:
    losses = {row.seed: row.loss for row in group if row.loss is not None}
    states = {state: sum(row.state == state for row in group) for state in ("complete", "pruned", "diverged")}
    times = [
        sorted(getattr(row, name) for row in group if row.state == "complete") for name in ("seconds", "cpu_seconds")
    ]
    seconds, cpu_seconds = (values[len(values) // 2] if values else math.nan for values in times)
    loss = estimate(list(losses.values())) if losses else None
    return Line(group[0].parameters, losses, loss, seconds, cpu_seconds, states, None)


def _baseline(plan: Plan, lines: list[Line], asked: dict[str, Any] | None) -> Line:
    if asked is not None:
        found = [line for line in lines if all(line.parameters.get(name) == value for name, value in asked.items())]
        if len(found) != 1:
            raise UsageError(f"--baseline: expected one configuration, {len(found)} have {asked}")
        return found[0]
    own = [line for line in lines if line.parameters == plan.own]
    return own[0] if own else min(lines, key=lambda line: line.loss.mean if line.loss else math.inf)


def importance(plan: Plan, rows: Sequence[Row]) -> dict[str, float]:
    """How much each parameter decides whether a trial is among the better ones: Optuna's PED-ANOVA over all trials."""
    import optuna

    from convwave.sweep.study import distribution

    done = [row for row in rows if row.loss is not None]
    varied = {n: v for n, v in plan.parameters.items() if len({json.dumps(r.parameters[n]) for r in done}) > 1}
    if len(varied) < 2 or len(done) < 10:
        return {}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    for row in done:
        params = {name: row.parameters[name] for name in varied}
        distributions = {name: distribution(name, values) for name, values in varied.items()}
        study.add_trial(optuna.trial.create_trial(value=row.loss, params=params, distributions=distributions))
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def sentence(line: Line, comparisons: int) -> str:
    """A configuration against the baseline in words."""
    found = line.comparison
    if found is None or found.difference is None:
        return "not compared: " + ", ".join(
            f"{n} {state}" for state, n in line.states.items() if n and state != "complete"
        )
    if found.told:
        return "better" if found.difference.mean < 0 else "worse"
    if found.more_seeds is None:
        one = found.difference.deviation is None
        return "not distinguishable" + (": one seed tells nothing" if one else ": 10,000 seeds would not tell")
    return f"not distinguishable: {found.more_seeds:,} more seeds would tell"


def report_values(report: Report) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        "plan": report.plan.to_json(),
        "comparisons": report.comparisons,
        "correction": "Holm",
        "importance": report.importance,
        "configurations": [
            {
                "parameters": line.parameters,
                "seeds": list(line.losses),
                "loss": line.loss and line.loss._asdict(),
                "seconds": None if math.isnan(line.seconds) else line.seconds,
                "cpu_seconds": None if math.isnan(line.cpu_seconds) else line.cpu_seconds,
                **line.states,
                "difference": line.comparison and line.comparison.difference and line.comparison.difference._asdict(),
                "p": line.comparison and line.comparison.p,
                "more_seeds": line.comparison and line.comparison.more_seeds,
                "verdict": "baseline" if number == 0 else sentence(line, report.comparisons),
            }
            for number, line in enumerate(report.lines)
        ],
    }


def slices_plot(report: Report, path: Path) -> None:
    """Draw loss over each parameter: every trial a point, a line at the baseline, the mean of each value of a list."""
    from matplotlib.figure import Figure

    names = list(report.plan.parameters)
    done = [row for row in report.rows if row.loss is not None]
    columns = min(3, len(names))
    high = -(-len(names) // columns)
    figure = Figure(figsize=(1 + 3.6 * columns, 0.4 + 3.1 * high), layout="constrained")
    grid = figure.subplots(high, columns, squeeze=False, sharey=True).flatten()
    base = report.lines[0].parameters
    for axes, name in zip(grid, names, strict=False):
        values, choices = [row.parameters[name] for row in done], report.plan.parameters[name]
        if isinstance(choices, Range):
            places, mark = values, base[name]
            if choices.log:
                ends = math.log(choices.low), math.log(choices.high)
                ticks = [float(f"{math.exp(ends[0] + (ends[1] - ends[0]) * i / 3):.1g}") for i in range(4)]
                axes.set_xscale("log")
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
        else:
            places, mark = [choices.index(value) for value in values], choices.index(base[name])
            axes.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            means = [
                [r.loss for r in done if r.parameters[name] == choice and r.loss is not None] for choice in choices
            ]
            tried = [(place, sum(losses) / len(losses)) for place, losses in enumerate(means) if losses]
            axes.plot(*zip(*tried, strict=True), "_", color=ORANGE, markersize=22, markeredgewidth=2)
        axes.axvline(mark, color=GREY, linewidth=0.8, linestyle="--")
        axes.plot(places, [row.loss for row in done], "o", color=BLUE, markersize=4, alpha=0.5)
        share = report.importance.get(name)
        axes.set(title=name if share is None else f"{name} ({100 * share:.0f} % of the importance)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel("held-out loss (nats)")
    for axes in grid[len(names) :]:
        axes.axis("off")
    _focus(grid[0], [row.loss for row in done if row.loss is not None])
    save_figure(figure, path)


def differences_plot(report: Report, path: Path, most: int = 25) -> None:
    """Draw the paired difference of each configuration to the baseline with its 95 % interval, the best on top."""
    from matplotlib.figure import Figure

    lines = [line for line in report.lines[1:] if line.comparison and line.comparison.difference][:most]
    names = [described(line.parameters) for line in lines]
    width = 6 + 0.07 * max(map(len, names), default=0)  # inches, with the names
    figure = Figure(figsize=(width, 1.3 + 0.28 * max(1, len(lines))), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(lines):
        assert line.comparison is not None
        found = line.comparison.difference
        assert found is not None
        colour = (BLUE if found.mean < 0 else ORANGE) if line.comparison.told else GREY
        low, high = (found.mean, found.mean) if found.low is None or found.high is None else (found.low, found.high)
        axes.plot([low, high], [place, place], color=colour, linewidth=1.5)
        axes.plot([found.mean], [place], "o", color=colour, markersize=4)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(lines)), names, fontsize="small")
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set(
        title="difference to the baseline; grey: not distinguishable (5 %, Holm)",
        xlabel="held-out loss less the baseline's of the same seed (nats), 95 % interval",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    figure.supxlabel(f"baseline: {described(report.lines[0].parameters)}", fontsize="small")
    save_figure(figure, path)


def curves_plot(report: Report, path: Path, most: int = 9) -> None:
    """Draw the training loss over the steps of the baseline and the best other configurations, means over seeds."""
    from matplotlib.figure import Figure

    lines = [line for line in report.lines if line.loss is not None][: most + 1]
    figure = Figure(figsize=(9, 5 + 0.2 * len(lines)), layout="constrained")
    axes = figure.subplots()
    lowest, late = math.inf, -math.inf
    for colour, line in zip(colours(len(lines)), lines, strict=True):
        curves = [row.curve for row in report.rows if row.parameters == line.parameters and row.loss is not None]
        steps = [step for step, _ in curves[0]]
        means = [sum(points) / len(points) for points in zip(*([loss for _, loss in c] for c in curves), strict=True)]
        axes.plot(steps, means, color=colour, linewidth=1.2, label=described(line.parameters))
        lowest, late = min(lowest, *means), max(late, means[len(means) // 4])
    axes.set(xlabel="step", ylabel="training loss (nats)", ylim=(lowest - 0.02, late + 0.05))
    figure.legend(frameon=False, fontsize="small", loc="outside lower left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


def described(parameters: dict[str, Any]) -> str:
    """A configuration in a few words."""
    parts = (f"{n} {value:.4g}" if isinstance(value, float) else f"{n} {value}" for n, value in parameters.items())
    return ", ".join(parts) or "the recipe"


def pareto_plot(report: Report, path: Path) -> None:
    """Draw held-out loss against the CPU time of a training, and the configurations that none beats in both."""
    from matplotlib.figure import Figure

    done = [line for line in report.lines if line.loss is not None]
    front = pareto(report)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    means = [line.loss.mean for line in done if line.loss]
    axes.plot(
        [line.cpu_seconds for line in done], means, "o", color=GREY, markersize=4, alpha=0.5, label="configurations"
    )
    edge = [(line.cpu_seconds, line.loss.mean) for line in front if line.loss]
    axes.step(
        *zip(*edge, strict=True), "o-", where="post", color=BLUE, markersize=5, label="none is both quicker and better"
    )
    first = report.lines[0]
    if first.loss is not None:
        axes.plot([first.cpu_seconds], [first.loss.mean], "D", color=ORANGE, markersize=7, label="baseline")
    axes.set(xlabel="CPU seconds of a training", ylabel="held-out loss (nats)")
    _focus(axes, means)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    save_figure(figure, path)


def pareto(report: Report) -> list[Line]:
    """The configurations of which none is as quick and better, the quickest first."""
    done = [line for line in report.lines if line.loss is not None]
    front: list[Line] = []
    for line in sorted(done, key=lambda line: (line.cpu_seconds, line.loss.mean if line.loss else 0)):
        if not front or (line.loss and front[-1].loss and line.loss.mean < front[-1].loss.mean):
            front.append(line)
    return front


def _focus(axes: Any, losses: Sequence[float]) -> None:
    """Show the better nine tenths: a few that failed would squeeze all else."""
    ordered = sorted(losses)
    low, high = ordered[0], ordered[int(0.9 * (len(ordered) - 1))]
    if ordered[-1] > high + 0.5 * (high - low) > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
