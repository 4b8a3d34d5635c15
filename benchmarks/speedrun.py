"""The speedrun: from a text in memory to a network as good as the post's, in how many seconds.

    python -m benchmarks.speedrun                    the post's network to the post's loss
    python -m benchmarks.speedrun --track open       any network of up to 100,000 parameters to the lecture's best loss
    python -m benchmarks.speedrun --tier reference   by another tier than the machine's fastest
    python -m benchmarks.speedrun --profile          where the time of the fastest tier goes

Rules. Data: the post's names.txt in the post's split. Target: the mean validation loss over at least 20 seeds lies at
or below the track's, and a one-sided t-test rejects with p < 0.01 that the true mean lies above. Timed: everything from
the text, a string, to the final network: splitting, packing, graphs, initial weights, all steps, and the running
statistics for evaluation, which see the training split only. Not timed: imports, warm-up, evaluation. Where the target
is missed, no time is printed or written.

The post's own loop is the baseline, timed in the same run: 500 of its 200,000 steps before every training,
scaled up, and called so.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import convwave as cw
from benchmarks.figures import PostLoop, prepare, quantiles, save
from benchmarks.harness import synchronize
from benchmarks.results import RESULTS
from convwave.cli.console import stderr, table
from convwave.runs.registry import device_name, provenance
from convwave.sweep.statistics import estimate, p_below
from convwave.train import PUBLISHED, Config, UsageError, available_tiers, fit

SEEDS, LEVEL = 20, 0.01
BLOG_STEPS = 500  # of the baseline, between two trainings


class Track(NamedTuple):
    """What is to be reached, and by what network."""

    title: str
    target: float  # mean validation loss
    parameters: int  # at most
    recipe: str  # ours, on a CPU
    cuda_recipe: str


TRACKS = {
    "post": Track("the post's network to the post's loss", PUBLISHED["hierarchical"].val, 22_397, "sprint", "full"),
    "open": Track("up to 100,000 parameters to the lecture's best loss", 1.9937, 100_000, "sprint_wide", "sprint_wide"),
}


class Timed(NamedTuple):
    """A training by the rules: the network, and its wall-clock and CPU time."""

    model: cw.ConvWave
    seconds: float
    cpu_seconds: float


def timed_training(text: str, config: Config) -> Timed:
    """From a text of one word a line to a network ready to evaluate."""
    synchronize(config.device)
    started, cpu_started = time.perf_counter(), time.process_time()
    words = text.split("\n")
    vocabulary = cw.Vocabulary.from_words(words)
    model = fit(config, cw.pack(cw.split_words(words).train, vocabulary), vocabulary)
    synchronize(config.device)
    return Timed(model, time.perf_counter() - started, time.process_time() - cpu_started)


def speedrun(words: cw.Words, name: str, config: Config, seeds: int) -> dict[str, Any]:
    """Train once per seed and judge; without times where the target is missed."""
    track = TRACKS[name]
    text = "\n".join(words.words)
    evaluation = prepare(words, config.factors)
    loop = PostLoop(words, BLOG_STEPS)
    timed_training(text, replace(config, steps=3))  # warm-up
    runs, losses = [], []
    for seed in range(seeds):
        loop.piece()
        run = timed_training(text, replace(config, seed=seed))
        runs.append(run)
        losses.append({split: float(loss.loss or 0) for split, loss in evaluation.losses(run.model.cpu()).items()})
        stderr().print(f"  seed {seed}: val {losses[-1]['val']:.4f}")
    val = [loss["val"] for loss in losses]
    found, p = estimate(val), p_below(val, track.target)
    parameters = runs[0].model.num_parameters
    report = {
        "track": name,
        "title": track.title,
        "target": track.target,
        "most_parameters": track.parameters,
        "parameters": parameters,
        "config": config.summary(),
        "seeds": list(range(seeds)),
        "losses": {split: [loss[split] for loss in losses] for split in losses[0]},
        "val_mean": found.mean,
        "val_std": found.deviation,
        "val_interval": [found.low, found.high],
        "p_value": p,
        "reached": parameters <= track.parameters and found.mean <= track.target and p < LEVEL,
    }
    if report["reached"]:
        seconds = [run.seconds for run in runs]
        measured = f"{BLOG_STEPS * len(loop.pieces)} of {loop.config.steps} steps"
        report |= {
            "seconds": quantiles(seconds),
            "cpu_seconds": quantiles([run.cpu_seconds for run in runs]),
            "all_seconds": seconds,
            "baseline": {
                "what": f"estimate: {measured} timed between trainings, scaled",
                "seconds_per_step": quantiles(loop.pieces),
                "estimated_seconds": loop.seconds,
            },
            "times_faster": loop.seconds / statistics.median(seconds),
        }
    return report


PARTS = {  # of a training in tier "cpu": the functions in which its time goes by
    "text and packing": ("Vocabulary.from_words", "split_words", "pack"),
    "graph of all contexts": ("distinct_graph",),
    "batches": ("StepReader.batch",),
    "gradients": ("ClosedForm.gradients",),
    "optimiser": ("MuonAdam.step",),
    "running statistics": ("recompute_statistics",),
}


def profile(words: cw.Words, config: Config) -> dict[str, Any]:
    """Where a training's time goes: by part, under cProfile, and by operator, under torch's profiler."""
    text = "\n".join(words.words)
    timed_training(text, replace(config, steps=3))
    best = min((by_part(text, config) for _ in range(7)), key=lambda part: sum(part.values()))
    with torch.profiler.profile() as profiler:
        timed_training(text, config)
    operators = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in operators)
    return {
        "config": config.summary(),
        "milliseconds": {name: 1000 * seconds for name, seconds in best.items()},
        "runs": 7,
        "operators": [
            {
                "name": row.key,
                "calls_per_step": row.count / config.steps,
                "microseconds_per_step": row.self_cpu_time_total / config.steps,
                "share": row.self_cpu_time_total / total,
            }
            for row in operators[:25]
        ],
    }


def by_part(text: str, config: Config) -> dict[str, float]:
    """Seconds in each of `PARTS` of a training in tier "cpu"."""
    profiler = cProfile.Profile()
    profiler.runcall(timed_training, text, config)
    parts = {function: part for part, functions in PARTS.items() for function in functions}
    spent = dict.fromkeys(PARTS, 0.0)
    for entry in profiler.getstats():
        part = parts.get(getattr(entry.code, "co_qualname", ""))
        if part is not None:
            spent[part] += entry.totaltime
    spent["batches"] -= spent["graph of all contexts"]  # made when the first batch is read
    return spent


def main() -> int:
    """0, or 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", choices=TRACKS, default="post")
    parser.add_argument("--recipe", help="of `convwave train` (default: the track's on this device)")
    parser.add_argument("--tier", default="auto", help="of `convwave train` (default: auto, the fastest there is)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"at least {SEEDS}")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of the run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    words = cw.load_words()
    if not words.is_names_txt:
        parser.error("needs the post's names.txt: 'convwave data fetch'")
    if args.seeds < SEEDS:
        parser.error(f"--seeds: expected at least {SEEDS}, got {args.seeds}")
    track = TRACKS[args.track]
    recipe = args.recipe or (track.cuda_recipe if args.device.startswith("cuda") else track.recipe)
    try:
        config = Config.make(recipe=recipe, device=args.device, tier=args.tier)
    except UsageError as error:
        parser.error(str(error))
    if args.profile and config.tier != "cpu":
        parser.error(f"--profile: expected tier cpu, got {config.tier}")

    fastest = available_tiers(config.model, config.recipe, config.device)[0]
    options = {  # what differs from a plain run: in the name of the file and in the command
        "device": None if args.device == "cpu" else args.device,
        "recipe": args.recipe,
        "tier": None if config.tier == fastest else config.tier,
    }
    given = {option: value for option, value in options.items() if value is not None}
    command = [f"python -m benchmarks.speedrun --track {args.track}", *["--profile"] * args.profile]
    command += [f"--{option} {value}" for option, value in given.items()]
    name = ["speedrun", *[args.track] * (args.track != "post"), *given.values(), *["profile"] * args.profile]
    source = provenance(" ".join(command)) | {"device": device_name(config.device)}
    found = profile(words, config) if args.profile else speedrun(words, args.track, config, args.seeds)
    if not args.profile:
        print(
            f"val {found['val_mean']:.4f} ± {found['val_std']:.4f} over {args.seeds} seeds, target "
            f"{found['target']}, p = {found['p_value']:.2g}",
            file=sys.stderr,
        )
        if not found["reached"]:
            print("benchmarks.speedrun: the target is missed, so there is no time", file=sys.stderr)
            return 1
        rows = [("seconds", found["seconds"]), ("seconds of all cores", found["cpu_seconds"])]
        shown = [[name, *(f"{values[key]:.3f}" for key in ("median", "min", "max"))] for name, values in rows]
        shown.append(["the post's loop, estimated", f"{found['baseline']['estimated_seconds']:.0f}", "", ""])
        title = f"{found['title']}: {source['device']}, tier {config.tier}"
        stderr().print(table(title, ["", "median", "min", "max"], shown))
    report = {"provenance": source, **found}
    save(report, args.out / f"{'-'.join(name)}.json")
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
