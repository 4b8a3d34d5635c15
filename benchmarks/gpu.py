"""Everything that needs a GPU, in one run on a machine that has one and little else: `make gpu`.

    python3 benchmarks/gpu.py

It needs Python with torch, triton, numpy, pytest, hypothesis, safetensors and rich, with matplotlib draws pictures too,
and needs no network. It makes the checkout importable, asks whether the kernels' bits are always the same, runs the GPU
tests side by side, since compilation is most of their time, then all studies, within nine minutes, and writes the
`FILES` below to the folder $OUT (default benchmarks/results/DEVICE/). Whatever stops it, they hold what was done until
then. Every study is a process of its own: after a CUDA error nothing more runs in the process that met it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what compiles little comes first, so that a short run has seen most of the questions
ORDER = ("roofline", "ladder", "launches", "context", "train", "sample", "breakeven", "width", "names")
# those that need a GPU first; then what runs in the interpreter elsewhere, and compiles a kernel for most of its cases
TESTS = (
    "test_graphed",
    "test_kernels_gpu",
    "test_ops",
    "test_kernels",
    "test_score_names",
    "test_evaluation",
    "test_verification",
)
PARTS = {"width": 4, "ladder": 2}  # of the time, where others have 1
FIRST_SHARE, TESTS_SHARE, SPEEDRUN_SHARE = 0.15, 0.35, 0.15  # of the time, at most
SHARDS = 8  # processes of tests, at most one a core; each takes some 500 MB of the GPU's memory
NO_TESTS, KILLED = 5, 124  # exit statuses: pytest's when it selected none, and ours after the time was up
BUDGET_SHARE = 0.8  # of a study's time; the rest is for starting, and for the step that runs when the time is up
LEAST = 5.0  # seconds that a study is started for
STARTING, OVERTIME = 15.0, 2.0  # a study is killed after so many seconds and so many times its share
NEEDED = ("torch", "triton", "numpy", "pytest", "hypothesis", "safetensors", "rich")
FILES = ("tests.txt", "studies.json", "studies.png", "studies.txt", "report.html", "speedrun-cuda.json")


def main() -> int:
    """Run everything; 0 if tests and checks passed, 1 if not."""
    parser = argparse.ArgumentParser(description="GPU tests and all studies, within a time budget.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=530.0, help="for all of it (default: 530)")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try this script")
    parser.add_argument("--tests", default="tests", help="what pytest collects")
    args = parser.parse_args()
    ends = time.monotonic() + args.seconds

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu: needs the packages {', '.join(NEEDED)}, missing: {', '.join(missing)}")
    environment = importable(dict(os.environ))
    where = os.environ.get("OUT")
    out = Path(where).resolve() if where else ROOT / "benchmarks/results" / device_folder(args.device, environment)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # of an earlier run
        (out / name).unlink(missing_ok=True)
    candidates = [folder / "shared/data/names.txt" for folder in (ROOT, ROOT.parent)]
    data = next((path for path in candidates if path.is_file()), None)
    if data is not None:
        environment.setdefault("CONVWAVE_DATA", str(data))

    first = 0
    if args.device == "cuda":
        first = run(["-m", "benchmarks.first"], out / "tests.txt", environment, FIRST_SHARE * args.seconds)
        print(f"bits: {'always the same' if first == 0 else 'WRONG or cut short, see tests.txt'}", flush=True)

    chosen = [f"tests/{name}.py" for name in TESTS] if args.tests == "tests" else [args.tests]
    pytest = ["-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", *chosen]
    shards = min(SHARDS, os.cpu_count() or 1) if args.device == "cuda" else 1
    tests = run_shards(pytest, out / "tests.txt", environment, TESTS_SHARE * args.seconds, shards)
    outcome = {0: "passed", NO_TESTS: "none selected", KILLED: "cut short, see tests.txt"}.get(tests, "FAILED")
    print(f"tests: {outcome}", flush=True)

    if args.device == "cuda" and not args.quick and data is not None:
        speedrun = ["-m", "benchmarks.speedrun", "--device", args.device, "--out", str(out)]
        status = run(speedrun, out / "studies.txt", environment, SPEEDRUN_SHARE * args.seconds)
        print(f"speedrun: {'done' if status == 0 else 'no time, see studies.txt'}", flush=True)

    studies = 0
    for i, name in enumerate(ORDER):
        left = ends - time.monotonic()
        if left < LEAST:
            print(f"{name}: not measured, the time was up", flush=True)
            studies = KILLED
            continue
        share = left * PARTS.get(name, 1) / sum(PARTS.get(later, 1) for later in ORDER[i:])
        bench = ["-m", "benchmarks", name, "--device", args.device, "--bundle", "--out", str(out)]
        bench += [f"--budget={max(1, round(BUDGET_SHARE * share))}", *(["--quick"] if args.quick else [])]
        status = run(bench, out / "studies.txt", environment, min(left, STARTING + OVERTIME * share))
        print(f"{name}: {'done' if status == 0 else 'wrong or cut short, see studies.txt'}", flush=True)
        studies = studies or status
    report = [sys.executable, "-m", "benchmarks", "--report", "--out", str(out)]
    subprocess.run(report, cwd=ROOT, env=environment, capture_output=True, check=False)
    print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}", flush=True)
    return int(tests not in (0, NO_TESTS) or first != 0 or studies != 0)


def importable(environment: dict[str, str]) -> dict[str, str]:
    """An environment in which this checkout is the `convwave` that Python imports, if need be as a package of links."""
    site = Path(tempfile.mkdtemp(prefix="convwave-"))
    (site / "convwave").mkdir()
    sources = [path for path in (ROOT / "convwave").iterdir() if path.name != "__pycache__"]
    for path in [*sources, ROOT / "kernels", ROOT / "data/given_names"]:
        (site / "convwave" / path.name).symlink_to(path)
    paths = [str(site), str(ROOT), environment.get("PYTHONPATH", "")]
    linked = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    for tried in (environment, linked):
        done = python("import convwave.kernels; print(convwave.__file__)", tried)
        if done.returncode == 0 and Path(done.stdout.strip()).resolve().parent == ROOT / "convwave":
            return tried
    sys.exit("gpu: convwave cannot be imported; it needs torch, numpy and safetensors")


def python(code: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, outside the checkout."""
    command, cwd = [sys.executable, "-c", code], tempfile.gettempdir()
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)


def device_folder(device: str, environment: dict[str, str]) -> str:
    """The device's name as a folder's."""
    code = f"from convwave.runs.registry import device_name; print(device_name({device!r}))"
    done = python(code, environment)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        sys.exit(f"gpu: needs a device {device!r}, there is none here: {reason}")
    return "-".join("".join(c if c.isalnum() else " " for c in done.stdout.lower()).split())


def run(arguments: list[str], log: Path, environment: dict[str, str], seconds: float) -> int:
    """Run Python in the checkout, its output at the end of a file; killed when the time is up. The exit status."""
    command, limit = [sys.executable, *arguments], max(1.0, seconds)
    with log.open("a") as file:
        start = partial(subprocess.run, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            return start(command, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {seconds:.0f} s\n")
            return KILLED


def run_shards(pytest: list[str], log: Path, environment: dict[str, str], seconds: float, shards: int) -> int:
    """Run tests in so many processes at once, their outputs in turn at the end of a file. The worst status."""
    logs = [log.with_name(f"{log.stem}-{i}.txt") for i in range(shards)]

    def one(i: int) -> int:
        here = environment | {"CONVWAVE_SHARD": f"{i}/{shards}"}
        return run([*pytest, "-p", "tests.shard"], logs[i], here, seconds)

    with ThreadPoolExecutor(shards) as pool:
        statuses = set(pool.map(one, range(shards)))
    with log.open("a") as file:
        for part in logs:
            file.write(part.read_text())
            part.unlink()
    failed = statuses - {0, NO_TESTS, KILLED}
    return max(failed) if failed else next(status for status in (KILLED, 0, NO_TESTS) if status in statuses)


if __name__ == "__main__":
    sys.exit(main())
