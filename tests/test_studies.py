"""What the studies measure, on observations and policies that are made up."""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from helpers import COUNTING, S, as_flags, make_args, make_data, make_state, read_csv

import flow_bc
from benchmark import ablations
from benchmark.studies.grasp import grasp
from benchmark.studies.pixels import pixels
from benchmark.studies.toy import toy


def test_grasps_are_found_in_observations():
    """One holds, 1 cm beside the centre; one does not; a third closes where no cube is."""
    s = np.zeros((200, 28))
    for begin, end in ((20, 60), (100, 120), (150, 160)):
        s[begin:end, grasp.OPENING] = 0.5 * grasp.CLOSED
    s[20, grasp.HAND.start] = 0.01 * grasp.METRE
    s[30:60, grasp.CUBE.stop - 1] = 0.1 * grasp.METRE
    s[150:160, grasp.HAND.start] = 0.2 * grasp.METRE
    times, apart, holds = zip(*grasp.find_grasps(s))
    assert (times, holds) == ((20, 100), (True, False))
    np.testing.assert_allclose(apart, [1, 0], atol=1e-9)


def test_searching_and_climbing_find_what_the_critics_value_more():
    args = make_args(ablations)
    script = ablations.exchange(args)
    state = make_state(script, args)
    s = jax.random.normal(jax.random.key(1), (16, 1, S))
    value = {}
    for choice, (act, _) in grasp.find_choices(script, args).items():
        a = jax.lax.map(lambda s, act=act: act(state, s, jax.random.key(2)), s)
        assert jnp.abs(a).max() <= 1
        value[choice] = jax.vmap(grasp.q_of, (None, 0, 0))(state, s, a)[..., 0]  # [16, K]
    worst = {choice: q.min(axis=1) for choice, q in value.items()}
    assert (worst["best of l(s) and 31 latents"] >= worst["as trained"] - 1e-5).all()
    assert worst["best of 32 latents"].mean() > worst["a random latent"].mean()
    assert value["a latent climbed to"].mean() > value["a random latent"].mean()
    assert jnp.abs(value["two steps"] - value["as trained"]).max() > 1e-3


def test_the_toy_data_lie_in_clusters_of_which_one_is_paid():
    on_data, paid, distance = toy.judge(toy.draw_data(jax.random.key(0), 2000))
    assert on_data.all() and abs(paid.mean() - 1 / 9) < 0.03 and abs(distance.mean() - 0.7) < 0.02


def test_losses_are_measured_on_held_out_episodes(tmp_path, monkeypatch):
    """Few episodes are learned by heart, and then the others have the greater loss."""
    for seed, name in enumerate(("data", "other")):
        np.savez(tmp_path / f"{name}.npz", **make_data([9, 9, 9], seed))
    settings = dict(env_id=COUNTING, dataset_path=tmp_path / "data.npz", run_dir=tmp_path / "run")
    settings |= dict(policy_hidden_dims=(64, 64), learning_rate=3e-3, batch_size=64, horizon=1)
    settings |= dict(total_steps=600, eval_interval=200, play_interval=400, eval_episodes=1)
    flags = as_flags(settings | dict(held_out=tmp_path / "other.npz"))
    monkeypatch.setattr(sys, "argv", ["pixels", "flow_bc.py", *flags])
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(flow_bc, "evaluate", flow_bc.evaluate)  # which is put back at the end
    pixels.main()
    rows = read_csv(tmp_path / "run/held_out.csv")
    assert [row["step"] for row in rows] == ["0", "200", "400", "600"]
    assert [row["step"] for row in read_csv(tmp_path / "run/eval.csv")] == ["400", "600"]
    first, *_, last = [float(row["policy_loss"]) for row in rows]
    learned = float(rows[-1]["learned_policy_loss"])
    assert learned < 0.7 * first and learned < 0.7 * last
    logged = float(read_csv(tmp_path / "run/train.csv")[-1]["policy_loss"])
    assert abs(logged - learned) < 0.2 * learned  # the mean of the last updates
