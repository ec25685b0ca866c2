#!/usr/bin/env bash
# Everything that needs one GPU, in nine minutes at most: is it right, how fast is it, and what would be faster.
#
#   benchmarks/on_gpu.sh                    all stages; results go to $OUT, by default benchmarks/results/gpu
#   benchmarks/on_gpu.sh bench tune         these stages only, in the script's order
#   benchmarks/on_gpu.sh --dry-run [STAGE]  the same lines on a CPU: tiny shapes, kernels interpreted, times mean nothing
#
# A stage has a limit in seconds; none begins after the 540th, and what one leaves is kept if a later one fails. Exits
# with 1 if one failed. Needs Python (PYTHON names it) with torch, triton, torchvision, transformers, scipy, pytest,
# pytest-xdist, hypothesis and matplotlib; nvcc, ncu and compute-sanitizer are used if they are there. MSDA_COMMIT names
# the commit where there is no git.
set -uo pipefail
out=${OUT:+$(realpath -m "$OUT")} # as the caller's folder has it
cd "$(dirname "$0")/.."

order=(correct bench tune knobs overhead end_to_end detector hardware profile)
declare -A limits=(
    [correct]=120 [bench]=110 [tune]=45 [knobs]=45 [overhead]=20 [end_to_end]=100 [detector]=45 [hardware]=25 [profile]=30
)
total=540

dry="" slower=1
if [[ ${1:-} == --dry-run ]]; then
    dry=--dry-run slower=3 # a CPU with two cores
    shift
fi
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
    exit
fi
for stage in "$@"; do
    if [[ -z ${limits[$stage]:-} ]]; then
        echo "usage: benchmarks/on_gpu.sh [--dry-run] [STAGE...]; expected stages of ${order[*]}, got $stage" >&2
        exit 2
    fi
done
wanted=" ${*:-${order[*]}} "
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
out=${out:-benchmarks/results/gpu}
mkdir -p "$out" && touch "$out/log.txt" || exit 2
if ! need=$("$PYTHON" - "$dry" <<'END' 2>&1
import importlib.util, sys
names = ("torch", "triton", "torchvision", "transformers", "scipy", "pytest", "xdist", "hypothesis", "matplotlib")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"on_gpu.sh: expected packages that {sys.executable} does not have: {', '.join(missing)}")
import torch
if not (sys.argv[1] or torch.cuda.is_available()):
    sys.exit("on_gpu.sh: expected a GPU, or --dry-run; torch finds none")
END
); then
    echo "$need" >&2
    exit 2
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[[ -n $dry ]] && export TRITON_INTERPRET=1
exec > >(tee -a "$out/log.txt") 2>&1
start=$SECONDS
status=0

# limited NAME COMMAND...: within what is left of the stage and of the whole; says how it ended
limited() {
    local name=$1 left=$((stage_end - SECONDS)) begin=$SECONDS code
    shift
    if ((left < 5)); then
        echo "--- $name: no time left"
        return 1
    fi
    timeout --kill-after=5 "$left" "$@"
    code=$?
    echo "--- $name: exit $code after $((SECONDS - begin)) s"
    return $code
}

stage() {  # NAME: runs the function of that name, if it is asked for
    [[ $wanted == *" $1 "* ]] || return 0
    stage_end=$((SECONDS + slower * limits[$1]))
    ((stage_end > start + slower * total)) && stage_end=$((start + slower * total))
    echo "=== $1, at $((SECONDS - start)) s, for $((stage_end - SECONDS)) s at most"
    "$1" || status=1
}

would() { echo "would run: $*"; }

# beside NAME COMMAND...: in the background; `wait_for_all` prints the ends of their logs, and fails if one did
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM
jobs=()
beside() {
    local name=$1
    shift
    (limited "$name" "$@" >"$logs/$name" 2>&1) &
    jobs+=("$name:$!")
}
wait_for_all() {
    local job failed=0
    for job in "${jobs[@]}"; do
        # kernels that are not compiled in time are compiled later
        wait "${job##*:}" || [[ $job == compile_* ]] || failed=1
        grep -hE '^(FAIL|E  )' "$logs/${job%:*}" | head -n 40
        tail -n 12 "$logs/${job%:*}"
    done
    jobs=()
    return $failed
}

# what is not timed runs side by side, and fills Triton's cache for what is
correct() {
    local room=$((limits[correct] - 20)) sanitizer tool wrong=0 i
    if [[ -n $dry ]]; then
        limited conformance "$PYTHON" -m benchmarks.conformance --dry-run --processes 2 --limit 30 || wrong=1
        limited tests "$PYTHON" -m pytest -q -p no:cacheprovider -k "edges" tests/test_gpu.py || wrong=1
        limited sanitize "$PYTHON" -m benchmarks.sanitize || wrong=1
        for tool in memcheck racecheck; do
            would compute-sanitizer --tool "$tool" "$PYTHON" -m benchmarks.sanitize
        done
        would "$PYTHON" -m benchmarks.tune --compile 0/3 --workload "${tuned[@]}"
        would "$PYTHON" -m benchmarks.knobs --compile 0/3
        return $wrong
    fi
    beside conformance "$PYTHON" -m benchmarks.conformance --processes 6 --limit "$room"
    # the other files need more than this package's tests of the operator do
    beside tests "$PYTHON" -m pytest -q -n 4 -p no:cacheprovider -m gpu --tb=short $(grep -rlE "mark(s=gpu|\.gpu)" tests)
    for i in 0 1 2; do
        beside "compile_tune_$i" "$PYTHON" -m benchmarks.tune --compile "$i/3" --workload "${tuned[@]}"
        beside "compile_knobs_$i" "$PYTHON" -m benchmarks.knobs --compile "$i/3"
    done
    if command -v compute-sanitizer >/dev/null; then
        sanitizer="$PYTHON -m benchmarks.sanitize"
        for tool in memcheck racecheck; do
            sanitizer+=" && compute-sanitizer --tool $tool --error-exitcode 7 --print-limit 5 $PYTHON -m benchmarks.sanitize"
        done
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 beside sanitize bash -c "$sanitizer"
    else
        echo "sanitize: compute-sanitizer is not here"
    fi
    wait_for_all
}

# the PyTorch formula (`fallback`) takes most of a minute for an encoder; it is measured by hand
bench() {
    local providers=(triton triton_fused triton_tensors) peer
    for peer in torch_ms_deform_attn MultiScaleDeformableAttention mmcv deformops DCNv4; do
        "$PYTHON" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$peer') is None)" && providers+=("$peer")
    done
    local args=(--provider "${providers[@]}" --dtype bfloat16 float32 --repeat 30 --limit 95)
    [[ -n $dry ]] && args=(--dry-run --device cpu --dtype bfloat16 --provider "${providers[@]}" --repeat 1 --limit 60)
    limited bench "$PYTHON" -m benchmarks.run --out "$out" "${args[@]}"
}

tuned=(encoder decoder)
tune() {
    local args=(--workload "${tuned[@]}" --repeat 10)
    [[ -n $dry ]] && args=(--dry-run --workload dry_decoder --dtype bfloat16 --distribution local)
    limited tune "$PYTHON" -m benchmarks.tune --out "$out" --python "$out/table.py" --limit 38 "${args[@]}"
}

knobs() { limited knobs "$PYTHON" -m benchmarks.knobs $dry --out "$out" --limit 38; }

overhead() {
    # without a GPU nothing is interpreted there: launches are stubbed
    TRITON_INTERPRET=0 limited overhead "$PYTHON" -m benchmarks.overhead --out "$out/overhead.csv" --limit 16
}

end_to_end() {
    # a compiled model takes minutes: --mode compiled wants a call of its own
    local mode=(--mode eager)
    [[ -n $dry ]] && mode=()
    limited end_to_end "$PYTHON" -m benchmarks.end_to_end $dry "${mode[@]}" --out "$out/end_to_end.csv" --limit 75
}

detector() {
    local args=(--device cuda --rounds 3)
    [[ -n $dry ]] && args=(--device cpu --size 64 96 --rounds 1)
    limited detector "$PYTHON" -m benchmarks.detector_step --out "$out/detector_step.csv" "${args[@]}"
}

hardware() { limited hardware "$PYTHON" -m benchmarks.hardware $dry --out "$out" --limit 20; }

profile() {
    if [[ -z $dry ]] && ! command -v ncu >/dev/null; then
        echo "ncu: is not here"
        return 0
    fi
    limited ncu "$PYTHON" -m benchmarks.ncu $dry --csv "$out/ncu.csv" --limit 27
}

"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, "cuda", torch.cuda.is_available())'
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,driver_version,clocks.sm,temperature.gpu --format=csv,noheader
for name in "${order[@]}"; do stage "$name"; done
echo "all: $((SECONDS - start)) s, results in $out$( ((status == 0)) || echo ', something failed')"
sleep 0.5  # for tee to write the last lines
exit $status
