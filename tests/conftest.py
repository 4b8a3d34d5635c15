"""Shared words and networks. Real names throughout: names.txt where it is, else the bundled list."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import Future

import pytest
import torch
from hypothesis import settings

if os.environ.get("CONVWAVE_PTX"):  # sm_80 or sm_90: kernels are compiled for it and executed by tests/ptx
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
elif (
    not torch.cuda.is_available()
):  # read when triton is first imported: kernels then run in its interpreter, on CPU tensors
    os.environ["TRITON_INTERPRET"] = "1"

import convwave as cw

pytest_plugins = ["tests.ptx.plugin"] if os.environ.get("CONVWAVE_PTX") else []

# Planted faults (mutation.py) must be caught by the same examples every time; elsewhere examples are new in every run.
settings.register_profile("default", deadline=None)
settings.register_profile("mutation", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("mutation" if os.environ.get("CONVWAVE_MUTATION") else "default")

PLANTED: pytest.StashKey[Future[dict[str, object]]] = pytest.StashKey()  # how the tests took the planted faults
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(GPU)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Plant the faults of `test_mutation` beside the other tests, which leave a core idle."""
    chosen = any("outcomes" in getattr(item, "fixturenames", ()) for item in session.items)
    if chosen and not session.config.option.collectonly:
        from tests.mutation import run_all

        future: Future[dict[str, object]] = Future()

        def plant() -> None:
            try:
                future.set_result(dict(run_all()))
            except BaseException as error:
                future.set_exception(error)

        session.config.stash[PLANTED] = future
        threading.Thread(target=plant, daemon=True).start()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; some tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.backends.cudnn.allow_tf32 = False  # nn.Conv1d is compared with in float32, not in TF32
torch.set_num_threads(1)  # small tensors: two threads are slower than one, and far slower on a busy machine


@pytest.fixture(scope="session")
def words() -> cw.Words:
    return cw.load_words()


@pytest.fixture(scope="session")
def names_txt(words: cw.Words) -> cw.Words:
    """The post's own data; a test that quotes the post's figures needs it."""
    if not words.is_names_txt:
        pytest.skip("the post's names.txt is not here: set CONVWAVE_DATA or run 'convwave data fetch'")
    return words


@pytest.fixture(scope="session")
def some_words(words: cw.Words) -> list[str]:
    """120 names, with repeats, a one-letter name and an empty one."""
    chosen = random.Random(1).sample(words.words, 114)
    return [*chosen, *chosen[:4], "a", ""]


@pytest.fixture(scope="session")
def vocab(words: cw.Words) -> cw.Vocabulary:
    return cw.Vocabulary.from_words(words.words)


@pytest.fixture(scope="session")
def packed(some_words: list[str], vocab: cw.Vocabulary) -> cw.Packed:
    return cw.pack(some_words, vocab)
