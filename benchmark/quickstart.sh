#!/usr/bin/env bash
# From nothing to a trained policy: installs into .venv, finds data, trains mf_bon.py for 20,000
# updates, draws how often it solves the task, and films it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
# shellcheck source=/dev/null
. .venv/bin/activate
pip install -q -r requirements.txt

# OGBench's own data, if they are there or can be downloaded. (A SystemExit of the script's own is
# the line that says why they cannot. Any other error ends all this with its traceback.)
folder=$(python - <<'END'
import sys

import mf_bon

try:
    path = mf_bon.find_dataset(mf_bon.Args())
    is_own = "COLLECTED HERE" not in mf_bon.read_dataset(path)[1]
    mf_bon.require(is_own, f"{path} was collected here: move it to ~/.ogbench/collected")
    print(path.parent)
except SystemExit as why:
    print(why, file=sys.stderr)
END
)
told="OGBench's own 1,000 episodes in $folder. What to expect: with as many episodes that were
collected by benchmark.collect, three runs had solved 66, 72 and 80% after 20,000 updates"
if [ -z "$folder" ]; then
  folder=$HOME/.ogbench/collected
  told="200 episodes in $folder that are COLLECTED HERE, by benchmark.collect, as
OGBench's own cannot be had. What to expect: six runs had solved 74 to 94% after 20,000 updates"
  [ -f "$folder/cube-single-play-v0.npz" ] || collect=yes
fi
printf '\nThis trains on %s.\n\n' "$told"
[ -z "${collect:-}" ] || python -m benchmark.collect cube-single-play-v0 --num-episodes 200

run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
python mf_bon.py --dataset-dir "$folder" --total-steps 20000 --log-interval 1000 \
  --eval-interval 5000 --run-dir "$run"
python -m benchmark.report "$run" --out "$run/success.png"
python mf_bon.py --eval-only --eval-episodes 1 --capture-video --run-dir "$run"
printf '\nThis was trained on %s.\n' "$told"
tail -n 1 "$run/eval.csv" |
  awk -F , '{ printf "This run: %.0f%% of %d episodes, after %d updates.\n", 100 * $3, $6, $1 }'
echo "The curve: $run/success.png    A film: $(ls "$run"/videos/*.mp4)"
