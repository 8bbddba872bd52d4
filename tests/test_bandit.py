"""Every method learns a bandit: actions lie near a sphere in four dimensions, one in eight of them is paid, those that
point where the observation does. What should break a method breaks it here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_envs
from flax.serialization import from_state_dict
from helpers import checkpoint, load, read_csv

import lps


def learn(tmp_path, name, data=None, **settings):
    """Trains a script on the bandit. Returns the script, its arguments and its final state."""
    script = load(name)
    np.savez(tmp_path / "data.npz", **data or toy_envs.bandit_data(20_000))
    args = script.Args(**dict(
        env_id="toy_envs:Bandit-v0", dataset_path=str(tmp_path / "data.npz"), horizon=1, learning_rate=1e-3, seed=1,
        actor_hidden_dims=(64, 64, 64), critic_hidden_dims=(64, 64), total_steps=2000, log_interval=1000,
        eval_interval=0, eval_episodes=0, action_dim=toy_envs.DIM, run_dir=str(tmp_path / "run")) | settings)
    script.train(args)
    args = script.prepare(script.replace(args, resume=True))
    state = script.init(args, jax.random.key(0), jnp.zeros((1, toy_envs.DIM)))
    like = jax.tree.map(lambda x: jnp.asarray(x)[None], state)
    states = from_state_dict(like, checkpoint(tmp_path / "run")["states"])
    return script, args, jax.tree.map(lambda x: x[0], states)


def play(script, args, state, n=2000):
    s = toy_envs.unit(np.random.default_rng(1), n).astype(np.float32)
    return s, np.asarray(script.act(args, state, s, jax.random.key(1)))


# A MeanFlow learns more slowly than a flow.
MEANFLOW = dict(actor_hidden_dims=(128, 128, 128), learning_rate=2e-3, total_steps=4000)


def is_near_data(a):
    return np.abs(np.linalg.norm(a, axis=1) - toy_envs.RADIUS) < 0.15


def learn_lps(tmp_path, **settings):
    """How often LPS is paid, and how often what it imitates with."""
    script, args, state = learn(tmp_path, "lps", latent_actor_hidden_dims=(64, 64), **MEANFLOW | settings)
    s, a = play(script, args, state)
    base = script.decode(args, state["policy"], s, script.sphere(jax.random.normal(jax.random.key(1), s.shape)))
    return toy_envs.is_paid(s, a).mean(), toy_envs.is_paid(s, np.asarray(base)).mean()


def test_lps_is_paid_clearly_more_often_than_its_base(tmp_path):
    actor, base = learn_lps(tmp_path, eval_episodes=300)
    assert actor >= 0.6 and actor >= 3 * base and base > 0.05
    [row] = read_csv(tmp_path / "run/eval.csv")
    assert (row["step"], row["episodes"], row["length"]) == ("4000", "300", "1")
    success = float(row["success"])
    assert abs(success - actor) < 4 * np.sqrt(0.25 / 300)  # the environment agrees
    np.testing.assert_allclose(float(row["return"]), success - 1, atol=1e-4)


def test_without_the_gradient_through_f_it_is_not(tmp_path, monkeypatch):
    """act and the target decode as before; decode in the actor's loss, which is differentiated, hides its gradient."""
    decode = lps.decode
    monkeypatch.setattr(lps, "decode", lambda *given: lps.sg(decode(*given)))
    actor, base = learn_lps(tmp_path)
    assert actor < 0.3 and actor < 3 * base


def modes(a):
    """The shares of the three modes among actions, each counted for the nearest, and the share of what is near one."""
    distance = np.linalg.norm(a[:, None] - toy_envs.MODES, axis=2)
    return np.bincount(distance.argmin(axis=1), minlength=3) / len(a), (distance.min(axis=1) < 0.15).mean()


def test_a_flow_imitates_modes_in_proportion(tmp_path):
    settings = dict(actor_hidden_dims=(128, 128, 128), batch_size=128, total_steps=4000)
    s, a = play(*learn(tmp_path, "flow_bc", toy_envs.modes_data(20_000), **settings), n=4000)
    shares, near = modes(a)
    np.testing.assert_allclose(shares, toy_envs.SHARES, atol=0.05)
    assert near > 0.8  # the modes are 0.7 apart; ten Euler steps leave some actions in between


def test_a_meanflow_imitates_modes_nearly_in_proportion(tmp_path):
    """Its published weight, err^-0.5, favours the most frequent mode: 0.7, 0.2, 0.1 here, of 0.6, 0.3, 0.1. Without the
    weight it is 0.62, 0.25, 0.13 (the mean of two seeds), but fewer actions lie near a mode."""
    s, a = play(*learn(tmp_path, "mf_bc", toy_envs.modes_data(20_000), **MEANFLOW), n=4000)
    shares, near = modes(a)
    np.testing.assert_allclose(shares, toy_envs.SHARES, atol=0.15)
    assert (shares > 0.04).all() and near > 0.7


@pytest.mark.parametrize("name, settings", [
    ("dsrl", dict(total_steps=3000)), ("cfgrl", {}), ("ifql", {}), ("gfp", {}), ("mf_bon", MEANFLOW)],
    ids=["dsrl", "cfgrl", "ifql", "gfp", "mf_bon"])
def test_improvement_is_paid(tmp_path, name, settings):
    """Imitation could not do better than once in eight."""
    s, a = play(*learn(tmp_path, name, **dict(total_steps=1500, batch_size=128) | settings))
    assert toy_envs.is_paid(s, a).mean() >= 0.5


@pytest.mark.parametrize("name", ["qc_fql", "qc_mfql"])
def test_alpha_leads_from_imitation_to_pay_and_off_the_data(tmp_path, name):
    """Here the pay also grows with the action, so that a critic believes there is more of it beyond the data."""
    data = toy_envs.bandit_data(20_000)
    data["rewards"] += (data["observations"] * data["actions"]).sum(axis=1)
    paid, near, distance = {}, {}, {}
    for alpha in (100.0, 10.0, 0.01):
        folder = tmp_path / str(alpha)
        folder.mkdir()
        script, args, state = learn(folder, name, data, alpha=alpha, total_steps=1500, batch_size=128)
        s, a = play(script, args, state)
        paid[alpha], near[alpha] = toy_envs.is_paid(s, a).mean(), is_near_data(a).mean()
        e = jax.random.normal(jax.random.key(1), s.shape)
        distance[alpha] = np.linalg.norm(a - script.decode(args, state["policy"], s, e), axis=1).mean()
    assert distance[100.0] < 0.2 < distance[10.0] and paid[100.0] < 0.3  # imitates its teacher, noise for noise
    assert paid[10.0] > 0.7 and near[10.0] > 0.7  # is paid
    assert paid[0.01] < 0.2 and near[0.01] < 0.2  # has left the data
