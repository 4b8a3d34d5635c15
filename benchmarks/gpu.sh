#!/bin/sh
# Everything that needs a GPU, in one run on a machine that has one and little else: `make gpu`.
#
# It needs Python with torch, triton, numpy, pytest, hypothesis, safetensors, rich and matplotlib, and no network. It makes
# the checkout importable, asks whether the kernels' bits are always the same, runs the GPU tests side by side, the speedrun
# (needs the post's names.txt and SciPy), then all studies, within nine minutes, and writes to the folder $OUT (default
# benchmarks/results/gpu) tests.txt, studies.txt, the studies' files, report.html and speedrun-cuda.json. Whatever stops it,
# the files hold what was done until then. Every study is a process of its own: after a CUDA error nothing more runs in the
# process that met it. Exit status: 0 if tests and checks passed.
#
# Environment: PYTHON (python3), DEVICE (cuda), SECONDS_IN_ALL (530), TESTS (files for pytest), SHARDS (processes of tests, at
# most 8), OPTIONS (of the studies).

root=$(cd "$(dirname "$0")/.." && pwd) && cd "$root" || exit 2
python=${PYTHON:-python3} device=${DEVICE:-cuda} seconds=${SECONDS_IN_ALL:-530}
out=${OUT:-$root/benchmarks/results/gpu}
# those that need a GPU first; then what runs in the interpreter elsewhere, and compiles a kernel for most of its cases
tests=${TESTS:-tests/test_graphed.py tests/test_kernels_gpu.py tests/test_ops.py tests/test_kernels.py tests/test_verification.py}
# what compiles little comes first, so that a short run has seen most of the questions; with the parts of the time
studies="roofline:1 ladder:2 launches:1 context:1 train:1 sample:1 breakeven:1 width:4 names:1"

site=$(mktemp -d) && mkdir "$site/convwave" || exit 2
ln -s "$root"/convwave/* "$root/kernels" "$root/data/given_names" "$site/convwave"
export PYTHONPATH="$site:$root${PYTHONPATH:+:$PYTHONPATH}"
missing=$("$python" -c 'import convwave.kernels, pytest, hypothesis, rich, matplotlib, sys, torch
torch.empty(0, device=sys.argv[1])' "$device" 2>&1) || {
  echo "gpu: needs device $device and the packages listed in benchmarks/gpu.sh: $(echo "$missing" | tail -n 1)" >&2
  exit 2
}
mkdir -p "$out" && rm -f "$out"/tests*.txt "$out/studies.txt"
ends=$(($(date +%s) + seconds)) failed=0

limited() { # SECONDS LOG COMMAND..: the command, its output at the end of the log; 124 where the time was up
  limit=$(($1 > 1 ? $1 : 1)) log=$out/$2 && shift 2
  timeout -k 5 "$limit" "$@" >> "$log" 2>&1
  status=$?
  [ $status -ne 124 ] || echo "stopped after $limit s" >> "$log"
  return $status
}

[ "$device" = cpu ] || if limited $((seconds * 15 / 100)) tests.txt "$python" -m benchmarks.first; then
  echo "bits: always the same"
else
  echo "bits: WRONG or cut short, see tests.txt" && failed=1
fi
# side by side, since compilation is most of their time
cores=$(nproc)
shards=${SHARDS:-$((cores < 8 ? cores : 8))} shard=0 jobs= worst=5
while [ $shard -lt "$shards" ]; do
  limited $((seconds * 35 / 100)) "tests-$shard.txt" env CONVWAVE_SHARD="$shard/$shards" \
    "$python" -m pytest -v --tb=short -p no:cacheprovider -p tests.shard -o addopts= $tests &
  jobs="$jobs $!" shard=$((shard + 1))
done
for job in $jobs; do
  wait "$job"
  status=$?
  case $status in 5) ;; 0) [ $worst -ne 5 ] || worst=0 ;; *) worst=$status ;; esac
done
cat "$out"/tests-*.txt >> "$out/tests.txt" && rm "$out"/tests-*.txt
case $worst in 0) echo "tests: passed" ;; 5) echo "tests: none selected" ;; *) echo "tests: FAILED or cut short" && failed=1 ;; esac
limited $((seconds * 15 / 100)) studies.txt "$python" -m benchmarks.speedrun --device "$device" --out "$out" \
  && echo "speedrun: done" || echo "speedrun: no time, see studies.txt"
parts=0
for study in $studies; do parts=$((parts + ${study#*:})); done
for study in $studies; do
  name=${study%:*} left=$((ends - $(date +%s)))
  share=$((left * ${study#*:} / parts)) parts=$((parts - ${study#*:}))
  most=$((15 + 2 * share)) # starting takes a while, and so may the step that runs when the time is up
  [ $left -ge 5 ] && limited $((most < left ? most : left)) studies.txt "$python" -m benchmarks "$name" \
    --device "$device" --out "$out" --budget $((share * 8 / 10 + 1)) $OPTIONS \
    && echo "$name: done" || { echo "$name: wrong or cut short, see studies.txt" && failed=1; }
done
limited $((seconds * 10 / 100)) studies.txt "$python" -m benchmarks --report --out "$out"
echo "written to $out"
exit $failed
