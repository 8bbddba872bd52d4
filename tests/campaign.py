"""Kills runs at random moments, resumes them, and compares what comes out with runs that nobody disturbed.

    python tests/campaign.py --kills 36 --seed 0

Each script is run once undisturbed and then again, killed outright (SIGKILL) --kills / 6 times on its way, anywhere
from its first import to its last write. Whenever it was killed, nothing of it may be left running; what it then resumes
to must be the undisturbed run: every array of the checkpoint bit for bit, every csv row but for the times in it, and
no file more.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import toy_envs
import tyro
from carry import ROOT, SCRIPTS

sys.path.append(str(ROOT))
from test_cli import assert_same_run  # noqa: E402
from test_scripts import TINY, as_flags, own_data  # noqa: E402

FLAGS = ["--env-id", "toy_envs:Counting-v0", "--dataset-path", "own.npz", "--total-steps", "4000", "--log-interval",
         "300", "--eval-interval", "400", "--eval-episodes", "3", *as_flags(TINY)]


@dataclass
class Args:
    kills: int = 36
    """of all scripts together"""
    seed: int = 0
    """of the moments"""


def start(folder, name, run_dir):
    """A new session for each run: whatever it starts can be found by it."""
    again = ["--resume"] if (folder / run_dir / "args.json").exists() else FLAGS
    return subprocess.Popen([sys.executable, f"{name}.py", *again, "--run-dir", run_dir], cwd=folder,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def alive(session):
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if " Z" not in line]


def finish(process):
    _, err = process.communicate()
    assert process.returncode == 0, err


def torment(folder, name, kills, seconds):
    """Kills it so many times, then lets it end. Returns the steps at which checkpoints were found."""
    steps = []
    while len(steps) < kills:
        process = start(folder, name, "killed")
        try:
            process.wait(random.uniform(0, seconds))
            assert process.returncode == 0, process.stderr.read()
            shutil.rmtree(folder / "killed")  # it was done: from the beginning again
            continue
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 10
        while alive(process.pid):
            assert time.monotonic() < deadline, f"orphans of {name}: {alive(process.pid)}"
            time.sleep(0.05)
        path = folder / "killed/checkpoint.npz"
        steps.append(int(np.load(path)["step"]) if path.exists() else 0)
    finish(start(folder, name, "killed"))
    return steps


def main(args):
    random.seed(args.seed)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.environ.update(TMPDIR=str(folder / "tmp"), JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
        for name in SCRIPTS:
            place = folder / name
            place.mkdir()
            (folder / "tmp").mkdir(exist_ok=True)
            shutil.copy(ROOT / f"{name}.py", place)
            shutil.copy(toy_envs.__file__, place)
            own_data(place / "own.npz")
            finish(start(place, name, "warm"))
            once = time.monotonic()
            finish(start(place, name, "whole"))
            steps = torment(place, name, args.kills // len(SCRIPTS), time.monotonic() - once)
            assert_same_run(place / "killed", place / "whole")
            files = [sorted(path.name for path in (place / run).iterdir()) for run in ("killed", "whole")]
            assert files[0] == files[1], files
            left = [path.name for path in (folder / "tmp").iterdir()]
            print(f"{name}: killed with checkpoints of updates {steps}; resumed, the same run; left in TMPDIR: {left}")
    print(f"{args.kills // len(SCRIPTS) * len(SCRIPTS)} kills, seed {args.seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
