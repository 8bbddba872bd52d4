"""What single methods promise beside their losses: paths, times, and where noise may be."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import B, D, S, make_args, make_state

import ifql
import qam
import qgf
import reform
import rql


def field(function):
    """A policy whose velocity is this function of z and t."""

    def apply_fn(params, s, *inputs, encode=False):
        return s if encode else function(*inputs)

    return SimpleNamespace(apply_fn=apply_fn, params=None)


@pytest.mark.parametrize("name", ["init", "update", "imitation_loss", "create", "descend"])
def test_qgf_trains_as_ifql_does(name):
    assert inspect.getsource(getattr(qgf, name)) == inspect.getsource(getattr(ifql, name))


# ============================================================================================= QAM


def test_qam_noises_a_path_so_that_it_ends_as_the_flow_does():
    """Data are N(0, 0.3^2). Then the velocity is known, and so is the variance at every time."""
    variance = 0.3**2

    def at(t):
        return (1 - t) ** 2 * variance + t**2

    tuned = field(lambda z, t: z * (t - (1 - t) * variance) / at(t))
    args = qam.Args(action_dim=1, flow_steps=1000)
    times = 1 - jnp.arange(1000) / 1000
    t = jnp.broadcast_to(times[:, None, None], (1000, 20_000, 1))
    x, noise = jax.random.normal(jax.random.key(0), (2, *t.shape))
    path = qam.noisy_path(args, dict(tuned=tuned), jnp.zeros_like(x[0]), x[0], t, noise)
    late = slice(50, None)  # at first the noise is far from small
    np.testing.assert_allclose(path.var(axis=(1, 2))[late], at(times)[late], rtol=0.05)
    start, end = np.asarray(path[0, :, 0]), np.asarray(path[-1, :, 0])
    assert abs(np.corrcoef(start, end)[0, 1]) < 0.1  # the path has forgotten where it began


def test_qam_clips_the_gradient_of_each_network():
    args = qam.Args(action_dim=1, max_grad_norm=0.5)
    state = qam.create_clipped(args, jax.random.key(0), qam.Network((), 2), jnp.ones((1, 4)))
    grads = jax.tree.map(jnp.ones_like, state.params)  # 10 numbers
    moment = state.apply_gradients(grads=grads).opt_state[1][0].mu
    np.testing.assert_allclose(moment["params"]["Dense_0"]["bias"], 0.1 * 0.5 / np.sqrt(10))


# ========================================================================================== ReFORM


@pytest.mark.parametrize("d", [2, 25])
def test_reform_draws_noise_uniformly_in_the_ball(d):
    """Then the d-th power of the norm is uniform, and no direction is preferred."""
    x = np.asarray(reform.draw_ball(jax.random.key(0), (50_000, d)))
    shares = np.sort((np.linalg.norm(x, axis=1) / np.sqrt(d)) ** d)
    np.testing.assert_allclose(shares, np.linspace(0, 1, 50_000), atol=0.01)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.03)
    covariance = np.cov(x.T)
    np.testing.assert_allclose(covariance, np.eye(d) * covariance.mean() * d, atol=0.03)


@pytest.mark.parametrize("length", [0.1, 1, 10])
def test_reform_lets_no_noise_leave_the_ball(length):
    """Steps of any direction; the longest would lead far out."""
    args = reform.Args(action_dim=1, horizon=4, flow_steps=10)  # the radius is 2
    velocity = length * np.random.default_rng(0).normal(size=(1000, 4))
    x = reform.draw_ball(jax.random.key(0), (1000, 4))
    policy = field(lambda x, t: velocity)
    ends = np.linalg.norm(reform.steer(args, policy, None, jnp.ones((1000, 4)), x), axis=1)
    assert ends.max() < 2 + 1e-5
    straight = np.linalg.norm(x + velocity, axis=1)
    inside = straight < 2
    np.testing.assert_allclose(ends[inside], straight[inside], rtol=1e-3)
    assert inside.any() == (length < 5)


# ============================================================================================= RQL


def test_rql_draws_half_of_its_times_at_the_steps():
    args = rql.Args(action_dim=1, flow_steps=4)
    t = np.asarray(rql.draw_times(args, jax.random.key(0), 8000))[:, 0]
    assert np.isin(t[4000:], [0, 0.25, 0.5, 0.75, 1]).all()
    steps, counts = np.unique(t[4000:], return_counts=True)
    assert len(steps) == 5
    np.testing.assert_allclose(counts / 4000, 0.2, atol=0.03)
    np.testing.assert_allclose(np.sort(t[:4000]), np.linspace(0, 1, 4000), atol=0.04)


def test_rql_reverses_its_flow():
    """At t = 0 stands the data's chunk, at t = 1 the noise from which the flow makes it."""
    args = make_args(rql, flow_steps=2000)
    policy = make_state(rql, args)["policy"]
    s = jnp.asarray(np.random.default_rng(0).normal(size=(B, S)), jnp.float32)
    a = jnp.asarray(np.random.default_rng(1).uniform(-0.9, 0.9, (B, D)), jnp.float32)
    here = rql.reverse(args, policy, s, a, jnp.zeros((B, 1)))
    np.testing.assert_array_equal(here, a)
    noise = rql.reverse(args, policy, s, a, jnp.ones((B, 1)))
    assert np.abs(noise - a).max() > 0.5
    np.testing.assert_allclose(rql.decode(args, policy, s, noise), a, atol=5e-3)
