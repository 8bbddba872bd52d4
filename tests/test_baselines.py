"""The baselines' own losses against plain NumPy in float64, and which network each of them moves. What they share with
lps.py, word for word (test_shared_text.py), is tested there."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carry import SCRIPTS
from test_losses import A, B, D, S, assert_gradient, double, np_meanflow, np_mlp, np_sphere, times

import cfgrl
import dsrl
import flow_bc
import qc_fql
import qc_mfql

SIZES = dict(horizon=2, actor_hidden_dims=(8, 8), critic_hidden_dims=(9, 7))
KEY = jax.random.key(42)


def make_args(script, **more):
    args = script.Args(**SIZES | more)
    script.check_args(args)
    return args


def make_state(script, args):
    """A state whose biases, scales and targets are not at their initial values."""
    state = script.init(args, jax.random.key(0), (S,), A)
    leaves, structure = jax.tree.flatten((state.params, state.target))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params, target = structure.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
    return script.State(params, target, state.opt_state)


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    batch = dict(observations=rng.normal(size=(B, S)), actions=rng.uniform(-1, 1, (B, D)), rewards=rng.normal(size=B),
                 masks=np.arange(B) % 4 > 0, next_observations=rng.normal(size=(B, S)))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)


def recorded(script, monkeypatch, args, state, batch):
    """What update computes: (new state, metrics, the losses as it hands them to descend)."""
    losses, descend = {}, script.descend

    def spy(args, state, given):
        losses.update(given)
        return descend(args, state, given)

    monkeypatch.setattr(script, "descend", spy)
    return *script.update(args, state, batch, KEY), losses


def assert_loss(losses, name, state, expected, rtol=2e-3):
    """The named loss has the float64 value and gradient of expected(network)."""
    value, grad = jax.value_and_grad(lambda x: losses[name](x)[0])(state.params[name])
    network = double(state.params[name])
    np.testing.assert_allclose(value, expected(network), rtol=1e-4)
    assert_gradient(grad, expected, network, rtol)


def np_q(critics, s, a):
    return np.array([np_mlp(critic, s, a)[:, 0] for critic in critics["mlp"]])


def np_euler(v, x, steps=10):
    for i in range(steps):
        x = x + v(x, np.full((len(x), 1), i / steps)) / steps
    return np.clip(x, -1, 1)


def np_flow(policy, s, x):
    return np_euler(lambda x, t: np_mlp(policy, s, x, t), x)


def np_one_step(policy, s, e):
    return np.clip(np_mlp(policy, s, e, np.ones((len(s), 1)), np.ones((len(s), 1))), -1, 1)


def draws(batch):
    """What every update draws: the key for acting at s', the prior's noise, the flow's times."""
    act_key, prior_key, time_key = jax.random.split(KEY, 3)
    t = np.asarray(jax.random.uniform(time_key, (B, 1)), np.float64)
    return act_key, np.asarray(jax.random.normal(prior_key, batch["actions"].shape), np.float64), t, time_key


def np_flow_loss(policy, s, a, x0, t, *o):
    return (np_mlp(policy, s, (1 - t) * x0 + t * a, t, *o) - (a - x0)) ** 2


def np_y(batch, next_v):
    return batch["rewards"] + 0.99**2 * batch["masks"] * next_v


# ---------------------------------------------------------------------------------- qc_fql and qc_mfql: distillation


@pytest.mark.parametrize("script, teacher, agg", [(qc_fql, np_flow, "mean"), (qc_mfql, np_one_step, "min")])
def test_student_is_pulled_by_teacher_and_critics(monkeypatch, batch, script, teacher, agg):
    args = make_args(script, alpha=0.7)
    state = make_state(script, args)
    _, metrics, losses = recorded(script, monkeypatch, args, state, batch)
    act_key, e, t, time_key = draws(batch)
    p, target, b = double((state.params, state.target, batch))
    s, a, next_s = b["observations"], b["actions"], b["next_observations"]
    taught, scale = teacher(p["policy"], s, e), []

    def student_loss(student):
        mu = np_mlp(student, s, e)
        q = np_q(p["critics"], s, np.clip(mu, -1, 1)).mean(0)
        scale.append(1 / np.abs(q).mean())  # the first call's is kept, as under sg
        return 0.7 * ((mu - taught) ** 2).mean() - scale[0] * q.mean()

    assert_loss(losses, "student", state, student_loss)
    next_e = np.asarray(jax.random.normal(act_key, (B, D)), np.float64)
    next_a = np.clip(np_mlp(p["student"], next_s, next_e), -1, 1)
    y = np_y(b, getattr(np, agg)(np_q(target, next_s, next_a), axis=0))
    assert_loss(losses, "critics", state, lambda critics: ((np_q(critics, s, a) - y) ** 2).mean())
    if script is qc_fql:
        assert_loss(losses, "policy", state, lambda policy: np_flow_loss(policy, s, a, e, t).mean())
    else:
        expected, _ = np_meanflow(lambda z, t, r: np_mlp(p["policy"], s, z, t, t - r), a, e, *times(time_key, B))
        np.testing.assert_allclose(metrics["policy_loss"], expected, rtol=1e-4)


def test_alphas_follow_the_domain():
    alphas = {"cube-single": 30, "cube-double": 3, "scene": 1, "puzzle-3x3": 3, "puzzle-4x4": 10, "visual-scene": 1}
    for script in (qc_fql, qc_mfql):
        for domain, alpha in alphas.items():
            args = make_args(script, env_id=f"{domain}-play-singletask-task2-v0")
            assert (args.alpha, args.sparse) == (alpha, domain in ("scene", "visual-scene", "puzzle-3x3"))
            assert make_args(script, env_id=f"{domain}-play-singletask-v0", alpha=0.5, sparse=False).alpha == 0.5


# --------------------------------------------------------------------------------------------------------------- dsrl


def test_dsrl(monkeypatch, batch):
    args = make_args(dsrl)
    state = make_state(dsrl, args)
    _, metrics, losses = recorded(dsrl, monkeypatch, args, state, batch)
    _, e, t, _ = draws(batch)
    z = np_sphere(e)
    p, target, b = double((state.params, state.target, batch))
    s, a, next_s = b["observations"], b["actions"], b["next_observations"]
    distilled, scale = np_q(p["critics"], s, np_flow(p["policy"], s, z)).mean(0), []

    def actor_loss(actor):
        q = np_q(p["latent_critics"], s, np_sphere(np_mlp(actor, s))).mean(0)
        scale.append(1 / np.abs(q).mean())
        return -scale[0] * q.mean()

    assert_loss(losses, "latent_actor", state, actor_loss)
    assert_loss(losses, "latent_critics", state, lambda critics: ((np_q(critics, s, z) - distilled) ** 2).mean())
    next_a = np_flow(p["policy"], next_s, np_sphere(np_mlp(p["latent_actor"], next_s)))
    y = np_y(b, np_q(target, next_s, next_a).mean(0))
    assert_loss(losses, "critics", state, lambda critics: ((np_q(critics, s, a) - y) ** 2).mean())
    assert_loss(losses, "policy", state, lambda policy: np_flow_loss(policy, s, a, z, t).mean())
    assert metrics["latent_critics_q"] != metrics["critics_q"]


# -------------------------------------------------------------------------------------------------------------- cfgrl


def test_cfgrl(monkeypatch, batch):
    args = make_args(cfgrl)
    state = make_state(cfgrl, args)
    _, metrics, losses = recorded(cfgrl, monkeypatch, args, state, batch)
    prior_key, time_key = jax.random.split(KEY)
    x0, t = (np.asarray(x, np.float64) for x in (jax.random.normal(prior_key, (B, D)),
                                                 jax.random.uniform(time_key, (B, 1))))
    p, target, b = double((state.params, state.target, batch))
    s, a = b["observations"], b["actions"]
    q, v = np_q(target, s, a).min(0), np_mlp(p["value"], s)[:, 0]
    o = (q - v > 0).astype(float)
    assert 0 < o.sum() < B and np.isclose(metrics["policy_better"], o.mean())  # both signs occur

    def value_loss(value):
        u = q - np_mlp(value, s)[:, 0]
        return np.where(u > 0, 0.9 * u**2, 0.1 * u**2).mean()

    def policy_loss(policy):
        conditional = np_flow_loss(policy, s, a, x0, t, np.ones((B, 1))).mean(1)
        return (o * conditional).mean() + 0.1 * np_flow_loss(policy, s, a, x0, t, np.zeros((B, 1))).mean()

    assert_loss(losses, "value", state, value_loss)
    assert_loss(losses, "policy", state, policy_loss)
    y = np_y(b, np_mlp(p["value"], b["next_observations"])[:, 0])
    assert_loss(losses, "critics", state, lambda critics: ((np_q(critics, s, a) - y) ** 2).mean())


def test_expectile_loss_finds_the_expectile():
    """Of 0 and 1, half each, the 0.9-expectile is 0.9: there the loss is smallest."""
    q = jnp.array([0.0, 1.0])
    value = lambda v: dict(mlp=[dict(w=jnp.zeros((S, 1)), b=jnp.array([v]))])
    s = jnp.zeros((2, S))
    loss = {v: float(cfgrl.expectile_loss(cfgrl.Args(), value(v), s, q)[0]) for v in (0.5, 0.89, 0.9, 0.91)}
    assert min(loss, key=loss.get) == 0.9


@pytest.mark.parametrize("w", [0.0, 1.0, 1.5])
def test_guidance(batch, w):
    args = make_args(cfgrl, guidance=w)
    state = make_state(cfgrl, args)
    acted = cfgrl.act(args, state, batch["observations"], KEY)
    x0, s, policy = double((jax.random.normal(KEY, (B, D)), batch["observations"], state.params["policy"]))

    def v(x, t):
        v_0, v_1 = (np_mlp(policy, s, x, t, np.full((B, 1), o)) for o in (0.0, 1.0))
        return v_0 + w * (v_1 - v_0)

    expected = np_euler(v, x0)
    assert (np.abs(expected) < 1).any()
    np.testing.assert_allclose(acted, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ flow_bc


@pytest.mark.parametrize("policy", ["flow", "meanflow"])
def test_flow_bc(monkeypatch, batch, policy):
    args = make_args(flow_bc, policy=policy)
    state = make_state(flow_bc, args)
    _, metrics, losses = recorded(flow_bc, monkeypatch, args, state, batch)
    assert list(losses) == ["policy"] and state.target is None
    prior_key, time_key = jax.random.split(KEY)
    e = jax.random.normal(prior_key, (B, D))
    s, a, e, p = double((batch["observations"], batch["actions"], e, state.params["policy"]))
    if policy == "flow":
        t = np.asarray(jax.random.uniform(time_key, (B, 1)), np.float64)
        assert_loss(losses, "policy", state, lambda policy: np_flow_loss(policy, s, a, e, t).mean())
    else:
        expected, _ = np_meanflow(lambda z, t, r: np_mlp(p, s, z, t, t - r), a, e, *times(time_key, B))
        np.testing.assert_allclose(metrics["policy_loss"], expected, rtol=1e-4)
    noise, s = double((jax.random.normal(KEY, (B, D)), batch["observations"]))
    expected = np_flow(p, s, noise) if policy == "flow" else np_one_step(p, s, noise)
    np.testing.assert_allclose(flow_bc.act(args, state, batch["observations"], KEY), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_loss_moves_its_own_network_only(name, batch):
    """With one loss alone, the other networks stay to the bit: teachers, critics, base and latent critics alike."""
    script = import_module(name)
    args = make_args(script)
    state, descend = make_state(script, args), script.descend
    for alone in state.params:
        def one_loss(args, state, losses, alone=alone):
            silent = lambda _: (jnp.zeros(()), {})
            return descend(args, state, {name: loss if name == alone else silent for name, loss in losses.items()})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "descend", one_loss)
            new, _ = script.update(args, state, batch, KEY)
        same = {name: all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params[name], new.params[name])))
                for name in state.params}
        assert same == {name: name != alone for name in state.params}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "flow_bc"])
def test_targets_follow_the_critics(name, batch):
    script = import_module(name)
    args = make_args(script)
    state = make_state(script, args)
    new, _ = script.update(args, state, batch, KEY)
    expected = jax.tree.map(lambda x, y: 0.995 * x + 0.005 * y, state.target, new.params["critics"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), new.target, expected)


@pytest.mark.parametrize("name", SCRIPTS)
def test_acting_is_the_same_one_by_one(name):
    """One observation or many: the evaluation calls act for one, the update for a batch. Chunks lie in [-1, 1]."""
    script = import_module(name)
    args = make_args(script)
    state = make_state(script, args)
    s = 3 * jax.random.normal(KEY, (5, S))
    one = script.act(args, state, s[0], KEY)
    assert one.shape == (D,)
    np.testing.assert_allclose(one, script.act(args, state, s[:1], KEY)[0], atol=1e-5)
    assert np.abs(script.act(args, state, s, KEY)).max() <= 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_are_as_wide_as_the_paper_says(name):
    script = import_module(name)
    args = script.Args()
    script.check_args(args)
    params = script.init(args, jax.random.key(0), (28,), 5).params
    inputs = dict(policy=dict(lps=55, qc_mfql=55, cfgrl=55).get(name, 54), critics=53, latent_critics=53, value=28,
                  latent_actor=28, student=53)
    hidden = dict(policy=[512] * 4, student=[512] * 4, latent_actor=[256] * 2 if name == "lps" else [512] * 4)
    for key, network in params.items():
        nets = network["mlp"] if "critics" in key else [network["mlp"]]
        dims = [inputs[key], *hidden.get(key, [256] * 4), 25 if key in hidden else 1]
        assert [[layer["w"].shape for layer in net] for net in nets] == [list(zip(dims, dims[1:]))] * len(nets)
        assert len(nets) == (2 if "critics" in key else 1)
        assert ("scale" in nets[0][0]) == (key in ("critics", "latent_critics", "value"))
