"""The losses and times that the README quotes, measured and written to benchmarks/results/ with their provenance.

    python -m benchmarks.figures fast        recipe fast, five seeds, between pieces of the post's own loop
    python -m benchmarks.figures evaluate    exact evaluation of all positions, and preparing it from text
    python -m benchmarks.figures sample      100,000 names
    python -m benchmarks.figures record      recipe record, five seeds, with the test split, once
    python -m benchmarks.figures equality    how far zero padding and BatchNorm's look ahead are from equality
    python -m benchmarks.figures all

They need the post's names.txt (`convwave data fetch`, or $CONVWAVE_DATA).
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from timeit import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import convwave as cw
from benchmarks.results import RESULTS, write_json
from benchmarks.speedrun import PostLoop, over_seeds, prepare, quantiles
from benchmarks.tasks import Conv1dStack, rectangle
from convwave.cli.console import stderr
from convwave.runs.registry import provenance
from convwave.train import Config, train


def timed(action: Callable[[], Any], runs: int, warmup: int = 2) -> dict[str, float]:
    """Wall-clock seconds of an action."""
    return quantiles(repeat(action, number=1, repeat=warmup + runs)[warmup:])


def fast(words: cw.Words) -> dict[str, Any]:
    return over_seeds(words, Config.make(), 5, PostLoop(words, 5000))


def record(words: cw.Words) -> dict[str, Any]:
    return over_seeds(words, Config.make(recipe="record"), 5)


def evaluate(words: cw.Words, runs: int = 21) -> dict[str, Any]:
    """All positions of names.txt, by us and by the windowed network on the same weights; all checked to agree."""
    prepared = prepare(words)
    torch.manual_seed(0)
    model = cw.ConvWave().eval()
    mlp = cw.to_windowed(model).eval()
    every = [word for split in cw.split_words(words.words) for word in split]
    windows = cw.reference.build_windows(cw.pack(every, cw.Vocabulary.from_words(words.words)), 8)
    distinct, rows = torch.unique(windows.inputs, dim=0, return_inverse=True)

    def in_chunks(inputs: Tensor) -> Tensor:
        """Log-probabilities of windows, 1,024 at a time, which stay in the cache."""
        with torch.no_grad():
            return torch.cat([F.log_softmax(mlp(part), 1) for part in inputs.split(1024)])

    def nll(logp: Tensor) -> float:
        return float(F.nll_loss(logp.double(), windows.targets))

    ways = {
        "windowed": lambda: cw.reference.split_loss(mlp, windows),
        "chunks": lambda: nll(in_chunks(windows.inputs)),
        "distinct_windows": lambda: nll(in_chunks(distinct)[rows]),
    }
    exact = float(prepared.nll(model).double().mean())
    for name, way in ways.items():
        assert abs(exact - way()) < 1e-5, f"{name}: the evaluations disagree"
    return {
        "positions": len(windows.targets),
        "nodes": {"distinct": prepared.graph.num_nodes, "windowed": 7 * len(windows.targets)},
        "evaluate_seconds": timed(lambda: prepared.losses(model), runs),
        "prepare_from_text_seconds": timed(lambda: prepare(cw.read_words(words.source)), runs),
        **{f"{name}_evaluate_seconds": timed(way, 5) for name, way in ways.items()},
    }


def sample(words: cw.Words, count: int = 100_000) -> dict[str, Any]:
    """Names from a trained network, so that they have a network's lengths; and without a cache, window by window."""
    model = train(Config.make(), words).model
    mlp = cw.to_windowed(model).eval()
    seconds = timed(lambda: cw.sample(model, count), 5, warmup=1)
    windows = timed(lambda: sample_windows(mlp, count, model.context), 3, warmup=1)
    return {
        "count": count,
        "seconds": seconds,
        "names_per_second": count / seconds["median"],
        "windows_seconds": windows,
        "windows_names_per_second": count / windows["median"],
    }


@torch.no_grad()
def sample_windows(
    mlp: Callable[[Tensor], Tensor], count: int, context: int, batch: int = 4096
) -> list[tuple[Tensor, Tensor]]:
    """Letters of names and which name each belongs to: how a competent user samples without a cache."""
    letters = []
    for begin in range(0, count, batch):
        alive = torch.arange(begin, min(begin + batch, count))
        rows = torch.zeros(len(alive), context, dtype=torch.int64)
        while len(alive):
            drawn = torch.multinomial(F.softmax(mlp(rows), 1), 1)
            going = drawn.view(-1) != 0
            rows, alive = torch.cat([rows, drawn], 1)[going, 1:], alive[going]
            letters.append((alive, drawn[going, 0]))
    return letters


def equality(words: cw.Words) -> dict[str, Any]:
    model = train(Config.make(), words).model
    assert model.vocabulary is not None
    packed = cw.pack(cw.split_words(words.words).val, model.vocabulary)
    return {"zero_padding": zero_padding(model, packed), "look_ahead": look_ahead(model, packed)}


@torch.no_grad()
def zero_padding(model: cw.ConvWave, packed: cw.Packed) -> dict[str, Any]:
    """nn.Conv1d with zeros on the left, as a user of temporal convolutions would write it, with the same weights."""
    exact = model.eval()(cw.dense_graph(packed))
    tokens, inside = rectangle(packed)
    stack = Conv1dStack(model, pad=lambda h, dilation: F.pad(h, (dilation, 0)))
    padded = model.head(stack(model.embedding(tokens).transpose(1, 2)).transpose(1, 2))[inside]
    early = torch.arange(inside.shape[1]).expand(inside.shape)[inside] < model.context - 1
    difference = (padded - exact).abs().amax(1)
    return {
        "positions": len(packed),
        "positions_before_the_context_is_full": float(early.float().mean()),
        "largest_logit_difference_early": float(difference[early].max()),
        "mean_logit_difference_early": float(difference[early].mean()),
        "largest_logit_difference_later": float(difference[~early].max()),
        "val_loss": float(F.cross_entropy(exact, packed.targets)),
        "val_loss_with_zero_padding": float(F.cross_entropy(padded, packed.targets)),
    }


@torch.no_grad()
def look_ahead(model: cw.ConvWave, packed: cw.Packed, batches: tuple[int, ...] = (4, 32, 512)) -> list[dict[str, Any]]:
    """Change the last letter of one name: how far do logits move that have not read it?

    In evaluation mode not at all. In training mode the letter is in the batch's statistics.
    """
    rows = []
    for names in batches:
        chosen = packed.select(torch.arange(names))
        last = int(chosen.cu_seqlens[1]) - 1
        changed = chosen.tokens.clone()
        changed[last] = 1 + changed[last] % (model.vocab_size - 1)
        other = cw.Packed(changed, chosen.targets, chosen.cu_seqlens)
        row: dict[str, Any] = {"names": names, "positions": len(chosen)}
        for mode in ("training", "evaluation"):
            network = copy.deepcopy(model).double().train(mode == "training")
            before, after = network(cw.dense_graph(chosen)), network(cw.dense_graph(other))
            moved = (after - before).abs().amax(1)
            moved[last] = 0.0
            row[mode] = {"largest_logit_change": float(moved.max()), "largest_logit": float(before.abs().max())}
        rows.append(row)
    return rows


FIGURES = {figure.__name__: figure for figure in (fast, evaluate, sample, record, equality)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=[*FIGURES, "all"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    words = cw.load_words()
    if not words.is_names_txt:
        parser.error("needs the post's names.txt: 'convwave data fetch'")
    for name in FIGURES if args.figure == "all" else [args.figure]:
        stderr().print(name)
        report = {"provenance": provenance(f"python -m benchmarks.figures {name}"), **FIGURES[name](words)}
        write_json(args.out / f"{name}.json", report)
        print(json.dumps({name: report}))


if __name__ == "__main__":
    main()
