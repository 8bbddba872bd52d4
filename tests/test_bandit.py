"""Every method learns a bandit, and what should break a method breaks it here.

Actions lie near a sphere in four dimensions. One in eight is paid: those that point where the
observation does.
"""

import jax
import numpy as np
import pytest
import toy_envs
from helpers import load, read_csv

import lps
import reform


def learn(tmp_path, name, data=None, **settings):
    """Trains a script on the bandit. Gives the script, its arguments and its last state."""
    script = load(name)
    np.savez(tmp_path / "data.npz", **data or toy_envs.bandit_data(20_000))
    standard = dict(
        env_id="toy_envs:Bandit-v0",
        dataset_path=str(tmp_path / "data.npz"),
        horizon=1,
        learning_rate=1e-3,
        seed=1,
        policy_hidden_dims=(64, 64, 64),
        critic_hidden_dims=(64, 64),
        total_steps=1500,
        batch_size=128,
        log_interval=0,
        eval_interval=0,
        eval_episodes=0,
        action_dim=toy_envs.DIM,
        run_dir=str(tmp_path / "run"),
    )
    args = script.Args(**standard | settings)
    script.train(args)
    args = script.prepare(script.replace(args, resume=True))
    state, _ = script.load_state(args, script.init_state(args, script.make_env(args)))
    return script, args, state


def play(script, args, state, n=2000):
    s = toy_envs.unit(np.random.default_rng(1), n).astype(np.float32)
    return s, np.asarray(script.act(args, state, s, jax.random.key(1)))


# A MeanFlow learns more slowly than a flow.
MEANFLOW = dict(
    policy_hidden_dims=(128, 128, 128), learning_rate=2e-3, total_steps=4000, batch_size=256
)


def learn_lps(tmp_path, **settings):
    """How often LPS is paid, and how often what it imitates with."""
    settings = dict(latent_actor_hidden_dims=(64, 64), **MEANFLOW) | settings
    script, args, state = learn(tmp_path, "lps", **settings)
    s, a = play(script, args, state)
    z = script.sphere(jax.random.normal(jax.random.key(1), s.shape))
    imitated = np.asarray(script.decode(args, state["policy"], s, z))
    return toy_envs.is_paid(s, a).mean(), toy_envs.is_paid(s, imitated).mean()


def test_lps_is_paid_clearly_more_often_than_what_it_imitates_with(tmp_path):
    actor, base = learn_lps(tmp_path, eval_episodes=200)
    assert actor >= 0.6 and actor >= 3 * base and base > 0.05
    row = read_csv(tmp_path / "run/eval.csv")[-1]
    assert (row["step"], row["episodes"], row["length"]) == ("4000", "200", "1")
    success = float(row["success"])
    assert abs(success - actor) < 4 * np.sqrt(0.25 / 200)  # the environment agrees
    np.testing.assert_allclose(float(row["return"]), success - 1, atol=1e-4)


def test_without_the_gradient_through_f_it_is_not(tmp_path, monkeypatch):
    """Acting and y decode as before; in the actor's loss, decode hides its gradient."""
    decode = lps.decode
    monkeypatch.setattr(lps, "decode", lambda *given: lps.sg(decode(*given)))
    actor, base = learn_lps(tmp_path, total_steps=2500)
    assert actor < 0.3 and actor < 3 * base


SHARES = (0.6, 0.3, 0.1)


@pytest.mark.parametrize("name, tolerance", [("flow_bc", 0.05), ("mf_bc", 0.15)])
def test_imitation_finds_the_modes_of_the_data_in_proportion(tmp_path, name, tolerance):
    """A MeanFlow only nearly so: its published weight, err^-0.5, favours the most frequent one."""
    rng = np.random.default_rng(0)
    modes = toy_envs.RADIUS * np.eye(toy_envs.DIM)[:3]
    data = toy_envs.bandit_data(20_000)
    noise = 0.02 * rng.normal(size=(20_000, toy_envs.DIM))
    data["actions"][::2] = modes[rng.choice(3, 20_000, p=SHARES)] + noise
    s, a = play(*learn(tmp_path, name, data, **MEANFLOW), n=4000)
    distance = np.linalg.norm(a[:, None] - modes, axis=2)
    shares = np.bincount(distance.argmin(axis=1), minlength=3) / len(a)
    np.testing.assert_allclose(shares, SHARES, atol=tolerance)
    assert shares.min() > 0.04
    assert (distance.min(axis=1) < 0.15).mean() > 0.7  # the modes are 0.7 apart


LONGER = dict(learning_rate=2e-3, total_steps=2500)
SETTINGS = dict(
    mf_bon=MEANFLOW, dsrl=dict(learning_rate=2e-3, total_steps=2000), qc_mfql=dict(alpha=10)
)
SETTINGS |= dict(qam=dict(eta=5.0, **LONGER), rql=dict(alpha=0.3, **LONGER))


@pytest.mark.parametrize(
    "name", ["dsrl", "cfgrl", "ifql", "gfp", "mf_bon", "qc_mfql", "qam", "rql"]
)
def test_improvement_is_paid(tmp_path, name):
    """Imitation could not do better than once in eight."""
    s, a = play(*learn(tmp_path, name, **SETTINGS.get(name, {})))
    assert toy_envs.is_paid(s, a).mean() >= 0.5


def is_near(a):
    """As long as the data's actions."""
    return np.abs(np.linalg.norm(a, axis=1) - toy_envs.RADIUS) < 0.15


def test_alpha_leads_from_imitation_to_pay_and_off_the_data(tmp_path):
    """Here the pay also grows with the action: a critic believes in more of it beyond the data."""
    data = toy_envs.bandit_data(20_000)
    data["rewards"] += (data["observations"] * data["actions"]).sum(axis=1)
    paid, near, distance = {}, {}, {}
    for alpha in (100, 10, 0.01):
        run_dir = str(tmp_path / f"alpha{alpha}")
        script, args, state = learn(tmp_path, "qc_fql", data, alpha=alpha, run_dir=run_dir)
        s, a = play(script, args, state)
        e = jax.random.normal(jax.random.key(1), s.shape)
        taught = script.decode(args, state["policy"], s, e)
        distance[alpha] = np.linalg.norm(a - taught, axis=1).mean()
        paid[alpha] = toy_envs.is_paid(s, a).mean()
        near[alpha] = is_near(a).mean()
    assert distance[100] < 0.2 < distance[10] and paid[100] < 0.3  # imitates, noise for noise
    assert paid[10] > 0.7 and near[10] > 0.7
    assert paid[0.01] < 0.2 and near[0.01] < 0.2  # has left the data


@pytest.mark.parametrize(
    "name, setting", [("qam", dict(eta=0.0)), ("rql", dict(alpha=100.0, policy_tau=0.01))]
)
def test_without_the_critic_a_flow_keeps_imitating(tmp_path, name, setting):
    s, a = play(*learn(tmp_path, name, total_steps=1000, **setting))
    assert toy_envs.is_paid(s, a).mean() < 0.2
    assert is_near(a).mean() > 0.35  # in four dimensions, one in ten of those in the ball


def test_guidance_leads_from_imitation_to_pay_and_off_the_data(tmp_path):
    """One checkpoint: acting alone differs."""
    script, args, state = learn(tmp_path, "qgf", **LONGER)
    paid = {}
    for guidance in (0.0, 1.0, 10.0):
        s, a = play(script, script.replace(args, guidance=guidance), state)
        paid[guidance] = toy_envs.is_paid(s, a).mean()
    assert paid[0] < 0.2 and paid[1] > 0.7 and paid[10] < 0.5


def test_reform_is_paid_as_long_as_the_gradient_reaches_the_noise_flow(tmp_path, monkeypatch):
    s, a = play(*learn(tmp_path, "reform"))
    assert toy_envs.is_paid(s, a).mean() > 0.4
    steer = reform.steer
    monkeypatch.setattr(reform, "steer", lambda *given: jax.lax.stop_gradient(steer(*given)))
    s, a = play(*learn(tmp_path, "reform", total_steps=700, run_dir=str(tmp_path / "broken")))
    assert toy_envs.is_paid(s, a).mean() < 0.2
