"""The cost of acting: time of one policy call for a single observation, and network evaluations.

    python benchmark/latency.py

Nets of full size with random weights on the sizes of cube-single: 28 observations, 5 actions, chunks of 5. A call goes
through the script's own make_policy, from an observation in NumPy to a chunk in NumPy, as in its evaluation.
"""

import csv
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the scripts lie there

S_SHAPE, A_DIM = (28,), 5
METHODS = {"lps": {}, "dsrl": {}, "qc_fql": {}, "qc_mfql": {}, "cfgrl": {}, "flow_bc": {},
           "flow_bc --policy meanflow": dict(policy="meanflow")}


@dataclass
class Args:
    calls: int = 2000
    """calls to time, after 100 to warm up"""
    out: Path = Path(__file__).parent / "results" / "latency.csv"
    """the csv to write"""


def prepare(method, **more):
    """(script, args, state) of a method."""
    script = import_module(method.split()[0])
    args = script.Args(**METHODS[method] | more)
    script.check_args(args)
    return script, args, script.init(args, jax.random.key(0), S_SHAPE, A_DIM)


def count_evaluations(script, args, state):
    """{network: evaluations for one chunk}, counted as they happen: without jit, loops run step by step."""
    names = {id(x): name for name, network in state.params.items() for x in jax.tree.leaves(network)}
    counts, mlp = Counter(), script.mlp

    def counted(layers, *inputs):
        counts[names[id(layers[0]["w"])]] += 1
        return mlp(layers, *inputs)

    with mock.patch.object(script, "mlp", counted), jax.disable_jit():
        script.act(args, state, np.zeros(S_SHAPE, np.float32), jax.random.key(1))
    return counts


def time_calls(script, args, state, calls):
    """Microseconds of each call."""
    state, keys = jax.tree.map(lambda x: x[None], state), jax.random.split(jax.random.key(1), 1)
    policy, took = script.make_policy(args), []
    observations = np.random.default_rng(0).normal(size=(calls + 100, 1, 1, *S_SHAPE)).astype(np.float32)
    for i, observation in enumerate(observations):
        began = time.perf_counter()
        np.asarray(policy(state, keys, observation, np.zeros((1, 1), int), np.full((1, 1), i)))
        took.append(1e6 * (time.perf_counter() - began))
    return took[100:]


def device_name():
    device = jax.devices()[0].device_kind
    return device + f", {len(os.sched_getaffinity(0))} cores" * (device == "cpu")


def measure(method, calls):
    script, args, state = prepare(method)
    counts, took = count_evaluations(script, args, state), time_calls(script, args, state, calls)
    least, median, late = (round(np.percentile(took, share)) for share in (0, 50, 99))
    return {"method": method, "least (us)": least, "median (us)": median, "99th percentile (us)": late,
            "evaluations per chunk": sum(counts.values()), "per action": sum(counts.values()) / args.horizon,
            "of which": ", ".join(f"{name} {n}" for name, n in counts.items()), "calls": calls,
            "device": device_name(),
            "load": round(os.getloadavg()[0], 1)}  # processes that wanted a core, this one among them


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(path)


def main(args):
    if args.calls < 1:
        raise SystemExit(f"error: --calls {args.calls} is out of range")
    rows = [measure(method, args.calls) for method in METHODS]
    print("\n".join(f"| {' | '.join(map(str, line))} |" for line in (
        rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows))))
    write_table(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
