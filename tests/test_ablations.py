"""Each exchange of benchmark/ablations.py does what it says, and all else is lps.py's."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from helpers import COUNTING, TINY, B, D, S, as_flags, make_args, make_data, make_state, read_csv

import lps
from benchmark import ROOT, ablations

KEY = jax.random.key(1)
STATE = make_state(lps, make_args(lps))
policy, critic, actor = [STATE[name] for name in ("policy", "critic", "latent_actor")]
rng = np.random.default_rng(0)
s = rng.normal(size=(B, S))
a = rng.uniform(-1, 1, (B, D))
BATCH = dict(observations=s, actions=a, next_observations=s, rewards=rng.normal(size=B))
BATCH = jax.tree.map(jnp.float32, BATCH | dict(masks=np.ones(B)))
assert_close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5))


def call(name, *inputs, state=STATE, **settings):
    """A function of lps with these settings."""
    args = make_args(ablations, **settings)
    return getattr(ablations.exchange(args), name)(args, state, *inputs)


def f(z, t=1, dt=1, params=policy.params):
    return policy.apply_fn(params, s, z, jnp.full((B, 1), t), jnp.full((B, 1), dt))


def q(a):
    return critic.apply_fn(critic.params, s, a)


def latent(params):
    return lps.sphere(actor.apply_fn(params, s))


def search(z):
    """The best of all latents z[i] for each observation."""
    least = jnp.stack([q(jnp.clip(f(z_i), -1, 1)).min(axis=0) for z_i in z])
    return z[least.argmax(axis=0), jnp.arange(B)]


def test_default_flags_exchange_nothing():
    script = ablations.exchange(ablations.Args())
    for name in ("sphere", "imitation_loss", "decode", "init", "update", "act", "learn", "train"):
        assert getattr(script, name).__code__ == getattr(lps, name).__code__


def test_latents_bases_and_predictions_are_exchanged():
    """A network of zeros says 0: the latent is the chunk where it says a velocity."""
    z = 3 * jax.random.normal(KEY, (B, D))
    clipped = jnp.clip(z, -1, 1)
    cases = [  # flags, times that the network takes, the chunk of z, the latent of an output z
        (dict(base="flow", flow_steps=1), 1, clipped, lps.sphere(z)),
        (dict(predict="velocity", latent="normal"), 2, clipped, z),
        (dict(latent="truncated-normal"), 2, 0 * z, 2 * jnp.tanh(z)),
    ]
    for settings, num_times, chunk, actor_latent in cases:
        args = make_args(ablations, **settings)
        script = ablations.exchange(args)
        shapes = jax.eval_shape(partial(script.init, args), KEY, s[:1])["policy"]
        assert shapes.params["params"]["Dense_0"]["kernel"].shape[0] == S + D + num_times
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes.params)
        assert_close(script.decode(args, shapes.replace(params=zeros), s, z), chunk)
        assert_close(script.sphere(z), actor_latent)
    a = np.zeros((999, D))
    e = ablations.truncated_imitation_loss(lambda *x: x[4], None, None, s, a, None, KEY)
    assert 1.9 < jnp.abs(e).max() <= 2 and e.std() == pytest.approx(0.88, abs=0.02)


def test_the_average_of_f_decodes_in_steps_and_without_the_clip():
    average = jax.tree.map(lambda x: 0.8 * x, policy.params)
    settings = dict(average=True, decode_steps=3, clip=False)
    settings["state"] = STATE | dict(average=average, target_critic=critic.params)

    @jax.jit
    def run():
        z = latent(actor.params)
        for t in (1, 2 / 3, 1 / 3):
            z = z + (f(z, t, 1 / 3, average) - z) / 3
        y = BATCH["rewards"] + 0.99**2 * q(jnp.clip(z, -1, 1)).min(axis=0)
        expected = z, q(z).mean(), jnp.mean((q(a) - y) ** 2)
        return call("update", BATCH, KEY, **settings), call("act", s, KEY, **settings), expected

    (state, metrics), acted, (raw, *expected) = run()
    assert jnp.abs(raw).max() > 1.1
    assert_close(acted, jnp.clip(raw, -1, 1))
    assert_close([metrics["latent_actor_q"], metrics["critic_loss"]], expected)
    new = jax.tree.map(lambda x, y: 0.005 * x + 0.995 * y, state["policy"].params, average)
    assert_close(state["average"], new)


def test_a_loss_moves_the_latent_actor_alone_otherwise_and_a_search_only_acts():
    def climbing(params):
        least = q(jnp.clip(f(latent(params)), -1, 1)).min(axis=0)
        return -0.3 * least.mean() / jnp.abs(jax.lax.stop_gradient(least)).mean()

    def imitating(params):
        z = lps.sphere(jax.random.normal(jax.random.fold_in(KEY, 3), (3, B, D)))
        return jnp.mean((latent(params) - search(z)) ** 2)

    @jax.jit
    def run():
        z = lps.sphere(jax.random.normal(KEY, (B * 8, D))).reshape(B, 8, D).swapaxes(0, 1)
        acted = call("act", s, KEY, search=8), jnp.clip(f(search(z)), -1, 1)
        climbed = call("update", BATCH, KEY, climb="min", alpha=0.3)
        imitated = call("update", BATCH, KEY, imitate=3, search=8)
        expected = [jax.value_and_grad(loss)(actor.params) for loss in (climbing, imitating)]
        return [climbed, imitated], expected, acted

    changed, expected, acted = run()
    assert_close(*acted)
    for (state, metrics), (loss, grads) in zip(changed, expected):
        assert metrics.pop("latent_actor_loss") == pytest.approx(float(loss), rel=1e-4)
        assert_close(state.pop("latent_actor").params, actor.apply_gradients(grads=grads).params)
    assert_close(*[jax.tree.leaves(new) for new in changed])


def test_the_corner_is_an_eighth_of_the_batch_at_t_1_and_r_0():
    e = lps.sphere(jax.random.normal(KEY, a.shape))

    def loss_of(s, a, e, **settings):
        script = ablations.exchange(make_args(ablations, **settings))
        return script.imitation_loss(policy, policy.params, s, a, e, KEY)[0]

    @jax.jit
    def run():
        near = [f(e + h * (e - a), 1 + h, 1 + h)[-1] for h in (-1e-3, 0, 1e-3)]
        err = jnp.mean((e[-1] - near[1] - (near[2] - near[0]) / 2e-3) ** 2)
        rest = loss_of(s[:-1], a[:-1], e[:-1])
        return loss_of(s, a, e, corner=True), 7 / 8 * rest + err / jnp.sqrt(err + 1e-3) / 8

    loss, expected = run()
    assert loss == pytest.approx(float(expected), rel=1e-3)


def test_what_makes_no_sense_together_is_refused_in_one_line():
    bad = [dict(imitate=2, climb="min"), dict(clip=False, latent="normal")]
    bad += [dict(base="flow", decode_steps=2), dict(base="flow", search=2)]
    for settings in bad:
        with pytest.raises(SystemExit, match="--"):
            ablations.exchange(make_args(ablations, **settings))


def test_a_run_is_recorded_and_goes_on_and_can_be_played_by_a_search(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "data.npz", **make_data([9, 30]))
    flags = ["--env-id", COUNTING, "--dataset-path", f"{tmp_path}/data.npz", *as_flags(TINY)]
    flags += ["--latent-actor-hidden-dims", "8", "--total-steps", "100", "--eval-episodes"]
    command = [sys.executable, "-m", "benchmark.ablations", "--run-dir", f"{tmp_path}/ablations"]
    command += ["--latent", "normal", *flags, "1"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | dict(PYTHONPATH="tests"))

    # In this process, which plays, too, and keeps its handlers of signals:
    env_class = "gymnasium.vector.AsyncVectorEnv"
    monkeypatch.setattr(env_class, lambda x, context, **y: SyncVectorEnv(x, **y))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(lps, "learn", lambda args, n, data, state, step: (state, {}))

    def start(script, name, *more):
        monkeypatch.setattr(sys, "argv", ["x", "--run-dir", f"{tmp_path}/{name}", *more])
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    start(ablations, "ablations", "--resume", "--total-steps", "200", "--eval-episodes", "0")
    record = json.loads((tmp_path / "ablations/args.json").read_text())
    assert (record["script"], record["latent"]) == ("ablations", "normal")
    assert [row["step"] for row in read_csv(tmp_path / "ablations/train.csv")] == ["100", "200"]
    start(lps, "lps", *flags, "0")
    for name in ("lps", "ablations"):
        evaluate = ["--eval-only", "--eval-episodes", "2"]
        rows = [start(ablations, name, *evaluate, *search) for search in ([], ["--search", "64"])]
        assert json.loads(rows[0])["return"] != json.loads(rows[1])["return"]
