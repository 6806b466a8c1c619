#!/bin/sh
# What a CUDA machine has to say about this checkout, in under 8 minutes: kernels against the float64 reference,
# compute-sanitizer where it exists, both benchmarks.
#
#   benchmarks/gpu_check.sh OUT_FOLDER
#
# Needs Python 3.11+ with PyTorch 2.11+ for CUDA, and numpy, tabulate, tqdm and networkx; nothing is installed. What is
# lacking can be carried: WHEELS=folder benchmarks/gpu_check.sh OUT_FOLDER unpacks the wheels in it into a folder of its
# own for this run. SpikingJelly (with loguru and h5py) gives the rows that ratios to PSN need, matplotlib the pictures.
# PYTHON names the interpreter. Logs, JSON and pictures are left in OUT_FOLDER.
# Exit status: 0, 1 if a step failed (the others go on), 2 if it could not begin.
set -u

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/gpu_check.sh OUT_FOLDER" >&2
    exit 2
fi
out=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)

"$python" -c 'import sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or newer is needed; say which with PYTHON=...")
try:
    import torch
except ImportError as error:
    sys.exit(f"PyTorch cannot be imported: {error}")
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"PyTorch 2.11 or newer is needed, found {torch.__version__}")
if not torch.cuda.is_available():
    sys.exit("no CUDA device: torch.cuda.is_available() is False")
' || exit 2

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-deps --no-index --target "$site" "$WHEELS"/*.whl || {
        echo "the wheels in WHEELS could not be unpacked" >&2
        exit 2
    }
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
(cd "$here" && "$python" -c 'import checkout') || exit 2

failed=0
: >"$out/summary.txt"

# step NAME SECONDS COMMAND...: run it under a limit, its output into OUT/NAME.log, and go on whatever comes of it
step() {
    name=$1 limit=$2
    shift 2
    echo "== $name"
    started=$(date +%s)
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    took=$(($(date +%s) - started))
    if [ $status -eq 0 ]; then
        result="passed in $took s"
    elif [ $status -eq 124 ] || [ $status -eq 137 ]; then
        result="FAILED: not done after $limit s"
        failed=1
    else
        result="FAILED with status $status after $took s"
        failed=1
    fi
    tail -n 15 "$out/$name.log"
    echo "$name: $result" | tee -a "$out/summary.txt"
}

skip() {
    echo "$1: skipped, $2" | tee -a "$out/summary.txt"
}

step kernels 150 "$python" "$here/gpu_kernels.py" --device cuda --seconds 120

# the kernels that are written for CUDA; the rest are calls of PyTorch's own
ours=$(cd "$here" && "$python" -c 'import checkout
from mfpsn_fx.kernels import kernels
print(*[k.name for k in kernels() if "cuda" in (k.devices or ())])')
if ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not there"
elif [ -z "$ours" ]; then
    skip sanitizer "no kernel is written for CUDA"
else
    # shellcheck disable=SC2086  # one argument a kernel
    step sanitizer 60 compute-sanitizer --error-exitcode 1 \
        "$python" "$here/gpu_kernels.py" --device cuda --tiny --seconds 30 --kernels $ours
fi

neuron_picture='' network_picture=''
if "$python" -c 'import matplotlib' 2>/dev/null; then
    neuron_picture="--png neuron.png" network_picture="--png network.png"
else
    skip pictures "matplotlib is not there"
fi
cd "$out" || exit 2
# shellcheck disable=SC2086  # an option and its value, or nothing
step neuron 180 "$python" "$here/neuron.py" --device cuda --seconds 0.5 --compile-seconds 45 \
    --json neuron.json --markdown neuron.md $neuron_picture
# shellcheck disable=SC2086
step network 75 "$python" "$here/network.py" --device cuda --seconds 1 --compile-seconds 25 \
    --json network.json --markdown network.md $network_picture

echo
cat "$out/summary.txt"
exit $failed
