"""Kills runs at random moments, resumes them, and compares what comes out with runs that nobody disturbed.

    python tests/campaign.py --kills 36 --seed 0

Each script is run once undisturbed and then again, killed outright (SIGKILL) on its way as many times as its share of
--kills, anywhere from its first import to its last write. Whenever it was killed, nothing of it may be left running.
What it then resumes to must be the undisturbed run: every array of the checkpoint bit for bit, every csv row but for
the times in it, and no file more.
"""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import toy_envs
import tyro
from carry import ROOT, SCRIPTS
from helpers import COUNTING, TINY, as_flags, assert_same_run, checkpoint, finish, make_data, start

FLAGS = ["--env-id", COUNTING, "--dataset-path", "own.npz", "--total-steps", "4000", "--log-interval", "300",
         "--eval-interval", "400", "--eval-episodes", "3", *as_flags(TINY)]


@dataclass
class Args:
    kills: int = 36  # of all scripts together
    seed: int = 0  # of the moments


def begin(folder, name, run_dir):
    again = ["--resume"] if (folder / run_dir / "args.json").exists() else FLAGS
    return start(folder, name, *again, "--run-dir", run_dir)


def alive(session):
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(session)], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if " Z" not in line]


def torment(folder, name, kills, seconds):
    """Kills it so many times, then lets it end. Returns the steps at which checkpoints were found."""
    steps = []
    while len(steps) < kills:
        process = begin(folder, name, "killed")
        try:
            process.communicate(timeout=random.uniform(0, seconds))
            assert process.returncode == 0, name
            shutil.rmtree(folder / "killed")  # it was done: from the beginning again
            continue
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        deadline = time.monotonic() + 10
        while alive(process.pid):
            assert time.monotonic() < deadline, f"orphans of {name}: {alive(process.pid)}"
            time.sleep(0.05)
        written = (folder / "killed/checkpoint.msgpack").exists()
        steps.append(checkpoint(folder / "killed")["step"] if written else 0)
    finish(begin(folder, name, "killed"))
    return steps


def main(args):
    random.seed(args.seed)
    began = time.monotonic()
    shares = np.diff(np.linspace(0, args.kills, len(SCRIPTS) + 1).round().astype(int))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "tmp").mkdir()
        os.environ.update(TMPDIR=str(folder / "tmp"), JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
        for name, kills in zip(SCRIPTS, shares):
            place = folder / name
            place.mkdir()
            shutil.copy(ROOT / f"{name}.py", place)
            shutil.copy(toy_envs.__file__, place)
            np.savez(place / "own.npz", **make_data([9, 9, 3, 30]))
            finish(begin(place, name, "warm"))
            once = time.monotonic()
            finish(begin(place, name, "whole"))
            steps = torment(place, name, kills, time.monotonic() - once)
            assert_same_run(place / "killed", place / "whole")
            files = [sorted(path.name for path in (place / run).iterdir()) for run in ("killed", "whole")]
            assert files[0] == files[1], files
            left = [path.name for path in (folder / "tmp").iterdir()]
            print(f"{name}: killed with checkpoints of updates {steps}; resumed, the same run; left in TMPDIR: {left}",
                  flush=True)
    print(f"{args.kills} kills, seed {args.seed}, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
