"""Evaluation: which episodes are played, what is counted of them, random numbers, films."""

import multiprocessing
import os
from functools import partial

import imageio
import jax
import numpy as np
import pytest
from helpers import COUNTING
from toy_envs import Counting

import flow_bc


def settings(tmp_path, **more):
    given = dict(env_id=COUNTING, run_dir=str(tmp_path), horizon=5, action_dim=1)
    return flow_bc.Args(**given | more)


def constant(state, s, step, episode, turn):
    return np.full(5, 0.25)


@pytest.mark.parametrize("episodes, cores, seed", [(1, 2, 0), (7, 1, 3), (7, 3, 2)])
def test_every_episode_counts_once_from_its_own_seed(tmp_path, monkeypatch, episodes, cores, seed):
    """Neither more of the short ones nor fewer of the long ones, whoever plays them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    seen = {}

    def policy(state, s, step, episode, turn):
        assert (state, step) == ("state", 40)
        seen[episode, turn] = tuple(s)
        return constant(state, s, step, episode, turn)

    args = settings(tmp_path, eval_episodes=episodes, seed=seed)
    row = flow_bc.evaluate(args, policy, "state", 40, [])
    numbers = 1000 * seed + np.arange(episodes)
    lengths = [Counting.length(n) for n in numbers]
    for i in range(episodes):
        for turn, t in enumerate(range(0, lengths[i], 5)):
            assert seen[i, turn] == (numbers[i], t)
    assert row["episodes"] == episodes
    np.testing.assert_allclose(row["success"], np.mean(numbers % 3 == 0))
    np.testing.assert_allclose(row["length"], np.mean(lengths))
    np.testing.assert_allclose(row["return"], 0.5 * np.mean(lengths))  # 0.25 of a box of [-2, 2]


def test_the_number_of_cores_changes_nothing(tmp_path, monkeypatch):
    """With networks of the usual size and a policy that draws: each number to the last bit."""
    args = settings(tmp_path, eval_episodes=5)
    state = flow_bc.init_state(args, flow_bc.make_env(args))
    act_fn = jax.jit(partial(flow_bc.act_once, args))
    rows = []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        rows.append(flow_bc.evaluate(args, act_fn, state, 0, []))
        del rows[-1]["seconds"]
    assert rows[0] == rows[1]


def test_no_random_number_is_used_twice(tmp_path, monkeypatch):
    """Updates, evaluations, their episodes and turns, and the initial weights have their own."""
    args = settings(tmp_path)
    bits = jax.random.key_data
    monkeypatch.setattr(flow_bc, "sample_batch", lambda args, data, key: key)
    monkeypatch.setattr(flow_bc, "update", lambda args, state, batch, key: (state, (batch, key)))
    monkeypatch.setattr(flow_bc, "act", lambda args, state, s, key: bits(key)[None])
    monkeypatch.setattr(flow_bc, "init", lambda args, key, s: bits(key))
    keys = [flow_bc.init_state(args, flow_bc.make_env(args))]
    for step in range(5):
        _, of_training = flow_bc.learn(args, 1, None, None, step)
        keys += [bits(key) for key in of_training]
        for episode in range(5):
            for turn in range(5):
                keys.append(flow_bc.act_once(args, None, np.zeros(2), step, episode, turn))
    assert len(np.unique(keys, axis=0)) == len(keys) == 1 + 5 * (2 + 25)


def test_success_is_a_share_of_all_episodes_or_nan(tmp_path):
    """Of 4 episodes, 0 and 3 succeed. One environment tells of nothing else, the other never."""
    for name, success in (("Proud", 2 / 4), ("Silent", np.nan)):
        args = settings(tmp_path, env_id=f"toy_envs:{name}-v0", eval_episodes=4)
        row = flow_bc.evaluate(args, constant, None, 0, [])
        np.testing.assert_equal(row["success"], success)


def test_an_evaluation_that_a_signal_ends_reports_nothing_and_leaves_no_process(tmp_path):
    stop = []

    def policy(state, s, step, episode, turn):
        if episode == 9:
            stop.append(2)
        return constant(state, s, step, episode, turn)

    args = settings(tmp_path, eval_episodes=50)
    assert flow_bc.evaluate(args, policy, None, 0, stop) is None
    assert stop == [2] and multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio starts ffmpeg
def test_the_film_is_of_the_first_episode_from_its_first_frame_to_its_last(tmp_path):
    args = settings(tmp_path, eval_episodes=3, seed=5, capture_video=True)
    flow_bc.evaluate(args, constant, None, 30, [])
    [film] = (tmp_path / "videos").glob("step30*.mp4")
    frames = imageio.mimread(film)
    assert len(frames) == Counting.length(5000) + 1
    brightness = [frame.mean() for frame in frames]
    np.testing.assert_allclose(brightness, 4 * np.arange(len(frames)), atol=3)
