#!/bin/sh
# What a CUDA machine has to say about this checkout, in at most 8 minutes: kernels against the float64 reference, the
# tests that need a device, compute-sanitizer, times by CUDA graph and eager, a training step.
#
#   benchmarks/gpu_check.sh OUT_FOLDER
#
# Needs Python 3.11+ with PyTorch 2.11+ for CUDA, and numpy, tabulate, tqdm and networkx; nothing is installed, nothing
# is fetched. What is lacking can be carried:
#   WHEELS=folder     its wheels are unpacked into a folder of their own for this run. SpikingJelly (with loguru) gives
#                     the rows that ratios to PSN and LIF need, matplotlib the pictures.
#   PREBUILT=folder   compiled CUDA kernels: what TORCH_EXTENSIONS_DIR held elsewhere after `python -m mfpsn_fx build
#                     --arch sm_90`, with an nvcc of the same version as the one here, by which they are known. What does
#                     not fit this checkout is compiled here.
#   DEVICE=cpu        a rehearsal without a GPU: every step runs, in small, on the kernels of the CPU.
#   LIMIT=seconds     for all (default 470). PYTHON names the interpreter.
# Every step ends by its own limit, and writes as it goes: what was measured by then stays. OUT_FOLDER/gpu_check.tar.gz
# has all logs, JSON, Markdown and pictures, also of a run that a signal ends.
# Exit status: 0, 1 if a step failed (the others go on), 2 if it could not begin.
set -u

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu_check.sh OUT_FOLDER" >&2
    exit 2
fi
began=$(date +%s)
limit=${LIMIT:-470} device=${DEVICE:-cuda} python=${PYTHON:-python3}
case $python in
/*) ;;
*/*) python=$PWD/$python ;; # steps run in OUT_FOLDER
esac
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
if [ -n "$(ls -A "$out")" ]; then
    echo "$out is not empty: results of another run would be taken for this one's" >&2
    exit 2
fi

"$python" - "$device" <<'PYTHON' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed; say which with PYTHON=...")
try:
    import torch
except ImportError as error:
    sys.exit(f"PyTorch cannot be imported: {error}")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"PyTorch 2.11 or newer is needed, found {torch.__version__}")
if sys.argv[1] != "cpu" and not torch.cuda.is_available():
    sys.exit("no CUDA device: torch.cuda.is_available() is False (DEVICE=cpu rehearses without one)")
PYTHON

scratch=$(mktemp -d) || exit 2
# What was measured by then is packed, however this ends; steps under way are ended with it
finish() {
    trap - EXIT
    pids=$(jobs -p)
    # shellcheck disable=SC2086  # one argument a process
    [ -n "$pids" ] && kill $pids 2>/dev/null
    (cd "$out" && tar -czf "$scratch/all.tar.gz" -- *.log *.json *.md *.png *.txt 2>/dev/null
        mv "$scratch/all.tar.gz" gpu_check.tar.gz)
    rm -rf "$scratch"
}
trap finish EXIT
child=
# A subshell begins without traps: steps in the background set them again
signals() {
    trap 'kill $child 2>/dev/null; exit 129' HUP
    trap 'kill $child 2>/dev/null; exit 130' INT
    trap 'kill $child 2>/dev/null; exit 143' TERM
}
signals
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-deps --no-index --no-compile --target "$scratch/site" "$WHEELS"/*.whl || {
        echo "the wheels in WHEELS could not be unpacked" >&2
        exit 2
    }
    export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ -n "${PREBUILT:-}" ]; then
    cp -r "$PREBUILT" "$scratch/extensions" || exit 2
    export TORCH_EXTENSIONS_DIR="$scratch/extensions"
fi
(cd "$here" && "$python" -c 'import checkout') || exit 2
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MFPSN_FX_CACHE=off
: >"$out/summary.txt"

# step NAME SECONDS COMMAND...: run it under a limit, its output into OUT/NAME.log, and go on whatever comes of it
step() {
    name=$1 most=$2
    shift 2
    started=$(date +%s)
    left=$((limit - (started - began)))
    [ "$most" -gt "$left" ] && most=$left
    if [ "$most" -lt 5 ]; then
        echo "$name: FAILED: no time was left of $limit s" >>"$out/summary.txt"
        return
    fi
    # in the background: a signal is served at once, not when the step is over
    timeout -k 5 "$most" "$@" >"$out/$name.log" 2>&1 &
    child=$!
    signals
    wait "$child"
    status=$?
    child=
    took=$(($(date +%s) - started))
    case $status in
    0) result="passed in $took s" ;;
    124) result="FAILED: not done after $most s" ;;
    137) result="FAILED: killed after $took s" ;; # at its limit, or for memory
    *) result="FAILED with status $status after $took s" ;;
    esac
    echo "$name: $result" >>"$out/summary.txt"
}

skip() {
    echo "$1: skipped, $2" >>"$out/summary.txt"
}

if [ "$device" = cpu ]; then
    ours="fused-cpp shifted-add" others=conv2d shards=1 check=2 spare=60 tests=60 compile=0
    small="--quick --seconds 0.05" tiny=--tiny
    neuron_grid="--steps 4 --batch 2 --channels 8" network_grid="--steps 4 --batch 2 --channels 8"
else
    ours="fused-cuda fused-triton" shards=3 check=80 spare=20 tests=100 compile=30 small="" tiny=""
    neuron_grid="" network_grid="--steps 4 16"
    # PyTorch's own calls, which kernels that run anywhere are made of
    others=$(cd "$here" && "$python" -c 'import checkout
from mfpsn_fx.kernels import kernels
print(*[k.name for k in kernels() if k.devices is None])')
fi

# Facts, and the builds: everything after them finds the kernels compiled.
step facts 100 "$python" "$here/gpu_facts.py" --device "$device"

# Correctness, all at once: these wait for the host's reference, not for the device. A fault of the device poisons its
# process and no other: one kernel a process.
kernels() {
    name=$1
    shift
    # shellcheck disable=SC2086  # options
    step "$name" $((check + spare)) "$python" "$here/gpu_kernels.py" --device "$device" --seconds "$check" $tiny \
        --json "$out/$name.json" "$@"
}
for kernel in $ours; do
    shard=1
    while [ $shard -le $shards ]; do
        kernels "kernels-$kernel-$shard" --kernels "$kernel" --shard "$shard/$shards" &
        shard=$((shard + 1))
    done
done
# shellcheck disable=SC2086  # one argument a kernel
kernels kernels-pytorch --kernels $others &
if ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not there"
elif [ "$device" = cpu ]; then
    skip sanitizer "it is for CUDA"
else
    sanitized() { # TOOL OPTIONS...
        tool=$1
        shift
        step "$tool" $((check + spare)) compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" \
            "$here/gpu_kernels.py" --device cuda --tiny --seconds $((check / 2)) --kernels fused-cuda "$@"
    }
    sanitized memcheck &
    sanitized racecheck --layout time_last &
fi
if "$python" -c 'import pytest, hypothesis, spikingjelly' 2>/dev/null; then
    if [ "$device" = cpu ]; then
        which=TestPlan triton_which=refusals
    else # the device's own tests, and of those that also run emulated on the host, the device's half
        which='TestOnDevice or (cuda and not (host or compiles or TestFaults or TestBuild or TestPlan))'
        triton_which='not compile'
    fi
    tested() { # NAME FILE WHICH
        step "$1" "$tests" env PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" "$python" -m pytest -p checkout -q \
            --maxfail 5 -o cache_dir="$scratch/pytest" "$here/../tests/kernels/implementations/$2" -k "$3"
    }
    tested tests-cuda test_fused_cuda.py "$which" &
    tested tests-triton test_fused_triton.py "$triton_which" &
else
    skip tests "pytest, hypothesis or SpikingJelly is not there"
fi
wait

# Times, one after the other: nothing else may run beside them.
pictures=''
"$python" -c 'import matplotlib' 2>/dev/null && pictures=yes || skip pictures "matplotlib is not there"
cd "$out" || exit 2
# shellcheck disable=SC2086  # options
step times 130 "$python" "$here/gpu_times.py" --device "$device" --limit 110 --kernels $ours \
    --json times.json --markdown times.md $small
# shellcheck disable=SC2086
step neuron 110 "$python" "$here/neuron.py" --device "$device" --seconds 0.2 --compile-seconds $compile \
    --json neuron.json --markdown neuron.md ${pictures:+--png neuron.png} $small $neuron_grid
# shellcheck disable=SC2086
step network 80 "$python" "$here/network.py" --device "$device" --seconds 1 --compile-seconds $compile \
    --json network.json --markdown network.md ${pictures:+--png network.png} $small $network_grid

echo "in all: $(($(date +%s) - began)) s" >>"$out/summary.txt"
for log in facts times network; do
    [ -f "$log.log" ] && tail -n 40 "$log.log"
done
grep -h '^FAILED' ./*.log
cat summary.txt
! grep -q FAILED summary.txt
