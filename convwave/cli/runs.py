"""The commands about runs: ``runs`` and ``plot``. What needs torch is imported when they run."""

from __future__ import annotations

import argparse
import operator
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from convwave.runs.folder import METRICS_FILE
from convwave.runs.registry import Entry, curves, differences, entry, list_runs
from convwave.train.config import UsageError

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}


def runs(args: argparse.Namespace) -> None:
    """``convwave runs``."""
    if args.action == "list":
        if args.runs:
            raise UsageError(f"runs: expected list, show or compare, got {args.runs[0]!r}")
        return _list(args)
    least = 1 if args.action == "show" else 2
    if len(args.runs) < least or (args.action == "show" and len(args.runs) > 1):
        raise UsageError(f"runs {args.action}: expected {'one run' if least == 1 else 'two runs or more'}")
    found = [_entry(name, args.dir) for name in args.runs]
    return _show(args, found[0]) if args.action == "show" else _compare(args, found)


def _list(args: argparse.Namespace) -> None:
    from convwave.cli.console import number, print_json, stderr, table

    found = [run for run in list_runs(args.dir) if all(_holds(run, condition) for condition in args.where)]
    found.sort(key=lambda run: _order(_value(run, args.sort)), reverse=args.reverse)
    rows = [
        [
            str(run.path),
            run.state,
            run.settings["recipe"] if run.config["model"] == "convwave" else run.config["model"],
            Path(run.data or "-").name,
            "-" if run.parameters is None else f"{run.parameters:,}",
            f"{run.config['steps']:,}" if run.state == "finished" else f"{run.done:,} of {run.config['steps']:,}",
            *(number(loss) for loss in (run.train_loss, run.val_loss, run.novel_val_loss)),
            number(run.seconds, 1),
            f"{datetime.fromtimestamp(run.changed):%Y-%m-%d %H:%M}",
        ]
        for run in found
    ]
    columns = [
        "run",
        "state",
        "recipe",
        "data",
        "parameters",
        "steps",
        "train",
        "val",
        "novel val",
        "seconds",
        "changed",
    ]
    stderr().print(table(f"{len(found)} runs in {args.dir} (loss in nats)", columns, rows))
    print_json(args, {"runs": [_json(run) for run in found]})


def _show(args: argparse.Namespace, run: Entry) -> None:
    from convwave.cli.console import print_json, stderr, table

    values = {**_json(run), **run.settings}
    for name in ("config", "recipe_fields"):
        values.pop(name, None)
    stderr().print(table(str(run.path), ["", ""], [[name, str(value)] for name, value in values.items()]))
    print_json(args, _json(run))


def _compare(args: argparse.Namespace, found: list[Entry]) -> None:
    from convwave.cli.console import number, print_json, stderr, table
    from convwave.runs.plots import comparison_plot, drawn

    names = _names(found)
    differs = differences(found)
    rows = [[name, *(str(value) for value in values)] for name, values in differs.items()]
    rows += [["state", *(run.state for run in found)]]
    for name in ("train_loss", "val_loss", "novel_val_loss", "seconds"):
        rows.append([name, *(number(getattr(run, name)) for run in found)])
    console, picture = stderr(), args.out or args.dir / "compare.png"
    if picture.suffix not in (".png", ".svg"):
        raise UsageError(f"--out: expected a .png or .svg file, got {picture}")
    console.print(table("What differs, and what came of it", ["", *names], rows))
    drawn_runs = {name: curves(run.path) for name, run in zip(names, found, strict=True)}
    drawn_runs = {name: curve for name, curve in drawn_runs.items() if curve[0]}
    note = drawn(picture, lambda: comparison_plot(drawn_runs, picture)) if drawn_runs else None
    if len(drawn_runs) < len(found):
        console.print(f"note: no {METRICS_FILE} in {', '.join(sorted(set(names) - drawn_runs.keys()))}")
    if drawn_runs:
        console.print(note or f"curves {picture}")
    print_json(args, {"differences": differs, "runs": [_json(run) for run in found], "picture": str(picture)})


def plot(args: argparse.Namespace) -> None:
    """``convwave plot``."""
    run = _entry(str(args.folder), args.folder.parent)
    from convwave.cli.console import print_json, stderr
    from convwave.cli.model import load_network
    from convwave.runs import plots
    from convwave.runs.metrics import read_metrics

    path, model = load_network(run.path, args.data)
    out: Path = args.out or run.path / "plots"
    losses, validation = curves(run.path)
    looks = [(r["step"], r["diagnostics"]) for r in read_metrics(run.path / METRICS_FILE) if "diagnostics" in r]
    title = f"{run.config['model']}, recipe {run.settings['recipe']}"
    pictures: dict[str, Callable[[Path], None]] = {}
    if losses:
        val = run.val_loss if run.state == "finished" else None
        pictures["loss"] = lambda file: plots.loss_plot(plots.block_means(losses), file, title, validation, val)
    if looks:
        levels = [(step, look["levels"]) for step, look in looks]
        pictures["activations"] = lambda file: plots.activations_plot(levels, file)
        pictures["updates"] = lambda file: plots.updates_plot(looks, file)
    points, shares = _principal(model.embedding.weight)
    symbols = model.vocabulary.symbols if model.vocabulary else [str(i) for i in range(model.vocab_size)]
    pictures["embedding"] = lambda file: plots.embedding_plot(points, symbols, shares, file)
    taps = [list(block.conv.weight.detach().cpu().permute(2, 0, 1).numpy()) for block in model.layers]
    pictures["taps"] = lambda file: plots.taps_plot(taps, file)
    files = {name: [out / f"{name}.{kind}" for kind in ("png", "svg")] for name in pictures}
    console = stderr()
    for name, draw in pictures.items():
        notes = [plots.drawn(file, partial(draw, file)) for file in files[name]]
        console.print(next((note for note in notes if note), ", ".join(map(str, files[name]))))
    if not looks:
        console.print(
            "note: no diagnostics: 'convwave train --diagnostics' writes what activations and updates are drawn from"
        )
    print_json(
        args, {"run": str(run.path), "network": str(path), "pictures": {n: list(map(str, f)) for n, f in files.items()}}
    )


def _principal(embedding: Any) -> tuple[list[tuple[float, float]], tuple[float, float]]:
    """Rows (V, E) at their first two principal components, and the components' shares of the variance."""
    import torch

    centred = embedding.detach().cpu().double()
    centred = centred - centred.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    u, s = torch.nn.functional.pad(u, (0, 1)), torch.nn.functional.pad(s, (0, 1))  # an embedding of one channel has one
    variance = s.square() / s.square().sum().clamp(min=1e-300)
    return [tuple(row) for row in (u * s)[:, :2].tolist()], (float(variance[0]), float(variance[1]))


def _entry(name: str, folder: Path) -> Entry:
    for path in (Path(name), folder / name):
        found = entry(path)
        if found is not None:
            return found
    raise UsageError(f"run: {name} holds no run")


def _names(found: list[Entry]) -> list[str]:
    """What to call runs: the names of their folders where these differ."""
    names = [run.path.resolve().name for run in found]
    return names if len(set(names)) == len(names) else [str(run.path) for run in found]


def _json(run: Entry) -> dict[str, Any]:
    return {**asdict(replace(run, path=Path())), "path": str(run.path)}


def _value(run: Entry, name: str) -> Any:
    try:
        return run.value(name)
    except KeyError:
        raise UsageError(f"{name!r}: expected one of {', '.join(sorted({**run.settings, **_json(run)}))}") from None


def _order(value: Any) -> tuple[int, Any]:
    """Numbers, then text, then what is not there."""
    if value is None:
        return 2, 0
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _holds(run: Entry, condition: str) -> bool:
    """Whether ``FIELD=VALUE``, or with another comparison, is true of a run; a value that is not there is no number."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*", condition)
    if match is None:
        raise UsageError(f"--where: expected FIELD=VALUE or another comparison, got {condition!r}")
    name, sign, text = match.groups()
    found = _value(run, name)
    try:
        wanted, found = float(text), float("nan") if found is None else float(found)
    except (TypeError, ValueError):
        if sign not in ("=", "!="):
            raise UsageError(f"--where: {name} {sign}: expected a number, got {text!r}") from None
        return bool(_COMPARE[sign](str(found), text))
    return bool(_COMPARE[sign](found, wanted))
