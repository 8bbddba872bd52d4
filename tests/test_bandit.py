"""LPS learns a bandit: actions lie near a sphere in four dimensions, and pay if they point where the observation does.
Only right implementations pass: the same test is run on two wrong ones."""

import csv

import jax
import numpy as np
import toy_envs

import lps


def learn(tmp_path, **settings):
    """Trains on the bandit: (how often it is paid, how often its base policy is, the run directory)."""
    np.savez(tmp_path / "data.npz", **toy_envs.bandit_data(20_000))
    args = lps.Args(**dict(
        env_id="toy_envs:Bandit-v0", dataset_path=tmp_path / "data.npz", horizon=1, learning_rate=1e-3, seed=1,
        actor_hidden_dims=(128, 128, 128), critic_hidden_dims=(64, 64), latent_actor_hidden_dims=(64, 64),
        total_steps=6000, log_interval=1000, eval_interval=0, eval_episodes=300, run_dir=tmp_path / "run") | settings)
    run_dir = lps.train(args)
    like = jax.eval_shape(lambda key: jax.vmap(lambda k: lps.init(args, k, toy_envs.DIM, toy_envs.DIM))(key[None]),
                          jax.random.key(0))
    state = jax.tree.map(lambda x: x[0], lps.load_checkpoint(run_dir / "checkpoint.npz", like)[0])
    s = toy_envs.unit(np.random.default_rng(1), 2000).astype(np.float32)
    latents = lps.draw_latent(args, jax.random.key(1), s.shape)
    actions = dict(actor=lps.act(args, state, s, None), base=lps.decode(args, state.params["policy"], s, latents))
    return *(toy_envs.is_paid(s, np.clip(a, -1, 1)).mean() for a in actions.values()), run_dir


def test_lps_is_paid(tmp_path):
    actor, base, run_dir = learn(tmp_path)
    with open(run_dir / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert actor >= 0.6 and actor >= 3 * base and base > 0.05
    assert [(row["step"], row["episodes"], row["length"]) for row in rows] == [("6000", "300", "1")]
    success = float(rows[0]["success"])
    assert abs(success - actor) < 4 * np.sqrt(0.25 / 300)  # the environment agrees
    np.testing.assert_allclose(float(rows[0]["return"]), success - 1, atol=1e-4)


def test_without_the_gradient_through_f_it_is_not(tmp_path, monkeypatch):
    def actor_loss(args, latent_actor, policy, critics, s):
        a = lps.decode(args, policy, s, lps.choose_latent(args, latent_actor, s))
        q = lps.q_values(critics, s, lps.sg(a)).mean(axis=0)
        return -q.mean(), {}

    monkeypatch.setattr(lps, "actor_loss", actor_loss)
    actor, base, _ = learn(tmp_path, eval_episodes=0)
    assert actor < 0.3 and actor < 3 * base


def test_an_unconstrained_latent_does_clearly_worse(tmp_path):
    actor, _, _ = learn(tmp_path, latent="normal", eval_episodes=0)
    assert actor < 0.4
