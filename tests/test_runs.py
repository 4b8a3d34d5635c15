"""What a run keeps: seconds, the newest network, which split a name belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import convwave as cw
from convwave import cli
from convwave.files import read_tensors, write_tensors
from convwave.infer import generate
from convwave.runs.folder import MODEL_FILE, STATE_FILE, STATE_FORMAT
from convwave.runs.registry import newest_run
from convwave.train.config import Config, Interrupted
from convwave.train.loop import train
from tests.test_training import StopAfter


@pytest.fixture(scope="module")
def few() -> cw.Words:
    words = cw.data.bundled_words()
    return words._replace(words=words.words[:400])


@pytest.mark.parametrize("tier", ["reference", "cpu"])
def test_seconds_of_all_parts_of_a_run_are_added_up(tier: str, few: cw.Words, tmp_path: Path) -> None:
    """1,000 seconds are written into the state of a run that was stopped; they must be in what it ends with."""
    config = Config.make(steps=6, batch=64, tier=tier)
    for stop in (2, 4):
        with pytest.raises(Interrupted):
            train(config, few, tmp_path, resume=True, reporter=StopAfter(stop))
        tensors, metadata = read_tensors(tmp_path / STATE_FILE, STATE_FORMAT)
        assert metadata["seconds"] > 1000 * (stop // 2 - 1)
        write_tensors(tmp_path / STATE_FILE, tensors, {**metadata, "seconds": metadata["seconds"] + 1000})
    result = train(config, few, tmp_path, resume=True)
    assert 2000 < result.seconds < 3000
    assert json.loads((tmp_path / "result.json").read_text())["train_seconds"] == pytest.approx(result.seconds, abs=0.1)


def test_the_newest_run_is_the_one_written_last(tmp_path: Path) -> None:
    """Not the last by name, by folder or by depth."""
    assert newest_run(tmp_path) is None
    ages = {"a": 500, "b/deep/er": 300, "c": 900, "d": 100, "z": 700}
    for name, age in ages.items():
        file = tmp_path / name / MODEL_FILE
        file.parent.mkdir(parents=True)
        file.write_bytes(b"")
        os.utime(file, (2_000_000_000 + age, 1_000_000_000 - age))
        os.utime(file.parent, (1_000_000_000 + age, 1_000_000_000 + age))
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "other.safetensors").write_bytes(b"")
    for name in sorted(ages, key=lambda name: ages[name]):
        assert newest_run(tmp_path) == tmp_path / name
        (tmp_path / name / MODEL_FILE).unlink()
    assert newest_run(tmp_path) is None


def test_names_are_marked_by_the_split_that_holds_them(few: cw.Words, tmp_path: Path, capsys, monkeypatch) -> None:
    """One name of each split, and one of none; a name of train and of val is one of train."""
    both = "zzboth"
    words = [*few.words, *[both] * 40]
    splits = cw.split_words(words)
    assert both in splits.train
    assert both in splits.val
    data = tmp_path / "words.txt"
    data.write_text("\n".join(words), encoding="utf-8")
    model = cw.ConvWave(len(cw.Vocabulary.from_words(words)), 4, 6, vocabulary=cw.Vocabulary.from_words(words))
    model.save(tmp_path / "m.safetensors")
    in_train, in_val = next(w for w in splits.train if w not in splits.val), _only(splits.val, splits.train)
    names = [in_train, in_val, both, "zzznew", in_val]
    monkeypatch.setattr(generate, "sample", lambda *args, **options: list(names))
    assert cli.main(["sample", str(tmp_path / "m.safetensors"), "-n", "5", "--data", str(data), "--json"]) == 0
    marked = json.loads(capsys.readouterr().out.splitlines()[-1])["names"]
    assert [entry["name"] for entry in marked] == names
    assert [entry["status"] for entry in marked] == ["train", "val", "train", "new", "val"]


def _only(words: list[str], others: list[str]) -> str:
    return next(word for word in words if word not in others)
