"""Datasets against brute force: batches, stacks and shifts of frames, rewards, and environments."""

import jax
import numpy as np
import pytest
import toy_envs
from helpers import COUNTING, make_data

import lps


def load_dataset(tmp_path, data, env_id=COUNTING, **settings):
    """The arguments of a run on these data, and the arrays that it trains on."""
    np.savez(tmp_path / "data.npz", **data)
    path = str(tmp_path / "data.npz")
    args = lps.Args(env_id=env_id, dataset_path=path, action_dim=1, **settings)
    arrays, _ = lps.load_dataset(args, lps.make_env(args))
    return args, arrays


sample_batch = jax.jit(lps.sample_batch, static_argnums=0)


def draw(args, arrays, seed):
    return jax.device_get(sample_batch(args, arrays, jax.random.key(seed)))


def brute_force(data, lengths, horizon, gamma):
    """{row: the chunk that begins there}, of those that lie in one trajectory with what follows."""
    chunks = {}
    first = 0
    for n in lengths:
        for row in range(first, first + n + 1 - horizon):
            rows = range(row, row + horizon)
            chunks[row] = dict(
                observations=data["observations"][row],
                actions=np.concatenate(data["actions"][rows]),
                rewards=sum(gamma**i * data["rewards"][row + i] for i in range(horizon)),
                masks=float(all(data["masks"][rows])),
                next_observations=data["observations"][row + horizon],
            )
        first += n + 1
    return chunks


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_batches_are_chunks_of_one_trajectory_all_equally_often(tmp_path, horizon):
    """Of trajectories shorter than the chunk, as long, one longer, and of none."""
    more = np.random.default_rng(horizon).integers(0, 4 * horizon, 6).tolist()
    lengths = [horizon - 1, horizon, 0, horizon + 1, *more]
    data = make_data(lengths, horizon)
    args, arrays = load_dataset(tmp_path, data, horizon=horizon, gamma=0.9, batch_size=4000)
    chunks = brute_force(data, lengths, horizon, 0.9)
    batch = draw(args, arrays, 0)
    rows = list(chunks)
    beginnings = np.array([chunks[row]["observations"] for row in rows])
    which = np.abs(batch["observations"][:, None] - beginnings).sum(axis=2).argmin(axis=1)
    assert batch.keys() == chunks[rows[0]].keys()
    for name, values in batch.items():
        expected = np.array([chunks[row][name] for row in rows])[which]
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    each = 4000 / len(rows)
    chi_squared = ((np.bincount(which, minlength=len(rows)) - each) ** 2 / each).sum()
    assert chi_squared < len(rows) + 5 * np.sqrt(2 * len(rows))


def test_actions_are_clipped_and_masks_are_one_if_not_given(tmp_path):
    data = make_data([6, 6])
    data["actions"][:2, 0] = 1, -1
    del data["masks"]
    _, arrays = load_dataset(tmp_path, data)
    assert arrays["actions"].max() == np.float32(1 - 1e-5)
    assert arrays["actions"].min() == np.float32(-1 + 1e-5)
    assert (arrays["masks"][[0, 5]] == 1).all()


def test_a_last_rows_action_and_reward_may_be_anything(tmp_path):
    data = make_data([6, 6])
    for name in ("actions", "rewards", "masks"):
        data[name][[6, 13]] = np.nan
    args, arrays = load_dataset(tmp_path, data, batch_size=100)
    for name, x in draw(args, arrays, 0).items():
        assert np.isfinite(x).all(), name


# =========================================================================================== Pixels


def stacked(frames, row, first):
    """The last three frames of a trajectory that begins at row first, which is repeated."""
    return np.concatenate([frames[max(i, first)] for i in (row - 2, row - 1, row)], axis=-1)


def places(image, shifted):
    """By how much it may have been shifted."""
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), mode="edge")
    shifts = [(i, j) for i in range(7) for j in range(7)]
    return [(i, j) for i, j in shifts if np.array_equal(padded[i : i + 8, j : j + 8], shifted)]


def test_frames_are_stacked_and_shifted(tmp_path):
    """Half of the batches, every chunk by itself, its two observations alike, by up to three."""
    data = toy_envs.film_data(3)
    settings = dict(horizon=2, batch_size=32)
    args, arrays = load_dataset(tmp_path, data, "toy_envs:Film-v0", **settings)
    found = set()
    counts = []
    for seed in range(30):
        batch = draw(args, arrays, seed)
        here = set()
        for i in range(32):
            row = np.abs(data["actions"][:, 0] - batch["actions"][i, 0]).argmin()
            s = stacked(data["observations"], row, row // 8 * 8)
            next_s = stacked(data["observations"], row + 2, row // 8 * 8)
            [place] = places(s, batch["observations"][i])
            assert places(next_s, batch["next_observations"][i]) == [place]
            here.add(place)
        counts.append(len(here))
        assert here == {(3, 3)} or len(here) > 10
        found |= here
    assert len(found) == 49 and 7 <= counts.count(1) <= 23


# ===================================================================================== Environments


def test_the_environment_stacks_frames_as_the_dataset_does():
    env = lps.make_env(lps.Args(env_id="toy_envs:Film-v0", horizon=2))
    frames = toy_envs.film_data(3)["observations"]
    seen = [env.reset(seed=2)[0]] + [env.step(np.zeros(2))[0] for _ in range(3)]
    np.testing.assert_array_equal(seen, [stacked(frames, 16 + t, 16) for t in (0, 2, 4, 6)])
    assert env.observation_space.contains(seen[0])


def test_a_step_does_not_ask_for_the_space_of_images(monkeypatch):
    """OGBench draws an image to answer."""
    asked = []
    space = toy_envs.Film.observation_space

    def answer(env):
        asked.append(env)
        return space

    monkeypatch.setattr(toy_envs.Film, "observation_space", property(answer))
    env = lps.make_env(lps.Args(env_id="toy_envs:Film-v0", horizon=2))
    env.reset(seed=0)
    assert asked
    asked.clear()
    env.step(np.zeros(2))
    assert not asked


def test_a_chunk_is_a_step_that_pays_the_sum_and_ends_with_the_episode():
    """Actions are rescaled: here the environment acts in [-2, 2], and pays what it does."""
    env = lps.make_env(lps.Args(env_id=COUNTING, horizon=3))
    assert env.action_space == lps.Box(-1, 1, (3,))
    env.reset(seed=1)  # 8 steps
    chunks = np.array([[-1, 0.25, 1], [0, 0, 0.5], [1, -1, 0.5]], np.float32)
    steps = [env.step(chunk) for chunk in chunks]
    assert [step[1] for step in steps] == [0.5, 1, 0]
    assert [step[2] for step in steps] == [False, False, True]
    np.testing.assert_array_equal(steps[-1][0], [1, 8])
    np.testing.assert_array_equal(
        steps[-1][4]["outcome"], [0, 1.5, 8]
    )  # no success, return, length


def solve(env):
    """Puts every part of a scene where its task wants it."""
    if hasattr(env, "_target_button_states"):
        env._cur_button_states[:] = env._target_button_states
        env._apply_button_states()
    for i in range(getattr(env, "_num_cubes", 0)):
        joint = env._data.joint(f"object_joint_{i}")
        joint.qpos[:3] = env._data.mocap_pos[env._cube_target_mocap_ids[i]]
        joint.qvel[:] = 0
    if hasattr(env, "_target_drawer_pos"):
        env._data.joint("drawer_slide").qpos[0] = env._target_drawer_pos
        env._data.joint("window_slide").qpos[0] = env._target_window_pos
    env.post_step()


@pytest.mark.parametrize("scene", ["cube-double", "puzzle-3x3", "scene"])
def test_ogbench_rewards_are_those_of_the_environment(tmp_path, scene):
    """Those of the states of a rollout are what OGBench's environment said at the time."""
    path = str(tmp_path / "data.npz")
    env_id = f"{scene}-play-singletask-task1-v0"
    args = lps.Args(env_id=env_id, dataset_path=path, action_dim=5, horizon=1, sparse=False)
    env = lps.make_env(args)
    rng = np.random.default_rng(0)
    rows = []
    told = []
    s, _ = env.reset(seed=0)
    for i in range(60):
        if i == 30:
            solve(env.unwrapped)
        action = np.clip(rng.normal(0, 1, 5) + [0, 0, -0.5, 0, 0], -1, 1)
        next_s, reward, _, _, info = env.env.step(action)  # without what lps.Chunks does
        told.append((reward, info["success"]))
        row = dict(observations=s, actions=action, terminals=i == 59, qpos=info["prev_qpos"])
        row["button_states"] = info.get("prev_button_states", np.zeros(1))
        rows.append(row)
        s = next_s
    np.savez(path, **{name: np.array([row[name] for row in rows]) for name in rows[0]})
    rewards, successes = np.array(told)[:-1].T  # the last row's are not used
    assert set(successes) == {0, 1} and len(set(rewards)) > 1
    dense, _ = lps.load_dataset(args, env)
    sparse, _ = lps.load_dataset(lps.replace(args, sparse=True), env)
    np.testing.assert_array_equal(dense["rewards"][:-1], rewards)
    np.testing.assert_array_equal(sparse["rewards"][:-1], successes - 1)
    for arrays in (dense, sparse):
        np.testing.assert_array_equal(arrays["masks"][:-1], 1 - successes)
