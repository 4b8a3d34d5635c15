"""Reading, vocabulary, split, packing, and what happens with bad files."""

from __future__ import annotations

import os
import random
import re
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import convwave as cw
from convwave.data import words as data

lists_of_words = st.lists(st.text(alphabet="abcéß語ж-' ", max_size=12), max_size=20)


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_bundled_names_are_many_distinct_and_sorted() -> None:
    files = sorted((data.data_directory() / "given_names").glob("*.txt"))
    lists = [file.read_text(encoding="ascii").splitlines() for file in files]
    names = [name for names in lists for name in names]
    assert len(names) >= 4000
    assert len(files) >= 20, "many cultures"
    assert len(set(names)) == len(names)
    assert all(names == sorted(names) for names in lists)
    assert all(re.fullmatch("[a-z]+", name) for name in names)
    assert cw.data.bundled_words().words == names


def test_data_card_counts_every_file() -> None:
    directory = data.data_directory()
    card = (directory / "README.md").read_text(encoding="utf-8")
    for file in (directory / "given_names").glob("*.txt"):
        count = len(file.read_text(encoding="ascii").split())
        assert re.search(rf"\b{file.stem}\b[^|\n]*\|\s*{count}\b", card), file.stem
    assert f"{len(cw.data.bundled_words().words):,}" in card or str(len(cw.data.bundled_words().words)) in card


def test_order_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flag, variable, local = (write(tmp_path / f"{name}.txt", name) for name in ("flag", "variable", "names"))
    monkeypatch.setattr(data, "data_directory", lambda: tmp_path)
    monkeypatch.setenv("CONVWAVE_DATA", str(variable))
    assert cw.load_words(flag).words == ["flag"]
    assert cw.load_words().words == ["variable"]
    monkeypatch.delenv("CONVWAVE_DATA")
    assert cw.load_words().source == str(local)
    monkeypatch.undo()
    monkeypatch.delenv("CONVWAVE_DATA", raising=False)
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert "bundled" in cw.load_words().source


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_harmless_forms_read_alike(tmp_path: Path, end: str) -> None:
    text = "\ufeff" + end.join(["  emma ", "", "\tžofie", "   ", "o'neil-x", "語"])
    read = cw.read_words(write(tmp_path / "w.txt", text))
    assert read.words == ["emma", "žofie", "o'neil-x", "語"]
    assert read.blank_lines == 2
    assert cw.read_words(write(tmp_path / "w2.txt", text + end)).words == read.words


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no word"),
        (b" \n\n", "holds no word"),
        (b"ab\nc.d\n", r"line 2: 'c.d' contains '\.'"),
        (b"ab\ncd\xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"\xef\xbb\xbfab\ncd\xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"ab\rcd\r\ne\xff", "line 3: byte 0xff is not UTF-8"),
        (b"ab\nc\x00d\n", r"line 2: contains the control character U\+0000"),
    ],
)
def test_bad_content_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = write(tmp_path / "bad.txt", content)
    with pytest.raises(cw.DataError, match=reason) as caught:
        cw.read_words(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(cw.DataError, match="no such file"):
        cw.read_words(tmp_path / "missing.txt")
    with pytest.raises(cw.DataError, match="is a directory"):
        cw.read_words(tmp_path)
    with pytest.raises(cw.DataError, match="null byte"):
        cw.read_words("a\0b")
    with pytest.raises(cw.DataError, match="cannot be read"):
        cw.read_words("x" * 5000)
    with pytest.raises(cw.DataError, match="expected the path of a text file, got ''"):
        cw.load_words("")


def test_a_broken_line_is_quoted_shortened(tmp_path: Path) -> None:
    with pytest.raises(cw.DataError, match=r"line 2: 'aaa.*\.\.\.' contains") as caught:
        cw.read_words(write(tmp_path / "long.txt", "b\n" + "a" * 10**6 + ".\n"))
    assert len(str(caught.value)) < 250 + len(str(tmp_path))
    vocab = cw.Vocabulary([".", *map(chr, range(0x4E00, 0x4E00 + 5000))])
    with pytest.raises(cw.DataError, match=r"character 'a' is not among the vocabulary's 5001: '.*\.\.\.'") as caught:
        vocab.encode("a")
    assert len(str(caught.value)) < 200


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_are_read_to_their_end_and_silent_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(data, "PATIENCE", 0.05)
    with pytest.raises(cw.DataError, match="nothing comes from it"):
        cw.read_words(tmp_path / "pipe")
    monkeypatch.setattr(data, "PATIENCE", 60.0)

    def speak() -> None:
        with open(tmp_path / "pipe", "w") as pipe:
            for word in ("anna\n", "berta\n"):
                pipe.write(word)
                pipe.flush()

    writer = threading.Thread(target=speak)
    writer.start()
    assert cw.read_words(tmp_path / "pipe").words == ["anna", "berta"]
    writer.join()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_endless_and_huge_files_are_refused_at_a_stated_limit(tmp_path: Path) -> None:
    with pytest.raises(cw.DataError, match="holds more than 67,108,864 bytes"):
        cw.read_words("/dev/zero")
    write(tmp_path / "huge", "a\n")
    os.truncate(tmp_path / "huge", 2**40)  # takes no room on the disk
    with pytest.raises(cw.DataError, match="holds more than 67,108,864 bytes"):
        cw.read_words(tmp_path / "huge")


def test_fetch_checks_the_checksum_and_keeps_nothing_else(tmp_path: Path, names_txt: cw.Words) -> None:
    wrong = write(tmp_path / "wrong.txt", "emma\n")
    with pytest.raises(cw.DataError, match="SHA-256"):
        data.fetch_names(wrong.as_uri(), tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(cw.DataError, match="download failed"):
        data.fetch_names((tmp_path / "missing").as_uri(), tmp_path / "data")
    with pytest.raises(cw.DataError, match="download failed"):
        data.fetch_names("http://a b/", tmp_path / "data")
    fetched = data.fetch_names(Path(names_txt.source).resolve().as_uri(), tmp_path / "data")
    assert cw.read_words(fetched).is_names_txt
    assert data.fetch_names("file:///nowhere", tmp_path / "data") == fetched, "a good file is not fetched again"


def test_the_posts_split(names_txt: cw.Words) -> None:
    assert len(names_txt.words) == 32_033
    words = list(names_txt.words)
    random.seed(42)
    random.shuffle(words)
    splits = cw.split_words(names_txt.words)
    assert [*splits.train, *splits.val, *splits.test] == words
    vocab = cw.Vocabulary.from_words(words)
    assert [len(cw.pack(split, vocab)) for split in splits] == [182_625, 22_655, 22_866]


def test_a_corpus_makes_each_thing_once(words: cw.Words) -> None:
    corpus = cw.Corpus(words)
    assert (corpus.words, corpus.source, corpus.sha256) == (words.words, words.source, words.sha256)
    assert corpus.is_names_txt == words.is_names_txt
    assert corpus.splits == cw.split_words(words.words)
    assert corpus.vocabulary == cw.Vocabulary.from_words(words.words)
    for name, split in corpus.splits._asdict().items():
        packed = getattr(corpus, name)
        assert packed is getattr(corpus, name)
        assert torch.equal(packed.tokens, cw.pack(split, corpus.vocabulary).tokens)
    with pytest.raises(cw.DataError, match="1 word is too few"):
        cw.Corpus(words._replace(words=["a"])).train.tokens  # noqa: B018


def test_split_of_few_words() -> None:
    assert [len(s) for s in cw.split_words(["a", "b"])] == [1, 0, 1]
    with pytest.raises(cw.DataError, match="1 word is too few"):
        cw.split_words(["a"])


def test_vocabulary_follows_the_post() -> None:
    vocab = cw.Vocabulary.from_words(["emma", "ava"])
    assert vocab.symbols == (".", "a", "e", "m", "v")
    assert vocab.encode("ava") == [1, 4, 1]
    assert vocab.decode([2, 3, 3, 1, 0]) == "emma."
    assert len(vocab) == 5
    for bad in ("evz", "é", "\U0001f600"):
        with pytest.raises(cw.DataError, match=f"character {bad[-1]!r}"):
            vocab.encode(bad)
    with pytest.raises(ValueError, match="reserved"):
        cw.Vocabulary.from_words(["a.b"])
    with pytest.raises(ValueError, match="distinct"):
        cw.Vocabulary([".", "a", "a"])
    with pytest.raises(ValueError, match=r"expected '\.' first"):
        cw.Vocabulary(["a"])


@given(lists_of_words)
def test_packing_equals_its_definition(words: list[str]) -> None:
    vocab = cw.Vocabulary.from_words(words)
    packed = cw.pack(words, vocab)
    tokens, targets, starts = [], [], [0]
    for word in words:
        ids = [vocab.symbols.index(c) for c in word]
        tokens += [0, *ids]
        targets += [*ids, 0]
        starts.append(len(tokens))
    assert packed.tokens.tolist() == tokens
    assert packed.targets.tolist() == targets
    assert packed.cu_seqlens.tolist() == starts
    again = cw.pack_ids([vocab.encode(word) for word in words])
    assert all(torch.equal(getattr(packed, f), getattr(again, f)) for f in ("tokens", "targets", "cu_seqlens"))


@given(lists_of_words.filter(bool), st.lists(st.integers(0, 100), max_size=30))
def test_select_packs_the_chosen_words(words: list[str], picks: list[int]) -> None:
    vocab = cw.Vocabulary.from_words(words)
    chosen = [i % len(words) for i in picks]
    got = cw.pack(words, vocab).select(torch.tensor(chosen, dtype=torch.int64))
    expected = cw.pack([words[i] for i in chosen], vocab)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.targets, expected.targets)
    assert torch.equal(got.cu_seqlens, expected.cu_seqlens)


def test_pack_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match="reserved"):
        cw.pack(["a.a"], cw.Vocabulary.from_words(["a"]))
    with pytest.raises(ValueError, match="got -1"):
        cw.pack_ids([[1, -1]])
