"""Several seeds of one script at once, for accelerators on which one seed leaves much idle.

    python -m benchmark.seeds lps.py --seeds 0 1 2 3 --run-dir runs/x    # and all flags of lps.py
    python -m benchmark.seeds lps.py --resume --run-dir runs/x

The script's own functions train under vmap, and each seed has a directory (runs/x/seed0, ...) with
all that the script would have left there: `python lps.py --resume --run-dir runs/x/seed0` and
--eval-only work on it, and so does report.py. Evaluations follow one another.
updates_per_second is how fast a seed advances beside the others; together they make that times
their number.
"""

import argparse
import math
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tqdm import tqdm

from benchmark import ROOT, ablations


def find_script(path, args=None):
    """A script as a module; ablations.py as lps with what these arguments exchange."""
    if path.stem == "ablations":
        return ablations.exchange(args or ablations.Args())
    return import_module(path.stem)


def find_runs(script, args, seeds):
    """The arguments of each seed's run, whose directory is there afterwards."""
    script.require(args.run_dir, "--run-dir: where are the seeds' directories to lie?")
    if args.resume and not seeds:
        records = Path(args.run_dir).glob("seed*/args.json")
        seeds = sorted(int(path.parent.name.removeprefix("seed")) for path in records)
    script.require(seeds, f"--seeds: which? None lies in {args.run_dir}")
    runs = []
    for seed in seeds:
        run = replace(args, seed=seed, run_dir=f"{args.run_dir}/seed{seed}")
        if args.resume:
            run = replace(script.saved_args(run), run_dir=run.run_dir)
        is_for_one = run.eval_only or run.track
        script.require(not is_for_one, "--eval-only and --track are the script's, for a seed alone")
        runs.append(script.prepare(run))
    kinds = {replace(run, seed=0, run_dir=None) for run in runs}
    hint = "give --total-steps, or what else it is, anew"
    script.require(len(kinds) == 1, f"{args.run_dir}: the seeds' arguments differ; {hint}")
    return runs


def round_up(args, env):
    """The arguments as the script's train completes them, and the updates in a call."""
    n = 100
    if len(env.observation_space.shape) == 3:
        n = 1 if jax.default_backend() == "cpu" else 10
    for name in ("total_steps", "log_interval", "eval_interval"):
        args = replace(args, **{name: math.ceil(getattr(args, name) / n) * n})
    return replace(args, action_dim=env.action_space.shape[0] // args.horizon), n


def learn(script, args, n, data, states, step, seeds, is_behind):
    """The states after n updates of the seeds that are behind, and the metrics of all."""

    def learn_seed(state, seed, is_behind):
        new_state, metrics = script.learn(replace(args, seed=seed), n, data, state, step)
        return jax.tree.map(partial(jnp.where, is_behind), new_state, state), metrics

    return jax.vmap(learn_seed)(states, seeds, is_behind)


def train(script, runs):
    """Runs from their first update or their last checkpoint on, to their end or to a signal."""
    # --- Load and record ---
    env = script.make_env(runs[0])
    runs = [round_up(run, env)[0] for run in runs]
    args, n = round_up(runs[0], env)
    print(f"updates in a call: {n}; the total and the intervals are multiples of it")
    data, record = script.load_dataset(args, env)
    init_fn = jax.jit(lambda seed: script.init_state(replace(args, seed=seed), env))
    states = []
    steps = np.zeros(len(runs), int)
    for i, run in enumerate(runs):
        states.append(init_fn(run.seed))
        if run.resume:
            script.check_dataset(run, record)
            if Path(run.run_dir, "checkpoint.msgpack").exists():
                states[i], steps[i] = script.load_state(run, states[i])
        script.begin(run, dict(record))
    env.close()

    # --- Compile ---
    data = jax.device_put(data)
    seeds = jnp.array([run.seed for run in runs])
    states = jax.tree.map(lambda *x: jnp.stack(x), *states)
    learn_fn = jax.jit(partial(learn, script, args, n), donate_argnums=1)
    learn_fn = learn_fn.lower(data, states, 0, seeds, steps == 0).compile()
    act_fn = jax.jit(lambda seed, *x: script.act_once(replace(args, seed=seed), *x))

    def is_due(interval):
        is_start_or_end = step == 0 or step >= args.total_steps
        return is_start_or_end or (interval > 0 and step % interval < n)

    def take(i):
        return jax.tree.map(lambda x: x[i], states)

    def save(i):
        script.save_state(runs[i], take(i), int(steps[i]))

    def log(i, name, row):
        path = Path(runs[i].run_dir, f"{name}.csv")
        script.add_row(path, dict(step=step, seed=runs[i].seed) | row)

    bar = tqdm(total=args.total_steps, initial=steps.min(), unit=" updates", mininterval=1)
    stop = script.note_signals()
    while True:
        step = int(steps.min())
        behind = np.flatnonzero(steps == step)  # all, but after a kill between two checkpoints

        # --- Evaluate ---
        if is_due(args.eval_interval) and not stop:
            for i in behind:
                save(i)
            for i in behind:
                if args.eval_episodes and not stop:
                    act_seed = partial(act_fn, seeds[i])
                    row = script.evaluate(runs[i], act_seed, take(i), step, stop)
                    if row:
                        log(i, "eval", row)
        if stop or step >= args.total_steps:
            break

        # --- Learn ---
        began = time.perf_counter()
        states, metrics = learn_fn(data, states, step, seeds, steps == step)
        metrics = jax.device_get(metrics)
        rate = n / (time.perf_counter() - began)  # of a seed: the call has made n of each
        steps[behind] += n
        step += n
        bar.update(n)

        # --- Log ---
        for i in behind:
            row = {name: float(numbers[i]) for name, numbers in metrics.items()}
            bad = [name for name, number in row.items() if not np.isfinite(number)]
            script.require(not bad, f"{runs[i].run_dir}: not finite at update {step}: {bad}")
            if is_due(args.log_interval):
                log(i, "train", dict(updates_per_second=rate) | row)
    bar.close()
    if stop:
        for i in range(len(runs)):
            save(i)
        folder = Path(args.run_dir).parent
        print(f"stopped after update {step}: --resume --run-dir {folder} goes on")
        raise SystemExit(128 + stop[0])


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, it just ends
    parser = argparse.ArgumentParser("benchmark.seeds", add_help=False, allow_abbrev=False)
    parser.add_argument("script", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=())
    command, sys.argv[1:] = parser.parse_known_args()  # the rest are the script's flags
    path = command.script.resolve()
    if not path.is_file() or path.parent not in (ROOT, ROOT / "benchmark"):
        parser.error(f"{path} is no script of this repository")
    script = find_script(path)
    args = tyro.cli(script.Args, description=__doc__.partition("\n")[0])
    runs = find_runs(script, args, command.seeds)
    train(find_script(path, runs[0]), runs)


if __name__ == "__main__":
    main()
