"""How methods steer among nine clusters in 50 dimensions, and what a latent critic makes of Q.

    python -m benchmark.studies.toy.toy             # both figures, beside this file
    python -m benchmark.studies.toy.toy gradient    # gradient.png, .svg and .csv alone

A bandit with one constant observation, trained by the scripts' own init() and update(): README.md
beside this file says how it is made and what came out.
"""

import csv
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import dsrl
import lps
import mf_bon
import qc_mfql
from benchmark.figures import LOOKS

Figure = Literal["clusters", "gradient"]


@dataclass(frozen=True)
class Args:
    figures: tyro.conf.Positional[tuple[Figure, ...]] = ("clusters", "gradient")  # to make
    out: Path = Path(__file__).parent  # the folder for each figure's .png, .svg and .csv
    seed: int = 0  # the first seed of the trainings; the clusters are always the same
    num_seeds: int = 2  # trainings of each kind
    total_steps: int = 8_000  # updates of each training


# ====================================================================================== The bandit

# A chunk is 5 actions of 10 numbers, d = 50. The centres of the clusters are points (x, y) of a
# plane. Two orthonormal vectors span it, which are drawn at random, with entries of nearly equal
# size so that chunks fit in [-1, 1].
D = 50
PLANE = np.linalg.qr(np.random.default_rng(0).choice([-1.0, 1.0], (D, 2)))[0].T
SPACING = 2.5  # from centre to centre
STD = 0.1  # of a cluster, in each of the 50 dimensions
GRID = [(-1, 1), (0, 1), (1, 1), (-1, 0), (0, 0), (1, 0), (-1, -1), (0, -1), (1, -1)]
CENTRES = SPACING * np.array(GRID) @ PLANE
PAID = 2  # the cluster whose chunks pay 1, the upper right; all others pay 0
NEAR = 1.2  # a chunk so near to a centre is on the data; those of the data are, usually at 0.7


def judge(a):
    """Whether chunks are on the data, whether they are paid, and how far the next centre is."""
    distance = jnp.linalg.norm(a[..., None, :] - CENTRES, axis=-1)
    on_data = distance.min(axis=-1) < NEAR
    return on_data, on_data & (distance.argmin(axis=-1) == PAID), distance.min(axis=-1)


def draw_data(key, n):
    cluster_key, key = jax.random.split(key)
    cluster = jax.random.randint(cluster_key, (n,), 0, len(CENTRES))
    return jnp.array(CENTRES)[cluster] + STD * jax.random.normal(key, (n, D))


# ======================================================================================== Training

SETTINGS = dict(
    horizon=5,
    action_dim=10,
    gamma=1.0,
    batch_size=256,
    learning_rate=1e-3,
    policy_hidden_dims=(256,) * 3,
    critic_hidden_dims=(128,) * 2,
)
METHODS = {  # the script, its own settings, and the name in the picture
    "qc_mfql 300": (qc_mfql, dict(alpha=300.0), "QC-MFQL, alpha 300"),
    "qc_mfql 0.03": (qc_mfql, dict(alpha=0.03), "QC-MFQL, alpha 0.03"),
    "lps": (lps, dict(latent_actor_hidden_dims=(64, 64)), "Latent Policy Steering"),
    "mf_bon": (mf_bon, {}, "MF-BoN, best of 32"),
    "dsrl": (dsrl, {}, "DSRL"),
}


@cache
def learn(args, method):
    """The method's arguments, and the states after training and keys of all seeds, stacked."""
    script, settings, _ = METHODS[method]
    own = script.Args(**SETTINGS | settings)
    s = jnp.ones((own.batch_size, 1))

    def one_update(state, key):
        data_key, update_key = jax.random.split(key)
        a = draw_data(data_key, own.batch_size)
        batch = dict(observations=s, next_observations=s, actions=a)
        batch |= dict(rewards=1.0 * judge(a)[1], masks=jnp.zeros(len(a)))
        return script.update(own, state, batch, update_key)[0], None

    def one_seed(key):
        init_key, key = jax.random.split(key)
        state = script.init(own, init_key, s[:1])
        return jax.lax.scan(one_update, state, jax.random.split(key, args.total_steps))[0]

    keys = jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))
    return own, (jax.jit(partial(jax.lax.map, one_seed))(keys), keys)


def play(args, method, acts):
    """Chunks of each seed, [seed, chunk, d], and their mean scores by seed.

    They are what the method does ("steered"; lps and dsrl act without noise, so that one is enough)
    or what its imitating policy makes of random latents ("f alone").
    """
    script = METHODS[method][0]
    own, states_and_keys = learn(args, method)
    n = 1 if script in (lps, dsrl) and acts == "steered" else 1000
    s = jnp.ones((n, 1))

    def choose(state, key):
        if acts == "steered":
            return script.act(own, state, s, key)
        z = jax.random.normal(key, (n, D))
        if script is not qc_mfql:  # whose prior is normal
            z = script.sphere(z)
        return script.decode(own, state["policy"], s, z)

    a = jax.jit(jax.vmap(choose))(*states_and_keys)
    scores = zip(("on_data", "paid", "distance"), judge(a))
    return np.asarray(a), {name: x.mean(axis=1) for name, x in scores}


def save(args, name, figure, scores):
    """The figure, and a table of names and scores, a row for each seed."""
    rows = []
    for names, by_seed in scores:
        for i in range(args.num_seeds):
            numbers = {key: f"{x[i]:.3f}" for key, x in by_seed.items()}
            rows.append(names | dict(seed=args.seed + i) | numbers)
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    figure.savefig(args.out / f"{name}.png", dpi=110)
    figure.savefig(args.out / f"{name}.svg", dpi=110)


# ======================================================================================== Clusters

STYLE = {"font.size": 14, "axes.titlesize": 15, "axes.titleweight": "bold", "svg.hashsalt": "toy"}
plt.rcParams.update(STYLE)


def draw_panel(axis, title, look, a, scores):
    """Chunks in the plane of the centres, a circle around the paid cluster."""
    colour, _, marker = LOOKS[look]
    data = draw_data(jax.random.key(0), 1500)
    axis.scatter(*PLANE @ data.T, s=5, color="#c8c8c8", lw=0, rasterized=True)
    axis.add_patch(plt.Circle(PLANE @ CENTRES[PAID], NEAR, fill=False, lw=1.5))
    size = 20
    if a.shape[1] == 1:
        size = 180
    else:
        marker = "."
    a = a[:, :200].reshape(-1, D)
    on_data = np.asarray(judge(a)[0])
    looks = dict(s=size, color=colour, rasterized=True, zorder=3)
    axis.scatter(*PLANE @ a[on_data].T, marker=marker, lw=0, **looks)
    axis.scatter(*PLANE @ a[~on_data].T, marker="x", lw=size / 20, **looks)
    ticks = (-2.5, 0, 2.5)
    axis.set(xlim=(-4.4, 4.4), ylim=(-4.4, 4.4), aspect="equal", xticks=ticks, yticks=ticks)
    axis.set_title(title, color=colour)
    axis.set_xlabel(f"on data {scores['on_data'].mean():.2f}, paid {scores['paid'].mean():.2f}")


def draw_clusters(args):
    settings = dict(figsize=(13, 10.5), sharex=True, sharey=True, layout="constrained")
    figure, axes = plt.subplots(2, 3, **settings)
    played = {}
    for method in METHODS:
        for acts in ("f alone", "steered"):
            played[method, acts] = play(args, method, acts)
    panels = [("f alone, random latents", "mf_bc", ("lps", "f alone"))]
    for method, (script, _, title) in METHODS.items():
        panels.append((title, script.__name__, (method, "steered")))
    for axis, (title, look, panel) in zip(axes.flat, panels):
        draw_panel(axis, title, look, *played[panel])
    axes[0, 0].annotate("pays 1", PLANE @ CENTRES[PAID] + (0, 1.35), ha="center")
    figure.suptitle(
        "Chunks of 50 numbers in the plane of the data's two principal axes. Grey: the data. The "
        "ringed cluster\n"
        f"pays 1. Crosses: off the data. {args.num_seeds} seeds; LPS and DSRL act without noise: "
        "one chunk a seed."
    )
    scores = [(dict(method=x[0], acts=x[1]), by_seed) for x, (_, by_seed) in played.items()]
    save(args, "clusters", figure, scores)


# ======================================================================================== Gradient


def distil(own, state, value, key, total_steps):
    """What dsrl's latent critics learn of a value by dsrl's loss while it stands still."""
    s = jnp.ones((own.batch_size, 1))
    critic = dsrl.Critic(own.critic_hidden_dims, own.num_critics)
    start = dsrl.create(own, key, critic, s[:1], jnp.zeros((1, D)))

    def one_update(learned, key):
        z = lps.sphere(jax.random.normal(key, (own.batch_size, D)))
        target = jax.vmap(value)(z)

        def loss(params):
            return jnp.mean((start.apply_fn(params, s, z) - target) ** 2), {}

        return dsrl.descend(learned, dict(latent_critic=loss))[0], None

    keys = jax.random.split(key, total_steps)
    learned = jax.lax.scan(one_update, dict(latent_critic=start), keys)[0]["latent_critic"]
    return lambda z: learned.apply_fn(learned.params, s[:1], z[None]).mean()


def compare(args, z):
    """Q(f(z)) of lps with its gradient in z, and Q^z(z) with its gradient, of each seed."""
    own, states_and_keys = learn(args, "lps")
    s = jnp.ones((1, 1))

    def one_seed(state_and_key):
        state, key = state_and_key

        def value(z):
            a = lps.decode(own, state["policy"], s, z[None])
            return state["critic"].apply_fn(state["critic"].params, s, a).mean()

        latent_value = distil(own, state, value, key, args.total_steps)
        return jax.vmap(jax.value_and_grad(value))(z), jax.vmap(jax.value_and_grad(latent_value))(z)

    return jax.jit(partial(jax.lax.map, one_seed))(states_and_keys)


def draw_map(axis, line, title, look, value, slope):
    """The length of a gradient, its direction in the plane, and where the value is 0.5."""
    length = np.linalg.norm(slope, axis=2)
    looks = dict(norm="log", vmin=1e-3, vmax=10, cmap="cividis", rasterized=True)
    image = axis.pcolormesh(line, line, length, **looks)
    axis.contour(line, line, value, [0.5], colors="white", linewidths=2)
    arrows = slope[3::6, 3::6] @ PLANE.T
    arrows = np.moveaxis(arrows / np.linalg.norm(arrows, axis=2, keepdims=True), 2, 0)
    looks = dict(pivot="mid", scale=14, color="white", ec="black", lw=0.6)
    axis.quiver(line[3::6], line[3::6], *arrows, **looks)
    axis.set_title(title, color=LOOKS[look][0])
    axis.set(aspect="equal", xlabel="latent z, first axis", ylabel="latent z, second axis")
    return image


def draw_gradient(args):
    """The map is a piece of the sphere: latents x p_1 + y p_2 + a rest of one direction."""
    line = np.linspace(-3, 3, 61)
    xy = np.stack(np.meshgrid(line, line), axis=-1)  # p_1 and p_2 are those of PLANE
    third = np.random.default_rng(1).normal(size=D)
    rest = np.linalg.qr(np.vstack([PLANE, third]).T)[0][:, 2]
    on_map = xy @ PLANE - rest * np.sqrt(D - (xy**2).sum(axis=-1, keepdims=True))
    random = lps.sphere(jax.random.normal(jax.random.key(0), (2000, D)))
    z = jnp.concatenate([random, on_map.reshape(-1, D)])
    (q, g), (qz, h) = compare(args, z)
    g, h = (x - z * (x * z).sum(axis=2, keepdims=True) / D for x in (g, h))  # along the sphere
    dot = (g * h).sum(axis=2)[:, :2000]
    lengths = (jnp.linalg.norm(g, axis=2) * jnp.linalg.norm(h, axis=2))[:, :2000]
    cosine = dot / jnp.maximum(lengths, 1e-12)
    scores = dict(
        cosine=cosine.mean(axis=1),
        opposite=(cosine < 0).mean(axis=1),
        weighted_cosine=dot.sum(axis=1) / lengths.sum(axis=1),
    )
    figure, axes = plt.subplots(1, 2, figsize=(13, 9.2), sharey=True, layout="constrained")
    panels = [("Q through f: Q(f(z))", "lps", q, g), ("A latent critic: Q$^z$(z)", "dsrl", qz, h)]
    for axis, (title, look, value, slope) in zip(axes, panels):
        value = np.reshape(value[0, 2000:], (61, 61))
        image = draw_map(axis, line, title, look, value, np.reshape(slope[0, 2000:], (61, 61, D)))
    figure.colorbar(image, ax=axes, location="bottom", label="length of the gradient", aspect=40)
    figure.suptitle(
        f"Gradients on a piece of the sphere of latents, seed {args.seed}. Arrows: direction. "
        "Above and right of\nthe white line f makes the paid cluster. Cosine at random latents, "
        f"{args.num_seeds} seeds: mean {scores['cosine'].mean():.2f},\n"
        f"weighted by the lengths {scores['weighted_cosine'].mean():.2f}."
    )
    save(args, "gradient", figure, [({}, scores)])


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    if "clusters" in args.figures:
        draw_clusters(args)
    if "gradient" in args.figures:
        draw_gradient(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
