#!/usr/bin/env bash
# Makes the environment .venv from requirements.txt and runs ruff and the tests in it.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/pip install -q -r requirements.txt
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/python -m pytest "$@"
