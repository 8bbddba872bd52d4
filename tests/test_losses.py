"""The mathematics of lps.py against plain NumPy in float64: losses, gradients, targets, and who moves whom."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lps

S, A, B = 4, 3, 16  # state and action dimension, batch
ARGS = lps.Args(horizon=2, actor_hidden_dims=(8, 8), critic_hidden_dims=(9, 7), latent_actor_hidden_dims=(6,))
D = ARGS.horizon * A


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def np_mlp(network, *inputs):
    """The network again, by its definition."""
    layers = network["mlp"] if isinstance(network, dict) else network
    x = np.concatenate(inputs, axis=-1)
    for layer in layers[:-1]:
        x = x @ layer["w"] + layer["b"]
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        if "scale" in layer:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * layer["scale"] + layer["shift"]
    return x @ layers[-1]["w"] + layers[-1]["b"]


def np_sphere(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True)) * np.sqrt(x.shape[-1])


def directional(loss, tree, direction, eps=1e-6):
    """d loss(tree + h direction) / dh at h = 0, by central differences."""
    flat, unravel = ravel_pytree_np(tree)
    return (loss(unravel(flat + eps * direction)) - loss(unravel(flat - eps * direction))) / (2 * eps)


def ravel_pytree_np(tree):
    leaves, structure = jax.tree.flatten(tree)
    shapes, sizes = [x.shape for x in leaves], np.cumsum([x.size for x in leaves])[:-1]
    flat = np.concatenate([x.ravel() for x in leaves])
    return flat, lambda f: structure.unflatten([x.reshape(s) for x, s in zip(np.split(f, sizes), shapes)])


def assert_gradient(grad, loss, tree, rtol=2e-3):
    """grad is the gradient of the float64 loss, along a few random directions."""
    grad = np.asarray(ravel_pytree(grad)[0], np.float64)
    for seed in range(5):
        direction = np.random.default_rng(seed).normal(size=grad.size)
        np.testing.assert_allclose(grad @ direction, directional(loss, tree, direction), rtol=rtol, atol=1e-5)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    masks = (np.arange(B) % 4 > 0).astype(np.float32)
    batch = dict(observations=rng.normal(size=(B, S)), actions=rng.uniform(-1, 1, (B, D)),
                 rewards=rng.normal(size=B), masks=masks, next_observations=rng.normal(size=(B, S)))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


@pytest.fixture
def state():
    """A state whose biases, scales and targets are not at their initial values."""
    state = lps.init(ARGS, jax.random.key(0), (S,), A)
    leaves, structure = jax.tree.flatten((state.params, state.target))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params, target = structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
    return lps.State(params, target, state.opt_state)


def times(key, n):
    """The t and r that meanflow_loss draws, sorted by hand."""
    draws = 1 / (1 + np.exp(-(np.asarray(jax.random.normal(key, (2, n, 1)), np.float64) - 0.4)))
    t, r = draws.max(0), draws.min(0)
    r[: n * 3 // 4] = t[: n * 3 // 4]
    return t, r


def np_meanflow(f, a, e, t, r, frozen=None, eps=1e-6):
    """The loss in its plain form: the derivative along (v, 1, 0) of every sample, by differences.
    frozen: (u*, weights) to keep, as under stop-gradients. f(z, t, r)."""
    z, v = (1 - t) * a + t * e, e - a
    if frozen is None:
        df_dt = (f(z + eps * v, t + eps, r) - f(z - eps * v, t - eps, r)) / (2 * eps)
        u_star = v - (t - r) * (v - df_dt)
        err = ((z - f(z, t, r) - u_star) ** 2).mean(-1)
        frozen = u_star, 1 / np.sqrt(err + 1e-3)
    u_star, weights = frozen
    return (((z - f(z, t, r) - u_star) ** 2).mean(-1) * weights).mean(), frozen


@pytest.mark.parametrize("predict", ["action", "velocity"])
@pytest.mark.parametrize("n", [B, 15, 2, 1])
def test_meanflow_loss_and_gradient(state, batch, predict, n):
    args = lps.replace(ARGS, predict=predict)
    s, a = batch["observations"][:n], batch["actions"][:n]
    key = jax.random.key(7)
    e = jax.random.normal(jax.random.key(8), a.shape)
    loss, grad = jax.value_and_grad(lambda p: lps.meanflow_loss(lps.base(args, p), s, a, e, key)[0])(
        state.params["policy"])

    t, r = times(key, n)
    assert (t > r).sum() == n - n * 3 // 4
    s64, a64, e64, policy = double((s, a, e, state.params["policy"]))

    def f(p, z, t, r):
        out = np_mlp(p, s64, z, t, t - r)
        return out if predict == "action" else z - out

    expected, frozen = np_meanflow(partial(f, policy), a64, e64, t, r)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    assert_gradient(grad, lambda p: np_meanflow(partial(f, p), a64, e64, t, r, frozen)[0], policy)


def test_meanflow_loss_of_the_true_flow_is_zero():
    """If all data at s are one action c(s), the mean velocity is (z - c) / t whatever r is."""
    s = jax.random.normal(jax.random.key(0), (64, D))
    a = jnp.tanh(s)
    e = jax.random.normal(jax.random.key(1), a.shape)
    true = lambda s, z, t, r: z - (z - jnp.tanh(s)) / t
    wrong = lambda s, z, t, r: z - (z - jnp.tanh(s))
    assert lps.meanflow_loss(true, s, a, e, jax.random.key(2))[0] < 1e-6
    assert lps.meanflow_loss(wrong, s, a, e, jax.random.key(2))[0] > 0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_flow_matching_loss(batch, weighted):
    policy = lps.init_mlp(jax.random.key(3), (S + D + 1, 8, D))
    s, a = batch["observations"], batch["actions"]
    x0 = jax.random.normal(jax.random.key(4), a.shape)
    key = jax.random.key(5)
    weight = (np.arange(B)[:, None] % 3).astype(np.float32) if weighted else np.ones((B, 1), np.float32)
    more = (weight,) if weighted else ()
    loss, grad = jax.value_and_grad(
        lambda p: lps.flow_matching_loss(partial(lps.mlp, p), s, a, x0, key, *more)[0])(policy)
    t = np.asarray(jax.random.uniform(key, (B, 1)), np.float64)
    s, a, x0, policy = double((s, a, x0, policy))
    expected = lambda p: (weight * (np_mlp(p, s, (1 - t) * x0 + t * a, t) - (a - x0)) ** 2).mean()
    np.testing.assert_allclose(loss, expected(policy), rtol=1e-5)
    assert_gradient(grad, expected, policy)


def test_euler_against_the_solution_of_a_linear_field():
    """dx/dt = 2 t - x from x(0): x(1) = 2 (t - 1) + (x0 + 2) exp(-t) at t = 1. The error halves with the step."""
    x0 = jnp.linspace(-1, 1, 6).reshape(2, 3)
    exact = (x0 + 2) * np.exp(-1)
    error = {n: np.abs(lps.euler(lambda s, x, t: 2 * t - x, None, x0, n) - exact).max() for n in (1, 10, 100, 200)}
    np.testing.assert_allclose(lps.euler(lambda s, x, t: 2 * t - x, None, x0, 1), 0 * x0, atol=1e-6)
    assert error[200] < 0.01 and 1.8 < error[100] / error[200] < 2.2 and 8 < error[10] / error[100] < 13


def np_actor_loss(args, latent_actor, policy, critics, s, scale=None):
    z = np_sphere(np_mlp(latent_actor, s))
    one = np.ones((len(s), 1))
    a = np_mlp(policy, s, z, one, one)
    q = np.mean([np_mlp(critic, s, a)[:, 0] for critic in critics["mlp"]], axis=0)
    scale = 1 / np.abs(q).mean() if scale is None else scale
    return -args.alpha * scale * q.mean(), scale


def test_actor_gradient_passes_through_critics_and_policy(state, batch):
    args = lps.replace(ARGS, alpha=0.7)
    p = state.params
    loss = lambda actor: lps.actor_loss(args, actor, p["policy"], p["critics"], batch["observations"])[0]
    value, grad = jax.value_and_grad(loss)(p["latent_actor"])
    s, policy, critics, actor = double((batch["observations"], p["policy"], p["critics"], p["latent_actor"]))
    expected, scale = np_actor_loss(args, actor, policy, critics, s)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_gradient(grad, lambda x: np_actor_loss(args, x, policy, critics, s, scale)[0], actor)


@pytest.mark.parametrize("agg", ["min", "mean"])
def test_td_target_by_hand(agg):
    next_q = jnp.array([[8.0, 8.0, -16.0], [16.0, 24.0, 16.0]])
    next_v = dict(min=next_q.min(0), mean=next_q.mean(0))[agg]
    batch = dict(rewards=jnp.array([1.0, -1.0, 0.0]), masks=jnp.array([1.0, 0.0, 1.0]))
    # gamma^3 = 1/8; the second chunk ended, so its future counts for nothing
    expected = dict(min=[1 + 8 / 8, -1, -16 / 8], mean=[1 + 12 / 8, -1, 0])[agg]
    np.testing.assert_allclose(lps.td_target(lps.Args(gamma=0.5, horizon=3), batch, next_v), expected)


@pytest.mark.parametrize("agg", ["min", "mean"])
def test_update_regresses_the_critics_on_the_target_of_the_actors_own_action(state, batch, agg):
    _, metrics = lps.update(lps.replace(ARGS, q_agg=agg), state, batch, jax.random.key(0))
    p, target, b = double((state.params, state.target, batch))
    s = b["next_observations"]
    z = np_sphere(np_mlp(p["latent_actor"], s))
    a = np.clip(np_mlp(p["policy"], s, z, np.ones((B, 1)), np.ones((B, 1))), -1, 1)
    assert (np.abs(a) == 1).any() and (np.abs(a) < 1).any()  # the clip matters
    next_q = getattr(np, agg)([np_mlp(critic, s, a)[:, 0] for critic in target["mlp"]], axis=0)
    y = b["rewards"] + ARGS.gamma**2 * b["masks"] * next_q
    q = np.array([np_mlp(critic, b["observations"], b["actions"])[:, 0] for critic in p["critics"]["mlp"]])
    np.testing.assert_allclose(metrics["critics_loss"], ((q - y) ** 2).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["critics_q"], q.mean(), rtol=1e-4)


def test_critic_gradient_leaves_the_target_alone(state, batch):
    s, a, y = batch["observations"], batch["actions"], batch["rewards"]
    grad = jax.grad(lambda c: lps.critic_loss(c, s, a, y)[0])(state.params["critics"])
    critics, s, a, y = double((state.params["critics"], s, a, y))
    loss = lambda critics: np.mean([(np_mlp(critic, s, a)[:, 0] - y) ** 2 for critic in critics["mlp"]])
    assert_gradient(grad, loss, critics)


@pytest.mark.parametrize("alone", ["meanflow_loss", "critic_loss", "actor_loss"])
def test_each_loss_moves_its_own_network_only(state, batch, monkeypatch, alone):
    """With the other two losses set to zero, the networks that are not its own stay where they are, to the bit."""
    for name in {"meanflow_loss", "critic_loss", "actor_loss"} - {alone}:
        monkeypatch.setattr(lps, name, lambda *_: (jnp.zeros(()), {}))
    new, _ = lps.update(ARGS, state, batch, jax.random.key(0))
    moved = {name: not all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params[name], new.params[name])))
             for name in state.params}
    own = dict(meanflow_loss="policy", critic_loss="critics", actor_loss="latent_actor")[alone]
    assert moved == {name: name == own for name in state.params}


def test_target_is_the_tau_average_of_the_new_critics(state, batch):
    new, _ = lps.update(ARGS, state, batch, jax.random.key(0))
    expected = jax.tree.map(lambda x, y: 0.995 * x + 0.005 * y, state.target, new.params["critics"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), new.target, expected)


@pytest.mark.parametrize("latent", ["sphere", "normal", "truncated-normal"])
def test_latents_live_where_their_prior_does(state, latent):
    args = lps.replace(ARGS, latent=latent)
    s = jax.random.normal(jax.random.key(0), (5000, S))
    drawn = np.asarray(lps.draw_latent(args, jax.random.key(1), (5000, D)))
    chosen = np.asarray(lps.choose_latent(args, lps.apply(state.params["latent_actor"], 10 * s)))
    if latent == "sphere":
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), np.sqrt(D), rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(chosen, axis=1), np.sqrt(D), rtol=1e-5)
        np.testing.assert_allclose(drawn.mean(0), 0, atol=0.06)  # every direction alike
    elif latent == "truncated-normal":
        assert np.abs(drawn).max() <= 2 and np.abs(chosen).max() <= 2 and np.abs(chosen).max() > 1.9
        np.testing.assert_allclose(drawn.std(), 0.8796, rtol=0.02)  # of a standard normal cut at +-2
    else:
        assert np.abs(drawn).max() > 3.5 and np.abs(chosen).max() > 3.5
        np.testing.assert_allclose(drawn.std(), 1, rtol=0.02)


def test_acting_is_the_clipped_one_step_decoder_at_the_actors_latent(state):
    s = np.random.default_rng(0).normal(size=(7, S)).astype(np.float32)
    acted = lps.act(ARGS, state, s, jax.random.key(0))
    p = double(state.params)
    z = np_sphere(np_mlp(p["latent_actor"], s))
    expected = np.clip(np_mlp(p["policy"], s, z, np.ones((7, 1)), np.ones((7, 1))), -1, 1)
    np.testing.assert_allclose(acted, expected, atol=1e-5)
    one_by_one = [lps.act(ARGS, state, x, jax.random.key(0)) for x in s]
    np.testing.assert_allclose(acted, one_by_one, atol=1e-5)


@pytest.mark.parametrize("flow_steps", [1, 10])
def test_flow_base_backpropagates_through_the_solver(batch, flow_steps):
    args = lps.replace(ARGS, base="flow", flow_steps=flow_steps)
    state = lps.init(args, jax.random.key(0), (S,), A)
    p = state.params
    grad = jax.grad(lambda x: lps.actor_loss(args, x, p["policy"], p["critics"], batch["observations"])[0])(
        p["latent_actor"])
    s, policy, critics, actor = double((batch["observations"], p["policy"], p["critics"], p["latent_actor"]))

    def loss(actor, scale=None):
        x = np_sphere(np_mlp(actor, s))
        for i in range(flow_steps):
            x = x + np_mlp(policy, s, x, np.full((B, 1), i / flow_steps)) / flow_steps
        q = np.mean([np_mlp(critic, s, x)[:, 0] for critic in critics["mlp"]], axis=0)
        return -q.mean() / (np.abs(q).mean() if scale is None else scale), np.abs(q).mean()

    scale = loss(actor)[1]
    assert_gradient(grad, lambda x: loss(x, scale)[0], actor)


def test_initial_weights():
    """Fan-average uniform weights, zero biases, LayerNorm in the critics only, two different critics."""
    params = lps.init(lps.Args(), jax.random.key(0), (28,), 5).params
    policy, critics = params["policy"]["mlp"], params["critics"]["mlp"]
    w = policy[1]["w"]
    assert w.shape == (512, 512) and np.abs(w).max() <= np.sqrt(3 / 512)
    np.testing.assert_allclose(np.std(w), np.sqrt(1 / 512), rtol=0.01)
    assert [x["w"].shape for x in policy][::4] == [(28 + 25 + 2, 512), (512, 25)]
    assert all((layer["b"] == 0).all() for layer in policy)
    assert "scale" not in policy[0] and "scale" in critics[0][3]
    assert not np.array_equal(critics[0][0]["w"], critics[1][0]["w"])
