"""benchmark/throughput.py: its count of operations by hand, its plain form against the scripts' own, a tiny run."""

import csv
from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lps
from benchmark import throughput


def test_products_are_counted():
    x, w = jnp.ones((4, 5)), jnp.ones((5, 6))
    count = lambda f, *inputs: throughput.products(jax.make_jaxpr(f)(*inputs).jaxpr)
    assert count(jnp.matmul, x, w) == 2 * 4 * 5 * 6
    assert count(jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ w @ w.T, x)), x) == 7 * 2 * (2 * 4 * 5 * 6)
    assert count(jax.vmap(lambda x: x @ w), x) == 2 * 4 * 5 * 6
    conv = partial(jax.lax.conv_general_dilated, window_strides=(1, 1), padding="SAME",
                   dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count(conv, jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 16))) == 2 * (2 * 8 * 8 * 16) * 3 * 3 * 3


def test_an_lps_update_needs_what_paper_says():
    """In forward passes: 3.25 for MeanFlow, 3 for the critics, for the actor's loss forwards and back through all."""
    forward = lambda *dims: 2 * 256 * sum(a * b for a, b in zip(dims, dims[1:]))
    policy, actor = forward(28 + 25 + 2, 512, 512, 512, 512, 25), forward(28, 256, 256, 25)
    critics = 2 * forward(28 + 25, 256, 256, 256, 256, 1)
    needed = (1 + 0.25 + 2) * policy + 3 * critics + (actor + policy + critics) + (3 * actor + 2 * policy + 2 * critics)
    counted = throughput.Trained("lps", 1, False, 1).flop()
    assert 0.95 * needed < counted <= needed  # no gradient is needed in a first layer's input


def test_the_plain_form_computes_the_same():
    key = jax.random.key(0)
    a, e = jax.random.normal(key, (2, 32, 3))
    f = lambda s, z, t, r: jnp.sin(z * t + r * s)
    plain, ours = (loss(f, a, a, e, key)[0] for loss in (throughput.plain_meanflow_loss, lps.meanflow_loss))
    np.testing.assert_allclose(plain, ours, rtol=1e-5)
    args = lps.Args(actor_hidden_dims=(8,), critic_hidden_dims=(8,), batch_size=4, horizon=1)
    state = lps.init(args, key, (3,), 2)
    losses = {name: lambda x: (sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x)), {}) for name in state.params}
    ours, _ = lps.descend(args, state, losses)
    adam = lps.optax.adam(args.learning_rate).init((state.params, state.target))
    plain, _ = throughput.plain_descend(args, state._replace(opt_state=adam), losses)
    for x, y in zip(jax.tree.leaves((plain.params, plain.target)), jax.tree.leaves((ours.params, ours.target))):
        np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("name", ["lps", "dsrl", "cfgrl"])  # all kinds of losses
def test_speed_changes_no_number(name, monkeypatch):
    """Four updates in one compiled call, and one after another in the straightforward form: the same losses and
    networks, to rounding."""
    script, lr = import_module(name), 3e-4
    small = dict(actor_hidden_dims=(16, 16), critic_hidden_dims=(16, 16), batch_size=32, learning_rate=lr)
    monkeypatch.setattr(script, "Args", partial(script.Args, **small))
    ours = throughput.Trained(name, 1, False, 4)
    state = jax.tree.map(lambda x: x[0], ours.start())
    updates, _ = script.make_updates(ours.args, len(ours.host["starts"]), False)
    fast, metrics = jax.tree.map(lambda x: x[0], updates(4, ours.state, ours.keys, ours.data, 0))
    for form, function in throughput.plain_forms(script).items():
        monkeypatch.setattr(script, form, function)
    state = state._replace(opt_state=optax.adam(lr).init((state.params, state.target)))
    update, batch = jax.jit(partial(script.update, ours.args)), jax.jit(ours.batch)
    for step in range(4):
        batch_key, update_key = jax.random.split(jax.random.fold_in(ours.keys[0], step))
        state, losses = update(state, batch(ours.data, batch_key), update_key)
        for network, loss in losses.items():
            np.testing.assert_allclose(metrics[f"{network}_loss"][step], loss, rtol=1e-4, err_msg=network)
    for x, y in zip(jax.tree.leaves((fast.params, fast.target)), jax.tree.leaves((state.params, state.target))):
        assert np.abs(x - y).mean() < lr / 1000  # where a gradient is all but zero, Adam makes a step of rounding


def test_the_table(tmp_path, monkeypatch, capsys):
    small = dict(actor_hidden_dims=(8,), critic_hidden_dims=(8,), batch_size=16)
    monkeypatch.setattr(lps, "Args", partial(lps.Args, **small))
    throughput.main(throughput.Args(("lps",), (1, 2), only_updates=True, repeats=2, out=tmp_path / "new/speed.csv"))
    with open(tmp_path / "new/speed.csv") as file:
        rows = {(row["what"], row["seeds"]): row for row in csv.DictReader(file)}
    assert all(0 < float(row["least"]) <= float(row["median"]) <= float(row["most"]) for row in rows.values())
    for what in ("updates, end to end", "updates on a fixed batch", "end to end of that"):
        assert {(what, "1"), (what, "2")} <= set(rows)
    assert ("updates, straightforward form", "1") in rows
    assert "| lps | 2 | updates, end to end |" in capsys.readouterr().out


@pytest.mark.parametrize("bad, message", [
    (dict(scripts=("lps", "sac")), "--scripts sac"), (dict(repeats=0), "--repeats")])
def test_mistakes(bad, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        throughput.main(throughput.Args(**bad))
