"""From pixels the scripts learn what only images in a row can show. From less they learn nothing.

A square drifts in one of four directions (toy_envs.Drift), and one image does not show in which.
Actions along it are paid: half of those in the data. A film begins with one image, three times in
the stack, so that at one row in sixteen nobody can know.
"""

from functools import partial

import jax
import numpy as np
import pytest
import toy_envs
from test_bandit import learn

SETTINGS = dict(
    env_id="toy_envs:Drift-v0",
    action_dim=2,
    batch_size=64,
    policy_hidden_dims=(64, 64),
)
BROKEN = ["still", "shuffled", "blank"]


def films(episodes, seed, kind="whole"):
    """Data of Drift, and the velocity at every row. Some kinds of film do not show it."""
    data, velocity = toy_envs.drift_data(episodes, seed)
    rng = np.random.default_rng(seed)
    for film in data["observations"].reshape(episodes, -1, 8, 8, 3):
        if kind == "still":
            film[:] = film[0]
        if kind == "shuffled":
            rng.shuffle(film)
        if kind == "blank":
            film[:] = 0
    return data, velocity


def unseen(script, kind):
    """Observations in films that nobody has trained on, stacked as in training, and velocities."""
    data, velocity = films(300, 1, kind)
    rows = script.chunk_starts(data["terminals"], 1)
    return np.asarray(script.observe(data, rows)), velocity[rows]


def imitate(tmp_path, kind="whole"):
    """Trains Flow-BC on actions along the velocity. Gives the mean cosine of its own with it."""
    data, velocity = films(500, 0, kind)
    noise = np.random.default_rng(0).normal(size=velocity.shape)
    data["actions"] = 0.5 * velocity + 0.05 * noise
    script, args, state = learn(tmp_path, "flow_bc", data, total_steps=200, **SETTINGS)
    s, velocity = unseen(script, kind)
    a = np.asarray(script.act(args, state, s, jax.random.key(1)))
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(velocity, axis=1)
    return script, args, state, np.mean((a * velocity).sum(axis=1) / lengths)


def test_imitation_follows_what_moves(tmp_path):
    """In stacks as the data are, and in those of the environment, in the script's evaluation."""
    script, args, state, cosine = imitate(tmp_path)
    assert cosine > 0.6
    args = script.replace(args, eval_episodes=50)
    act_fn = jax.jit(partial(script.act_once, args))
    row = script.evaluate(args, act_fn, state, args.total_steps, [])
    assert row["success"] > 0.8


@pytest.mark.parametrize("kind", BROKEN)
def test_imitation_does_not_if_the_films_are(tmp_path, kind):
    *_, cosine = imitate(tmp_path, kind)
    assert abs(cosine) < 0.2


def improve(tmp_path, kind="whole"):
    """Trains LPS on actions in all directions. Gives how often it is paid, and how often its base.

    With a higher learning rate its actor chooses before the critic sees, and unlearns it slowly.
    """
    data, _ = films(500, 0, kind)
    given = dict(learning_rate=3e-4, total_steps=350, latent_actor_hidden_dims=(64, 64))
    script, args, state = learn(tmp_path, "lps", data, **given, **SETTINGS)
    s, velocity = unseen(script, kind)
    a = np.asarray(script.act(args, state, s, jax.random.key(1)))
    z = script.sphere(jax.random.normal(jax.random.key(1), a.shape))
    base = np.asarray(script.decode(args, state["policy"], s, z))
    return toy_envs.is_along(a, velocity).mean(), toy_envs.is_along(base, velocity).mean()


def test_lps_is_paid_clearly_more_often_than_what_it_imitates_with(tmp_path):
    actor, base = improve(tmp_path)
    assert actor > 0.8 and actor > 1.5 * base and base > 0.4


def test_lps_is_not_if_the_films_are_still(tmp_path):
    actor, base = improve(tmp_path, "still")
    assert actor < 0.6 and actor < 1.5 * base
