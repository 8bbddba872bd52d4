"""Every script alone, through its own command line and through train(): what test_cli.py holds lps.py to in depth."""

import csv
import json
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import toy_envs
from carry import ROOT, SCRIPTS
from test_cli import arrays

TINY = dict(actor_hidden_dims=(8, 8), critic_hidden_dims=(8,), batch_size=16, horizon=2)


def as_flags(settings):
    return [str(x) for key, value in settings.items() for x in (f"--{key}".replace("_", "-"), *np.ravel(value))]


def own_data(path):
    np.savez(path, observations=np.random.default_rng(0).normal(size=(40, 2)), actions=np.linspace(-1, 1, 40)[:, None],
             rewards=np.arange(40.0), terminals=np.arange(40) % 10 == 9)
    return path


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "lps"])
def test_alone_in_a_folder(tmp_path, name):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copy(toy_envs.__file__, tmp_path)
    own_data(tmp_path / "own.npz")
    ran = subprocess.run(
        [sys.executable, f"{name}.py", "--env-id", "toy_envs:Counting-v0", "--dataset-path", "own.npz", "--total-steps",
         "4", "--eval-episodes", "3", "--capture-video", "--run-dir", "run", *as_flags(TINY)],
        cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0 and "warn" not in (ran.stdout + ran.stderr).lower(), ran.stderr
    assert f"{name} on toy_envs:Counting-v0" in ran.stdout and "sparse: False" in ran.stdout
    assert ("alpha: 10.0" in ran.stdout) == (name in ("qc_fql", "qc_mfql"))  # what no domain names
    record = json.loads((tmp_path / "run/args.json").read_text())
    assert record["algorithm"] == name and record.get("alpha", 10.0) == 10.0
    assert [path.name for path in (tmp_path / "run/videos").iterdir()] == ["step4_seed0.mp4"]
    with open(tmp_path / "run/eval.csv") as file:
        lengths = [toy_envs.Counting.length(i) for i in range(3)]
        assert [float(row["length"]) for row in csv.DictReader(file)] == [pytest.approx(np.mean(lengths), rel=1e-5)]


@pytest.mark.parametrize("name, more", [*((name, {}) for name in SCRIPTS), ("flow_bc", dict(policy="meanflow")),
                                        ("lps", dict(base="flow")), ("lps", dict(predict="velocity"))])
def test_resumed_is_uninterrupted(tmp_path, capsys, name, more):
    script, data = import_module(name), own_data(tmp_path / "own.npz")
    args = script.Args(env_id="toy_envs:Counting-v0", dataset_path=data, eval_episodes=0, log_interval=3,
                       total_steps=6, run_dir=tmp_path / "whole", **TINY | more)
    script.train(args)
    script.train(script.replace(args, total_steps=3, run_dir=tmp_path / "parts"))
    script.train(script.replace(args, run_dir=tmp_path / "parts", resume=True))
    whole, parts = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
    assert whole.keys() == parts.keys() and whole["step"] == 6
    for key, x in whole.items():
        np.testing.assert_array_equal(x, parts[key], err_msg=key)
    capsys.readouterr()
    script.train(script.replace(args, eval_only=True, eval_episodes=2))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2


@pytest.mark.parametrize("name, seeds", [("lps", 2), ("flow_bc", 1)])
def test_data_on_the_host_make_the_same_run(tmp_path, name, seeds):
    """To the bit, over several calls and a stop."""
    script, data = import_module(name), own_data(tmp_path / "own.npz")
    args = script.Args(env_id="toy_envs:Counting-v0", dataset_path=data, eval_episodes=0, log_interval=20,
                       total_steps=60, num_seeds=seeds, run_dir=tmp_path / "device", **TINY)
    script.train(args)
    script.train(script.replace(args, total_steps=20, dataset_on_host=True, run_dir=tmp_path / "host"))
    script.train(script.replace(args, dataset_on_host=True, run_dir=tmp_path / "host", resume=True))
    whole, host = arrays(tmp_path / "device"), arrays(tmp_path / "host")
    for key, x in whole.items():
        np.testing.assert_array_equal(x, host[key], err_msg=key)
    assert not list(tmp_path.glob(".*")) and len(list(tmp_path.glob("own.npz.*.observations"))) == 1


def test_another_methods_run_is_refused(tmp_path):
    import cfgrl
    import dsrl

    settings = dict(env_id="toy_envs:Counting-v0", dataset_path=own_data(tmp_path / "own.npz"), total_steps=2,
                    eval_episodes=0, run_dir=tmp_path / "run", **TINY)
    dsrl.train(dsrl.Args(**settings))
    with pytest.raises(SystemExit, match="algorithm was dsrl and is cfgrl"):
        cfgrl.train(cfgrl.Args(**settings, resume=True))


@pytest.mark.parametrize("name, bad, flag", [("cfgrl", dict(expectile=1.5), "--expectile 1.5"),
                                             ("cfgrl", dict(guidance=-1.0), "--guidance -1.0"),
                                             ("qc_fql", dict(alpha=-3.0), "--alpha -3.0"),
                                             ("dsrl", dict(flow_steps=0), "--flow-steps 0")])
def test_out_of_range(name, bad, flag):
    script = import_module(name)
    with pytest.raises(SystemExit, match=f"{flag} is out of range"):
        script.check_args(script.Args(**bad))
