#!/usr/bin/env bash
# From nothing to a trained policy: installs into .venv, gets a dataset (collects a small one where none can be
# downloaded), trains mf_bon.py on it for 20,000 updates, draws how often it solves the task, and films it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install -q -r requirements.txt
python -c 'import mf_bon; args = mf_bon.Args(action_dim=5); mf_bon.load_dataset(args, mf_bon.make_env(args))' ||
  { echo "collecting a small dataset instead"; python benchmark/collect.py cube-single-play-v0 --num-episodes 200; }
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
python mf_bon.py --total-steps 20000 --log-interval 1000 --eval-interval 5000 --run-dir "$run"
python benchmark/report.py "$run" --out "$run/success.png"
python mf_bon.py --eval-only --eval-episodes 1 --capture-video --run-dir "$run" > "$run/film.log" 2>&1
echo
tail -n 1 "$run/eval.csv" | awk -F , '{ printf "After %d updates the policy solved the task in %.0f%% of %d episodes.\n", $1, 100 * $3, $6 }'
echo "The curve: $run/success.png    A film: $(ls "$run"/videos/*.mp4)"
