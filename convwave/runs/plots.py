"""Pictures of runs: losses, diagnostics, weights. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from convwave.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2563eb", "#d97706", "#6b7280"


class Block(NamedTuple):
    """Consecutive steps averaged into one point."""

    last_step: int
    mean_loss: float


class Point(NamedTuple):
    """The validation loss after a step."""

    step: int
    loss: float


def block_means(losses: Sequence[float], blocks: int = 200) -> list[Block]:
    """Average the losses over about `blocks` equal blocks of steps (1,000 steps each for the post's recipe)."""
    size = max(1, len(losses) // blocks)
    starts = range(0, len(losses), size)
    return [Block(min(i + size, len(losses)), sum(losses[i : i + size]) / len(losses[i : i + size])) for i in starts]


def loss_csv(curve: Sequence[Block]) -> str:
    """The curve as text: a header line, then last step and mean loss of every block."""
    return "step,loss\n" + "".join(f"{block.last_step},{block.mean_loss:.6f}\n" for block in curve)


def drawn(path: Path, draw: Callable[[], None]) -> str | None:
    """Draw a picture; says in a line why that is impossible.

    A picture is the last that a command writes: settings, fonts or a missing LaTeX can break matplotlib with any
    exception, and the figures count without it.
    """
    try:
        draw()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"note: {path} was not drawn: {type(error).__name__}: {reason}"
    return None


def loss_plot(
    curve: Sequence[Block],
    path: Path,
    title: str,
    validation: Sequence[Point] = (),
    val: float | None = None,
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draw the curve of one run, with the validation losses measured on the way, and `val`, of its network.

    Args:
        levels: losses to draw as lines, by what they are.
    """
    figure, axes = _axes()
    axes.plot([b.last_step for b in curve], [b.mean_loss for b in curve], color=BLUE, linewidth=1.2, label="training")
    if validation:
        axes.plot(
            [p.step for p in validation],
            [p.loss for p in validation],
            "o-",
            color=ORANGE,
            markersize=3,
            linewidth=1,
            label="validation",
        )
    if val is not None:
        axes.axhline(val, color=ORANGE, linewidth=1, linestyle="--", label=f"validation of the network kept: {val:.4f}")
    for grey, (name, loss) in zip((GREY, "#111827"), (levels or {}).items(), strict=False):
        axes.axhline(loss, color=grey, linewidth=1, linestyle=":", label=f"{name}: {loss:.4f}")
    axes.set_ylim(*_limits(curve, [*(p.loss for p in validation), *(levels or {}).values()]))
    size = curve[0].last_step
    axes.set(
        title=title,
        xlabel=f"step (mean of {size})" if size > 1 else "step",
        ylabel="cross-entropy (nats)",
    )
    axes.legend(frameon=False)
    save_figure(figure, path)


def comparison_plot(runs: Mapping[str, tuple[Sequence[float], Sequence[Point]]], path: Path) -> None:
    """Draw the curves of several runs in one picture, training left and validation right.

    Args:
        runs: by name, the loss of every step, and the validation losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    palette = colours(len(runs))
    limits: list[float] = []
    for colour, (name, (losses, validation)) in zip(palette, runs.items(), strict=True):
        curve = block_means(losses)
        left.plot([b.last_step for b in curve], [b.mean_loss for b in curve], color=colour, linewidth=1.1, label=name)
        measured = [p.loss for p in validation]
        right.plot([p.step for p in validation], measured, "o-", color=colour, markersize=3, label=name)
        limits += _limits(curve, measured)
    left.set_ylim(min(limits), max(limits))
    left.set(title="training", xlabel="step", ylabel="cross-entropy (nats)")
    right.set(title="validation", xlabel="step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    right.legend(frameon=False)
    save_figure(figure, path)


def activations_plot(looks: Sequence[tuple[int, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draw what the levels put out over a training: per level, its histogram at every look and the saturated share.

    Args:
        looks: steps, each with the ``levels`` of its diagnostics.
    """
    from matplotlib.figure import Figure

    levels = len(looks[0][1])
    figure = Figure(figsize=(10, 0.5 + 2.6 * levels), layout="constrained")
    grid = figure.subplots(levels, 2, squeeze=False, width_ratios=[3, 2])
    steps = [step for step, _ in looks]
    for level in reversed(range(levels)):
        left, right = grid[levels - 1 - level]
        found = [of_levels[level] for _, of_levels in looks]
        image = left.imshow(
            [list(column) for column in zip(*(look["histogram"] for look in found), strict=True)],
            origin="lower",
            aspect="auto",
            extent=(-0.5, len(steps) - 0.5, -1, 1),
            cmap="viridis",
        )
        figure.colorbar(image, ax=left, label="share")
        every = max(1, len(steps) // 8)
        left.set(title=f"level {level}: activations", ylabel="value", xlabel="step")
        left.set_xticks(range(0, len(steps), every), [str(step) for step in steps[::every]])
        right.plot(steps, [100 * look["saturated"] for look in found], "o-", color=ORANGE, markersize=3)
        title = f"saturated; dead channels: {found[-1]['dead']}"
        right.set(title=title, ylabel="|value| > 0.97 (%)", xlabel="step", ylim=(0, None))
        right.spines[["top", "right"]].set_visible(False)
        right.grid(alpha=0.25)
    save_figure(figure, path)


def updates_plot(looks: Sequence[tuple[int, Mapping[str, Any]]], path: Path) -> None:
    """Draw update ratios and gradient norms of every parameter over a training.

    Args:
        looks: steps, each with its diagnostics.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, names = [step for step, _ in looks], list(looks[0][1]["gradient_norm"])
    for colour, name in zip(colours(len(names)), names, strict=True):
        for axes, kind in ((left, "update_ratio"), (right, "gradient_norm")):
            # nan leaves a gap: the first update of a parameter that was 0
            values = [look[kind].get(name) or float("nan") for _, look in looks]
            axes.plot(steps, values, "o-", color=colour, markersize=3, linewidth=1.1, label=name)
    left.axhline(1e-3, color=GREY, linewidth=1, linestyle="--")
    left.set(title="update over parameter (norms); dashed: 1e-3", xlabel="step", yscale="log")
    right.set(title="norm of the gradient", xlabel="step", yscale="log")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    right.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, path)


def embedding_plot(
    points: Sequence[tuple[float, float]], symbols: Sequence[str], shares: tuple[float, float], path: Path
) -> None:
    """Draw the letters at the first two principal components of their embeddings.

    Args:
        points: per symbol.
        symbols: their letters.
        shares: of the variance, of the two components.
    """
    figure, axes = _axes((6, 6))
    axes.scatter([x for x, _ in points], [y for _, y in points], s=260, color="#dbeafe", edgecolors=BLUE, alpha=0.6)
    for symbol, (x, y) in zip(symbols, points, strict=True):
        axes.text(x, y, symbol, ha="center", va="center", parse_math=False)
    first, second = shares
    axes.set(
        title="embedding",
        xlabel=f"first principal component ({100 * first:.0f} % of the variance)",
        ylabel=f"second ({100 * second:.0f} %)",
    )
    axes.margins(0.1)
    save_figure(figure, path)


def taps_plot(levels: Sequence[Sequence[Any]], path: Path) -> None:
    """Draw the convolution weights: a row of pictures a level, one a tap, the oldest left.

    Args:
        levels: per level and tap, (H, C) numbers.
    """
    from matplotlib.figure import Figure

    most = max(len(taps) for taps in levels)
    figure = Figure(figsize=(2.2 + 3.4 * most, 3.1 * len(levels)), layout="constrained")
    grid = figure.subplots(len(levels), most, squeeze=False)
    for level, taps in enumerate(levels):
        row = grid[len(levels) - 1 - level]
        limit = max(abs(float(edge)) for tap in taps for edge in (tap.min(), tap.max()))
        for number, (axes, tap) in enumerate(zip(row, taps, strict=False)):
            image = axes.imshow(tap, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
            name = "older" if number == 0 else "newer" if number == len(taps) - 1 else f"{number + 1}."
            axes.set(title=f"level {level}, {name} tap", xlabel="channel below", ylabel="channel")
        for axes in row[len(taps) :]:
            axes.axis("off")
        figure.colorbar(image, ax=list(row), label="weight")
    save_figure(figure, path)


def reproduction_plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw published and obtained validation losses side by side, and the seconds that each training took, to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [str(row["title"]) for row in rows]
    places = range(len(rows))
    for row, y in zip(rows, places, strict=True):
        if row["published_val"] is not None:
            left.plot([row["published_val"]], [y], "o", color=GREY, label="the post" if y == 0 else None)
        left.plot([row["val_loss"]], [y], "D", color=BLUE, label="obtained" if y == 0 else None)
    left.set(title="validation loss (nats)", yticks=list(places), yticklabels=names)
    left.legend(frameon=False, loc="lower right")
    seconds = [float(str(row["train_seconds"])) for row in rows]
    right.barh(list(places), seconds, color=[BLUE if row["model"] == "convwave" else GREY for row in rows])
    for y, value in zip(places, seconds, strict=True):
        right.annotate(f"{value:.1f} s", (value, y), xytext=(4, 0), textcoords="offset points", va="center")
    right.set(title="training time (s)", yticks=[], xlim=(0, max(seconds) * 1.25))
    for axes in (left, right):
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top, both sides level
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _limits(curve: Sequence[Block], others: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis for a curve without its first twentieth, which would squeeze the rest, and other losses."""
    shown = [b.mean_loss for b in curve[len(curve) // 20 :]] + list(others)
    margin = 0.05 * (max(shown) - min(shown)) or 0.05
    return min(shown) - margin, max(shown) + margin


def colours(number: int) -> list[Any]:
    """Colours to tell that many lines apart."""
    from matplotlib import colormaps

    return [colormaps["tab10"](i) if number <= 10 else colormaps["turbo"](i / (number - 1)) for i in range(number)]


def _axes(size: tuple[float, float] = (7, 4)) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG or an SVG, by the file's name; two pictures of the same figures are the same bytes."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "convwave"}):
        svg = path.suffix == ".svg"
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata={"Date": None} if svg else None)
    write_atomic(path, buffer.getvalue())
