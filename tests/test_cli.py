"""The commands: what they print where, and how they fail."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch

import convwave as cw
from convwave import cli
from convwave.data import words as data


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, words: cw.Words) -> Path:
    path = tmp_path_factory.mktemp("data") / "few.txt"
    path.write_text("\n".join(words.words[:300]))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, few: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert cli.main(["train", "--steps", "30", "--batch", "64", "--data", str(few), "--out", str(out)]) == 0
    return out


def last_json(output: str) -> dict:
    return json.loads(output.rstrip("\n").split("\n")[-1])


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command refuses, checked to be one line and exit status 2."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith(("data: ", "note: ", "training "))]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_train_prints_json_last_and_all_else_to_standard_error(few: Path, tmp_path: Path, capsys) -> None:
    arguments = ["train", "--steps", "3", "--batch", "32", "--data", str(few), "--out", str(tmp_path / "r")]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    result = last_json(captured.out)
    keys = {"model", "recipe", "seed", "steps", "parameters", "train_seconds"}
    assert keys | {"train_loss", "val_loss", "novel_val_loss", "checkpoint"} <= result.keys()
    assert captured.out.count("\n") == 1
    assert result["checkpoint"] == str(tmp_path / "r/model.safetensors")
    assert json.loads((tmp_path / "r/result.json").read_text())["val_loss"] == result["val_loss"]
    for text in (f"data: {few}, 300 words", "convwave data fetch", "loss.png"):
        assert text in captured.err
    assert "the post's" not in captured.err.split("Loss in nats")[1].split("The post's")[0]
    assert "2.0209" not in captured.err
    assert cli.main([*arguments[:-1], str(tmp_path / "quiet")]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("model", ["mlp3", "mlp8", "hierarchical"])
def test_the_posts_networks_train_evaluate_and_sample(model: str, few: Path, tmp_path: Path, capsys) -> None:
    options = ["--data", str(few), "--json"]
    assert (
        cli.main(["train", "--model", model, "--recipe", "blog", "--steps", "30", "--out", str(tmp_path), *options])
        == 0
    )
    result = last_json(capsys.readouterr().out)
    assert (result["model"], result["recipe"], result["seed"]) == (model, "blog", 42)
    assert cli.main(["evaluate", str(tmp_path), *options]) == 0
    splits = last_json(capsys.readouterr().out)["splits"]
    assert splits["val"]["loss"] == pytest.approx(result["val_loss"], abs=1e-6)
    assert cli.main(["sample", str(tmp_path / "model.safetensors"), "-n", "4", *options]) == 0
    assert len(last_json(capsys.readouterr().out)["names"]) == 4


def test_evaluate(trained: Path, few: Path, capsys) -> None:
    assert cli.main(["evaluate", str(trained), "--data", str(few), "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert set(result["splits"]) == {"train", "val", "novel_val", "test"}
    assert all({"loss", "positions"} <= split.keys() for split in result["splits"].values())
    total = sum(result["splits"][name]["positions"] for name in ("train", "val", "test"))
    assert total == sum(len(word) + 1 for word in few.read_text().split())
    assert result["seconds"] > 0


def test_sample_marks_every_name(trained: Path, few: Path, capsys) -> None:
    arguments = ["sample", str(trained), "-n", "300", "--data", str(few), "--seed", "3"]
    assert cli.main([*arguments, "--json"]) == 0
    names = last_json(capsys.readouterr().out)["names"]
    splits = cw.split_words(few.read_text().split())
    for entry in names:
        where = next((name for name in ("train", "val", "test") if entry["name"] in getattr(splits, name)), "new")
        assert entry["status"] == where
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{entry['name']}\t{entry['status']}" for entry in names]
    assert cli.main([*arguments[:2], "--prefix", "ma", "--data", str(few), "--json"]) == 0
    assert all(entry["name"].startswith("ma") for entry in last_json(capsys.readouterr().out)["names"])


def test_names_of_the_test_split_are_marked(trained: Path, few: Path, capsys, monkeypatch) -> None:
    splits = cw.split_words(few.read_text().split())
    drawn = [splits.test[0], splits.val[0], splits.train[0], "qqq"]
    monkeypatch.setattr("convwave.infer.generate.sample", lambda *args, **options: drawn)
    assert cli.main(["sample", str(trained), "-n", "4", "--data", str(few)]) == 0
    marks = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    assert marks == ["test", "val", "train", "new"]


def test_sample_and_evaluate_take_the_newest_run(trained: Path, few: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert "none given and no runs" in refused(["sample", "--data", str(few)], capsys)
    monkeypatch.chdir(trained.parent)
    monkeypatch.setattr("convwave.cli.model.RUNS", Path(".."))
    assert cli.main(["sample", "-n", "2", "--data", str(few)]) == 0


def test_a_reader_that_goes_away_is_no_error(trained: Path, few: Path) -> None:
    command = f"'{sys.executable}' -m convwave sample '{trained}' -n 50000 --data '{few}' | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["sample", "-n", "3"], ["data", "--json"], ["evaluate", "--json"]])
def test_nor_is_one_that_goes_before_anything_was_written(arguments: list[str], trained: Path, few: Path) -> None:
    run = [f"'{trained}'"] if arguments[0] != "data" else []
    words = " ".join([arguments[0], *run, *arguments[1:], "--data", f"'{few}'"])
    command = f"'{sys.executable}' -m convwave {words} | true"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr


def test_training_goes_on_when_nobody_reads_its_progress(few: Path, tmp_path: Path) -> None:
    train = f"'{sys.executable}' -m convwave train --steps 40 --batch 64 --out '{tmp_path / 'r'}' --data '{few}'"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{train} 2>&1 | true"], capture_output=True, text=True)
    assert done.returncode == 0
    assert (tmp_path / "r/model.safetensors").exists()


def test_any_letter_can_be_printed_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "unicode.txt"
    path.write_text("žofie\n語\nłukasz\n" * 5, encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = [sys.executable, "-m", "convwave"]
    options = ["--data", str(path)]
    out = str(tmp_path / "r")
    for arguments in (
        ["data", "--json"],
        ["train", "--steps", "3", "--out", out],
        ["sample", out, "--json"],
        ["sample", out],
    ):
        done = subprocess.run([*run, *arguments, *options], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        if "--json" in arguments:
            assert last_json(done.stdout)
    assert (
        "ž"
        in last_json(subprocess.run([*run, "data", "--json", *options], capture_output=True, text=True).stdout)[
            "vocabulary"
        ]
    )


def test_another_text_than_the_model_was_trained_on_is_said(trained: Path, few: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(few.read_text().split()[:100]))
    for command in ("sample", "evaluate"):
        assert cli.main([command, str(trained), "--data", str(other), "--json"]) == 0
        captured = capsys.readouterr()
        assert "was trained on another text" in captured.err
        assert last_json(captured.out)["trained_on_this_data"] is False
        assert cli.main([command, str(trained), "--data", str(few), "--json"]) == 0
        captured = capsys.readouterr()
        assert "another text" not in captured.err
        assert last_json(captured.out)["trained_on_this_data"] is True


def test_no_names_are_no_lines(trained: Path, few: Path, capsys) -> None:
    assert cli.main(["sample", str(trained), "-n", "0", "--data", str(few)]) == 0
    assert capsys.readouterr().out == ""


def test_reproduce_in_small(few: Path, tmp_path: Path, capsys) -> None:
    arguments = ["reproduce", "--blog-steps", "20", "--fast-steps", "5", "--data", str(few), "--out", str(tmp_path)]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    report = last_json(captured.out)
    assert [row["model"] for row in report["rows"]] == ["mlp3", "mlp8", "hierarchical", "convwave"]
    assert [row["published_val"] for row in report["rows"]] == [None] * 4, "the post's figures are for its words"
    assert {"command", "commit", "device", "versions"} <= report["provenance"].keys()
    assert json.loads((tmp_path / "reproduce.json").read_text()) == report
    assert (tmp_path / "reproduce.png").read_bytes().startswith(b"\x89PNG")
    assert "2.1033" not in captured.err
    assert "holds a reproduction already" in refused(arguments, capsys)
    assert cli.main([*arguments, "--resume", "--json"]) == 0
    again = last_json(capsys.readouterr().out)
    assert [row["val_loss"] for row in again["rows"]] == [row["val_loss"] for row in report["rows"]]


def test_data(few: Path, tmp_path: Path, capsys, monkeypatch, words: cw.Words) -> None:
    assert cli.main(["data", "--data", str(few), "--json"]) == 0
    shown = last_json(capsys.readouterr().out)
    assert shown["words"] == 300
    assert shown["splits"] == {"train": 240, "val": 30, "test": 30}
    monkeypatch.setattr(data, "data_directory", lambda: tmp_path)
    assert "download failed" in refused(["data", "fetch", "--url", (tmp_path / "no").as_uri()], capsys)
    assert "SHA-256" in refused(["data", "fetch", "--url", few.as_uri()], capsys)
    assert not (tmp_path / "names.txt").exists()


def test_data_says_when_it_is_the_bundled_list(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CONVWAVE_DATA", raising=False)
    bundled = cw.data.bundled_words()
    monkeypatch.setattr("convwave.cli.console.load_words", lambda path: bundled)
    assert cli.main(["data"]) == 0
    assert "the bundled given names" in capsys.readouterr().err


def test_refusals(trained: Path, few: Path, tmp_path: Path, capsys) -> None:
    bad, none = tmp_path / "bad.txt", str(tmp_path / "no.toml")
    bad.write_bytes(b"anna\nb.b\n")
    (tmp_path / "file").write_text("")
    use = ["--data", str(few)]
    other = tmp_path / "other.txt"
    other.write_text("žofie\nanna\nberta\n")
    for arguments, text in [
        (["train", "--data", str(tmp_path / "none.txt")], "none.txt: no such file"),
        (["train", "--data", str(tmp_path)], "is a directory"),
        (["train", "--data", str(bad)], "bad.txt: line 2: 'b.b' contains '.'"),
        (["train", "--steps", "0", *use], "--steps: expected 1 to 2,147,483,647, got 0"),
        (["train", "--steps", "many", *use], "--steps: invalid int value: 'many'"),
        (["train", "--model", "rnn", *use], "invalid choice: 'rnn'"),
        (["train", "--model", "mlp3", "--recipe", "fast", *use], "mlp3 is trained by SGD on windows only"),
        (["train", "--tier", "warp", *use], "invalid choice: 'warp'"),
        (["train", "--recipe", "slow", *use], "recipe: expected one of blog, fast"),
        (["train", "--recipe", none, *use], f"--recipe: {none}: No such file"),
        (["train", "--set", "adam_lr=much", *use], "--set: adam_lr: expected a number, got 'much'"),
        (["train", "--set", "colour=red", *use], "--set: colour: expected a field of a recipe"),
        (["train", "--model", "mlp3", "--set", "n_embd=5", *use], "n_embd, n_hidden, levels: fixed for mlp3"),
        (["train", "--tier", "cpu", "--recipe", "blog", *use], "tier: expected one of reference"),
        (["train", "--out", str(trained), "--resume", "--tier", "reference", *use], "--tier:"),
        (["train", "--save-every", "-1", *use], "--save-every"),
        (["train", "--device", "abacus", *use], "--device: 'abacus' is not available"),
        (["train", "--resume", *use], "--resume: needs --out"),
        (["train", "--out", str(trained), *use], "holds a run already"),
        (["train", "--out", str(trained), "--resume", "--seed", "9", *use], "--seed:"),
        (["train", "--out", str(trained), "--resume", "--data", str(other)], "other data"),
        (["train", "--steps", "1", "--out", str(tmp_path / "file/deeper"), *use], str(tmp_path / "file")),
        (["train", "--device", "meta", *use], "--device: expected cpu or cuda, got 'meta'"),
        (["train", "--seed", str(2**64), *use], "seed: expected at most 2**64 - 1"),
        (["train", "--keep", "worst", *use], "invalid choice: 'worst'"),
        (["train", "--keep", "best", "--data", str(other)], "keep: "),
        (["train", "--out", str(trained), "--resume", "--steps", "20", *use], "--steps: "),
        (["train", "--init", str(tmp_path / "none"), *use], "no such file"),
        (
            ["train", "--init", str(trained), "--n-hidden", "9", *use],
            "init: expected a network with n_hidden (9, 9, 9)",
        ),
        (
            ["train", "--init", str(trained), "--keep", "last", "--data", str(other)],
            "init: the network has no token for 'ž'",
        ),
        (["verify", str(trained), "--seed", str(2**64), *use], "--seed: expected 0 to 2**64 - 1"),
        (["verify", "--seed", "-1", *use], "--seed: expected 0 to 2**64 - 1"),
        (["train", "--recipe", "blog", "--batch", "1", *use], "batch: expected at least 2 windows"),
        (["train", "--save-every", "nan", *use], "--save-every"),
        (["sample", str(trained), "--seed", str(2**64), *use], "--seed"),
        (["verify", str(trained), "--out", str(tmp_path / "file"), *use], str(tmp_path / "file")),
        (["evaluate", str(tmp_path / "none"), *use], "no such file"),
        (["evaluate", str(few), *use], "not a usable safetensors file"),
        (["evaluate", str(trained), "--data", str(other)], "character 'ž'"),
        (["sample", str(trained), "--prefix", "ž", *use], "--prefix: character 'ž'"),
        (["sample", str(trained), "--temperature", "-1", *use], "temperature: expected"),
        (["sample", str(trained), "--count", "-1", *use], "--count"),
        (["dance"], "invalid choice: 'dance'"),
        ([], "required: command"),
    ]:
        assert text in refused(arguments, capsys), arguments


def test_a_run_remembers_its_words(trained: Path, few: Path, tmp_path: Path, capsys) -> None:
    """No --data: every command takes the run's own, says so where they are gone, and continues with the default."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    data = tmp_path / "words.txt"
    shutil.copy(few, data)
    memory = json.loads((run / "run.json").read_text())
    assert memory["data"] == {
        "name": str(few),
        "path": str(few),
        "sha256": hashlib.sha256(few.read_bytes()).hexdigest(),
    }
    assert (memory["config"]["steps"], memory["config"]["recipe"]["name"]) == (30, "fast")
    memory["data"]["path"] = str(data)
    (run / "run.json").write_text(json.dumps(memory))
    commands = {"evaluate": [str(run)], "sample": [str(run), "-n", "3"], "train": ["--out", str(run), "--resume"]}
    commands["evaluate "] = [str(run / "model.safetensors")]
    for name, arguments in commands.items():
        assert cli.main([name.strip(), *arguments, "--json"]) == 0
        assert f"data: {data}, 300 words" in capsys.readouterr().err
    for reason in ("is not what it was", "no such file"):
        if reason == "no such file":
            data.unlink()
        else:
            data.write_text("other\nwords\n")
        assert cli.main(["evaluate", str(run), "--json"]) in (0, 2)  # the default may have letters of its own
        error = capsys.readouterr().err
        assert "note: the words that" in error
        assert f"{data}" in error
        assert reason in error
        status = cli.main(["train", "--out", str(run), "--resume"])
        error = capsys.readouterr().err
        assert (status, "note: the words that" in error, "other data" in error) == (2, True, True)
    for rubbish in ("{", "[]", '{"data": {"name": 5, "sha256": "", "path": []}}', '{"data": 5}'):
        (run / "run.json").write_text(rubbish)
        assert cli.main(["evaluate", str(run), "--data", str(few)]) == 0


def test_bundled_names_are_remembered_too(tmp_path: Path, capsys, monkeypatch) -> None:
    bundled = cw.data.bundled_words()
    monkeypatch.setattr("convwave.cli.console.load_words", lambda path: bundled)
    assert cli.main(["train", "--steps", "2", "--out", str(tmp_path)]) == 0
    monkeypatch.undo()
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path)]) == 0
    assert "data: the bundled given names" in capsys.readouterr().err


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("model", ["convwave", "mlp8"])
def test_an_interrupted_run_is_evaluated_and_sampled(model: str, keep: str, few: Path, tmp_path: Path, capsys) -> None:
    """The network so far: the best measured, or that of the last step, in the numbers that stopping there gives."""
    options = ["train", "--model", model, "--keep", keep, "--data", str(few), "--seed", "1"]
    short, cut = tmp_path / "short", tmp_path / "cut"
    assert cli.main([*options, "--steps", "10", "--out", str(short)]) == 0
    shutil.copytree(short, cut)
    (cut / "model.safetensors").unlink()
    capsys.readouterr()
    losses = []
    for run in (short, cut):
        assert cli.main(["evaluate", str(run), "--json"]) == 0
        captured = capsys.readouterr()
        losses.append(last_json(captured.out)["splits"]["val"]["loss"])
    assert "was interrupted" in captured.err
    assert losses[0] == losses[1]
    assert cli.main(["sample", str(cut), "-n", "5"]) == 0
    few_gone = json.loads((cut / "run.json").read_text())
    few_gone["data"]["path"] = str(tmp_path / "gone.txt")
    (cut / "run.json").write_text(json.dumps(few_gone))
    capsys.readouterr()
    if (model, keep) == ("convwave", "last"):  # its statistics are those of the words
        assert cli.main(["sample", str(cut), "-n", "5"]) == 2
        assert "needs the words it learns" in capsys.readouterr().err
        assert cli.main(["sample", str(cut), "-n", "5", "--data", str(few)]) == 0
    else:
        assert cli.main(["sample", str(cut), "-n", "5"]) == 0


def test_the_newest_run_may_be_an_interrupted_one(
    trained: Path, few: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    shutil.copytree(trained, tmp_path / "runs/a")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a/model.safetensors").unlink()
    assert cli.main(["sample", "-n", "2", "--data", str(few)]) == 0
    assert "runs/a was interrupted" in capsys.readouterr().err
    for name, age in (("old", 100), ("new", 50)):
        shutil.copytree(trained, tmp_path / "runs" / name)
        then = time.time() - age
        os.utime(tmp_path / "runs" / name / "model.safetensors", (then, then))
    assert cli.main(["sample", "-n", "2", "--data", str(few), "--json"]) == 0
    assert last_json(capsys.readouterr().out)["checkpoint"] == "runs/new/model.safetensors"


def test_a_run_is_extended(few: Path, tmp_path: Path, capsys) -> None:
    out = str(tmp_path / "r")
    arguments = ["train", "--batch", "64", "--data", str(few), "--out", out, "--json"]
    assert cli.main([*arguments, "--steps", "8"]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--out", out, "--resume", "--steps", "12", "--json"]) == 0
    captured = capsys.readouterr()
    assert "from step 8 to 12: the schedule starts anew from the saved weights" in captured.err
    assert (last_json(captured.out)["steps"], last_json(captured.out)["start"]) == (12, 8)
    assert cli.main(["train", "--out", out, "--resume", "--steps", "12"]) == 0
    assert "extending" not in capsys.readouterr().err


def test_another_run_gives_its_weights(trained: Path, few: Path, tmp_path: Path, capsys) -> None:
    """Names of some of the letters: the network keeps its own vocabulary, and a resumed run too."""
    data, out = tmp_path / "few.txt", str(tmp_path / "r")
    words = [word for word in few.read_text().split() if "a" in word and "y" not in word]
    data.write_text("\n".join(words))
    tune = ["train", "--init", str(trained), "--steps", "2", "--set", "lr=0.001", "--set", "adam_lr=0.0001"]
    assert cli.main([*tune, "--data", str(data), "--out", out, "--json"]) == 0
    tuned = last_json(capsys.readouterr().out)
    assert tuned["init"] == str(trained / "model.safetensors")
    assert cw.load(Path(out) / "model.safetensors").vocabulary == cw.load(trained / "model.safetensors").vocabulary
    assert cli.main([*tune[:1], *tune[3:], "--data", str(data), "--json"]) == 0
    assert tuned["train_loss"] < last_json(capsys.readouterr().out)["train_loss"] - 0.2
    assert cli.main(["train", "--out", out, "--resume", "--steps", "3"]) == 0


def test_runs_of_the_same_second_have_folders_of_their_own(few: Path, tmp_path: Path, monkeypatch) -> None:
    class Noon(datetime):
        @classmethod
        def now(cls, tz: object = None) -> Noon:
            return cls(2026, 1, 2, 12, 0, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("convwave.cli.train.datetime", Noon)
    for _ in range(3):
        assert cli.main(["train", "--steps", "1", "--data", str(few)]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        f"20260102-120000-convwave-fast-0{end}" for end in ("", "-2", "-3")
    ]


def test_little_data_is_said(tmp_path: Path, few: Path, capsys) -> None:
    path = tmp_path / "eleven.txt"
    path.write_text(
        "\n".join(["anna", "berta", "carla", "dora", "emma", "frida", "gerda", "hanna", "ida", "jana", "zoë"])
    )
    assert cli.main(["train", "--steps", "1", "--data", str(path), "--out", str(tmp_path / "r")]) == 0
    error = capsys.readouterr().err
    assert "note: 11 words are few: 8 to train on, 1 to validate with" in error
    train = "".join(cw.split_words(path.read_text().split()).train)
    unseen = "".join(sorted(set(path.read_text()) - set(train) - {"\n"}))
    assert unseen
    assert f"note: no word to train on has {unseen!r}" in error
    assert cli.main(["train", "--steps", "1", "--data", str(few), "--out", str(tmp_path / "s")]) == 0
    assert "are few" not in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_a_note(few: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        assert (out / "result.json").exists() or (out / "reproduce.json").exists(), "results come first"
        raise RuntimeError("no LaTeX\nlong story")

    monkeypatch.setattr("convwave.runs.folder.loss_plot", fail)
    monkeypatch.setattr("convwave.runs.plots.reproduction_plot", fail)
    out = tmp_path / "r"
    assert cli.main(["train", "--steps", "1", "--data", str(few), "--out", str(out)]) == 0
    error = capsys.readouterr().err
    assert f"note: {out / 'loss.png'} was not drawn: RuntimeError: no LaTeX\n" in error
    assert "Loss in nats" in error
    monkeypatch.setattr("convwave.runs.folder.loss_plot", lambda *args: None)
    out = tmp_path / "all"
    arguments = ["reproduce", "--blog-steps", "1", "--fast-steps", "1", "--data", str(few), "--out", str(out)]
    assert cli.main(arguments) == 0
    assert "reproduce.png was not drawn" in capsys.readouterr().err


def test_verify_removes_its_own_left_overs_only(trained: Path, few: Path, tmp_path: Path) -> None:
    for name in (".certificate.json.77.partial", ".holiday.partial", ".state.safetensors.77.partial"):
        (tmp_path / name).write_text("")
    assert cli.main(["verify", str(trained), "--data", str(few), "--out", str(tmp_path)]) == 0
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".holiday.partial", ".state.safetensors.77.partial", "certificate.json"]


@pytest.mark.parametrize(
    "value", ["0", "-1", "nan", "1.5", str(2**31), str(2**53), str(2**63), str(2**64), "9" * 5000, ""]
)
@pytest.mark.parametrize(
    "option",
    [
        *("train --steps", "train --batch", "train --n-embd", "train --n-hidden", "train --levels"),
        *(
            "reproduce --blog-steps",
            "reproduce --fast-steps",
            "sample --top-k",
            "sample --max-length",
            "sample --count",
        ),
    ],
)
def test_numbers_out_of_range_are_one_short_line(option: str, value: str, few: Path, trained: Path, capsys) -> None:
    command, name = option.split()
    if (name, value) == ("--count", "0"):
        return
    run = [str(trained)] if command == "sample" else []
    line = refused([command, *run, f"{name}={value}", "--data", str(few)], capsys)
    assert name.strip("-") in line
    assert len(line) < 400


def test_sizes_beyond_memory_are_refused_before_it_is_full(few: Path, capsys) -> None:
    for options in (["--n-hidden", "1000000"], ["--n-embd", "2000000000"], ["--batch", "2000000000"]):
        assert "GB of memory" in refused(["train", *options, "--data", str(few)], capsys)
    assert "GB of memory" in refused(["train", "--set", f"n_hidden={2**40}", "--data", str(few)], capsys)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried\nto")]
)
def test_too_little_memory_is_one_line(error: Exception, trained: Path, few: Path, capsys, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("convwave.cli.model.load", fail)
    assert "memory" in refused(["evaluate", str(trained), "--data", str(few)], capsys)


def test_odd_paths_and_devices_are_refused(trained: Path, few: Path, tmp_path: Path, capsys) -> None:
    use = ["--data", str(few)]
    for arguments, text in [
        (["evaluate", str(trained), "--data", ""], "expected the path of a text file, got ''"),
        (["evaluate", str(trained), "--data", "a\0b"], "null byte"),
        (["evaluate", "", *use], "expected a path, got ''"),
        (["evaluate", "a\0b", *use], "expected a path, got 'a\\x00b'"),
        (["train", "--out", "", *use], "expected a path, got ''"),
        (["evaluate", os.devnull, *use], "is not a regular file"),
        (["evaluate", str(trained), "--device", "cpu:99", *use], "--device: expected cpu or cuda, got 'cpu:99'"),
        (["evaluate", str(trained), "--device", "hpu", *use], "--device: 'hpu' is not available"),
        (["evaluate", str(trained), "--device", "\udcff", *use], "--device: '\\udcff' is not available"),
        (["sample", str(trained), "--prefix", "\udcff", *use], "--prefix: character '\\udcff'"),
        (["sample", str(trained), "--seed", "-1", *use], "--seed: expected 0 to 2**64 - 1, got -1"),
        (["verify", str(trained), "--seed", str(2**64), *use], "--seed: expected 0 to 2**64 - 1"),
        (["evaluate", "a\nb", *use], "a b: no such file"),
    ]:
        assert text in refused(arguments, capsys), arguments
    assert cli.main(["evaluate", str(trained), "--device", "cpu:0", *use]) == 0


def test_weights_that_make_no_probabilities_are_named(trained: Path, few: Path, tmp_path: Path, capsys) -> None:
    model = cw.load(trained / "model.safetensors")
    with torch.no_grad():
        model.head.weight.fill_(3e38)
    model.save(tmp_path / "m")
    for command in (["evaluate"], ["evaluate", "--json"], ["sample"]):
        line = refused([command[0], str(tmp_path / "m"), *command[1:], "--data", str(few)], capsys)
        assert "the loss of split" in line or "logits are not finite" in line


@pytest.mark.skipif(sys.platform == "win32", reason="needs file descriptors of Unix")
def test_closed_streams_are_no_error_and_nothing_strays(trained: Path, few: Path) -> None:
    """As under cron or pythonw: a message for standard error must not come out on standard output."""
    run = f"'{sys.executable}' -m convwave"
    for words, status in [(f"sample '{trained}' -n 2 --data '{few}'", 0), ("evaluate nowhere", 2), ("dance", 2)]:
        for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
            done = subprocess.run(["bash", "-c", f"{run} {words} {closed}"], capture_output=True, text=True)
            assert done.returncode == status, done.stderr
            assert "Traceback" not in done.stderr
            if closed == "2>&-" and status:
                assert done.stdout == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(few: Path) -> None:
    command = f"'{sys.executable}' -m convwave data --json --data '{few}' > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "convwave: standard output: No space left on device"


def test_an_ascii_locale_in_another_folder(trained: Path, few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "žé語"
    folder.mkdir()
    for name, source in (("m", trained / "model.safetensors"), ("n", few)):
        (folder / name).write_bytes(source.read_bytes())
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "convwave", "evaluate", "m", "--data", str(folder / "n"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **locale}, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["splits"]


def test_names_are_fresh_each_time_and_the_seed_repeats_them(trained: Path, few: Path, capsys) -> None:
    arguments = ["sample", str(trained), "--data", str(few)]
    drawn = []
    for _ in range(2):
        assert cli.main(arguments) == 0
        drawn.append(capsys.readouterr())
    assert drawn[0].out != drawn[1].out
    seed = re.search(r"seed (\d+): --seed \1 draws these names again", drawn[0].err)
    assert seed
    assert cli.main([*arguments, "--seed", seed[1]]) == 0
    again = capsys.readouterr()
    assert again.out == drawn[0].out
    assert "draws these names again" not in again.err
    assert "/s" not in again.err, "twenty names have no rate"
    assert cli.main([*arguments, "-n", "2000", "--json"]) == 0
    captured = capsys.readouterr()
    assert "/s)" in captured.err
    assert last_json(captured.out)["seed"] >= 0


def test_new_and_unique_names(trained: Path, few: Path, capsys, monkeypatch) -> None:
    arguments = ["sample", str(trained), "--data", str(few), "-n", "200", "--seed", "1", "--max-length", "3", "--json"]
    words = set(few.read_text().split())
    monkeypatch.setattr("convwave.infer.generate.FRUITLESS", 2000)
    every, new, unique = (
        [entry["name"] for entry in last_json(run)["names"]]
        for run in (
            cli.main([*arguments, *options]) or capsys.readouterr().out
            for options in ([], ["--new-only"], ["--new-only", "--unique"])
        )
    )
    assert len(every) == len(new) == len(unique) == len(set(unique)) == 200
    assert words.isdisjoint(new)
    assert words.isdisjoint(unique)
    assert len(set(every)) < 200
    assert cli.main(["sample", str(trained), "--data", str(few), "--temperature", "0", "--unique"]) == 0
    assert "2,000 draws in a row brought no other name" in capsys.readouterr().err


def test_resume_takes_the_options_of_the_run(trained: Path, few: Path, capsys) -> None:
    assert cli.main(["train", "--out", str(trained), "--resume", "--data", str(few), "--json"]) == 0
    result = last_json(capsys.readouterr().out)
    assert (result["steps"], result["batch"]) == (30, 64)


def test_a_recipe_is_varied_and_resumed(few: Path, tmp_path: Path, capsys) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('base = "fast"\nbatch = 64\nsteps = 5\n')
    out, use = str(tmp_path / "r"), ["--data", str(few), "--json"]
    arguments = ["train", "--recipe", str(recipe), "--set", "adam_lr=0.02", "--set", "warmup=0.2", "--out", out]
    assert cli.main([*arguments, *use]) == 0
    result = last_json(capsys.readouterr().out)
    assert (result["recipe"], result["steps"], result["batch"]) == ("mine+adam_lr=0.02+warmup=0.2", 5, 64)
    assert (result["recipe_fields"]["adam_lr"], result["recipe_fields"]["warmup"]) == (0.02, 0.2)
    for again in (arguments, ["train", "--out", out], ["train", "--out", out, "--set", "adam_lr=0.02"]):
        assert cli.main([*again, "--resume", *use]) == 0
        assert last_json(capsys.readouterr().out)["val_loss"] == result["val_loss"]
    for changed, text in [
        (["--set", "adam_lr=0.03"], "--set adam_lr: "),
        (["--recipe", "fast"], "--recipe: "),
        (["--recipe", str(recipe)], "--recipe: "),
    ]:
        assert text in refused(["train", "--out", out, "--resume", *changed, *use], capsys)
    recipe.write_text('base = "fast"\nbatch = 64\nsteps = 5\nlr = 0.2\n')
    assert "lr: " in refused([*arguments, "--resume", *use], capsys)


def test_the_old_form_of_a_state_is_refused(few: Path, trained: Path, tmp_path: Path, capsys) -> None:
    old = tmp_path / "old"
    old.mkdir()
    state = (trained / "state.safetensors").read_bytes()
    (old / "state.safetensors").write_bytes(state.replace(b"convwave.state.3", b"convwave.state.2"))
    line = refused(["train", "--out", str(old), "--resume", "--data", str(few)], capsys)
    assert "expected a file of format 'convwave.state.3', got 'convwave.state.2'" in line


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["train", "--help"], ["train", "--tier", "warp"], []])
def test_what_needs_no_torch_imports_none(arguments: list[str]) -> None:
    """Some 0.1 s instead of 3: importing torch, rich and numpy takes the rest."""
    code = (
        "import sys\n"
        "from convwave import cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'rich', 'numpy', 'matplotlib', 'safetensors') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_bench_is_a_child_process_of_the_checkout(tmp_path: Path, capfd, monkeypatch) -> None:
    """What `convwave bench` passes on and returns, whatever is in the current folder."""
    package = tmp_path / "checkout/convwave/cli/main.py"
    benchmarks = tmp_path / "checkout/benchmarks"
    benchmarks.mkdir(parents=True)
    (tmp_path / "checkout/setup.py").write_text("")
    (tmp_path / "benchmarks.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["convwave.cli.main"], "__file__", str(package))
    assert cli.main(["bench", "--list"]) == 2
    assert capfd.readouterr().err.startswith("convwave: bench: needs a checkout of convwave")
    (benchmarks / "__main__.py").write_text("import os, sys\nprint(sys.argv[1:], os.getcwd())\nsys.exit(3)\n")
    assert cli.main(["bench", "steps", "--json", "--data", "x.txt", "--help"]) == 3
    assert capfd.readouterr().out.strip() == f"['steps', '--json', '--data', 'x.txt', '--help'] {tmp_path}"


def test_ctrl_c_saves_and_exits_in_good_order(few: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    command = [sys.executable, "-m", "convwave", "train", "--steps", "100000", "--out", str(out), "--data", str(few)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
    )
    while not (out / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert "stopped after step" in error.splitlines()[-1]
    assert "--resume" in error.splitlines()[-1]


def test_divergence_is_status_1(few: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    from convwave.train.closed_form import ClosedFormRun

    monkeypatch.setattr(ClosedFormRun, "step", lambda self, i: float("inf"))
    assert cli.main(["train", "--out", str(tmp_path / "r"), "--data", str(few)]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("convwave: the loss is inf at step 1")


def test_progress_on_a_terminal(few: Path, tmp_path: Path) -> None:
    """A real terminal: a bar with loss, positions per second and time left."""
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    leader, follower = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "convwave",
        "train",
        "--steps",
        "150",
        "--out",
        str(tmp_path / "r"),
        "--data",
        str(few),
    ]
    process = subprocess.Popen(command, stderr=follower, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"})
    os.close(follower)
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0
    text = seen.decode(errors="replace")
    assert "positions/s" in text
    assert "150/150" in text
    assert "━" in text


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == f"convwave {cw.__version__}"
