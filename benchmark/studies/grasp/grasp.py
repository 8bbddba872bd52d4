"""How policies act with other choices of the latent, and on cube-single how they grasp.

    python -m benchmark.studies.grasp.grasp runs/slips/*/lps/seed0 runs/slips/*/mf_bon/seed0
    python -m benchmark.studies.grasp.grasp runs/*/lps/seed0 --choices "as trained" "two steps"
    python -m benchmark.studies.grasp.grasp --data runs/data-200/cube-single-play-v0.npz

It is for runs from states. README.md beside this file says what is measured.
"""

import csv
import json
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmark import ablations
from benchmark.report import read_method

# Where OGBench's observation of one cube has what is measured, and by what it multiplies them.
HAND = slice(12, 15)
CUBE = slice(19, 22)
METRE = 10
OPENING = 17
CLOSED = 3
REACH = 0.08  # metres: a grasp begins where the hand closes so near the cube
LIFT = 0.02  # metres: it holds if the cube is lifted so far
SOON = 25  # steps: within so many


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]] = ()
    data: Path | None = None  # a dataset of cube-single, whose grasps are measured instead
    episodes: int = 30  # of each policy, reset with the seeds 0, 1, ...
    choices: tuple[str, ...] = ()  # of the latent, by their names in the table (default: all)
    latents: int = 1000  # random ones, with whose chunks the chunk of a grasp is compared
    out: Path = Path("grasp.csv")


def load(run_dir):
    """A run's method, script, arguments and state. lps is ablations.py with nothing exchanged."""
    record = json.loads((run_dir / "args.json").read_text())
    is_lps = record["script"] in ("lps", "ablations")
    script = ablations if is_lps else import_module(record["script"])
    known = vars(script.Args())
    saved = {name: x for name, x in record.items() if name in known}
    saved = {name: tuple(x) if isinstance(x, list) else x for name, x in saved.items()}
    args = replace(script.Args(**saved), run_dir=str(run_dir))
    if is_lps:
        script = ablations.exchange(args)
    env = script.make_env(args)
    state, _ = script.load_state(args, script.init_state(args, env))
    env.close()
    return read_method(record), script, args, ablations.averaged(state)


# ======================================================================================= Choosing


def q_of(state, s, a):
    """Q_k(s, a), k along the first axis."""
    return state["critic"].apply_fn(state["critic"].params, s, a)


def decode(script, args, state, s, z):
    return jnp.clip(script.decode(args, state["policy"], s, z), -1, 1)


def random_latents(script, args, n, key):
    return script.sphere(jax.random.normal(key, (n, args.horizon * args.action_dim)))


def act_at_random(script, args, state, s, key):
    return decode(script, args, state, s, random_latents(script, args, len(s), key))


def act_by_climbing(script, args, state, s, key):
    """By the critics' mean, in 100 small steps on the sphere from a random latent."""

    def q(z):
        return q_of(state, s, decode(script, args, state, s, z)).mean(axis=0).sum()

    def step(_, z):
        return script.sphere(z + 0.05 * script.sphere(jax.grad(q)(z)))

    z = random_latents(script, args, len(s), key)
    return decode(script, args, state, s, jax.lax.fori_loop(0, 100, step, z))


def act_by_searching(script, args, with_own, state, s, key):
    """By min_k Q_k, of 32 random latents, one of which the actor's takes the place of."""
    z = random_latents(script, args, 32, key)
    if with_own:
        actor = state["latent_actor"]
        z = z.at[0].set(script.sphere(actor.apply_fn(actor.params, s))[0])
    s = jnp.repeat(s, 32, axis=0)
    a = decode(script, args, state, s, z)
    return a[q_of(state, s, a).min(axis=0).argmax()][None]


def find_choices(script, args):
    """{how the chunk is chosen: (a function like act, the script and arguments that decode)}"""
    own = script, args
    found = {"as trained": (partial(script.act, args), own)}
    is_lps = isinstance(args, ablations.Args)
    if is_lps or script.__name__ == "mf_bon":
        found["a random latent"] = partial(act_at_random, *own), own
        found["a latent climbed to"] = partial(act_by_climbing, *own), own
    if is_lps:
        if args.decode_steps == 1 and args.base == "meanflow":
            in_two = replace(args, decode_steps=2)
            other = ablations.exchange(in_two)
            found["two steps"] = partial(other.act, in_two), (other, in_two)
        found["best of 32 latents"] = partial(act_by_searching, *own, False), own
        found["best of l(s) and 31 latents"] = partial(act_by_searching, *own, True), own
    if script.__name__ == "mf_bon":
        for n in (8, 128):
            wider = partial(script.act, replace(args, num_samples=n))
            found[f"best of {n} latents"] = wider, own
    return found


# ====================================================================================== Measuring


def find_grasps(s):
    """(step, cm between hand and cube, whether it holds) of each grasp in a trajectory."""
    is_closed = s[:, OPENING] / CLOSED > 0.3
    apart = np.linalg.norm(s[:, HAND] - s[:, CUBE], axis=1) / METRE
    begins = is_closed[1:] & ~is_closed[:-1] & (apart[1:] < REACH)
    found = []
    for t in np.flatnonzero(begins) + 1:
        height = s[t : t + SOON, CUBE.stop - 1] / METRE
        found.append((t, 100 * apart[t], height.max() > height[0] + LIFT))
    return found


def play(script, args, policy, seed):
    """Of an episode: the observations, those before chunks, the chunks, rewards, and success."""
    env = script.make_env(args).env  # without Chunks: every step is seen
    key = jax.random.key(seed)
    s, _ = env.reset(seed=seed)
    seen = [s]
    before = []
    chunks = []
    rewards = []
    done = False
    while not done:
        key, act_key = jax.random.split(key)
        before.append(s[None])
        chunks.append(np.asarray(policy(before[-1], act_key))[0])
        for action in chunks[-1].reshape(args.horizon, -1):
            s, reward, terminated, truncated, info = env.step(action)
            seen.append(s)
            rewards.append(info["success"] - 1 if args.sparse else reward)
            done = terminated or truncated
            if done:
                break
    env.close()
    return np.array(seen), before, chunks, np.array(rewards), info["success"]


def unusual(script, args, n, state, s, a):
    """How far chunk a is from the mean chunk of n random latents, and what one in 1,000 exceeds."""
    z = jax.random.normal(jax.random.key(0), (n, a.size))
    if hasattr(script, "sphere"):
        z = script.sphere(z)
    chunks = decode(script, args, state, jnp.repeat(s, n, axis=0), z)
    mean = chunks.mean(axis=0)
    usual = jnp.percentile(jnp.linalg.norm(chunks - mean, axis=1), 99.9)
    return jnp.linalg.norm(a - mean), usual


def worth(args, state, s, a, rewards):
    """The critics' mean Q of a chunk, and the discounted rewards from its first step on."""
    promised = q_of(state, s, a[None]).mean() if "critic" in state else np.nan
    return promised, rewards @ args.gamma ** np.arange(len(rewards))


def summarise(grasps):
    """Of grasps, one an episode or all of a dataset."""
    _, apart, hold = np.array(grasps).T if grasps else np.full((3, 1), np.nan)
    row = {"grasps": len(grasps), "hold": np.mean(hold), "median cm": np.median(apart)}
    return row | {"beyond 1 cm": np.mean(apart > 1) if grasps else np.nan}


def means(names, pairs):
    """Of the first and of the second numbers; nan if there are none."""
    return dict(zip(names, np.mean(np.array(pairs or [(np.nan, np.nan)], float), axis=0)))


def measure(args, script, own, state, act, decoding):
    """A row of the table: episodes of one policy with one choice of the latent."""
    policy = jax.jit(partial(act, state))
    judge = jax.jit(partial(unusual, *decoding, args.latents, state))
    grasps = []  # the first of each episode
    distances = []
    of_grasps = []
    of_episodes = []
    solved = []
    for seed in range(args.episodes):
        s, before, chunks, rewards, success = play(script, own, policy, seed)
        solved.append(success)
        of_episodes.append(worth(own, state, before[0], chunks[0], rewards))
        found = find_grasps(s) if "cube-single" in own.env_id else []
        if found:
            grasps.append(found[0])
            i = (found[0][0] - 1) // own.horizon  # the chunk that closes the hand
            if script.__name__ != "cfgrl":  # which has no latents that stand for chunks
                distances.append(judge(before[i], chunks[i]))
            of_grasps.append(worth(own, state, before[i], chunks[i], rewards[i * own.horizon :]))
    row = {"episodes": args.episodes, "success": np.mean(solved), **summarise(grasps)}
    row |= means(("from the mean chunk", "one latent in 1,000"), distances)
    row |= means(("promised", "got"), of_grasps)
    return row | means(("promised at the start", "got from there"), of_episodes)


def main(args):
    rows = []
    if args.data:
        data = np.load(args.data)
        ends = np.flatnonzero(data["terminals"]) + 1
        grasps = []
        for s in np.split(data["observations"], ends[:-1]):
            grasps += find_grasps(s)
        rows.append({"run": "the data", **summarise(grasps)})
    for run_dir in args.run_dirs:
        method, script, own, state = load(run_dir)
        for choice, (act, decoding) in find_choices(script, own).items():
            if choice in (args.choices or [choice]):
                row = {"run": f"{method}, seed {own.seed}", "chunk": choice}
                rows.append(row | measure(args, script, own, state, act, decoding))
                print(f"{method}, {choice}: {rows[-1]['success']:.2f}", flush=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(args.out, "w", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow(
                {name: f"{x:.3g}" if isinstance(x, float) else x for name, x in row.items()}
            )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
