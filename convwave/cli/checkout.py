"""What only a checkout has: benchmarks, and the interpreter of compiled kernels. Both run as processes of their own."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from convwave.train.config import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convwave.data.packing import Vocabulary
    from convwave.nn import ConvWave
    from convwave.verify.certificate import Check

COMPILED_NAMES = 24  # of the text, and as many random ones


def find(part: str) -> Path | None:
    """The checkout that this package lies in, if it has a file `part`; None if the package was installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "setup.py").is_file() and (root / part).is_file() else None


def environment(root: Path) -> dict[str, str]:
    """The process's own, with the checkout's packages before others."""
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


def check_compiled() -> Path:
    """The checkout that can execute compiled kernels.

    Raises:
        UsageError: there is none, or no triton.
    """
    root = find("tests/ptx/certify.py")
    if root is None:
        raise UsageError("--compiled: needs a checkout of convwave, tests/ is not installed with the library")
    if not _has_triton():
        raise UsageError("--compiled: the package triton is not installed (pip install triton)")
    return root


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # what Python says of a module that was blocked
        return False


def compiled_checks(
    model: ConvWave, vocabulary: Vocabulary, words: Sequence[str], target: str, seed: int
) -> list[Check]:
    """Compile a network's kernels for a GPU, execute them on a few names, and compare with the windowed network.

    Args:
        model: not modified.
        vocabulary, words: the text, of which `COMPILED_NAMES` names are drawn.
        target: sm_80 or sm_90.
        seed: of names, batches and the order of programs.

    Raises:
        UsageError: the process that does it failed.
    """
    from convwave.verify.certificate import Check

    root = check_compiled()
    names = random.Random(seed).sample(list(words), min(COMPILED_NAMES, len(words)))
    network = copy.deepcopy(model)
    network.vocabulary = vocabulary
    with tempfile.TemporaryDirectory() as folder:
        weights, text, out = (Path(folder) / name for name in ("model.safetensors", "names.txt", "checks.json"))
        network.save(weights)
        text.write_text("\n".join(names), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "tests.ptx.certify", *map(str, (weights, text, target, seed, out))]
        hidden = {**environment(root), "CUDA_VISIBLE_DEVICES": ""}
        hidden.pop("TRITON_INTERPRET", None)
        done = subprocess.run(command, env=hidden, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UsageError(f"--compiled: the compiled kernels could not be executed: {last}")
        return [Check(**fields) for fields in json.loads(out.read_text(encoding="utf-8"))]
