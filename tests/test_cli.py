"""The file as its users run it: alone in a folder, through its command line, on data that the tests collect."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import lps

ROOT = Path(lps.__file__).parent
TINY = ["--actor-hidden-dims", "16", "16", "--critic-hidden-dims", "16", "16", "--latent-actor-hidden-dims", "16",
        "--batch-size", "32"]
LONG = ["--total-steps", "60", "--log-interval", "20", "--eval-interval", "30", "--eval-episodes", "2"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An empty folder with a copy of the script and, in data/, a small dataset collected from OGBench's experts."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "lps.py", folder)
    subprocess.run([sys.executable, ROOT / "benchmark/collect.py", "cube-single-play-v0", "--num-episodes", "2",
                    "--dataset-dir", folder / "data"], check=True, capture_output=True)
    return folder


def start(folder, *flags, **environment):
    return subprocess.Popen([sys.executable, "lps.py", "--dataset-dir", "data", *map(str, flags)], cwd=folder,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def run(folder, *flags, code=0, **environment):
    process = start(folder, *flags, **environment)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out, err


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return result


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def arrays(run_dir):
    with np.load(run_dir / "checkpoint.npz") as file:
        return dict(file)


def timeless(table):
    return [{key: x for key, x in row.items() if key not in ("seconds", "updates_per_second")} for row in table]


def assert_same_run(a, b, tables=("train.csv", "eval.csv")):
    first, second = arrays(a), arrays(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for name in tables:
        assert timeless(rows(a / name)) == timeless(rows(b / name))


@pytest.fixture(scope="session")
def whole(folder):
    """An uninterrupted run."""
    out, err = run(folder, *TINY, *LONG, "--run-dir", "whole")
    return folder / "whole", out, err


def test_run_directory(whole):
    run_dir, out, err = whole
    assert sorted(path.name for path in run_dir.iterdir()) == ["args.json", "checkpoint.npz", "eval.csv", "train.csv"]
    record = json.loads((run_dir / "args.json").read_text())
    assert {field.name for field in lps.fields(lps.Args)} <= record.keys()
    assert record["algorithm"] == "lps" and record["sparse"] is False and record["total_steps"] == 60
    assert record["dataset"]["transitions"] == 2000 and len(record["dataset"]["fingerprint"]) == 16
    assert "collect.py" in record["dataset"]["mark"] and {"jax", "ogbench", "mujoco"} <= record["versions"].keys()
    train, evaluations = rows(run_dir / "train.csv"), rows(run_dir / "eval.csv")
    assert [row["step"] for row in train] == ["20", "40", "60"]
    assert {"step", "seed", "updates_per_second", "policy_loss", "critics_loss", "latent_actor_loss"} <= train[0].keys()
    assert all(np.isfinite(float(x)) for row in train for x in row.values())
    assert list(evaluations[0]) == ["step", "seed", "success", "return", "length", "episodes", "seconds"]
    assert [(row["step"], row["episodes"]) for row in evaluations] == [("30", "2"), ("60", "2")]
    assert all(0 <= float(row["success"]) <= 1 and 1 <= float(row["length"]) <= 200 for row in evaluations)


def test_what_is_printed(whole):
    _, out, err = whole
    for fact in ("transitions: 2000", "trajectories: 2", "reward range", "terminal share", "r_t speaks of s_t", "cpu"):
        assert fact in out
    assert "60/60" in err and "updates/s" in err and "success=" in err
    assert "warn" not in (out + err).replace("warning: every reward", "").lower()


def test_nothing_happens_on_import(folder):
    listing = sorted(folder.iterdir())
    code = ("import os, signal; before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]; "
            "import lps; assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before; "
            "assert 'MUJOCO_GL' not in os.environ")
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, check=True, env=environment)
    assert sorted(folder.iterdir()) == listing


def test_resume_after_sigkill_is_the_same_run(folder, whole):
    flags = [*TINY, *LONG, "--run-dir", "killed"]
    process = start(folder, *flags)
    until((folder / "killed/checkpoint.npz").exists)  # the first half is done; now at any moment
    time.sleep(random.uniform(0, 4))
    process.kill()
    process.communicate()
    run(folder, "--run-dir", "killed", "--resume")
    assert_same_run(folder / "killed", folder / "whole")


def test_resume_of_a_run_killed_before_its_first_checkpoint(folder, whole):
    process = start(folder, *TINY, *LONG, "--run-dir", "early")
    until((folder / "early/args.json").exists)
    process.kill()
    process.communicate()
    run(folder, "--run-dir", "early", "--resume")
    assert_same_run(folder / "early", folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_with_a_checkpoint(folder, number):
    """Stopped between two evaluations and in the middle of a log interval, whose sums must survive."""
    flags = [*TINY, "--total-steps", "6000", "--log-interval", "2350", "--eval-interval", "0", "--eval-episodes", "0"]
    name = f"stopped{number}"
    process = start(folder, *flags, "--run-dir", name)
    shown = ""
    while not re.search(r" [1-9]\d*/6000", shown):  # it has compiled: what cannot be interrupted is over
        shown += process.stderr.read(20)
        assert process.poll() is None
    time.sleep(random.uniform(0, 1))
    process.send_signal(number)
    stopped = time.time()
    out, err = process.communicate()
    assert process.returncode == 128 + number and "--resume" in out and "Traceback" not in err
    assert time.time() - stopped < 5
    assert 0 < arrays(folder / name)["step"] < 6000
    run(folder, "--run-dir", name, "--resume")
    if not (folder / "unstopped").exists():
        run(folder, *flags, "--run-dir", "unstopped")
    assert_same_run(folder / name, folder / "unstopped", tables=["train.csv"])


def test_two_seeds_in_one_process_are_two_runs(folder, whole):
    """On one device and spread over two; up to rounding, which 60 updates make larger."""
    unevaluated = [*LONG[:-1], "0"]
    run(folder, *TINY, *LONG, "--num-seeds", 2, "--run-dir", "pair")
    run(folder, *TINY, *unevaluated, "--num-seeds", 2, "--run-dir", "spread",
        XLA_FLAGS="--xla_force_host_platform_device_count=2")
    run(folder, *TINY, *unevaluated, "--seed", 1, "--run-dir", "second")
    singles = [arrays(folder / name) for name in ("whole", "second")]
    for pair in (arrays(folder / "pair"), arrays(folder / "spread")):
        for name, x in pair.items():
            if name.startswith("."):  # the state, not the step
                for k in range(2):
                    np.testing.assert_allclose(x[k], singles[k][name][0], atol=2e-4, rtol=1e-2, err_msg=name)
    first, second = (single[".params['policy']['mlp'][0]['w']"] for single in singles)
    assert np.abs(first - second).max() > 0.1
    table = rows(folder / "pair/eval.csv")
    assert [(row["step"], row["seed"]) for row in table] == [("30", "0"), ("30", "1"), ("60", "0"), ("60", "1")]
    for row in rows(folder / "pair/train.csv"):
        singles = rows(folder / ("whole", "second")[int(row["seed"])] / "train.csv")
        single = next(single for single in singles if single["step"] == row["step"])
        np.testing.assert_allclose(float(row["critics_loss"]), float(single["critics_loss"]), rtol=1e-2)


def test_your_own_environment_and_data(folder):
    """An environment that asserts that no worker has imported JAX, beside the script; stopped and resumed in one go."""
    import toy_envs

    shutil.copy(toy_envs.__file__, folder)
    np.savez(folder / "own.npz", observations=np.zeros((40, 2)), actions=np.zeros((40, 1)), rewards=np.arange(40.0),
             terminals=np.arange(40) % 10 == 9)
    run(folder, *TINY, "--env-id", "toy_envs:Counting-v0", "--dataset-path", "own.npz", "--total-steps", 3,
        "--eval-episodes", 9, "--num-seeds", 2, "--run-dir", "own", "--capture-video")
    table = rows(folder / "own/eval.csv")
    expected = [np.mean([toy_envs.Counting.length(100_000 * seed + i) for i in range(9)]) for seed in range(2)]
    assert [row["length"] for row in table] == [f"{length:.6g}" for length in expected]
    assert [row["success"] for row in table] == ["0.333333", "0.333333"]
    assert len(list((folder / "own/videos").iterdir())) == 2
    assert sorted(path.name for path in (folder / "runs").glob("*")) == []


def test_eval_only_repeats_the_last_evaluation(folder, whole):
    before = {path: path.read_bytes() for path in whole[0].iterdir()}
    out, _ = run(folder, "--run-dir", "whole", "--eval-only")
    last = rows(whole[0] / "eval.csv")[-1]
    printed = json.loads(out.strip().splitlines()[-1])
    assert [f"{printed[key]:.6g}" for key in ("step", "seed", "success", "return", "length")] == [
        last[key] for key in ("step", "seed", "success", "return", "length")]
    assert {path: path.read_bytes() for path in whole[0].iterdir()} == before
    out, _ = run(folder, "--run-dir", "whole", "--eval-only", "--eval-episodes", 5)
    assert json.loads(out.strip().splitlines()[-1])["episodes"] == 5


def test_a_longer_total_goes_on(folder, whole):
    shutil.copytree(whole[0], folder / "longer")
    run(folder, "--run-dir", "longer", "--resume", "--total-steps", 80)
    assert [row["step"] for row in rows(folder / "longer/train.csv")] == ["20", "40", "60", "80"]
    assert [row["step"] for row in rows(folder / "longer/eval.csv")] == ["30", "60", "80"]


def test_non_finite_losses_stop_the_run(tmp_path, monkeypatch):
    """In update 57, after the checkpoint of update 40, which stays."""
    import toy_envs

    np.savez(tmp_path / "data.npz", **toy_envs.bandit_data(100))
    update = lps.update

    def spoilt(args, state, batch, key):
        state, metrics = update(args, state, batch, key)
        bad = state.opt_state[0].count == 57
        return state, metrics | dict(critics_loss=lps.jnp.where(bad, np.nan, metrics["critics_loss"]))

    monkeypatch.setattr(lps, "update", spoilt)
    args = lps.Args(env_id="toy_envs:Bandit-v0", dataset_path=tmp_path / "data.npz", horizon=1, total_steps=100,
                    eval_interval=40, eval_episodes=0, log_interval=20, actor_hidden_dims=(4,), critic_hidden_dims=(4,),
                    latent_actor_hidden_dims=(4,), run_dir=tmp_path / "run")
    with pytest.raises(SystemExit, match="critics_loss of seed 0 is nan in update 57"):
        lps.train(args)
    assert arrays(tmp_path / "run")["step"] == 40
    assert [row["step"] for row in rows(tmp_path / "run/train.csv")] == ["20", "40"]


def test_a_directory_serves_one_run_at_a_time(folder, whole):
    first = start(folder, *TINY, "--total-steps", "100000", "--eval-episodes", "0", "--run-dir", "shared")
    until((folder / "shared/args.json").exists)
    _, err = run(folder, "--run-dir", "shared", "--resume", code=1)
    first.kill()
    first.communicate()
    assert err == "error: another process is at work in shared\n"
