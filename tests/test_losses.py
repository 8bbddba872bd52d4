"""The mathematics of every script against plain NumPy in float64: losses, gradients, targets, acting, who moves whom.

Noise is injected: while a script updates or acts, a draw of a given shape has the numbers that NoiseOf gives to it. The
gradient of a loss is read from Adam's first moment, which after one update is a tenth of it."""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carry import SCRIPTS
from helpers import (
    GIVEN,
    B,
    D,
    H,
    S,
    assert_same_tree,
    double,
    load,
    make_args,
    make_batch,
    make_state,
    np_best_of,
    np_flow,
    np_meanflow,
    np_mlp,
    np_q,
    np_sphere,
    params,
)

GAMMA, TAU = 0.9, 0.1


class NoiseOf:
    """Takes the place of jax.random.normal and jax.random.uniform, and notes the keys that it is asked with."""

    def __init__(self, patch):
        self.keys = {}
        patch.setattr(jax.random, "normal", partial(self.draw, self.normal))
        patch.setattr(jax.random, "uniform", partial(self.draw, self.uniform))

    def draw(self, numbers, key, shape):
        self.keys.setdefault(tuple(shape), []).append(jax.random.key_data(key))
        return jnp.asarray(numbers(*shape), jnp.float32)

    @staticmethod
    def normal(*shape):
        return np.float64(np.float32(np.random.default_rng(shape).normal(size=shape)))

    @staticmethod
    def uniform(*shape):
        return np.float64(np.float32(np.random.default_rng(shape).uniform(size=shape)))


def quick(function, *given):
    """What a function returns, jitted with little optimization: it is called once."""
    options = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
    return jax.jit(function).lower(*given).compile(compiler_options=options)(*given)


@cache
def updated(name, **more):
    """One update of a script: the state before it (p: in float64), the batch in float64, the state after it, the state
    after each loss alone, the metrics, and the keys of the noise."""
    script, alone = load(name), {}
    args = make_args(script, gamma=GAMMA, tau=TAU, **more)
    state, batch, descend = make_state(script, args), make_batch(), script.descend

    def each_alone(state, losses):
        alone.update({network: descend(state, {network: loss})[0] for network, loss in losses.items()})
        return descend(state, losses)

    with pytest.MonkeyPatch.context() as patch:
        noise = NoiseOf(patch)
        patch.setattr(script, "descend", each_alone)

        def update(state, batch):
            return *script.update(args, state, batch, jax.random.key(0)), alone, noise.keys

        new, metrics, alone, keys = quick(update, state, batch)
    b = double(batch)
    return SimpleNamespace(args=args, state=state, new=new, alone=alone, metrics=metrics, keys=keys, p=params(state),
                           b=b, s=b["observations"], a=b["actions"], next_s=b["next_observations"],
                           e=NoiseOf.normal(B, D), t=NoiseOf.uniform(B, 1))


# --------------------------------------------------------------------------------------------------- losses, one by one


def partly_clipped(a):
    """A chunk in which the clip has changed something, and not everything."""
    assert (np.abs(a) == 1).any() and (np.abs(a) < 1).any()
    return a


def flow_errors(policy, s, a, e, t, *label):
    """Of flow matching, one for each row."""
    return ((np_mlp(policy, s, (1 - t) * a + t * e, t, *label) - (e - a)) ** 2).mean(axis=1)


def times(n):
    """t and r of MeanFlow: the larger and the smaller of two draws; equal in the first three quarters of the batch."""
    draws = 1 / (1 + np.exp(0.4 - NoiseOf.normal(2, n, 1)))
    t, r = draws.max(axis=0), draws.min(axis=0)
    r[: n * 3 // 4] = t[: n * 3 // 4]
    return t, r


def meanflow_loss(f, a, e, t, r):
    """For f(params, z, t, r); what stands under sg stays as it is at the parameters that are given first."""
    z, v, eps = (1 - t) * a + t * e, e - a, 1e-6
    frozen = []

    def loss(p):
        if not frozen:
            df_dt = (f(p, z + eps * v, t + eps, r) - f(p, z - eps * v, t - eps, r)) / (2 * eps)
            u_star = v - (t - r) * (v - df_dt)
            err = ((z - f(p, z, t, r) - u_star) ** 2).mean(axis=1)
            frozen.extend([u_star, 1 / np.sqrt(err + 1e-3)])
        u_star, weight = frozen
        return (((z - f(p, z, t, r) - u_star) ** 2).mean(axis=1) * weight).mean()

    return loss


def meanflow_imitation(u, e):
    def f(policy, z, t, r):
        return np_mlp(policy, u.s, z, t, t - r)

    return meanflow_loss(f, u.a, e, *times(B))


def critic_loss(u, next_v):
    """On y = sum_i gamma^i r_i + gamma^H m next_v; the sum is the batch's."""
    y = u.b["rewards"] + GAMMA**H * u.b["masks"] * next_v

    def loss(critic):
        return ((np_q(critic, u.s, u.a) - y) ** 2).mean()

    return loss


def climb(q):
    """-lambda E q(params), lambda = sg(1 / E |q|)."""
    frozen = []

    def loss(p):
        frozen.append(1 / np.abs(q(p)).mean())
        return -frozen[0] * q(p).mean()

    return loss


def student_loss(u, taught):
    def q(student):
        a = partly_clipped(np.clip(np_mlp(student, u.s, u.e), -1, 1))
        return np_q(u.p["critic"], u.s, a).mean(axis=0)

    climbing = climb(q)

    def loss(student):
        return u.args.alpha * ((np_mlp(student, u.s, u.e) - taught) ** 2).mean() + climbing(student)

    return loss


def expectile_loss(u, value):
    target_q = np_q(u.p["target_critic"], u.s, u.a).min(axis=0)

    def loss(p):
        error = target_q - value(p)
        assert (error > 0).any() and (error < 0).any()
        return np.where(error > 0, u.args.expectile * error**2, (1 - u.args.expectile) * error**2).mean()

    return loss


# -------------------------------------------------------------------------------- the losses of the scripts, by network


def lps(u):
    def q(actor):
        a = np_meanflow(u.p["policy"], u.s, np_sphere(np_mlp(actor, u.s)), u.args.decode_steps)
        return np_q(u.p["critic"], u.s, partly_clipped(a)).mean(axis=0)

    climbing = climb(q)
    next_z = np_sphere(np_mlp(u.p["latent_actor"], u.next_s))
    next_a = np_meanflow(u.p["policy"], u.next_s, next_z, u.args.decode_steps)
    return dict(policy=meanflow_imitation(u, np_sphere(u.e)),
                critic=critic_loss(u, np_q(u.p["target_critic"], u.next_s, partly_clipped(next_a)).min(axis=0)),
                latent_actor=lambda actor: u.args.alpha * climbing(actor))


def mf_bon(u):
    z = np_sphere(NoiseOf.normal(B * u.args.num_samples_target, D))
    _, next_v = np_best_of(np_meanflow, u.p, u.p["target_critic"], u.next_s, z)
    return dict(policy=meanflow_imitation(u, np_sphere(u.e)), critic=critic_loss(u, next_v))


def dsrl(u):
    z = np_sphere(u.e)
    distilled = np_q(u.p["critic"], u.s, np_flow(u.p["policy"], u.s, z, u.args.flow_steps)).mean(axis=0)
    next_z = np_sphere(np_mlp(u.p["latent_actor"], u.next_s))
    next_a = np_flow(u.p["policy"], u.next_s, next_z, u.args.flow_steps)

    def q(actor):
        return np_q(u.p["latent_critic"], u.s, np_sphere(np_mlp(actor, u.s))).mean(axis=0)

    return dict(policy=lambda policy: flow_errors(policy, u.s, u.a, z, u.t).mean(),
                critic=critic_loss(u, np_q(u.p["target_critic"], u.next_s, next_a).mean(axis=0)),
                latent_critic=lambda critic: ((np_q(critic, u.s, z) - distilled) ** 2).mean(), latent_actor=climb(q))


def qc_fql(u):
    next_a = np.clip(np_mlp(u.p["student"], u.next_s, u.e), -1, 1)
    return dict(policy=lambda policy: flow_errors(policy, u.s, u.a, u.e, u.t).mean(),
                critic=critic_loss(u, np_q(u.p["target_critic"], u.next_s, partly_clipped(next_a)).mean(axis=0)),
                student=student_loss(u, np_flow(u.p["policy"], u.s, u.e)))


def qc_mfql(u):
    next_a = np.clip(np_mlp(u.p["student"], u.next_s, u.e), -1, 1)
    return dict(policy=meanflow_imitation(u, u.e),
                critic=critic_loss(u, np_q(u.p["target_critic"], u.next_s, partly_clipped(next_a)).min(axis=0)),
                student=student_loss(u, np_meanflow(u.p["policy"], u.s, u.e)))


def gfp(u):
    next_a = np.clip(np_mlp(u.p["student"], u.next_s, u.e), -1, 1)
    next_q = np_q(u.p["target_critic"], u.next_s, partly_clipped(next_a)).mean(axis=0)
    if u.args.target == "both":
        next_a = np_flow(u.p["policy"], u.next_s, u.e)
        next_q = (next_q + np_q(u.p["target_critic"], u.next_s, next_a).mean(axis=0)) / 2
    mu = partly_clipped(np.clip(np_mlp(u.p["student"], u.s, u.e), -1, 1))
    q = np_q(u.p["target_critic"], u.s, u.a).mean(axis=0)
    better = (q - np_q(u.p["target_critic"], u.s, mu).mean(axis=0)) / np.abs(q).mean() / u.args.eta
    g = np.exp(-np.logaddexp(0, -better))
    assert g.min() < 0.2 and g.max() > 0.8
    np.testing.assert_allclose(u.metrics["policy_g"], g.mean(), rtol=1e-4)
    return dict(policy=lambda policy: (g * flow_errors(policy, u.s, u.a, u.e, u.t)).mean(),
                critic=critic_loss(u, next_q), student=student_loss(u, np_flow(u.p["policy"], u.s, u.e)))


def cfgrl(u):
    q, v = np_q(u.p["target_critic"], u.s, u.a).min(axis=0), np_q(u.p["value"], u.s).mean(axis=0)
    o = (q > v).astype(float)
    assert 0 < o.sum() < B and np.isclose(u.metrics["policy_better"], o.mean())
    one, zero = np.ones((B, 1)), np.zeros((B, 1))

    def policy_loss(policy):
        better = o * flow_errors(policy, u.s, u.a, u.e, u.t, one)
        return (better + 0.1 * flow_errors(policy, u.s, u.a, u.e, u.t, zero)).mean()

    return dict(policy=policy_loss, critic=critic_loss(u, np_q(u.p["value"], u.next_s)),  # y_k with V_k
                value=expectile_loss(u, lambda value: np_q(value, u.s)))


def ifql(u):
    return dict(policy=lambda policy: flow_errors(policy, u.s, u.a, u.e, u.t).mean(),
                critic=critic_loss(u, np_mlp(u.p["value"], u.next_s)[:, 0]),
                value=expectile_loss(u, lambda value: np_mlp(value, u.s)[:, 0]))


def flow_bc(u):
    return dict(policy=lambda policy: flow_errors(policy, u.s, u.a, u.e, u.t).mean())


def mf_bc(u):
    return dict(policy=meanflow_imitation(u, u.e))


CASES = [
    (lps, {}), (lps, dict(decode_steps=4, alpha=0.7)), (mf_bon, dict(num_samples_target=3)), (dsrl, {}),
    (qc_fql, GIVEN["qc_fql"]), (qc_mfql, GIVEN["qc_mfql"]), (gfp, GIVEN["gfp"]),
    (gfp, dict(alpha=0.7, eta=1e-5, target="student")), (cfgrl, {}), (ifql, GIVEN["ifql"]), (flow_bc, {}), (mf_bc, {})]
EACH_CASE = pytest.mark.parametrize("losses, more", CASES, ids=lambda x: getattr(x, "__name__", None) or str(x))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(double(tree))])


def assert_gradient(grad, loss, network):
    """grad is that of the float64 loss at these parameters, along a few random directions, by central differences."""
    leaves, structure = jax.tree.flatten(network)
    rng, eps = np.random.default_rng(0), 1e-6
    for _ in range(5):
        direction = [rng.normal(size=x.shape) for x in leaves]
        ahead, behind = (loss(structure.unflatten([x + h * y for x, y in zip(leaves, direction)])) for h in (eps, -eps))
        along = sum((x * y).sum() for x, y in zip(jax.tree.leaves(double(grad)), direction))
        np.testing.assert_allclose(along, (ahead - behind) / (2 * eps), rtol=2e-3, atol=2e-5)


@EACH_CASE
def test_losses_and_gradients(losses, more):
    u = updated(losses.__name__, **more)
    expected = losses(u)
    assert expected.keys() == u.state.keys() - {"target_critic"}
    for name, loss in expected.items():
        np.testing.assert_allclose(u.metrics[f"{name}_loss"], loss(u.p[name]), rtol=2e-4, err_msg=name)
        grad = jax.tree.map(lambda x: x * 10, u.new[name].opt_state[0].mu)
        assert_gradient(grad, loss, u.p[name])
    if "critic" in expected:
        np.testing.assert_allclose(u.metrics["critic_q"], np_q(u.p["critic"], u.s, u.a).mean(), rtol=1e-4)


@EACH_CASE
def test_an_update(losses, more):
    """It is one step of Adam for each network, and the target critics become the tau average with the new critics."""
    u = updated(losses.__name__, **more)
    after = params(u.new)
    for network in u.state.keys() - {"target_critic"}:
        grad = flat(u.new[network].opt_state[0].mu) * 10
        step = u.args.learning_rate * grad / (np.abs(grad) + 1e-8)
        np.testing.assert_allclose(flat(u.p[network]) - flat(after[network]), step, atol=1e-6)
    if "critic" in u.state:
        average = (1 - TAU) * flat(u.p["target_critic"]) + TAU * flat(after["critic"])
        np.testing.assert_allclose(flat(after["target_critic"]), average, rtol=1e-5, atol=1e-7)
    # e, and the noise of a' where a student acts, are drawn with keys of their own
    keys = {tuple(np.asarray(key).tolist()) for key in u.keys[B, D]}
    assert len(keys) == (2 if "student" in u.state else 1)


@EACH_CASE
def test_each_loss_moves_its_own_network_only(losses, more):
    """With one of its losses alone, every other network stays to the bit."""
    u = updated(losses.__name__, **more)
    assert u.alone.keys() == u.state.keys() - {"target_critic"}
    for network, after in u.alone.items():
        moved = {other for other, x in params(after).items() if not np.array_equal(flat(x), flat(u.p[other]))}
        assert moved == {network}
        np.testing.assert_allclose(flat(after[network].params), flat(u.new[network].params), atol=1e-7)


# --------------------------------------------------------------------------------------------------------------- acting


def acting(name, args, p, s):
    """The chunks at observations s, by hand."""
    e = NoiseOf.normal(len(s), D)
    if name == "lps":
        return np_meanflow(p["policy"], s, np_sphere(np_mlp(p["latent_actor"], s)), args.decode_steps)
    if name == "dsrl":
        return np_flow(p["policy"], s, np_sphere(np_mlp(p["latent_actor"], s)))
    if name in ("qc_fql", "qc_mfql", "gfp"):
        return np.clip(np_mlp(p["student"], s, e), -1, 1)
    if name == "mf_bon":
        z = np_sphere(NoiseOf.normal(len(s) * args.num_samples, D))
        return np_best_of(np_meanflow, p, p["critic"], s, z)[0]
    if name == "ifql":
        return np_best_of(np_flow, p, p["critic"], s, NoiseOf.normal(len(s) * args.num_samples, D))[0]
    if name == "mf_bc":
        return np_meanflow(p["policy"], s, e)
    if name == "flow_bc":
        return np_flow(p["policy"], s, e, args.flow_steps)
    for t in np.linspace(1, 0, 10, endpoint=False):  # cfgrl
        v_0, v_1 = (np_mlp(p["policy"], s, e, np.full((len(s), 1), t), np.full((len(s), 1), o)) for o in (0.0, 1.0))
        e = e - (v_0 + args.guidance * (v_1 - v_0)) / 10
    return np.clip(e, -1, 1)


@pytest.mark.parametrize("name, more", [
    ("lps", dict(decode_steps=1)), ("lps", dict(decode_steps=2)), ("lps", dict(decode_steps=4)), ("dsrl", {}),
    ("qc_fql", {}), ("qc_mfql", {}), ("gfp", {}), ("mf_bon", dict(num_samples=5)), ("ifql", dict(num_samples=5)),
    ("mf_bc", {}), ("flow_bc", {}), ("flow_bc", dict(flow_steps=3)), ("cfgrl", dict(guidance=0.0)),
    ("cfgrl", dict(guidance=1.0)), ("cfgrl", dict(guidance=1.5))])
def test_acting(monkeypatch, name, more):
    script = load(name)
    args = make_args(script, **more)
    state, s = make_state(script, args), np.random.default_rng(3).normal(size=(7, S)).astype(np.float32)
    NoiseOf(monkeypatch)
    acted = quick(lambda state, s: script.act(args, state, s, jax.random.key(0)), state, s)
    np.testing.assert_allclose(acted, partly_clipped(acting(name, args, params(state), np.float64(s))), atol=2e-5)


# ------------------------------------------------------------------------------------------------- imitation in general


@pytest.mark.parametrize("n", [15, 2, 1])
def test_meanflow_of_small_batches(monkeypatch, n):
    """The share with r = t is rounded down; the last row of each batch is never in it."""
    script = load("mf_bc")
    state, batch = make_state(script, make_args(script)), make_batch()
    s, a, e = batch["observations"][:n], batch["actions"][:n], jnp.asarray(NoiseOf.normal(n, D), jnp.float32)
    NoiseOf(monkeypatch)
    policy = state["policy"]

    def loss(p):
        return script.imitation_loss(policy, p, s, a, e, jax.random.key(0))[0]

    value, grad = quick(jax.value_and_grad(loss), policy.params)
    s64, t, r = np.float64(s), *times(n)
    assert (t > r).sum() == n - n * 3 // 4
    expected = meanflow_loss(lambda p, z, t, r: np_mlp(p, s64, z, t, t - r), np.float64(a), np.float64(e), t, r)
    np.testing.assert_allclose(value, expected(double(policy.params)), rtol=1e-4)
    assert_gradient(grad, expected, double(policy.params))


@pytest.mark.parametrize("name", ["flow_bc", "dsrl", "qc_fql", "ifql", "gfp", "cfgrl"])
def test_decoding_solves_a_linear_field(name):
    """dz/dt = t - z has the solutions z = t - 1 + z(1) e^(1-t), z(0) = z(1) e - 1. The error falls like the step."""
    script, z = load(name), jnp.linspace(0.1, 0.7, 6).reshape(2, 3)

    def field(params, s, *inputs, encode=False):
        return s if encode else inputs[1] - inputs[0]

    def decoded(n):
        policy = SimpleNamespace(apply_fn=field, params=None)
        return script.decode(make_args(script, flow_steps=n), policy, jnp.zeros((2, S)), z)

    error = {n: np.abs(decoded(n) - (z * np.e - 1)).max() for n in (10, 100, 200)}
    np.testing.assert_allclose(decoded(1), z - (1 - z), atol=1e-6)
    assert error[200] < 0.02 and 1.8 < error[100] / error[200] < 2.2 and 7 < error[10] / error[100] < 13


# ------------------------------------------------------------------------------------------------------------- networks


def test_initial_weights():
    """Fan-average uniform weights, zero biases, two different critics."""
    lps = load("lps")
    state = quick(lambda key: lps.init(lps.Args(action_dim=5), key, jnp.zeros((1, 28))), jax.random.key(0))
    policy, critics = state["policy"].params["params"], state["critic"].params["params"]
    w = policy["Dense_1"]["kernel"]
    assert w.shape == (512, 512) and np.abs(w).max() <= np.sqrt(3 / 512)
    np.testing.assert_allclose(np.std(w), np.sqrt(1 / 512), rtol=0.01)
    assert all((layer["bias"] == 0).all() for layer in policy.values())
    first, second = (critics[f"Network_{k}"]["Dense_0"]["kernel"] for k in range(2))
    assert not np.array_equal(first, second)
    assert_same_tree(state["target_critic"], state["critic"].params)


@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_are_as_wide_as_the_paper_says(name):
    """LayerNorm in critics and values alone; time, latent or label beside the observation and the chunk."""
    script = load(name)
    state = jax.eval_shape(lambda: script.init(script.Args(action_dim=5), jax.random.key(0), jnp.zeros((1, 28))))
    inputs = dict(policy=55 if name in ("mf_bc", "lps", "mf_bon", "qc_mfql", "cfgrl") else 54, critic=53, value=28,
                  latent_critic=53, latent_actor=28, student=53)
    hidden = dict(policy=[512] * 4, student=[512] * 4, latent_actor=[256] * 2 if name == "lps" else [512] * 4)
    for network in state.keys() - {"target_critic"}:
        layers = state[network].params["params"]
        pair = network in ("critic", "latent_critic") or (name, network) == ("cfgrl", "value")
        assert pair == ("Network_0" in layers)
        for net in [layers["Network_0"], layers["Network_1"]] if pair else [layers]:
            dims = [inputs[network], *hidden.get(network, [256] * 4), 25 if network in hidden else 1]
            shapes = [net[f"Dense_{i}"]["kernel"].shape for i in range(len(dims) - 1)]
            assert shapes == list(zip(dims, dims[1:]))
            assert sum("LayerNorm" in layer for layer in net) == (0 if network in hidden else 4)
