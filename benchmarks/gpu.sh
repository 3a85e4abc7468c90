#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most eight minutes each: builds, tests, sanitizes, times, records.
#
#   benchmarks/gpu.sh build check            these stages
#   benchmarks/gpu.sh all                    build check sanitize ops model train
#   benchmarks/gpu.sh autotune               the whole model once more, against torch.compile with max-autotune
#   OUT=DIR PYTHON=python3.12 benchmarks/gpu.sh ops
#
# Needs torch for CUDA with triton, setuptools, numpy, ninja, pytest, hypothesis and nvcc; sanitize: compute-sanitizer on PATH;
# model, train, autotune and the tests of CUDA graphs: diffusers; those of sana15: pyyaml, tqdm and pillow, too. What is missing
# may lie in a folder of PYTHONPATH, made by pip install --target.
#
# Results are appended to $OUT/<gpu>-<date>.json (default OUT: benchmarks/results) and the logs to $OUT/<stage>.log. A step that
# was completed with the same commit is not run again: call the script again after an interruption. SANITIZER="..." gives more
# options to compute-sanitizer, such as a filter of kernels.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-benchmarks/results}")
LIMIT=${LIMIT:-480}   # seconds for a stage
export PYTHONPATH=$PWD:$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
stages=("$@")
((${#stages[@]})) || { sed -n '2,17s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ ${stages[*]} == all ]] && stages=(build check sanitize ops model train)
for stage in "${stages[@]}"; do
  case $stage in
    build | check | sanitize | ops | model | train | autotune) ;;
    *) echo "gpu.sh: no stage $stage; there are build check sanitize ops model train autotune all" >&2; exit 2 ;;
  esac
done
mkdir -p "$OUT/done"
gpu=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())' 2>/dev/null) || {
  echo 'gpu.sh: torch sees no GPU' >&2
  exit 2
}
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
json=$OUT/$gpu-$(date +%F).json
failed=()

# step NAME COMMAND...: runs it unless it was completed, within what is left of the stage's time.
step() {
  local name=$stage-$1 mark left
  shift
  mark=$OUT/done/$commit-$name
  [[ -e $mark ]] && return
  left=$((LIMIT - SECONDS))
  if ((left < 5)); then
    failed+=("$name (no time left)")
    return
  fi
  echo "== $name: $*" | tee -a "$OUT/$stage.log"
  if timeout "$left" "$@" 2>&1 | tee -a "$OUT/$stage.log" | tail -n 40; then touch "$mark"; else failed+=("$name"); fi
}

bench() { # bench NAME SCRIPT OPTIONS...
  local name=$1 script=$2
  shift 2
  step "$name" "$PYTHON" "benchmarks/bench_$script.py" --device cuda --rounds 7 "$@" --json "$json"
}

build() { step library env SANA_EXT_BUILD=cuda "$PYTHON" setup.py build_ext --inplace; }

check() {
  step info "$PYTHON" -m sana_ext
  step tests "$PYTHON" -m pytest -q tests/gpu
  step op-tests env SANA_EXT_TEST_DEVICE=cuda "$PYTHON" -m pytest -q \
    tests/ops/test_linear_attention.py tests/ops/test_linear_attention_inputs.py tests/ops/test_norm_modulate.py tests/ops/test_glumbconv.py \
    -k "not diffusers and not offsets and not extreme and not default_kernels"
}

# Without torch's cache every tensor has an allocation of its own, past whose end memcheck sees; that rules out CUDA graphs.
# initcheck looks for memory that nobody wrote, so the tests must not fill it.
sanitize() {
  for tool in memcheck racecheck initcheck; do
    # shellcheck disable=SC2086
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 SANA_EXT_POISON=0 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all ${SANITIZER:-} \
      "$PYTHON" -m pytest -q tests/gpu -k "${SANITIZED:-(forward or strided) and not graph and not 1024 and not 4099 and not 5600}" \
      -p no:cacheprovider
  done
}

# The kernels alone, as CUDA graphs: a launch from Python takes longer than most of them. Shapes that do not fit the GPU's
# memory in the gate's fp64 say so and are left out.
ops() {
  for cold in --cold ""; do
    bench "attention$cold" linear_attention --images 2 8 32 --tokens 1024 --no-compile --graph $cold --only bfloat16
    bench "stencil$cold" glumbconv --images 2 8 32 --no-compile --graph $cold --only dwconv_glu bfloat16
    bench "norm$cold" norm_modulate --images 2 8 32 --no-compile --graph $cold --only bfloat16
  done
  bench attention-compile linear_attention --images 2 32 --tokens 1024 --graph --only bfloat16
  bench stencil-compile glumbconv --images 2 32 --graph --only dwconv_glu bfloat16
  bench norm-compile norm_modulate --images 2 32 --graph --only bfloat16
  bench attention-long linear_attention --images 2 8 32 --tokens 4096 16384 --no-compile --graph --cold --only bfloat16
  bench stencil-long glumbconv --images 2 8 --sides 64 128 --no-compile --graph --cold --only dwconv_glu bfloat16
  bench norm-long norm_modulate --images 2 8 32 --tokens 4096 16384 --no-compile --graph --cold --only bfloat16
  bench attention-narrow linear_attention --images 2 8 32 --heads 36 --tokens 1024 4096 --no-compile --graph --cold --only bfloat16
  bench stencil-narrow glumbconv --images 2 8 32 --channels 1152 --no-compile --graph --cold --only dwconv_glu bfloat16
  bench norm-narrow norm_modulate --images 2 8 32 --channels 1152 --no-compile --graph --cold --only bfloat16
}

model() {
  bench step model --pixels 1024 --only "denoising step" bfloat16
  bench loop model --pixels 1024 --loop 20 --only "denoising steps" bfloat16
  bench block model --images 2 --only "block forward 2x" bfloat16
}

train() {
  bench block model --images 2 8 --only "block forward + backward" bfloat16
  bench ffn glumbconv --images 8 --only "glumbconv backward" bfloat16
  bench adamw adamw8bit --blocks 20 --only bfloat16
  bench came came8bit --blocks 20 --only bfloat16 2048-linear
}

autotune() { TORCHINDUCTOR_MAX_AUTOTUNE=1 bench step model --pixels 1024 --only "denoising step" bfloat16; }

for stage in "${stages[@]}"; do
  SECONDS=0
  "$stage"
  echo "== $stage: $SECONDS s"
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
