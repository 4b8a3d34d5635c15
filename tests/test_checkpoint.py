"""Model files: what is saved comes back, and damage is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import convwave as cw
from convwave.files import write_atomic


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_saved_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vocabulary = cw.Vocabulary(".abž語")
    model = cw.ConvWave(5, 3, 7, factors=(4, 2), unbiased=False, statistics="positions", vocabulary=vocabulary)
    model.to(dtype)
    model(cw.dense_graph(cw.pack_ids([[1, 2, 3], [4]]), factors=(4, 2)))
    model.save(tmp_path / "deep/m.safetensors")
    loaded = cw.load(tmp_path / "deep/m.safetensors")
    assert not loaded.training
    assert loaded.config() == model.config()
    assert loaded.vocabulary == vocabulary
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
        assert loaded.state_dict()[name].dtype == (dtype if tensor.is_floating_point() else torch.int64)


def test_eps_and_momentum_of_every_level_come_back(tmp_path: Path) -> None:
    model = cw.ConvWave(5, 3, 7, levels=2, eps=[1e-1, 1e-3], momentum=[0.3, 0.2])
    model.data_sha256 = "abc"
    model.save(tmp_path / "m.safetensors")
    loaded = cw.load(tmp_path / "m.safetensors")
    assert [(b.norm.eps, b.norm.momentum) for b in loaded.layers] == [(1e-1, 0.3), (1e-3, 0.2)]
    assert loaded.data_sha256 == "abc"


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(cw.CheckpointError, match="no such file"):
        cw.load(path)
    with pytest.raises(cw.CheckpointError, match="is a directory"):
        cw.load(tmp_path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(cw.CheckpointError, match="not a usable safetensors file"):
        cw.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(cw.CheckpointError, match=r"expected a file of format 'convwave.model.1', got ''"):
        cw.load(path)
    save_file({"x": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(cw.CheckpointError, match=r"expected a file of format 'convwave.model.1', got 'pt'"):
        cw.load(path)
    broken = cw.ConvWave(5)
    broken.head.bias.data[1] = float("nan")
    broken.save(path)
    with pytest.raises(cw.CheckpointError, match=r"head\.bias is not finite"):
        cw.load(path)
    cw.ConvWave(5).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(cw.CheckpointError, match="not a usable safetensors file"):
        cw.load(path)
    path.write_bytes(whole.replace(b"head.weight", b"hair.weight"))
    with pytest.raises(cw.CheckpointError, match="its checksum is not that of its content"):
        cw.load(path)


def test_a_crash_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    cw.ConvWave(5).save(path)
    before = path.read_bytes()

    def crash(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="Input/output"):
        write_atomic(path, b"half")
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_links_are_followed_and_other_things_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", Path(os.devnull)):
        with pytest.raises(OSError, match="not a regular file"):
            write_atomic(target, b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "real"]
