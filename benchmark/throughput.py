"""Speed: updates, start-up, evaluation and memory of every script, beside what this machine could do at best.

    python benchmark/throughput.py                                    # all of it, with states
    python benchmark/throughput.py --scripts lps --num-seeds 1 8
    python benchmark/throughput.py --scripts lps --pixels             # visual-cube-single's sizes

Full-size networks, batch 256, cube-single's sizes, random data. What is timed is the script's own code: its compiled
updates, its command line, its evaluation. Every timing is repeated; median, least and most go to the csv.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from unittest import mock

os.environ.setdefault("MUJOCO_GL", "egl")
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "benchmark")]
import latency  # noqa: E402

SCRIPTS = ("lps", "dsrl", "qc_fql", "qc_mfql", "cfgrl", "flow_bc")
A_DIM = 5


@dataclass
class Args:
    scripts: tuple[str, ...] = SCRIPTS
    """which"""
    num_seeds: tuple[int, ...] = (1, 2, 4, 8)
    """seeds trained together"""
    pixels: bool = False
    """observations of 64 x 64 x 3, and nothing but updates"""
    only_updates: bool = False
    """no start-up and no evaluation"""
    repeats: int = 5
    """timings of each kind; more are steadier"""
    out: Path = ROOT / "benchmark/results/throughput.csv"
    """the csv to write"""


def fail(message):
    raise SystemExit(f"error: {message}")


def seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def timed(repeats, *calls):
    """Seconds [call, repeat], after one round that does not count. In turns: a machine that slows down slows all."""
    return np.array([[seconds(call) for call in calls] for _ in range(repeats + 1)])[1:].T


def random_data(pixels, rows=20_000):
    rng = np.random.default_rng(0)
    frames = lambda: rng.integers(0, 256, (rows, 64, 64, 3), np.uint8)
    observations = frames() if pixels else rng.normal(size=(rows, 28)).astype(np.float32)
    return dict(observations=observations, actions=rng.uniform(-1, 1, (rows, A_DIM)).astype(np.float32),
                rewards=-np.ones(rows, np.float32), terminals=np.arange(rows) % 1000 == 999)


def products(jaxpr, times=1):
    """Floating-point operations of a jaxpr's matrix products and convolutions, in loops as often as these run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * times * eqn.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        if eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out = eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2 * times * eqn.outvars[0].aval.size * int(np.prod(kernel)) // kernel[out]
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)  # of a closed one
            if hasattr(inner, "eqns"):
                total += products(inner, times * eqn.params.get("length", 1))
    return total


def matrix_rate(repeats):
    """Floating-point operations per second of a chain of (256, 512) x (512, 512) products."""
    x, w = (jax.random.normal(jax.random.key(i), (n, 512)) for i, n in enumerate((256, 512)))
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, 500, lambda _, x: 0.04 * (x @ w), x))
    return 500 * 2 * 256 * 512 * 512 / timed(repeats, lambda: jax.block_until_ready(chain(x, w)))[0]


class Trained:
    """A script's state, data and keys for n seeds, and the ways to update it that are compared."""

    def __init__(self, name, seeds, pixels, n):
        self.script, self.n, self.pixels = import_module(name), n, pixels
        self.args = self.script.Args(num_seeds=seeds)
        self.script.check_args(self.args)
        data = random_data(pixels)
        ends = np.flatnonzero(data.pop("terminals"))
        rows = np.arange(len(data["rewards"]))
        starts = rows[rows + self.args.horizon <= ends[np.searchsorted(ends, rows)]]
        data |= dict(masks=np.ones_like(data["rewards"]), starts=starts.astype(np.int32),
                     firsts=(starts // 1000 * 1000).astype(np.int32))
        self.shape = self.script.stacked(data["observations"].shape[1:])
        self.host, self.data = data, jax.device_put(data)
        self.keys = jax.random.split(jax.random.key(0), seeds)
        self.state = self.start()

    def start(self):
        one = lambda key: self.script.init(self.args, key, self.shape, A_DIM)
        return jax.jit(jax.vmap(one))(self.keys)

    def end_to_end(self):
        """Chunks drawn, metrics fetched: what train() does between two looks at the clock."""
        updates, _ = self.script.make_updates(self.args, len(self.host["starts"]), self.pixels)

        def call():
            self.state, metrics = updates(self.n, self.state, self.keys, self.data, 0)
            jax.device_get(metrics)

        return call

    def batch(self, data, key):
        chunks = self.script.draw_chunks(self.args, len(data["starts"]), key)
        return self.script.sample_batch(self.args, data, chunks, key)

    def ceiling(self):
        """The same update, on one batch that is there already; no metrics come back."""
        updates, _ = self.script.make_updates(self.args, len(self.host["starts"]), self.pixels)
        batch = jax.jit(self.batch)(self.data, self.keys[0])

        def call():
            with mock.patch.object(self.script, "sample_batch", lambda args, data, i, key: data):  # when it traces
                self.state, _ = jax.block_until_ready(updates(self.n, self.state, self.keys, batch, 0))

        return call

    def plain(self):
        """The straightforward form: a dispatch per update, the batch drawn with NumPy and copied in, MeanFlow's jvp on
        the whole batch, one Adam over all parameters, those of the target networks among them."""
        script, args, rng = self.script, self.args, np.random.default_rng(0)
        start, host = self.start(), self.host
        state = jax.tree.map(lambda x: x[0], start)
        both = lambda: (state.params, state.target)
        state = state._replace(opt_state=optax.adam(args.learning_rate).init(both()))
        update = jax.jit(lambda state, batch, key: script.update(args, state, batch, key))

        def numpy_batch():
            t = host["starts"][rng.integers(len(host["starts"]), size=args.batch_size)]
            rows = t[:, None] + np.arange(args.horizon)
            return dict(observations=host["observations"][t], next_observations=host["observations"][t + args.horizon],
                        actions=host["actions"][rows].reshape(len(t), -1), masks=host["masks"][rows].prod(axis=1),
                        rewards=(host["rewards"][rows] * args.gamma ** np.arange(args.horizon)).sum(axis=1))

        def call():
            nonlocal state
            with mock.patch.multiple(script, **plain_forms(script)):  # for the first call, which traces
                for i in range(self.n):
                    state, metrics = update(state, numpy_batch(), jax.random.fold_in(self.keys[0], i))
            jax.device_get(metrics)

        return call

    def compile_seconds(self):
        """To trace, lower and compile the updates."""
        updates, _ = self.script.make_updates(self.args, len(self.host["starts"]), self.pixels)
        return seconds(lambda: updates.lower(self.n, self.state, self.keys, self.data, 0).compile())

    def flop(self):
        """Of the matrix products in one update of all seeds."""
        state, key = jax.tree.map(lambda x: x[0], (self.state, self.keys))
        batch = jax.eval_shape(self.batch, self.data, key)
        update = functools.partial(self.script.update, self.args)
        return self.args.num_seeds * products(jax.make_jaxpr(update)(state, batch, key).jaxpr)


def plain_descend(args, state, losses):
    grads, metrics = {}, {}
    for name, loss in losses.items():
        (metrics[name], _), grads[name] = jax.value_and_grad(loss, has_aux=True)(state.params[name])
    everything = state.params, state.target
    grads = grads, jax.tree.map(jnp.zeros_like, state.target)
    steps, opt_state = optax.adam(args.learning_rate).update(grads, state.opt_state)
    params, target = optax.apply_updates(everything, steps)
    target = jax.tree.map(lambda x, y: (1 - args.tau) * x + args.tau * y, target, params.get("critics"))
    return state._replace(params=params, target=target, opt_state=opt_state), metrics


def plain_meanflow_loss(f, s, a, e, key):
    t, r = jnp.sort(jax.nn.sigmoid(jax.random.normal(key, (2, len(a), 1)) - 0.4), axis=0)[::-1]
    r = r.at[: len(a) * 3 // 4].set(t[: len(a) * 3 // 4])
    z, v = (1 - t) * a + t * e, e - a
    x, df_dt = jax.jvp(functools.partial(f, s), (z, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
    err = jnp.mean((z - x - jax.lax.stop_gradient(v - (t - r) * (v - df_dt))) ** 2, axis=-1)
    return jnp.mean(err / jnp.sqrt(jax.lax.stop_gradient(err + 1e-3))), {}


def plain_forms(script):
    """By name, what takes the place of the script's own functions in the straightforward form."""
    forms = dict(descend=plain_descend, meanflow_loss=plain_meanflow_loss)
    return {name: form for name, form in forms.items() if hasattr(script, name)}


def run_script(name, folder, environment, *flags):
    """(seconds to the first updates, peak memory in GB) of a run of 50 updates through the command line."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", "--dataset-path", folder / "data.npz", "--total-steps", "50",
         "--eval-episodes", "0", "--run-dir", tempfile.mkdtemp(dir=folder) + "/run", *flags],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    shown = ""
    while not re.search(r" 50/50", shown):
        if not (piece := process.stderr.read(1)):
            fail(f"{name}.py did not run: {shown.strip().splitlines()[-1:]}")
        shown += piece
    seconds = time.perf_counter() - began
    most = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    process.communicate()
    return seconds, int(most[1]) / 1e6


def start_up(name):
    """Cold, with an empty compilation cache, and then warm."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.savez(folder / "data.npz", **random_data(False))
        environment = dict(JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
        return [run_script(name, folder, environment) for _ in range(2)]


def evaluation(name, repeats):
    """Seconds for 50 episodes of cube-single: the script's evaluation on all cores and with one environment and, from
    fewer episodes, of a serial loop that calls the policy at every step."""
    script, args, state = latency.prepare(name, run_dir=Path("."))
    state, keys = jax.tree.map(lambda x: x[None], state), jax.random.split(jax.random.key(1), 1)
    policy = script.make_policy(args)
    played = lambda episodes: script.evaluate(script.replace(args, eval_episodes=episodes), policy, state, keys, 0)
    played(1)  # compiles
    everywhere = seconds(lambda: played(50))
    with mock.patch.object(script, "min", lambda *_: 1, create=True):  # how many environments
        alone = seconds(lambda: played(50))
    env, took = script.make_env(args.env_id), []
    for episode in range(repeats + 1):
        began, done, t = time.perf_counter(), False, 0
        observation, _ = env.reset(seed=episode)
        while not done:
            index = np.full((1, 1), episode), np.full((1, 1), t)
            chunk = np.asarray(policy(state, keys, np.float32(observation)[None, None], *index))[0, 0]
            observation, _, terminated, truncated, _ = env.step(chunk[:A_DIM])
            done, t = terminated or truncated, t + 1
        took.append(50 * (time.perf_counter() - began))
    return everywhere, alone, np.array(took[1:])


def main(args):
    if unknown := set(args.scripts) - set(SCRIPTS):
        fail(f"--scripts {' '.join(sorted(unknown))}: there are {', '.join(SCRIPTS)}")
    if args.repeats < 1 or min(args.num_seeds, default=0) < 1:
        fail("--repeats and --num-seeds must be at least 1")
    cpu = jax.default_backend() == "cpu"
    device, rows = latency.device_name(), []

    def note(name, seeds, what, values, unit):
        values = np.atleast_1d(values)
        median, least, most = (float(f"{f(values):.4g}") for f in (np.median, np.min, np.max))
        rows.append({"script": name, "observations": "pixels" if args.pixels else "states", "seeds": seeds,
                     "what": what, "median": median, "least": least, "most": most, "unit": unit, "timings": len(values),
                     "device": device, "load": round(os.getloadavg()[0], 1)})
        print(f"| {name} | {seeds} | {what} | {median:g} | {least:g} to {most:g} | {unit} |", flush=True)

    print(f"{device}\n\n| script | seeds | | median | least to most | |\n| --- | --- | --- | --- | --- | --- |")
    rate = matrix_rate(args.repeats)
    note("", 1, "matrix products of 256 x 512 x 512", rate / 1e9, "GFLOP/s")
    for name in args.scripts:
        for seeds in args.num_seeds:
            n = max(1, (50 if cpu else 1000) // seeds // (50 if args.pixels else 1))
            trained = Trained(name, seeds, args.pixels, n)
            per_second = lambda took: seeds * n / took  # noqa: B023  called at once
            ceiling, end_to_end = trained.ceiling(), trained.end_to_end()
            fixed, whole = timed(args.repeats, ceiling, end_to_end)
            note(name, seeds, "updates, end to end", per_second(whole), "1/s")
            note(name, seeds, "updates on a fixed batch", per_second(fixed), "1/s")
            note(name, seeds, "end to end of that", fixed / whole, "")
            flop = trained.flop() / seeds
            note(name, seeds, "matrix products of an update", flop / 1e9, "GFLOP")
            note(name, seeds, "share of the machine's products", per_second(fixed) * flop / np.median(rate), "")
            if seeds == 1:
                note(name, seeds, "to compile", trained.compile_seconds(), "s")
            if seeds == 1 and not args.pixels:
                plain, whole = timed(args.repeats, trained.plain(), end_to_end)
                note(name, seeds, "updates, straightforward form", per_second(plain), "1/s")
                note(name, seeds, "end to end over that", plain / whole, "")
        if not args.pixels and not args.only_updates:
            (cold, memory), (warm, _) = start_up(name)
            note(name, 1, "command to first updates, nothing compiled", cold, "s")
            note(name, 1, "command to first updates, again", warm, "s")
            note(name, 1, "peak memory", memory, "GB")
            everywhere, alone, serial = evaluation(name, args.repeats)
            note(name, 1, "evaluation of 50 episodes", everywhere, "s")
            note(name, 1, "with one environment", alone, "s")
            note(name, 1, "with a policy call at every step, serially", serial, "s")
            acting = latency.measure(name, 300)
            note(name, 1, "one action chunk", acting["median (us)"], "us")
    latency.write_table(args.out, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
