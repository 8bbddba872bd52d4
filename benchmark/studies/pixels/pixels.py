"""Any script, whose losses are also measured on episodes that it is not trained on.

    python -m benchmark.studies.pixels.pixels lps.py --held-out held-out.npz --play-interval 2000 \
        --env-id visual-cube-single-play-singletask-v0 --eval-interval 500 --run-dir runs/...

Each evaluation writes a row of held_out.csv: what an update would log of held-out chunks. It plays
episodes only at multiples of --play-interval, since pixels take long to draw on a CPU.
README.md beside this file says what was found.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import numpy as np

from benchmark import SCRIPTS

BATCHES = 16  # of held-out chunks in a row, the same in every row


@partial(jax.jit, static_argnums=(0, 1))
def measure_batch(script, args, state, data, i):
    """What an update logs of the i-th batch, before it changes anything."""
    batch_key, update_key = jax.random.split(jax.random.key(i))
    batch = script.sample_batch(args, data, batch_key)
    _, metrics = script.update(args, state, batch, update_key)
    return metrics


def measure(script, args, state):
    """The means of that over held-out batches."""
    env = script.make_env(args)
    data, _ = script.load_dataset(replace(args, dataset_path=args.held_out), env)
    env.close()
    data = jax.device_put(data)
    rows = [measure_batch(script, args, state, data, i) for i in range(BATCHES)]
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def exchange(script):
    """Puts an evaluation that also measures in place of the script's own."""
    play = script.evaluate

    def evaluate(args, act_fn, state, step, stop):
        row = dict(step=step) | measure(script, args, state)
        script.add_row(Path(args.run_dir, "held_out.csv"), row)
        if step == 0 or step % args.play_interval:
            return None
        return play(args, act_fn, state, step, stop)

    script.evaluate = evaluate


def main():
    name = Path(*sys.argv[1:2]).stem
    if name not in SCRIPTS:
        raise SystemExit(f"name a script first, one of {', '.join(SCRIPTS)}, then its flags")
    del sys.argv[1]
    script = import_module(name)

    @dataclass(frozen=True)
    class Args(script.Args):
        held_out: str = ""  # an .npz of other episodes
        play_interval: int = 10_000  # updates between evaluations in which episodes are played

    exchange(script)
    script.main(Args)


if __name__ == "__main__":
    main()
