"""What several tests need: tiny data and arguments, runs of the scripts, and their networks in plain NumPy."""

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
GIVEN = dict(qc_fql=dict(alpha=0.7), qc_mfql=dict(alpha=0.7), ifql=dict(expectile=0.8),
                 gfp=dict(alpha=0.7, eta=0.1, target="both"))  # what has no default of its own
TINY = dict(actor_hidden_dims=(8, 8), critic_hidden_dims=(8,), batch_size=16, horizon=2)

# ----------------------------------------------------------------------------------------------------------- data, runs


def make_data(lengths, seed=0):
    """Trajectories of so many transitions for Counting; every number differs, so that a wrong row shows."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths) + len(lengths)
    terminals = np.zeros(rows)
    terminals[np.cumsum([n + 1 for n in lengths]) - 1] = 1
    return dict(observations=rng.normal(size=(rows, 2)), actions=rng.uniform(-1, 1, (rows, 1)),
                rewards=rng.normal(size=rows), terminals=terminals, masks=(rng.random(rows) < 0.8).astype(float))


def as_flags(settings):
    return [str(x) for key, value in settings.items() for x in (f"--{key}".replace("_", "-"), *np.ravel(value))]


def start(folder, name, *flags, **environment):
    """A script in its own session, as its user starts it. toy_envs can be imported; nothing of this repository can."""
    return subprocess.Popen([sys.executable, f"{name}.py", *map(str, flags)], cwd=folder, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def finish(process, code=0):
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out, err


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return result


def read_csv(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def checkpoint(run_dir):
    return msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())


def timeless(table):
    return [{key: x for key, x in row.items() if key not in ("seconds", "updates_per_second")} for row in table]


def assert_same_tree(a, b):
    """To the bit, under the same names."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def assert_same_run(a, b, tables=("train.csv", "eval.csv")):
    """Every array of the checkpoint to the bit, and every row of the tables but for the times in it."""
    first, second = checkpoint(a), checkpoint(b)
    assert_same_tree(first["states"], second["states"])
    assert first["step"] == second["step"]
    for name in tables:
        assert timeless(read_csv(a / name)) == timeless(read_csv(b / name))


# ------------------------------------------------------------------------------------ the networks in NumPy, in float64

S, A, B, H = 4, 3, 16, 2  # numbers in an observation and in an action, chunks in a batch, actions in a chunk
D = H * A
SIZES = dict(horizon=H, action_dim=A, actor_hidden_dims=(8, 8), critic_hidden_dims=(9, 7))


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def np_mlp(network, *inputs):
    """A network by its definition: layers of GELU, with or without LayerNorm after it, and a linear one."""
    layers = network.get("params", network)
    x = np.concatenate(inputs, axis=-1)
    hidden = sum(name.startswith("Dense") for name in layers) - 1
    for i in range(hidden):
        x = np_gelu(x @ layers[f"Dense_{i}"]["kernel"] + layers[f"Dense_{i}"]["bias"])
        if norm := layers.get(f"LayerNorm_{i}"):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
    return x @ layers[f"Dense_{hidden}"]["kernel"] + layers[f"Dense_{hidden}"]["bias"]


def np_q(critic, *inputs):
    """Both critics' values, k along the first axis."""
    return np.array([np_mlp(critic["params"][f"Network_{k}"], *inputs)[:, 0] for k in range(2)])


def np_sphere(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1])


def np_flow(policy, s, z, steps=10):
    """Euler's steps from t = 1 to t = 0."""
    for t in np.linspace(1, 0, steps, endpoint=False):
        z = z - np_mlp(policy, s, z, np.full((len(z), 1), t)) / steps
    return np.clip(z, -1, 1)


def np_meanflow(policy, s, z, steps=1):
    """z - u = f(s, z, t, t-r) at t = 1; or the same in steps, each from t to r = t - 1/steps."""
    for t in np.linspace(1, 0, steps, endpoint=False):
        t, dt = np.full((len(z), 1), t), np.full((len(z), 1), 1 / steps)
        z = z - dt * (z - np_mlp(policy, s, z, t, dt))
    return np.clip(z, -1, 1)


def np_best_of(decoder, state, critic, s, z):
    """Of n chunks for each observation, that with the greatest smaller value, and this value; one at a time."""
    n, chosen = len(z) // len(s), []
    for i in range(len(s)):
        again = np.repeat(s[i : i + 1], n, axis=0)
        a = decoder(state["policy"], again, z[i * n : (i + 1) * n])
        q = np_q(critic, again, a).min(axis=0)
        chosen.append((a[q.argmax()], q.max()))
    return np.array([a for a, _ in chosen]), np.array([q for _, q in chosen])


def make_args(script, **more):
    return script.Args(**SIZES | more)


def make_state(script, args, s=None):
    """A state before its first update, but with random weights, biases, scales and target critics."""
    s = jnp.zeros((1, S)) if s is None else s
    state = jax.eval_shape(lambda: script.init(args, jax.random.key(0), s))
    rng = np.random.default_rng(1)

    def drawn(path, x):
        numbers = rng.normal(size=x.shape) * (1.5 / np.sqrt(len(x)) if x.ndim > 1 else 0.3)
        return jnp.asarray(numbers + (path[-1].key == "scale"), jnp.float32)

    draw = partial(jax.tree.map_with_path, drawn)

    def zeros(tree):
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)

    return {name: draw(x) if name == "target_critic" else zeros(x).replace(params=draw(x.params))
            for name, x in state.items()}


def make_batch():
    rng = np.random.default_rng(0)
    batch = dict(observations=rng.normal(size=(B, S)), actions=rng.uniform(-1, 1, (B, D)), rewards=rng.normal(size=B),
                 masks=np.arange(B) % 4 > 0, next_observations=rng.normal(size=(B, S)))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


def params(state):
    """{name: parameters} of a state, in float64."""
    return double({name: getattr(x, "params", x) for name, x in state.items()})


def load(name):
    return import_module(name)

