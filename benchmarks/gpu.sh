#!/usr/bin/env bash
# Everything that needs a GPU, in stages of at most eight minutes each: builds, tests, sanitizes, times, records.
#
#   benchmarks/gpu.sh build check            these stages
#   benchmarks/gpu.sh all                    build check sanitize ops model train
#   OUT=DIR PYTHON=python3.12 benchmarks/gpu.sh ops
#
# Results are appended to $OUT/<gpu>-<date>.json (default OUT: benchmarks/results) and the logs to $OUT/<stage>.log. A step that
# was completed with the same commit is not run again: call the script again after an interruption. max-autotune for the compile
# column: TORCHINDUCTOR_MAX_AUTOTUNE=1.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=$(realpath -m "${OUT:-benchmarks/results}")
LIMIT=${LIMIT:-480}   # seconds for a stage
export PYTHONPATH=$PWD:$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}
stages=("$@")
((${#stages[@]})) || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[[ ${stages[*]} == all ]] && stages=(build check sanitize ops model train)
for stage in "${stages[@]}"; do
  case $stage in
    build | check | sanitize | ops | model | train) ;;
    *) echo "gpu.sh: no stage $stage; there are build check sanitize ops model train all" >&2; exit 2 ;;
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
}

sanitize() {
  for tool in memcheck racecheck initcheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$PYTHON" -m pytest -q tests/gpu -k "${SANITIZED:-(forward or strided) and not 1024}" -p no:cacheprovider
  done
}

ops() {
  for images in 2 8 32; do
    for cold in "" --cold; do
      bench "attention-$images$cold" linear_attention --images "$images" --tokens 1024 --no-compile $cold --only bfloat16
      bench "stencil-$images$cold" glumbconv --images "$images" --no-compile $cold --only dwconv_glu
      bench "norm-$images$cold" norm_modulate --images "$images" --no-compile $cold --only bfloat16
    done
  done
  bench attention-long linear_attention --images 2 8 --tokens 4096 16384 --no-compile --only "forward"
  bench attention-narrow linear_attention --images 2 8 --heads 36 --tokens 1024 4096 --no-compile --only bfloat16
  bench stencil-narrow glumbconv --images 2 8 --channels 1152 --no-compile --only dwconv_glu
  bench attention-compile linear_attention --images 2 32 --tokens 1024 --only bfloat16
  bench stencil-compile glumbconv --images 2 32 --only bfloat16
  bench norm-compile norm_modulate --images 2 32 --only bfloat16
}

model() {
  bench step model --pixels 1024 --only "denoising step 2x1024, 20 blocks bfloat16"
  bench loop model --pixels 1024 --loop 20 --only "loop of 20 denoising steps 2x1024, 20 blocks bfloat16"
  bench block model --images 2 --only "block forward 2x1024x2240 bfloat16"
}

train() { bench block model --images 2 8 --only "block forward + backward"; }

for stage in "${stages[@]}"; do
  SECONDS=0
  "$stage"
  echo "== $stage: $SECONDS s"
done
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
