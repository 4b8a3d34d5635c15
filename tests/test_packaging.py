"""What is installed, what is imported, and what must not be."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest

import convwave

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("convwave", "kernels", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_kernels_are_installed_as_convwave_kernels() -> None:
    spec = util.find_spec("convwave.kernels")
    assert spec is not None
    assert spec.origin is not None
    assert "convwave" in metadata.packages_distributions()
    assert not [path for path in SOURCES for name in imports(path) if name.split(".")[0] == "kernels"]


def test_the_library_imports_without_triton_rich_or_matplotlib() -> None:
    """Triton is missing on macOS and Windows; the other two only the commands need."""
    code = (
        "import sys\n"
        "for name in ('triton', 'rich', 'matplotlib'): sys.modules[name] = None\n"
        "import convwave as cw\n"
        "graph = cw.dense_graph(cw.pack_ids([[1, 2], [3]]))\n"
        "print(float(cw.loss(cw.ConvWave(4)(graph), graph)) > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_reference_imports_nothing_of_convwave_but_data() -> None:
    ours = {name for name in imports(ROOT / "convwave/reference.py") if name.startswith("convwave")}
    assert ours <= {"convwave.data", "convwave.data.Packed"}


def test_imports_point_downward() -> None:
    """data < graph < functional < nn < convert, checkpoint < evaluation, generation < training < cli."""
    order = ["data", "reference", "graph", "eager", "ops", "functional", "nn", "checkpoint", "convert", "optim"]
    order += ["batches", "closed_form", "inference", "evaluation", "generation", "recipes", "tiers", "plotting"]
    order += ["training", "verification", "provenance", "console", "cli"]
    for position, module in enumerate(order):
        body = ast.parse((ROOT / f"convwave/{module}.py").read_text(encoding="utf-8")).body
        for node in body:
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            if node.module == "convwave":
                names = [alias.name for alias in node.names if alias.name in order]
            else:
                names = [node.module.split(".")[1]] if node.module.startswith("convwave.") else []
            for name in names:
                assert order.index(name) < position, (module, name)


def test_public_names_exist_and_are_documented() -> None:
    for name in convwave.__all__:
        value = getattr(convwave, name)
        assert value.__doc__, name
    promised = "Vocabulary pack pack_ids dense_graph windowed_graph distinct_graph ConvWave loss reference"
    promised += " from_windowed to_windowed conv_bn_tanh load"
    assert set(promised.split()) <= set(convwave.__all__)
    assert (ROOT / "convwave/py.typed").exists()


def test_the_posts_data_is_not_in_the_repository() -> None:
    done = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    assert "data/names.txt" not in done.stdout.split()
