"""Speed of every script: updates, start, memory, evaluation, and the cost of acting.

    python -m benchmark.throughput                             # all scripts, observations of states
    python -m benchmark.throughput --pixels --batch-size 64    # of pixels, without evaluations

Networks of full size, the sizes of cube-single, random data. Updates, start, memory and evaluation
are those of a run of the script through its command line; acting is its compiled policy.
"""

import csv
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the runs need memory too
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.training.train_state import TrainState

from benchmark import ROOT, SCRIPTS


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # which
    pixels: bool = False  # observations of 64 x 64 x 3, and no evaluations
    batch_size: int = 256  # chunks in a batch
    updates: int | None = None  # of a run (default: 600, with pixels 5; on a GPU 20 times as many)
    eval_episodes: int = 50  # of both evaluations of a run; 0: none
    calls: int = 1000  # of a policy, for the cost of acting
    out: Path = Path("throughput.csv")  # the table


def save_data(path, pixels, rows=20_000):
    rng = np.random.default_rng(0)
    observations = rng.normal(size=(rows, 28)).astype(np.float32)
    if pixels:
        observations = rng.integers(0, 256, (rows, 64, 64, 3), np.uint8)
    actions = rng.uniform(-1, 1, (rows, 5)).astype(np.float32)
    terminals = np.arange(rows) % 1000 == 999
    rewards = -np.ones(rows, np.float32)
    np.savez(path, observations=observations, actions=actions, rewards=rewards, terminals=terminals)


# ======================================================================================= Of a run


def read_column(path, name):
    with open(path) as file:
        return np.array([float(row[name]) for row in csv.DictReader(file)])


def time_run(args, name, updates, folder):
    """Updates per second of each call, seconds of an evaluation, those of the rest, and memory."""
    run_dir = folder / name
    episodes = 0 if args.pixels else args.eval_episodes
    domain = "visual-cube-single" if args.pixels else "cube-single"
    flags = f"""--env-id {domain}-play-singletask-v0 --dataset-path {folder}/data.npz
        --batch-size {args.batch_size} --total-steps {updates} --log-interval 1
        --eval-interval 0 --eval-episodes {episodes} --run-dir {run_dir}"""
    command = [sys.executable, f"{ROOT}/{name}.py", *flags.split()]
    began = time.perf_counter()
    settings = dict(stdout=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"})
    _, code, usage = os.wait4(subprocess.Popen(command, **settings).pid, 0)
    wall = time.perf_counter() - began
    if code:
        raise SystemExit(f"failed: {' '.join(command)}")
    rates = read_column(run_dir / "train.csv", "updates_per_second")  # a row for each call
    steps = np.diff(read_column(run_dir / "train.csv", "step"), prepend=0)
    seconds = read_column(run_dir / "eval.csv", "seconds") if episodes else np.zeros(1)
    rest = wall - seconds.sum() - (steps / rates).sum()
    return rates, seconds.mean(), rest, usage.ru_maxrss / 1e6


# ==================================================================================== Of functions


def make(args, name, folder):
    """A script, its arguments, its state and an observation."""
    script = import_module(name)
    own = script.Args(action_dim=5, batch_size=args.batch_size, run_dir=f"{folder}/none")
    own = script.prepare(own)
    s = np.random.default_rng(0).normal(size=28).astype(np.float32)
    if args.pixels:
        s = np.random.default_rng(0).integers(0, 256, (64, 64, 9), np.uint8)
    return script, own, jax.jit(partial(script.init, own))(jax.random.key(0), 1.0 * s[None]), s


def count_evaluations(script, args, state, s):
    """{network: how often it is evaluated for a chunk}, counted while loops run step by step."""
    counts = Counter()

    def counted(name, apply_fn, params, s, *inputs, encode=False):
        if not encode:
            counts[name] += len(s)
        return apply_fn(params, s, *inputs, encode=encode)

    for name, x in state.items():
        if isinstance(x, TrainState):
            state = state | {name: x.replace(apply_fn=partial(counted, name, x.apply_fn))}
    with jax.disable_jit():
        script.act(args, state, jnp.asarray(s)[None], jax.random.key(0))
    return counts


def time_acting(script, args, state, s, calls):
    """Microseconds of each call, from one observation in NumPy to its chunk in NumPy."""
    act_fn = jax.jit(partial(script.act_once, args))
    took = []
    for turn in range(calls + 100):
        began = time.perf_counter()
        np.asarray(act_fn(state, s, 0, 0, turn))
        took.append(1e6 * (time.perf_counter() - began))
    return took[100:]


def measure(args, name, updates, folder):
    """A row of the table."""
    rates, evaluation, rest, memory = time_run(args, name, updates, folder)
    script, own, state, s = make(args, name, folder)
    counts = count_evaluations(script, own, state, s)
    took = time_acting(script, own, state, s, args.calls)
    return {
        "script": name,
        "updates/s": f"{np.median(rates):.4g}",
        "least to most": f"{rates.min():.4g} to {rates.max():.4g}",
        "start and end (s)": f"{rest:.3g}",
        "memory (GB)": f"{memory:.3g}",
        "an evaluation (s)": f"{evaluation:.3g}",
        "a policy call (us)": f"{np.median(took):.0f}",
        "99th percentile (us)": f"{np.percentile(took, 99):.0f}",
        "networks for a chunk": ", ".join(f"{key} {n}" for key, n in counts.items()),
    }


def main(args):
    device = jax.devices()[0].device_kind
    updates = args.updates or (5 if args.pixels else 600)
    if device != "cpu" and args.updates is None:
        updates *= 20
    print(f"{device}, {len(os.sched_getaffinity(0))} cores")
    rows = []
    with TemporaryDirectory() as folder:
        save_data(f"{folder}/data.npz", args.pixels)
        for name in args.scripts:
            rows.append(measure(args, name, updates, Path(folder)))
            if len(rows) == 1:
                print("|", " | ".join(rows[0]), "|")
                print("| --- " * len(rows[0]) + "|")
            print("|", " | ".join(rows[-1].values()), "|", flush=True)
    with open(args.out, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
