"""Any script, whose losses are also measured on episodes that it is not trained on.

    python -m benchmark.studies.pixels.pixels lps.py --held-out held-out.npz --play-interval 2000 \
        --env-id visual-cube-single-play-singletask-v0 --eval-interval 500 --run-dir runs/...

At each evaluation a row of held_out.csv tells what an update would log of held-out chunks, and
under learned_... of as many chunks of the training data. Pixels take long to draw on a CPU, so
episodes are played only at the end and at multiples of --play-interval.
"""

import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import numpy as np

from benchmark import SCRIPTS

BATCHES = 16  # of which a row has the means, the same in every row


@dataclass(frozen=True)
class Own:
    """The arguments beside the script's."""

    held_out: str = ""  # an .npz of other episodes
    play_interval: int = 10_000  # updates between episodes that are played; 0: only at the end


@partial(jax.jit, static_argnums=(0, 1))
def measure_batch(script, args, state, data, i):
    """What an update logs of the i-th batch, before it changes anything."""
    batch_key, update_key = jax.random.split(jax.random.key(i))
    batch = script.sample_batch(args, data, batch_key)
    _, metrics = script.update(args, state, batch, update_key)
    return metrics


def measure(script, args, state, path):
    """The means of that over batches of a dataset."""
    env = script.make_env(args)
    data, _ = script.load_dataset(replace(args, dataset_path=path), env)
    env.close()
    data = jax.device_put(data)
    rows = [measure_batch(script, args, state, data, i) for i in range(BATCHES)]
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


def exchange(script):
    """Puts an evaluation that also measures in place of the script's own."""
    play = script.evaluate

    def evaluate(args, act_fn, state, step, stop):
        if not args.eval_only:
            script.require(args.held_out, "--held-out must name an .npz of other episodes")
            held_out = measure(script, args, state, args.held_out)
            learned = measure(script, args, state, script.find_dataset(args))
            row = dict(step=step) | held_out
            row |= {f"learned_{name}": number for name, number in learned.items()}
            script.add_row(Path(args.run_dir, "held_out.csv"), row)
        is_end = args.eval_only or step >= args.total_steps
        is_due = step > 0 and args.play_interval > 0 and step % args.play_interval == 0
        if is_end or is_due:
            return play(args, act_fn, state, step, stop)
        return None

    script.evaluate = evaluate


def main():
    name = Path(*sys.argv[1:2]).stem
    if name not in SCRIPTS:
        raise SystemExit(f"name a script first, one of {', '.join(SCRIPTS)}, then its flags")
    del sys.argv[1]
    script = import_module(name)

    @dataclass(frozen=True)
    class Args(script.Args, Own):
        pass

    exchange(script)
    script.main(Args)


if __name__ == "__main__":
    main()
