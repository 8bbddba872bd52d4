"""Toy figures: what alpha does on two rings, and what distilling a latent critic does to its gradient on a grid.

    python benchmark/toy.py                                     # both figures, to benchmark/results/toy
    python benchmark/toy.py rings --out benchmark/results/toy   # rings.png and rings.csv alone

One constant observation and 2-D actions, trained by the scripts' own train() with small nets: benchmark/README.md says
what the figures hold.
"""

import csv
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import tyro
from flax.serialization import from_state_dict, msgpack_restore

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts lie
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Circle, Wedge

import dsrl
import lps
import qc_mfql
from benchmark import ablations
from benchmark.report import LOOKS


@dataclass
class Args:
    figures: tyro.conf.Positional[tuple[Literal["rings", "grid"], ...]] = ("rings", "grid")  # which to make
    out: Path = Path("benchmark/results/toy")  # the folder for each figure's .png and .csv
    seed: int = 0  # the first seed of the trainings; the data are always those of seed 0
    num_seeds: int = 2  # trainings of each kind
    total_steps: int = 8000  # updates of each training


# ======================================================================================================== Environments

RADII, RING_STD = np.array([0.35, 0.75]), 0.02
CENTRES, GRID_STD = np.array([(x, y) for y in (0.6, 0, -0.6) for x in (-0.6, 0, 0.6)]), 0.04
PAY = np.array([0.3, 0.9, 0.4, 0.7, 0.1, 0.5, 0.2, 0.6, 0.8])  # of the clusters, row by row


def ring_actions(rng, shape):
    radius, angle = rng.choice(RADII, shape) + RING_STD * rng.normal(size=shape), rng.uniform(0, 2 * np.pi, shape)
    return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def judge_rings(a):
    """Whether actions are on the data, that is within four standard deviations of a ring, and what they pay."""
    norm = np.linalg.norm(a, axis=-1)
    on_data = np.abs(norm[..., None] - RADII).min(axis=-1) < 4 * RING_STD
    return on_data, 1.0 * (on_data & (norm > RADII.mean()) & (a > 0).all(axis=-1))


def grid_actions(rng, shape):
    return CENTRES[rng.integers(len(CENTRES), size=shape)] + GRID_STD * rng.normal(size=(*shape, 2))


def judge_grid(a):
    """The same for clusters: within four standard deviations of a centre."""
    distance = np.linalg.norm(a[..., None, :] - CENTRES, axis=-1)
    on_data = distance.min(axis=-1) < 4 * GRID_STD
    return on_data, on_data * PAY[distance.argmin(axis=-1)]


# steps in an episode, how the data act, how actions are judged
TASKS = dict(Rings=(1, ring_actions, judge_rings), RingsChunk=(5, ring_actions, judge_rings),
             Grid=(1, grid_actions, judge_grid))


class Toy(gymnasium.Env):
    """What train() asks of an environment that is never played."""
    observation_space, action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,)), gymnasium.spaces.Box(-1, 1, (2,))


if "Toy-v0" not in gymnasium.registry:  # as a program, this file is imported a second time by its id
    gymnasium.register("Toy-v0", "benchmark.toy:Toy")


def make_data(task, n):
    """n episodes under the dataset contract."""
    steps, actions, judge = TASKS[task]
    a, t = np.zeros((n, steps + 1, 2)), np.tile(np.arange(steps + 1), (n, 1))
    a[:, :steps] = actions(np.random.default_rng(0), (n, steps))
    rows = dict(observations=np.ones((n, steps + 1, 1)), actions=a, rewards=judge(a)[1],
                terminals=t == steps, masks=t < steps - 1)
    return {key: x.reshape(-1, *x.shape[2:]) for key, x in rows.items()}


# ============================================================================================================ Training

def learn(args, folder, script, task, **settings):
    """Trains a script on a task. Returns its arguments and the states of all seeds, along the first axis."""
    path = folder / f"{task}.npz"
    np.savez(path, **make_data(task, 20_000))
    make_args, train = script.Args, script.train
    if script is lps:  # whose latents may be others here
        make_args, train = partial(ablations.Args, latent_actor_hidden_dims=(64, 64)), ablations.train
    own = make_args(
        env_id="benchmark.toy:Toy-v0", dataset_path=str(path), horizon=TASKS[task][0], gamma=1.0, batch_size=128,
        learning_rate=1e-3, actor_hidden_dims=(64,) * 3, critic_hidden_dims=(64,) * 2, seed=args.seed, action_dim=2,
        num_seeds=args.num_seeds, total_steps=args.total_steps, log_interval=0, eval_interval=0, eval_episodes=0,
        run_dir=tempfile.mkdtemp(dir=folder), **settings)
    saved = msgpack_restore(Path(train(own), "checkpoint.msgpack").read_bytes())["states"]
    return own, from_state_dict(jax.vmap(lambda key: script.init(own, key, jnp.ones((1, 1))))(seed_keys(args)), saved)


def seed_keys(args):
    return jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))


def imitate(script, own, state, s, key):
    """Chunks that the imitating policy alone makes of random latents."""
    e = jax.random.normal(key, (len(s), 2 * own.horizon))
    return script.decode(own, state["policy"], s, lps.sphere(e) if script is lps else e)


def play(args, task, choose, states, n):
    """What choose(state, observations, key) does n times for each seed: actions [seed, n x steps, 2]; and by seed the
    share of them on the data and their mean reward."""
    chunks = jax.vmap(lambda state, key: choose(state, jnp.ones((n, 1)), key))(states, seed_keys(args))
    a = np.asarray(chunks).reshape(args.num_seeds, -1, 2)
    on_data, reward = TASKS[task][2](a)
    return a, dict(on_data=on_data.mean(axis=1), reward=reward.mean(axis=1))


def table_rows(args, scores, **names):
    """A row a seed."""
    return [names | dict(seed=args.seed + i) | {name: f"{x[i]:.4g}" for name, x in scores.items()}
            for i in range(args.num_seeds)]


def save(args, name, figure, table):
    columns = list(dict.fromkeys(column for row in table for column in row))
    with open(args.out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(table)
    figure.tight_layout()
    figure.savefig(args.out / f"{name}.png", dpi=150)
    print(args.out / f"{name}.png", args.out / f"{name}.csv")


# ============================================================================================================= Figures

ALPHAS = 100.0, 10.0, 1.0, 0.1
ROWS = [(script, task) for task in ("Rings", "RingsChunk") for script in (qc_mfql, lps)]
FRAME = dict(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def draw_actions(axis, task, a, **looks):
    """At most 200 actions of each seed over the data in grey; a black line round what pays on the rings."""
    data = make_data(task, 1500)
    axis.scatter(*data["actions"][data["terminals"] == 0][:1500].T, s=2, c="#c8c8c8", lw=0, zorder=0)
    if task != "Grid":
        axis.add_patch(Wedge((0, 0), RADII[1] + 4 * RING_STD, 0, 90, width=8 * RING_STD, fill=False, lw=0.9))
    few = dict(s=36, edgecolors="black", lw=0.7) if a.size <= 100 else dict(s=5, lw=0)
    axis.scatter(*a[:, :200].reshape(-1, 2).T, zorder=4, **few, **looks)
    axis.set(**FRAME)


def rings(args, folder):
    figure, axes = plt.subplots(len(ROWS), 1 + len(ALPHAS), figsize=(11.5, 11.3), sharex=True, sharey=True,
                                squeeze=False)
    table = []
    for line, (script, task) in zip(axes, ROWS):
        name, played = script.__name__, {}
        for alpha in ALPHAS:
            own, states = learn(args, folder, script, task, alpha=alpha)
            n = 1 if script is lps else 100  # lps acts without noise
            played[f"{alpha:g}"] = play(args, task, partial(script.act, own), states, n)
        base = play(args, task, partial(imitate, script, own), states, 100)  # alike for every alpha
        for axis, (alpha, (a, scores)) in zip(line, (dict(base=base) | played).items()):
            table += table_rows(args, scores, method=name, d=2 * own.horizon, alpha=alpha)
            draw_actions(axis, task, a, color=LOOKS[name][0])
            axis.set_title("f alone, random latents" if alpha == "base" else f"alpha {alpha}", fontsize=9)
            axis.set_xlabel(f"on data {scores['on_data'].mean():.2f}, reward {scores['reward'].mean():.2f}", fontsize=9)
        line[0].set_ylabel(f"{name}, d = {2 * own.horizon}", fontsize=10)
    figure.suptitle(
        "The two dimensions of an action. Grey: the data. Inside the black line an action pays 1. Dots: at most 200 of "
        f"each of {args.num_seeds} seeds (lps acts without\nnoise: one chunk a seed). d = 10: a chunk is five actions. "
        "Below a panel: means over the seeds.", fontsize=10)
    save(args, "rings", figure, table)


def distil(args, own, value, key):
    """dsrl's latent critics of a value that stands still, at normal latents."""
    s, z = jnp.ones((own.batch_size, 1)), jnp.zeros((own.batch_size, 2))
    state = dict(latent_critic=dsrl.create(own, key, dsrl.Critic(own.critic_hidden_dims), s, z))

    def step(state, key):
        z = jax.random.normal(key, (own.batch_size, 2))

        def loss(params):
            return jnp.mean((state["latent_critic"].apply_fn(params, s, z) - value(s, z)) ** 2), {}

        return dsrl.descend(state, dict(latent_critic=loss))

    return jax.lax.scan(step, state, jax.random.split(key, args.total_steps))[0]["latent_critic"]


def two_values(args, script, own, z, state, key):
    """Q through the decoder and Q^z at latents z, and the cosine of their gradients in z."""
    def value(s, z):
        a = script.decode(own, state["policy"], s, z)
        return state["critic"].apply_fn(state["critic"].params, s, a).mean(axis=0)

    latent_critic = distil(args, own, value, key) if script is lps else state["latent_critic"]

    def latent_value(s, z):
        return latent_critic.apply_fn(latent_critic.params, s, z).mean(axis=0)

    s = jnp.ones((len(z), 1))
    q, qz = value(s, z), latent_value(s, z)
    g, h = (jax.grad(lambda z: v(s, z).sum())(z) for v in (value, latent_value))  # noqa: B023  called at once
    if script is dsrl:  # along the tangent of its circle
        tangent = jnp.stack([-z[:, 1], z[:, 0]], axis=1)
        g, h = (tangent * (x * tangent).sum(axis=1, keepdims=True) for x in (g, h))
    norms = jnp.linalg.norm(g, axis=1) * jnp.linalg.norm(h, axis=1)
    return q, qz, (g * h).sum(axis=1) / jnp.maximum(norms, 1e-12)


def draw_plane(axis, line, x, title, label, **looks):
    """A value of latents over the plane, and dsrl's circle in it."""
    image = axis.pcolormesh(line, line, x.reshape(len(line), -1), rasterized=True, **looks)
    axis.add_patch(Circle((0, 0), np.sqrt(2), fill=False, ls=":", lw=1.2))
    axis.set(title=title, xlabel="latent z, first dimension", ylabel="latent z, second dimension", aspect="equal")
    plt.colorbar(image, ax=axis, label=label, fraction=0.046, pad=0.04)


def grid(args, folder):
    """The sphere of d = 2 is a circle. So lps is trained with --latent normal, to make Q(f(z)) a function of the plane,
    and Q^z, dsrl's latent critics, is fitted to it. dsrl itself is compared on its circle: there a gradient has one
    direction, the tangent, and a cosine is 1 or -1."""
    line, angles, table, compared = np.linspace(-2.5, 2.5, 101), np.arange(360), [], {}
    plane = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    circle = np.sqrt(2) * np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    figure, ((on_q, on_qz, on_cosine), (on_actions, on_circle, empty)) = plt.subplots(2, 3, figsize=(14, 10))
    empty.set_visible(False)
    for method, script, z, settings in (("lps --latent normal", lps, plane, dict(latent="normal")),
                                        ("lps", lps, None, {}), ("dsrl", dsrl, circle, {})):
        own, states = learn(args, folder, script, "Grid", **settings)
        a, scores = play(args, "Grid", partial(script.act, own), states, 1)
        draw_actions(on_actions, "Grid", a, color=LOOKS[method][0], marker=LOOKS[method][2], label=method)
        if z is not None:
            q, qz, cosines = jax.jit(jax.vmap(partial(two_values, args, script, own, z)))(states, seed_keys(args))
            scores |= dict(mean_cosine=cosines.mean(axis=1), negative_share=(cosines < 0).mean(axis=1))
            compared[script] = q[0], qz[0], cosines[0], f"mean cosine {scores['mean_cosine'].mean():.2f}"
        table += table_rows(args, scores, method=method)

    for centre, pay in zip(CENTRES, PAY):
        on_actions.annotate(f"{pay:g}", centre + (0, 0.17), ha="center", fontsize=9)
    on_actions.set(title="the actions of all seeds over the data in grey,\nand what they pay",
                   xlabel="action, first dimension", ylabel="action, second dimension")
    q, qz, cosines, says = compared[lps]
    looks = dict(cmap="cividis", vmin=0, vmax=PAY.max())
    draw_plane(on_q, line, q, "lps --latent normal: Q(f(z))", "Q", **looks)
    draw_plane(on_qz, line, qz, "$Q^z$(z), distilled from it", "$Q^z$", **looks)
    draw_plane(on_cosine, line, cosines, f"their gradients in z: {says}", "cosine", cmap="RdBu", vmin=-1, vmax=1)
    q, qz, cosines, says = compared[dsrl]
    on_circle.plot(angles, q, color="black", label="Q through its ten-step flow")
    on_circle.plot(angles, qz, color=LOOKS["dsrl"][0], ls=LOOKS["dsrl"][1], label="its own $Q^z$")
    on_circle.fill_between(angles, 0, 1, where=cosines < 0, color="#dddddd", lw=0, label="slopes of opposite sign",
                           transform=on_circle.get_xaxis_transform())
    on_circle.set(title=f"dsrl as it is, on its circle (dotted in the planes):\n{says}", ylabel="Q", box_aspect=1,
                  xlabel="angle of the latent, degrees", xlim=(0, 360))
    for axis in (on_actions, on_circle):
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False)
    figure.suptitle(f"Planes and curves: the first seed. Cosines: means over {args.num_seeds} seeds. No units.")
    save(args, "grid", figure, table)


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for figure in dict.fromkeys(args.figures):
        with tempfile.TemporaryDirectory() as folder:
            dict(rings=rings, grid=grid)[figure](args, Path(folder))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
