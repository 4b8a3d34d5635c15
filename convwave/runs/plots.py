"""Pictures: the loss curve of a run, and the post's networks next to ours. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
    curve: Sequence[Block], path: Path, title: str, validation: Sequence[Point] = (), val: float | None = None
) -> None:
    """Draw the curve of one run to a PNG, with the validation losses measured on the way and `val`, of its network."""
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
    size = curve[0].last_step
    axes.set(
        title=title,
        xlabel=f"step (mean of {size})" if size > 1 else "step",
        ylabel="cross-entropy (nats)",
    )
    axes.legend(frameon=False)
    _save(figure, path)


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
    _save(figure, path)


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
