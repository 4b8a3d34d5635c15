"""verify passes on equal networks, and fails, naming the place, on unequal ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import convwave as cw
from convwave import cli
from convwave.infer.generate import GenerationCache
from convwave.ops import stack
from convwave.train.loop import Config, train
from convwave.verify import certificate as verification
from convwave.verify.certificate import Arithmetic, Check, verify, weights_sha256

CHECKS = ["logits", "loss", "gradients", "running statistics", "cached generation", "causality", "trajectory"]


@pytest.fixture(scope="module")
def splits(words: cw.Words) -> cw.Splits:
    return cw.split_words(words.words[:300])


@pytest.fixture(scope="module")
def few(words: cw.Words) -> cw.Words:
    return words._replace(words=words.words[:300])


def run(model: cw.ConvWave, splits: cw.Splits, vocab: cw.Vocabulary) -> dict[str, Check]:
    return {check.name: check for check in verify(model, splits, vocab, trajectory_steps=20)}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"n_embd": 3, "n_hidden": 7, "levels": 5},
        {"n_hidden": [9, 12], "factors": (4, 2)},
        {"n_hidden": 20, "factors": (8,)},
        {"unbiased": False},
    ],
    ids=str,
)
def test_equal_networks_pass_every_check(arguments: dict, splits: cw.Splits, vocab: cw.Vocabulary) -> None:
    torch.manual_seed(0)
    checks = run(cw.ConvWave(len(vocab), **arguments), splits, vocab)
    assert failed(checks) == set()
    assert all(any(name.startswith(kind) for name in checks) for kind in CHECKS)
    for kind in ("windowed", "dense", "distinct"):
        for precision in ("f64", "f32"):
            assert f"logits, evaluation, {kind}, {precision}" in checks
            assert f"gradients, training, {kind}, random counts, {precision}" in checks
            assert f"running statistics, {kind}, {precision}" in checks


def test_float64_weights_are_verified_as_they_are(splits: cw.Splits, vocab: cw.Vocabulary) -> None:
    torch.manual_seed(0)
    assert failed(run(cw.ConvWave(len(vocab)).double(), splits, vocab)) == set()


def test_the_model_is_left_as_it_was(splits: cw.Splits, vocab: cw.Vocabulary) -> None:
    model = cw.ConvWave(len(vocab))
    before = weights_sha256(model)
    run(model, splits, vocab)
    assert weights_sha256(model) == before
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.head.bias[0] += 1e-6
    assert weights_sha256(model) != before


def test_a_wrong_activation_is_located(splits: cw.Splits, vocab: cw.Vocabulary, monkeypatch) -> None:
    """Disturb one channel of level 1 of the convolution only; the check names level and channel."""
    net = cw.ConvWave(len(vocab))
    net.layers[1].register_forward_hook(lambda block, given, y: y * (1 + 1e-6 * (torch.arange(y.shape[1]) == 5)))
    checks = run(net, splits, vocab)
    for name in ("logits, evaluation, dense, f64", "logits, training, distinct, random counts, f64"):
        assert not checks[name].passed
        assert "position 0, level 1, node 0, channel 5" in checks[name].where
        assert checks[name].where.startswith("name '")


def leak(t: int):
    """A convolution that mixes in the next row: sees the future."""

    def broken(*args, **options):
        z = ORIGINAL(*args, **options)
        return z + 1e-3 * z.roll(-t, 0)

    return broken


ORIGINAL = stack.conv


def test_a_look_into_the_future_is_seen(splits: cw.Splits, vocab: cw.Vocabulary, monkeypatch) -> None:
    monkeypatch.setattr(stack, "conv", leak(1))
    names = failed(run(cw.ConvWave(len(vocab)), splits, vocab))
    assert {"causality, changed token, dense", "causality, planted NaN, dense"} <= names


def test_a_wrong_cache_is_seen(splits: cw.Splits, vocab: cw.Vocabulary, monkeypatch) -> None:
    original = GenerationCache.step

    def late(self, tokens):
        if self.position == 3:
            self.rings[1] = self.rings[1].roll(1, 0)
        return original(self, tokens)

    monkeypatch.setattr(GenerationCache, "step", late)
    checks = run(cw.ConvWave(len(vocab)), splits, vocab)
    assert failed(checks) == {"cached generation, f64", "cached generation, f32"}
    assert "position 3" in checks["cached generation, f64"].where


def test_nan_in_any_tensor_fails(splits: cw.Splits, vocab: cw.Vocabulary, monkeypatch) -> None:
    """A later, finite tensor must not hide it."""
    for name, checks in [("windowed_gradients", "gradients"), ("windowed_weights", "trajectory")]:
        original = getattr(verification, name)

        def poisoned(model, original=original):
            tensors = [t.detach().clone() for t in original(model)]
            tensors[1][:] = float("nan")
            return tensors

        monkeypatch.setattr(verification, name, poisoned)
        results = run(cw.ConvWave(len(vocab)), splits, vocab)
        monkeypatch.undo()
        found = failed(results)
        assert found
        assert all(n.startswith(checks) for n in found)
        assert found == {n for n in results if n.startswith(checks)}


def test_nan_before_the_changed_token_fails(splits: cw.Splits, vocab: cw.Vocabulary, monkeypatch) -> None:
    original = stack.conv
    calls = iter(range(10**9))

    def sometimes(*args, **options):
        z = original(*args, **options)
        return z * float("nan") if z.shape[1] == 11 and next(calls) > 20 else z

    monkeypatch.setattr(stack, "conv", sometimes)
    verifier = verification._Verifier(
        cw.ConvWave(len(vocab), n_hidden=11), splits, vocab, "", torch.device("cpu"), 0, verification.PLAIN
    )
    assert any(not check.passed and "changed token" in check.name for check in verifier.causality())


def test_a_head_of_zeros_and_texts_of_few_words_verify(splits: cw.Splits, vocab: cw.Vocabulary) -> None:
    torch.manual_seed(0)
    model = cw.ConvWave(len(vocab))
    with torch.no_grad():
        model.head.weight.zero_()
    assert failed(run(model, splits, vocab)) == set()
    for words in (["ab", "ba"], ["a"] * 10 + ["b"]):
        small = cw.Vocabulary.from_words(words)
        for seed in range(3):
            torch.manual_seed(seed)
            checks = verify(cw.ConvWave(3), cw.split_words(words), small, trajectory_steps=3, seed=seed)
            assert [check for check in checks if not check.passed] == []


def test_nan_is_a_failure() -> None:
    check = Check("x", "x", float("nan"), float("inf"), 1.0, "x")
    assert not check.passed
    assert json.loads(json.dumps(check.to_json(), allow_nan=False))["relative_error"] is None


def test_the_command(few: cw.Words, tmp_path: Path, capsys, monkeypatch) -> None:
    data = tmp_path / "few.txt"
    data.write_text("\n".join(few.words))
    train(Config.make(steps=5, batch=64), cw.read_words(data), tmp_path / "run")
    certificate = tmp_path / "proof/certificate.json"
    arguments = ["verify", str(tmp_path / "run"), "--data", str(data), "--out", str(tmp_path / "proof"), "--json"]
    original = verification.verify
    monkeypatch.setattr(verification, "verify", lambda *a, **k: original(*a, **k, trajectory_steps=10))
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report["passed"] is True
    assert all({"name", "max_abs_error", "bound", "passed"} <= check.keys() for check in report["checks"])
    assert all(check["max_abs_error"] <= check["bound"] for check in report["checks"])
    (network,) = report["networks"].values()
    assert network["weights_sha256"] == weights_sha256(cw.load(tmp_path / "run/model.safetensors"))
    assert {"data_sha256", "device", "provenance", "backends"} <= report.keys()
    assert json.loads(certificate.read_text()) == report

    monkeypatch.setattr(stack, "conv", leak(1))
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["passed"] is False
    assert "FAILED logits, evaluation, dense, f64" in captured.err
    assert "level 0" in captured.err


@pytest.fixture
def few_words(words: cw.Words, monkeypatch: pytest.MonkeyPatch) -> cw.Splits:
    """What triton's interpreter can do in a few seconds."""
    pytest.importorskip("triton")
    monkeypatch.setattr(verification, "GRAPHS", {"dense": cw.dense_graph})
    monkeypatch.setattr(verification._Verifier, "_made", lambda self, number: ["ab", "ba"])
    return cw.split_words(words.words[:30])


KERNELS = [Arithmetic(torch.float32, "triton", "ieee")]


def test_the_kernels_are_verified_too(few_words: cw.Splits, vocab: cw.Vocabulary) -> None:
    """In the interpreter here; on a CUDA device without asking."""
    model = cw.ConvWave(len(vocab), 6, [10, 12, 9])
    checks = list(verify(model, few_words, vocab, trajectory_steps=5, kernels=KERNELS))
    ours = [check for check in checks if "f32 kernels ieee" in check.name]
    assert len(ours) == 1 + 2 * 3 + 1  # evaluation, training with and without counts, statistics
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert model.backend == cw.ConvWave(5).backend  # left as it was


def test_a_fault_in_a_kernel_is_found(
    few_words: cw.Splits, vocab: cw.Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("convwave.kernels.stack")
    plain = kernels.norm_activate_forward
    monkeypatch.setattr(kernels, "norm_activate_forward", lambda z, *rest: plain(z, *rest) * (1 + 1e-4))
    model = cw.ConvWave(len(vocab), 6, [10, 12, 9])
    checks = verify(model, few_words, vocab, trajectory_steps=5, kernels=KERNELS)
    failed = {check.name for check in checks if not check.passed}
    assert any("logits, training" in name for name in failed)
    assert all("kernels" in name for name in failed)
