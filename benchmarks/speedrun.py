"""The speedrun: from a text in memory to a network as good as the post's, in how many seconds.

    python -m benchmarks.speedrun                    the post's network to the post's loss
    python -m benchmarks.speedrun --track open       any network of up to 100,000 parameters to the lecture's best loss
    python -m benchmarks.speedrun --tier reference   by another tier than the machine's fastest
    python -m benchmarks.speedrun --record "IDEA"    keep it in the history, results/speedrun/
    python -m benchmarks.speedrun --profile          where the time of a training goes

Rules. Data: the post's names.txt in the post's split. Target: the mean validation loss over 20 seeds lies at
or below the track's, and a one-sided t-test rejects with p < 0.01 that the true mean lies above. Timed: everything from
the text, a string, to the final network: splitting, packing, graphs, initial weights, all steps, and the running
statistics for evaluation, which see the training split only. Not timed: imports, warm-up, evaluation. Where the target
is missed, no time is printed or written.

Timed in the same run: 500 of the 200,000 steps of the post's own loop before every training, scaled up, and called so;
and on the post's track, with the first seeds, what a competent user gets without this library (`baselines`).
"""

from __future__ import annotations

import argparse
import cProfile
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import convwave as cw
from benchmarks import baselines
from benchmarks.harness import synchronize
from benchmarks.results import RESULTS, write_json
from convwave.cli.console import stderr
from convwave.runs.registry import device_name, package_version, provenance
from convwave.sweep.statistics import estimate, p_below
from convwave.train import PUBLISHED, Config, UsageError, available_tiers, begin, fit, threads

SEEDS, LEVEL = 20, 0.01
BLOG_STEPS = 500  # of the post's loop, between two trainings
BASELINE_SEEDS = 5


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


class Baselines:
    """Training without this library, from the same text to the same split, timed between other trainings."""

    def __init__(self, words: cw.Words) -> None:
        self.text, splits = "\n".join(words.words), cw.split_words(words.words)
        train = set(splits.train)
        self._split = {"val": splits.val, "novel_val": [word for word in splits.val if word not in train]}
        self.runs: dict[str, list[dict[str, Any]]] = {}

    def piece(self, seed: int) -> None:
        with threads(1):
            for name, baseline in baselines.BASELINES.items():
                self._timed(name, partial(baselines.train, baseline=baseline, seed=seed), baselines.loss)
            if seed == 0:  # counting draws nothing
                self._timed("kneser_ney", baselines.kneser_ney, lambda model, words, _: model.loss(words))

    def _timed(self, name: str, train: Callable[..., Any], loss: Callable[..., float]) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        words = self.text.split("\n")
        vocabulary = cw.Vocabulary.from_words(words)
        model = train(cw.split_words(words).train, vocabulary)
        times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        losses = {split: loss(model, words, vocabulary) for split, words in self._split.items()}
        self.runs.setdefault(name, []).append(times | losses)
        stderr().print(f"  {name}: {times['cpu_seconds']:.2f} s of CPU, val {losses['val']:.4f}")

    def report(self, cpu_seconds: float) -> dict[str, Any]:
        """Per baseline losses, times, and how many times ours its CPU time is."""
        found = {}
        for name, runs in self.runs.items():
            times = {key: quantiles([run[key] for run in runs]) for key in ("seconds", "cpu_seconds")}
            losses = {split: [run[split] for run in runs] for split in self._split}
            settings = baselines.BASELINES[name]._asdict() if name in baselines.BASELINES else {"title": KNESER_NEY}
            ratio = times["cpu_seconds"]["median"] / cpu_seconds
            found[name] = {**settings, "losses": losses, **times, "times_our_cpu_time": ratio}
        return found


KNESER_NEY = "interpolated Kneser-Ney of order 5: counts, no training"


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median with the extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def prepare(words: cw.Words, factors: tuple[int, ...] = (2, 2, 2)) -> cw.EvaluationSet:
    return cw.EvaluationSet(cw.split_words(words.words), cw.Vocabulary.from_words(words.words), factors)


def over_seeds(
    words: cw.Words, config: Config, seeds: int, loop: PostLoop | None = None, rivals: Baselines | None = None
) -> dict[str, Any]:
    """Losses and times of a recipe over seeds 0, 1, ..; loop and rivals have their turns between the trainings."""
    text, evaluation = "\n".join(words.words), prepare(words, config.factors)
    timed_training(text, replace(config, steps=3))  # warm-up
    runs, losses = [], []
    for seed in range(seeds):
        if loop is not None:
            loop.piece()
        if rivals is not None and seed < BASELINE_SEEDS:
            rivals.piece(seed)
        runs.append(timed_training(text, replace(config, seed=seed)))
        found = evaluation.losses(runs[-1].model.cpu())
        losses.append({split: float(loss.loss or 0) for split, loss in found.items()})
        stderr().print(f"  seed {seed}: {runs[-1].seconds:.2f} s, val {losses[-1]['val']:.4f}")
    seconds = [run.seconds for run in runs]
    report: dict[str, Any] = {
        "config": config.summary() | {"seed": None, "parameters": runs[0].model.num_parameters},
        "seeds": list(range(seeds)),
        "losses": {split: [loss[split] for loss in losses] for split in losses[0]},
        "seconds": quantiles(seconds),
        "cpu_seconds": quantiles([run.cpu_seconds for run in runs]),
        "all_seconds": seconds,
    }
    if loop is not None:
        report["post_loop"] = {
            "what": "an estimate: pieces timed between the trainings, scaled",
            "seconds_per_step": quantiles(loop.pieces),
            "steps_measured": loop.steps * len(loop.pieces),
            "seconds_scaled_to_200000_steps": loop.seconds,
        }
        report["times_faster"] = loop.seconds / statistics.median(seconds)
    if rivals is not None:
        report["baselines"] = rivals.report(report["cpu_seconds"]["median"])
    return report


def speedrun(words: cw.Words, name: str, config: Config) -> dict[str, Any]:
    """Train once per seed and judge; without times where the target is missed."""
    track = TRACKS[name]
    rivals = Baselines(words) if name == "post" and config.device == "cpu" else None
    found = over_seeds(words, config, SEEDS, PostLoop(words, BLOG_STEPS), rivals)
    val, parameters = found["losses"]["val"], found["config"]["parameters"]
    mean, p = estimate(val), p_below(val, track.target)
    reached = parameters <= track.parameters and mean.mean <= track.target and p < LEVEL
    times = ("seconds", "cpu_seconds", "all_seconds", "post_loop", "times_faster", "baselines")
    return {
        "track": name,
        "title": track.title,
        "target": track.target,
        "most_parameters": track.parameters,
        "parameters": parameters,
        "val_mean": mean.mean,
        "val_std": mean.deviation,
        "val_interval": [mean.low, mean.high],
        "p_value": p,
        "reached": reached,
        **{key: value for key, value in found.items() if reached or key not in times},
    }


PARTS = {  # of a training in tier "cpu" or "fused": in which part the time of a function counts
    "Vocabulary.from_words": "text and packing",
    "split_words": "text and packing",
    "pack": "text and packing",
    "distinct_graph": "graph of all contexts",
    "StepReader.batch": "batches",
    "Parts.__call__": "batches",
    "ClosedForm.gradients": "gradients",
    "gradients": "gradients",
    "MuonAdam.step": "optimiser",
    "update": "optimiser",
    "recompute_statistics": "running statistics",
    "FusedRun.finish": "running statistics",
}


def by_part(text: str, config: Config) -> dict[str, float]:
    """CPU seconds in each part of a training in tier "cpu" or "fused"."""
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(timed_training, text, config)
    spent = dict.fromkeys(PARTS.values(), 0.0)
    for entry in profiler.getstats():
        part = PARTS.get(getattr(entry.code, "co_qualname", ""))
        if part is not None:
            spent[part] += entry.totaltime
    spent["batches"] -= spent["graph of all contexts"]  # made when the first batch is read
    return spent


def products(text: str, config: Config) -> dict[str, float]:
    """The matrix products of a training in tier "fused" by themselves: below their time no step can get."""
    import numpy as np

    from convwave.ops import loops
    from convwave.ops.compiled import threads_of_torch
    from convwave.train.fused import Parts
    from convwave.train.setup import convolution

    words = text.split("\n")
    vocabulary = cw.Vocabulary.from_words(words)
    parts = Parts(convolution(config, cw.pack(cw.split_words(words).train, vocabulary), vocabulary)[1])
    V, E, H, least = len(vocabulary), config.n_embd, config.n_hidden, min(2 * config.n_embd, config.n_hidden)
    # (m, k, n, first transposed, second transposed): Muon's of level 0 and of the others, the same in every step
    muon = [(least, max(2 * E, H), least, 2 * E > H, 2 * E < H), (least, least, least, False, False)]
    muon += [(2 * E, least, H, False, False)]
    muon += (config.levels - 1) * [(H, 2 * H, H, True, False), (H, H, H, False, False), (2 * H, H, H, False, False)]
    chosen = range(config.steps // 20, config.steps, config.steps // 10)
    seconds = flops = 0.0
    for i in chosen:
        part = parts(i)
        shapes = config.recipe.orthogonal_steps * muon
        for level in range(config.levels):
            C = H if level else E
            for first_row, stop in part.ranges[level].tolist():
                R = stop - first_row
                shapes += [(R, C, H, False, False), (C, R, H, True, False), (R, H, C, False, False)]
        for start in range(0, int(part.rows[-2]), loops.BLOCK):
            n = min(loops.BLOCK, int(part.rows[-2]) - start)
            shapes += [(V, H, n, False, True), (V, n, H, False, False), (n, V, H, True, False)]
        with threads_of_torch():
            for m, k, n, first, second in shapes:
                a, b = (
                    np.ones((k, m) if first else (m, k), np.float32),
                    np.ones((n, k) if second else (k, n), np.float32),
                )
                out, times = np.empty((m, n), np.float32), []
                for _ in range(5):
                    began = time.process_time_ns()
                    loops.product(a, first, b, second, 0.0, out)
                    times.append(time.process_time_ns() - began)
                seconds += min(times) * 1e-9
                flops += 2 * m * k * n
    scale = config.steps / len(chosen)
    return {
        "milliseconds": 1000 * seconds * scale,
        "gflop": flops * scale * 1e-9,
        "gflop_per_second": flops / seconds * 1e-9,
    }


def profile(words: cw.Words, config: Config, runs: int = 7) -> dict[str, Any]:
    """Where the time of the fastest of some trainings goes, under cProfile."""
    text = "\n".join(words.words)
    timed_training(text, replace(config, steps=3))
    best = min((by_part(text, config) for _ in range(runs)), key=lambda part: sum(part.values()))
    milliseconds = {name: 1000 * seconds for name, seconds in best.items()}
    found = {"config": config.summary(), "milliseconds": milliseconds, "runs": runs}
    return found | ({"products": products(text, config)} if config.tier == "fused" else {})


def verdict(found: dict[str, Any]) -> str:
    """The loss, and the time where the target is reached."""
    text = f"val {found['val_mean']:.4f} ± {found['val_std']:.4f} over {len(found['seeds'])} seeds, "
    text += f"target {found['target']}, p = {found['p_value']:.2g}: "
    if not found["reached"]:
        return text + "the target is missed, so there is no time"
    wall, cpu = found["seconds"], found["cpu_seconds"]
    text += f"{wall['median']:.3f} s ({wall['min']:.3f} to {wall['max']:.3f}), {cpu['median']:.3f} s of all cores"
    return text + f"; the post's loop, estimated: {found['post_loop']['seconds_scaled_to_200000_steps']:.0f} s"


def main() -> int:
    """0, or 1 where the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", choices=TRACKS, default="post")
    parser.add_argument("--recipe", help="of `convwave train` (default: the track's on this device)")
    parser.add_argument("--tier", default="auto", help="of `convwave train` (default: auto, the fastest there is)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", metavar="IDEA", help="keep the run in the history too, with what is new in it")
    parser.add_argument("--profile", action="store_true", help="where the time goes, instead of the run")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    words = cw.load_words()
    if not words.is_names_txt:
        parser.error("needs the post's names.txt: 'convwave data fetch'")
    if package_version("scipy") is None:  # before twenty trainings, not after
        parser.error("needs SciPy: pip install 'convwave[sweep]'")
    track = TRACKS[args.track]
    recipe = args.recipe or (track.cuda_recipe if args.device.startswith("cuda") else track.recipe)
    try:
        config = Config.make(recipe=recipe, device=args.device, tier=args.tier)
    except UsageError as error:
        parser.error(str(error))
    if args.profile and config.tier not in ("cpu", "fused"):
        parser.error(f"--profile: expected tier cpu or fused, got {config.tier}")

    fastest = available_tiers(config.model, config.recipe, config.device)[0]
    given = {  # what differs from a plain run: in the command and in the name of the file
        "track": args.track,
        "device": "" if args.device == "cpu" else args.device,
        "recipe": args.recipe or "",
        "tier": "" if config.tier == fastest else config.tier,
    }
    command = ["python -m benchmarks.speedrun", *["--profile"] * args.profile]
    command += [f"--{option} {value}" for option, value in given.items() if value]
    name = ["speedrun", *(v for v in given.values() if v not in ("", "post")), *["profile"] * args.profile]
    source = provenance(" ".join(command)) | {"device": device_name(config.device)}
    found = profile(words, config) if args.profile else speedrun(words, args.track, config)
    if not args.profile:
        stderr().print(verdict(found))
        if not found["reached"]:
            return 1
    report = {"provenance": source, **found}
    write_json(args.out / f"{'-'.join(name)}.json", report)
    if args.record:
        write_json(
            args.out / f"speedrun/{'-'.join([source['date'][:10], *name[1:]])}.json", {"idea": args.record} | report
        )
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
