"""Evaluation: which episodes are played, what is counted, that workers are gone afterwards, and films."""

import multiprocessing
import os

import imageio
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_envs import Counting

import lps

LENGTH, SUCCESS = Counting.length, lambda n: n % 3 == 0


def settings(tmp_path, **more):
    return lps.Args(**dict(env_id="toy_envs:Counting-v0", run_dir=tmp_path, horizon=5) | more)


@pytest.mark.parametrize("episodes, num_seeds, cores", [(1, 1, 2), (7, 1, 1), (50, 1, 2), (11, 3, 4), (3, 2, 64)])
def test_every_episode_counts_once(tmp_path, monkeypatch, episodes, num_seeds, cores):
    """The observations that the policy sees say which episode is played where; the scripted outcomes must be met."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores))
    args = settings(tmp_path, eval_episodes=episodes, num_seeds=num_seeds, seed=2)
    seen = set()

    def policy(state, keys, observations, episode, chunk):
        assert len(observations) == num_seeds
        numbers, steps = observations[..., 0].astype(int), observations[..., 1].astype(int)
        playing = episode < episodes  # the others have no more to play and wait
        expected = 100_000 * (2 + np.arange(num_seeds))[:, None] + episode
        assert (numbers == expected)[playing].all()
        assert (steps == 5 * chunk)[playing].all()  # a whole chunk was executed in between
        seen.update(zip(numbers[playing].tolist(), steps[playing].tolist()))
        return np.full((*episode.shape, 5), 0.25)

    rows = lps.evaluate(args, policy, None, None, step=40)
    planned = [[100_000 * seed + i for i in range(episodes)] for seed in range(2, 2 + num_seeds)]
    assert seen == {(n, t) for one in planned for n in one for t in range(0, LENGTH(n), 5)}
    for row, numbers in zip(rows, planned, strict=True):
        assert (row["step"], row["episodes"]) == (40, episodes)
        assert row["seed"] == numbers[0] // 100_000
        assert row["success"] == np.mean([SUCCESS(n) for n in numbers])
        assert row["length"] == np.mean([LENGTH(n) for n in numbers])
        np.testing.assert_allclose(row["return"], np.mean([0.5 * LENGTH(n) for n in numbers]))  # 0.25 in [-2, 2]
    assert multiprocessing.active_children() == []


def test_noise_belongs_to_the_episode_not_to_the_worker(tmp_path, monkeypatch):
    monkeypatch.setattr(lps, "act", lambda args, state, s, key: jax.random.uniform(key, (5,), minval=-1))
    args = settings(tmp_path, eval_episodes=9)
    keys = jax.random.split(jax.random.key(0), 1)
    returns = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores))
        returns.append(lps.evaluate(args, lps.make_policy(args), jnp.zeros(1), keys, 0)[0]["return"])
    np.testing.assert_allclose(*returns, rtol=1e-6)


def test_an_environment_without_success_reports_returns_only(tmp_path):
    args = settings(tmp_path, env_id="toy_envs:Silent-v0", eval_episodes=3)
    row = lps.evaluate(args, lambda *x: np.ones((*x[3].shape, 5)), None, None, 0)[0]
    assert np.isnan(row["success"]) and row["return"] == 2 * row["length"]


def test_a_dead_worker_ends_the_evaluation_with_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT", "dies")
    args = settings(tmp_path, env_id="toy_envs:Faulty-v0", eval_episodes=20)
    with pytest.raises(SystemExit, match="an evaluation worker died"):
        lps.evaluate(args, lambda *x: np.ones((*x[3].shape, 5)), None, None, 0)
    assert multiprocessing.active_children() == []


def test_a_signal_ends_the_evaluation_without_rows(tmp_path):
    caught, args = [], settings(tmp_path, eval_episodes=20)

    def policy(state, keys, observations, episode, chunk):
        caught.append(2)
        return np.ones((*episode.shape, 5))

    assert lps.evaluate(args, policy, None, None, 0, caught) == [] and len(caught) == 1
    assert multiprocessing.active_children() == []


def test_films_can_be_played(tmp_path):
    args = settings(tmp_path, eval_episodes=4, num_seeds=2, capture_video=True)
    lps.evaluate(args, lambda *x: np.ones((*x[3].shape, 5)), None, None, 30)
    films = sorted((tmp_path / "videos").iterdir())
    assert [film.name for film in films] == ["step30_seed0.mp4", "step30_seed1.mp4"]
    for seed, film in enumerate(films):
        frames = imageio.mimread(film)
        assert len(frames) == LENGTH(100_000 * seed) + 1
        np.testing.assert_allclose([frame.mean() for frame in frames], 4 * np.arange(len(frames)), atol=3)
