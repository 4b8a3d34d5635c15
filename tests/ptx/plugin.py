"""A pytest plugin: kernels are compiled for CONVWAVE_PTX, sm_80 or sm_90, and executed by the interpreter.

    CONVWAVE_PTX=sm_90 python -m pytest tests/test_kernels.py

A test fails on any problem that its launches met. The warps of each kernel's first launch run by themselves, with
CONVWAVE_PTX_WARPS=1 all; CONVWAVE_PTX_SEED is that of the order of programs; CONVWAVE_PTX_OUT names a file for one line
of JSON a launch.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from .launch import on_emulator
from .machine import How
from .table import row_of

TARGET = os.environ["CONVWAVE_PTX"]
OUT = os.environ.get("CONVWAVE_PTX_OUT")

# the same examples every time: what was compiled once is found again
settings.register_profile("ptx", deadline=None, derandomize=True, max_examples=4)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("ptx")


@pytest.fixture(autouse=True)
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    seed = int(os.environ.get("CONVWAVE_PTX_SEED", "0")) + zlib.crc32(request.node.nodeid.encode())
    how = How(seed=seed, by_warp=os.environ.get("CONVWAVE_PTX_WARPS") == "1")
    with on_emulator(TARGET, how, first_by_warp=True) as log:
        yield
    if OUT:
        with Path(OUT).open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(row_of(launch, TARGET)) + "\n" for launch in log.launches if ".kernels." in launch.module
            )
    assert not log.problems(), log.summary()
