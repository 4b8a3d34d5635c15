"""What `pip install` and a package index get: the source distribution, the wheel, and their description."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest

import convwave

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/convwave/convwave"
PICTURES = "https://raw.githubusercontent.com/convwave/convwave/HEAD/"
CACHES = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", ".venv", "*.egg-info", "build", "dist")


class Distribution(NamedTuple):
    """Both distributions of one tree, unpacked."""

    tree: Path  # what they were built from
    source: Path
    wheel: Path

    @property
    def metadata(self) -> Message:
        return Parser().parsestr(next(self.wheel.glob("*.dist-info/METADATA")).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    """Built from a copy of what git tracks (or of an unpacked source distribution), the wheel from the sdist."""
    folder = tmp_path_factory.mktemp("distribution")
    tree = folder / "tree"
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        for name in filter(None, done.stdout.split("\0")):
            if (ROOT / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
    else:
        shutil.copytree(ROOT, tree, ignore=CACHES)
        shutil.rmtree(tree / "runs", ignore_errors=True)
    (tree / "data/names.txt").write_text("the post's words\n", encoding="utf-8")
    archive = build("sdist", tree, folder)
    with tarfile.open(folder / archive) as tar:
        tar.extractall(folder, filter="data")
    source = folder / archive.removesuffix(".tar.gz")
    wheel = folder / "wheel"
    with zipfile.ZipFile(folder / build("wheel", source, folder)) as file:
        file.extractall(wheel)
    shutil.rmtree(source / "build")
    return Distribution(tree, source, wheel)


def build(kind: str, tree: Path, out: Path) -> str:
    """Name of the archive that setuptools builds from a tree, as pip does it; reading the version imports nothing."""
    code = (
        "import sys; from setuptools import build_meta\n"
        f"name = build_meta.build_{kind}(sys.argv[1])\n"
        "assert not {'torch', 'convwave'} & sys.modules.keys()\n"
        "print(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_is_the_checkout(distribution: Distribution) -> None:
    made = {"PKG-INFO", "setup.cfg"}
    built = {name for name in files(distribution.tree) if ".egg-info/" in name}
    packed = {name for name in files(distribution.source) if ".egg-info/" not in name} - made
    assert packed == files(distribution.tree) - built - {"data/names.txt"}
    assert {"tests/helpers.py", "tests/conftest.py", "constraints.txt", "Makefile", ".ci/run"} <= packed


def test_the_wheel_holds_the_library_and_nothing_else(distribution: Distribution) -> None:
    installed = {name for name in files(distribution.wheel) if ".dist-info/" not in name}
    expected = {"convwave/py.typed"}
    for folder, package, pattern in (
        ("convwave", "convwave", "*.py"),
        ("kernels", "convwave/kernels", "*.py"),
        ("data/given_names", "convwave/given_names", "*.txt"),
    ):
        base = distribution.source / folder
        expected |= {f"{package}/{path.relative_to(base).as_posix()}" for path in base.rglob(pattern)}
    assert installed == expected


def test_the_wheel_works_by_itself(distribution: Distribution, tmp_path: Path) -> None:
    """Outside of any checkout, with the bundled names and the kernels in their places."""
    code = (
        f"import sys; sys.path.insert(0, {str(distribution.wheel)!r})\n"
        "import importlib.util, convwave\n"
        "from convwave.data import bundled_words\n"
        "print(convwave.__version__, len(bundled_words().words))\n"
        "print(convwave.__file__, importlib.util.find_spec('convwave.kernels').origin, sep='\\n')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    version_and_words, *paths = done.stdout.splitlines()
    assert version_and_words == f"{convwave.__version__} 9782", done.stderr
    assert all(Path(path).is_relative_to(distribution.wheel) for path in paths), paths


def test_an_unpacked_source_distribution_runs_its_own_tests(distribution: Distribution) -> None:
    path = os.pathsep.join([str(distribution.wheel), str(distribution.source)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib"]
    done = subprocess.run(
        [*command, "tests/test_graph.py", "tests/test_readme.py::test_links_lead_somewhere"],
        cwd=distribution.source,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_metadata(distribution: Distribution) -> None:
    metadata = distribution.metadata
    assert metadata["Name"] == "convwave"
    assert metadata["Version"] == convwave.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    needed = [line.replace(" ", "") for line in metadata.get_all("Requires-Dist", [])]
    assert any(re.match(r"torch.*<2\.14", line) for line in needed)
    assert any(re.match(r"triton.*<3\.8.*platform_machine", line) for line in needed)
    links = dict(line.split(", ") for line in metadata.get_all("Project-URL", []))
    assert {"Homepage", "Repository", "Documentation", "Changelog"} <= links.keys()
    assert all(link.startswith(REPOSITORY) for link in links.values())
    scripts = next(distribution.wheel.glob("*.dist-info/entry_points.txt")).read_text(encoding="utf-8")
    assert "convwave = convwave.cli:main" in scripts


def test_the_description_reads_well_on_a_package_index(distribution: Distribution) -> None:
    """Every link and picture is absolute, and leads to a file of the repository."""
    metadata = distribution.metadata
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    link = r"(!?)\[[^\]]*\]\(([^)\s]+)\)"
    links = re.findall(link, text)
    assert len(links) == len(re.findall(link, readme)) > 20
    for picture, target in links:
        if target.startswith("#"):
            continue
        prefix = PICTURES if picture else rf"{REPOSITORY}/(blob|tree)/HEAD/"
        found = re.match(prefix, target)
        assert found, target
        assert (ROOT / target[found.end() :]).exists(), target


def test_changelog_and_citation_name_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(convwave.__version__)}\]", changelog, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    fields = dict(re.findall(r"^([a-z-]+): *(.*)$", citation, re.MULTILINE))
    assert fields["cff-version"] == "1.2.0"
    assert fields["version"].strip('"') == convwave.__version__
    assert {"message", "title", "authors", "license", "repository-code"} <= fields.keys()
