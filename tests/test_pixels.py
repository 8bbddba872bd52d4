"""Pixels: the encoder against NumPy, and how often it is applied. (test_dataset.py has frame stacks and shifts.)"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import GIVEN, TINY, double, load, np_gelu

import lps


def np_conv(x, p):
    """3 x 3, stride 1, zero padding."""
    height, width, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=2)
    return np.einsum("hwkc,kco->hwo", patches, p["kernel"].reshape(9, *p["kernel"].shape[2:])) + p["bias"]


def np_max_pool(x):
    """3 x 3, stride 2, padded where even sizes need it: on the right and below."""
    height, width, _ = x.shape
    padded = np.pad(x, ((height % 2, 1), (width % 2, 1), (0, 0)), constant_values=-np.inf)
    return np.array([[padded[i : i + 3, j : j + 3].max((0, 1)) for j in range(0, width, 2)]
                     for i in range(0, height, 2)])


def np_encode(layers, image):
    """Three stacks of a convolution, a pool and a residual block; then a dense layer."""
    x = image / 255
    for i in (0, 3, 6):
        x = np_max_pool(np_conv(x, layers[f"Conv_{i}"]))
        y = np_conv(np.maximum(x, 0), layers[f"Conv_{i + 1}"])
        x = x + np_conv(np.maximum(y, 0), layers[f"Conv_{i + 2}"])
    return np_gelu(np.maximum(x, 0).reshape(-1) @ layers["Dense_0"]["kernel"] + layers["Dense_0"]["bias"])


@pytest.mark.parametrize("size", [(16, 16), (12, 9)])
def test_encoder(size):
    images = np.random.default_rng(0).integers(0, 256, (4, *size, 9), np.uint8)
    network = lps.Network((8,), 3)
    params = jax.jit(network.init)(jax.random.key(0), images, jnp.zeros((4, 2)))
    params = jax.tree.map(lambda x: x + np.linspace(0, 0.01, x.size, dtype=np.float32).reshape(x.shape), params)
    layers = double(params["params"]["Encoder_0"])
    assert [layers[f"Conv_{i}"]["kernel"].shape[2:] for i in range(9)] == [
        (9, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 32), (32, 32), (32, 32), (32, 32)]
    h = jax.jit(partial(network.apply, encode=True))(params, images)
    np.testing.assert_allclose(h, [np_encode(layers, image) for image in images], rtol=1e-3, atol=1e-5)
    at_once = jax.jit(network.apply)(params, images, jnp.ones((4, 2)))
    np.testing.assert_allclose(at_once, network.apply(params, h, jnp.ones((4, 2))), atol=1e-6)


@pytest.mark.parametrize("name, encoded, differentiated", [
    ("lps", 6, 3),  # (policy, s), (policy, s'), (critic, s), (target, s'), (latent actor, s), (latent actor, s')
    ("mf_bon", 4, 2), ("dsrl", 7, 4), ("gfp", 7, 3), ("cfgrl", 5, 3), ("ifql", 5, 3)])
def test_each_network_encodes_each_observation_once(name, encoded, differentiated):
    """An encoder has 9 convolutions; backwards there are 9 for its weights and 8 for what lies between them. A compiled
    update has these and no more: no jvp, Euler step or second look at the same observation adds any."""
    script = load(name)
    args = script.Args(**TINY | GIVEN.get(name, {}), action_dim=1)
    image, one = jax.ShapeDtypeStruct((6, 8, 8, 9), np.uint8), jax.ShapeDtypeStruct((6,), np.float32)
    state = jax.eval_shape(lambda: script.init(args, jax.random.key(0), jnp.zeros((1, 8, 8, 9))))
    batch = dict(observations=image, next_observations=image, rewards=one, masks=one,
                 actions=jax.ShapeDtypeStruct((6, 2), np.float32))
    update = jax.jit(lambda state, batch: script.update(args, state, batch, jax.random.key(0))).lower(state, batch)
    code = update.compile(dict(xla_backend_optimization_level=0)).as_text()
    assert code.count(" convolution(") == 9 * encoded + 17 * differentiated
