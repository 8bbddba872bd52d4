"""benchmark/sweep.py as its users run it, on experiments of tiny runs on a toy environment."""

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import toy_envs
from test_cli import until
from test_scripts import own_data

from benchmark import sweep

TOY = """
seeds = {seeds}
tasks = {tasks}
runs = [{{ {run} }}]

[flags]
dataset-path = "own.npz"
actor-hidden-dims = [8, 8]
batch-size = 16
horizon = 2
total-steps = {steps}
log-interval = 50
eval-interval = 100
eval-episodes = {episodes}
"""


@pytest.fixture
def folder(tmp_path_factory, tmp_path, monkeypatch):
    """Where everything happens; compiled code is kept for all the tests of this file."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(toy_envs.__file__, tmp_path)
    own_data(tmp_path / "own.npz")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return tmp_path


def write(folder, run, tasks=("toy_envs:Counting-v0",), seeds=1, steps=300, episodes=0):
    text = TOY.format(run=run, tasks=json.dumps(tasks), seeds=seeds, steps=steps, episodes=episodes)
    (folder / "toy.toml").write_text(text)


def start(*flags, **how):
    return subprocess.Popen([sys.executable, sweep.__file__, "toy.toml", *flags], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **how)


def run(*flags, code=0, **how):
    process = start(*flags, **how)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out, err


def at_work(folder):
    """The processes of this folder's runs, {id: command line}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if path.joinpath("cwd").readlink() == folder and b"--run-dir" in (path / "cmdline").read_bytes():
                found[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            pass
    return found


@contextmanager
def closing_fd(path):
    file = os.open(path, os.O_RDONLY)
    yield file
    os.close(file)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_resumes_after_a_kill_and_never_repeats(folder):
    """Killed with its run at a random moment after the first of three."""
    write(folder, 'script = "flow_bc"', seeds=3, steps=400, episodes=1)
    runs = folder / "runs/toy/toy_envs:Counting-v0/flow_bc"
    process = start("--jobs", "1")
    until(lambda: "done=1" in process.stderr.read(40))
    until((runs / "seed1.log").exists)
    time.sleep(random.uniform(0, 6))
    process.kill()
    for number in at_work(folder):
        os.kill(number, signal.SIGKILL)
    process.communicate()
    until(lambda: not at_work(folder))
    first, states = contents(runs / "seed0"), [line.split()[0] for line in run("--dry-run")[0].splitlines()[:3]]
    assert states[0] == "done" and {*states} <= {"done", "interrupted", "missing"}
    out, err = run()
    assert "3 done, 0 failed" in out and "1200/1200" in err
    assert contents(runs / "seed0") == first
    for i in range(3):
        assert (runs / f"seed{i}.log").read_text().count("--resume") == (states[i] == "interrupted")
    everything = contents(folder / "runs")
    assert "3 done, 0 failed" in run()[0] and contents(folder / "runs") == everything


def test_a_failing_run_is_reported_and_stops_no_other(folder):
    """Two seeds in a process, and the environment that fails comes first."""
    write(folder, 'script = "flow_bc"', seeds=2, tasks=["toy_envs:Discrete-v0", "toy_envs:Counting-v0"])
    out, err = run("--jobs", "1", "--seeds-per-process", "2", code=1)
    assert "1 done, 1 failed" in out and err.endswith(
        "error: 1 of 2 runs are not done: the same command tries them again\n")
    assert "failed with exit code 1: runs/toy/toy_envs:Discrete-v0/flow_bc/seed0; the end of" in err
    assert "    error: toy_envs:Discrete-v0: " in err
    rows = sweep.read_rows(folder / "runs/toy/toy_envs:Counting-v0/flow_bc/seed0/train.csv")
    assert rows[-2:] == [(300, 0), (300, 1)]
    _, err = run(code=1)  # one seed a process now
    assert "seed0 holds another run: num_seeds was 2 and is 1: move it away" in err


def test_a_disk_that_is_full(folder):
    """Files can grow to 2048 bytes, no further: enough for args.json and a log, not for a checkpoint."""
    write(folder, 'script = "flow_bc"', seeds=2, steps=100)
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    _, err = run(code=1, preexec_fn=full)
    assert err.count("failed with exit code 1") == err.count("checkpoint.npz'; --resume goes on") == 2
    assert not list(folder.rglob("*.partial")) and not at_work(folder)
    assert "2 done, 0 failed" in run()[0]
    nothing = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    _, err = run("--out", "other", code=1, preexec_fn=nothing)  # not even for a log
    assert err.splitlines()[-1] == "error: [Errno 27] File too large"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_leave_no_orphan(folder, number):
    """However it ends, its runs end, and unless it was killed they save."""
    write(folder, 'script = "flow_bc"', steps=1_000_000)
    process = start()
    saved = folder / "runs/toy/toy_envs:Counting-v0/flow_bc/seed0/checkpoint.npz"
    until(saved.exists)
    stamp = saved.stat().st_mtime_ns
    process.send_signal(number)
    out, err = process.communicate()
    if number == signal.SIGKILL:  # the kernel tells the runs, once for each thread that the sweep had
        until(lambda: not at_work(folder))
    else:
        assert process.returncode == 128 + number and not at_work(folder)
        assert err.endswith("stopped, 0 of 1 runs are done: the same command goes on\n") and "failed with" not in err
        assert saved.stat().st_mtime_ns > stamp
        assert "stopped after update" in saved.parent.with_name("seed0.log").read_text()
    assert run("--dry-run")[0].startswith("interrupted ")


def test_states(folder, monkeypatch):
    write(folder, 'script = "lps", alpha = 3', seeds=2, steps=100, episodes=1)
    _, [cell] = sweep.read_experiment(sweep.Args("toy.toml", seeds_per_process=2))
    assert sweep.state(cell) == "missing" and sweep.updates(cell) == 0
    cell.run_dir.mkdir(parents=True)
    assert sweep.state(cell) == "missing"  # killed before args.json was written
    record = folder / cell.run_dir / "args.json"
    record.write_text(json.dumps(dict(alpha=3.0, actor_hidden_dims=[8, 8], batch_size=16, horizon=2, num_seeds=2)))
    sweep.check_record(cell)
    assert sweep.state(cell) == "interrupted"
    for path in (cell.run_dir, cell.log):  # held by a script; by what has yet to become one
        path.exists() or path.touch()
        with closing_fd(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert sweep.state(cell) == "busy"
            with pytest.raises(SystemExit, match="error: 1 of 1 runs are not done"):
                sweep.main(sweep.Args("toy.toml", seeds_per_process=2))
    (cell.run_dir / "train.csv").write_text("step,seed,x\n50,0,1\n50,1,1\n100,0,1\n100,1,1\n")
    (cell.run_dir / "eval.csv").write_text("step,seed,x\n50,0,1\n50,1,1\n100,0,1\n")
    assert sweep.updates(cell) == 200 and sweep.state(cell) == "interrupted"
    (cell.run_dir / "eval.csv").write_text("step,seed,x\n100,0,1\n100,1,1\n")
    assert sweep.state(cell) == "done"
    cell.evaluates = False
    assert sweep.state(cell) == "interrupted"  # there is no checkpoint after the last row
    for step, how in ((50, "interrupted"), (100, "done")):
        np.savez(cell.run_dir / "checkpoint.npz", step=step)
        assert sweep.state(cell) == how
    whole = (cell.run_dir / "train.csv").read_text()
    for torn in ("step,seed,x\n50\n", "step,seed,x\n50,a,1\n"):
        (cell.run_dir / "train.csv").write_text(torn)
        with pytest.raises(SystemExit, match="error: .*train.csv is no table of a run"):
            sweep.main(sweep.Args("toy.toml", seeds_per_process=2, dry_run=True))
    (cell.run_dir / "train.csv").write_text(whole)
    (cell.run_dir / "checkpoint.npz").write_bytes(b"torn")
    assert sweep.state(cell) == "interrupted"
    np.savez(cell.run_dir / "checkpoint.npz", step=100)
    record.write_text(record.read_text().replace("3.0", "1.0"))
    with pytest.raises(SystemExit, match="error: .*seed0 holds another run: alpha was 1.0 and is 3.0: move it away"):
        sweep.check_record(cell)
    for torn in ("", "[]"):
        record.write_text(torn)
        with pytest.raises(SystemExit, match="error: cannot read .*args.json"):
            sweep.check_record(cell)


SIZES = {"state": 1400, "visual": 1400, "ablations": 1000, "alpha": 288, "scaled-down": 42, "scaled-down-ablations": 5,
         "scaled-down-alpha": 18, "comparison": 12}


def test_every_experiment_has_a_size():
    assert {path.stem for path in sweep.EXPERIMENTS.glob("*.toml")} == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_experiments(name):
    """Every run is one of a real task, with flags that its script has."""
    stem, cells = sweep.read_experiment(sweep.Args(name))
    assert stem == name and len(cells) == len({cell.run_dir for cell in cells}) == SIZES[name]
    visual = name == "visual"
    for cell in cells:
        script = import_module(cell.script)
        flags = [flag[2:].replace("-", "_") for flag in cell.flags if flag.startswith("--")]
        assert len(flags) == len({*flags}) and {*flags} <= {field.name for field in fields(script.Args)}
        assert script.OGBENCH_ID.fullmatch(cell.run_dir.parts[2]) and cell.run_dir.parts[2] in cell.flags
        short = 25_000 if "scaled" in name else 60_000 if name == "comparison" else None
        assert cell.steps == (short or (500_000 if visual else 1_000_000)) and cell.evaluates
        assert visual == cell.run_dir.parts[2].startswith("visual-")
    _, packed = sweep.read_experiment(sweep.Args(name, seeds_per_process=8))
    assert sum(len(cell.seeds) for cell in packed) == len(cells)


GOOD = 'seeds = 1\ntasks = ["a"]\nruns = [{ script = "lps" }]\n[flags]\n'
BAD = {
    "torn": (GOOD[:30], "cannot read toy.toml"),
    "no TOML": ("\\", "cannot read toy.toml"),
    "another key": ("task = 3\n" + GOOD, "must hold seeds"),
    "no seeds": (GOOD.replace("1", "0"), "must hold seeds"),
    "an empty list": (GOOD.replace('"lps"', '"lps", gamma = []'), "toy.toml makes no run"),
    "no runs": (GOOD.replace('{ script = "lps" }', ""), "must hold seeds"),
    "unknown script": (GOOD.replace("lps", "lbs"), "one of cfgrl, dsrl, flow_bc, lps, qc_fql, qc_mfql"),
    "no script": (GOOD.replace("script", "name"), "a run needs a script"),
    "unknown flag": (GOOD + "learning-rates = 1", "--learning-rates is no flag of lps.py, .*near: learning-rate"),
    "the flag of another": (GOOD + "expectile = 0.9", "--expectile is no flag of lps.py"),
    "our own flag": (GOOD + "seed = 3", "--seed is no flag of lps.py, or the sweep's own to set"),
    "not a number": (GOOD + 'gamma = "x"', "lps.py refuses --gamma x"),
    "out of range": (GOOD + "gamma = 1.5", "lps.py refuses --gamma 1.5"),
    "twice": (GOOD.replace("}]", '}, { script = "lps" }]'), "two runs are lps"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_told_in_one_line(folder, case):
    content, message = BAD[case]
    (folder / "toy.toml").write_text(content)
    with pytest.raises(SystemExit, match=message) as error:
        sweep.main(sweep.Args("toy.toml", dry_run=True))
    assert str(error.value).startswith("error: ") and "\n" not in str(error.value)


def test_mistakes_on_the_command_line(folder):
    for args, message in ((sweep.Args("alhpa"), "no experiment alhpa: .*ablations, alpha"),
                          (sweep.Args("alpha", jobs=0), "--jobs must be at least 1, got 0"),
                          (sweep.Args("alpha", slurm=True, slurm_timeout_min=1), "--slurm-timeout-min must be")):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            sweep.main(args)
    write(folder, 'script = "lps"')
    (folder / "file").touch()
    assert run("--out", "file", code=1)[1].splitlines()[-1].startswith("error: ")
