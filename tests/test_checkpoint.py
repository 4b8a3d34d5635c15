"""Model files: what is saved comes back, and damage is named."""

from __future__ import annotations

import json
import os
import random
import re
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import convwave as cw
from convwave.files import write_atomic, write_tensors
from convwave.nn import MODEL_FORMAT


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


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    """Of tensors, of the metadata and of the header; a file without a checksum, from before there was one, loads."""
    path = tmp_path / "m.safetensors"
    model = cw.ConvWave(5, 3, 4, levels=2, vocabulary=cw.Vocabulary(".abcd"))
    model.save(path)
    whole = path.read_bytes()
    pick = random.Random(0)
    for _ in range(1000):
        content = bytearray(whole)
        content[pick.randrange(len(content))] ^= 1 << pick.randrange(8)
        path.write_bytes(content)
        with pytest.raises(cw.CheckpointError) as caught:
            cw.load(path)
        assert "\n" not in str(caught.value)
    metadata = metadata_of(whole)
    assert re.fullmatch('"sha256:[0-9a-f]{64}"', metadata.pop("checksum"))
    save_file(model.state_dict(), path, metadata)
    assert torch.equal(cw.load(path).head.weight, model.head.weight)


def metadata_of(content: bytes) -> dict[str, str]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])["__metadata__"]


def test_tensors_that_make_no_numbers_are_refused(tmp_path: Path) -> None:
    model = cw.ConvWave(5, 3, 4, levels=2)
    path, right = tmp_path / "m.safetensors", model.state_dict()

    def save(change: dict[str, torch.Tensor], **config: object) -> None:
        values = {"config": {**model.config(), **config}, "vocabulary": None, "data_sha256": None}
        write_tensors(path, {**right, **change}, {"format": MODEL_FORMAT, **values})

    save({})
    assert cw.load(path).config() == model.config()
    var, head = "blocks.1.norm.running_var", "head.weight"
    for change, text in [
        ({var: -right[var]}, f"{var} is negative"),
        ({var: right[var] / 0}, f"{var} is not finite"),
        ({"blocks.0.norm.num_batches_tracked": torch.tensor(-1)}, "num_batches_tracked is negative"),
        ({"blocks.0.norm.num_batches_tracked": torch.tensor(1.0)}, "num_batches_tracked: expected int64, got float32"),
        ({head: right[head].to(torch.float8_e4m3fn)}, "float64, got float8_e4m3fn"),
        ({head: right[head].to(torch.complex64)}, "float64, got complex64"),
        ({head: right[head].long()}, "float64, got int64"),
        ({head: right[head][:, :3]}, r"head.weight: expected shape \(5, 4\) as in its configuration, got \(5, 3\)"),
        ({"more": right[head].clone()}, "Unexpected key"),
    ]:
        save(change)
        with pytest.raises(cw.CheckpointError, match=text):
            cw.load(path)


@pytest.mark.parametrize("eps", [None, 0, -1.0, "x", True, [1e-5], [1e-5, None], float("nan"), float("inf"), 2**64, {}])
def test_an_eps_that_is_no_positive_number_is_refused(eps: object, tmp_path: Path) -> None:
    model = cw.ConvWave(5, 3, 4, levels=2)
    values = {"config": {**model.config(), "eps": eps}, "vocabulary": None, "data_sha256": None}
    write_tensors(tmp_path / "m", model.state_dict(), {"format": MODEL_FORMAT, **values})
    with pytest.raises(cw.CheckpointError, match="does not hold a convwave model: eps"):
        cw.load(tmp_path / "m")


@pytest.mark.parametrize(
    "change",
    [
        {"n_hidden": [2**15] * 2},
        {"n_hidden": 2**15},
        {"vocab_size": 2**40},
        {"factors": [2] * 10**5},
        {"factors": [2, 2**40]},
        {"n_embd": 2**63},
        {"levels": 10**9, "factors": None},
        {"n_embd": -3},
        {"n_hidden": [4.0, 4.0]},
        {"unbiased": 1},
        {"momentum": 2},
        {"statistics": []},
        {"backend": "eager"},
        {"colour": "red"},
    ],
)
def test_no_network_is_built_that_the_file_has_no_room_for(change: dict[str, object], tmp_path: Path) -> None:
    """Small files that claim a large network: compared with the header's shapes first."""
    model = cw.ConvWave(5, 3, 4, levels=2)
    values = {"config": {**model.config(), **change}, "vocabulary": None, "data_sha256": None}
    write_tensors(tmp_path / "m", model.state_dict(), {"format": MODEL_FORMAT, **values})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(cw.CheckpointError, match="does not hold a convwave model"):
        cw.load(tmp_path / "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "{", "9" * 5000, '"x"', "null", "[]", "NaN", "", '{"a":' * 10**5, '{"factors": 3}']
)
def test_metadata_of_any_kind_is_refused(text: str, tmp_path: Path) -> None:
    model = cw.ConvWave(5, vocabulary=cw.Vocabulary(".abcd"))
    model.save(tmp_path / "m")
    metadata = metadata_of((tmp_path / "m").read_bytes())
    del metadata["checksum"]
    for key in ("config", "vocabulary", "data_sha256", "format"):
        if (key, text) in (("vocabulary", "null"), ("data_sha256", "null"), ("data_sha256", '"x"')):
            continue
        save_file(model.state_dict(), tmp_path / "m", {**metadata, key: text})
        with pytest.raises(cw.CheckpointError):
            cw.load(tmp_path / "m")


def test_headers_that_lie_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    cw.ConvWave(5).save(path)
    whole = path.read_bytes()
    for content in (b"", b"\0" * 7, (2**63).to_bytes(8, "little") + whole[8:], whole[:8] + b"[" * 10**5, whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(cw.CheckpointError, match="is not a usable safetensors file"):
            cw.load(path)
    path.write_bytes(whole)
    os.truncate(path, 2**40)  # takes no room on the disk
    with pytest.raises(cw.CheckpointError, match="its header tells of"):
        cw.load(path)
    for odd, reason in ((os.devnull, "is not a regular file"), ("a\0b", "null byte"), ("x" * 5000, "cannot be read")):
        with pytest.raises(cw.CheckpointError, match=reason):
            cw.load(odd)


def test_a_file_of_before_batches_were_counted_loads(tmp_path: Path) -> None:
    """And running statistics that were saved in half precision come back in float32."""
    model = cw.ConvWave(5, 3, 4, levels=2).to(torch.bfloat16)
    old = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    values = {"config": model.config(), "vocabulary": None, "data_sha256": None}
    write_tensors(tmp_path / "m", {n: v.to(torch.bfloat16) for n, v in old.items()}, {"format": MODEL_FORMAT, **values})
    loaded = cw.load(tmp_path / "m")
    for name, value in loaded.state_dict().items():
        expected = torch.int64 if "tracked" in name else torch.float32 if "running" in name else torch.bfloat16
        assert value.dtype == expected, name


def test_loading_draws_no_random_number(tmp_path: Path) -> None:
    cw.ConvWave(5).save(tmp_path / "m")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    cw.load(tmp_path / "m")
    assert torch.equal(torch.rand(3), expected)


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
