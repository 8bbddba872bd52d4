"""Toy figures: how methods steer among nine clusters in 50 dimensions, and what a latent critic makes of Q's gradient.

    python benchmark/toy.py             # both figures, to benchmark/results/toy
    python benchmark/toy.py gradient    # gradient.png, .svg and .csv alone

A bandit with one constant observation, trained by the scripts' own init() and update(): see benchmark/README.md.
"""

import sys
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts lie
matplotlib.use("Agg")
import matplotlib.pyplot as plt

import dsrl
import lps
import mf_bon
import qc_mfql
from benchmark.figures import LOOKS
from benchmark.latency import write_table


@dataclass(frozen=True)
class Args:
    figures: tyro.conf.Positional[tuple[Literal["clusters", "gradient"], ...]] = ("clusters", "gradient")  # to make
    out: Path = Path("benchmark/results/toy")  # the folder for each figure's .png, .svg and .csv
    seed: int = 0  # the first seed of the trainings; the clusters are always the same
    num_seeds: int = 2  # trainings of each kind
    total_steps: int = 8_000  # updates of each training


# ========================================================================================================== The bandit

# A chunk is 5 actions of 10 numbers, d = 50. The centres of the clusters are the points (x, y) of a plane, the one that
# two orthonormal vectors span, drawn at random with entries of nearly equal size so that chunks fit in [-1, 1].
D = 50
PLANE = np.linalg.qr(np.random.default_rng(0).choice([-1.0, 1.0], (D, 2)))[0].T
SPACING, STD = 2.5, 0.1  # from centre to centre; of a cluster, in each of the 50 dimensions
CENTRES = np.array([(SPACING * x, SPACING * y) for y in (1, 0, -1) for x in (-1, 0, 1)]) @ PLANE
PAID = 2  # the cluster whose chunks pay 1, the upper right; all others pay 0
NEAR = 1.2  # a chunk is on the data if it is as near as this to a centre; a chunk of the data is, and 0.7 is usual


def judge(a):
    """Whether chunks are on the data, whether they are paid, and their distance from the nearest centre."""
    distance = jnp.linalg.norm(a[..., None, :] - CENTRES, axis=-1)
    on_data = distance.min(axis=-1) < NEAR
    return on_data, on_data & (distance.argmin(axis=-1) == PAID), distance.min(axis=-1)


def draw_data(key, n):
    cluster_key, key = jax.random.split(key)
    return jnp.array(CENTRES)[jax.random.randint(cluster_key, (n,), 0, 9)] + STD * jax.random.normal(key, (n, D))


# ============================================================================================================ Training

SETTINGS = dict(horizon=5, action_dim=10, gamma=1.0, batch_size=256, learning_rate=1e-3,
                actor_hidden_dims=(256,) * 3, critic_hidden_dims=(128,) * 2)
METHODS = {  # the script, its own settings, and the name in the picture
    "qc_mfql 300": (qc_mfql, dict(alpha=300.0), "QC-MFQL, alpha 300"),
    "qc_mfql 0.03": (qc_mfql, dict(alpha=0.03), "QC-MFQL, alpha 0.03"),
    "lps": (lps, dict(latent_actor_hidden_dims=(64, 64)), "Latent Policy Steering"),
    "mf_bon": (mf_bon, {}, "MF-BoN, best of 32"),
    "dsrl": (dsrl, {}, "DSRL"),
}


@cache
def learn(args, method):
    """The method's arguments, and the states after training and the keys of all seeds, along the first axis."""
    script, settings, _ = METHODS[method]
    own = script.Args(**SETTINGS | settings)
    s = jnp.ones((own.batch_size, 1))

    def one_update(state, key):
        data_key, update_key = jax.random.split(key)
        a = draw_data(data_key, own.batch_size)
        batch = dict(observations=s, actions=a, rewards=1.0 * judge(a)[1], masks=jnp.zeros(len(a)), next_observations=s)
        return script.update(own, state, batch, update_key)[0], None

    def one_seed(key):
        init_key, key = jax.random.split(key)
        return jax.lax.scan(one_update, script.init(own, init_key, s[:1]), jax.random.split(key, args.total_steps))[0]

    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    return own, (jax.jit(partial(jax.lax.map, one_seed))(keys), keys)


def play(args, method, acts):
    """Chunks of each seed, [seed, chunk, d], and their means by seed: what the method does, or what its imitating
    policy makes of random latents if acts says "f alone". lps and dsrl act without noise."""
    script, (own, states_and_keys) = METHODS[method][0], learn(args, method)
    n = 1 if script in (lps, dsrl) and acts == "steered" else 1000

    def choose(state, key):
        if acts == "steered":
            return script.act(own, state, jnp.ones((n, 1)), key)
        z = jax.random.normal(key, (n, D))
        if script is not qc_mfql:  # whose prior is normal
            z = script.sphere(z)
        return script.decode(own, state["policy"], jnp.ones((n, 1)), z)

    a = jax.jit(jax.vmap(choose))(*states_and_keys)
    return np.asarray(a), {name: x.mean(axis=1) for name, x in zip(("on_data", "paid", "distance"), judge(a))}


def save(args, name, figure, scores):
    """The figure, and a table of names and scores by seed, a row a seed."""
    table = [names | dict(seed=args.seed + i) | {key: f"{x[i]:.3f}" for key, x in by_seed.items()}
             for names, by_seed in scores for i in range(args.num_seeds)]
    write_table(args.out / f"{name}.csv", table)
    figure.savefig(args.out / f"{name}.png", dpi=110)
    figure.savefig(args.out / f"{name}.svg", dpi=110)


# ============================================================================================================= Figures

plt.rcParams.update({"font.size": 14, "axes.titlesize": 15, "axes.titleweight": "bold", "svg.hashsalt": "toy"})


def clusters(args):
    figure, axes = plt.subplots(2, 3, figsize=(13, 10.5), sharex=True, sharey=True, layout="constrained")
    played = {(method, acts): play(args, method, acts) for method in METHODS for acts in ("f alone", "steered")}
    panels = [("f alone, random latents", "mf_bc", ("lps", "f alone"))]
    panels += [(title, script.__name__, (method, "steered")) for method, (script, _, title) in METHODS.items()]
    for axis, (title, look, panel) in zip(axes.flat, panels):
        (a, scores), (colour, _, marker) = played[panel], LOOKS[look]
        axis.scatter(*PLANE @ draw_data(jax.random.key(0), 1500).T, s=5, color="#c8c8c8", lw=0, rasterized=True)
        axis.add_patch(plt.Circle(PLANE @ CENTRES[PAID], NEAR, fill=False, lw=1.5))
        size, marker = (180, marker) if a.shape[1] == 1 else (20, ".")
        a = a[:, :200].reshape(-1, D)
        on_data = np.asarray(judge(a)[0])
        for x, marks in ((a[on_data], dict(marker=marker, lw=0)), (a[~on_data], dict(marker="x", lw=size / 20))):
            axis.scatter(*PLANE @ x.T, s=size, color=colour, rasterized=True, zorder=3, **marks)
        axis.set(xlim=(-4.4, 4.4), ylim=(-4.4, 4.4), aspect="equal", xticks=(-2.5, 0, 2.5), yticks=(-2.5, 0, 2.5))
        axis.set_title(title, color=colour)
        axis.set_xlabel(f"on data {scores['on_data'].mean():.2f}, paid {scores['paid'].mean():.2f}")
    axes[0, 0].annotate("pays 1", PLANE @ CENTRES[PAID] + (0, 1.35), ha="center")
    figure.suptitle(
        "Chunks of 50 numbers in the plane of the data's two principal axes. Grey: the data. The ringed cluster\n"
        f"pays 1. Crosses: off the data. {args.num_seeds} seeds; LPS and DSRL act without noise: one chunk a seed.")
    save(args, "clusters", figure, [(dict(method=x[0], acts=x[1]), scores) for x, (_, scores) in played.items()])


def compare(args, z):
    """Q(f(z)) of lps with its gradient in z, and Q^z(z) with its gradient, by seed. Q^z is what dsrl's latent critics
    learn of Q(f(z)) by dsrl's loss while f and Q stand still."""
    own, states_and_keys = learn(args, "lps")
    s = jnp.ones((1, 1))

    def one_seed(state_and_key):
        state, key = state_and_key
        latent_critic = dsrl.create(own, key, dsrl.Critic(own.critic_hidden_dims), s, z[:1])

        def value(z):
            a = lps.decode(own, state["policy"], s, z[None])
            return state["critic"].apply_fn(state["critic"].params, s, a).mean()

        def one_update(learned, key):
            z = lps.sphere(jax.random.normal(key, (own.batch_size, D)))

            def loss(params):
                q = latent_critic.apply_fn(params, jnp.ones((len(z), 1)), z)
                return jnp.mean((q - jax.vmap(value)(z)) ** 2), {}

            return dsrl.descend(learned, dict(latent_critic=loss))[0], None

        start = dict(latent_critic=latent_critic)
        learned = jax.lax.scan(one_update, start, jax.random.split(key, args.total_steps))[0]["latent_critic"]

        def latent_value(z):
            return latent_critic.apply_fn(learned.params, s, z[None]).mean()

        return jax.vmap(jax.value_and_grad(value))(z), jax.vmap(jax.value_and_grad(latent_value))(z)

    return jax.jit(partial(jax.lax.map, one_seed))(states_and_keys)


def gradient(args):
    """The map is a piece of the sphere: latents x p_1 + y p_2 + a rest of one direction, p_1 and p_2 those of PLANE."""
    line = np.linspace(-3, 3, 61)
    xy = np.stack(np.meshgrid(line, line), axis=-1)
    rest = np.linalg.qr(np.vstack([PLANE, np.random.default_rng(1).normal(size=D)]).T)[0][:, 2]
    on_map = xy @ PLANE - rest * np.sqrt(D - (xy**2).sum(axis=-1, keepdims=True))
    z = jnp.concatenate([lps.sphere(jax.random.normal(jax.random.key(0), (2000, D))), on_map.reshape(-1, D)])
    (q, g), (qz, h) = compare(args, z)
    g, h = (x - z * (x * z).sum(axis=2, keepdims=True) / D for x in (g, h))  # along the sphere
    dot, lengths = (g * h).sum(axis=2)[:, :2000], (jnp.linalg.norm(g, axis=2) * jnp.linalg.norm(h, axis=2))[:, :2000]
    cosine = dot / jnp.maximum(lengths, 1e-12)
    scores = dict(cosine=cosine.mean(axis=1), opposite=(cosine < 0).mean(axis=1),
                  weighted_cosine=dot.sum(axis=1) / lengths.sum(axis=1))
    figure, axes = plt.subplots(1, 2, figsize=(13, 9.2), sharey=True, layout="constrained")
    for axis, title, name, value, slope in ((axes[0], "Q through f: Q(f(z))", "lps", q, g),
                                            (axes[1], "A latent critic: Q$^z$(z)", "dsrl", qz, h)):
        value, slope = np.reshape(value[0, 2000:], (61, 61)), np.reshape(slope[0, 2000:], (61, 61, D))
        length = np.linalg.norm(slope, axis=2)
        image = axis.pcolormesh(line, line, length, norm="log", vmin=1e-3, vmax=10, cmap="cividis", rasterized=True)
        axis.contour(line, line, value, [0.5], colors="white", linewidths=2)
        arrows = slope[3::6, 3::6] @ PLANE.T
        arrows = np.moveaxis(arrows / np.linalg.norm(arrows, axis=2, keepdims=True), 2, 0)
        axis.quiver(line[3::6], line[3::6], *arrows, pivot="mid", scale=14, color="white", ec="black", lw=0.6)
        axis.set_title(title, color=LOOKS[name][0])
        axis.set(aspect="equal", xlabel="latent z, first axis", ylabel="latent z, second axis")
    figure.colorbar(image, ax=axes, location="bottom", label="length of the gradient", aspect=40)
    figure.suptitle(
        f"Gradients on a piece of the sphere of latents, seed {args.seed}. Arrows: direction. Above and right of\n"
        f"the white line f makes the paid cluster. Cosine at random latents, {args.num_seeds} seeds: mean "
        f"{scores['cosine'].mean():.2f},\nweighted by the lengths {scores['weighted_cosine'].mean():.2f}.")
    save(args, "gradient", figure, [({}, scores)])


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(args.figures):
        dict(clusters=clusters, gradient=gradient)[name](args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
