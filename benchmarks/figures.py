"""The losses and times that the README quotes, measured and written to benchmarks/results/ with their provenance.

    python -m benchmarks.figures fast        recipe fast, five seeds, between pieces of the post's own loop
    python -m benchmarks.figures evaluate    exact evaluation of all positions, and preparing it from text
    python -m benchmarks.figures sample      100,000 names
    python -m benchmarks.figures record      recipe record, five seeds, with the test split, once
    python -m benchmarks.figures optimizer   torch.optim.Muon and the float32 one
    python -m benchmarks.figures equality    how far zero padding and BatchNorm's look ahead are from equality
    python -m benchmarks.figures all

They need the post's names.txt (`convwave data fetch`, or $CONVWAVE_DATA).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import convwave as cw
from benchmarks.results import RESULTS
from benchmarks.tasks import Conv1dStack, rectangle
from convwave.cli.console import stderr
from convwave.files import write_atomic
from convwave.runs.registry import provenance
from convwave.train import Config, begin, threads, train
from convwave.train.optim import Muon


def quantiles(values: list[float]) -> dict[str, float]:
    """Median with the extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def repeat(action: Callable[[], Any], runs: int, warmup: int = 2) -> dict[str, float]:
    """Wall-clock seconds of an action."""
    seconds = []
    for _ in range(warmup + runs):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return quantiles(seconds[warmup:])


class PostLoop:
    """The post's own loop, timed a piece at a time between other trainings: its speed drifts with the machine's."""

    def __init__(self, words: cw.Words, steps: int) -> None:
        self.config, self.steps = Config.make("hierarchical"), steps
        vocabulary = cw.Vocabulary.from_words(words.words)
        self._run = begin(self.config, cw.pack(cw.split_words(words.words).train, vocabulary), vocabulary)
        self.pieces: list[float] = []

    def piece(self) -> None:
        with threads(1):  # faster than two for batches of 32 windows
            started = time.perf_counter()
            for i in range(self.steps):
                self._run.step(i)
            self.pieces.append((time.perf_counter() - started) / self.steps)

    @property
    def seconds(self) -> float:
        """Of the whole loop, scaled from the pieces."""
        return statistics.median(self.pieces) * self.config.steps


def prepare(words: cw.Words, factors: tuple[int, ...] = (2, 2, 2)) -> cw.EvaluationSet:
    return cw.EvaluationSet(cw.split_words(words.words), cw.Vocabulary.from_words(words.words), factors)


def over_seeds(config: Config, words: cw.Words, seeds: int, between: Callable[[], None]) -> dict[str, Any]:
    """Losses and times of one recipe over seeds 0, 1, ..; `between` runs before every training."""
    results = []
    for seed in range(seeds):
        between()
        result = train(replace(config, seed=seed), words)
        results.append(result)
        losses = {name: split.loss for name, split in result.splits.items()}
        stderr().print(f"  seed {seed}: {result.seconds:.2f} s, {losses}")
    splits = {name: [float(r.splits[name].loss or 0) for r in results] for name in results[0].splits}
    return {
        "config": results[0].summary() | {"seed": None, "checkpoint": None},
        "seconds": quantiles([r.seconds for r in results]),
        "losses": {
            name: {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}
            for name, values in splits.items()
        },
    }


def fast(words: cw.Words, seeds: int = 5) -> dict[str, Any]:
    loop = PostLoop(words, 5000)
    report = over_seeds(Config.make(), words, seeds, loop.piece)
    return report | {
        "post_loop": {
            "seconds_per_step": quantiles(loop.pieces),
            "steps_measured": loop.steps * seeds,
            "seconds_scaled_to_200000_steps": loop.seconds,
        },
        "times_faster": loop.seconds / report["seconds"]["median"],
    }


def record(words: cw.Words, seeds: int = 5) -> dict[str, Any]:
    return over_seeds(Config.make(recipe="record"), words, seeds, lambda: None)


def evaluate(words: cw.Words, runs: int = 21) -> dict[str, Any]:
    """All positions of names.txt, by us and by the windowed network on the same weights; both checked to agree."""
    prepared = prepare(words)
    torch.manual_seed(0)
    model = cw.ConvWave().eval()
    mlp = cw.to_windowed(model)
    every = [word for split in cw.split_words(words.words) for word in split]
    windows = cw.reference.build_windows(cw.pack(every, cw.Vocabulary.from_words(words.words)), 8)
    exact = float(prepared.nll(model).double().mean())
    assert abs(exact - cw.reference.split_loss(mlp, windows)) < 1e-5, "the two evaluations disagree"
    return {
        "positions": len(windows.targets),
        "nodes": {"distinct": prepared.graph.num_nodes, "windowed": 7 * len(windows.targets)},
        "evaluate_seconds": repeat(lambda: prepared.losses(model), runs),
        "prepare_from_text_seconds": repeat(lambda: prepare(cw.read_words(words.source)), runs),
        "windowed_evaluate_seconds": repeat(lambda: cw.reference.split_loss(mlp, windows), 5),
    }


def sample(words: cw.Words, count: int = 100_000, runs: int = 5) -> dict[str, Any]:
    """Names from a trained network, so that they have a network's lengths."""
    model = train(Config.make(), words).model
    seconds = repeat(lambda: cw.sample(model, count), runs, warmup=1)
    return {"count": count, "seconds": seconds, "names_per_second": count / seconds["median"]}


def optimizer(words: cw.Words, runs: int = 200) -> dict[str, Any]:
    """One step of Muon on the three convolution matrices: torch's, in bfloat16, and ours, in float32."""
    matrices = [torch.nn.Parameter(torch.randn(68, columns)) for columns in (20, 136, 136)]
    for weight in matrices:
        weight.grad = torch.randn_like(weight)
    peers = {"torch.optim.Muon": torch.optim.Muon(matrices), "convwave.optim.Muon": Muon(matrices)}
    return {name: repeat(peer.step, runs, warmup=5) for name, peer in peers.items()}


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


FIGURES = {figure.__name__: figure for figure in (fast, evaluate, sample, record, optimizer, equality)}


def save(report: dict[str, Any], path: Path) -> None:
    write_atomic(path, (json.dumps(report, indent=2) + "\n").encode())


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
        save(report, args.out / f"{name}.json")
        print(json.dumps({name: report}))


if __name__ == "__main__":
    main()
