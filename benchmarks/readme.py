"""Writes the README's figures from benchmarks/results/, so that no figure stands there that was not measured.

    python -m benchmarks.readme

Each figure lies between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; `tests/test_readme.py` holds that the README
is what this makes.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

from benchmarks.figures import RESULTS
from benchmarks.headlines import NOT_MEASURED, device_of, devices, headlines

README = RESULTS.parent.parent / "README.md"


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _seconds(value: float) -> str:
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def _timing(quantiles: dict[str, float]) -> str:
    low, high = _seconds(quantiles["min"]), _seconds(quantiles["max"])
    return f"{_seconds(quantiles['median'])} ({low} to {high}, {quantiles['runs']} runs)"


def _spread(losses: dict[str, Any], split: str) -> str:
    return f"{losses[split]['mean']:.4f} ± {losses[split]['std']:.4f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _device(provenance: dict[str, Any]) -> str:
    return f"{provenance['device']}, torch {provenance['versions']['torch']}"


def headline() -> str:
    reproduced = {row["model"]: row for row in _read("reproduce/reproduce.json")["rows"]}["hierarchical"]
    fast, record = _read("fast.json"), _read("record.json")
    rows = [
        ["hierarchical MLP, as the post prints it", "22,397", "200,000", "", f"{reproduced['published_val']:.4f}", ""],
        [
            "the same, trained here by the post's recipe",
            f"{reproduced['parameters']:,}",
            f"{reproduced['steps']:,}",
            _seconds(reproduced["train_seconds"]),
            f"{reproduced['val_loss']:.4f}",
            f"{reproduced['novel_val_loss']:.4f}",
        ],
    ]
    for name, report in (("fast", fast), ("record", record)):
        config = report["config"]
        rows.append(
            [
                f"**convolution, recipe `{name}`**, {report['seconds']['runs']} seeds",
                f"{config['parameters']:,}",
                f"{config['steps']:,}",
                f"**{_seconds(report['seconds']['median'])}**",
                f"**{_spread(report['losses'], 'val')}**",
                _spread(report["losses"], "novel_val"),
            ]
        )
    sprint = _read("speedrun.json")
    losses = {
        split: {"mean": statistics.mean(values), "std": statistics.stdev(values)}
        for split, values in sprint["losses"].items()
    }
    rows.insert(
        3,
        [
            f"**convolution, recipe `sprint`**, {len(sprint['seeds'])} seeds",
            f"{sprint['parameters']:,}",
            f"{sprint['config']['steps']:,}",
            f"**{_seconds(sprint['seconds']['median'])}**, packing included",
            f"**{_spread(losses, 'val')}**",
            _spread(losses, "novel_val"),
        ],
    )
    table = _table(["names.txt, loss in nats", "parameters", "steps", "training", "validation", "novel names"], rows)
    return (
        f"{table}\n\nRecipe `fast` reaches the post's loss {fast['times_faster']:.0f} times faster than the post's own "
        f"loop, `sprint` {sprint['times_faster']:.0f} times, each timed beside that loop on the same machine "
        f"({_device(fast['provenance'])}); mean and standard deviation over seeds. Commands: [Figures](#figures), "
        "[The speedrun](#the-speedrun)."
    )


def equality() -> str:
    report = _read("equality.json")
    zero, ahead = report["zero_padding"], report["look_ahead"]
    changes = ", ".join(f"{row['training']['largest_logit_change']:.1g} in a batch of {row['names']}" for row in ahead)
    return (
        "- *Zero padding.* `nn.Conv1d` + `nn.BatchNorm1d` + tanh with zeros on the left, given the same trained "
        f"weights: before the context is full ({100 * zero['positions_before_the_context_is_full']:.0f} % of the "
        f"validation positions) logits differ by {zero['mean_logit_difference_early']:.1f} on average and "
        f"{zero['largest_logit_difference_early']:.1f} at most, later by rounding "
        f"({zero['largest_logit_difference_later']:.0e}); the validation loss is "
        f"{zero['val_loss_with_zero_padding']:.3f} instead of {zero['val_loss']:.3f}.\n"
        "- *BatchNorm looks ahead in training mode*, in the MLP as in the convolution: a batch's statistics contain "
        "every letter of it. Changing the last letter of one name moves logits that have not read it by up to "
        f"{changes} names "
        f"(logits are about {ahead[-1]['training']['largest_logit']:.0f} at most). In evaluation mode by exactly "
        f"{max(row['evaluation']['largest_logit_change'] for row in ahead):g}.\n\n"
        f"(`{report['provenance']['command']}`)"
    )


def trajectory() -> str:
    checks = [check for check in _read("certificate.json")["checks"] if check["name"].startswith("trajectory")]
    return f"{max(check['max_abs_error'] for check in checks):.0e}"


def figures() -> str:
    reproduce, fast, record = _read("reproduce/reproduce.json"), _read("fast.json"), _read("record.json")
    evaluate, sample, certificate = _read("evaluate.json"), _read("sample.json"), _read("certificate.json")
    checks = certificate["checks"]
    study = "`python -m benchmarks.figures {}`".format
    rows = [
        [
            f"{row['title']}, train / val: the post {row['published_train']:.4f} / {row['published_val']:.4f}",
            f"{row['train_loss']:.4f} / {row['val_loss']:.4f}, {_seconds(row['train_seconds'])}",
            "`convwave reproduce`",
        ]
        for row in reproduce["rows"]
        if row["published_val"] is not None
    ]
    loop = fast["post_loop"]
    rows += [
        ["recipe `fast`, training time", _timing(fast["seconds"]), study("fast")],
        ["recipe `fast`, validation", _spread(fast["losses"], "val"), study("fast")],
        [
            f"the post's loop, {loop['steps_measured']:,} steps measured, scaled to 200,000",
            f"{_seconds(loop['seconds_scaled_to_200000_steps'])}: {fast['times_faster']:.0f} times longer than `fast`",
            study("fast"),
        ],
        ["recipe `record`, training time", _timing(record["seconds"]), study("record")],
        [
            "recipe `record`, validation / novel names / test (used for no choice)",
            " / ".join(_spread(record["losses"], split) for split in ("val", "novel_val", "test")),
            study("record"),
        ],
        [
            f"exact evaluation of all {evaluate['positions']:,} positions",
            _timing(evaluate["evaluate_seconds"]),
            study("evaluate"),
        ],
        ["the same through the windowed MLP", _timing(evaluate["windowed_evaluate_seconds"]), study("evaluate")],
        ["preparing it from text", _timing(evaluate["prepare_from_text_seconds"]), study("evaluate")],
        [
            f"sampling {sample['count']:,} names",
            f"{sample['names_per_second']:,.0f} names/s, {_timing(sample['seconds'])}",
            study("sample"),
        ],
        [
            f"`verify`: {sum(c['passed'] for c in checks)} of {len(checks)} checks passed",
            _seconds(certificate["seconds"]),
            "`convwave verify`",
        ],
        ["anything on a GPU", "not measured", ""],
    ]
    sources = ["fast", "evaluate", "sample", "record", "certificate"]
    links = ", ".join(f"[{name}](benchmarks/results/{name}.json)" for name in sources)
    return (
        f"Measured on {_device(fast['provenance'])}, with names.txt; median and range. With device, versions, commit "
        f"and command: {links}, [reproduce](benchmarks/results/reproduce/reproduce.json).\n\n"
        + _table(["figure", "measured", "command"], rows)
    )


def bench() -> str:
    found = devices(RESULTS)
    if not found:
        return NOT_MEASURED
    gpu = any(row["device"].startswith("cuda") for d in found.values() for _, doc in d.values() for row in doc["rows"])
    columns = {device_of(documents): headlines(documents) for documents in found.values()}
    questions = next(iter(columns.values()))
    if not gpu:
        columns["GPU"] = [(question, NOT_MEASURED, study) for question, _, study in questions]
    rows = [
        [question, *(answers[i][1] for answers in columns.values()), f"`convwave bench {study}`"]
        for i, (question, _, study) in enumerate(questions)
    ]
    short = [
        name for documents in found.values() for name, (_, document) in documents.items() if not document["complete"]
    ]
    cut = f" Cut short: {', '.join(short)}." if short else ""
    links = ", ".join(
        f"[{name}]({path.relative_to(README.parent).as_posix()})"
        for d in found.values()
        for name, (path, _) in d.items()
    )
    return (
        _table(["median of the ratios within rounds, 5 to 95 %", *columns, "command"], rows)
        + f"\n\n~: may differ by more than 10 % in another run.{cut}\n"
        + f"With device, clocks, versions, commit, command, flags and quantiles: {links}."
    )


def speedrun() -> str:
    tracks = [_read("speedrun.json"), _read("speedrun-open.json")]
    rows = [
        [
            report["title"],
            f"{report['parameters']:,}",
            f"{report['config']['steps']:,}",
            f"<= {report['target']}",
            f"{report['val_mean']:.4f} ± {report['val_std']:.4f}, p = {report['p_value']:.1g}",
            f"**{_timing(report['seconds'])}**",
            f"{report['cpu_seconds']['min']:.2f} s",
            f"{report['times_faster']:.0f}",
        ]
        for report in tracks
    ]
    parts = _read("speedrun-profile.json")["milliseconds"]
    total = sum(parts.values())
    where = ", ".join(f"{name} {100 * ms / total:.0f} %" for name, ms in parts.items())
    columns = ["track", "parameters", "steps", "target", "validation", "from text to network", "least CPU time"]
    return (
        _table([*columns, "times faster than the post's loop (estimated)"], rows)
        + f"\n\n{_device(tracks[0]['provenance'])}, tier `{tracks[0]['config']['tier']}`, "
        f"{len(tracks[0]['seeds'])} seeds. Of the first track's time: "
        f"{where}.\nWith seeds, losses and times: [post](benchmarks/results/speedrun.json), "
        "[open](benchmarks/results/speedrun-open.json), [profile](benchmarks/results/speedrun-profile.json).\n"
        "`python -m benchmarks.speedrun`, `... --track open`, `... --profile`."
    )


def mutants() -> str:
    text = (Path(__file__).resolve().parent.parent / "tests/MUTANTS.md").read_text(encoding="utf-8")
    found = re.search(r"Caught by the tests: (\d+ of \d+)", text)
    assert found is not None
    return found[1]


BLOCKS = {f.__name__: f for f in (headline, equality, trajectory, figures, speedrun, bench, mutants)}


def render(text: str) -> str:
    """The README with every block made anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->)(\n?).*?\n?(<!-- end {name} -->)", re.DOTALL)
        assert pattern.search(text), name
        text = pattern.sub(lambda m, make=make: f"{m[1]}{m[2]}{make()}{m[2]}{m[3]}", text)  # type: ignore[misc]
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text(encoding="utf-8")), encoding="utf-8")
