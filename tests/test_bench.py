"""The harness cannot be misled: it checks before it times, times in turn, says when it is too noisy, and writes what
it has. The studies' tasks, files and report."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import convwave as cw
from benchmarks import __main__ as command
from benchmarks import harness, report, results
from benchmarks.harness import (
    TIME_UP,
    Competitor,
    Row,
    Settings,
    Unavailable,
    Work,
    compare,
    noise,
    numeric_flags,
    quantiles,
    relative_error,
)
from benchmarks.report import cells, page, write_report
from benchmarks.results import RESULTS, read_documents
from benchmarks.studies import STUDIES, Picture, Plan, Step, Study, breakeven, ladder, names, roofline, train, width
from benchmarks.tasks import BUILD, Network, Stack
from convwave.cli.console import stderr


def at(x: int | None = None, study: str = "names") -> Row:
    """A point of a study in training."""
    return Row(study=study, mode="train", x_name=None if x is None else "names", x=x, device="cpu")


HERE = at()
FAST = Settings(rounds=6, sample_seconds=0.0)  # one call a sample
GPU = Path(report.__file__).with_name("gpu.sh")
TRUTH = {"y": torch.linspace(1, 2, 7, dtype=torch.float64)}


def competitor(name: str, run: Callable[[], Any] = lambda: None, error: float = 0.0, **more: Any) -> Competitor:
    """One whose result has this relative error."""
    result = {"y": (TRUTH["y"] * (1 + error)).float()}
    return name, lambda: Work(run, lambda: result, **more)


def must_not_run() -> None:
    raise AssertionError("was run")


def only(rows: list[Row], provider: str, metric: str = "seconds") -> Row:
    (row,) = (row for row in rows if (row["provider"], row["metric"]) == (provider, metric))
    return row


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Iterator[float]]:
    """Seconds that the next samples take, by what `run` returns."""
    times: dict[str, Iterator[float]] = {}
    monkeypatch.setattr(harness, "sample", lambda run, calls, device: next(times[run()]))
    monkeypatch.setattr(harness, "calls_for", lambda run, settings: 1)
    return times


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def test_quantiles_and_noise() -> None:
    samples = [float(i) for i in range(101)]
    assert quantiles(samples[::-1]) == {"p05": 5, "p25": 25, "median": 50, "p75": 75, "p95": 95}
    assert quantiles([3.0]) == dict.fromkeys(harness.QUANTILES, 3.0)
    assert quantiles([1.0, 2.0])["median"] == 1.5
    assert noise([1.0] * 6) == 0
    assert noise([0.0] * 6) == 0
    assert noise([1.0] * 50 + [1.2] * 50) == pytest.approx(0.2)
    assert noise([1.2] * 50 + [1.0] * 50) == pytest.approx(0.2)  # faster is as bad as slower
    assert noise([1.0, 50.0, 1.0, 1.0, 1.0, 1.0]) == 0  # an outlier does not move a median
    wide = [1.0, 2.0, 3.0, 3.0, 2.0, 1.0] * 2  # the halves agree, yet the median is uncertain
    assert noise(wide) == pytest.approx(1.57 * (3 - 1) / 12**0.5 / 2)
    assert noise([1.0, 9.0, 9.0]) == 0  # too few to say


def test_every_round_times_every_competitor_once_in_an_order_of_its_own() -> None:
    order: list[str] = []
    names = "abc"
    compare([competitor(n, lambda n=n: order.append(n)) for n in names], TRUTH, HERE, FAST, memory=False)
    rounds = ["".join(order[-3 * i : len(order) - 3 * i + 3]) for i in range(1, FAST.rounds + 1)]
    assert all(sorted(played) == list(names) for played in rounds)
    assert len(set(rounds)) > 1


def test_time_rate_and_speed_up_come_from_the_same_samples(clock: dict[str, Iterator[float]]) -> None:
    slower = [1.0, 1.0, 1.0, 3.0, 3.0, 3.0]  # the machine slows down to a third: both alike
    clock["base"], clock["fast"] = iter(2 * s for s in slower), iter(slower)
    pair = [competitor(name, lambda name=name: name) for name in ("base", "fast")]
    rows = compare(pair, TRUTH, HERE, FAST, positions=10, baseline="base", memory=False)
    speedup = only(rows, "fast", "speedup")
    assert (speedup["median"], speedup["noise"], speedup["n"]) == (2.0, 0.0, 6)
    assert only(rows, "fast")["noise"] == pytest.approx(2.0)
    assert only(rows, "base", "positions_per_second")["median"] == pytest.approx(10 / 4)
    assert not [row for row in rows if row["provider"] == "base" and row["metric"] == "speedup"]
    assert only(rows, "base")["noise"] == pytest.approx(2.0)


def test_figures_of_a_row_never_contradict_each_other(clock: dict[str, Iterator[float]]) -> None:
    clock["base"], clock["fast"] = iter([1.0, 9.0, 1.0, 9.0, 9.0, 1.0]), iter([0.1, 0.1, 3.0, 3.0, 0.1, 0.2])
    pair = [competitor("base", lambda: "base", positions=3), competitor("fast", lambda: "fast")]
    rows = compare(pair, TRUTH, HERE, FAST, positions=10, baseline="base", memory=False)
    rates = {name: only(rows, name, "positions_per_second") for name in ("base", "fast")}
    for name, positions in (("base", 3), ("fast", 10)):
        assert rates[name]["median"] == pytest.approx(positions / only(rows, name)["median"])
    speedup = only(rows, "fast", "speedup")
    assert speedup["median"] == pytest.approx(rates["fast"]["median"] / rates["base"]["median"])
    for row in rows:
        assert row["p05"] <= row["p25"] <= row["median"] <= row["p75"] <= row["p95"]  # type: ignore[operator]
    assert speedup["noise"] > harness.TOO_NOISY


def test_rounds_end_with_the_time_but_not_before_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

    def taken(settings: Settings, seconds_a_round: float) -> int:
        count = 0
        for _ in harness.rounds(settings):
            now[0] += seconds_a_round
            count += 1
        return count

    assert taken(Settings(rounds=15, least_rounds=4, seconds=25.0), 10.0) == 4
    assert taken(Settings(rounds=15, least_rounds=1, seconds=25.0), 10.0) == 3
    assert taken(Settings(rounds=15, least_rounds=1, seconds=25.0), 0.1) == 15


# ---------------------------------------------------------------------------------------------------------------------
# Checks


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_who_is_wrong_is_never_timed_and_has_no_speed_up(error: float) -> None:
    rows = compare(
        [competitor("base"), competitor("wrong", must_not_run, error)], TRUTH, HERE, FAST, baseline="base", memory=False
    )
    wrong = only(rows, "wrong")
    assert (wrong["status"], wrong["median"], wrong["n"]) == ("wrong", None, 0)
    assert wrong["bound"] is not None
    assert wrong["bound"] < 1e-5
    assert {row["metric"] for row in rows if row["provider"] == "wrong"} == {"seconds"}


def test_a_wrong_baseline_gives_nobody_a_speed_up() -> None:
    pair = [competitor("right"), competitor("base", must_not_run, 0.01)]
    rows = compare(pair, TRUTH, HERE, FAST, baseline="base", memory=False)
    assert not [row for row in rows if row["metric"] == "speedup"]
    assert only(rows, "right")["median"] is not None


def test_the_bound_is_four_times_the_error_of_the_baseline() -> None:
    errors = {"baseline": 1e-5, "as good": 3.9e-5, "worse": 4.2e-5}
    rows = compare([competitor(n, error=e) for n, e in errors.items()], TRUTH, HERE, FAST, memory=False)
    assert {name: only(rows, name)["status"] for name in errors} == {
        "baseline": "ok",
        "as good": "ok",
        "worse": "wrong",
    }
    (alone,) = compare([competitor("baseline", must_not_run, 1e-3)], TRUTH, HERE, FAST)
    assert alone["status"] == "wrong"  # a baseline is bounded too


def test_other_shapes_and_names_are_wrong() -> None:
    with pytest.raises(ValueError, match="expected shapes"):
        relative_error({"y": torch.ones(3)}, TRUTH)
    with pytest.raises(ValueError, match=r"expected shapes \{'y'"):
        relative_error({"z": torch.ones(7)}, TRUTH)
    odd = ("odd", lambda: Work(must_not_run, lambda: {"y": torch.ones(3)}))
    assert only(compare([odd], TRUTH, HERE, FAST), "odd")["status"] == "wrong"


def test_who_cannot_run_says_why_and_the_others_go_on() -> None:
    def unavailable() -> Work:
        raise Unavailable("is not installed")

    def broken() -> Work:
        raise KeyError("oops")

    trio = [("absent", unavailable), ("broken", broken), competitor("there")]
    rows = compare(trio, TRUTH, HERE, FAST, memory=False)
    assert (only(rows, "absent")["status"], only(rows, "absent")["note"]) == ("not measured", "is not installed")
    assert "KeyError" in only(rows, "broken")["note"]
    assert only(rows, "there")["status"] == "ok"
    late = compare([competitor("late", must_not_run)], TRUTH, HERE, replace(FAST, deadline=0.0))
    assert only(late, "late")["note"] == TIME_UP


def test_numeric_flags_are_everybodys_and_are_put_back() -> None:
    before = harness.flags()
    with numeric_flags("tf32") as dtype:
        assert dtype == torch.float32
        assert harness.flags()["float32_matmul_precision"] == "high"
        assert harness.flags()["cudnn.allow_tf32"]
    assert harness.flags() == before


# ---------------------------------------------------------------------------------------------------------------------
# Clocks of a GPU, without one


def test_on_cuda_graph_replay_and_kernel_time_stand_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run: Callable[[], Any], reason: str) -> Callable[[], Any]:
        if reason:
            raise Unavailable(reason)
        return run

    monkeypatch.setattr(harness, "synchronize", lambda device: None)
    monkeypatch.setattr(harness, "peak_bytes", lambda run, device: 7)
    monkeypatch.setattr(harness, "kernel_seconds", lambda run: 2e-6)
    monkeypatch.setattr(harness, "capture", captured)
    pair = [competitor("plain"), competitor("max-autotune", no_capture="replays CUDA graphs already")]
    rows = compare(pair, TRUTH, HERE, replace(FAST, device="cuda"))
    assert only(rows, "plain", "graph_seconds")["n"] == FAST.rounds
    assert only(rows, "plain", "kernel_seconds")["median"] == 2e-6
    assert only(rows, "plain", "peak_bytes")["median"] == 7
    assert only(rows, "max-autotune", "graph_seconds")["status"] == "not measured"


def test_kernels_are_told_from_annotations() -> None:
    def event(name: str, start: float, us: float, device: str = "CUDA", annotation: bool = False) -> Any:
        span = SimpleNamespace(start=start, elapsed_us=lambda: us)
        kind = SimpleNamespace(name=device)
        return SimpleNamespace(name=name, device_type=kind, time_range=span, is_user_annotation=annotation)

    events = [event("second", 5, 2), event("first", 1, 1), event("graph", 0, 99, annotation=True)]
    events.append(event("aten::mm", 0, 50, device="CPU"))
    assert harness.device_launches(events) == [("first", 1e-6), ("second", pytest.approx(2e-6))]


def test_peak_memory_counts_what_a_run_holds_at_once() -> None:
    def run() -> Tensor:
        for _ in range(3):
            held = torch.empty(2**18)  # a mebibyte, let go before the next
        return held.sum()

    assert 2**20 <= harness.peak_bytes(Work(run, dict), "cpu") < 2.2 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Tasks


@pytest.mark.parametrize("training", [True, False])
def test_all_who_evaluate_the_network_agree(words: cw.Words, training: bool) -> None:
    plan = Plan(words=words.words, quick=True)
    task = Network(plan.names(24), plan.network(6, 8), training, "cpu")
    providers = dict.fromkeys(name for name in names.PROVIDERS + train.PROVIDERS if "triton" not in name)
    rivals = [(name, partial(task.make, name)) for name in providers]
    rows = compare(rivals, task.expected(), HERE, FAST, memory=False)
    status = {row["provider"]: row["status"] for row in rows if row["metric"] == "seconds"}
    assert status.pop("padded Conv1d") == ("not measured" if training else "ok")
    assert set(status.values()) == {"ok"}, status


@pytest.mark.parametrize("training", [True, False])
def test_the_last_windows_alone_are_as_correct_and_count_as_that_many(words: cw.Words, training: bool) -> None:
    plan = Plan(words=words.words, quick=True)
    task = Network(plan.document(60), plan.network(6, 8, 4), training, "cpu", windows=10)
    pair = [(name, partial(task.make, name)) for name in ("windowed MLP", "dense")]
    odd = replace(FAST, rounds=5)  # the median is one of them
    rows = compare(pair, task.expected(), HERE, odd, positions=60, baseline="windowed MLP", memory=False)
    assert {row["status"] for row in rows} == {"ok"}
    rate, seconds = (only(rows, "windowed MLP", metric) for metric in ("positions_per_second", "seconds"))
    assert rate["median"] == pytest.approx(10 / seconds["median"])
    wrong = Network(plan.document(60), plan.network(6, 8, 4), training, "cpu")
    few, all_of_them = (one.make("windowed MLP") for one in (task, wrong))
    mixed = replace(all_of_them, expected=few.expected)
    (row,) = compare([("windowed MLP", lambda: mixed)], {}, HERE, FAST, memory=False)
    assert row["status"] == "wrong"


@pytest.mark.parametrize("training", [True, False])
def test_all_who_compute_the_stack_agree(training: bool) -> None:
    task = Stack(2, 13, 16, 3, torch.float32, training, "cpu")
    rivals = [(name, partial(task.make, name)) for name in width.PROVIDERS]
    rows = compare(rivals, task.expected(), HERE, FAST, memory=False)
    status = {row["provider"]: row["status"] for row in rows if row["metric"] == "seconds"}
    assert status.pop("pytorch-tcn") in ("ok", "not measured")
    assert set(status.values()) == {"ok"}, status


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_every_rung_of_the_ladder_is_correct(name: str) -> None:
    task = ladder.Ladder(name, 2, 13, 16, 1 if name == "tiles" else 2, torch.float32, True, "cpu")
    expected = task.expected()
    error = relative_error(task.make("PyTorch").result(), expected)
    for rung in list(task.rungs)[:4]:
        got = relative_error(task.make(rung).result(), expected)
        assert got <= harness.error_bound(error, torch.float32), rung


def test_the_roofline_knows_the_kernels_by_their_names() -> None:
    sources = (Path(cw.__file__).resolve().parent.parent / "kernels").glob("*.py")
    functions = [n.name for p in sources for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.FunctionDef)]
    kernels = {name for name in functions if name.endswith("_kernel")}
    costs = roofline.kernels(1000, 64, 64, 2, 4, separate=True)
    # of distinct graphs alone; of whole names, which no study times level by level
    assert kernels - costs.keys() == {"block_sums_kernel", "score_names_kernel"}
    assert costs.keys() <= kernels


def test_roofline_counts() -> None:
    N, C, k, size = 1000, 64, 2, 4
    row, index, weight = N * C * size, N * k * 8, k * C * C * size
    forward = roofline.level_eval(N, C, C, k, size)
    assert forward == (2 * row + index + weight, 2 * N * k * C * C)
    fused = roofline.kernels(N, C, C, k, size, separate=False)["conv_backward_kernel"]
    assert fused == (4 * row + 2 * index + 2 * weight, 2 * forward.flop)
    train = roofline.level_train(N, C, C, k, size)
    assert train.bytes == 6 * row + 3 * index + 3 * weight
    assert train.flop == 3 * forward.flop
    assert forward.fraction(2.0, bandwidth=1.0, rate=1e30) == (forward.bytes / 2, "set by bytes")
    assert forward.fraction(2.0, bandwidth=1e30, rate=1.0) == (forward.flop / 2, "set by FLOP")


def test_breakeven_predicts_the_graph_with_the_fewest_rows(words: cw.Words) -> None:
    plan = Plan(words=words.words)
    task = Network(breakeven.text(plan, "syllables", 40), plan.network(6, 8), True, "cpu")
    for fastest, right, lost in (("distinct", 1.0, 0.0), ("dense", 0.0, 2.0)):
        rows = [HERE.row(kind, median=1.0 if kind == fastest else 3.0) for kind in BUILD]
        found = breakeven._predicted(task, HERE, rows)
        assert only(found, "prediction", "right")["median"] == right
        assert only(found, "prediction", "regret")["median"] == lost
    assert only(breakeven._predicted(task, HERE, rows[1:]), "prediction", "right")["status"] == "not measured"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def study(*measures: Callable[[], list[Row]], name: str = "names") -> Study:
    """One of these steps instead of real ones."""

    def steps(plan: Plan) -> Iterator[Step]:
        for i, measure in enumerate(measures):
            yield Step(("train", "names", 2**i), lambda point, measure=measure: measure())

    pictures = (Picture("Time", "seconds", "train", "s"), Picture("Time again", "seconds", "train", "s", "bars"))
    return Study(name, "Which?", steps, pictures)


def measured(x: int = 1, provider: str = "a & <b>", name: str = "names") -> Callable[[], list[Row]]:
    return lambda: compare([competitor(provider)], TRUTH, at(x, name), FAST, positions=5)


def bench(names: list[str], out: Path, words: cw.Words, **options: Any) -> list[dict[str, Any]]:
    return command.run_studies(names, words, out, stderr(), quick=True, **options)


def test_a_file_says_where_its_figures_come_from(
    tmp_path: Path, words: cw.Words, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(STUDIES, "names", study(measured(1), measured(2)))
    (document,) = bench(["names"], tmp_path, words)
    assert json.loads((tmp_path / "names.json").read_text()) == document
    assert document["complete"]
    assert {"command", "commit", "date", "device", "clocks", "flags", "versions", "peers"} <= document[
        "provenance"
    ].keys()
    assert document["provenance"]["command"].startswith("convwave bench names --device cpu --threads ")
    assert {"threads", "float32_matmul_precision", "cudnn.deterministic"} <= document["provenance"]["flags"].keys()
    assert document["data_sha256"] == words.sha256
    assert document["settings"]["quick"] is True
    for row in document["rows"]:
        assert row.keys() == HERE.row("any").keys()
        if row["metric"] != "peak_bytes" and row["metric"] != "bytes_per_position":  # of one run
            assert row["p05"] <= row["p25"] <= row["median"] <= row["p75"] <= row["p95"]
        assert row["n"] >= 1
    assert {row["metric"] for row in document["rows"]} >= {"seconds", "positions_per_second", "peak_bytes"}
    assert (tmp_path / "names.png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().err
    assert "train, 2 names" in table
    assert "5 % to 95 %" in table


def test_a_run_that_is_killed_leaves_what_it_had(
    tmp_path: Path, words: cw.Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setitem(STUDIES, "names", study(measured(1), killed))
    with pytest.raises(KeyboardInterrupt):
        bench(["names"], tmp_path, words)
    (_, document) = read_documents(tmp_path)["names"]
    assert not document["complete"]
    assert {row["x"] for row in document["rows"]} == {1}
    assert "This run was cut short." in page(tmp_path)


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(
    tmp_path: Path, words: cw.Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> list[Row]:
        raise RuntimeError("CUDA error: unspecified launch failure\nlong story")

    monkeypatch.setitem(STUDIES, "names", study(fails, measured(2)))
    (document,) = bench(["names"], tmp_path, words)
    first, *rest = document["rows"]
    assert (first["status"], first["note"]) == (
        "not measured",
        "RuntimeError: CUDA error: unspecified launch failure",
    )
    assert {row["x"] for row in rest} == {2}


def test_a_budget_ends_in_not_measured_and_resume_goes_on(
    tmp_path: Path, words: cw.Words, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(STUDIES, "names", study(measured(1)))
    monkeypatch.setitem(STUDIES, "train", study(measured(1, name="train"), name="train"))
    (done,) = bench(["names"], tmp_path, words)
    (late,) = bench(["train"], tmp_path, words, budget=1e-9)
    assert [(row["status"], row["note"]) for row in late["rows"]] == [("not measured", TIME_UP)]
    assert not late["complete"]
    (again,) = bench(["names", "train"], tmp_path, words, resume=True)
    assert again["study"] == "train"
    assert again["complete"]
    assert "names: done on" in capsys.readouterr().err
    assert read_documents(tmp_path)["names"][1] == done


def test_the_table_and_the_file_say_that_the_machine_is_too_noisy(
    tmp_path: Path,
    words: cw.Words,
    monkeypatch: pytest.MonkeyPatch,
    clock: dict[str, Iterator[float]],
    capsys,
) -> None:
    def noisy() -> list[Row]:
        clock["noisy"] = iter([1.0, 1.0, 1.0, 1.2, 1.2, 1.2])
        return compare([competitor("noisy", lambda: "noisy")], TRUTH, at(1), FAST)

    monkeypatch.setitem(STUDIES, "names", study(noisy))
    (document,) = bench(["names"], tmp_path, words)
    assert document["noisy"] == ["names, train, 1, noisy"]
    assert "machine too noisy: 1 of 1" in capsys.readouterr().err
    (marked,) = (line for line in cells(document) if line[0] == "  noisy")
    assert all(cell.endswith(" ~") for cell in marked[1:] if cell)
    assert "Machine too noisy for 1 of its times" in page(tmp_path)


def test_two_runs_are_compared_median_against_median(
    tmp_path: Path,
    words: cw.Words,
    monkeypatch: pytest.MonkeyPatch,
    clock: dict[str, Iterator[float]],
    capsys,
) -> None:
    def run(folder: str, *seconds: float) -> Path:
        def step() -> list[Row]:
            clock["it"] = iter(seconds)
            return compare([competitor("it", lambda: "it")], TRUTH, at(1), FAST)

        monkeypatch.setitem(STUDIES, "names", study(step))
        bench(["names"], tmp_path / folder, words)
        return tmp_path / folder

    monkeypatch.setattr(report, "draw", lambda document, kind: b"")
    first = run("first", *[1.0] * 6)
    near, far = run("near", *[1.09] * 6), run("far", *[0.8] * 6)
    noisy = run("noisy", *[1.0] * 3, *[3.0] * 3)
    capsys.readouterr()
    assert results.main([str(first), str(near)]) == 0
    assert results.main([str(first), str(noisy)]) == 0
    assert results.main([str(first), str(far)]) == 1
    assert results.main([str(first), str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().out.splitlines() == [
        "1 times: 1 repeat within 10%, 0 do not, 0 were called too noisy",
        "1 times: 0 repeat within 10%, 0 do not, 1 were called too noisy",
        "names, train, 1, it: 25.0% apart",
        "1 times: 0 repeat within 10%, 1 do not, 0 were called too noisy",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Report and commands


class Page(HTMLParser):
    """Checks that tags are closed in order; collects links and what loads anything."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "link", "img", "iframe", "object") or "src" in values or "onload" in values:
            self.loads.append(tag)
        if tag == "a":
            self.links.append(str(values["href"]))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def without_pictures(text: str) -> str:
    """Pictures are matplotlib's: another version writes the same figures differently."""
    return re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def check_page(text: str, folder: Path) -> int:
    """The number of pictures of a page that needs nothing else."""
    found = Page(without_pictures(text))
    assert not found.open
    assert not found.loads
    assert not re.search("@import|<image|https?://(?!www.w3.org|purl.org|creativecommons|matplotlib.org)", text)
    assert found.links
    assert all(link.endswith(".json") and (folder / link).is_file() for link in found.links)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    return text.count("<svg")


def test_the_report_is_one_page_that_needs_nothing_else(
    tmp_path: Path, words: cw.Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STUDIES, "names", study(measured(1), measured(2)))
    bench(["names"], tmp_path / "some-device", words)
    (path,) = write_report(tmp_path)
    text = path.read_text()
    assert check_page(text, tmp_path) == 1
    assert "a &amp; &lt;b&gt;" in text
    assert "<b>" not in text
    assert text.count("Time again") == 2  # bars have a picture for every size
    assert text.count("not measured") >= len(STUDIES) - 1
    assert page(tmp_path) == text


def test_the_committed_results_hold_every_study_and_make_a_page() -> None:
    documents = read_documents(RESULTS / "cpu")
    assert documents.keys() == STUDIES.keys()
    for _, document in documents.values():
        assert not [row for row in document["rows"] if row["status"] == "wrong"]
    text = (RESULTS / "report.html").read_text()
    assert check_page(text, RESULTS) >= len(STUDIES) - 1  # the ladder needs a GPU
    assert without_pictures(page(RESULTS)) == without_pictures(text), "run convwave bench --report"


def test_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for _, document in read_documents(RESULTS / "cpu").values():
        report.show(document, stderr())
    lines = [line for line in capsys.readouterr().err.splitlines() if line[:1] in "┃│┏└"]
    assert lines
    assert max(map(len, lines)) <= 100


def test_bars_are_ordered_and_the_least_share_one() -> None:
    here = [
        HERE.row(provider, median=value) for provider, value in zip("abcde", (1.0, 3.0, 2.0, 0.0, 0.0), strict=True)
    ]
    assert [bar[:2] for bar in report.bars_of(here)] == [
        ("b", 3.0),
        ("c", 2.0),
        ("a", 1.0),
        ("the other 2, each at most", 0.0),
    ]


def test_lines_need_three_points() -> None:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    rows = [measured(x, p)()[0] for x, p in ((1, "two"), (2, "two"), (1, "all"), (2, "all"), (4, "all"))]
    report.draw_lines(axes, Picture("", "seconds", "train", ""), rows, {"two": "red", "all": "blue"})
    joined = [line.get_xdata() for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert [len(x) for x in joined] == [3]
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"two", "all"}


def test_pictures_of_nothing() -> None:
    assert report.draw({"study": "names", "rows": []}, "png") == b""


def test_the_help_lists_the_studies(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    text = capsys.readouterr().out
    assert all(study.name in text and study.question in text for study in STUDIES.values())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["contexts"], "STUDY: expected some of names, context, .*'contexts'"),
        (["names", "--threads", "0"], "--threads: expected at least 1"),
        (["names", "--budget", "-1"], "--budget: expected more than 0"),
        (["names", "--device", "tpu"], "--device"),
        (["names", "--report"], "--report: makes the report of all studies"),
        (["--report", "--out", "nowhere"], "--report: expected results"),
        (["--budgets"], "unrecognized arguments: --budgets"),
        (["names", "--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_use_is_one_line(arguments: list[str], named: str, capsys) -> None:
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(named, captured.err)


def test_studies_through_the_command(tmp_path: Path, words: cw.Words, capsys) -> None:
    data = tmp_path / "few.txt"
    data.write_text("\n".join(words.words[:300]))
    names = ["launches", "train", "roofline"]
    assert command.main([*names, "--quick", "--data", str(data), "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    rows = [row for study in json.loads(captured.out)["studies"].values() for row in study["rows"]]
    assert {row["status"] for row in rows} == {"ok"}
    metrics = {"launches", "seconds", "positions_per_second", "speedup", "peak_bytes", "bytes_per_position", "fraction"}
    assert metrics <= {row["metric"] for row in rows}


# ---------------------------------------------------------------------------------------------------------------------
# make gpu


def gpu(python: str, out: Path, seconds: int = 530) -> subprocess.CompletedProcess[str]:
    """The script with another Python, which it asks for the device first."""
    fake = out.parent / "python"
    fake.write_text(f"#!/bin/sh\n[ $1 = -c ] && exit 0\n{python}\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(fake), "OUT": str(out), "SECONDS_IN_ALL": str(seconds), "SHARDS": "2"}
    return subprocess.run([GPU], env=environment, capture_output=True, text=True)


def test_the_gpu_script_runs_tests_and_every_study_and_says_what_failed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu(f'echo "$@" >> {tmp_path}/calls', out)
    assert done.returncode == 0, done.stderr
    first, pytest_run, other, speedrun, *studies, last = (tmp_path / "calls").read_text().splitlines()
    assert first == "-m benchmarks.first"
    assert other == pytest_run
    files = [word for word in pytest_run.split() if word.endswith(".py")]
    assert len(files) == 5
    assert all((GPU.parent.parent / file).is_file() for file in files)
    assert speedrun.startswith("-m benchmarks.speedrun --device cuda")
    assert {line.split()[2] for line in studies} == set(STUDIES)
    budgets = [int(line.split()[line.split().index("--budget") + 1]) for line in studies]
    assert budgets[0] == pytest.approx(530 * 0.8 / 13, abs=2)
    assert max(budgets) < 530
    assert last == f"-m benchmarks --report --out {out}"
    failing = gpu('echo wrong; [ "$3" != train ]', out)
    assert failing.returncode == 1
    assert "train: wrong or cut short" in failing.stdout
    assert "names: done" in failing.stdout
    assert (out / "tests.txt").read_text() == 3 * "wrong\n"


def test_the_gpu_script_kills_what_takes_too_long_and_keeps_its_log(tmp_path: Path) -> None:
    done = gpu("echo began; exec sleep 60", tmp_path / "out", seconds=6)
    assert done.returncode == 1
    killed = "began\nstopped after {} s\n"
    assert (tmp_path / "out/tests.txt").read_text() == killed.format(1) + 2 * killed.format(2)
    assert done.stdout.count("wrong or cut short") == len(STUDIES)


@pytest.mark.parametrize(("failing", "status"), [(None, 0), (3, 1)])
def test_the_gpu_script_runs_each_test_once(failing: int | None, status: int, tmp_path: Path) -> None:
    """Side by side: the worst outcome is the outcome."""
    tests = "".join(f"def test_{i}(): assert {i} != {failing}\n" for i in range(5))
    (tmp_path / "test_few.py").write_text(tests)
    instead = f"-m pytest -v -p tests.shard -c {os.devnull} {tmp_path}/test_few.py"
    done = gpu(f"[ $2 = pytest ] || exit 0\nexec {sys.executable} {instead}", tmp_path / "out")
    assert done.returncode == status
    outcomes = re.findall(r"::test_(\d) (PASSED|FAILED)", (tmp_path / "out/tests.txt").read_text())
    assert sorted(outcomes) == [(str(i), "FAILED" if i == failing else "PASSED") for i in range(5)]
    assert [path.name for path in (tmp_path / "out").glob("tests*")] == ["tests.txt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_the_gpu_script_says_in_one_line_that_there_is_no_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run([GPU], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu: needs device cuda")
    assert done.stderr.count("\n") == 1
