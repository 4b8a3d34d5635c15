"""Three levels on sequences of one length, at several widths and precisions, against what one writes with torch.nn."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from benchmarks.harness import PRECISIONS
from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.tasks import MAX_AUTOTUNE, Stack

QUESTION = "Three levels on full sequences: how do widths and precisions compare with torch.nn?"
PICTURES = (
    Picture("Training, float32", "positions_per_second", "train, float32", RATE),
    Picture("Evaluation, float32", "positions_per_second", "eval, float32", RATE),
    Picture("Training, bfloat16", "positions_per_second", "train, bfloat16", RATE),
    Picture("Training, float32: peak memory", "peak_bytes", "train, float32", "bytes"),
)
MATMUL, CONV1D = "two shifted matmuls", "Conv1d + BatchNorm1d + tanh"
PROVIDERS = (MATMUL, CONV1D, "convwave, eager", "pytorch-tcn", "convwave, triton", f"{CONV1D}, deterministic")
COMPILED = (f"{MATMUL}, compiled", f"{CONV1D}, compiled")
TUNED = (MATMUL, "convwave, triton", f"{MATMUL}, {MAX_AUTOTUNE}", f"{CONV1D}, {MAX_AUTOTUNE}")


def steps(plan: Plan) -> Iterator[Step]:
    precisions = plan.pick(("float32",), ("float32", "bfloat16", "float64"), ("float32", "tf32", "bfloat16", "float16"))
    compiled = plan.pick((), ("float32",), ("float32", "bfloat16"))
    batch, length = plan.pick((4, 64), (8, 128), (64, 1024))
    grid = [(*point, "") for point in product(plan.pick((16, 32), (128, 64, 256, 512, 1024)), precisions, MODES)]
    if plan.cuda:
        grid += [
            (*point, f", {MAX_AUTOTUNE}") for point in product((128,), compiled, MODES)
        ]  # takes a minute to compile
    for channels, precision, mode, tuned in grid:
        providers = TUNED if tuned else PROVIDERS + COMPILED * (channels == 128 and precision in compiled)
        providers += ("convwave, triton, ieee",) * (precision == "float32" and not tuned)
        shape = (batch, length, channels, 3, PRECISIONS[precision][0])
        task = partial(Stack, *shape, MODES[mode], plan.device)
        yield plan.step((f"{mode}, {precision}{tuned}", "channels", channels), task, providers, MATMUL, precision)
