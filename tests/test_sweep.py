"""Sweeps: what is tried, that every trial is there once whatever happens, and that the answers are right."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import convwave as cw
from convwave import cli
from convwave.data.packing import Corpus, Splits, pack
from convwave.sweep import study as studies
from convwave.sweep.plan import Pair, Plan, Range, held_out, read_plan
from convwave.train import RECIPES, Config, Interrupted, UsageError, fit, vary

pytest.importorskip("optuna", reason="needs the extra 'sweep'")
pytest.importorskip("scipy", reason="needs the extra 'sweep'")

from convwave.sweep import report as reports
from convwave.sweep import statistics as stats
from convwave.sweep.study import JOURNAL, RESULTS, Prepared, Row, Training, Worker, open_storage, open_study, rows_of
from tests.helpers import refusal


@pytest.fixture(scope="module")
def prepared(words: cw.Words) -> Prepared:
    return Prepared(Corpus(words._replace(words=words.words[:300])))


SMALL = vary(RECIPES["sprint"], {"batch": 40, "steps": 3, "n_hidden": 8, "n_embd": 4})
GRID = Plan(SMALL, seeds=(0, 1, 5), parameters={"adam_lr": (0.05, 0.1), "batch": (40, 50)})


def table(rows: list[Row]) -> dict[str, tuple[float | None, str]]:
    """Loss and state by configuration and seed, each of which occurs once."""
    keys = [Pair(row.parameters, row.seed).key for row in rows]
    assert max(Counter(keys).values(), default=1) == 1
    return {key: (row.loss, row.state) for key, row in zip(keys, rows, strict=True)}


@pytest.fixture(scope="module")
def undisturbed(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return Worker(GRID, prepared, tmp_path_factory.mktemp("undisturbed")).work()


# What is tried


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


def test_a_sweep_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "sprint"\nadam_lr = 0.07\n')
    text = 'recipe = "mine.toml"\nseeds = [3, 4]\nsampler = "random"\ntrials = 8\nseconds = 9.5\nprune_at = [2, 1]\n'
    plan = read_plan(
        written(tmp_path, text + "[parameters]\nlr = {low = 0.1, high = 1, log = true}\nbatch = [40, 50]\n")
    )
    assert plan.recipe.adam_lr == 0.07
    assert (plan.seeds, plan.sampler, plan.trials, plan.seconds, plan.prune_at) == ((3, 4), "random", 8, 9.5, (1, 2))
    assert plan.parameters == {"lr": Range(0.1, 1.0, True), "batch": (40, 50)}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert read_plan(written(tmp_path, "")) == Plan(RECIPES["fast"])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seeds = 1\nseeds = 2", "Cannot overwrite a value"),
        ("lr = [", "Invalid value"),
        ("steps = 0", "steps: expected a number from 1 on, got 0"),
        ("trials = 1.5", "trials: expected a number from 1 on, got 1.5"),
        ("seconds = true", "seconds: expected a number"),
        ("speed = 3", "speed: expected one of recipe, model"),
        ('recipe = "slow"', "recipe: expected one of blog"),
        ("recipe = 3", "recipe: expected a name or a .toml file"),
        ('recipe = "no.toml"', "no.toml: No such file"),
        ('model = "mlp9"', "model: expected convwave or"),
        ('model = "mlp3"', "recipe: mlp3 is trained by SGD"),
        ('sampler = "grand"', "sampler: expected grid or random or tpe, got 'grand'"),
        ('split = "val"', "split: expected held-out, got 'val'; the validation split is not for choosing"),
        ("seeds = 0", "seeds: expected a number of seeds, or a list of seeds, got 0"),
        ("seeds = [1, 1]", "seeds: expected each once"),
        ("seeds = []", "seeds: expected each once, and at least one seed"),
        ("seeds = [-1]", "seeds: expected a number"),
        ("parameters = 3", "parameters: expected a table"),
        ("[parameters]\nspeed = [1]", "parameters.speed: expected a field of a recipe"),
        ("[parameters]\nname = ['a']", "parameters.name: expected a field of a recipe"),
        ("[parameters]\nlr = []", "parameters.lr: expected a list of numbers or names"),
        ("[parameters]\nlr = [true]", "parameters.lr: expected a list of numbers or names"),
        ("[parameters]\nlr = [0.1, 0.1]", "parameters.lr: expected each value once"),
        ("[parameters]\nlr = [-1]", "lr: expected at least 0"),
        ("[parameters]\nbatch = [1.5]", "batch: expected a whole number, got 1.5"),
        ("[parameters]\nlevels = [3, 13]", "levels: expected at most 12"),
        ("[parameters]\nrecipe = ['fast', 'slow']", "parameters.recipe: expected names among"),
        ("[parameters]\nlr = 0.1", "parameters.lr: expected a list of values or {low, high, log}"),
        ("[parameters]\nlr = {low = 0.1, high = 1}", "parameters.lr: expected a list of values; a range needs"),
        ("sampler = 'tpe'\n[parameters]\nlr = [0.1]", "trials: expected a number, which sampler 'tpe' needs"),
        ("sampler = 'random'\n[parameters]\nlr = {low = 0.1, high = 1}", "trials: expected a number"),
        ("sampler = 'tpe'\ntrials = 3\n[parameters]\nlr = {low = 1, high = 0.1}", "expected low < high"),
        ("sampler = 'tpe'\ntrials = 3\n[parameters]\nlr = {low = 0, high = 0.1, log = true}", "and above 0 for log"),
        ("sampler = 'tpe'\ntrials = 3\n[parameters]\nbatch = {low = 1.5, high = 9}", "low and high as whole numbers"),
        (
            "sampler = 'tpe'\ntrials = 3\n[parameters]\nadam_beta = {low = 0.5, high = 2}",
            "adam_beta: expected at least 0",
        ),
        ("variants = 3", "variants: expected tables"),
        ("[[variants]]\nspeed = 1", "parameters.speed: expected a field of a recipe"),
        ("[[variants]]\nadam_lr = 0.03", "variants: expected each once, and none that is the recipe itself"),
        ("[[variants]]\nlr = 0.3\n[parameters]\nlr = [0.1]", "variants: expected neither parameters"),
        ("[[variants]]\nlevels = 13", "levels: expected at most 12"),
        ("steps = 5\nprune_at = [5]", "prune_at: expected steps before the last, 5, got 5"),
    ],
)
def test_what_cannot_be_swept_is_one_line(text: str, reason: str, tmp_path: Path, capsys) -> None:
    path = written(tmp_path, text)
    assert cli.main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"convwave: {path}: ") or reason.startswith("no.toml")
    assert reason in output.err
    assert output.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sweep"], "required: FILE.toml"),
        (["sweep", "nowhere.toml", "--out", "x"], "nowhere.toml: No such file"),
        (["sweep", "report"], "needs DIR"),
        (["sweep", "report", "nowhere"], "nowhere"),
    ],
)
def test_refusals(arguments: list[str], reason: str, capsys) -> None:
    assert reason in refusal(arguments, capsys)


def test_a_grid_is_every_combination_once_for_every_seed() -> None:
    pairs = GRID.pairs()
    assert len({pair.key for pair in pairs}) == len(pairs) == GRID.number == 12
    every = {(a, b, s) for a, b, s in itertools.product((0.05, 0.1), (40, 50), (0, 1, 5))}
    assert {(p.parameters["adam_lr"], p.parameters["batch"], p.seed) for p in pairs} == every
    assert [pair.seed for pair in pairs] == [0] * 4 + [1] * 4 + [5] * 4, "every configuration once before any twice"
    fewer = replace(GRID, trials=5).pairs()  # two configurations, the second with two seeds
    assert [pair.seed for pair in fewer] == [0, 0, 1, 1, 5]
    assert len({json.dumps(pair.parameters) for pair in fewer}) == 2
    assert [pair.seed for pair in replace(GRID, parameters={}).pairs()] == [0, 1, 5]


def test_random_draws_are_the_same_every_time_distinct_and_in_range() -> None:
    parameters = {
        "lr": Range(0.1, 10.0, True),
        "batch": Range(30, 33),
        "n_hidden": Range(8, 512, True),
        "warmup": (0.0, 0.1),
    }
    plan = Plan(SMALL, sampler="random", trials=2000, parameters=parameters)
    draws = [pair.parameters for pair in plan.pairs()]
    assert draws == [pair.parameters for pair in replace(plan, trials=3000).pairs()[:2000]]
    assert len({json.dumps(draw) for draw in draws}) == 2000
    assert all(0.1 <= draw["lr"] <= 10 and draw["batch"] in range(30, 34) for draw in draws)
    assert all(type(draw["batch"]) is type(draw["n_hidden"]) is int for draw in draws)
    # shares of n draws lie within 5 standard deviations of their probabilities
    for share, p in [
        (statistics.mean(draw["lr"] < 1 for draw in draws), 0.5),
        (statistics.mean(draw["batch"] == 30 for draw in draws), 0.25),
        (statistics.mean(draw["n_hidden"] < 64 for draw in draws), math.log(63.5 / 7.5) / math.log(512.5 / 7.5)),
        (statistics.mean(draw["warmup"] == 0.1 for draw in draws), 0.5),
    ]:
        assert abs(share - p) < 5 * (p * (1 - p) / 2000) ** 0.5
    assert len(Plan(SMALL, sampler="random", trials=50, parameters={"warmup": (0.0, 0.1)}).pairs()) == 2


def test_variants_are_the_recipe_and_its_changes_one_by_one(tmp_path: Path) -> None:
    text = 'recipe = "fast"\nseeds = 2\n[[variants]]\nsteps = 500\n[[variants]]\nadam_lr = 0.02\nsteps = 300\n'
    plan = read_plan(written(tmp_path, text))
    assert [(p.parameters["steps"], p.parameters["adam_lr"], p.seed) for p in plan.pairs()] == [
        *((400, 0.03, 0), (500, 0.03, 0), (300, 0.02, 0)),
        *((400, 0.03, 1), (500, 0.03, 1), (300, 0.02, 1)),
    ]
    assert plan.own == {"steps": 400, "adam_lr": 0.03}
    assert plan.parameters == {"steps": (400, 500, 300), "adam_lr": (0.03, 0.02)}
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_recipes_own_values_come_first_where_they_are_a_choice() -> None:
    plan = Plan(SMALL, sampler="random", trials=4, parameters={"lr": Range(0.1, 1.0), "batch": (40, 50)})
    assert plan.pairs()[0].parameters == plan.own == {"lr": 0.25, "batch": 40}
    assert Plan(SMALL, parameters={"lr": (0.1, 0.2)}).own is None
    assert Plan(SMALL, steps=7, parameters={"steps": (7, 9)}).own == {"steps": 7}


def test_a_trial_is_the_training_that_it_names(prepared: Prepared) -> None:
    plan = replace(GRID, steps=5, device="cpu")
    config = plan.config(Pair({"adam_lr": 0.1, "batch": 50, "recipe": "fast", "n_hidden": 12}, 9))
    assert config == Config.make(
        recipe=vary(RECIPES["fast"], {"name": "fast", "steps": 5, "adam_lr": 0.1, "batch": 50, "n_hidden": 12}), seed=9
    )
    words = prepared.corpus
    assert plan.config(Pair({}, 0), words).steps == 5
    scaled = replace(plan, steps=None).config(Pair({}, 0), words).steps
    assert scaled == SMALL.steps if words.is_names_txt else max(1, round(SMALL.steps * max(0.025, 300 / 32_033)))


# Where the loss is from


def test_a_tenth_of_the_distinct_names_is_held_out_with_all_its_repeats(words: cw.Words) -> None:
    names = cw.split_words(words.words).train
    rest, held = held_out(names)
    assert sorted(rest + held) == sorted(names)
    assert not set(rest) & set(held)
    assert len(set(held)) == round(0.1 * len(set(names)))
    assert held_out(names) == (rest, held)
    assert held_out(list(reversed(names)))[1] == held[::-1], "the names decide, not their order"
    with pytest.raises(UsageError, match="at least 5 distinct names"):
        held_out(["ann", "bob"])


def test_validation_and_test_names_are_never_looked_at(words: cw.Words) -> None:
    corpus = Corpus(words._replace(words=words.words[:300]))
    train = corpus.splits.train
    corpus.__dict__["splits"] = Splits(train, None, None)  # type: ignore[arg-type]
    prepared = Prepared(corpus)
    config = GRID.config(Pair({}, 0), corpus)
    assert Training(config, prepared).loss() is not None
    assert set(prepared.held_out) <= set(train)


@pytest.mark.parametrize("recipe", ["sprint", "fast", "full", "blog"])
def test_trainings_that_share_words_and_graphs_end_in_the_same_bits(
    recipe: str, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convwave.infer.score import EvaluationSet

    ticks = itertools.count()  # the system's clock of CPU time may be too coarse for a training of four steps
    monkeypatch.setattr(time, "process_time", lambda: next(ticks))
    small = {"batch": 40} if recipe != "full" else {}
    rest, held = held_out(prepared.corpus.splits.train)
    for seed in (0, 1, 0):
        config = Config.make(recipe=vary(RECIPES[recipe], {"steps": 4, "n_hidden": 8, **small}), seed=seed)
        alone = fit(config, pack(rest, prepared.vocabulary), prepared.vocabulary)
        training = Training(config, prepared)
        expected = EvaluationSet(Splits([], held, []), prepared.vocabulary, config.factors).losses(alone)["val"].loss
        assert training.loss() == expected
        assert training.seconds > 0
        assert training.cpu_seconds == 3, "beginning, steps and end"
    graphs = [value for value in prepared.train.derived.values() if isinstance(value, cw.Graph)]
    assert len(graphs) == 1


# Every trial once


def test_every_pair_is_there_once(undisturbed: list[Row], prepared: Prepared) -> None:
    assert table(undisturbed).keys() == {pair.key for pair in GRID.pairs()}
    for row in undisturbed[:3]:
        training = Training(GRID.config(Pair(row.parameters, row.seed), prepared.corpus), prepared)
        assert training.loss() == row.loss
        assert [loss for _, loss in row.curve] == [round(loss, 4) for loss in training.losses]


def work(plan: Plan, prepared: Prepared, out: Path) -> None:
    torch.set_num_threads(1)
    Worker(plan, prepared, out).work()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_killed_twenty_times_changes_nothing(
    undisturbed: list[Row], prepared: Prepared, tmp_path: Path
) -> None:
    """Two workers on one journal, one of them killed at any moment and begun again, also while it writes."""
    context, draw = multiprocessing.get_context("fork"), random.Random(5)

    def begin() -> Any:
        process = context.Process(target=work, args=(GRID, prepared, tmp_path))
        process.start()
        return process

    def written() -> int:
        journal = tmp_path / JOURNAL
        return journal.stat().st_size if journal.exists() else 0

    # the moment is one of the journal, not of the clock: half of the workers are killed alone, half beside another
    steady, kills = None, 0
    for i in range(20):
        if i == 10:
            steady = begin()
        before, most = written(), draw.randrange(1500)
        doomed = begin()
        while doomed.is_alive() and written() - before <= most:
            doomed.join(0.001)
        kills += doomed.is_alive()
        doomed.kill()
        doomed.join()
    assert kills >= 5, "or nothing was tested"
    last = begin()
    for process in (steady, last):
        process.join(120)
        assert process.exitcode == 0
    rows = rows_of(open_study(tmp_path, open_storage(tmp_path, None))[0])
    assert table(rows) == table(undisturbed)
    written = json.loads((tmp_path / RESULTS).read_text())
    assert [row["loss"] for row in written["trials"]] == [table(undisturbed)[pair.key][0] for pair in GRID.pairs()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_several_workers_share_a_sweep(sampler: str, prepared: Prepared, tmp_path: Path) -> None:
    plan = Plan(
        SMALL, seeds=(0, 1), sampler=sampler, trials=14, parameters={"lr": Range(0.1, 0.5, True), "warmup": (0.05, 0.1)}
    )
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(plan, prepared, tmp_path)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    rows = rows_of(open_study(tmp_path, open_storage(tmp_path, None))[0])
    assert len(table(rows)) == 14
    seeds = Counter(json.dumps(row.parameters, sort_keys=True) for row in rows)
    assert max(seeds.values()) == 2
    assert any(row.parameters == plan.own for row in rows)


def test_a_line_that_a_killed_worker_left_unfinished_is_cut_off(prepared: Prepared, tmp_path: Path) -> None:
    plan = replace(GRID, trials=3)
    first = Worker(plan, prepared, tmp_path).work()
    journal = tmp_path / JOURNAL
    whole = journal.read_bytes()
    for size in (1, 5, 40):
        journal.write_bytes(whole[: len(whole) - size])
        assert table(Worker(plan, prepared, tmp_path).work()) == table(first)


def test_a_sweep_that_is_done_trains_nothing_and_can_grow(prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    plan = replace(GRID, seeds=(0,))
    first = table(Worker(plan, prepared, tmp_path).work())
    trained: list[int] = []
    loss = Training.loss

    def counted(self: Training, *arguments: Any) -> float | None:
        trained.append(self.config.seed)
        return loss(self, *arguments)

    monkeypatch.setattr(Training, "loss", counted)
    assert table(Worker(plan, prepared, tmp_path).work()) == first
    assert trained == []
    grown = table(Worker(replace(plan, seeds=(0, 7)), prepared, tmp_path).work())
    assert trained == [7] * 4
    assert {key: grown[key] for key in first} == first


def test_another_sweep_in_the_same_folder_is_refused(prepared: Prepared, words: cw.Words, tmp_path: Path) -> None:
    Worker(replace(GRID, seeds=(0, 1), trials=1), prepared, tmp_path)
    for other, reason in [
        (replace(GRID, parameters={"adam_lr": (0.05,)}), "parameters: the sweep in .* was begun with"),
        (replace(GRID, recipe=RECIPES["fast"]), "recipe: "),
        (replace(GRID, sampler="random"), "sampler: "),
        (replace(GRID, seeds=(1,)), "seeds: .* more can be added, none taken away"),
    ]:
        with pytest.raises(UsageError, match=reason):
            Worker(other, prepared, tmp_path)
    with pytest.raises(UsageError, match="data_sha256: "):
        Worker(GRID, Prepared(Corpus(words._replace(words=words.words[:200], sha256="0"))), tmp_path)


def claims(worker: Worker) -> list[int]:
    """The numbers of the trials that a worker claims, until there is nothing to claim."""
    numbers = []
    while True:
        trials = worker.study.get_trials(deepcopy=False)
        running = {studies._pair(trial).key for trial in trials if worker._lives(trial)}
        number = worker._claim(studies._results(trials), running, trials)
        if number is None:
            return numbers
        numbers.append(number)


def test_a_claim_holds_while_its_worker_lives(prepared: Prepared, tmp_path: Path) -> None:
    plan = replace(GRID, seeds=(0,))
    a, b, c = (Worker(plan, prepared, tmp_path) for _ in range(3))
    with b._alive():
        with a._alive():
            assert len(claims(a)) == 4
            assert claims(b) == []
        assert b._holds_lock(a.name) is False, "its lock is free, its file is kept"
        assert len(claims(b)) == 4
        with c._alive():
            assert claims(c) == []
    states = Counter(trial.state.name for trial in c.study.get_trials())
    assert states == {"FAIL": 4, "RUNNING": 4}


def test_a_worker_elsewhere_is_dead_when_it_shows_no_sign_of_life(
    prepared: Prepared, tmp_path: Path, monkeypatch
) -> None:
    """Without a common folder, by the storage alone."""
    plan, now = replace(GRID, seeds=(0,)), [0.0]
    a, b = Worker(plan, prepared, tmp_path), Worker(plan, prepared, tmp_path)
    monkeypatch.setattr(studies.time, "monotonic", lambda: now[0])
    numbers = claims(a)
    beat = a.study._storage.set_trial_user_attr
    for seconds in (0.0, 100.0, 100.0, 100.0):
        now[0] += seconds
        assert claims(b) == [], "somebody is at it"
        for number in numbers:
            beat(a.study.get_trials()[number]._trial_id, "beat", f"{now[0]}")
    now[0] += 100
    assert claims(b) == []
    now[0] += 121
    assert len(claims(b)) == 4


def test_of_two_claims_at_the_same_time_the_first_counts(prepared: Prepared, tmp_path: Path) -> None:
    plan = replace(GRID, seeds=(0,), parameters={"batch": (40, 50)})
    a, b = Worker(plan, prepared, tmp_path), Worker(plan, prepared, tmp_path)
    with a._alive(), b._alive():
        pair = plan.pairs()[0]
        assert a._add(pair) == 0
        assert b._add(pair) is None
        assert b.study.get_trials()[1].state.name == "FAIL"
        # both trained it after all, as when one was taken for dead: one result
        b.study.add_trial(a.study.get_trials()[0])
        for number in (2, 0):
            a._do(number)
    assert len(rows_of(a.study)) == 1
    assert len([t for t in a.study.get_trials() if t.state.name == "COMPLETE"]) == 2


def test_a_training_that_diverges_is_a_result(prepared: Prepared, tmp_path: Path) -> None:
    plan = Plan(vary(SMALL, {"steps": 40}), steps=40, parameters={"lr": (0.2, 1e5), "adam_lr": (0.01, 1e5)})
    rows = Worker(plan, prepared, tmp_path).work()
    states = Counter(row.state for row in rows)
    assert states["diverged"] >= 1
    assert states["complete"] >= 1
    assert sum(states.values()) == 4
    assert all((row.loss is None) == (row.state == "diverged") for row in rows)
    assert table(Worker(plan, prepared, tmp_path).work()) == table(rows)
    report = reports.make_report(plan, rows)
    assert any("diverged" in reports.sentence(line, report.comparisons) for line in report.lines)


def test_seconds_end_a_sweep(prepared: Prepared, tmp_path: Path) -> None:
    rows = Worker(replace(GRID, seconds=1e-6), prepared, tmp_path).work()
    assert len(rows) == 1
    assert len(Worker(replace(GRID, seconds=None, trials=2), prepared, tmp_path).work()) == 2


def test_the_worse_are_pruned_by_the_median(prepared: Prepared, tmp_path: Path, monkeypatch) -> None:
    """Losses on the way are made up: those of batches from 50 on are worse than the median."""
    batches = (40, 41, 42, 43, 44, 45, 60, 61)
    plan = replace(GRID, seeds=(0, 1), prune_at=(1, 2), parameters={"batch": batches}, steps=3)
    monkeypatch.setattr(Prepared, "loss", lambda self, config, model: 1.0 if config.batch < 50 else 2.0)
    rows = Worker(plan, prepared, tmp_path).work()
    found = Counter((row.parameters["batch"], row.state) for row in rows)
    assert all(found[batch, "complete"] == 2 for batch in batches[:6])
    for batch in (60, 61):
        assert (found[batch, "pruned"], found[batch, "complete"]) == (1, 0), "its other seed is not begun"
    report = reports.make_report(plan, rows)
    assert all(len(row.curve) < 3 for row in rows if row.state == "pruned")
    verdicts = {line.parameters["batch"]: reports.sentence(line, report.comparisons) for line in report.lines}
    assert verdicts[60] == "not compared: 1 pruned"


def test_ctrl_c_gives_the_trial_up_and_keeps_the_others(prepared: Prepared, tmp_path: Path) -> None:
    pressed = [False]

    class Press(studies.Progress):
        def trial(self, rows: Any, plan: Plan) -> None:
            pressed[0] = len(rows) == 2

    with pytest.raises(Interrupted, match="2 of 12 trials are done"):
        Worker(GRID, prepared, tmp_path, progress=Press(), interrupted=lambda: pressed[0]).work()
    calls = itertools.count()
    with pytest.raises(Interrupted, match="of 12 trials are done"):  # in the middle of a training
        Worker(GRID, prepared, tmp_path, interrupted=lambda: next(calls) > 6).work()
    study = open_study(tmp_path, open_storage(tmp_path, None))[0]
    assert all(trial.state.is_finished() for trial in study.get_trials())
    done = len(rows_of(study))
    assert len(json.loads((tmp_path / RESULTS).read_text())["trials"]) == done
    assert 2 <= done < 12
    assert len(Worker(GRID, prepared, tmp_path).work()) == 12


def test_any_storage_of_optuna(prepared: Prepared, undisturbed: list[Row], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    assert table(Worker(GRID, prepared, tmp_path / "undisturbed", url).work()) == table(undisturbed)
    with pytest.raises(UsageError, match="--storage: cannot be opened"):
        open_storage(tmp_path, "sqlite:////nowhere/at/all.db")
    with pytest.raises(UsageError, match="--storage: cannot be opened"):
        open_storage(tmp_path, "grpc://nothing")


def test_the_proxy_of_optuna(prepared: Prepared, undisturbed: list[Row], tmp_path: Path) -> None:
    """What many workers use that have no common folder."""
    pytest.importorskip("grpc", reason="needs grpcio")
    from optuna.storages import InMemoryStorage, run_grpc_proxy_server

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    serve = partial(run_grpc_proxy_server, InMemoryStorage(), host="localhost", port=port)
    threading.Thread(target=serve, daemon=True).start()
    url = f"grpc://localhost:{port}"
    assert table(Worker(GRID, prepared, tmp_path / "sweep", url).work()) == table(undisturbed)
    assert table(Worker(GRID, prepared, tmp_path / "elsewhere/sweep", url).work()) == table(undisturbed)


# The command


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, words: cw.Words) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.txt"
    path.write_text("\n".join(words.words[:300]))
    return path


TEXT = """
recipe = "sprint"
steps = 3
seeds = 2
[parameters]
batch = [40, 50]
n_hidden = [8]
"""


def test_the_command_and_its_json(few: Path, tmp_path: Path, capsys) -> None:
    file, out = written(tmp_path, TEXT), tmp_path / "out"
    for _ in range(2):
        assert cli.main(["sweep", str(file), "--out", str(out), "--data", str(few), "--json"]) == 0
        output = capsys.readouterr()
        found = json.loads(output.out.splitlines()[-1])
        assert len(output.out.splitlines()) == 1
        keys = [(trial["parameters"]["batch"], trial["seed"]) for trial in found["trials"]]
        assert sorted(keys) == [(40, 0), (40, 1), (50, 0), (50, 1)]
        for trial in found["trials"]:
            assert {"parameters", "seed", "loss", "seconds", "state"} <= trial.keys()
            assert trial["state"] == "complete"
            assert 0 < trial["loss"] < 4
        assert "4 of 4 trials" in output.err
    source = json.loads((out / RESULTS).read_text())["provenance"]
    assert {"command", "commit", "device", "versions"} <= source.keys()
    assert cli.main(["sweep", str(file), "--data", str(few)]) == 2
    assert "--out: needed" in capsys.readouterr().err
    assert cli.main(["sweep", "report", str(out), "--json", "--baseline", "batch=50", "--baseline", "n_hidden=8"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["configurations"][0]["parameters"] == {"batch": 50, "n_hidden": 8}
    assert report["configurations"][1]["verdict"].startswith("not distinguishable: ")
    for file in report["pictures"].values():
        assert Path(file).read_bytes().startswith(b"\x89PNG")
    (out / JOURNAL).unlink()
    assert cli.main(["sweep", "report", str(out), "--json", "--baseline", "batch=50"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report
    for baseline, reason in (
        ("batch=77", "0 have"),
        ("lr=0.1", "expected one of batch, n_hidden"),
        ("x", "FIELD=VALUE"),
    ):
        assert cli.main(["sweep", "report", str(out), "--baseline", baseline]) == 2
        assert reason in capsys.readouterr().err


def test_workers_are_processes_and_one_that_is_killed_is_started_again(few: Path, tmp_path: Path) -> None:
    """The first worker kills itself once, by a file that tells it to."""
    out = tmp_path / "out"
    file = written(tmp_path, TEXT.replace("seeds = 2", "seeds = 8"))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal, sys\n"
        "once = pathlib.Path(__file__).with_name('once')\n"
        "if '--worker' in sys.argv and not once.exists():\n"
        "    once.touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "convwave", "sweep", str(file), "--out", str(out), "--data", str(few), "--json"]
    done = subprocess.run(
        [*command, "--workers", "2"], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])["trials"]) == 16
    if "was killed" not in done.stderr:
        pytest.skip("another sitecustomize is in the way")
    assert "was killed and is started again" in done.stderr


def test_ctrl_c_ends_the_command_in_good_order(few: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "out", written(tmp_path, TEXT.replace("seeds = 2", "seeds = 5000"))
    command = [sys.executable, "-m", "convwave", "sweep", str(file), "--out", str(out), "--data", str(few), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = out / JOURNAL
    while not (journal.exists() and journal.read_text().count('"result"') >= 3):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "")
    assert "trials are done; the same command continues" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert len(json.loads((out / RESULTS).read_text())["trials"]) >= 3


# The answers


def test_a_permutation_test_is_that_of_all_signs() -> None:
    generator = random.Random(3)
    for n in (2, 3, 6, 10):
        differences = [generator.gauss(0.5, 1) for _ in range(n)]
        observed = abs(statistics.fmean(differences))
        means = [
            abs(statistics.fmean(s * d for s, d in zip(signs, differences, strict=True)))
            for signs in itertools.product((-1, 1), repeat=n)
        ]
        expected = statistics.fmean(mean >= observed - 1e-12 for mean in means)
        assert stats.p_paired(differences) == pytest.approx(expected, abs=1e-12)
        assert stats.p_paired([abs(d) for d in differences]) == pytest.approx(2 / 2**n)
    assert stats.p_paired([0.3]) == 1.0
    assert stats.p_paired([1.0] * 30) < 1e-4
    assert stats.p_paired([1.0] * 30) == stats.p_paired([1.0] * 30)


def test_a_permutation_test_errs_as_often_as_it_says() -> None:
    """Without any difference, 5 % of p-values lie at or below 0.05 (of 8 pairs: 12 of 256 sign patterns)."""
    generator = random.Random(1)
    small = [stats.p_paired([generator.gauss(0, 1) for _ in range(8)]) <= 0.05 for _ in range(400)]
    p = 12 / 256
    assert abs(statistics.mean(small) - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_holms_correction() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.6]) == [1.0, 1.0]
    assert stats.holm([0.02]) == [0.02]
    assert stats.holm([]) == []


def test_intervals_are_those_of_the_tables() -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = stats.estimate(values)
    assert (found.mean, found.n) == (3.0, 5)
    assert found.deviation == pytest.approx(2.5**0.5)
    assert found.high == pytest.approx(3 + 2.776445 * (2.5 / 5) ** 0.5, abs=1e-6)
    assert found.low == pytest.approx(3 - 2.776445 * (2.5 / 5) ** 0.5, abs=1e-6)
    assert stats.estimate([2.0]) == stats.Estimate(2.0, 1, None, None, None)


@pytest.mark.parametrize(("difference", "deviation", "comparisons"), [(0.8, 1.0, 1), (0.5, 1.0, 1), (0.8, 1.0, 5)])
def test_the_seeds_that_would_tell_do_tell(difference: float, deviation: float, comparisons: int) -> None:
    """By simulation: with that many a t-test at the corrected level rejects in 80 % of cases, with less in fewer."""
    import numpy as np
    from scipy.stats import ttest_1samp

    needed = stats.seeds_needed(difference, deviation, comparisons)
    assert needed is not None
    generator, times, level = np.random.default_rng(0), 20_000, 0.05 / comparisons

    def power(n: int) -> float:
        draws = generator.normal(difference, deviation, (times, n))
        return float((ttest_1samp(draws, 0, axis=1).pvalue < level).mean())

    noise = 4 * (0.16 / times) ** 0.5
    assert power(needed) > stats.POWER - noise
    assert power(needed - 1) < stats.POWER + noise


def test_as_many_seeds_as_a_permutation_test_needs() -> None:
    assert stats.seeds_needed(5.0, 1e-9) == 6, "2 / 2^6 < 0.05"
    assert stats.seeds_needed(5.0, 0.0, comparisons=4) == 8, "2 / 2^8 < 0.05 / 4"
    assert stats.seeds_needed(0.0, 1.0) is None
    assert stats.seeds_needed(1e-6, 1.0) is None


def rows_with(effects: dict[float, float], seeds: int, noise: float) -> list[Row]:
    """Made-up results: a loss for every rate and seed; of a seed all share a part, as paired trainings do."""
    generator = random.Random(0)
    shared = [generator.gauss(0, 0.01) for _ in range(seeds)]
    return [
        Row(
            {"lr": lr},
            seed,
            2 + effect + shared[seed] + generator.gauss(0, noise),
            1 + lr,
            1 + lr,
            "complete",
            [[1, 2.0]],
        )
        for lr, effect in effects.items()
        for seed in range(seeds)
    ]


def test_a_report_tells_what_differs_and_what_does_not() -> None:
    effects = {0.25: 0.0, 0.1: 0.01, 0.2: -0.01, 0.3: 0.0003}
    plan = Plan(SMALL, seeds=tuple(range(12)), parameters={"lr": tuple(effects)})
    rows = rows_with(effects, 12, 0.002)
    report = reports.make_report(plan, rows)
    assert [line.parameters["lr"] for line in report.lines] == [0.25, 0.2, 0.3, 0.1], "the baseline, then by loss"
    verdicts = {line.parameters["lr"]: reports.sentence(line, 3) for line in report.lines[1:]}
    assert (verdicts[0.1], verdicts[0.2]) == ("worse", "better")
    assert verdicts[0.3].startswith("not distinguishable: ")
    assert report.comparisons == 3
    lines = {line.parameters["lr"]: line for line in report.lines}
    by_seed = {lr: [row.loss for row in rows if row.parameters["lr"] == lr] for lr in effects}
    expected = [a - b for a, b in zip(by_seed[0.1], by_seed[0.25], strict=True)]  # type: ignore[operator]
    found = lines[0.1].comparison.difference  # type: ignore[union-attr]
    assert found == stats.estimate(expected)
    assert found.deviation < statistics.stdev(by_seed[0.1]), "what seeds share is gone"  # type: ignore[type-var]
    other = reports.make_report(plan, rows, {"lr": 0.2})
    assert other.lines[0].parameters == {"lr": 0.2}
    assert {reports.sentence(line, 3) for line in other.lines[1:]} == {"worse"}


def test_pairs_are_those_of_the_same_seed() -> None:
    baseline = {0: 2.0, 1: 2.5, 2: 3.0, 9: 7.0}
    found = stats.compare([{2: 3.25, 0: 2.25, 1: 2.75, 5: 9.0}], baseline)[0]
    assert found.difference is not None
    assert (found.difference.mean, found.difference.n) == (0.25, 3)
    assert found.p == 0.25
    assert stats.compare([{7: 1.0}], baseline)[0].difference is None


def test_one_seed_tells_nothing() -> None:
    plan = Plan(SMALL, parameters={"lr": (0.25, 0.1)})
    report = reports.make_report(plan, rows_with({0.25: 0.0, 0.1: 5.0}, 1, 0.0))
    assert reports.sentence(report.lines[1], 1) == "not distinguishable: one seed tells nothing"
    with pytest.raises(UsageError, match="no trial is complete yet"):
        reports.make_report(plan, [])


def test_importance_is_with_the_parameter_that_matters() -> None:
    plan = Plan(
        SMALL,
        sampler="random",
        trials=60,
        parameters={"lr": Range(0.1, 1.0), "warmup": Range(0.0, 0.5), "momentum": (0.5,)},
    )
    generator = random.Random(0)
    rows = [
        Row({"lr": lr, "warmup": generator.uniform(0, 0.5), "momentum": 0.5}, 0, 2 + lr, 1, 1, "complete", [])
        for lr in (generator.uniform(0.1, 1) for _ in range(60))
    ]
    found = reports.importance(plan, rows)
    assert found["lr"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert reports.importance(plan, rows[:5]) == {}


def test_the_pareto_front_is_what_none_beats() -> None:
    generator = random.Random(2)
    rows = [
        Row({"lr": i / 100}, 0, generator.uniform(2, 3), 1.0, generator.uniform(1, 2), "complete", [])
        for i in range(1, 41)
    ]
    report = reports.make_report(Plan(SMALL, parameters={"lr": tuple(i / 100 for i in range(1, 41))}), rows)
    front = {line.parameters["lr"] for line in reports.pareto(report)}
    expected = {
        a.parameters["lr"]
        for a in rows
        if not any(b.loss < a.loss and b.cpu_seconds <= a.cpu_seconds for b in rows)  # type: ignore[operator]
    }
    assert front == expected
    assert [line.cpu_seconds for line in reports.pareto(report)] == sorted(
        line.cpu_seconds for line in reports.pareto(report)
    )


def test_the_sweeps_of_the_checkout_can_be_read() -> None:
    folder = Path(__file__).resolve().parent.parent / "benchmarks/sweeps"
    files = sorted(file for file in folder.glob("*.toml") if not file.name.endswith(".recipe.toml"))
    assert len(files) >= 5
    for file in files:
        assert read_plan(file).number >= 20
