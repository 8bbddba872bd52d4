"""Pixels: the encoder against NumPy, how often it is applied, and that no loop is around it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_envs
from carry import SCRIPTS
from helpers import GIVEN, TINY, double, load, np_gelu, read_csv

import flow_bc
import lps


def np_conv(x, p):
    """3 x 3, stride 1, zero padding."""
    height, width, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    views = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    kernel = p["kernel"].reshape(9, *p["kernel"].shape[2:])
    return np.einsum("khwc,kco->hwo", np.array(views), kernel) + p["bias"]


def np_max_pool(x):
    """3 x 3, stride 2, padded where even sizes need it: on the right and below."""
    height, width, _ = x.shape
    edges = ((height % 2, 1), (width % 2, 1), (0, 0))
    padded = np.pad(x, edges, constant_values=-np.inf)
    views = [padded[i : i + height : 2, j : j + width : 2] for i in range(3) for j in range(3)]
    return np.max(views, axis=0)


def np_encode(layers, image):
    """Three stacks of a convolution, a pool and a residual block; then a dense layer."""
    x = image / 255
    for i in (0, 3, 6):
        x = np_max_pool(np_conv(x, layers[f"Conv_{i}"]))
        y = np_conv(np.maximum(x, 0), layers[f"Conv_{i + 1}"])
        x = x + np_conv(np.maximum(y, 0), layers[f"Conv_{i + 2}"])
    dense = layers["Dense_0"]
    return np_gelu(np.maximum(x, 0).reshape(-1) @ dense["kernel"] + dense["bias"])


def test_the_encoder_is_impala_small():
    images = np.random.default_rng(0).integers(0, 256, (4, 12, 9, 9), np.uint8)
    a = jnp.ones((4, 2))
    network = lps.Network((8,), 3)
    params = jax.jit(network.init)(jax.random.key(0), images, a)
    params = jax.tree.map(lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), params)
    layers = double(params["params"]["Encoder_0"])
    channels = [layers[f"Conv_{i}"]["kernel"].shape[3] for i in range(9)]
    assert channels == [16] * 3 + [32] * 6
    h = jax.jit(partial(network.apply, encode=True))(params, images)
    expected = [np_encode(layers, image) for image in images]
    np.testing.assert_allclose(h, expected, rtol=1e-3, atol=1e-5)
    at_once = jax.jit(network.apply)(params, images, a)
    np.testing.assert_allclose(at_once, network.apply(params, h, a), atol=1e-6)


def from_pixels(name):
    """A script, tiny arguments, and the shapes of its state, its dataset and a batch of it."""
    script = load(name)
    settings = TINY | GIVEN.get(name, {})
    if name == "lps":
        settings = settings | dict(latent_actor_hidden_dims=(8,))
    args = script.Args(action_dim=1, **settings)
    s = jnp.zeros((1, 16, 16, 9))
    state = jax.eval_shape(lambda: script.init(args, jax.random.key(0), s))
    data = jax.tree.map(np.float32, toy_envs.film_data(2))
    data["observations"] = np.zeros((16, 16, 16, 3), np.uint8)
    data |= dict(masks=data["rewards"], starts=np.arange(6))
    batch = jax.eval_shape(partial(script.sample_batch, args), data, jax.random.key(0))
    return script, args, state, data, batch


# In an update: pairs of a network and observations, of which it takes a gradient for so many.
# (lps: policy, critic and actor at s, all with a gradient; policy, target critics, actor at s'.)
ENCODED = [
    ("lps", 6, 3),
    ("dsrl", 7, 4),
    ("gfp", 7, 3),
    ("reform", 7, 4),
    ("qam", 7, 3),
    ("rql", 3, 2),
]


@pytest.mark.parametrize("name, pairs, gradients", ENCODED)
def test_no_network_encodes_an_observation_twice(name, pairs, gradients):
    """A gradient costs two more. A jvp, Euler step or second look at the same would add to it."""
    script, args, state, _, batch = from_pixels(name)

    def flops(function, *shapes):
        quick = dict(xla_backend_optimization_level=0)
        return jax.jit(function).lower(*shapes).compile(quick).cost_analysis()["flops"]

    encode = partial(state["policy"].apply_fn, encode=True)
    once = flops(encode, state["policy"].params, batch["observations"])
    total = flops(partial(script.update, args, key=jax.random.key(0)), state, batch)
    assert total / once < pairs + 2 * gradients + 0.5


def convolutions(jaxpr, loops=0):
    """In how many loops each of them stands."""
    found = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            found.append(loops)
        for x in jax.tree.leaves(equation.params):
            inner = getattr(x, "jaxpr", x)
            if hasattr(inner, "eqns"):
                found += convolutions(inner, loops + (name in ("scan", "while")))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_loop_is_around_a_convolution_on_a_cpu(name):
    """XLA would run it up to twenty times slower there."""
    script, args, state, data, _ = from_pixels(name)
    s = jnp.zeros((16, 16, 9), np.uint8)
    alone = jax.make_jaxpr(partial(script.learn, args, 1))(data, state, 0)
    together = jax.make_jaxpr(partial(script.learn, args, 2))(data, state, 0)
    acting = jax.make_jaxpr(partial(script.act_once, args))(state, s, 0, 0, 0)
    assert set(convolutions(alone.jaxpr)) == set(convolutions(acting.jaxpr)) == {0}
    assert set(convolutions(together.jaxpr)) == {1}


def test_a_run_from_pixels_makes_one_update_a_call_on_a_cpu(tmp_path):
    np.savez(tmp_path / "data.npz", **toy_envs.film_data(3))
    args = flow_bc.Args(
        env_id="toy_envs:Film-v0",
        dataset_path=str(tmp_path / "data.npz"),
        run_dir=str(tmp_path / "run"),
        total_steps=3,
        log_interval=1,
        eval_episodes=0,
        **TINY,
    )
    flow_bc.train(args)
    assert [row["step"] for row in read_csv(tmp_path / "run/train.csv")] == ["1", "2", "3"]
