"""The cost of acting: time of one policy call for a single observation, and network evaluations.

    python benchmark/latency.py

Nets of full size with random weights on the sizes of cube-single: 28 observations, 5 actions, chunks of 5. A call goes
from an observation in NumPy to a chunk in NumPy through the script's own act, compiled, as in its evaluation.
"""

import csv
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import tyro
from flax.training.train_state import TrainState

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the scripts lie there

SCRIPTS = ("lps", "mf_bon", "dsrl", "qc_fql", "qc_mfql", "gfp", "cfgrl", "ifql", "flow_bc", "mf_bc")
OBSERVATION = np.zeros((1, 28), np.float32)


@dataclass
class Args:
    scripts: tuple[str, ...] = (*SCRIPTS, "lps --decode-steps 2", "lps --decode-steps 4")  # which, with their flags
    calls: int = 2000  # calls to time, after 100 to warm up
    out: Path = Path(__file__).parent / "results/latency.csv"  # the csv to write


def count_evaluations(script, args, state):
    """{network: how often it is evaluated for one chunk}, counted as it happens: without jit, loops run step by step.
    A call for 32 chunks counts 32 times; one that only encodes the observation does not count."""
    counts = Counter()

    def counted(name, apply_fn, params, s, *inputs, encode=False):
        counts[name] += 0 if encode else len(s)
        return apply_fn(params, s, *inputs, encode=encode)

    state = {name: x.replace(apply_fn=partial(counted, name, x.apply_fn)) if isinstance(x, TrainState) else x
             for name, x in state.items()}
    with jax.disable_jit():
        script.act(args, state, OBSERVATION, jax.random.key(1))
    return counts


def time_calls(script, args, state, calls):
    """Microseconds of each call."""
    policy, key, took = jax.jit(partial(script.act, args)), jax.random.key(1), []
    for observation in np.random.default_rng(0).normal(size=(calls + 100, *OBSERVATION.shape)).astype(np.float32):
        began = time.perf_counter()
        np.asarray(policy(state, observation, key))
        took.append(1e6 * (time.perf_counter() - began))
    return took[100:]


def device_name():
    device = jax.devices()[0].device_kind
    return device + f", {len(os.sched_getaffinity(0))} cores" * (device == "cpu")


def measure(method, calls):
    name, *flags = method.split()
    script = import_module(name)
    args = replace(tyro.cli(script.Args, args=flags), action_dim=5)
    state = script.init(args, jax.random.key(0), OBSERVATION)
    counts, took = count_evaluations(script, args, state), time_calls(script, args, state, calls)
    least, median, late = (round(np.percentile(took, share)) for share in (0, 50, 99))
    return {"method": method, "least (us)": least, "median (us)": median, "99th percentile (us)": late,
            "evaluations per chunk": counts.total(), "per action": counts.total() / args.horizon,
            "of which": ", ".join(f"{name} {n}" for name, n in counts.items()), "calls": calls,
            "device": device_name(), "load": round(os.getloadavg()[0], 1)}  # load: processes that wanted a core


def print_row(values):
    print("| " + " | ".join(map(str, values)) + " |", flush=True)


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(path)


def main(args):
    rows = []
    for method in args.scripts:
        rows.append(measure(method, args.calls))
        if len(rows) == 1:
            print_row(rows[0])
            print_row(["---"] * len(rows[0]))
        print_row(rows[-1].values())
    write_table(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
