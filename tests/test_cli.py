"""The command line from end to end: what a run writes, that stopping and resuming change nothing, many seeds."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy_envs
from carry import ROOT, SCRIPTS
from helpers import (
    COUNTING,
    TINY,
    as_flags,
    assert_same_run,
    assert_same_tree,
    checkpoint,
    finish,
    make_data,
    read_csv,
    start,
    until,
)

import lps

SMALL = [*as_flags(TINY), "--latent-actor-hidden-dims", "8"]
LONG = ["--total-steps", "60", "--log-interval", "20", "--eval-interval", "30", "--eval-episodes", "2"]
OWN = ["--env-id", COUNTING, "--dataset-path", "own.npz"]


def alone(folder, name):
    """A folder that holds a copy of the script, toy_envs and a small dataset."""
    shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(toy_envs.__file__, folder)
    np.savez(folder / "own.npz", **make_data([9, 9, 3, 30]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("alone"), "lps")


def begin(folder, run_dir, *flags, **environment):
    return start(folder, "lps", *OWN, *SMALL, *flags, "--run-dir", run_dir, **environment)


def again(folder, run_dir, *flags):
    return finish(start(folder, "lps", "--run-dir", run_dir, *flags))


@pytest.fixture(scope="module")
def whole(folder):
    """An uninterrupted run of lps: its directory, and what it printed."""
    return folder / "whole", *finish(begin(folder, "whole", *LONG))


# ---------------------------------------------------------------------------------------------------- what a run writes


def test_run_directory(whole):
    run_dir, out, err = whole
    assert {path.name for path in run_dir.iterdir()} == {"args.json", "checkpoint.msgpack", "eval.csv", "train.csv"}
    record = json.loads((run_dir / "args.json").read_text())
    assert vars(lps.Args()).keys() <= record.keys() and {"jax", "ogbench", "mujoco", "device"} <= record.keys()
    assert record["script"] == "lps" and record["sparse"] is False and record["total_steps"] == 60
    assert (record["dataset"], record["transitions"], record["trajectories"]) == ("own.npz", 51, 4)
    train, evaluations = read_csv(run_dir / "train.csv"), read_csv(run_dir / "eval.csv")
    assert [row["step"] for row in train] == ["20", "40", "60"]
    assert {"step", "seed", "updates_per_second", "policy_loss", "critic_loss", "latent_actor_loss"} <= train[0].keys()
    assert all(np.isfinite(float(x)) for row in train for x in row.values())
    assert list(evaluations[0]) == ["step", "seed", "success", "return", "length", "episodes", "seconds"]
    assert [(row["step"], row["seed"], row["episodes"]) for row in evaluations] == [("30", "0", "2"), ("60", "0", "2")]
    assert checkpoint(run_dir)["step"] == 60
    for fact in (COUNTING, "sparse False", "transitions: 51", "trajectories: 4", "cpu"):
        assert fact in out
    assert "60/60" in err and "updates/s" in err and "success=" in err and "warn" not in (out + err).lower()


def test_train_csv_holds_means_over_the_log_interval(folder, whole):
    """Rows of 20 updates are the means of rows of 10. The run makes a directory of its own, and has no evaluation."""
    finish(start(folder, "lps", *OWN, *SMALL, *LONG, "--log-interval", "10", "--eval-episodes", "0"))
    [run_dir] = (folder / "runs").iterdir()
    assert run_dir.name.startswith(f"{COUNTING}__lps__0__") and not (run_dir / "eval.csv").exists()
    fine = read_csv(run_dir / "train.csv")
    for i, row in enumerate(read_csv(whole[0] / "train.csv")):
        for name in row.keys() - {"step", "seed", "updates_per_second"}:
            mean = np.mean([float(fine[2 * i + j][name]) for j in range(2)])
            np.testing.assert_allclose(float(row[name]), mean, rtol=1e-4, atol=1e-5, err_msg=name)


def test_nothing_happens_on_import(folder):
    """No handlers of signals, no environment variables, no devices, no files."""
    code = ("import os, signal; handlers = [signal.getsignal(2), signal.getsignal(15)];"
            "import lps; assert [signal.getsignal(2), signal.getsignal(15)] == handlers;"
            "from jax._src import xla_bridge; assert not xla_bridge._backends; assert 'MUJOCO_GL' not in os.environ")
    environment = {key: x for key, x in os.environ.items() if key != "MUJOCO_GL"}
    listing = sorted(folder.rglob("*"))
    subprocess.run([sys.executable, "-B", "-c", code], cwd=folder, check=True, env=environment)
    assert sorted(folder.rglob("*")) == listing


def test_each_script_alone_in_a_folder(tmp_path):
    """As their commands run them, but one after the other in one process, which imports JAX once."""
    flags = [*OWN, *as_flags(TINY), "--total-steps", "2", "--eval-episodes", "0", "--run-dir", "run"]
    lines = ["import os, runpy, sys"]
    for name in SCRIPTS:
        (tmp_path / name).mkdir()
        alone(tmp_path / name, name)
        lines += [f"os.chdir({str(tmp_path / name)!r})", f"sys.argv = {[f'{name}.py', *flags]}",
                  f"sys.path[0] = {str(tmp_path / name)!r}", f"runpy.run_path('{name}.py', run_name='__main__')"]
    (tmp_path / "all.py").write_text("\n".join(lines))
    finish(start(tmp_path, "all", XLA_FLAGS="--xla_backend_optimization_level=0"))
    for name in SCRIPTS:
        record = json.loads((tmp_path / name / "run/args.json").read_text())
        assert record["script"] == name and checkpoint(tmp_path / name / "run")["step"] == 2
        [row] = read_csv(tmp_path / name / "run/train.csv")
        assert row["step"] == "2" and all(np.isfinite(float(x)) for x in row.values())


# ------------------------------------------------------------------------------------------------ stopping and resuming


def test_resume_after_sigkill_is_the_same_run(folder, whole):
    process = begin(folder, "killed", *LONG)
    until((folder / "killed/checkpoint.msgpack").exists)  # half of it is done: at some moment after this
    time.sleep(random.uniform(0, 4))
    process.kill()
    process.communicate()
    again(folder, "killed", "--resume")
    assert_same_run(folder / "killed", whole[0])


def test_resume_of_a_run_killed_before_its_first_checkpoint(folder, whole):
    process = begin(folder, "early", *LONG)
    until((folder / "early/args.json").exists)
    process.kill()
    process.communicate()
    assert not (folder / "early/checkpoint.msgpack").exists()
    again(folder, "early", "--resume", "--eval-episodes", "0")
    assert_same_run(folder / "early", whole[0], ["train.csv"])


def test_sigterm_ends_a_run_with_a_checkpoint(folder):
    """In the middle of a log interval, whose means must survive, and with no checkpoint before."""
    flags = ["--total-steps", "12000", "--log-interval", "10000", "--eval-interval", "0", "--eval-episodes", "0"]
    process, shown = begin(folder, "stopped", *flags), ""
    while not re.search(r" [1-9]\d*/12000", shown):  # it has compiled
        shown += process.stderr.read(20)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, err = finish(process, code=143)
    assert "--resume" in out and "Traceback" not in err
    assert 0 < checkpoint(folder / "stopped")["step"] < 12000
    again(folder, "stopped", "--resume")
    finish(begin(folder, "unstopped", *flags))
    assert_same_run(folder / "stopped", folder / "unstopped", ["train.csv"])


def test_ctrl_c_at_the_start_of_an_evaluation_is_not_lost(folder, whole):
    """The checkpoint is written just before it. A terminal gives Ctrl-C to the evaluation's processes as well."""
    process = begin(folder, "evaluated", *LONG)
    until((folder / "evaluated/checkpoint.msgpack").exists)
    time.sleep(random.uniform(0, 1))
    os.killpg(process.pid, signal.SIGINT)
    _, err = finish(process, code=130)
    assert "Traceback" not in err and checkpoint(folder / "evaluated")["step"] == 30
    assert not (folder / "evaluated/eval.csv").exists()
    again(folder, "evaluated", "--resume")
    assert_same_run(folder / "evaluated", whole[0])


def test_a_longer_total_goes_on(folder, whole):
    shutil.copytree(whole[0], folder / "longer")
    again(folder, "longer", "--resume", "--total-steps", "80", "--log-interval", "10", "--eval-episodes", "0")
    assert [row["step"] for row in read_csv(folder / "longer/train.csv")] == ["20", "40", "60", "70", "80"]
    assert [row["step"] for row in read_csv(folder / "longer/eval.csv")] == ["30", "60"]
    assert checkpoint(folder / "longer")["step"] == 80


def test_eval_only_repeats_the_last_evaluation(folder, whole):
    before = {path: path.read_bytes() for path in whole[0].iterdir()}
    out, _ = again(folder, "whole", "--eval-only")
    printed, last = eval(out.splitlines()[-1], {"nan": np.nan}), read_csv(whole[0] / "eval.csv")[-1]
    for name in ("success", "return", "length", "episodes"):
        np.testing.assert_allclose(printed[name], float(last[name]), rtol=1e-5)
    assert {path: path.read_bytes() for path in whole[0].iterdir()} == before


# ----------------------------------------------------------------------------------------------------------- many seeds


@pytest.fixture(scope="module")
def pair(folder):
    """Two seeds in one process, one after the other, with films."""
    finish(begin(folder, "pair", *LONG, "--num-seeds", "2", "--eval-interval", "0", "--capture-video"))
    return folder / "pair"


def test_films(pair):
    films = sorted(path.name for path in (pair / "videos").glob("*.mp4"))
    assert len(films) == 2 and films[0].startswith("step60_seed0") and films[1].startswith("step60_seed1")


def test_seeds_in_one_process_are_runs_of_their_own(folder, whole, pair):
    """One after the other on a CPU, or spread over two devices; up to rounding, which 60 updates make larger."""
    finish(begin(folder, "spread", *LONG, "--num-seeds", "2", "--eval-episodes", "0",
                 XLA_FLAGS="--xla_force_host_platform_device_count=2"))
    finish(begin(folder, "second", *LONG, "--seed", "1", "--eval-episodes", "0"))
    singles = [checkpoint(folder / name)["states"] for name in ("whole", "second")]
    for states in (checkpoint(folder / name)["states"] for name in ("pair", "spread")):
        for k, single in enumerate(singles):
            for x, y in zip(jax.tree.leaves(states), jax.tree.leaves(single), strict=True):
                np.testing.assert_allclose(x[k], y[0], atol=2e-4, rtol=1e-2)
    first, second = (single["policy"]["params"]["params"]["Dense_0"]["kernel"] for single in singles)
    assert np.abs(first - second).max() > 0.1
    table = [(row["step"], row["seed"]) for row in read_csv(pair / "eval.csv")]
    assert table == [("60", "0"), ("60", "1")]
    for row in read_csv(pair / "train.csv"):
        single = read_csv(folder / ("whole", "second")[int(row["seed"])] / "train.csv")
        [same] = [other for other in single if other["step"] == row["step"]]
        np.testing.assert_allclose(float(row["critic_loss"]), float(same["critic_loss"]), rtol=1e-2)


def test_a_mapped_dataset_makes_the_same_run(folder, pair):
    """The folder into which an .npz was unzipped: its observations stay on the disk."""
    shutil.unpack_archive(folder / "own.npz", folder / "own", "zip")
    finish(begin(folder, "mapped", *LONG, "--eval-episodes", "0", "--num-seeds", "2", "--dataset-path", "own"))
    assert_same_tree(checkpoint(folder / "mapped")["states"], checkpoint(pair)["states"])
