"""A pytest plugin: of all tests that were collected, shard I of N, where CONVWAVE_SHARD is "I/N"."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    shard, shards = map(int, os.environ["CONVWAVE_SHARD"].split("/"))
    items[:] = items[shard::shards]
