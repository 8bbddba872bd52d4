"""The dataset contract: batches against brute force, pixels too, OGBench's relabelling, and data on the disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_envs
from helpers import COUNTING, make_data

import lps


def loaded(tmp_path, data, env_id=COUNTING, folder=False, **settings):
    """What the script makes of a dataset: its arguments, the arrays, what it tells of them."""
    if folder:
        path = tmp_path / "folder"
        path.mkdir(exist_ok=True)
        for key, x in data.items():
            np.save(path / f"{key}.npy", x)
    else:
        path = tmp_path / "data.npz"
        np.savez(path, **data)
    args = lps.Args(env_id=env_id, dataset_path=str(path), action_dim=1, **settings)
    return args, *lps.load_dataset(args, lps.make_env(args))


def sampler(args, arrays):
    """Batches as a run draws them, by the seed of their key; observations that are mapped stay outside."""
    on_disk = arrays["observations"] if isinstance(arrays["observations"], np.memmap) else None
    there = {key: jnp.asarray(x) for key, x in arrays.items() if on_disk is None or key != "observations"}
    sample = jax.jit(lambda there, key: lps.sample_batch(args, there, on_disk, key))
    return lambda seed: {key: np.asarray(x) for key, x in sample(there, jax.random.key(seed)).items()}


def brute_force(data, lengths, horizon, gamma):
    """{start: what its chunk is}, for every chunk that lies in one trajectory with the state that follows it."""
    chunks, first = {}, 0
    for n in lengths:
        for t in range(first, first + n + 1):
            if t + horizon <= first + n:
                chunks[t] = dict(
                    observations=data["observations"][t],
                    actions=np.concatenate(data["actions"][t : t + horizon]),
                    rewards=sum(gamma**i * data["rewards"][t + i] for i in range(horizon)),
                    masks=float(all(data["masks"][t + i] for i in range(horizon))),
                    next_observations=data["observations"][t + horizon])
        first += n + 1
    return chunks


@pytest.mark.parametrize("horizon, seed", [(1, 0), (2, 1), (5, 2), (5, 3)])
def test_chunks_against_brute_force(tmp_path, horizon, seed):
    """Trajectories shorter than the chunk, as long, one longer, empty ones; each possible chunk equally often."""
    lengths = [horizon - 1, horizon, 0, horizon + 1, *np.random.default_rng(seed).integers(0, 4 * horizon, 6).tolist()]
    data = make_data(lengths, seed)
    args, arrays, facts = loaded(tmp_path, data, horizon=horizon, gamma=0.9, batch_size=4000)
    chunks = brute_force(data, lengths, horizon, 0.9)
    expected = dict(transitions=sum(lengths), trajectories=len(lengths), chunks=len(chunks))
    assert {key: facts[key] for key in expected} == expected

    batch = sampler(args, arrays)(0)
    starts = [min(chunks, key=lambda t: abs(chunks[t]["observations"] - s).sum()) for s in batch["observations"]]
    for key, values in batch.items():
        np.testing.assert_allclose(values, [chunks[t][key] for t in starts], rtol=1e-5, atol=1e-6)
    counts, each = np.array([starts.count(t) for t in chunks]), 4000 / len(chunks)
    assert ((counts - each) ** 2 / each).sum() < len(chunks) + 5 * np.sqrt(2 * len(chunks))  # chi-squared
    assert set(batch) == {"observations", "actions", "rewards", "masks", "next_observations"}
    assert all(x.dtype == np.float32 for x in batch.values())


@pytest.mark.parametrize("horizon", [1, 5])
def test_a_mapped_folder_gives_the_same_batches(tmp_path, horizon):
    data = make_data([3, horizon, 0, 3 * horizon, 9])
    settings = dict(horizon=horizon, batch_size=64)
    args, arrays, facts = loaded(tmp_path, data, **settings)
    _, mapped, mapped_facts = loaded(tmp_path, data, folder=True, **settings)
    assert isinstance(mapped["observations"], np.memmap)
    assert mapped_facts["dataset"] == str(tmp_path / "folder")
    assert {key: mapped_facts[key] for key in ("transitions", "trajectories", "chunks")} == {
        key: facts[key] for key in ("transitions", "trajectories", "chunks")}
    draw, draw_mapped = sampler(args, arrays), sampler(args, mapped)
    for seed in range(4):
        mapped_batch = draw_mapped(seed)
        for key, x in draw(seed).items():
            np.testing.assert_array_equal(x, mapped_batch[key], err_msg=key)


def test_actions_are_clipped_and_masks_default_to_one(tmp_path):
    data = make_data([6, 6])
    data["actions"][:2, 0] = 1, -1
    del data["masks"]
    _, arrays, _ = loaded(tmp_path, data)
    assert arrays["actions"].max() == np.float32(1 - 1e-5) and arrays["actions"].min() == np.float32(-1 + 1e-5)
    assert (arrays["masks"][[0, 5]] == 1).all()


def test_the_last_rows_action_and_reward_may_be_anything(tmp_path):
    data = make_data([6, 6])
    for key in ("actions", "rewards", "masks"):
        data[key][[6, 13]] = np.nan
    args, arrays, _ = loaded(tmp_path, data, batch_size=100)
    assert len(arrays["starts"]) == 4
    assert all(np.isfinite(x).all() for x in sampler(args, arrays)(0).values())


# --------------------------------------------------------------------------------------------------------------- pixels


def stacked(frames, t, first):
    """The frames t-2, t-1 and t of a trajectory; before its first one stands that frame again."""
    return np.concatenate([frames[max(i, first)] for i in (t - 2, t - 1, t)], axis=-1)


@pytest.mark.parametrize("folder", [False, True])
def test_frames_are_stacked_and_shifted(tmp_path, folder):
    """Half of the batches are shifted, each chunk's two observations alike and every chunk by itself, by up to 3."""
    data = toy_envs.film_data(3)
    args, arrays, _ = loaded(tmp_path, data, "toy_envs:Film-v0", folder, horizon=2, batch_size=32)
    draw, shifted, places = sampler(args, arrays), 0, set()
    for seed in range(30):
        batch, here = draw(seed), set()
        for action, s, next_s in zip(batch["actions"], batch["observations"], batch["next_observations"]):
            t = np.abs(data["actions"][:, 0] - action[0]).argmin()
            assert t % 8 <= 5
            raw = [np.pad(stacked(data["observations"], i, t // 8 * 8), ((3, 3), (3, 3), (0, 0)), mode="edge")
                   for i in (t, t + 2)]
            at = [[(i, j) for i in range(7) for j in range(7) if np.array_equal(x[i : i + 8, j : j + 8], image)]
                  for x, image in zip(raw, (s, next_s))]
            assert at[0] == at[1] and len(at[0]) == 1
            here.add(at[0][0])
        shifted += here != {(3, 3)}
        places |= here
        assert here == {(3, 3)} or len(here) > 10
    assert 7 <= shifted <= 23 and len(places) == 49


def test_the_environment_stacks_as_the_sampler_does():
    args = lps.Args(env_id="toy_envs:Film-v0", horizon=2)
    env, data = lps.make_env(args), toy_envs.film_data(3)
    seen = [env.reset(seed=2)[0]] + [env.step(np.zeros(2))[0] for _ in range(3)]
    expected = [stacked(data["observations"], 16 + t, 16) for t in (0, 2, 4, 6)]
    np.testing.assert_array_equal(lps.stack(np.array(seen)), expected)


# --------------------------------------------------------------------------------------------------------- environments


def test_actions_are_rescaled_and_chunks_end_with_the_episode():
    env = lps.make_env(lps.Args(env_id=COUNTING))  # acts in [-2, 2], and pays what it is told to do
    env.reset(seed=1)  # 8 steps
    outcomes = [env.step(np.array(chunk)) for chunk in ([-1, 0.25, 1], [0, 0, 0], [1, -1, 0.5])]
    assert [outcome[1] for outcome in outcomes] == [2, 0, -2]
    assert [outcome[2] for outcome in outcomes] == [False, False, True]
    assert outcomes[-1][4]["episode"]["r"] == 0.5 and outcomes[-1][4]["episode"]["l"] == 8


def solve(env):
    """Puts every part of a scene where its task wants it."""
    if hasattr(env, "_target_button_states"):
        env._cur_button_states[:] = env._target_button_states
        env._apply_button_states()
    for i in range(getattr(env, "_num_cubes", 0)):
        env._data.joint(f"object_joint_{i}").qpos[:3] = env._data.mocap_pos[env._cube_target_mocap_ids[i]]
        env._data.joint(f"object_joint_{i}").qvel[:] = 0
    if hasattr(env, "_target_drawer_pos"):
        env._data.joint("drawer_slide").qpos[0] = env._target_drawer_pos
        env._data.joint("window_slide").qpos[0] = env._target_window_pos
    env.post_step()


@pytest.mark.parametrize("scene", ["cube-double", "puzzle-3x3", "scene"])
def test_ogbench_rewards_are_those_of_the_environment(tmp_path, scene):
    """Rewards are relabelled from the states of a rollout; OGBench's environment said the same at the time."""
    args = lps.Args(env_id=f"{scene}-play-singletask-task1-v0", action_dim=5, sparse=False)
    env = lps.make_env(args)
    s, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    rows = dict(observations=[], actions=[], terminals=[], qpos=[], button_states=[])
    rewards, successes = [], []
    for t in range(60):
        action = np.clip(rng.normal(0, 1, 5) + [0, 0, -0.5, 0, 0], -1, 1)
        if t == 30:
            solve(env.unwrapped)
        next_s, reward, _, _, info = env.step(action)
        rewards.append(reward)
        successes.append(info["success"])
        row = dict(observations=s[-1], actions=action, terminals=t == 59, qpos=info["prev_qpos"],
                   button_states=info.get("prev_button_states", np.zeros(1)))
        for key, x in row.items():
            rows[key].append(x)
        s = next_s
    np.savez(tmp_path / "data.npz", **{key: np.array(x) for key, x in rows.items()})
    assert any(successes) and not all(successes) and len(set(rewards)) > 1
    for sparse in (False, True):
        args = lps.replace(args, dataset_path=str(tmp_path / "data.npz"), sparse=sparse)
        arrays, _ = lps.load_dataset(args, env)
        masks = 1.0 - np.array(successes)
        np.testing.assert_array_equal(arrays["masks"][:-1], masks[:-1])  # the last row's is not used
        np.testing.assert_array_equal(arrays["rewards"][:-1], -masks[:-1] if sparse else rewards[:-1])
