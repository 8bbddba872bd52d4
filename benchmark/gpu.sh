#!/usr/bin/env bash
# What needs a GPU, in calls that end within nine minutes each. The same call goes on where the last one stopped, until
# it says "nothing is left"; csv files and run directories lie in $OUT.
#
#   bash benchmark/gpu.sh data          # 1,000 episodes of each domain that is not there yet; 40 with pixels
#   bash benchmark/gpu.sh throughput    # all scripts with 1, 8 and 32 seeds, a csv for each script
#   bash benchmark/gpu.sh devices       # the losses of one seed on the GPU and on the CPU, a csv for each
#   bash benchmark/gpu.sh curves        # lps, mf_bon, ifql, dsrl on puzzle-3x3 and scene, five tasks, 200,000 updates
#   bash benchmark/gpu.sh ends          # lps and mf_bon on cube-single and cube-double, 1,000,000 updates
#   bash benchmark/gpu.sh pixels        # lps and mf_bon on visual-cube-single, 500,000 updates
#
# A try on a CPU:
#   OUT=runs/try EPISODES=2 FILMS=1 SEEDS=1 STEPS=20 PLAY=0 FLAGS="--updates 2 --repeats 2" bash benchmark/gpu.sh curves
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu} seeds=${SEEDS:-8} limit=${LIMIT:-500}
episodes=${EPISODES:-1000} films=${FILMS:-40}  # collected; a core renders about 10 frames of a film in a second
mkdir -p "$out"

sweep() {  # name, updates, episodes of an evaluation, tasks, runs
  cat > "$out/$1.toml" <<END
seeds = $seeds
tasks = [$4]
runs = [$5]
[flags]
dataset-dir = "$out/data"
total-steps = ${STEPS:-$2}
log-interval = $((${STEPS:-$2} / 20))
eval-interval = $((${STEPS:-$2} / 10))
eval-episodes = ${PLAY:-$3}
END
  timeout --signal=TERM "$limit" python benchmark/sweep.py "$out/$1.toml" --out "$out" --jobs 1 \
    --seeds-per-process "$seeds" && echo "nothing is left"
}

case $1 in
  data)
    for name in cube-single-play-v0 puzzle-3x3-play-v0 scene-play-v0 cube-double-play-v0 visual-cube-single-play-v0; do
      number=$episodes
      if [[ $name == visual-* ]]; then number=$films; fi
      [ -f "$out/data/$name.npz" ] || python benchmark/collect.py $name --num-episodes "$number" --dataset-dir "$out/data"
      ((SECONDS < limit)) || exit 0
    done
    echo "nothing is left" ;;
  throughput)
    for script in lps mf_bon dsrl qc_fql qc_mfql gfp cfgrl ifql flow_bc mf_bc; do
      [ -f "$out/throughput_$script.csv" ] && continue
      # shellcheck disable=SC2086  # several flags
      timeout "$limit" python benchmark/throughput.py --scripts $script --num-seeds 1 8 32 ${FLAGS:-} --out "$out/draft.csv"
      mv "$out/draft.csv" "$out/throughput_$script.csv"
      ((SECONDS < limit / 2)) || exit 0
    done
    echo "nothing is left" ;;
  devices)
    for platform in ${PLATFORMS:-cpu cuda}; do
      run_dir=$out/devices/$platform again=()
      if [ -f "$run_dir/args.json" ]; then again=(--resume); fi
      JAX_PLATFORMS=$platform python lps.py --dataset-dir "$out/data" --total-steps "${STEPS:-2000}" --log-interval 10 \
        --eval-episodes 0 --run-dir "$run_dir" "${again[@]}"
    done
    echo "nothing is left" ;;
  curves)
    sweep curves 200000 50 '"puzzle-3x3-play-singletask-task*-v0", "scene-play-singletask-task*-v0"' \
      '{ script = "lps" }, { script = "mf_bon" }, { script = "ifql" }, { script = "dsrl" }' ;;
  ends)
    sweep ends 1000000 50 '"cube-single-play-singletask-v0", "cube-double-play-singletask-v0"' \
      '{ script = "lps" }, { script = "mf_bon" }' ;;
  pixels)
    sweep pixels 500000 10 '"visual-cube-single-play-singletask-v0"' '{ script = "lps" }, { script = "mf_bon" }' ;;
esac
