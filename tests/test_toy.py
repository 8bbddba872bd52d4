"""benchmark/toy.py: its environments and data, its numbers by hand, and one tiny run of each figure."""

import csv
from contextlib import contextmanager
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lps
from benchmark import toy

R = np.sqrt(0.5)


@contextmanager
def fast_to_compile():
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("action, on_data, reward", [
    ((0.75 * R, 0.75 * R), 1, 1), ((0.82 * R, 0.82 * R), 1, 1), ((0.84 * R, 0.84 * R), 0, 0),
    ((-0.75 * R, 0.75 * R), 1, 0), ((0.75 * R, -0.75 * R), 1, 0), ((0.74, 0.1), 1, 1), ((0.74, -0.1), 1, 0),
    ((0.35 * R, 0.35 * R), 1, 0), ((0.55 * R, 0.55 * R), 0, 0), ((0, 0), 0, 0), ((1, 1), 0, 0)])
def test_rings(action, on_data, reward):
    """The outer ring pays in its upper right quarter; a ring is 0.08 wide to each side."""
    a = np.array(action, float)
    assert toy.judge_rings(a) == (on_data, reward)
    for name, steps in ("Rings", 1), ("RingsChunk", 5):
        env = gymnasium.make(f"benchmark.toy:{name}-v0")
        env.reset(seed=0)
        outcomes = [env.step(a)[1:4] for _ in range(steps)]
        assert outcomes == [(reward, t == steps - 1, False) for t in range(steps)]


@pytest.mark.parametrize("action, on_data, reward", [
    ((-0.6, 0.6), 1, 0.3), ((0, 0.6), 1, 0.9), ((0.6, -0.6), 1, 0.8), ((0, 0), 1, 0.1), ((0.15, 0), 1, 0.1),
    ((0.17, 0), 0, 0), ((0.3, 0.3), 0, 0), ((-0.6, 0.75), 1, 0.3), ((1, 1), 0, 0)])
def test_grid(action, on_data, reward):
    """A cluster is 0.16 wide to each side."""
    a = np.array(action)
    assert toy.judge_grid(a) == (on_data, reward)
    env = gymnasium.make("benchmark.toy:Grid-v0")
    env.reset(seed=0)
    assert env.step(a)[1:4] == (reward, True, False)


@pytest.mark.parametrize("task, steps, mean_reward", [("Rings", 1, 1 / 8), ("RingsChunk", 5, 1 / 8), ("Grid", 1, 0.5)])
def test_data_keep_the_contract(tmp_path, task, steps, mean_reward):
    data = toy.make_data(task, 1000)
    np.savez(tmp_path / "data.npz", **data)
    args = lps.Args(env_id=f"benchmark.toy:{task}-v0", dataset_path=tmp_path / "data.npz", horizon=steps)
    arrays, facts = lps.load_dataset(args, lps.make_env(args.env_id))
    assert (facts["transitions"], facts["trajectories"], facts["chunks"]) == (1000 * steps, 1000, 1000)
    assert facts["terminal_share"] == pytest.approx(1 / steps)
    np.testing.assert_array_equal(arrays["starts"], np.arange(1000) * (steps + 1))
    rows = data["terminals"] == 0
    on_data, reward = toy.TASKS[task][2](data["actions"][rows])
    np.testing.assert_array_equal(data["rewards"][rows], reward)
    assert on_data.mean() > 0.99 and reward.mean() == pytest.approx(mean_reward, abs=0.04)


def test_score_is_of_each_seed():
    a = np.array([[(0.75 * R, 0.75 * R), (0, 0)], [(-0.35, 0), (0, -0.75)]])
    assert toy.score("Rings", a) == [dict(on_data=0.5, reward=0.5), dict(on_data=1, reward=0)]
    assert toy.mean(toy.score("Rings", a), "on_data") == 0.75


def test_cosine_and_its_summary():
    g = jnp.array([(1.0, 0), (1, 0), (1, 0), (3, 4), (0, 0)])
    h = jnp.array([(2.0, 0), (0, 5), (-1, 0), (4, 3), (1, 1)])
    cosines = toy.cosine(g, h)
    np.testing.assert_allclose(cosines, [1, 0, -1, 0.96, 0], atol=1e-6)
    assert toy.alignment(cosines) == pytest.approx(dict(mean_cosine=0.192, negative_share=0.2))


def test_distilled_critics_fit_their_value_and_its_gradient():
    own = lps.Args(latent="normal", horizon=1, batch_size=64, critic_hidden_dims=(32, 32), learning_rate=3e-3)
    value = lambda s, z: jnp.sin(z[..., 0])
    nets = toy.distil(toy.Args(total_steps=400), own, value, jax.random.key(0))
    z = jax.random.normal(jax.random.key(1), (200, 2))
    (q, g), (qz, h) = (jax.vmap(jax.value_and_grad(partial(v, jnp.ones(1))))(z) for v in (
        value, lambda s, z: lps.q_values(nets, s, z).mean(axis=0)))
    assert jnp.abs(q - qz).mean() < 0.1 and toy.cosine(g, h).mean() > 0.8


@pytest.mark.parametrize("figure", ["rings", "grid"])
def test_a_tiny_run_draws_and_counts(tmp_path, monkeypatch, figure):
    monkeypatch.setattr(toy, "ALPHAS", (1.0,))
    monkeypatch.setattr(toy, "ROWS", [("qc_mfql", "Rings"), ("lps", "RingsChunk")])
    with fast_to_compile():
        toy.main(toy.Args((figure,), tmp_path / "out", num_seeds=1, total_steps=2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{figure}.csv", f"{figure}.png"]
    with open(tmp_path / f"out/{figure}.csv") as file:
        rows = list(csv.DictReader(file))
    if figure == "rings":
        assert [(row["method"], row["d"], row["alpha"]) for row in rows] == [
            ("qc_mfql", "2", "base"), ("qc_mfql", "2", "1"), ("lps", "10", "base"), ("lps", "10", "1")]
    else:
        assert [row["method"] for row in rows] == ["lps --latent normal", "lps", "dsrl"]
        assert [row["mean_cosine"] != "" for row in rows] == [True, False, True]
    assert all(0 <= float(row["on_data"]) <= 1 and 0 <= float(row["reward"]) <= 1 for row in rows)
