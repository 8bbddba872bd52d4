"""How policies act: success, what the critics promise at the start of an episode, and what is got. On cube-single,
also how they grasp: the share of first grasps that hold, where the hand closes, and of the chunk that closes it how
unusual it is, what the critics promise of it, and what is got.

    python benchmark/grasp.py runs/slips/*/lps/seed0 runs/slips/*/mf_bon/seed0 --out grasp.csv
    python benchmark/grasp.py runs/hundred/*/lps/seed0 --choices "as trained" "best of 32 latents" --out choices.csv
    python benchmark/grasp.py --data runs/data-200/cube-single-play-v0.npz       # the experts' grasps, from the data

For runs from states. An lps or mf_bon run is also played with other choices of the latent.
"""

import json
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.serialization import from_state_dict, msgpack_restore

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts lie
import lps
import mf_bon
from benchmark import ablations
from benchmark.latency import write_table
from benchmark.report import read_method

# Where OGBench's observation of one cube has what is measured, and by what it multiplies metres and the opening.
HAND, OPENING, CUBE, METRE, CLOSED = slice(12, 15), 17, slice(19, 22), 10, 3
REACH, LIFT, SOON = 0.08, 0.02, 25  # a grasp: the hand closes so near the cube, and lifts it so far within these steps


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]] = ()
    data: Path | None = None  # a dataset of cube-single, whose grasps are measured instead
    episodes: int = 30  # of each policy, reset with the seeds 0, 1, ...
    choices: tuple[str, ...] = ()  # how the latent is chosen, by the names in the table (default: in every way)
    latents: int = 1000  # random ones, with whose chunks the chunk of a grasp is compared
    out: Path = Path("grasp.csv")


def grasps(s):
    """[(step, distance in cm between hand and cube, whether it holds)] of a trajectory's observations."""
    closed = s[:, OPENING] / CLOSED > 0.3
    apart = np.linalg.norm(s[:, HAND] - s[:, CUBE], axis=1) / METRE
    found = []
    for t in np.flatnonzero(closed[1:] & ~closed[:-1] & (apart[1:] < REACH)) + 1:
        height = s[t : t + SOON, CUBE.stop - 1] / METRE
        found.append((t, 100 * apart[t], height.max() > height[0] + LIFT))
    return found


def load(run_dir):
    """A run's method, script, arguments, and first seed's state. For a run of ablations.py, lps is changed."""
    record = json.loads((run_dir / "args.json").read_text())
    script = import_module(record["script"] if record["script"] != "ablations" else "benchmark.ablations")
    saved = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items() if name in vars(script.Args())}
    args = script.Args(**saved)
    ablations.exchange(args if script is ablations else ablations.Args())
    script = lps if script is ablations else script
    s = script.stack(jnp.zeros((1, *script.make_env(args).observation_space.shape)))
    like = jax.vmap(lambda key: script.init(args, key, s))(jax.random.split(jax.random.key(0), args.num_seeds))
    states = from_state_dict(like, msgpack_restore((run_dir / "checkpoint.msgpack").read_bytes())["states"])
    return read_method(record), script, args, ablations.averaged(jax.tree.map(lambda x: x[0], states))


def q_of(state, s, a):
    """Q_k(s, a), a line for each of the critics."""
    return state["critic"].apply_fn(state["critic"].params, s, a)


def choices(script, args):
    """{how the chunk is chosen: (a function like act, the arguments with which latents become chunks)}."""
    def decode(state, s, z):
        return jnp.clip(script.decode(args, state["policy"], s, z), -1, 1)

    def random_latents(n, key):
        return script.sphere(jax.random.normal(key, (n, args.horizon * args.action_dim)))

    def random(state, s, key):
        return decode(state, s, random_latents(len(s), key))

    def climbed(state, s, key):
        """By the mean of both critics, in 100 small steps on the sphere from a random latent."""
        def q(z):
            return q_of(state, s, decode(state, s, z)).mean(axis=0).sum()  # the rows of s do not meet

        def step(_, z):
            return script.sphere(z + 0.05 * script.sphere(jax.grad(q)(z)))

        return decode(state, s, jax.lax.fori_loop(0, 100, step, random_latents(len(s), key)))

    def best_of_32(own, state, s, key):
        """By min_k Q_k, of random latents, one of which the actor's takes the place of."""
        z = random_latents(32, key)
        if own:
            actor = state["latent_actor"]
            z = z.at[0].set(script.sphere(actor.apply_fn(actor.params, s))[0])
        s = jnp.repeat(s, 32, axis=0)
        a = decode(state, s, z)
        return a[q_of(state, s, a).min(axis=0).argmax()][None]

    found = {"as trained": (partial(script.act, args), args)}
    if script in (lps, mf_bon):
        found["a random latent"] = random, args
        found["a latent climbed to"] = climbed, args
    if script is lps:
        two = replace(args, decode_steps=2)
        if args.decode_steps == 1:
            found["two steps"] = partial(script.act, two), two
        found["best of 32 latents"] = partial(best_of_32, False), args
        found["best of l(s) and 31 latents"] = partial(best_of_32, True), args
    if script is mf_bon:
        for n in 8, 128:
            found[f"best of {n} latents"] = partial(script.act, replace(args, num_samples=n)), args
    return found


def play(script, args, policy, seed):
    """An episode's observations, those before each chunk, the chunks, the rewards, and whether it was solved."""
    env, key = script.make_env(args).env, jax.random.key(seed)  # without Chunks: every step is seen
    stacked, _ = env.reset(seed=seed)
    seen, before, chunks, rewards, done = [stacked[-1]], [], [], [], False
    while not done:
        key, act_key = jax.random.split(key)
        before.append(script.stack(stacked[None]))
        chunks.append(np.asarray(policy(before[-1], act_key))[0])
        for action in chunks[-1].reshape(args.horizon, -1):
            stacked, reward, terminated, truncated, info = env.step(action)
            seen.append(stacked[-1])
            rewards.append(info["success"] - 1 if args.sparse else reward)
            if done := terminated or truncated:
                break
    env.close()
    return np.array(seen), before, chunks, np.array(rewards), info["success"]


def unusual(script, args, state, n, s, a):
    """The distance of chunk a from the mean chunk of n random latents, and the 99.9th percentile of theirs."""
    z = jax.random.normal(jax.random.key(0), (n, a.size))
    if hasattr(script, "sphere"):
        z = script.sphere(z)
    chunks = jnp.clip(script.decode(args, state["policy"], jnp.repeat(s, n, axis=0), z), -1, 1)
    mean = chunks.mean(axis=0)
    return jnp.linalg.norm(a - mean), jnp.percentile(jnp.linalg.norm(chunks - mean, axis=1), 99.9)


def summary(found):
    """Of grasps, one an episode or all of a dataset."""
    _, apart, hold = np.array(found).T if found else np.full((3, 1), np.nan)
    return {"grasps": len(found), "hold": np.mean(hold), "median cm": np.median(apart),
            "beyond 1 cm": np.mean(apart > 1) if found else np.nan}


def means(pairs):
    """Of the first and of the second numbers; nan if there are none."""
    return np.mean(np.array(pairs or [(np.nan, np.nan)], float), axis=0)


def worth(own, state, s, a, rewards):
    """What the critics promise of a chunk: their mean Q. And what is got: the discounted rewards from its first on."""
    promised = q_of(state, s, a[None]).mean() if "critic" in state else np.nan
    return promised, rewards @ own.gamma ** np.arange(len(rewards))


def rows_of(args, run_dir):
    method, script, own, state = load(run_dir)
    for choice, (act, decoding) in choices(script, own).items():
        if args.choices and choice not in args.choices:
            continue
        policy, first, odd, of_grasp, of_episode, solved = jax.jit(partial(act, state)), [], [], [], [], []
        judge = jax.jit(partial(unusual, script, decoding, state, args.latents))
        for seed in range(args.episodes):
            s, before, chunks, rewards, success = play(script, own, policy, seed)
            solved.append(success)
            of_episode.append(worth(own, state, before[0], chunks[0], rewards))
            if "cube-single" in own.env_id and (found := grasps(s)):
                first.append(found[0])
                i = (found[0][0] - 1) // own.horizon
                if script.__name__ != "cfgrl":  # which has no latents that stand for chunks
                    odd.append(judge(before[i], chunks[i]))
                of_grasp.append(worth(own, state, before[i], chunks[i], rewards[i * own.horizon :]))
        (distance, usual), (promised, got), (first_promised, first_got) = means(odd), means(of_grasp), means(of_episode)
        yield {"run": f"{method}, seed {own.seed}", "chunk": choice, "episodes": args.episodes,
               "success": np.mean(solved), **summary(first), "from the mean chunk": distance,
               "one latent in 1,000": usual, "promised": promised, "got": got,
               "promised at the start": first_promised, "got from there": first_got}


def main(args):
    rows = []
    if args.data:
        data = np.load(args.data)
        ends = np.flatnonzero(data["terminals"]) + 1
        found = [grasp for s in np.split(data["observations"], ends[:-1]) for grasp in grasps(s)]
        rows.append({"run": "the data", **summary(found)})
    for run_dir in args.run_dirs:
        rows += rows_of(args, run_dir)
    table = [{name: f"{x:.3g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows]
    write_table(args.out, table)
    print(args.out.read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
