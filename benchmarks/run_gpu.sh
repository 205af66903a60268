#!/usr/bin/env bash
# Everything that needs a GPU, in three calls for a machine that is had for minutes:
#
#   bash benchmarks/run_gpu.sh 1    at most 3 minutes: kernels are right, bandwidth and products, kernels at large sizes
#   bash benchmarks/run_gpu.sh 2    at most 4 minutes: the step of SongUNet 64x64 in bf16 beside the plain formulation
#   bash benchmarks/run_gpu.sh 3    at most 3 minutes: determinism and its cost, the step of ADM 64x64
#
# Without a word it makes all three. Further words, which take what they take: kernels (all sizes), graphs (steps with
# CUDA graphs), small (toy and digits), networks, compiled (networks), memory, startup.
#
# Each part keeps JSON and a log in benchmarks/results/gpu/ ($RESULTS) as it goes: what is cut off loses only itself.
# What is missing on the machine is said in one line before anything is compiled. Exit status: 0, 1 if a part failed or
# was cut off, 2 if something is missing. $PYTHON chooses the interpreter (.venv/bin/python, else python), and
# RUN_GPU_SIZE=toy makes every part small.
set -uo pipefail
cd "$(dirname "$0")/.."
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python
  [[ -x .venv/bin/python ]] && PYTHON=.venv/bin/python
fi
unset RDMD_KERNELS TRITON_INTERPRET
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" -m benchmarks.preflight || exit 2
results=${RESULTS:-benchmarks/results/gpu}
mkdir -p "$results"
[[ $# -gt 0 ]] || set -- 1 2 3

whole=(0 170 230 170)  # seconds of each call, less those of ending
song=(--case songunet64) adm=(--case adm64 --batch 40) rounds=(--rounds 10)
largest=(--largest 2) tests=() workers=() dtype=bf16 slower=1
if [[ ${RUN_GPU_SIZE:-} == toy ]]; then
  slower=20
  song=(--case toy --batch 8) adm=("${song[@]}") rounds=(--rounds 1) dtype=fp32
  largest=(--largest 1 -k denoising) tests=(-k "averaging or (bits_of_the_cpu and 7-1-0)")
elif "$PYTHON" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8)  # hundreds of variants of kernels are compiled
fi
quiet=(-m pytest -q -p no:cacheprovider)
status=0

part() {  # name, seconds it may take (0: any), arguments of Python; RESULTS/NAME.json is its own
  local name=$1 limit=$((slower * $2)) start=$SECONDS outcome=""
  shift 2
  if ((limit && limit > deadline - SECONDS)); then
    limit=$((deadline - SECONDS))
    ((limit > 0)) || limit=1
  fi
  rm -f "$results/$name.json"
  timeout -k 5 "$limit" "$PYTHON" "$@" >"$results/$name.log" 2>&1
  case $? in
    0) ;;
    124 | 137) status=1 outcome=", CUT OFF" ;;
    *) status=1 outcome=", FAILED: $(grep -v '^ *$' "$results/$name.log" | tail -n 1)" ;;
  esac
  echo "== $name: $((SECONDS - start)) s$outcome"
}

step() {  # name, seconds, arguments of benchmarks.step
  part "step_$1" "$2" -m benchmarks.step --dtype "$dtype" "${@:3}" --json "$results/step_$1.json"
}

for word in "$@"; do
  deadline=$((SECONDS + slower * ${whole[word]:-0}))
  case "$word" in
    1)
      part correctness 90 "${quiet[@]}" ${workers[@]+"${workers[@]}"} -p benchmarks.outcomes \
        --outcomes "$results/correctness.json" ${tests[@]+"${tests[@]}"} tests/kernels/test_on_gpu.py
      part peaks 40 -m benchmarks.peaks --json "$results/peaks.json"
      part kernels_largest 170 "${quiet[@]}" "${largest[@]}" --rows "$results/kernels_largest.json" \
        benchmarks/test_kernels.py ;;
    2)
      step songunet64 230 "${song[@]}" "${rounds[@]}" --compile default \
        --sides ours plain ours_compiled plain_compiled ;;
    3)
      part determinism 100 -m benchmarks.determinism "${song[@]}" --json "$results/determinism.json"
      step as_usual 45 "${song[@]}" "${rounds[@]}" --sides ours
      step deterministic 45 "${song[@]}" "${rounds[@]}" --sides ours --set train.deterministic=true
      # As DMD2 trains: a generator update for five of the fake score.
      step adm64 170 "${adm[@]}" "${rounds[@]}" --sides ours --set rdmd.fake_updates=5 ;;
    kernels)
      part kernels 0 "${quiet[@]}" --rows "$results/kernels.json" benchmarks/test_kernels.py
      "$PYTHON" -m benchmarks.report "$results/kernels.json" || status=1 ;;
    graphs)
      step songunet64_graphs 0 --case songunet64 --compile reduce-overhead
      step adm64_graphs 0 --case adm64 --batch 16 --compile reduce-overhead ;;
    small)
      step toy 0 --case toy
      step digits 0 --case digits ;;
    networks) part networks 0 -m benchmarks.networks --case songunet64 adm64 --batch 32 --json "$results/networks.json" ;;
    compiled)
      part networks_compiled 0 -m benchmarks.networks --case songunet64 adm64 --batch 32 --compile \
        --json "$results/networks_compiled.json" ;;
    memory)
      part memory 0 -m benchmarks.memory --measure --ranks 1 --network 64 adm64 --json "$results/memory.json" ;;
    startup) part startup 0 -m benchmarks.startup --launcher python --json "$results/startup.json" ;;
    *)
      echo "run_gpu.sh: no part $word, one of 1 2 3 kernels graphs small networks compiled memory startup" >&2
      exit 2 ;;
  esac
  [[ $word != [123] ]] || "$PYTHON" -m benchmarks.gpu_summary "$word" "$results"
done
exit $status
