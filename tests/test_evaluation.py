"""Evaluation: which episodes are played, what is counted, that workers are gone afterwards, and films."""

import multiprocessing
import os

import imageio
import numpy as np
import pytest
from helpers import COUNTING
from toy_envs import Counting

import lps


def settings(tmp_path, **more):
    return lps.Args(**dict(env_id=COUNTING, run_dir=str(tmp_path), horizon=5) | more)


def constant(state, s, key):
    return np.full((len(s), 5), 0.25)


@pytest.mark.parametrize("episodes, cores, seed, k", [(1, 2, 0, 0), (7, 1, 3, 0), (5, 2, 3, 1)])
def test_every_episode_counts_once(tmp_path, monkeypatch, episodes, cores, seed, k):
    """Each process plays its share of the episodes, neither more of the short ones nor fewer of the long ones. The
    policy is the k-th seed's, and acts anew after each chunk on what it sees."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    seen, workers = set(), min(episodes, cores)

    def policy(state, s, key):
        assert state == 10 * k and s.shape == (workers, 2)
        seen.update((int(n), int(t)) for n, t in s)
        return constant(state, s, key)

    args = settings(tmp_path, eval_episodes=episodes, seed=seed, num_seeds=k + 1)
    row = lps.evaluate(args, policy, np.array([0, 10]), k, 40, [])
    first = 1000 * (seed + k)
    numbers = [first + i + j for i in range(workers) for j in range(len(range(i, episodes, workers)))]
    assert {(n, t) for n in numbers for t in range(0, Counting.length(n), 5)} <= seen
    assert all(t % 5 == 0 or t == Counting.length(n) for n, t in seen)
    assert row["episodes"] == episodes
    np.testing.assert_allclose(row["success"], np.mean([n % 3 == 0 for n in numbers]))
    np.testing.assert_allclose(row["length"], np.mean([Counting.length(n) for n in numbers]))
    np.testing.assert_allclose(row["return"], np.mean([0.5 * Counting.length(n) for n in numbers]))  # 0.25 in [-2, 2]
    assert multiprocessing.active_children() == []


def test_an_environment_without_success_reports_returns_only(tmp_path):
    args = settings(tmp_path, env_id="toy_envs:Silent-v0", eval_episodes=3)
    row = lps.evaluate(args, constant, np.zeros(1), 0, 0, [])
    assert np.isnan(row["success"]) and row["return"] == 0.5 * row["length"]


def test_a_signal_ends_an_evaluation(tmp_path):
    stop = []

    def policy(state, s, key):
        stop.append(2)
        return constant(state, s, key)

    lps.evaluate(settings(tmp_path, eval_episodes=50), policy, np.zeros(1), 0, 0, stop)
    assert len(stop) == 1 and multiprocessing.active_children() == []


@pytest.mark.filterwarnings("ignore:os.fork")  # imageio starts ffmpeg
def test_films_can_be_played(tmp_path):
    """The first episode of an evaluation, from its first frame to its last."""
    args = settings(tmp_path, eval_episodes=3, seed=4, capture_video=True)
    lps.evaluate(args, constant, np.zeros(2), 1, 30, [])
    [film] = (tmp_path / "videos").glob("*.mp4")
    assert film.name.startswith("step30_seed5")
    frames = imageio.mimread(film)
    assert len(frames) == Counting.length(5000) + 1
    np.testing.assert_allclose([frame.mean() for frame in frames], 4 * np.arange(len(frames)), atol=3)
