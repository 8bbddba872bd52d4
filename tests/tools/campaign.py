"""Kills runs at random moments, resumes them, and compares them with undisturbed runs.

    python tests/tools/campaign.py --kills 36 --seed 0

Each script is run once undisturbed, and then killed outright (SIGKILL) as many times as its share
of --kills, anywhere from its first import to its last write. Nothing of it may be left running.
What it then resumes to must be the undisturbed run: every array of the checkpoint bit for bit,
every row of a table but for the times in it, and no file more.
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
import tyro
from carry import ROOT, SCRIPTS

sys.path.append(str(ROOT / "tests"))
import toy_envs
from helpers import (
    COUNTING,
    TINY,
    as_flags,
    assert_same_run,
    checkpoint,
    finish,
    make_data,
    start,
    until,
)

RUN = dict(total_steps=4000, log_interval=300, eval_interval=800, eval_episodes=3)
FLAGS = as_flags(dict(env_id=COUNTING, dataset_path="own.npz") | RUN | TINY)


@dataclass
class Args:
    kills: int = 36  # of all scripts together
    seed: int = 0  # of the moments


def begin(folder, name, run_dir):
    """Starts a run, or goes on with it."""
    flags = FLAGS
    if (folder / run_dir / "args.json").exists():
        flags = ["--resume"]
    return start(folder, name, *flags, "--run-dir", run_dir)


def is_gone(session):
    """No process of this session is left, but for those that wait to be collected."""
    command = ["ps", "-o", "stat=", "-s", str(session)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return all(state.startswith("Z") for state in listed.split())


def torment(folder, name, kills, seconds):
    """Kills a run so often, then lets it end. Returns the updates at which it had checkpoints."""
    steps = []
    while len(steps) < kills:
        process = begin(folder, name, "killed")
        try:
            process.communicate(timeout=random.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            until(lambda session=process.pid: is_gone(session), seconds=10)
            written = (folder / "killed/checkpoint.msgpack").exists()
            steps.append(checkpoint(folder / "killed")["step"] if written else None)
        else:  # it had ended before: from the beginning again
            assert process.returncode == 0, name
            shutil.rmtree(folder / "killed")
    finish(begin(folder, name, "killed"))
    return steps


def compare(folder, name, kills):
    """An undisturbed run of a script, and one that is killed."""
    folder.mkdir()
    shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(toy_envs.__file__, folder)
    np.savez(folder / "own.npz", **make_data([9, 9, 3, 30]))
    finish(begin(folder, name, "warm"))  # fills the cache of compiled code
    began = time.monotonic()
    finish(begin(folder, name, "whole"))
    steps = torment(folder, name, kills, time.monotonic() - began)
    assert_same_run(folder / "killed", folder / "whole")
    files = [sorted(path.name for path in (folder / run).iterdir()) for run in ("killed", "whole")]
    assert files[0] == files[1], files
    print(f"{name}: killed with checkpoints of updates {steps}; resumed, the same run", flush=True)


def main(args):
    random.seed(args.seed)
    began = time.monotonic()
    shares = np.diff(np.linspace(0, args.kills, len(SCRIPTS) + 1).round().astype(int))
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "tmp")
        temporary.mkdir()
        os.environ.update(TMPDIR=str(temporary), JAX_COMPILATION_CACHE_DIR=f"{folder}/cache")
        for name, kills in zip(SCRIPTS, shares):
            compare(Path(folder, name), name, kills)
        left = [path.name for path in temporary.iterdir()]
    print(f"{args.kills} kills, seed {args.seed}, {time.monotonic() - began:.0f} s")
    print(f"left in TMPDIR: {left}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
