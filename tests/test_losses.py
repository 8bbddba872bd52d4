"""The mathematics of every script against plain NumPy in float64: losses and what is logged of
them, gradients, y, which network each loss moves, and actions.

While a script updates or acts, what it draws are numbers of ours: others for each shape and for
each key. The gradient of a loss is read from Adam's first moment, which after one update is a tenth
of it.
"""

from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
    make_state,
    np_mlp,
    np_q,
    params,
)

GAMMA = 0.9
TAU = 0.1
MEANFLOWS = ("lps", "mf_bon", "qc_mfql", "mf_bc")


def normal(*shape, i=0):
    """What the i-th key gives that is asked for this shape."""
    return np.random.default_rng([i, *shape]).normal(size=shape).astype(np.float32).astype(float)


def uniform(*shape, i=0):
    return np.random.default_rng([i, *shape]).uniform(size=shape).astype(np.float32).astype(float)


def integers(*shape, i=0):
    return np.random.default_rng([i, *shape]).integers(0, 4, shape)  # of F = 3 steps


def inject(patch):
    """Lets JAX draw these numbers. Gives the keys, which it notes for each shape."""
    noted = {}

    def draw(numbers, key, shape, *limits):
        keys = noted.setdefault((numbers.__name__, *shape), [])
        known = [i for i in range(len(keys)) if keys[i] is key]
        if not known:
            keys.append(key)
        return jnp.asarray(numbers(*shape, i=known[0] if known else len(keys) - 1), jnp.float32)

    patch.setattr(jax.random, "normal", partial(draw, normal))
    patch.setattr(jax.random, "uniform", partial(draw, uniform))
    patch.setattr(jax.random, "randint", partial(draw, integers))
    return noted


@cache
def updated(name, **more):
    """An update of a script: its parameters before it (p), its state after it, what it logs, the
    keys that it drew with, and the actions before it. Parameters and batch are in float64.
    """
    script = load(name)
    args = make_args(script, gamma=GAMMA, tau=TAU, **more)
    state = make_state(script, args)
    batch = dict(
        observations=normal(B, S),
        actions=2 * uniform(B, D) - 1,
        rewards=normal(B),
        masks=np.arange(B) % 4 > 0,
        next_observations=normal(B, S)[::-1],
    )

    def run(state, batch):
        noted = inject(patch)
        new, metrics = script.update(args, state, batch, jax.random.key(0))
        drawn = jnp.stack([jax.random.key_data(key) for keys in noted.values() for key in keys])
        inject(patch)
        acted = script.act(args, state, batch["observations"], jax.random.key(0))
        return dict(new=new, metrics=metrics, drawn=drawn, acted=acted)

    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
    quick = dict(xla_backend_optimization_level=0, xla_llvm_disable_expensive_passes=True)
    with pytest.MonkeyPatch.context() as patch:
        compiled = jax.jit(run).lower(state, single).compile(compiler_options=quick)
    u = SimpleNamespace(name=name, args=args, p=params(state), **compiled(state, single))
    u.batch = double(single)
    u.s = u.batch["observations"]
    u.a = u.batch["actions"]
    u.next_s = u.batch["next_observations"]
    u.e = normal(B, D)
    return u


# ========================================================================================== Actions


def np_sphere(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True) * np.sqrt(x.shape[-1])


def clip(a):
    """This changes some numbers here, and not all."""
    clipped = np.clip(a, -1, 1)
    assert 0 < (clipped == a).mean() < 1
    return clipped


def slopes(f, x):
    """df_o / dx_i of each row, [B, o, i], by central differences."""
    dx = 1e-6 * np.eye(x.shape[1])
    return np.stack([(f(x + step) - f(x - step)) / 2e-6 for step in dx], axis=-1)


def decode(u, s, z, policy="policy"):
    """What a MeanFlow makes of noise in one step, a flow in Euler's steps from t = 1 to t = 0."""
    policy = partial(np_mlp, u.p[policy], s)
    one = np.ones((len(z), 1))
    if u.name in MEANFLOWS:
        return clip(policy(z, one, one))
    for t in np.linspace(1, 0, u.args.flow_steps, endpoint=False):
        if u.name == "cfgrl":
            w = u.args.guidance
            v = (1 - w) * policy(z, t * one, 0 * one) + w * policy(z, t * one, one)
        else:
            v = policy(z, t * one)
        if u.name == "qgf":
            q_slopes = slopes(
                lambda a: np_q(u.p["target_critic"], s, a).min(axis=0), clip(z - t * v)
            )
            v = v - u.args.guidance * q_slopes
        z = z - v / u.args.flow_steps
    return clip(z)


def np_ball(x, uniform):
    """Uniform in the ball of radius sqrt(d)."""
    return np_sphere(x) * uniform ** (1 / D)


def steer(u, network, s, x):
    x = x.copy()
    for j in range(u.args.flow_steps):
        steps = np_mlp(network, s, x, np.full((B, 1), j / u.args.flow_steps)) / u.args.flow_steps
        for i in range(B):
            x[i] += steps[i]
            if x[i] @ x[i] > D:
                outward = x[i] / np.sqrt(x[i] @ x[i])
                x[i] -= (steps[i] @ outward) * outward
    return x


def best_of(u, critic, s, z):
    """Of n chunks for each observation, that with the greatest smallest Q, and this Q."""
    n = len(z) // len(s)
    s = np.repeat(s, n, axis=0)
    a = decode(u, s, z)
    q = np_q(u.p[critic], s, a).min(axis=0)
    best = [i + q[i : i + n].argmax() for i in range(0, len(q), n)]
    return a[best], q[best]


def act(u, s, i=0):
    """With the noise of the i-th key."""
    e = normal(B, D, i=i)
    if u.name in ("lps", "dsrl"):
        return decode(u, s, np_sphere(np_mlp(u.p["latent_actor"], s)))
    if u.name == "reform":
        e = np_ball(e, uniform(B, 1, i=i))
        return clip(np_mlp(u.p["student"], s, steer(u, u.p["noise_flow"], s, e)))
    if u.name in ("qc_fql", "qc_mfql", "gfp"):
        return clip(np_mlp(u.p["student"], s, e))
    if u.name == "mf_bon":
        return best_of(u, "critic", s, np_sphere(normal(B * u.args.num_samples, D)))[0]
    if u.name == "ifql":
        return best_of(u, "critic", s, normal(B * u.args.num_samples, D))[0]
    acting = dict(qam="tuned", rql="target_policy")
    return decode(u, s, e, acting.get(u.name, "policy"))


# =========================================================================================== Losses


def flow_errors(u, policy, e, *label, i=0):
    """Of flow matching, one for each row. Its time is drawn with the i-th key."""
    t = uniform(B, 1, i=i)
    z = (1 - t) * u.a + t * e
    return ((np_mlp(policy, u.s, z, t, *label) - (e - u.a)) ** 2).mean(axis=1)


def imitation_loss(u, e, i=0):
    """What stands under sg in a MeanFlow's stays as it is before the update."""
    if u.name not in MEANFLOWS:
        return lambda policy: (flow_errors(u, policy, e, i=i).mean(), {})
    draws = 1 / (1 + np.exp(0.4 - normal(2, B, 1)))
    t = draws.max(axis=0)
    r = draws.min(axis=0)
    r[:11] = t[:11]  # three quarters of 15 rows, rounded down
    z = (1 - t) * u.a + t * e
    v = e - u.a
    before = u.p["policy"]
    dt = 1e-6
    ahead = np_mlp(before, u.s, z + dt * v, t + dt, t + dt - r)
    behind = np_mlp(before, u.s, z - dt * v, t - dt, t - dt - r)
    u_star = v - (t - r) * (v - (ahead - behind) / (2 * dt))

    def errors(policy):
        return ((z - np_mlp(policy, u.s, z, t, t - r) - u_star) ** 2).mean(axis=1)

    weight = 1 / np.sqrt(errors(before) + 1e-3)
    return lambda policy: ((weight * errors(policy)).mean(), dict(err=errors(policy).mean()))


def critic_loss(u, next_v):
    """On y = sum_i gamma^i R_i + gamma^H m next_v; the sum is the batch's."""
    y = u.batch["rewards"] + GAMMA**H * u.batch["masks"] * next_v

    def loss(critic):
        q = np_q(critic, u.s, u.a)
        assert len(q) == u.args.num_critics
        return ((q - y) ** 2).mean(), dict(q=q.mean(), q_min=q.min(), q_max=q.max())

    return loss


def next_q(u, i=1):
    """What the target critics say of the next chunk, k along the first axis."""
    return np_q(u.p["target_critic"], u.next_s, act(u, u.next_s, i))


def climb(q, before):
    """-lambda E q(params), lambda = sg(1 / E |q|)."""
    scale = 1 / np.abs(q(before)).mean()
    return lambda network: (-scale * q(network).mean(), dict(q=q(network).mean()))


def student_loss(u, e):
    taught = decode(u, u.s, e)

    def q(student):
        return np_q(u.p["critic"], u.s, clip(np_mlp(student, u.s, e))).mean(axis=0)

    climbing = climb(q, u.p["student"])

    def loss(student):
        distillation = ((np_mlp(student, u.s, e) - taught) ** 2).mean()
        value, logs = climbing(student)
        return u.args.alpha * distillation + value, dict(distillation=distillation, **logs)

    return loss


def expectile_loss(u, value):
    target_q = np_q(u.p["target_critic"], u.s, u.a).min(axis=0)

    def loss(network):
        error = target_q - value(network)
        weight = np.where(error > 0, u.args.expectile, 1 - u.args.expectile)
        assert len(np.unique(weight)) == 2
        return (weight * error**2).mean(), dict(v=value(network).mean())

    return loss


def flow_bc(u):
    return dict(policy=imitation_loss(u, u.e))


def mf_bc(u):
    return dict(policy=imitation_loss(u, u.e))


def lps(u):
    def q(actor):
        a = decode(u, u.s, np_sphere(np_mlp(actor, u.s)))
        return np_q(u.p["critic"], u.s, a).mean(axis=0)

    return dict(
        policy=imitation_loss(u, np_sphere(u.e)),
        critic=critic_loss(u, next_q(u).min(axis=0)),
        latent_actor=climb(q, u.p["latent_actor"]),
    )


def mf_bon(u):
    z = np_sphere(normal(B * u.args.num_samples_target, D))
    next_v = best_of(u, "target_critic", u.next_s, z)[1]
    return dict(policy=imitation_loss(u, np_sphere(u.e)), critic=critic_loss(u, next_v))


def dsrl(u):
    z = np_sphere(u.e)
    target = np_q(u.p["critic"], u.s, decode(u, u.s, z)).mean(axis=0)

    def latent_critic_loss(critic):
        q = np_q(critic, u.s, z)
        return ((q - target) ** 2).mean(), dict(q=q.mean(), target=target.mean())

    def q(actor):
        return np_q(u.p["latent_critic"], u.s, np_sphere(np_mlp(actor, u.s))).mean(axis=0)

    return dict(
        policy=imitation_loss(u, z),
        critic=critic_loss(u, next_q(u).mean(axis=0)),
        latent_critic=latent_critic_loss,
        latent_actor=climb(q, u.p["latent_actor"]),
    )


def qc_fql(u):
    return dict(
        policy=imitation_loss(u, u.e),
        critic=critic_loss(u, next_q(u).mean(axis=0)),
        student=student_loss(u, u.e),
    )


def qc_mfql(u):
    return qc_fql(u) | dict(critic=critic_loss(u, next_q(u).min(axis=0)))


def gfp(u):
    """Noises of their own: e of the flow, e_mu of the student, and one more at s'."""
    e_mu = normal(B, D, i=1)
    next_v = next_q(u, i=2).mean(axis=0)
    if u.args.target == "both":
        decoded = decode(u, u.next_s, normal(B, D, i=2))
        next_v = (next_v + np_q(u.p["target_critic"], u.next_s, decoded).mean(axis=0)) / 2
    a_mu = act(u, u.s, i=1)
    scale = 1 / np.abs(np_q(u.p["critic"], u.s, a_mu).mean(axis=0)).mean()
    better = np_q(u.p["target_critic"], u.s, u.a) - np_q(u.p["target_critic"], u.s, a_mu)
    g = np.exp(-np.logaddexp(0, -scale / u.args.eta * better.mean(axis=0)))
    assert g.min() < 0.2 and g.max() > 0.8

    def policy_loss(policy):
        return (g * flow_errors(u, policy, u.e)).mean(), dict(g=g.mean())

    return dict(policy=policy_loss, critic=critic_loss(u, next_v), student=student_loss(u, e_mu))


def cfgrl(u):
    q = np_q(u.p["target_critic"], u.s, u.a).min(axis=0)
    o = (q > np_q(u.p["value"], u.s)).mean(axis=0)
    assert set(o) > {0, 1} and len(set(o)) > 2  # more than one value, and they disagree
    one = np.ones((B, 1))

    def policy_loss(policy):
        better = (o * flow_errors(u, policy, u.e, one)).mean()
        every = flow_errors(u, policy, u.e, 0 * one).mean()
        return better + 0.1 * every, dict(better=better, every=every, o=o.mean())

    return dict(
        policy=policy_loss,
        critic=critic_loss(u, np_q(u.p["value"], u.next_s)),  # y_k with V_k
        value=expectile_loss(u, lambda value: np_q(value, u.s)),
    )


def ifql(u):
    return dict(
        policy=imitation_loss(u, u.e),
        critic=critic_loss(u, np_mlp(u.p["value"], u.next_s)[:, 0]),
        value=expectile_loss(u, lambda value: np_mlp(value, u.s)[:, 0]),
    )


def qgf(u):
    return ifql(u)


def qam(u):
    """Jacobians are taken by differences."""
    next_q_k = next_q(u)
    dt = 1 / u.args.flow_steps
    times = np.linspace(1, 0, u.args.flow_steps, endpoint=False)
    sigmas = np.sqrt(2 * (times + dt) / (1 - times + dt))
    x = normal(B, D, i=2)
    path = []
    for t, sigma, noise in zip(times, sigmas, normal(u.args.flow_steps, B, D)):
        path.append(x)
        x = x - dt * (2 * along(u.p["tuned"], u, x, t) + x / (1 - t + dt))
        x = x + np.sqrt(dt) * sigma * noise
    v_b = partial(along, u.p["target_policy"], u)
    end = path[-1] - dt * v_b(path[-1], dt)

    def q(x):
        return np_q(u.p["target_critic"], u.s, clip(x)).mean(axis=0)

    g = -u.args.eta * slopes(q, end)
    wanted = []
    for x, t, sigma in [*zip(path, times, sigmas)][::-1]:
        drift = partial(lambda t, x: -2 * v_b(x, t - dt) - x / (1 - t + dt), t)
        g = g + dt * np.einsum("boi,bo->bi", slopes(drift, x), g)
        wanted.insert(0, v_b(x, t) + sigma**2 * g / 2)

    def tuned_loss(tuned):
        """(-2 (v - v_b) / sigma + sigma g)^2 is (2 / sigma (v - wanted))^2."""
        errors = [along(tuned, u, x, t) - w for x, t, w in zip(path, times, wanted)]
        weighted = (2 / sigmas[:, None, None] * np.array(errors)) ** 2
        away = [along(tuned, u, x, t) - v_b(x, t) for x, t in zip(path, times)]
        return weighted.sum(axis=(0, 2)).mean(), dict(distance=np.square(away).mean())

    next_v = next_q_k.mean(axis=0) - u.args.rho * next_q_k.std(axis=0)
    return dict(policy=imitation_loss(u, u.e), critic=critic_loss(u, next_v), tuned=tuned_loss)


def reform(u):
    e = np_ball(u.e, uniform(B, 1))
    taught = decode(u, u.s, e)

    def student_loss(student):
        return ((np_mlp(student, u.s, e) - taught) ** 2).mean(), {}

    def noise_flow_loss(noise_flow):
        x = steer(u, noise_flow, u.s, e)
        q = np_q(u.p["critic"], u.s, clip(np_mlp(u.p["student"], u.s, x))).mean()
        return -0.1 * q, dict(q=q, moved=((x - e) ** 2).mean())

    return dict(
        policy=imitation_loss(u, e, i=2),
        critic=critic_loss(u, next_q(u).mean(axis=0)),
        student=student_loss,
        noise_flow=noise_flow_loss,
    )


def rql(u):
    t = uniform(B, 1, i=0)  # half of them anywhere
    t[B // 2 :] = integers(B, 1)[B // 2 :] / u.args.flow_steps
    x = u.a
    for i in range(u.args.flow_steps):
        x = x + t / u.args.flow_steps * np_mlp(u.p["policy"], u.s, x, i * t / u.args.flow_steps)
    next_q_k = np_q(u.p["target_critic"], u.next_s, normal(B, D, i=1), np.ones((B, 1)))
    next_v = next_q_k.mean(axis=0) - u.args.rho * next_q_k.std(axis=0)
    y = u.batch["rewards"] + GAMMA**H * u.batch["masks"] * next_v

    def critic_loss(critic):
        q = np_q(critic, u.s, x, t)
        weight = np.where(y > q, u.args.expectile, 1 - u.args.expectile)
        return (weight * (y - q) ** 2).mean(), dict(q=q.mean(), q_min=q.min(), q_max=q.max())

    def policy_loss(policy):
        flow_t = uniform(B, 1, i=1)
        z = (1 - flow_t) * u.a + flow_t * u.e
        v = np_mlp(policy, u.s, z, flow_t)
        h = np.where(flow_t > 1 / u.args.flow_steps, 1 / u.args.flow_steps, flow_t)
        assert 0 < (h == flow_t).mean() < 1
        q = np_q(u.p["critic"], u.s, z - h * v, flow_t - h).mean()
        imitation = ((v - (u.e - u.a)) ** 2).mean()
        return u.args.alpha * imitation - q, dict(imitation=imitation, q=q)

    return dict(policy=policy_loss, critic=critic_loss)


def along(network, u, x, t):
    return np_mlp(network, u.s, x, np.full((B, 1), t))


# ============================================================================================ Tests

CASES = [
    (lps, dict(num_critics=3)),
    (mf_bon, dict(num_samples=5, num_samples_target=3)),
    (dsrl, dict(num_critics=3, flow_steps=3)),
    (qc_fql, GIVEN["qc_fql"] | dict(num_critics=3)),
    (qc_mfql, GIVEN["qc_mfql"]),
    (gfp, GIVEN["gfp"]),
    (gfp, dict(alpha=0.7, eta=1e-5, target="student", num_critics=3)),
    (cfgrl, dict(num_critics=3)),
    (ifql, GIVEN["ifql"] | dict(num_samples=5)),
    (qgf, GIVEN["qgf"] | dict(guidance=0.4, num_critics=3)),
    (qam, GIVEN["qam"] | dict(flow_steps=4, num_critics=3, max_grad_norm=1e9)),
    (reform, dict(flow_steps=3, num_critics=3)),
    (rql, GIVEN["rql"] | dict(flow_steps=3, num_critics=3, policy_tau=TAU)),
    (flow_bc, {}),
    (mf_bc, {}),
]
EACH_CASE = pytest.mark.parametrize("losses, more", CASES)


def test_no_script_is_left_out():
    assert {losses.__name__ for losses, _ in CASES} == {*SCRIPTS}


def networks(u):
    return {name for name in u.new if not name.startswith("target_")}


def first_moment(u, network):
    """Of Adam."""
    return optax.tree_utils.tree_get(u.new[network].opt_state, "mu")


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(double(tree))])


def assert_gradient(first_moment, loss, network):
    """Along a few random directions, by central differences of the float64 loss."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), network)
        ahead = jax.tree.map(lambda x, dx: x + 1e-6 * dx, network, direction)
        behind = jax.tree.map(lambda x, dx: x - 1e-6 * dx, network, direction)
        slope = (loss(ahead)[0] - loss(behind)[0]) / 2e-6
        along = 10 * flat(first_moment) @ flat(direction)
        np.testing.assert_allclose(along, slope, rtol=2e-3, atol=2e-5)


@EACH_CASE
def test_losses_and_their_gradients_are_those_of_the_equations(losses, more):
    """Of each network, the gradient of its own loss, and nothing of another's."""
    u = updated(losses.__name__, **more)
    expected = losses(u)
    assert expected.keys() == networks(u)
    metrics = {}
    for network, loss in expected.items():
        metrics[f"{network}_loss"], logs = loss(u.p[network])
        metrics |= {f"{network}_{term}": number for term, number in logs.items()}
        assert_gradient(first_moment(u, network), loss, u.p[network])
    assert u.metrics.keys() == metrics.keys()
    for term, number in metrics.items():
        np.testing.assert_allclose(u.metrics[term], number, rtol=2e-4, err_msg=term)
    assert len(np.unique(u.drawn, axis=0)) == len(u.drawn)  # no key is used for two things


@EACH_CASE
def test_an_update_is_a_step_of_adam_for_each_network(losses, more):
    """And a target becomes its average with the new network."""
    u = updated(losses.__name__, **more)
    after = params(u.new)
    for network in networks(u):
        grad = flat(first_moment(u, network)) * 10
        step = u.args.learning_rate * grad / (np.abs(grad) + 1e-8)
        np.testing.assert_allclose(flat(u.p[network]) - flat(after[network]), step, atol=1e-6)
    for target in u.new.keys() - networks(u):
        new = after[target.removeprefix("target_")]
        average = (1 - TAU) * flat(u.p[target]) + TAU * flat(new)
        np.testing.assert_allclose(flat(after[target]), average, rtol=1e-5, atol=1e-7)


@EACH_CASE
def test_actions_are_those_of_the_equations(losses, more):
    u = updated(losses.__name__, **more)
    np.testing.assert_allclose(u.acted, act(u, u.s), atol=2e-5)


@pytest.mark.parametrize("name", SCRIPTS)
def test_networks_are_as_wide_as_the_paper_says(name):
    """LayerNorm in critics and values alone; time, latent or label beside observation and chunk."""
    script = load(name)
    args = script.Args(action_dim=5)
    state = jax.eval_shape(lambda: script.init(args, jax.random.key(0), jnp.zeros((1, 28))))
    extra = 1 + (name in (*MEANFLOWS, "cfgrl"))  # t, and t-r or the label
    widths = dict(
        policy=[28 + 25 + extra, 512, 512, 512, 512, 25],
        noise_flow=[28 + 25 + 1, 512, 512, 512, 512, 25],
        tuned=[28 + 25 + extra, 512, 512, 512, 512, 25],
        student=[28 + 25, 512, 512, 512, 512, 25],
        latent_actor=[28, 256, 256, 25] if name == "lps" else [28, 512, 512, 512, 512, 25],
        critic=[28 + 25 + (name == "rql"), 256, 256, 256, 256, 1],
        latent_critic=[28 + 25, 256, 256, 256, 256, 1],
        value=[28, 256, 256, 256, 256, 1],
    )
    for network in [name for name in state if not name.startswith("target_")]:
        layers = state[network].params["params"]
        layers = layers.get("Network_1", layers)
        norms = 4 if "critic" in network or network == "value" else 0
        shapes = [layers[f"Dense_{i}"]["kernel"].shape for i in range(len(widths[network]) - 1)]
        assert shapes == list(zip(widths[network], widths[network][1:]))
        assert sum("LayerNorm" in layer for layer in layers) == norms


def test_initial_weights_are_uniform_by_fan_average_and_critics_differ():
    lps = load("lps")
    args = lps.Args(action_dim=5)
    state = jax.jit(partial(lps.init, args))(jax.random.key(0), jnp.zeros((1, 28)))
    layer = state["policy"].params["params"]["Dense_1"]
    assert np.abs(layer["kernel"]).max() <= np.sqrt(3 / 512) and (layer["bias"] == 0).all()
    np.testing.assert_allclose(np.std(layer["kernel"]), np.sqrt(1 / 512), rtol=0.01)
    critics = state["critic"].params["params"]
    weights = [critics[f"Network_{k}"]["Dense_0"]["kernel"] for k in range(2)]
    assert not np.array_equal(*weights)
    assert_same_tree(state["target_critic"], state["critic"].params)
