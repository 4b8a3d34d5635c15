"""Training: it is the post's, it survives being killed, it stops when it diverges."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import convwave as cw
from convwave import reference
from convwave.data.batches import Plan, StepReader
from convwave.data.words import NAMES_SHA256
from convwave.files import CheckpointError, read_tensors, write_tensors
from convwave.runs.folder import STATE_FILE, STATE_FORMAT, Folder
from convwave.runs.plots import block_means
from convwave.train import loop as training
from convwave.train.autograd import ConvolutionRun
from convwave.train.closed_form import ClosedFormRun
from convwave.train.config import Config, Diverged, Interrupted, UsageError
from convwave.train.loop import Reporter, train
from convwave.train.recipes import BLOG, FAST, RECIPES, RECORD, parse_field, read_recipe, vary
from convwave.train.setup import recompute_statistics
from convwave.train.tiers import Run, available_tiers, begin
from tests.helpers import CPU_TIERS, relative_error


@pytest.fixture(scope="module")
def few(words: cw.Words) -> cw.Words:
    return words._replace(words=words.words[:400])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return cw.load(path).state_dict()


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class StopAfter(Reporter):
    """Presses Ctrl-C after some step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, done: int, loss: float, positions: int) -> None:
        if done == self.at:
            signal.raise_signal(signal.SIGINT)


CONFIGS = [
    *(Config.make("convwave", "fast", steps=12, batch=64, tier=tier) for tier in CPU_TIERS),
    # the whole split every step
    *(Config.make("convwave", "fast", steps=7, batch=10_000, tier=tier) for tier in CPU_TIERS[:-1]),
    *(Config.make("convwave", "record", steps=5, batch=32, n_hidden=20, tier=tier) for tier in CPU_TIERS[:-1]),
    *(Config.make("convwave", "sprint", steps=12, batch=100, tier=tier) for tier in CPU_TIERS),
    Config.make("convwave", "blog", steps=12),
    Config.make("hierarchical", steps=12),
    Config.make("mlp3", steps=12),
    Config.make("mlp8", steps=12),
    Config.make("convwave", "fast", steps=25, batch=64, keep="best"),
    Config.make("mlp8", steps=12, keep="best"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.model}-{c.recipe.name}-{c.batch}-{c.tier}-{c.keep}")
def test_interrupted_anywhere_and_resumed_ends_in_the_same_bits(config: Config, few: cw.Words, tmp_path: Path) -> None:
    whole = train(config, few, tmp_path / "whole", save_every=1e9)
    for stop in (1, config.steps // 2, config.steps - 1):
        out = tmp_path / f"stopped{stop}"
        with pytest.raises(Interrupted, match=f"stopped after step {stop} of {config.steps}"):
            train(config, few, out, reporter=StopAfter(stop))
        before = Folder(out).load().seconds
        resumed = train(config, few, out, resume=True)
        assert resumed.seconds >= before > 0
        assert resumed.losses == whole.losses
        assert (resumed.validation, resumed.kept_step) == (whole.validation, whole.kept_step)
        assert same_bits(weights(out / "model.safetensors"), weights(tmp_path / "whole/model.safetensors"))
    assert all(math.isfinite(loss) for loss in whole.losses)


@pytest.mark.parametrize("wait", [0.0, 0.03])
def test_killed_and_resumed_ends_in_the_same_bits(wait: float, tmp_path: Path, few: cw.Words) -> None:
    """SIGKILL from outside, whatever it is doing then, up to three times, then to the end, however long it takes."""
    data = tmp_path / "few.txt"
    data.write_text("\n".join(few.words))
    out = tmp_path / "killed"
    state = out / STATE_FILE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(steps: int, kill_after: float | None = None) -> int:
        """Exit status of a run, killed that many seconds after its first new state."""
        options = ["--steps", str(steps), "--batch", "32", "--data", str(data), "--save-every", "0"]
        command = [sys.executable, "-m", "convwave", "train", *options, "--out", str(out), "--resume"]
        seen = state.stat().st_mtime_ns if state.exists() else None
        with open(tmp_path / "errors.txt", "w") as errors:
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)
        while kill_after is not None and process.poll() is None:
            if state.exists() and state.stat().st_mtime_ns != seen:
                time.sleep(kill_after)
                process.kill()
                break
            time.sleep(0.005)
        status = process.wait()
        assert status in (0, -signal.SIGKILL), (tmp_path / "errors.txt").read_text()
        return status

    steps, kills = 60, 0
    while True:
        for attempt in range(3):
            killed = run(steps, wait + 0.03 * attempt) != 0
            kills += killed
            if not killed:
                break
        if kills:
            break
        steps *= 2  # this test came too late to kill it: more to do
        shutil.rmtree(out)
    assert run(steps) == 0
    whole = train(Config.make(steps=steps, batch=32, keep="best"), cw.read_words(data), tmp_path / "whole")
    assert same_bits(weights(out / "model.safetensors"), weights(tmp_path / "whole/model.safetensors"))
    assert whole.losses == read_tensors(state, STATE_FORMAT)[0]["losses"].tolist()


def test_equal_seeds_give_equal_bits_and_others_do_not(few: cw.Words) -> None:
    config = Config.make(steps=5, batch=64, seed=3)
    states = [train(c, few).model.state_dict() for c in (config, config, replace(config, seed=4))]
    assert same_bits(states[0], states[1])
    assert not same_bits(states[0], states[2])


def test_an_unlucky_write_leaves_the_old_state(few: cw.Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash between two bytes of a new state must not harm the old one."""
    config = Config.make(steps=10, batch=64)
    with pytest.raises(Interrupted):
        train(config, few, tmp_path, reporter=StopAfter(4))
    before = (tmp_path / STATE_FILE).read_bytes()

    def crash(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="No space left"):
        train(config, few, tmp_path, resume=True, save_every=0)
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_the_blog_recipe_through_the_convolution_is_the_windowed_training(few: cw.Words) -> None:
    """The same random windows, as counts: equal losses at every step, up to float32's rounding."""
    windowed = train(Config.make("hierarchical", steps=60), few)
    convolution = train(Config.make("convwave", "blog", steps=60), few)
    difference = max(abs(a - b) for a, b in zip(windowed.losses, convolution.losses, strict=True))
    assert difference < 1e-4
    assert max(windowed.losses) - min(windowed.losses) > 0.1, "the loss moves, so equality says something"


def test_windowed_training_is_the_posts_loop(few: cw.Words) -> None:
    """Against the loop, written out again: one generator for weights and draws, the rate cut after 3/4."""
    config = Config.make("mlp3", steps=40)
    result = train(config, few)
    vocab = cw.Vocabulary.from_words(few.words)
    windows = reference.build_windows(cw.pack(cw.split_words(few.words).train, vocab), 3)
    generator = torch.Generator().manual_seed(42)
    mlp = reference.MLP(len(vocab), uniform_embedding=True, generator=generator)
    losses = []
    for i in range(40):
        ix = torch.randint(0, len(windows.targets), (32,), generator=generator)
        losses.append(reference.sgd_step(mlp, windows.inputs[ix], windows.targets[ix], 0.1 if i < 30 else 0.01))
    assert losses == result.losses


def test_every_epoch_visits_every_name_once(few: cw.Words) -> None:
    vocab = cw.Vocabulary.from_words(few.words)
    packed = cw.pack(few.words, vocab)
    run = ConvolutionRun(Config.make(batch=100), packed, vocab)
    epochs = []
    for epoch in range(2):
        graphs = [run.reader.graph(4 * epoch + i) for i in range(4)]
        assert sum(graph.totals[-1] for graph in graphs) == len(packed)
        epochs.append([graph.totals[-1] for graph in graphs])
    assert epochs[0] != epochs[1], "another order"


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_divergence_stops_with_a_clear_error_and_keeps_the_last_good_state(
    tier: str, few: cw.Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config.make(steps=20, batch=64, tier=tier)
    corpus = cw.Corpus(few)
    kind = type(begin(config, corpus.train, corpus.vocabulary))
    step = kind.step

    def poisoned(self: Run, i: int) -> float:
        loss = step(self, i)
        if i == 12:  # the loss of this step is still finite, its weights are not
            weights = {name: p.detach().clone() for name, p in self.model().named_parameters()}
            weights["head.weight"][0, 0] = float("nan")
            self.begin_with(self.model().state_dict() | weights)
        return loss

    monkeypatch.setattr(kind, "step", poisoned)
    with pytest.raises(Diverged, match=r"head.weight is no longer finite after step 13.*holds the last good state"):
        train(config, few, tmp_path / "a", save_every=0)
    with pytest.raises(Diverged, match="the loss is nan at step 14"):
        train(config, few, tmp_path / "b", save_every=1e9)
    for name, steps in (("a", 12), ("b", 0)):
        tensors, _ = read_tensors(tmp_path / name / STATE_FILE, STATE_FORMAT)
        assert len(tensors["losses"]) == steps
        assert all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
    monkeypatch.undo()
    assert len(train(config, few, tmp_path / "a", resume=True).losses) == 20


@pytest.mark.parametrize("during", ["finish", "state"])
def test_ctrl_c_at_the_very_end_is_not_lost(during: str, few: cw.Words, tmp_path: Path, monkeypatch) -> None:
    config = Config.make(steps=4, batch=64, tier="cpu")
    original = getattr(ClosedFormRun, during)
    calls = []

    def interrupted(self: ClosedFormRun):
        calls.append(1)
        if len(calls) == (
            5 if during == "finish" else 2
        ):  # after each step and at the end; at the start and at the end
            signal.raise_signal(signal.SIGINT)
        return original(self)

    monkeypatch.setattr(ClosedFormRun, during, interrupted)
    with pytest.raises(Interrupted, match="after the last step"):
        train(config, few, tmp_path)
    monkeypatch.undo()
    resumed = train(config, few, tmp_path, resume=True)
    assert same_bits(resumed.model.state_dict(), train(config, few).model.state_dict())


def test_two_processes_cannot_train_in_one_directory(few: cw.Words, tmp_path: Path) -> None:
    pytest.importorskip("fcntl", reason="needs Unix file locks")
    config = Config.make(steps=3, batch=64)
    with Folder(tmp_path).locked() as ours:
        assert ours
        with pytest.raises(UsageError, match="another process is training"):
            train(config, few, tmp_path)
    train(config, few, tmp_path)


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_damaged_states_are_named(tier: str, few: cw.Words, tmp_path: Path) -> None:
    config = Config.make(steps=3, batch=64, tier=tier)
    train(config, few, tmp_path)
    path = tmp_path / STATE_FILE
    tensors, metadata = read_tensors(path, STATE_FORMAT)
    optimizer = "optimizer.head.bias" if tier == "reference" else "optimizer.exp_avg_sq"
    for name in ("losses", optimizer, "generator", "model.head.bias"):
        kept = {key: t for key, t in tensors.items() if not key.startswith(name)}
        assert len(kept) < len(tensors)
        write_tensors(path, kept, metadata)
        with pytest.raises(CheckpointError, match="is not a usable state"):
            train(config, few, tmp_path, resume=True)
    for name, value in [
        ("steps", "many"),
        ("steps", 2.5),
        ("seed", 2**64),
        ("batch", 0),
        ("levels", 13),
        ("keep", "worst"),
        ("start", 9),
        ("model", "rnn"),
        ("model", []),
        ("tier", "warp"),
        ("device", 5),
        ("recipe", 5),
        ("init", 5),
    ]:
        write_tensors(path, tensors, {**metadata, "config": {**metadata["config"], name: value}})
        with pytest.raises(CheckpointError, match="is not a usable state"):
            training.read_config(tmp_path)
    write_tensors(path, tensors, {**metadata, "config": {**metadata["config"], "colour": "red"}})
    with pytest.raises(CheckpointError, match=r"is not a usable state.*colour"):
        train(config, few, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"is not a usable state.*colour"):
        training.read_config(tmp_path)


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_a_state_of_other_shapes_is_refused_before_a_network_is_built(
    tier: str, few: cw.Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a state says of its sizes is compared with its tensors, those of the best network and of optimisers too."""
    config = Config.make(steps=12, batch=64, tier=tier, n_hidden=6, keep="best")
    with pytest.raises(Interrupted):
        train(config, few, tmp_path, reporter=StopAfter(5))
    path = tmp_path / STATE_FILE
    tensors, metadata = read_tensors(path, STATE_FORMAT)
    right, width = metadata["config"], 2**20
    big = torch.zeros(width, dtype=torch.int8)  # a matrix of them would take 8 TB
    moment = "optimizer.head.bias.exp_avg" if tier == "reference" else "optimizer.exp_avg"
    damaged = [
        ({}, {"n_hidden": width}),
        ({}, {"n_embd": width}),
        ({}, {"levels": 12}),
        ({"model.head.bias": tensors["model.head.bias"][:5].clone()}, {}),
        ({"model.head.weight": big}, {"n_hidden": width}),
        ({"model.blocks.0.norm.running_var": tensors["model.blocks.0.norm.running_var"][:1].clone()}, {}),
        ({"model.head.bias": tensors["model.head.bias"].double()}, {}),
        ({"best.head.bias": tensors["best.head.bias"][:5].clone()}, {}),
        ({"best.blocks.0.norm.running_var": tensors["best.blocks.0.norm.running_var"].long()}, {}),
        ({moment: tensors[moment].reshape(-1)[:1].clone()}, {}),
        ({moment: tensors[moment].to(torch.complex64)}, {}),
    ]
    built = []
    make = cw.ConvWave.__init__
    monkeypatch.setattr(cw.ConvWave, "__init__", lambda *a, **o: (built.append(a), make(*a, **o))[1])
    for change, values in damaged:
        built.clear()
        write_tensors(path, tensors | change, {**metadata, "config": right | values})
        with pytest.raises(CheckpointError, match="is not a usable state"):
            train(Config.from_json(right | values), few, tmp_path, resume=True)
        assert not built or moment in change
        if moment not in change:
            with pytest.raises(CheckpointError, match="is not a usable state"):
                training.read_network(tmp_path, lambda: cw.Corpus(few))
            assert not built
    write_tensors(path, tensors, metadata)
    assert train(config, few, tmp_path, resume=True).config.steps == 12


@pytest.mark.parametrize("tier", CPU_TIERS)
def test_validation_is_measured_on_the_way(tier: str, few: cw.Words) -> None:
    """Each figure is the one that stopping there gives, none moves a weight, and the best network is the lowest one."""
    corpus = cw.Corpus(few)
    last = Config.make(steps=95, batch=64, tier=tier)
    result, best = train(last, few), train(replace(last, keep="best"), few)
    assert [point.step for point in result.validation] == [10, 19, 29, 38, 48, 57, 67, 76, 86, 95]
    assert (result.validation, result.losses) == (best.validation, best.losses)
    assert same_bits(result.model.state_dict(), training.fit(last, corpus.train, corpus.vocabulary).state_dict())
    assert (result.kept_step, result.splits["val"].loss) == (95, result.validation[-1].loss)
    lowest = min(result.validation, key=lambda point: point.loss)
    assert lowest.step < 95, "it overtrains, so keeping the best differs"
    assert (best.kept_step, best.splits["val"].loss) == lowest
    run = begin(last, corpus.train, corpus.vocabulary)
    for i in range(lowest.step):
        run.step(i)
    assert same_bits(best.model.state_dict(), run.finish().state_dict())


def test_steps_follow_the_data_but_not_those_of_the_post(few: cw.Words) -> None:
    config = Config.make()
    post = cw.Corpus(few._replace(sha256=NAMES_SHA256))
    assert config.suited(post) is config
    for number, steps in [(10, 10), (8_008, 100), (32_033, 400), (64_066, 800)]:
        corpus = cw.Corpus(cw.Words(["anna", "berta"] * (number // 2) + ["dora"] * (number % 2), "x", "0"))
        assert config.suited(corpus) == replace(config, steps=steps, keep="best")
        assert config.suited(corpus, steps=False, keep=False) == config
    assert config.suited(cw.Corpus(cw.Words(["anna", "berta"], "x", "0"))).keep == "last", "no word to choose by"


@pytest.mark.parametrize("tier", CPU_TIERS)
@pytest.mark.parametrize("done", [6, 8])
def test_an_extended_run_begins_its_schedule_anew(tier: str, done: int, few: cw.Words, tmp_path: Path) -> None:
    """A finished run of 8 steps and an interrupted one; interrupted again, it ends in the same bits."""
    config = Config.make(steps=8, batch=64, tier=tier)
    long = replace(config, steps=13)
    with pytest.raises(Interrupted) if done < 8 else nullcontext():
        train(config, few, tmp_path / "a", reporter=StopAfter(done) if done < 8 else None)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = train(long, few, tmp_path / "a", resume=True)
    assert (whole.config.start, len(whole.losses)) == (done, 13)
    assert whole.config.rate(done) == config.recipe.rate(0, 13 - done)
    # by hand: new optimisers, old weights
    tensors, _ = read_tensors(tmp_path / "b" / STATE_FILE, STATE_FORMAT)
    corpus = cw.Corpus(few)
    run = begin(whole.config, corpus.train, corpus.vocabulary)
    run.begin_with({name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")})
    assert [run.step(i) for i in range(done, 13)] == whole.losses[done:]
    for stop in (done + 1, done + 3):
        with pytest.raises(Interrupted):
            train(long, few, tmp_path / "b", resume=True, reporter=StopAfter(stop))
    again = train(long, few, tmp_path / "b", resume=True)
    assert again.losses == whole.losses
    assert same_bits(again.model.state_dict(), whole.model.state_dict())
    assert train(replace(config, steps=15), few, tmp_path / "b", resume=True).config.start == 13


@pytest.mark.parametrize(("model", "recipe"), [("convwave", "fast"), ("convwave", "blog"), ("mlp8", "blog")])
def test_a_run_begins_with_the_weights_of_another(model: str, recipe: str, few: cw.Words, tmp_path: Path) -> None:
    first = train(Config.make(model, recipe, steps=15), few).model
    config = Config.make(model, recipe, steps=4)
    tuned = train(config, few, tmp_path / "a", init=first)
    assert tuned.losses[0] < train(config, few).losses[0] - 0.05
    with pytest.raises(Interrupted):
        train(config, few, tmp_path / "b", init=first, reporter=StopAfter(2))
    (tmp_path / "c").mkdir()
    state = Folder(tmp_path / "b").load()
    begun = replace(state, losses=[], validation=[], tensors={f"model.{n}": t for n, t in first.state_dict().items()})
    Folder(tmp_path / "c").save(begun)  # killed before its first step
    for folder in ("b", "c"):
        assert train(config, few, tmp_path / folder, resume=True).losses == tuned.losses


def test_a_network_without_a_state_is_not_overwritten(few: cw.Words, tmp_path: Path) -> None:
    train(Config.make(steps=2, batch=64), few, tmp_path)
    (tmp_path / STATE_FILE).unlink()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match=r"holds a network but no state\.safetensors to resume from.*--init"):
        train(Config.make(steps=2, batch=64), few, tmp_path, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_file_system_without_locks_is_not_another_process(few: cw.Words, tmp_path: Path, monkeypatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="needs Unix file locks")

    class Noted(Reporter):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def message(self, text: str) -> None:
            self.seen.append(text)

    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):

        def refuse(file: object, flags: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", refuse)
        noted = Noted()
        train(Config.make(steps=1, batch=64), few, tmp_path / str(number), reporter=noted)
        assert [text for text in noted.seen if "cannot be locked" in text and os.strerror(number) in text]


@pytest.mark.parametrize(
    "name", ["model.head.weight", "losses", "optimizer.exp_avg_sq", "best.head.bias", "validation"]
)
def test_a_state_that_is_not_finite_is_not_called_good(name: str, few: cw.Words, tmp_path: Path) -> None:
    config = Config.make(steps=4, batch=64, keep="best")
    train(config, few, tmp_path)
    path = tmp_path / STATE_FILE
    tensors, metadata = read_tensors(path, STATE_FORMAT)
    tensors[name].view(-1)[-1] = float("nan")
    write_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointError, match=f"{name} is not finite") as caught:
        train(config, few, tmp_path, resume=True)
    assert "good" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["fast", "record", "sprint", "full", "blog"])
def test_every_seed_of_64_bits_trains(recipe: str, few: cw.Words) -> None:
    """torch's generator reads the last 32 bits, so these are four different ones."""
    seeds = (1764061311123456789, 2**63 - 5, 2**63 + 3, 2**64 - 1)
    small = {"n_embd": 4, "n_hidden": 8}
    runs = [train(Config.make(recipe=recipe, steps=2, seed=seed, **small), few).losses for seed in seeds]
    assert len({tuple(losses) for losses in runs}) == len(seeds)


def test_the_order_of_names_is_that_of_seed_and_epoch(few: cw.Words) -> None:
    corpus = cw.Corpus(few)
    n = corpus.train.num_words
    for seed, epoch, number in [(7, 2, 7_000_023), (2**64 - 1, 2, 2**64 - 1_000_001), (2**63, 0, 2**63)]:
        plan = Plan("names", n - 1, 9, seed)
        reader = StepReader(plan, corpus.train, len(corpus.vocabulary), (2, 2, 2), torch.Generator())
        order = torch.randperm(n, generator=torch.Generator().manual_seed(number))[: n - 1]
        assert torch.equal(reader.names(epoch, n - 1), order)


def test_only_left_overs_of_the_run_are_cleared(few: cw.Words, tmp_path: Path) -> None:
    theirs = [".holiday.partial", ".notes.txt.12.partial", ".state.safetensors.x.partial", ".model.safetensors.partial"]
    ours = ["state.safetensors", "model.safetensors", "result.json", "run.json", "loss.csv", "loss.png"]
    for name in [*theirs, *(f".{name}.{i}.partial" for i, name in enumerate(ours))]:
        (tmp_path / name).write_text("")
    train(Config.make(steps=1, batch=64), few, tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".*.partial")) == sorted(theirs)


def test_what_a_killed_write_leaves_is_cleared(few: cw.Words, tmp_path: Path) -> None:
    (tmp_path / ".state.safetensors.123.partial").write_bytes(b"half")
    train(Config.make(steps=2, batch=64), few, tmp_path)
    assert not list(tmp_path.glob(".*.partial"))
    (tmp_path / STATE_FILE).unlink()
    with pytest.raises(UsageError, match="holds a run already"):
        train(Config.make(steps=2, batch=64), few, tmp_path)


def test_nothing_is_overwritten_or_mixed(few: cw.Words, tmp_path: Path) -> None:
    config = Config.make(steps=3, batch=64)
    train(config, few, tmp_path)
    with pytest.raises(UsageError, match="holds a run already"):
        train(config, few, tmp_path)
    with pytest.raises(CheckpointError, match="was made with seed 0, cannot continue with 5"):
        train(replace(config, seed=5), few, tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="other data"):
        train(config, few._replace(sha256="0"), tmp_path, resume=True)
    (tmp_path / STATE_FILE).write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="not a usable safetensors file"):
        train(config, few, tmp_path, resume=True)


def test_outputs(few: cw.Words, tmp_path: Path) -> None:
    config = Config.make(steps=25, batch=64)
    result = train(config, few, tmp_path)
    lines = (tmp_path / "loss.csv").read_text().splitlines()
    assert lines[0] == "step,loss"
    assert float(lines[1].split(",")[1]) == pytest.approx(result.losses[0], abs=1e-6)
    assert lines[-1].startswith("25,")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.partial"))
    corpus = cw.Corpus(few)
    compiled = config.tier == "fused"
    again = cw.EvaluationSet(corpus.splits, corpus.vocabulary, (2, 2, 2), compiled=compiled)
    assert again.losses(cw.load(tmp_path / "model.safetensors")) == result.splits


def test_block_means_average_blocks_of_steps() -> None:
    curve = block_means([float(i) for i in range(200_000)])
    assert len(curve) == 200
    assert curve[0] == (1000, 499.5)
    assert block_means([1.0, 2.0], blocks=200) == [(1, 1.0), (2, 2.0)]
    assert block_means([1.0, 2.0, 6.0], blocks=2)[-1] == (3, 6.0)
    assert block_means(list(range(5)), blocks=2) == [(2, 0.5), (4, 2.5), (5, 4.0)]


def test_schedules() -> None:
    assert [BLOG.rate(i, 200_000) for i in (0, 149_999, 150_000, 199_999)] == [1, 1, 0.1, 0.1]
    rates = [FAST.rate(i, 100) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) == 9
    assert rates[-1] == pytest.approx(1 / 90)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_configurations_are_checked() -> None:
    assert Config.make().recipe == FAST
    assert Config.make("mlp3") == Config.make("mlp3", "blog", steps=200_000, batch=32, seed=42)
    assert set(RECIPES) == {"blog", "fast", "record", "sprint", "sprint_wide", "full"}
    assert Config.make().tier == CPU_TIERS[0]
    assert Config.make(recipe="blog").tier == Config.make("mlp3").tier == "reference"
    for arguments, reason in [
        ({"model": "rnn"}, "model: expected one of"),
        ({"recipe": "slow"}, "recipe: expected one of"),
        ({"model": "mlp3", "recipe": "fast"}, "mlp3 is trained by SGD on windows only"),
        ({"model": "mlp8", "n_hidden": 5}, "fixed for mlp8"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0, got -1"),
        ({"seed": 2**64}, r"seed: expected at most 2\*\*64 - 1"),
        ({"keep": "first"}, "keep: expected one of best, last, got 'first'"),
        ({"recipe": "blog", "batch": 1}, "batch: expected at least 2 windows"),
        ({"levels": 13}, "levels: expected at most 12"),
        ({"n_hidden": 0}, "n_hidden: expected at least 1, got 0"),
        ({"tier": "warp"}, "tier: expected auto or one of .*reference, got 'warp'"),
        (
            {"tier": "cpu", "recipe": "blog"},
            "tier: expected one of reference for convwave by recipe blog on cpu, got 'cpu'",
        ),
        ({"tier": "cpu", "model": "mlp8"}, "tier: expected one of reference for mlp8 by recipe blog on cpu, got 'cpu'"),
        ({"tier": "cpu", "device": "cuda:1"}, "tier: expected .* on cuda:1, got 'cpu'"),
    ]:
        with pytest.raises(UsageError, match=reason):
            Config.make(**arguments)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("adam_lr", "expected FIELD=VALUE, got 'adam_lr'"),
        ("colour=red", r"colour: expected a field of a recipe \(name, optimizer, "),
        ("adam_lr=much", "adam_lr: expected a number, got 'much'"),
        ("steps=1e3", "steps: expected a whole number, got '1e3'"),
        ("steps=0", "steps: expected at least 1 and below 2.14748e.09, got 0"),
        ("lr=nan", "lr: expected at least 0 and below 1e.06, got nan"),
        ("lr=inf", "lr: expected at least 0 and below 1e.06, got inf"),
        ("momentum=1", "momentum: expected at least 0 and below 1, got 1.0"),
        ("optimizer=adam", "optimizer: expected one of sgd, muon, got 'adam'"),
        ("name=a/b", "name: expected text without slashes, got 'a/b'"),
    ],
)
def test_fields_of_a_recipe_are_checked(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_field(text)


def test_a_recipe_varies() -> None:
    assert vary(FAST, {}) is FAST
    varied = vary(FAST, dict(map(parse_field, ["adam_lr=0.02", "steps = 7", "batch_of=text"])))
    assert varied.name == "fast+adam_lr=0.02+steps=7+batch_of=text"
    assert varied == replace(FAST, name=varied.name, adam_lr=0.02, steps=7, batch_of="text")
    assert vary(FAST, {"name": "mine", "lr": 1}).name == "mine"
    for values, reason in [
        ({"token_noise": 0.1, "batch_of": "text"}, "token_noise: expected 0 unless batch_of is 'names', got 0.1"),
        ({"growth": 2.0}, "growth, context_power: expected 1 and 0 unless batch_of is 'contexts', got 2.0 and 0.0"),
        ({"lr": True}, "lr: expected a number, got True"),
        ({"name": 5}, "name: expected text, got 5"),
        ({"colour": 5}, "colour: expected a field"),
    ]:
        with pytest.raises(ValueError, match=reason):
            vary(FAST, values)


def test_a_recipe_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "fast"\nadam_lr = 0.02\nlr = 1\n')
    assert read_recipe(path) == replace(FAST, name="mine", adam_lr=0.02, lr=1.0)
    path.write_text('name = "new"\noptimizer = "sgd"\nbatch_of = "names"\nsteps = 3\nbatch = 9\nlr = 0.1\n')
    assert (read_recipe(path).name, read_recipe(path).batch_of) == ("new", "names")
    for content, reason in [
        ("adam_lr = 0.02", "mine.toml: optimizer: expected a value, or a base that has one, got none"),
        ('base = "slow"', "mine.toml: recipe: expected one of blog, fast"),
        ('base = "fast"\nsteps = 2.5', "mine.toml: steps: expected a whole number, got 2.5"),
        ("colour = 1", "mine.toml: colour: expected a field of a recipe"),
        ("= 1", "mine.toml: Invalid"),
        (f"lr = {'[' * 100_000}", "mine.toml: maximum recursion depth"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=reason) as caught:
            read_recipe(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"none\.toml: No such file"):
        read_recipe(tmp_path / "none.toml")


def test_a_run_of_a_recipe_that_is_not_built_in_is_resumed(few: cw.Words, tmp_path: Path) -> None:
    recipe = vary(FAST, {"name": "mine", "adam_lr": 0.02, "batch": 64, "steps": 8})
    config = Config.make(recipe=recipe)
    whole = train(config, few)
    assert whole.losses != train(Config.make(steps=8, batch=64), few).losses
    assert (whole.summary()["recipe"], whole.summary()["recipe_fields"]["adam_lr"]) == ("mine", 0.02)
    with pytest.raises(Interrupted):
        train(config, few, tmp_path, reporter=StopAfter(3))
    assert training.read_config(tmp_path) == config
    assert train(training.read_config(tmp_path), few, tmp_path, resume=True).losses == whole.losses
    for other, reason in [
        (FAST, "was made with recipe mine, cannot continue with fast"),
        (replace(recipe, lr=0.2), "was made with the recipe's lr 0.1, cannot continue with 0.2"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            train(replace(config, recipe=other), few, tmp_path, resume=True)


def test_a_recipe_trains_on_whatever_it_reads(few: cw.Words) -> None:
    """Every optimiser with every kind of batch, on every tier: equal losses up to rounding, in steps and at the end."""
    for optimizer in ("sgd", "muon"):
        for kind in ("windows", "names", "contexts", "text"):
            recipe = replace(FAST, name="mine", optimizer=optimizer, batch_of=kind, steps=3, batch=64)
            tiers = available_tiers(recipe=recipe)
            runs = [train(Config.make(recipe=recipe, tier=tier), few) for tier in tiers]
            assert ("cpu" in tiers, tiers[-1]) == (optimizer == "muon" and kind != "windows", "reference")
            for run in runs:
                assert run.losses == pytest.approx(runs[-1].losses, abs=2e-4)
                for name, split in run.splits.items():
                    assert split.loss == pytest.approx(runs[-1].splits[name].loss, abs=1e-3), (name, kind)


class Blocks:
    """A run that notes the blocks it is asked for, each of whose steps takes a hundredth of a second."""

    block = 50

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.asked = clock, []

    def steps(self, first: int, stop: int) -> list[float]:
        self.asked.append(stop - first)
        self.clock[0] += 0.01 * (stop - first)
        return [float("nan") if i == 399 else 1.0 for i in range(first, stop)]


def test_blocks_are_long_where_nobody_watches_and_short_where_somebody_does(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    run = Blocks(clock)
    assert [loss for losses in training.blocks(run, 5, 125) for loss in losses] == [1.0] * 120
    assert run.asked == [50, 50, 20]
    run = Blocks(clock)
    assert sum(len(losses) for losses in training.blocks(run, 0, 40, seconds=0.1)) == 40
    assert run.asked == [1, 2, 4, 8, 8, 8, 8, 1]
    with pytest.raises(Diverged, match="the loss is nan at step 400"):
        list(training.blocks(Blocks(clock), 390, 500))


def test_recomputing_statistics_keeps_every_module_s_own_mode(few: cw.Words) -> None:
    corpus = cw.Corpus(few)
    model = cw.ConvWave(len(corpus.vocabulary), momentum=[0.3, 0.2, 0.1]).train()
    model.layers[1].norm.eval()
    modes = [module.training for module in model.modules()]
    recompute_statistics(model, cw.distinct_graph(corpus.train))
    assert [module.training for module in model.modules()] == modes
    assert [block.norm.momentum for block in model.layers] == [0.3, 0.2, 0.1]
    assert all(bool(block.norm.running_mean.any()) for block in model.layers)


def test_fast_learns(names_txt: cw.Words) -> None:
    """A quarter of the recipe on the real data is far below what no context can reach (the unigram entropy, 2.82)."""
    result = train(replace(Config.make(), steps=100), names_txt)
    assert result.splits["val"].loss is not None
    assert result.splits["val"].loss < 2.12


def test_the_record_recipe_fits_its_network() -> None:
    config = Config.make(recipe="record")
    assert (config.n_embd, config.n_hidden, config.levels) == (RECORD.n_embd, RECORD.n_hidden, RECORD.levels)


def test_muon_makes_a_matrix_orthogonal() -> None:
    """Five steps bring the singular values that are not tiny near (0.65, 1.3), the quintic's range."""
    from convwave.train.optim import Muon, orthogonalize

    generator = torch.Generator().manual_seed(0)
    for shape in [(68, 136), (68, 20), (5, 5), (1, 7)]:
        matrix = torch.randn(*shape, generator=generator)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        near = orthogonalize(matrix)
        values = torch.linalg.svdvals(near)
        assert values.max() < 1.3
        assert (values > 0.3).float().mean() > 0.9
        assert float((near * (u @ vh)).sum() / min(shape)) > 0.65, "the direction is that of the exact one"
    weight = nn.Parameter(torch.randn(4, 3, 2, generator=generator))
    weight.grad = torch.randn(4, 3, 2, generator=generator)
    before = weight.detach().clone()
    Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    momentum = 0.1 * weight.grad.flatten(1)
    update = orthogonalize(0.1 * weight.grad.flatten(1) + 0.9 * momentum)
    assert relative_error(weight, before * 0.95 - 0.1 * update.reshape(4, 3, 2)) < 1e-5
    with pytest.raises(ValueError, match="Muon needs matrices"):
        Muon([nn.Parameter(torch.zeros(3))])
