"""Every method learns a bandit: actions lie near a sphere in four dimensions, and pay if they point where the
observation does. Only right implementations of LPS pass: the same test is run on two wrong ones."""

import csv
from importlib import import_module

import jax
import numpy as np
import pytest
import toy_envs

import lps


def learn(tmp_path, name="lps", data=None, **settings):
    """Trains a script on the bandit. Returns the script, its arguments and final state."""
    script = import_module(name)
    np.savez(tmp_path / "data.npz", **data or toy_envs.bandit_data(20_000))
    args = script.Args(**dict(
        env_id="toy_envs:Bandit-v0", dataset_path=tmp_path / "data.npz", horizon=1, learning_rate=1e-3, seed=1,
        actor_hidden_dims=(64, 64, 64), critic_hidden_dims=(64, 64), total_steps=2000, log_interval=1000,
        eval_interval=0, eval_episodes=0, run_dir=tmp_path / "run") | settings)
    script.train(args)
    make = lambda key: jax.vmap(lambda k: script.init(args, k, (toy_envs.DIM,), toy_envs.DIM))(key[None])
    state, _ = script.load_checkpoint(tmp_path / "run/checkpoint.npz", jax.eval_shape(make, jax.random.key(0)))
    return script, args, jax.tree.map(lambda x: x[0], state)


def play(script, args, state, n=2000):
    s = toy_envs.unit(np.random.default_rng(1), n).astype(np.float32)
    return s, np.clip(script.act(args, state, s, jax.random.key(1)), -1, 1)


def is_near_data(a):
    return np.abs(np.linalg.norm(a, axis=1) - toy_envs.RADIUS) < 0.15


def learn_lps(tmp_path, **settings):
    """How often LPS is paid, and how often its base policy is."""
    dims = dict(actor_hidden_dims=(128, 128, 128), latent_actor_hidden_dims=(64, 64), total_steps=6000)
    script, args, state = learn(tmp_path, **dims | settings)
    s, a = play(script, args, state)
    base = lps.decode(args, state.params["policy"], s, lps.draw_latent(args, jax.random.key(1), s.shape))
    return toy_envs.is_paid(s, a).mean(), toy_envs.is_paid(s, np.clip(base, -1, 1)).mean()


def test_lps_is_paid(tmp_path):
    actor, base = learn_lps(tmp_path, eval_episodes=300)
    with open(tmp_path / "run/eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert actor >= 0.6 and actor >= 3 * base and base > 0.05
    assert [(row["step"], row["episodes"], row["length"]) for row in rows] == [("6000", "300", "1")]
    success = float(rows[0]["success"])
    assert abs(success - actor) < 4 * np.sqrt(0.25 / 300)  # the environment agrees
    np.testing.assert_allclose(float(rows[0]["return"]), success - 1, atol=1e-4)


def test_without_the_gradient_through_f_it_is_not(tmp_path, monkeypatch):
    def actor_loss(args, latent_actor, policy, critics, s):
        a = lps.decode(args, policy, s, lps.choose_latent(args, lps.apply(latent_actor, s)))
        q = lps.q_values(critics, s, lps.sg(a)).mean(axis=0)
        return -q.mean(), {}

    monkeypatch.setattr(lps, "actor_loss", actor_loss)
    actor, base = learn_lps(tmp_path)
    assert actor < 0.3 and actor < 3 * base


def test_an_unconstrained_latent_does_clearly_worse(tmp_path):
    actor, _ = learn_lps(tmp_path, latent="normal")
    assert actor < 0.4


def test_flow_bc_covers_the_modes_in_their_proportions_and_little_else(tmp_path):
    data = toy_envs.modes_data(20_000)
    s, a = play(*learn(tmp_path, "flow_bc", data, actor_hidden_dims=(128, 128, 128), total_steps=6000), n=4000)
    distance = np.linalg.norm(a[:, None] - toy_envs.MODES, axis=2)
    shares = np.bincount(distance.argmin(axis=1)) / len(a)
    np.testing.assert_allclose(shares, toy_envs.SHARES, atol=0.05)
    assert (distance.min(axis=1) < 0.15).mean() > 0.8  # the modes are 0.7 apart; ten Euler steps leave some in between


@pytest.mark.parametrize("name", ["dsrl", "cfgrl"])
def test_steering_and_guidance_are_paid(tmp_path, name):
    """The data are paid once in eight; imitation cannot do better."""
    s, a = play(*learn(tmp_path, name))
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
        script, args, state = learn(folder, name, data, alpha=alpha, total_steps=1500)
        s, a = play(script, args, state)
        paid[alpha], near[alpha] = toy_envs.is_paid(s, a).mean(), is_near_data(a).mean()
        e, policy = jax.random.normal(jax.random.key(1), s.shape), state.params["policy"]
        teacher = script.sample_flow(args, policy, s, e) if name == "qc_fql" else script.one_step(
            script.partial(script.f, policy), s, e)
        distance[alpha] = np.linalg.norm(a - teacher, axis=1).mean()
    assert distance[100.0] < 0.2 < distance[10.0] and paid[100.0] < 0.3  # imitates its teacher, noise for noise
    assert paid[10.0] > 0.7 and near[10.0] > 0.7  # is paid
    assert paid[0.01] < 0.2 and near[0.01] < 0.2  # has left the data
