"""The speedrun's rules: what is timed is what `train` does, and what is judged is judged rightly."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

import convwave as cw
from benchmarks import baselines, speedrun
from benchmarks.speedrun import TRACKS, timed_training
from convwave.sweep.statistics import p_below
from convwave.train import Config, train
from tests.helpers import CPU_TIERS


@pytest.mark.parametrize(
    ("n", "t", "p"),
    [(20, 2.539483, 0.01), (10, 1.833113, 0.05), (2, 1.0, 0.25), (3, 2.919986, 0.05), (21, 2.527977, 0.01)],
)
def test_p_values_are_those_of_the_tables(n: int, t: float, p: float) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    values = (values - values.mean()) / values.std()  # mean 0, standard deviation 1
    assert p_below(values.tolist(), t / n**0.5) == pytest.approx(p, rel=1e-5)
    assert p_below(values.tolist(), -t / n**0.5) == pytest.approx(1 - p, rel=1e-5)
    assert p_below([1.0] * n, 2.0) == 0
    assert p_below([1.0] * n, 0.9) == 1
    assert p_below([1.0] * n, 1.0) >= 0.5


@pytest.mark.parametrize("recipe", ["fast", "sprint"])
def test_the_timed_training_is_train(recipe: str, words: cw.Words) -> None:
    few = words._replace(words=words.words[:400])
    config = Config.make(recipe=recipe, steps=5, batch=64)
    run = timed_training("\n".join(few.words), config)
    expected = train(config, few).model
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    assert not run.model.training
    assert 0 < run.seconds < 60


def test_the_tracks_networks_are_admitted() -> None:
    for track in TRACKS.values():
        config = Config.make(recipe=track.recipe)
        model = cw.ConvWave(27, config.n_embd, config.n_hidden, config.levels)
        assert model.num_parameters <= track.parameters
    assert cw.ConvWave().num_parameters == TRACKS["post"].parameters == 22_397
    assert TRACKS["post"].target == 2.0209


def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the baselines, with one seed."""
    monkeypatch.setattr(speedrun, "BASELINE_SEEDS", 1)
    few = {name: baseline._replace(steps=2) for name, baseline in baselines.BASELINES.items()}
    monkeypatch.setattr(baselines, "BASELINES", few)


def test_no_time_where_the_target_is_missed(names_txt: cw.Words, tmp_path, capsys, monkeypatch) -> None:
    make = Config.make
    monkeypatch.setattr(Config, "make", lambda *a, **kw: replace(make(*a, **kw), steps=1))
    monkeypatch.setattr(speedrun, "BLOG_STEPS", 1)
    few_steps(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["speedrun", "--out", str(tmp_path)])
    assert speedrun.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the target is missed, so there is no time" in captured.err
    assert not list(tmp_path.iterdir())


def test_what_a_run_writes(names_txt: cw.Words, tmp_path, capsys, monkeypatch) -> None:
    make = Config.make
    monkeypatch.setattr(Config, "make", lambda *a, **kw: replace(make(*a, **kw), steps=3))
    monkeypatch.setattr(speedrun, "BLOG_STEPS", 1)
    few_steps(monkeypatch)
    monkeypatch.setitem(TRACKS, "post", TRACKS["post"]._replace(target=4.0))
    monkeypatch.setattr(sys, "argv", ["speedrun", "--out", str(tmp_path), "--record", "few steps"])
    assert speedrun.main() == 0
    report = json.loads((tmp_path / "speedrun.json").read_text())
    (kept,) = (tmp_path / "speedrun").glob("*.json")
    assert kept.stem == report["provenance"]["date"][:10]
    assert json.loads(kept.read_text()) == {"idea": "few steps"} | report
    assert report == json.loads(capsys.readouterr().out)
    assert report["reached"]
    assert report["seeds"] == list(range(20))
    assert len(report["losses"]["val"]) == len(report["all_seconds"]) == 20
    assert (report["post_loop"]["steps_measured"], report["times_faster"] > 0) == (20, True)
    assert {"device", "versions", "commit", "command"} <= report["provenance"].keys()
    assert report["baselines"].keys() == {*baselines.BASELINES, "kneser_ney"}
    for found in report["baselines"].values():
        ratio = found["cpu_seconds"]["median"] / report["cpu_seconds"]["median"]
        assert found["times_our_cpu_time"] == pytest.approx(ratio)
    assert report["baselines"]["kneser_ney"]["losses"]["val"][0] < 1.99


@pytest.mark.skipif("fused" not in CPU_TIERS, reason="needs numba and SciPy: pip install 'convwave[fast]'")
def test_the_products_of_a_training_are_counted(words: cw.Words) -> None:
    config = Config.make(recipe="sprint", steps=20, batch=64, n_embd=2, n_hidden=3, levels=1)
    found = speedrun.products("\n".join(words.words[:400]), config)
    assert found["gflop_per_second"] == pytest.approx(found["gflop"] / found["milliseconds"] * 1000)
    # 86 rows on average: the head and its two gradients; three products of 2 x 27 tokens; Muon's
    head, level, muon = 3 * 86 * 27 * 3, 3 * 2 * 27 * 2 * 3, 3 * (3 * 4 * 3 + 3 * 3 * 3 + 4 * 3 * 3)
    assert found["gflop"] == pytest.approx(20 * 2e-9 * (head + level + muon), rel=0.3)


def test_unknown_tiers_are_refused(names_txt: cw.Words, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speedrun", "--tier", "warp"])
    with pytest.raises(SystemExit, match="2"):
        speedrun.main()
    assert "tier: " in capsys.readouterr().err
    monkeypatch.setattr(speedrun, "package_version", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        speedrun.main()
    assert "needs SciPy" in capsys.readouterr().err


@pytest.mark.parametrize("tier", CPU_TIERS[:-1])
def test_the_profile_finds_every_part_of_a_training(tier: str, words: cw.Words) -> None:
    config, text = Config.make(recipe="sprint", steps=2, batch=64, tier=tier), "\n".join(words.words[:400])
    speedrun.timed_training(text, config)  # numba ends a profile when it reads a function
    spent = speedrun.by_part(text, config)
    assert spent.keys() == set(speedrun.PARTS.values())
    assert all(seconds > 0 for seconds in spent.values()), spent
