#!/usr/bin/env bash
# What needs a GPU, in calls that end within nine minutes each: bash benchmark/gpu.sh NAME, with a
# name from below. The same call goes on where the last one stopped, until it says "nothing is
# left". All that it makes lies in $OUT. A try on a CPU:
#   OUT=runs/try EPISODES=2 FILMS=1 SEEDS=2 STEPS=100 PLAY=1 bash benchmark/gpu.sh ends
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu} limit=${LIMIT:-500} seeds=${SEEDS:-8}
mkdir -p "$out"

once() {  # a name, and a command that is not repeated once it has ended well
  [ -f "$out/$1.done" ] && return
  ((SECONDS < limit)) || exit 0
  local code=0 again=()
  if [ -f "$out/$1/args.json" ] || [ -f "$out/$1/seed0/args.json" ]; then again=(--resume); fi
  timeout --signal=TERM $((limit - SECONDS)) "${@:2}" "${again[@]}" || code=$?
  ((code != 124)) || exit 0  # its time was up: it has saved, and goes on in the next call
  ((code == 0)) || exit $code
  touch "$out/$1.done"
}

train() {  # updates, episodes of an evaluation, env id, scripts; all seeds of a script at once
  local steps=${STEPS:-$1} run script
  for script in "${@:4}"; do
    run=$3/$script-$seeds
    # shellcheck disable=SC2046  # several seeds
    once "$run" python -m benchmark.seeds "$script.py" --seeds $(seq 0 $((seeds - 1))) \
      --env-id "$3" --dataset-dir "$out/data" --run-dir "$out/$run" --total-steps "$steps" \
      --log-interval $((steps / 20)) --eval-interval $((steps / 10)) --eval-episodes "${PLAY:-$2}"
  done
}

case $1 in
  data)  # for all that follows; with pixels only 40 episodes
    for name in cube-single puzzle-3x3 scene cube-double visual-cube-single; do
      episodes=${EPISODES:-1000}
      if [[ $name == visual-* ]]; then episodes=${FILMS:-40}; fi
      once $name python -m benchmark.collect $name-play-v0 --num-episodes "$episodes" \
        --dataset-dir "$out/data"
    done ;;
  throughput)  # all scripts, of states and of pixels; and lps with many seeds at once
    for script in $(python -c 'import benchmark; print(*benchmark.SCRIPTS)'); do
      for kind in --no-pixels --pixels; do
        once "$script$kind" python -m benchmark.throughput --scripts "$script" $kind \
          --out "$out/$script$kind.csv"
      done
    done
    for seeds in 1 8 32; do train 2000 0 cube-single-play-singletask-v0 lps; done ;;
  devices)  # the losses of one seed on the CPU and on the GPU
    for name in cpu cuda; do
      once $name env JAX_PLATFORMS=$name python lps.py --dataset-dir "$out/data" \
        --total-steps 2000 --log-interval 100 --eval-episodes 0 --run-dir "$out/$name"
    done ;;
  curves)
    for task in {puzzle-3x3,scene}-play-singletask-task{1..5}-v0; do
      train 200000 50 "$task" lps mf_bon ifql dsrl
    done ;;
  ends)
    for task in cube-{single,double}-play-singletask-v0; do
      train 1000000 50 "$task" lps mf_bon
    done ;;
  pixels) train 500000 10 visual-cube-single-play-singletask-v0 lps mf_bon ;;
  *) echo "gpu.sh does not know $1" && exit 1 ;;
esac
echo "nothing is left"
