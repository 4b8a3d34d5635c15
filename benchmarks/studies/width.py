"""Three levels on sequences of one length: widths, lengths and precisions, against torch.nn and other frameworks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from benchmarks.harness import PRECISIONS
from benchmarks.studies import MODES, RATE, Picture, Plan, Step
from benchmarks.tasks import MAX_AUTOTUNE, Stack

QUESTION = (
    "Three levels on full sequences: how do widths, lengths and precisions compare with torch.nn, JAX and others?"
)
PICTURES = (
    Picture("Training, float32", "positions_per_second", "train, float32", RATE),
    Picture("Evaluation, float32", "positions_per_second", "eval, float32", RATE),
    Picture("Training, bfloat16", "positions_per_second", "train, bfloat16", RATE),
    Picture("Training, float32: peak memory", "peak_bytes", "train, float32", "bytes"),
    Picture("Training, float32, width 128", "positions_per_second", "train, float32, width 128", RATE),
    Picture("Evaluation, float32, width 128", "positions_per_second", "eval, float32, width 128", RATE),
)
MATMUL, CONV1D = "two shifted matmuls", "Conv1d + BatchNorm1d + tanh"
PROVIDERS = (MATMUL, CONV1D, "convwave, eager", "pytorch-tcn", "convwave, triton", f"{CONV1D}, deterministic")
FRAMEWORKS = ("JAX", "ONNX Runtime")  # on a CPU
COMPILED = (f"{MATMUL}, compiled", f"{CONV1D}, compiled")
TUNED = (MATMUL, "convwave, triton", f"{MATMUL}, {MAX_AUTOTUNE}", f"{CONV1D}, {MAX_AUTOTUNE}")


def steps(plan: Plan) -> Iterator[Step]:
    precisions = plan.pick(("float32",), ("float32", "bfloat16", "float64"), ("float32", "tf32", "bfloat16", "float16"))
    compiled = plan.pick((), ("float32",), ("float32", "bfloat16"))
    sizes = plan.pick((4, 64), (8, 128), (64, 1024))
    widths = plan.pick((16, 32), (128, 32, 64, 256, 512, 1024), (128, 64, 256, 512, 1024))
    grid = [("channels", c, *sizes, c, *point, "") for c, *point in product(widths, precisions, MODES)]
    if plan.cuda:  # takes a minute to compile
        grid += [("channels", 128, *sizes, 128, *point, f", {MAX_AUTOTUNE}") for point in product(compiled, MODES)]
    else:  # 4,096 positions a batch, in sequences of several lengths
        for channels, length, mode in product(plan.pick((), (32, 128, 512)), (16, 128, 1024, 4096), MODES):
            grid.append(("length", length, 4096 // length, length, channels, "float32", mode, f", width {channels}"))
    for name, x, batch, length, channels, precision, mode, note in grid:
        providers: tuple[str, ...] = TUNED if MAX_AUTOTUNE in note else PROVIDERS
        if precision in compiled and (not plan.cuda or (channels == 128 and not note)):
            providers += COMPILED
        providers += ("convwave, triton, ieee",) * (precision == "float32" and not note)
        providers += FRAMEWORKS * (not plan.cuda)
        task = partial(Stack, batch, length, channels, 3, PRECISIONS[precision][0], MODES[mode], plan.device)
        yield plan.step((f"{mode}, {precision}{note}", name, x), task, providers, MATMUL, precision)
