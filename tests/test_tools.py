"""benchmark/'s collect, sweep, bfloat16 and throughput, as their users start them."""

import re
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from subprocess import PIPE

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from helpers import finish, make_data, read_csv, until

import lps
from benchmark import ROOT, bfloat16, collect, sweep, throughput

EXPERIMENTS = sorted(path.stem for path in ROOT.glob("benchmark/experiments/*.toml"))


def start(tool, *flags):
    command = [sys.executable, "-m", f"benchmark.{tool}", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=PIPE, stderr=PIPE)


def test_collect_makes_the_same_data_with_any_number_of_workers_and_marks_them(tmp_path):
    name = "puzzle-3x3-noisy-v0"
    files = []
    for workers in (1, 2):
        args = collect.Args(name, num_episodes=workers, episode_length=20, num_workers=workers)
        args.dataset_dir = tmp_path / str(workers)
        files.append(np.load(collect.collect(args)))
    for key, x in files[0].items():
        np.testing.assert_array_equal(files[1][key][:21], x)
    own = lps.Args("puzzle-3x3-noisy-singletask-v0", str(args.dataset_dir), action_dim=5)
    data, record = lps.load_dataset(own, lps.make_env(own))
    assert np.flatnonzero(data["terminals"]).tolist() == [20, 41]
    assert record["COLLECTED HERE"]["num_episodes"] == 2
    with pytest.raises(SystemExit, match="--overwrite"):
        collect.collect(args)


def test_collect_never_writes_where_a_published_file_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = collect.Args("cube-single-play-v0", dataset_dir=tmp_path / ".ogbench/data")
    with pytest.raises(SystemExit, match="OGBench's own files"):
        collect.collect(args)
    assert collect.find_path(collect.Args("cube-single-play-v0")).parent.name == "collected"


def test_ctrl_c_leaves_no_half_file(tmp_path):
    flags = ["--num-workers", 1, "--episode-length", 50, "--dataset-dir", tmp_path]
    process = start("collect", "cube-single-play-v0", *flags)
    assert "0/1000" in process.stderr.read(60)
    process.send_signal(signal.SIGINT)
    assert finish(process, 1)[1].splitlines()[-1] == "stopped; no file was left unfinished"
    assert not list(tmp_path.iterdir())


def write_experiment(folder, steps, more=""):
    np.savez(folder / "data.npz", **make_data([9] * 10))
    (folder / "tiny.toml").write_text(f"""
        seeds = 1
        tasks = ["toy_envs:Counting-v0"]
        runs = [{{ script = "flow_bc", tau = [0.5] }}]
        [flags]
        dataset-path = "{folder}/data.npz"
        policy-hidden-dims = [8, 8]
        total-steps = {steps}
        log-interval = 100
        eval-episodes = 0
        {more}""")


def test_sweep_stops_goes_on_never_repeats_and_refuses_another_run(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    run_dir = tmp_path / "runs/tiny/toy_envs:Counting-v0/flow_bc_tau-0.5/seed0"
    sweep_tiny = partial(start, "sweep", tmp_path / "tiny.toml", "--out", tmp_path / "runs")
    write_experiment(tmp_path, 1_000_000)
    process = sweep_tiny()
    until((run_dir / "train.csv").exists)
    process.send_signal(signal.SIGINT)
    assert "1 interrupted\n" in finish(process, 1)[0]
    reached = int(read_csv(run_dir / "train.csv")[-1]["step"])
    assert 0 < reached < 1_000_000
    write_experiment(tmp_path, reached + 100)
    assert "1 done\n" in finish(sweep_tiny())[0]
    log = (run_dir.parent / "seed0.log").read_text()
    assert ["--resume" in x for x in re.findall(r"^\$ .*", log, re.M)] == [False, True]
    assert int(read_csv(run_dir / "train.csv")[-1]["step"]) == reached + 100
    assert "started" not in finish(sweep_tiny())[0]
    assert (run_dir.parent / "seed0.log").read_text() == log
    write_experiment(tmp_path, reached + 100, "batch-size = 8")
    assert "--batch-size was 256 and is 8" in finish(sweep_tiny(), 1)[1]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_made_of_flags_that_exist(name):
    runs = sweep.read_experiment(sweep.Args(name))
    assert len({run.run_dir for run in runs}) == len(runs)
    for run in {run.run_dir.parent.name: run for run in runs}.values():
        module = import_module(run.command[2])
        tyro.cli(module.Args, args=run.command[3:])  # would exit


def test_bfloat16_rounds_the_factors_and_nothing_else():
    x, y = np.random.default_rng(0).normal(size=(2, 40, 40)).astype(np.float32)
    how = dict(dimension_numbers=(((1,), (0,)), ((), ())), precision=None, out_sharding=None)
    z = jax.jit(partial(bfloat16.product, preferred_element_type=None, **how))(x, y)
    rounded = [np.asarray(jnp.bfloat16(factor), np.float64) for factor in (x, y)]
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, rounded[0] @ rounded[1], atol=1e-5)
    assert np.abs(z - x @ y).max() > 1e-3


def test_bfloat16_trains_nearly_alike_and_is_not_mixed_with_float32(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    write_experiment(tmp_path, 100)
    rows = []
    for is_rounded in (False, True):
        read = partial(sweep.Args, f"{tmp_path}/tiny.toml", tmp_path / str(is_rounded))
        [run] = sweep.read_experiment(read(bfloat16=is_rounded))
        subprocess.run(run.command, check=True, capture_output=True, cwd=ROOT)
        row = read_csv(run.run_dir / "train.csv")[0]
        rows.append([float(x) for name, x in row.items() if name != "updates_per_second"])
        [other] = sweep.read_experiment(read(bfloat16=not is_rounded))
        with pytest.raises(SystemExit, match=f"--bfloat16 was {is_rounded}"):
            other.check()
    assert rows[0] != rows[1]
    np.testing.assert_allclose(*rows, rtol=0.02)


def test_throughput_measures_a_run_and_the_cost_of_acting(tmp_path):
    sizes = dict(batch_size=8, updates=100, eval_episodes=0, calls=5)
    throughput.main(throughput.Args(("flow_bc",), out=tmp_path / "table.csv", **sizes))
    [row] = read_csv(tmp_path / "table.csv")
    assert row["networks for a chunk"] == "policy 10"
    assert float(row["99th percentile (us)"]) >= float(row["a policy call (us)"]) > 0
    assert min(float(row[name]) for name in ("updates/s", "start and end (s)", "memory (GB)")) > 0
