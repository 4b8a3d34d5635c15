"""What a run writes while it trains, and who reads it: metrics.jsonl, diagnostics, trackers, `runs` and `plot`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import convwave as cw
from convwave import cli
from convwave.runs.folder import METRICS_FILE
from convwave.runs.metrics import Metrics, last_metrics, read_metrics
from convwave.runs.plots import Point
from convwave.runs.registry import entry, list_runs
from convwave.train.autograd import ConvolutionRun
from convwave.train.config import Config, Diverged, Interrupted, UsageError
from convwave.train.cuda_graph import GraphedRun
from convwave.train.diagnostics import BINS, SATURATED, Diagnostics, default_interval
from convwave.train.loop import train
from convwave.train.recipes import RECIPES
from convwave.train.tiers import begin
from tests.helpers import refusal
from tests.test_training import CONFIGS, StopAfter, same_bits


@pytest.fixture(scope="module")
def few(words: cw.Words) -> cw.Words:
    return words._replace(words=words.words[:400])


def losses_in(path: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(path / METRICS_FILE) if "loss" in record]


def check_metrics(path: Path, losses: list[float], validation: list[Point]) -> None:
    """Every step once and in order, every validation loss once."""
    assert losses_in(path) == list(enumerate(losses, 1))
    records = read_metrics(path / METRICS_FILE)
    assert [(r["step"], r["val_loss"]) for r in records if "val_loss" in r] == [tuple(point) for point in validation]
    assert [r["step"] for r in records] == sorted(r["step"] for r in records)


LONG = [config for config in CONFIGS if config.steps >= 12 and not config.model.startswith("mlp")]


@pytest.mark.parametrize("config", LONG, ids=lambda c: f"{c.model}-{c.recipe.name}-{c.tier}-{c.keep}")
def test_every_step_is_written_once_however_often_a_run_stops(config: Config, few: cw.Words, tmp_path: Path) -> None:
    for stop in (1, 5, 6, config.steps - 1):
        with pytest.raises(Interrupted):
            train(config, few, tmp_path, resume=True, diagnostics=3, reporter=StopAfter(stop))
        assert [step for step, _ in losses_in(tmp_path)] == list(range(1, stop + 1))
    result = train(config, few, tmp_path, resume=True, diagnostics=3)
    check_metrics(tmp_path, result.losses, result.validation)
    looks = [r["step"] for r in read_metrics(tmp_path / METRICS_FILE) if "diagnostics" in r]
    assert looks == sorted({1, *range(3, config.steps + 1, 3)})
    extended = train(replace(config, steps=config.steps + 4), few, tmp_path, resume=True)
    check_metrics(tmp_path, extended.losses, extended.validation)


def test_the_file_is_made_to_agree_with_the_state(tmp_path: Path) -> None:
    """Lines after the state, a line cut short, lines that were lost, others' lines: what is left is the state's."""
    path = tmp_path / METRICS_FILE
    losses, validation = [3.0, 2.5, 2.25, 2.0], [Point(2, 2.6)]
    lines = [
        '{"step": 1, "loss": 3.0, "seconds": 0.5}',
        "",
        '["no record"]',
        '{"step": 2, "loss": 2.75}',  # of another run
        '{"step": 2, "val_loss": 2.6}',
        '{"step": 4, "val_loss": 2.1}',  # measured after the state was saved
        '{"step": 3, "diagnostics": {"levels": []}}',
        '{"step": 4, "loss": 2.0, "seconds": 2.0}',
        '{"step": 5, "loss": 1.9, "seconds": 2.5}',
        '{"step": 5, "diagnostics": {}}',
        '{"step": 4, "state": "diverged", "message": "x"}',
        '{"step": 6, "lo',
    ]
    path.write_text("\n".join(lines))
    metrics = Metrics(path, losses, validation)
    metrics.add({"step": 5, "loss": 1.8})
    metrics.close()
    assert read_metrics(path) == [
        {"step": 1, "loss": 3.0, "seconds": 0.5},
        {"step": 2, "loss": 2.5},
        {"step": 2, "val_loss": 2.6},
        {"step": 3, "loss": 2.25},
        {"step": 3, "diagnostics": {"levels": []}},
        {"step": 4, "loss": 2.0, "seconds": 2.0},
        {"step": 5, "loss": 1.8},
    ]
    assert path.read_text().endswith("\n")


def test_lines_can_be_followed_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late by no more than a moment, and always whole lines."""
    path, now = tmp_path / METRICS_FILE, [0.0]
    monkeypatch.setattr("convwave.runs.metrics.time.perf_counter", lambda: now[0])
    metrics = Metrics(path, [], [])
    for step in range(1, 7):
        now[0] += 0.15
        metrics.add({"step": step, "loss": 1.0})
        assert len(read_metrics(path)) >= step - 1
        assert path.read_text().count("\n") == len(read_metrics(path))
    metrics.close()
    assert len(read_metrics(path)) == 6


def test_the_end_of_a_long_file_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text("".join(f'{{"step": {step}, "loss": 2.0}}\n' for step in range(1, 20_001)))
    last = last_metrics(path)
    assert 300 < len(last) < 10_000
    assert last == read_metrics(path)[-len(last) :]


DIAGNOSED = [*CONFIGS[:-2], Config.make("convwave", "full", steps=4, tier="cpu")]


@pytest.mark.parametrize("config", DIAGNOSED, ids=lambda c: f"{c.model}-{c.recipe.name}-{c.batch}-{c.tier}")
def test_a_training_that_is_looked_at_ends_in_the_same_bits(config: Config, few: cw.Words, tmp_path: Path) -> None:
    plain, watched = train(config, few), train(config, few, tmp_path, diagnostics=2)
    assert watched.losses == plain.losses
    assert same_bits(watched.model.state_dict(), plain.model.state_dict())
    looks = [r["diagnostics"] for r in read_metrics(tmp_path / METRICS_FILE) if "diagnostics" in r]
    assert len(looks) == 1 + config.steps // 2


def test_the_graphed_tier_is_looked_at_too(few: cw.Words, vocab: cw.Vocabulary) -> None:
    config = Config.make("convwave", "full", steps=6, tier="reference")
    packed = cw.pack(few.words, vocab)
    seen: list[dict[str, Any]] = []
    run = Diagnostics(GraphedRun(config, packed, vocab), 2, seen.append)
    assert run.steps(0, 6) == GraphedRun(config, packed, vocab).steps(0, 6)
    assert [record["step"] for record in seen] == [1, 2, 4, 6]


@pytest.mark.parametrize("recipe", ["fast", "sprint", "blog"])
def test_diagnostics_are_what_they_say(recipe: str, few: cw.Words, vocab: cw.Vocabulary) -> None:
    """Against the definition, row by row, with the gradients of autograd; tiers agree up to float32's rounding."""
    packed = cw.pack(few.words, vocab)
    config = Config.make("convwave", recipe, steps=8, batch=50, tier="reference")
    found: list[dict[str, Any]] = []
    reference = ConvolutionRun(config, packed, vocab)
    watched = Diagnostics(ConvolutionRun(config, packed, vocab), 3, found.append)
    for i in range(6):
        before = {name: p.detach().clone() for name, p in reference.net.named_parameters()}
        rows: list[torch.Tensor] = []
        hooks = [
            b.register_forward_hook(lambda m, x, out, rows=rows: rows.append(out.detach()))
            for b in reference.net.layers
        ]
        generator = reference.reader.generator.get_state()
        graph = reference.reader.graph(i)
        reference.reader.generator.set_state(generator)
        loss = reference.step(i)
        for hook in hooks:
            hook.remove()
        assert watched.step(i) == loss
        if i not in (0, 2, 5):
            continue
        look = found[-1]["diagnostics"]
        for name, p in reference.net.named_parameters():
            assert p.grad is not None
            assert look["gradient_norm"][name] == pytest.approx(float(p.grad.norm()), rel=1e-4, abs=1e-7)
            size = float(before[name].norm())
            ratio = float((p.detach() - before[name]).norm()) / size if size else None
            assert look["update_ratio"][name] == (None if ratio is None else pytest.approx(ratio, rel=1e-4))
        for level, h, counts in zip(look["levels"], rows, graph.weights, strict=True):
            repeated = h.double().flatten(), counts.double()[:, None].expand_as(h).flatten()
            total = repeated[1].sum()
            mean = (repeated[0] * repeated[1]).sum() / total
            assert level["mean"] == pytest.approx(float(mean), abs=1e-5)
            deviation = ((repeated[0] - mean).square() * repeated[1]).sum() / total
            assert level["deviation"] == pytest.approx(float(deviation) ** 0.5, rel=1e-5)
            far = repeated[1][repeated[0].abs() > SATURATED].sum() / total
            assert level["saturated"] == pytest.approx(float(far), abs=1e-5)
            edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
            shares = torch.histogram(repeated[0], edges, weight=repeated[1])[0] / total
            assert sum(level["histogram"]) == pytest.approx(1, abs=1e-4)
            difference = (torch.tensor(level["histogram"], dtype=torch.float64) - shares).abs()
            assert float(difference.max()) <= 1e-3, "a value at an edge may fall on either side"


def test_the_tiers_see_the_same(few: cw.Words, vocab: cw.Vocabulary) -> None:
    packed = cw.pack(few.words, vocab)
    looks = {}
    for tier in ("reference", "cpu"):
        seen: list[dict[str, Any]] = []
        Diagnostics(begin(Config.make(steps=5, batch=64, tier=tier), packed, vocab), 5, seen.append).steps(0, 5)
        looks[tier] = seen
    for ours, theirs in zip(looks["cpu"], looks["reference"], strict=True):
        a, b = ours["diagnostics"], theirs["diagnostics"]
        for kind in ("gradient_norm", "update_ratio"):
            values = [{name: value or 0.0 for name, value in look[kind].items()} for look in (a, b)]
            assert values[0] == pytest.approx(values[1], rel=1e-2, abs=1e-6)
        for x, y in zip(a["levels"], b["levels"], strict=True):
            assert x["mean"] == pytest.approx(y["mean"], abs=1e-4)
            assert x["histogram"] == pytest.approx(y["histogram"], abs=2e-3)


def test_a_dead_channel_is_counted(few: cw.Words, vocab: cw.Vocabulary) -> None:
    run = ConvolutionRun(Config.make(batch=32, tier="reference"), cw.pack(few.words, vocab), vocab)
    with torch.no_grad():
        run.net.layers[1].norm.bias[[3, 5]] = torch.tensor([9.0, -9.0])
        run.net.layers[1].norm.bias[7] = 2.0
    seen: list[dict[str, Any]] = []
    Diagnostics(run, 1, seen.append).step(0)
    assert [level["dead"] for level in seen[0]["diagnostics"]["levels"]] == [0, 2, 0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_is_looked_at_seldom(recipe: str) -> None:
    """At its first step and 20 more at most, however long it is, and never twice within 50 steps."""
    for steps in (1, 49, 400, 999, 200_000):
        config = Config.make(recipe=recipe, steps=steps)
        interval = default_interval(config)
        assert 1 + steps // interval <= 21
        assert interval >= 50


def fake_trackio(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    module = ModuleType("trackio")
    module.init = lambda **options: calls.append(("init", options))  # type: ignore[attr-defined]
    module.log = lambda values, step: calls.append((step, values))  # type: ignore[attr-defined]
    module.finish = lambda: calls.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", module)
    return calls


def test_trackio_gets_what_is_written(few: cw.Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_trackio(monkeypatch)
    config = Config.make(steps=4, batch=32)
    with pytest.raises(Interrupted):
        train(config, few, tmp_path / "run", reporter=StopAfter(2), track="trackio", diagnostics=4)
    assert calls[0][1]["name"] == "run"
    assert calls[0][1]["config"]["recipe_fields"]["adam_lr"] == 0.03
    assert calls[-1] == "finish"
    result = train(config, few, tmp_path / "run", resume=True, track="trackio", diagnostics=4)
    losses = [(call[0], call[1]["loss"]) for call in calls if isinstance(call[0], int) and "loss" in call[1]]
    assert losses == list(enumerate(result.losses, 1))
    names = {name for call in calls if isinstance(call[0], int) for name in call[1]}
    assert {"val_loss", "gradient_norm/head.weight", "update_ratio/blocks.0.conv.weight", "level2/dead"} <= names


def test_tensorboard_gets_what_is_written(few: cw.Words, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = Config.make(steps=6, batch=32)
    with pytest.raises(Interrupted):
        train(config, few, tmp_path, reporter=StopAfter(2), track="tensorboard")
    result = train(config, few, tmp_path, resume=True, track="tensorboard")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(result.losses)


def test_a_tracker_that_is_not_installed_is_one_line(few: cw.Words, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UsageError, match=r"track: needs trackio, pip install 'convwave\[trackio\]'"):
        train(Config.make(steps=2, batch=32), few, tmp_path / "a", track="trackio")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, few: cw.Words) -> Path:
    """A finished run with diagnostics, one of another rate, an interrupted and a diverged one, and one extended."""
    folder = tmp_path_factory.mktemp("runs")
    data = folder / "few.txt"
    data.write_text("\n".join(few.words))
    words = cw.read_words(data)
    config = Config.make(steps=10, batch=32)
    train(config, words, folder / "a", diagnostics=5)
    train(replace(config, recipe=cw.train.vary(config.recipe, {"adam_lr": 0.2}), seed=1), words, folder / "deep/b")
    with pytest.raises(Interrupted):
        train(config, words, folder / "c", reporter=StopAfter(4))
    hot = cw.train.vary(config.recipe, {"lr": 1e5, "adam_lr": 1e5})
    with pytest.raises(Diverged):
        train(replace(config, recipe=hot, steps=400), words, folder / "d")
    with pytest.raises(Interrupted):
        train(Config.make("mlp3", steps=20), words, folder / "e", reporter=StopAfter(3))
    (folder / "f").mkdir()
    (folder / "f/run.json").write_text("{}")
    return folder


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert cli.main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_runs_are_listed_with_their_states(runs: Path, capsys) -> None:
    found = json_of(["runs", "--dir", str(runs)], capsys)["runs"]
    states = {Path(run["path"]).name: run["state"] for run in found}
    assert states == {"a": "finished", "b": "finished", "c": "interrupted", "d": "diverged", "e": "interrupted"}
    by = {Path(run["path"]).name: run for run in found}
    result = json.loads((runs / "a/result.json").read_text())
    assert (by["a"]["val_loss"], by["a"]["train_loss"]) == (result["val_loss"], result["train_loss"])
    assert (by["c"]["done"], by["e"]["done"]) == (4, 3)
    assert by["c"]["train_loss"] == pytest.approx(sum(loss for _, loss in losses_in(runs / "c")) / 4)
    assert by["c"]["parameters"] == by["a"]["parameters"]
    assert by["c"]["val_loss"] is not None
    times = [run.changed for run in list_runs(runs)]
    assert times == sorted(times)


def test_a_run_under_way_and_one_extended(few: cw.Words, tmp_path: Path) -> None:
    config = Config.make(steps=6, batch=32)
    states = []

    class Look(StopAfter):
        def step(self, done: int, loss: float, positions: int) -> None:
            found = entry(tmp_path)
            states.append(found and found.state)
            super().step(done, loss, positions)

    train(config, few, tmp_path, reporter=Look(0))
    assert set(states) == {"training"}
    assert entry(tmp_path).state == "finished"  # type: ignore[union-attr]
    with pytest.raises(Interrupted):
        train(replace(config, steps=9), few, tmp_path, resume=True, reporter=StopAfter(7))
    assert entry(tmp_path).state == "interrupted"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--sort", "done"], "ecabd"),
        (["--where", "state=finished"], "ab"),
        (["--where", "state!=finished", "--where", "model=convwave"], "cd"),
        (["--where", "adam_lr>0.1"], "bd"),
        (["--where", "seed=1"], "b"),
        (["--where", "recipe = fast"], "ac"),
        (["--where", "steps<=10", "--sort", "adam_lr", "--reverse"], "bca"),
    ],
)
def test_runs_are_sorted_and_filtered(options: list[str], names: str, runs: Path, capsys) -> None:
    found = [Path(run["path"]).name for run in json_of(["runs", "--dir", str(runs), *options], capsys)["runs"]]
    if "--sort" in options and "done" not in options:
        assert found in (list(names), [*names[:1], *reversed(names[1:])])  # equal ones keep an order of their own
    elif "done" in options:
        assert (found[:2], set(found[2:4]) <= set("ab")) == (["e", "c"], True) or found[-1] == "b"
    else:
        assert sorted(found) == sorted(names)


def test_a_run_is_shown_whole(runs: Path, capsys) -> None:
    shown = json_of(["runs", "show", "a", "--dir", str(runs)], capsys)
    assert shown["config"]["recipe"]["adam_lr"] == 0.03
    assert cli.main(["runs", "show", str(runs / "deep/b")]) == 0
    output = capsys.readouterr()
    assert "adam_lr" in output.err
    assert "fast+adam_lr=0.2" in output.err
    assert output.out == ""


def test_runs_are_compared(runs: Path, tmp_path: Path, capsys) -> None:
    picture = tmp_path / "both.svg"
    found = json_of(["runs", "compare", "a", "deep/b", "c", "--dir", str(runs), "--out", str(picture)], capsys)
    assert found["differences"] == {
        "adam_lr": [0.03, 0.2, 0.03],
        "recipe": ["fast", "fast+adam_lr=0.2", "fast"],
        "seed": [0, 1, 0],
    }
    assert picture.read_text().count("training") == 1


def test_a_run_is_drawn(runs: Path, tmp_path: Path, capsys) -> None:
    found = json_of(["plot", str(runs / "a"), "--out", str(tmp_path)], capsys)
    assert found["pictures"].keys() == {"loss", "activations", "updates", "embedding", "taps"}
    for files in found["pictures"].values():
        for file in files:
            content = Path(file).read_bytes()
            assert content.startswith(b"\x89PNG" if file.endswith("png") else b"<?xml")
            assert len(content) > 5000
    assert json_of(["plot", str(runs / "e"), "--out", str(tmp_path / "e")], capsys)["pictures"].keys() == {
        "loss",
        "embedding",
        "taps",
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["runs", "show"], "expected one run"),
        (["runs", "show", "zz"], "zz holds no run"),
        (["runs", "show", "f"], "f holds no run"),
        (["runs", "compare", "a"], "expected two runs or more"),
        (["runs", "compare", "a", "c", "--out", "x.gif"], "expected a .png or .svg file"),
        (["runs", "--sort", "speed"], "'speed': expected one of"),
        (["runs", "--where", "seed"], "--where: expected FIELD=VALUE"),
        (["runs", "--where", "state<x"], "expected a number"),
        (["plot", "nowhere"], "nowhere holds no run"),
        (["train", "--diagnostics", "0"], "expected 1 to"),
        (["train", "--track", "wall"], "invalid choice"),
    ],
)
def test_refusals(arguments: list[str], reason: str, runs: Path, capsys) -> None:
    given = [*arguments, "--dir", str(runs)] if arguments[0] == "runs" else arguments
    assert reason in refusal(given, capsys)


def test_the_posts_losses_are_lines_for_the_posts_data(
    words: cw.Words, few: cw.Words, tmp_path: Path, monkeypatch
) -> None:
    drawn: list[Mapping[str, float]] = []
    monkeypatch.setattr("convwave.runs.folder.loss_plot", lambda *arguments: drawn.append(arguments[-1]))
    train(Config.make(steps=2, batch=32), few._replace(sha256="0" * 64), tmp_path / "a")
    posts = few._replace(sha256=cw.data.words.NAMES_SHA256)
    train(Config.make(steps=2, batch=32), posts, tmp_path / "b")
    assert drawn == [{}, {"the post, training": 1.9113, "the post, validation": 2.0209}]
