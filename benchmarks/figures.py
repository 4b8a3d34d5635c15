"""The figures that the README quotes, measured and written to benchmarks/results/ with their provenance.

    python -m benchmarks.figures fast        recipe fast, five seeds, beside the post's own loop timed in the same run
    python -m benchmarks.figures evaluate    exact evaluation of all positions, and preparing it from text
    python -m benchmarks.figures sample      100,000 names
    python -m benchmarks.figures record      recipe record, five seeds, with the test split, once
    python -m benchmarks.figures optimizer   torch.optim.Muon beside the float32 one
    python -m benchmarks.figures all

They need the post's names.txt (`convwave data fetch`, or $CONVWAVE_DATA).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import convwave as cw
from convwave import reference
from convwave.cli.console import stderr
from convwave.files import write_atomic
from convwave.runs.registry import provenance
from convwave.train import loop as training
from convwave.train import optim
from convwave.train.loop import Config, train

RESULTS = Path(__file__).resolve().parent / "results"


def quantiles(values: list[float]) -> dict[str, float]:
    """Median with the extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values), "values": values}


def repeat(action: Callable[[], Any], runs: int, warmup: int = 2) -> dict[str, float]:
    """Seconds of an action, by the wall."""
    seconds = []
    for i in range(warmup + runs):
        started = time.perf_counter()
        action()
        if i >= warmup:
            seconds.append(time.perf_counter() - started)
    return quantiles(seconds)


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
        "losses": {name: spread(values) for name, values in splits.items()},
    }


def fast(words: cw.Words, seeds: int = 5, blog_steps: int = 5000) -> dict[str, Any]:
    """Recipe fast, interleaved with pieces of the post's own loop: its speed drifts with the machine's."""
    config = Config.make("hierarchical")
    vocabulary = cw.Vocabulary.from_words(words.words)
    run = training.WindowedRun(config, cw.pack(cw.split_words(words.words).train, vocabulary), len(vocabulary))
    pieces: list[float] = []

    def piece() -> None:
        with training.threads(1):  # faster than two for batches of 32 windows
            started = time.perf_counter()
            for i in range(blog_steps):
                run.step(i)
            pieces.append((time.perf_counter() - started) / blog_steps)

    report = over_seeds(Config.make(), words, seeds, piece)
    per_step = quantiles(pieces)
    whole = per_step["median"] * config.steps
    return report | {
        "post_loop": {
            "seconds_per_step": per_step,
            "steps_measured": blog_steps * seeds,
            "seconds_scaled_to_200000_steps": whole,
        },
        "times_faster": whole / report["seconds"]["median"],
    }


def record(words: cw.Words, seeds: int = 5) -> dict[str, Any]:
    return over_seeds(Config.make(recipe="record"), words, seeds, lambda: None)


def evaluate(words: cw.Words, runs: int = 21) -> dict[str, Any]:
    """All positions of names.txt, beside the windowed network on the same weights; both checked to agree."""
    path = words.source
    prepared = prepare(words)
    torch.manual_seed(0)
    model = cw.ConvWave().eval()
    mlp = cw.to_windowed(model)
    splits = cw.split_words(words.words)
    vocabulary = cw.Vocabulary.from_words(words.words)
    windows = reference.build_windows(cw.pack([*splits.train, *splits.val, *splits.test], vocabulary), 8)
    exact = float(prepared.nll(model).double().mean())
    assert abs(exact - reference.split_loss(mlp, windows)) < 1e-5, "the two evaluations disagree"
    return {
        "positions": len(windows.targets),
        "nodes": {"distinct": prepared.graph.num_nodes, "windowed": 7 * len(windows.targets)},
        "evaluate_seconds": repeat(lambda: prepared.losses(model), runs),
        "prepare_from_text_seconds": repeat(lambda: prepare(cw.read_words(path)), runs),
        "windowed_evaluate_seconds": repeat(lambda: reference.split_loss(mlp, windows), 5),
    }


def sample(words: cw.Words, count: int = 100_000, runs: int = 5) -> dict[str, Any]:
    """Names from a trained network, so that they have a network's lengths."""
    model = train(Config.make(), words).model
    seconds = repeat(lambda: cw.sample(model, count), runs, warmup=1)
    return {"count": count, "seconds": seconds, "names_per_second": count / seconds["median"]}


def optimizer(words: cw.Words, runs: int = 200) -> dict[str, Any]:
    """One step of Muon on the three convolution matrices: torch's, in bfloat16, and ours, in float32."""
    weights = [torch.nn.Parameter(torch.randn(68, columns)) for columns in (20, 136, 136)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    peers = {"torch.optim.Muon": torch.optim.Muon(weights), "convwave.optim.Muon": optim.Muon(weights)}
    return {name: repeat(peer.step, runs, warmup=5) for name, peer in peers.items()}


STUDIES = {study.__name__: study for study in (fast, evaluate, sample, record, optimizer)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    words = cw.load_words()
    if not words.is_names_txt:
        print("benchmarks.figures: needs the post's names.txt: 'convwave data fetch'", file=sys.stderr)
        return 2
    for name in STUDIES if args.study == "all" else [args.study]:
        stderr().print(name)
        report = {"provenance": provenance(f"python -m benchmarks.figures {name}"), **STUDIES[name](words)}
        write_atomic(args.out / f"{name}.json", (json.dumps(report, indent=2) + "\n").encode())
        print(json.dumps({name: report}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
