"""The command line: what a run leaves, and that stopping and resuming change nothing."""

import json
import os
import random
import shutil
import socket
import subprocess
import time
import zipfile
from signal import SIGINT, SIGKILL, SIGTERM

import helpers
import numpy as np
import pytest
import toy_envs
from helpers import COUNTING, TINY, as_flags, checkpoint, finish, load, read_csv, start, until

import lps
from benchmark import ROOT

OWN = TINY | dict(env_id=COUNTING, dataset_path="own.npz", log_interval=100)
SHORT = OWN | dict(total_steps=100, eval_episodes=0)
LONG = OWN | dict(total_steps=150, eval_interval=150, eval_episodes=2)


def alone(folder, name):
    """A folder that holds a copy of the script, toy_envs and a small dataset."""
    shutil.copy(ROOT / f"{name}.py", folder)
    shutil.copy(toy_envs.__file__, folder)
    np.savez(folder / "own.npz", **helpers.make_data([9, 9, 3, 30]))
    return folder


def begin(folder, name, settings, *flags, **environment):
    (folder / "is_played").unlink(missing_ok=True)  # left by toy_envs.Slow
    return start(folder, name, *as_flags(settings), *flags, **environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("alone"), "lps")


@pytest.fixture(scope="module")
def whole(folder):
    """A run of lps that nobody disturbs: its directory, and what it printed."""
    return folder / "whole", *finish(begin(folder, "lps", LONG | dict(run_dir="whole")))


def test_a_run_directory(whole):
    run_dir, out, err = whole
    names = {"args.json", "lps.py", "checkpoint.msgpack", "eval.csv", "train.csv"}
    assert {path.name for path in run_dir.iterdir()} == names
    assert (run_dir / "lps.py").read_bytes() == (ROOT / "lps.py").read_bytes()
    assert checkpoint(run_dir)["step"] == 200
    record = json.loads((run_dir / "args.json").read_text())
    told = dict(script="lps", dataset="own.npz", transitions=51, trajectories=4)
    versions = {"python", "jax", "ogbench", "mujoco", "device"}
    assert record.keys() == {*vars(lps.Args()), *told, *versions}
    told |= dict(total_steps=200, eval_interval=200, sparse=False, action_dim=1)
    assert told.items() <= record.items()
    train = read_csv(run_dir / "train.csv")
    assert [row["step"] for row in train] == ["100", "200"]
    assert all(np.isfinite(float(x)) for row in train for x in row.values())
    table = read_csv(run_dir / "eval.csv")
    assert ",".join(table[0]) == "step,seed,success,return,length,episodes,seconds"
    assert [row["step"] for row in table] == ["0", "200"]
    assert "rounded up to multiples" in out and "success=" in err
    assert "warn" not in (out + err).lower()


@pytest.mark.parametrize("name", ["dsrl", "qc_fql", "qc_mfql", "gfp", "ifql", "flow_bc"])
def test_a_script_alone_in_a_folder_on_data_that_were_collected(tmp_path, name):
    alone(tmp_path, name)
    told = dict(collected_by="benchmark/collect.py", dataset="cube-single-play-v0", seed=0)
    with zipfile.ZipFile(tmp_path / "own.npz", "a") as file:
        file.comment = json.dumps(told).encode()
    process = begin(tmp_path, name, SHORT, XLA_FLAGS="--xla_backend_optimization_level=0")
    assert "COLLECTED HERE" in finish(process)[0]
    [run_dir] = (tmp_path / "runs").iterdir()
    assert run_dir.name.startswith(f"{COUNTING}__{name}__0__")
    record = json.loads((run_dir / "args.json").read_text())
    assert record["script"] == name and record["COLLECTED HERE"] == told
    [row] = read_csv(run_dir / "train.csv")
    assert all(np.isfinite(float(x)) for x in row.values())


def test_a_tracked_run_goes_on_in_the_same_run_of_wandb(tmp_path):
    alone(tmp_path, "cfgrl")
    offline = dict(WANDB_MODE="offline")
    finish(begin(tmp_path, "cfgrl", SHORT | dict(run_dir="run"), "--track", **offline))
    finish(begin(tmp_path, "cfgrl", dict(run_dir="run", total_steps=200), "--resume", **offline))
    assert [row["step"] for row in read_csv(tmp_path / "run/train.csv")] == ["100", "200"]
    name = json.loads((tmp_path / "run/args.json").read_text())["wandb_id"]
    written = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert [path.name for path in written] == 2 * [f"run-{name}.wandb"]


def test_runs_that_start_together_have_directories_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({lps.prepare(lps.Args()).run_dir for _ in range(3)}) == 3


DOMAINS = [
    ("qc_fql", "cube-single", dict(alpha=30, sparse=False)),
    ("qc_mfql", "visual-scene", dict(alpha=1, sparse=True)),
    ("ifql", "puzzle-3x3", dict(expectile=0.95, sparse=True)),
    ("gfp", "cube-double", dict(alpha=1, eta=0.01, target="both", sparse=False)),
    ("gfp", "puzzle-4x4", dict(alpha=3, eta=1e-5, target="student", sparse=False)),
]


@pytest.mark.parametrize("name, domain, expected", DOMAINS)
def test_what_was_not_given_follows_the_domain(tmp_path, name, domain, expected):
    script = load(name)
    own = dict(run_dir=str(tmp_path), env_id=f"{domain}-play-singletask-task2-v0")
    for given in ({}, dict.fromkeys(expected, 0.5)):
        args = script.prepare(script.Args(**own | given))
        assert (expected | given).items() <= vars(args).items()


@pytest.mark.parametrize("number, seconds", [(SIGTERM, 0), (SIGINT, 1.5)])
def test_a_run_stopped_in_an_evaluation(folder, whole, number, seconds):
    """As a cluster and a terminal do it: its processes, playing or starting, are told as well."""
    name = number.name
    process = begin(folder, "lps", LONG | dict(run_dir=name, env_id="toy_envs:Slow-v0"))
    until((folder / f"{name}/checkpoint.msgpack" if seconds else folder / "is_played").exists)
    time.sleep(random.uniform(0, seconds))  # the checkpoint is written just before
    os.killpg(process.pid, number)
    out, err = finish(process, code=128 + number)
    assert f"--resume --run-dir {name}" in out and "Traceback" not in err
    assert checkpoint(folder / name)["step"] == 0
    assert not (folder / name / "eval.csv").exists()
    finish(begin(folder, "lps", dict(run_dir=name), "--resume"))
    helpers.assert_same_run(folder / name, whole[0])


@pytest.mark.parametrize("number, code, name", [(SIGINT, 130, "mf_bon"), (SIGKILL, -9, "mf_bc")])
def test_a_run_stopped_while_it_learns(tmp_path, number, code, name):
    """At some update after the first 1000. The run that nobody disturbs has 300 more."""
    alone(tmp_path, name)
    given = SHORT | dict(eval_interval=1000)  # it is a checkpoint's, too
    table = tmp_path / "stopped/train.csv"
    process = begin(tmp_path, name, given | dict(run_dir="stopped", total_steps=10**9))
    until(lambda: table.exists() and table.read_text().count("\n") > 15)
    process.send_signal(number)
    finish(process, code)
    step = checkpoint(tmp_path / "stopped")["step"]
    assert step >= 1000
    total = dict(total_steps=step + 300)
    finish(begin(tmp_path, name, dict(run_dir="stopped") | total, "--resume"))
    finish(begin(tmp_path, name, given | dict(run_dir="whole") | total))
    helpers.assert_same_run(tmp_path / "stopped", tmp_path / "whole", ["train.csv"])


def test_a_second_ctrl_c_ends_at_once(folder):
    """The first one, which `uv run` doubles, waits for what is under way: a step of 30 seconds."""
    process = begin(folder, "lps", LONG | dict(run_dir="stuck", env_id="toy_envs:Stuck-v0"))
    until((folder / "is_played").exists)
    process.send_signal(SIGINT)
    time.sleep(0.05)
    process.send_signal(SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.send_signal(SIGINT)
    assert process.wait(5) == 128 + SIGINT


def test_ctrl_c_ends_a_download_at_once(tmp_path):
    """From a server that does not answer."""
    server = socket.create_server(("127.0.0.1", 0))
    proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
    flags = ["--dataset-dir", "."]
    process = start(tmp_path, ROOT / "lps", *flags, http_proxy=proxy, https_proxy=proxy)
    server.accept()
    process.send_signal(SIGINT)
    assert process.wait(5) == -SIGINT and "Traceback" not in process.stderr.read()
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob("args.json"))


def test_eval_only_prints_one_line_of_json(folder, whole):
    """It is the run's last row, on however many cores, and null if success is not reported."""
    before = {path: path.read_bytes() for path in whole[0].iterdir()}
    given = dict(run_dir="whole", env_id="toy_envs:Silent-v0")
    process = begin(folder, "lps", given, "--eval-only")
    os.sched_setaffinity(process.pid, range(os.cpu_count()))
    out, _ = finish(process)
    assert out.count("\n") == 1
    printed = json.loads(out)
    assert printed.pop("success") is None
    last = read_csv(whole[0] / "eval.csv")[-1]
    for name in ("step", "seed", "return", "length", "episodes"):
        assert f"{printed[name]:.9g}" == last[name]
    assert {path: path.read_bytes() for path in whole[0].iterdir()} == before


def test_eval_only_that_is_stopped_reports_nothing(folder, whole):
    given = dict(run_dir="whole", eval_episodes=50, env_id="toy_envs:Slow-v0")
    process = begin(folder, "lps", given, "--eval-only")
    until((folder / "is_played").exists)
    os.killpg(process.pid, SIGTERM)
    out, err = finish(process, code=143)
    assert out == "" and "Traceback" not in err
