"""benchmark/latency.py: network evaluations against a count by hand, and the table of a tiny run."""

import csv

import pytest

from benchmark import latency

BY_HAND = {"lps": dict(latent_actor=1, policy=1), "dsrl": dict(latent_actor=1, policy=10), "qc_fql": dict(student=1),
           "qc_mfql": dict(student=1), "cfgrl": dict(policy=20), "flow_bc": dict(policy=10),
           "flow_bc --policy meanflow": dict(policy=1)}
TINY = dict(actor_hidden_dims=(8,), critic_hidden_dims=(8,))


@pytest.mark.parametrize("method", latency.METHODS)
def test_network_evaluations(method):
    assert latency.count_evaluations(*latency.prepare(method, **TINY)) == BY_HAND[method]


def test_solver_steps_are_counted_as_they_happen():
    assert latency.count_evaluations(*latency.prepare("dsrl", flow_steps=3, **TINY)) == dict(latent_actor=1, policy=3)


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "METHODS", dict(lps=TINY, cfgrl=TINY))
    latency.main(latency.Args(calls=5, out=tmp_path / "new/latency.csv"))
    with open(tmp_path / "new/latency.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["evaluations per chunk"], row["per action"]) for row in rows] == [
        ("lps", "2", "0.4"), ("cfgrl", "20", "4.0")]
    assert all(0 < float(row["median (us)"]) <= float(row["99th percentile (us)"]) and row["device"] for row in rows)
    assert "| lps |" in capsys.readouterr().out


def test_no_calls():
    with pytest.raises(SystemExit, match="error: --calls 0 is out of range"):
        latency.main(latency.Args(calls=0))
