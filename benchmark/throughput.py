"""Speed: updates, start-up, evaluation and memory of every script, beside what this machine could do at best.

    python benchmark/throughput.py                                    # all of it, with states
    python benchmark/throughput.py --scripts lps --num-seeds 1 8 32
    python benchmark/throughput.py --scripts lps --pixels             # visual-cube-single's sizes

Full-size networks, batch 256, cube-single's sizes, random data. What is timed are runs of the scripts through their
command line, a process each: the rates stand in their train.csv, the times of evaluations in their eval.csv.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process and its runs share a GPU's memory
import jax
import jax.numpy as jnp
import numpy as np
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the scripts lie there
from benchmark.latency import SCRIPTS, device_name, print_row, write_table

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    scripts: tuple[str, ...] = SCRIPTS  # which
    num_seeds: tuple[int, ...] = (1, 2, 4, 8)  # seeds trained together, a run each
    pixels: bool = False  # observations of 64 x 64 x 3, and no evaluations
    updates: int | None = None  # between two readings of the clock (default: 50; pixels 2; with a GPU 20 times as many)
    repeats: int = 5  # readings; more are steadier
    eval_episodes: int = 50  # of the evaluation at the end of each script's first run; 0: none
    out: Path = ROOT / "benchmark/results/throughput.csv"  # the csv to write


def random_data(pixels, rows=20_000):
    rng = np.random.default_rng(0)
    if pixels:
        observations = rng.integers(0, 256, (rows, 64, 64, 3), np.uint8)
    else:
        observations = rng.normal(size=(rows, 28)).astype(np.float32)
    return dict(observations=observations, actions=rng.uniform(-1, 1, (rows, 5)).astype(np.float32),
                rewards=-np.ones(rows, np.float32), terminals=np.arange(rows) % 1000 == 999)


def matrix_rate(repeats):
    """Floating-point operations per second of a chain of (256, 512) x (512, 512) products."""
    x, w = (jax.random.normal(jax.random.key(i), (n, 512)) for i, n in enumerate((256, 512)))
    chain, rates = jax.jit(lambda x, w: jax.lax.fori_loop(0, 500, lambda _, x: 0.04 * (x @ w), x)), []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(chain(x, w))
        rates.append(500 * 2 * 256 * 512 * 512 / (time.perf_counter() - began))
    return np.array(rates[1:])


def count_flops(name, pixels, folder):
    """Floating-point operations of one update of one seed, as XLA counts them. It counts the body of a loop once, so
    loops are unrolled here."""
    script = import_module(name)
    args = script.prepare(script.Args(action_dim=5, run_dir=str(folder / "flops")))
    s = jax.ShapeDtypeStruct((256, 64, 64, 9) if pixels else (256, 28), jnp.uint8 if pixels else jnp.float32)
    numbers = jax.ShapeDtypeStruct((256,), jnp.float32)
    batch = dict(observations=s, next_observations=s, actions=jax.ShapeDtypeStruct((256, 25), jnp.float32),
                 rewards=numbers, masks=numbers)
    key = jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(partial(script.init, args), key, jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype))

    def update(state, batch, key):
        with jax.disable_jit():
            return script.update(args, state, batch, key)

    return jax.jit(update).lower(state, batch, key).compile().cost_analysis()["flops"]


def run_script(name, seeds, args, updates, episodes, folder):
    """Of a run: updates per second of each seed, but for the first interval, which compiles; the seconds that were
    neither updates at that rate nor evaluation; peak memory in GB; seconds of the evaluation, if there was one."""
    run_dir = Path(tempfile.mkdtemp(dir=folder), "run")
    command = [sys.executable, ROOT / f"{name}.py", "--dataset-path", folder / "data.npz", "--num-seeds", seeds,
               "--total-steps", updates * (args.repeats + 1), "--log-interval", updates, "--eval-interval", 0,
               "--eval-episodes", episodes, "--run-dir", run_dir]
    if args.pixels:
        command += ["--env-id", "visual-cube-single-play-singletask-v0"]
    began = time.perf_counter()
    process = subprocess.Popen(map(str, command), stdout=subprocess.DEVNULL, env=os.environ | {"TQDM_DISABLE": "1"})
    _, code, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    if code:
        raise SystemExit(f"{name}.py failed: {' '.join(map(str, command))}")
    with open(run_dir / "train.csv") as file:
        rates = np.array([float(row["updates_per_second"]) for row in csv.DictReader(file) if int(row["seed"]) == 0])
    evaluation = 0.0
    if episodes:
        with open(run_dir / "eval.csv") as file:
            evaluation = sum(float(row["seconds"]) for row in csv.DictReader(file))
    start = wall - evaluation - updates * (args.repeats + 1) / np.median(rates[1:])
    return rates[1:], start, usage.ru_maxrss / 1e6, evaluation


def main(args):
    updates = args.updates or (2 if args.pixels else 50) * (1 if jax.default_backend() == "cpu" else 20)
    device, rows = device_name(), []

    def note(name, seeds, what, values, unit):
        values = np.atleast_1d(values)
        median, least, most = (float(f"{f(values):.4g}") for f in (np.median, np.min, np.max))
        rows.append({"script": name, "observations": "pixels" if args.pixels else "states", "seeds": seeds,
                     "what": what, "median": median, "least": least, "most": most, "unit": unit, "timings": len(values),
                     "device": device, "load": round(os.getloadavg()[0], 1)})
        print_row([name, seeds, what, f"{median:g}", f"{least:g} to {most:g}", unit])

    print(device)
    print_row(["script", "seeds", "", "median", "least to most", ""])
    print_row(["---"] * 6)
    rate = matrix_rate(args.repeats)
    note("", 1, "matrix products of 256 x 512 x 512", rate / 1e9, "GFLOP/s")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.savez(folder / "data.npz", **random_data(args.pixels))
        for name in args.scripts:
            flops = count_flops(name, args.pixels, folder)
            note(name, 1, "floating-point operations of an update", flops / 1e9, "GFLOP")
            for seeds in args.num_seeds:
                episodes = 0 if args.pixels or seeds != args.num_seeds[0] else args.eval_episodes
                per_second, start, memory, evaluation = run_script(name, seeds, args, updates, episodes, folder)
                note(name, seeds, "updates, all seeds together", seeds * per_second, "1/s")
                note(name, seeds, "share of the machine's products", seeds * per_second * flops / np.median(rate), "")
                note(name, seeds, "start and end, compiling included", start, "s")
                note(name, seeds, "peak memory", memory, "GB")
                if episodes:
                    note(name, seeds, f"evaluation of {episodes} episodes a seed", evaluation, "s")
    write_table(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
