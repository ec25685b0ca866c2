#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes: the operator's tests, accuracy, the benchmark, configurations, and
# training steps of the detector.
#
#   benchmarks/on_gpu.sh             results go to $OUT, by default benchmarks/results
#   benchmarks/on_gpu.sh --dry-run   the same lines on a CPU: few tests, tiny shapes, kernels interpreted
#
# Needs Python with PyTorch, Triton, torchvision, scipy, pytest, hypothesis and matplotlib; PYTHON names it. Exits with 1 if a test failed.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${OUT:-benchmarks/results}
if [[ -z ${PYTHON:-} ]]; then
    PYTHON=python3
    [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
tests=(tests/test_gpu.py tests/test_kernels.py tests/test_fused.py tests/test_deterministic.py tests/test_op.py tests/test_fallback.py)
test_args=(-q -n 8)
bench_args=(--limit 170)
tune_args=(--workload encoder decoder --repeat 10)
accuracy_args=()
detector_args=(--device cuda)
case ${1:-} in
    "") ;;
    --dry-run)
        export TRITON_INTERPRET=1
        tests=(tests/test_kernels.py::test_queries tests/test_fallback.py::test_float64)
        test_args=(-q -n 2)
        bench_args=(--dry-run --device cpu --dtype bfloat16 --limit 200 --repeat 1)
        accuracy_args=(--queries 8 --dtype float16)
        detector_args=(--device cpu --size 64 96 --rounds 1)
        tune_args=(--dry-run --workload dry_decoder --dtype bfloat16 --repeat 1)
        ;;
    *)
        echo "usage: benchmarks/on_gpu.sh [--dry-run]" >&2
        exit 2
        ;;
esac

mkdir -p "$out"
start=$SECONDS
"$PYTHON" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__, "cuda", torch.cuda.is_available())'
status=0
timeout 180 "$PYTHON" -m pytest "${test_args[@]}" "${tests[@]}" 2>&1 | tee "$out/pytest.log" || status=1
echo "tests: $((SECONDS - start)) s"
timeout 60 "$PYTHON" -m benchmarks.accuracy --csv "$out/accuracy.csv" "${accuracy_args[@]}" || status=1
timeout 230 "$PYTHON" -m benchmarks.run --out "$out" "${bench_args[@]}"
timeout 80 "$PYTHON" -m benchmarks.tune --out "$out" "${tune_args[@]}" || status=1
timeout 60 "$PYTHON" -m benchmarks.detector_step --out "$out/detector_step.csv" "${detector_args[@]}" || status=1
echo "all: $((SECONDS - start)) s; results in $out"
exit $status
