"""Three levels on sequences of one length, at several widths and precisions, against what one writes with torch.nn."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness import Row, compare, numeric_flags
from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.tasks import MAX_AUTOTUNE, Stack


def steps(plan: Plan) -> Iterator[Step]:
    precisions = ("float32", "tf32", "bfloat16", "float16") if plan.cuda else ("float32", "bfloat16", "float64")
    for channels in (16, 32) if plan.quick else (128, 64, 256, 512, 1024):
        for precision in precisions[:1] if plan.quick else precisions:
            for mode, training in MODES.items():
                arguments = (plan, channels, precision, training, False)
                yield Step((f"{mode}, {precision}", "channels", channels), _measure, arguments)
    for precision in ("float32", "bfloat16") if plan.cuda and not plan.quick else ():  # takes a minute to compile
        for mode, training in MODES.items():
            arguments = (plan, 128, precision, training, True)
            yield Step((f"{mode}, {precision}, {MAX_AUTOTUNE}", "channels", 128), _measure, arguments)


def _measure(plan: Plan, channels: int, precision: str, training: bool, tuned: bool, point: Row) -> list[Row]:
    batch, length = (64, 1024) if plan.cuda else (4, 64) if plan.quick else (8, 128)
    how: str | bool = MAX_AUTOTUNE if tuned else True
    named = MAX_AUTOTUNE if tuned else "compiled"
    with numeric_flags(precision) as dtype:
        task = Stack(batch, length, channels, 3, dtype, training, plan.device)
        competitors = [task.matmul()]
        if not tuned:
            competitors += [task.conv1d(), task.convwave("convwave, eager"), task.pytorch_tcn()]
        if plan.cuda:
            competitors.append(task.convwave("convwave, triton", "triton"))
        if plan.cuda and not tuned:
            competitors.append(task.conv1d("Conv1d + BatchNorm1d + tanh, deterministic", deterministic=True))
            if precision == "float32":
                competitors.append(task.convwave("convwave, triton, ieee", "triton", "ieee"))
        worth_compiling = ("float32", "bfloat16") if plan.cuda else ("float32",)
        if not plan.quick and channels == 128 and precision in worth_compiling:
            competitors.append(task.matmul(f"two shifted matmuls, {named}", how))
            competitors.append(task.conv1d(f"Conv1d + BatchNorm1d + tanh, {named}", how))
        return compare(
            competitors, task.expected(), point, plan, positions=task.positions, baseline="two shifted matmuls"
        )


QUESTION = "Three levels on full sequences: how do widths and precisions compare with torch.nn?"
PICTURES = (
    Picture("Training, float32", "positions_per_second", "train, float32", RATE),
    Picture("Evaluation, float32", "positions_per_second", "eval, float32", RATE),
    Picture("Training, bfloat16", "positions_per_second", "train, bfloat16", RATE),
    Picture("Training, float32: peak memory", "peak_bytes", "train, float32", "bytes"),
)
