"""Figures in the README are those of benchmarks/results/, and its code runs."""

from __future__ import annotations

import re

import pytest

from benchmarks.report import README, render


def test_figures_are_the_measured_ones() -> None:
    text = README.read_text(encoding="utf-8")
    assert render(text) == text, "run python -m benchmarks.report"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert targets
    assert not [target for target in targets if not (README.parent / target).exists()]


def test_the_library_example_runs(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
    exec(code, {})
    assert capsys.readouterr().out.startswith("[")
