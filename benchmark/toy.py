"""Toy figures: what alpha does on two rings, and what distilling a latent critic does to its gradient on a grid.

    python benchmark/toy.py                                     # both figures, to benchmark/results/toy
    python benchmark/toy.py rings --out benchmark/results/toy   # rings.png and rings.csv alone

One constant observation and 2-D actions, trained by the scripts' own train() with small nets: 64x3, critics 64x2, a
latent actor of 64x2, Adam 1e-3, batch 128, gamma 1 (an episode ends with its chunk: Q is the chunk's reward).

rings  Actions lie on two rings; only the upper-right arc of the outer one pays. qc_mfql and lps at four alphas; then
       the same with five ring actions in an episode, played as one chunk: latents of d = 10 instead of d = 2.
grid   Actions lie in 3x3 clusters of unequal pay. The sphere of d = 2 is a circle, so lps is trained with --latent
       normal to make Q(f(z)) a function of the whole plane. dsrl's own latents stay on their circle, and its Q^z means
       nothing off it. So on the plane both gradients are of the same f and the same Q: Q^z are dsrl's latent critics,
       fitted by dsrl's loss and step at normal latents to Q(f(z)), as many updates as lps had. There f and Q stand
       still, in dsrl they do not: its best case. And dsrl as it is, with its own ten-step flow, is compared on its
       circle, where a gradient has one direction, the tangent, and a cosine is 1 or -1.
"""

import csv
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import gymnasium
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the scripts lie
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Wedge

import dsrl
import lps
from benchmark.report import LOOKS, MARKERS


@dataclass
class Args:
    figures: Annotated[tuple[Literal["rings", "grid"], ...], tyro.conf.Positional] = ("rings", "grid")
    """which to make"""
    out: Path = Path("benchmark/results/toy")
    """the folder for each figure's .png and .csv"""
    seed: int = 0
    """the first seed of the trainings; the data are always those of seed 0"""
    num_seeds: int = 2
    """trainings of each kind"""
    total_steps: int = 8000
    """updates of each training"""


# ======================================================================================================== Environments

RADII, RING_STD = np.array([0.35, 0.75]), 0.02
CENTRES, GRID_STD = np.array([(x, y) for y in (0.6, 0, -0.6) for x in (-0.6, 0, 0.6)]), 0.04
PAY = np.array([0.3, 0.9, 0.4,
                0.7, 0.1, 0.5,
                0.2, 0.6, 0.8])  # of the clusters, as they lie in the plane


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
    observation_space, action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,)), gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, task):
        self.steps, _, self.judge = TASKS[task]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.ones(1, np.float32), float(self.judge(action)[1]), self.t == self.steps, False, {}


for task in TASKS:
    if f"{task}-v0" not in gymnasium.registry:  # as a program, this file is imported a second time by its ids
        gymnasium.register(f"{task}-v0", "benchmark.toy:Toy", kwargs=dict(task=task))


def make_data(task, n):
    """n episodes under the dataset contract."""
    steps, actions, judge = TASKS[task]
    a, t = np.zeros((n, steps + 1, 2)), np.tile(np.arange(steps + 1), (n, 1))
    a[:, :steps] = actions(np.random.default_rng(0), (n, steps))
    rows = dict(observations=np.ones((n, steps + 1, 1)), actions=a, rewards=judge(a)[1],
                terminals=t == steps, masks=t < steps - 1)
    return {key: x.reshape(-1, *x.shape[2:]) for key, x in rows.items()}


# ============================================================================================================ Training


def learn(args, folder, name, task, **settings):
    """Trains a script on a task. Returns the script, its arguments and the states of all seeds."""
    script, path = import_module(name), folder / f"{task}.npz"
    np.savez(path, **make_data(task, 20_000))
    if name == "lps":
        settings["latent_actor_hidden_dims"] = (64, 64)
    own = script.Args(
        env_id=f"benchmark.toy:{task}-v0", dataset_path=path, horizon=TASKS[task][0], gamma=1.0, learning_rate=1e-3,
        batch_size=128, actor_hidden_dims=(64,) * 3, critic_hidden_dims=(64,) * 2, seed=args.seed,
        num_seeds=args.num_seeds, total_steps=args.total_steps, log_interval=0, eval_interval=0, eval_episodes=0,
        run_dir=Path(tempfile.mkdtemp(dir=folder)) / "run", **settings)
    script.train(own)
    like = jax.eval_shape(jax.vmap(lambda key: script.init(own, key, (1,), 2)), seed_keys(args))
    return script, own, script.load_checkpoint(own.run_dir / "checkpoint.npz", like)[0]


def seed_keys(args):
    return jax.vmap(jax.random.key)(args.seed + jnp.arange(args.num_seeds))


def base(script, own, state, s, key):
    """Chunks that the imitating policy alone makes of random latents."""
    policy, shape = state.params["policy"], (len(s), 2 * own.horizon)
    if script is lps:
        return jnp.clip(lps.decode(own, policy, s, lps.draw_latent(own, key, shape)), -1, 1)
    return jnp.clip(script.one_step(partial(script.f, policy), s, jax.random.normal(key, shape)), -1, 1)


def play(args, choose, states, n):
    """What choose(state, observations, key) does n times for each seed: actions [seed, n x steps, 2]."""
    chunks = jax.vmap(lambda state, key: choose(state, jnp.ones((n, 1)), key))(states, seed_keys(args))
    return np.asarray(chunks).reshape(args.num_seeds, -1, 2)


def score(task, a):
    """Each seed's share of actions on the data, and mean reward."""
    on_data, rewards = TASKS[task][2](a)
    return [dict(on_data=x, reward=y) for x, y in zip(on_data.mean(axis=1), rewards.mean(axis=1))]


def mean(rows, name):
    return np.mean([row[name] for row in rows])


def write_csv(path, rows):
    names = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows({k: f"{x:.4g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)


# ============================================================================================================= Figures

ALPHAS = 100.0, 10.0, 1.0, 0.1
ROWS = [(name, task) for task in ("Rings", "RingsChunk") for name in ("qc_mfql", "lps")]
EDGE = 2.5  # of the square of latents
FRAME = dict(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))


def draw_actions(axis, task, a, **looks):
    """Actions over the data in grey; a black line round what pays on the rings."""
    data = make_data(task, 1500)
    axis.scatter(*data["actions"][data["terminals"] == 0][:1500].T, s=2, c="#c8c8c8", lw=0, zorder=0)
    if task != "Grid":
        axis.add_patch(Wedge((0, 0), RADII[1] + 4 * RING_STD, 0, 90, width=8 * RING_STD, fill=False, lw=0.9))
    few = dict(s=36, edgecolors="black", lw=0.7) if a.size <= 100 else dict(s=5, lw=0)
    axis.scatter(*a[:, :200].reshape(-1, 2).T, zorder=4, **few, **looks)
    axis.set(**FRAME)


def rings(args, folder):
    figure, axes = plt.subplots(len(ROWS), 1 + len(ALPHAS), figsize=(11.5, 11.3), sharex=True, sharey=True)
    table = []
    for line, (name, task) in zip(axes, ROWS):
        cells = []
        for alpha in ALPHAS:
            script, own, states = learn(args, folder, name, task, alpha=alpha)
            n = 1 if name == "lps" else 100  # lps acts without noise
            cells.append((alpha, play(args, partial(script.act, own), states, n)))
        cells.insert(0, ("base", play(args, partial(base, script, own), states, 100)))  # alike for every alpha
        for axis, (alpha, a) in zip(line, cells):
            rows = score(task, a)
            table += [dict(method=name, d=2 * own.horizon, alpha=alpha, seed=args.seed + i) | row
                      for i, row in enumerate(rows)]
            draw_actions(axis, task, a, color=LOOKS[name][0])
            axis.set_title("f alone, random latents" if alpha == "base" else f"alpha {alpha:g}", fontsize=9)
            axis.set_xlabel(f"on data {mean(rows, 'on_data'):.2f}, reward {mean(rows, 'reward'):.2f}", fontsize=9)
        line[0].set_ylabel(f"{name}, d = {2 * own.horizon}", fontsize=10)
    write_csv(args.out / "rings.csv", table)
    figure.suptitle(
        "Axes: the two dimensions of an action, no unit. Grey: the data. Inside the black line an action pays 1.\n"
        f"Dots: at most 200 actions of each of {args.num_seeds} seeds; lps acts without noise: one large chunk a seed. "
        "d = 10: a chunk is five actions.\nBelow a panel: share of actions within "
        f"{4 * RING_STD:g} of a ring, and mean reward of an action; means over the seeds.", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.out / "rings.png", dpi=150)


def cosine(g, h):
    return (g * h).sum(axis=-1) / jnp.maximum(jnp.linalg.norm(g, axis=-1) * jnp.linalg.norm(h, axis=-1), 1e-12)


def alignment(cosines):
    return dict(mean_cosine=float(cosines.mean()), negative_share=float((cosines < 0).mean()))


def distil(args, own, value, key):
    """dsrl's latent critics of a value that stands still, at latents that lps draws."""
    params, s = dsrl.init(own, key, (1,), 2).params, jnp.ones((own.batch_size, 1))
    params = dict(latent_critics=params["latent_critics"])

    def step(state, key):
        z = lps.draw_latent(own, key, (own.batch_size, 2))
        return dsrl.descend(own, state, dict(latent_critics=lambda nets: dsrl.critic_loss(nets, s, z, value(s, z))))

    state = dsrl.State(params, None, optax.adam(own.learning_rate).init(params))
    return jax.lax.scan(step, state, jax.random.split(key, args.total_steps))[0].params["latent_critics"]


def two_values(args, script, own, z, state, key):
    """Q through the decoder and Q^z at latents z, and the cosine of their gradients in z."""
    params = state.params
    decode = partial(lps.decode if script is lps else dsrl.sample_flow, own, params["policy"])
    value = lambda s, z: script.q_values(params["critics"], s, decode(s, z)).mean(axis=0)
    nets = distil(args, own, value, key) if script is lps else params["latent_critics"]
    latent_value = lambda s, z: dsrl.q_values(nets, s, z).mean(axis=0)
    (q, g), (qz, h) = (jax.vmap(jax.value_and_grad(partial(v, jnp.ones(1))))(z) for v in (value, latent_value))
    if script is dsrl:  # along the tangent of its circle
        tangent = jnp.stack([-z[:, 1], z[:, 0]], axis=1)
        g, h = (tangent * (x * tangent).sum(axis=1, keepdims=True) for x in (g, h))
    return q, qz, cosine(g, h)


def grid(args, folder):
    line, angles, table, compared = np.linspace(-EDGE, EDGE, 101), np.arange(360), [], {}
    plane = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    circle = np.sqrt(2) * np.stack([np.cos(np.radians(angles)), np.sin(np.radians(angles))], axis=1)
    figure, ((on_data, on_q, on_qz), (on_actions, on_circle, on_cosine)) = plt.subplots(2, 3, figsize=(13, 9.8))
    for label, name, marker, colour, z, settings in (
            ("lps --latent normal", "lps", "D", "white", plane, dict(latent="normal")),
            ("lps", "lps", MARKERS["lps"], LOOKS["lps"][0], None, {}),
            ("dsrl", "dsrl", MARKERS["dsrl"], LOOKS["dsrl"][0], circle, {})):
        script, own, states = learn(args, folder, name, "Grid", **settings)
        a = play(args, partial(script.act, own), states, 1)
        rows = score("Grid", a)
        draw_actions(on_actions, "Grid", a, color=colour, marker=marker,
                     label=f"{label}: on data {mean(rows, 'on_data'):.2f}, reward {mean(rows, 'reward'):.2f}")
        if z is not None:
            q, qz, cosines = jax.jit(jax.vmap(partial(two_values, args, script, own, z)))(states, seed_keys(args))
            rows = [row | alignment(x) for row, x in zip(rows, cosines)]
            compared[name] = q[0], qz[0], cosines[0], (f"mean cosine {mean(rows, 'mean_cosine'):.2f}, negative on "
                                                       f"{mean(rows, 'negative_share'):.0%} of the ")
        table += [dict(method=label, seed=args.seed + i) | row for i, row in enumerate(rows)]
    write_csv(args.out / "grid.csv", table)

    data, looks = make_data("Grid", 1000), dict(cmap="cividis", vmin=0, vmax=PAY.max())
    bar = lambda image, axis, label: figure.colorbar(image, ax=axis, label=label, fraction=0.046, pad=0.04)
    bar(on_data.scatter(*data["actions"][::2].T, c=data["rewards"][::2], s=6, lw=0, **looks), on_data, "reward")
    for centre, pay in zip(CENTRES, PAY):
        on_data.annotate(f"{pay:g}", centre + (0, 0.17), ha="center", fontsize=9)
    on_data.set(title="the data by reward", **FRAME)
    on_actions.set(title=f"the actions of {args.num_seeds} seeds, the data in grey")
    for axis in (on_data, on_actions):
        axis.set(xlabel="action, first dimension", ylabel="action, second dimension")
    q, qz, cosines, says = compared["lps"]
    for axis, x, title, label, its in (
            (on_q, q, "Q(f(z)): through the decoder", "Q", looks),
            (on_qz, qz, "$Q^z$(z): distilled from it", "$Q^z$", looks),
            (on_cosine, cosines, f"their gradients in z:\n{says}plane", "cosine", dict(cmap="RdBu", vmin=-1, vmax=1))):
        image = axis.pcolormesh(line, line, x.reshape(len(line), -1), rasterized=True, **its)
        axis.plot(*circle.T, color="black" if axis is on_cosine else "white", ls=":", lw=1.2)
        axis.set(title=title, xlabel="latent z, first dimension", ylabel="latent z, second dimension", aspect="equal")
        bar(image, axis, label)
    q, qz, cosines, says = compared["dsrl"]
    on_circle.plot(angles, q, color="black", label="Q through its ten-step flow")
    on_circle.plot(angles, qz, color=LOOKS["dsrl"][0], ls=LOOKS["dsrl"][1], label="its own $Q^z$")
    on_circle.fill_between(angles, 0, 1, where=cosines < 0, color="#dddddd", lw=0, label="slopes of opposite sign",
                           transform=on_circle.get_xaxis_transform())
    on_circle.set(title=f"dsrl as it is, on its circle:\n{says}circle", xlabel="angle of the latent, degrees",
                  ylabel="Q", xlim=(0, 360), xticks=range(0, 361, 90), box_aspect=1)
    for axis in (on_data, on_q, on_qz, on_actions, on_circle, on_cosine):
        axis.title.set_fontsize(10)
    for axis in (on_actions, on_circle):
        axis.legend(fontsize=9, loc="upper left", bbox_to_anchor=(-0.05, -0.16), frameon=False)
    figure.suptitle(
        "Planes: lps --latent normal, whose latents fill the plane, and dsrl's latent critics fitted to its Q(f(z)), "
        "f and Q at rest.\ndsrl's own latents are a circle (dotted in the planes), where a cosine is 1 or -1. "
        f"Planes and curves: the first seed; numbers: means over {args.num_seeds} seeds. No units.", fontsize=10)
    figure.tight_layout()
    figure.savefig(args.out / "grid.png", dpi=150)


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.figures:
        with tempfile.TemporaryDirectory() as folder:
            dict(rings=rings, grid=grid)[name](args, Path(folder))
        print(args.out / f"{name}.png", args.out / f"{name}.csv")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
