#!/usr/bin/env bash
# From nothing to a learning curve: installs into .venv, gets a dataset (collects a small one where none can be
# downloaded), trains LPS on it and draws how often it solves the task. About 10 minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
. .venv/bin/activate
pip install -q -r requirements.txt
python -c 'import lps; args = lps.Args(action_dim=5); lps.load_dataset(args, lps.make_env(args))' ||
  { echo "collecting a small dataset instead"; python benchmark/collect.py cube-single-play-v0 --num-episodes 200; }
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
python lps.py --total-steps 20000 --log-interval 1000 --eval-interval 5000 --run-dir "$run"
python benchmark/report.py "$run" --out "$run/success.png"
