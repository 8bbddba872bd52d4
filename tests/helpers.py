"""What several tests need: tiny data and arguments, runs of the scripts, and networks in NumPy."""

import csv
import os
import subprocess
import sys
import time
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
from flax.serialization import msgpack_restore

COUNTING = "toy_envs:Counting-v0"  # two numbers observed, one action
GIVEN = {  # arguments that have no default of their own
    "qc_fql": dict(alpha=0.7),
    "qc_mfql": dict(alpha=0.7),
    "gfp": dict(alpha=0.7, eta=0.1, target="both"),
    "ifql": dict(expectile=0.8),
    "qgf": dict(expectile=0.8),
    "qam": dict(eta=0.7),
    "rql": dict(alpha=0.7, expectile=0.8),
}
TINY = dict(policy_hidden_dims=(8, 8), critic_hidden_dims=(8,), batch_size=16, horizon=2)

# ===================================================================================== Data, runs


def load(name):
    """The script of this name, as a module."""
    return import_module(name)


def make_data(lengths, seed=0):
    """Trajectories of so many transitions for Counting. Every number differs: a wrong row shows."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths) + len(lengths)
    terminals = np.zeros(rows)
    terminals[np.cumsum(np.add(lengths, 1)) - 1] = 1
    return dict(
        observations=rng.normal(size=(rows, 2)),
        actions=rng.uniform(-1, 1, (rows, 1)),
        rewards=rng.normal(size=rows),
        terminals=terminals,
        masks=(rng.random(rows) < 0.8).astype(float),
    )


def as_flags(settings):
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}".replace("_", "-"), *map(str, np.ravel(value))]
    return flags


def start(folder, name, *flags, **environment):
    """A script in its own session, as its user starts it."""
    return subprocess.Popen(
        [sys.executable, f"{name}.py", *map(str, flags)],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(process, code=0):
    """What it has printed, on both streams."""
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out, err


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def timeless(path):
    """A table without the times in it."""
    times = ("seconds", "updates_per_second")
    return [{key: x for key, x in row.items() if key not in times} for row in read_csv(path)]


def checkpoint(run_dir):
    return msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())


def assert_same_tree(a, b):
    """To the bit, under the same names."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def assert_same_run(a, b, tables=("train.csv", "eval.csv")):
    """Every array of the checkpoint to the bit, and every row of the tables but for the times."""
    assert_same_tree(checkpoint(a), checkpoint(b))
    for name in tables:
        assert timeless(a / name) == timeless(b / name)


# ============================================================================= Networks in NumPy

S, A, B, H = 4, 3, 15, 2  # numbers in an observation and an action, chunks in a batch, their length
D = H * A
SIZES = dict(horizon=H, action_dim=A, policy_hidden_dims=(8, 8), critic_hidden_dims=(9, 7))


def double(tree):
    """Its arrays in float64, in which all that follows is."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_mlp(network, *inputs):
    """Layers of GELU, with or without LayerNorm after it, and a linear one."""
    layers = network.get("params", network)
    x = np.concatenate(inputs, axis=-1)
    hidden = sum(name.startswith("Dense") for name in layers) - 1
    for i in range(hidden):
        x = np_gelu(x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"])
        if f"LayerNorm_{i}" in layers:
            norm = layers[f"LayerNorm_{i}"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
    return x @ layers[f"Dense_{hidden}"]["kernel"] + layers[f"Dense_{hidden}"]["bias"]


def np_q(critic, *inputs):
    """The critics' values, k along the first axis."""
    heads = [critic["params"][f"Network_{k}"] for k in range(len(critic["params"]))]
    return np.array([np_mlp(head, *inputs)[:, 0] for head in heads])


def make_args(script, **more):
    return script.Args(**SIZES | more)


def make_state(script, args):
    """A state before its first update, of random weights, biases, scales and target critics."""
    state = jax.eval_shape(lambda: script.init(args, jax.random.key(0), jnp.zeros((1, S))))
    rng = np.random.default_rng(1)

    def draw(path, x):
        numbers = rng.normal(size=x.shape) * (1.5 / np.sqrt(len(x)) if x.ndim > 1 else 0.3)
        return jnp.asarray(numbers + (path[-1].key == "scale"), jnp.float32)

    draw_all = partial(jax.tree.map_with_path, draw)
    drawn = {}
    for name, x in state.items():
        if name.startswith("target_"):
            drawn[name] = draw_all(x)
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), x)
            drawn[name] = zeros.replace(params=draw_all(x.params))
    return drawn


def params(state):
    """{name: parameters} of a state, in float64."""
    return double({name: getattr(x, "params", x) for name, x in state.items()})
