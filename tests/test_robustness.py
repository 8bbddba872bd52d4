"""What a user can get wrong, and what a machine can do to a run. See also campaign.py, which kills runs."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_cli import arrays, assert_same_run, rows, until
from test_dataset import make_data
from test_scripts import TINY, as_flags

import lps

ID = "toy_envs:Counting-v0"  # two numbers observed, one action


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """own.npz and runs of three scripts on it."""
    folder = tmp_path_factory.mktemp("own")
    np.savez(folder / "own.npz", **make_data([9, 9, 3, 30]))
    for name in ("lps", "dsrl", "flow_bc"):
        script = import_module(name)
        script.train(script.Args(env_id=ID, dataset_path=folder / "own.npz", total_steps=2, eval_episodes=0,
                                 run_dir=folder / name, **TINY))
    return folder


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def complaint(monkeypatch, folder, flags, name="lps"):
    """The one line with which the command ends; nothing that was there before may have changed, nothing been added."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = content(folder)
    try:
        with pytest.raises(SystemExit) as error:
            import_module(name).main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    message = error.value.code  # a text: Python prints it to stderr and exits with 1
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    assert content(folder) == before and not list(folder.glob("runs/*"))
    return message


FLAGS = {
    "--horizon 9223372036854775807": "--horizon 9223372036854775807 is out of range",
    "--batch-size 100000000000": "--batch-size 100000000000 is out of range",
    "--env-id toy_envs:Half-v0": "actions must be bounded",
    "--gamma 1.5": "--gamma 1.5", "--gamma 0": "--gamma 0", "--tau 2": "--tau 2",
    "--learning-rate 0": "--learning-rate 0",
    "--batch-size 0": "--batch-size 0", "--horizon 0": "--horizon 0", "--horizon 31": "as a chunk, --horizon 31",
    "--num-seeds -1": "--num-seeds -1", "--seed -1": "--seed -1", "--total-steps 0": "--total-steps 0",
    "--log-interval -5": "--log-interval -5", "--eval-interval -1": "--eval-interval -1",
    "--eval-episodes -1": "--eval-episodes -1", "--actor-hidden-dims 16 0": "--actor-hidden-dims",
    "--env-id cube-single-play-singletask-task9-v0": "near: cube-single-play-singletask-task",
    "--env-id cube-singel-play-singletask-v0": "near: cube-single-play-singletask-v0",
    "--env-id no_module:No-v0": "cannot make the environment no_module:No-v0",
    "--env-id toy_envs:Invisible-v0 --capture-video": "Invisible-v0 cannot render: render() returns nothing",
    "--dataset-path ~nobody_here/own.npz": "~nobody_here/own.npz",
    "--env-id toy_envs:Discrete-v0": "actions a flat box, but one is Discrete(3)",
    "--env-id toy_envs:Keyed-v0": "observations must be a flat box or uint8 images",
    "--env-id toy_envs:Unbounded-v0": "actions must be bounded",
    "--env-id toy_envs:Bandit-v0": "own.npz: observations must be numbers (55, 4), but are float64 (55, 2)",
    "--dataset-path none.npz": "none.npz", "--run-dir lps": "lps holds a run: --resume it, or choose another --run-dir",
    "--run-dir own.npz": "cannot write to own.npz", "--run-dir /proc/no": "cannot write to /proc/no",
    "--resume": "need the --run-dir", "--eval-only": "need the --run-dir",
    "--resume --run-dir nowhere": "nowhere holds no run",
    "--resume --run-dir dsrl": "algorithm was dsrl and is lps",
    "--resume --run-dir lps --gamma 0.5 --seed 3": "seed was 0 and is 3; gamma was 0.99 and is 0.5",
    "--resume --run-dir lps --env-id toy_envs:Silent-v0": f"env_id was {ID} and is toy_envs:Silent-v0",
    "--resume --run-dir lps --actor-hidden-dims 9 9": "actor_hidden_dims was [8, 8] and is [9, 9]",
    "--resume --run-dir lps --total-steps 1": "is of update 2, beyond --total-steps 1",
    "--eval-only --run-dir lps --eval-episodes 0": "--eval-only needs --eval-episodes",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(folder, monkeypatch, flags):
    again = "--resume" in flags or "--eval-only" in flags
    start = [] if again else ["--env-id", ID, "--dataset-path", "own.npz", "--run-dir", "new"]
    given = flags.split()
    for flag in {"--env-id", "--dataset-path", "--run-dir"} & {*given, *(["--run-dir"] if "resume" in flags else [])}:
        at = start.index(flag) if flag in start else None
        if at is not None:
            del start[at : at + 2]
    assert FLAGS[flags] in complaint(monkeypatch, folder, [*start, *given])


def change(**arrays):
    return lambda data: data.update(arrays)


def put(key, where, value):
    return lambda data: data[key].__setitem__(where, value)


DATA = {  # of 14 rows
    "has no observations": lambda data: data.pop("observations"),
    "has no actions": lambda data: data.pop("actions"),
    "has no rewards": lambda data: data.pop("rewards"),
    "has no terminals": lambda data: data.pop("terminals"),
    "rewards must be numbers (14,), but are float64 (13,)": change(rewards=np.zeros(13)),
    "masks must be numbers (14,)": change(masks=np.zeros((14, 1))),
    "observations must be numbers (14, 2), but are float64 (14, 1)": change(observations=np.zeros((14, 1))),
    "observations must be numbers (14, 2), but are <U1": change(observations=np.full((14, 2), "x")),
    "actions must be numbers (14, 1), but are float64 (14, 2)": change(actions=np.zeros((14, 2))),
    "actions must be numbers (14, 1), but are complex128": change(actions=np.zeros((14, 1), complex)),
    "terminals must be numbers": change(terminals=np.full(14, "x")),
    "observations must be stored in C order": change(observations=np.zeros((2, 14)).T),
    "observations hold NaN": put("observations", (3, 1), np.nan),
    "bad.npz: observations hold NaN": put("observations", (3, 1), 1e300),
    "actions hold NaN": put("actions", (3, 0), np.nan),
    "rewards hold NaN": put("rewards", 2, np.inf),
    "masks hold NaN": put("masks", 2, np.nan),
    "terminals hold NaN": put("terminals", 2, np.nan),
    "actions must lie in [-1, 1], but reach 1.5": put("actions", 0, 1.5),
    "terminals must be 1 in the last row": put("terminals", -1, 0),
    "no trajectory is as long as a chunk": change(terminals=np.ones(14)),
    "cannot read the dataset": change(actions=np.array([object()] * 14)),  # nothing is unpickled
    "observations must be numbers (14, 2), but are object": change(observations=np.array([[object()] * 2] * 14)),
}


@pytest.mark.parametrize("kind", DATA)
def test_bad_data(tmp_path, monkeypatch, kind):
    data = make_data([6, 6])
    DATA[kind](data)
    np.savez(tmp_path / "bad.npz", **data)
    message = complaint(monkeypatch, tmp_path, ["--env-id", ID, "--dataset-path", "bad.npz", *as_flags(TINY)])
    assert kind in message and "bad.npz" in message


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "flipped", "text"])
def test_damaged_datasets(tmp_path, monkeypatch, damage):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **make_data([600, 60]))
    whole = path.read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    contents = {"empty": b"", "cut off": whole[:-100], "flipped": flipped, "text": b"no archive"}
    path.unlink() if damage == "missing" else path.write_bytes(contents[damage])
    message = complaint(monkeypatch, tmp_path, ["--env-id", ID, "--dataset-path", "bad.npz", *as_flags(TINY)])
    assert "cannot read the dataset bad.npz" in message


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "flipped", "another network", "another run"])
@pytest.mark.parametrize("flags", [["--eval-only"], ["--resume", "--total-steps", "9"]])
def test_damaged_checkpoints(folder, tmp_path, monkeypatch, damage, flags):
    shutil.copytree(folder / "lps", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
    if damage == "missing":
        if "--resume" in flags:
            return  # a run that was ended before its first checkpoint starts again
        path.unlink()
    elif damage == "another run":  # of another environment, of the same sizes
        np.savez(path, **arrays(folder / "lps") | dict(run="lps on toy_envs:Silent-v0, seed 0"))
    elif damage == "another network":
        np.savez(path, **arrays(folder / "lps") | {".params['policy']['mlp'][0]['w']": np.zeros((1, 2, 2))})
    else:
        path.write_bytes({"empty": b"", "cut off": whole[:-100], "flipped": flipped}[damage])
    given = [*flags, "--eval-episodes", "1", "--run-dir", str(tmp_path)]
    assert "checkpoint.npz" in complaint(monkeypatch, tmp_path, given)


@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
@pytest.mark.parametrize("table", [b"", b"step,seed\n\n", b"step,seed\nt,0\n", b"step,seed\n2,\xff\n"])
def test_damaged_tables(folder, tmp_path, monkeypatch, name, table):
    shutil.copytree(folder / "lps", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(table)
    message = complaint(monkeypatch, tmp_path, ["--resume", "--total-steps", "9", "--run-dir", "."])
    assert message.startswith(f"error: {name} is no table of a run")


@pytest.mark.parametrize("record", ["", "{}", "[]", "null", '{"algorithm": "lps", "dataset": {}}'])
def test_damaged_records(folder, tmp_path, monkeypatch, record):
    (tmp_path / "args.json").write_text(record)
    message = complaint(monkeypatch, tmp_path, ["--resume", "--run-dir", "."])
    assert message.startswith("error: . holds no run that can be read")


@pytest.mark.parametrize("name", ["train.csv", "eval.csv", "checkpoint.npz"])
def test_files_of_another_run_are_left_alone(folder, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("precious")
    flags = ["--env-id", ID, "--dataset-path", str(folder / "own.npz"), "--run-dir", "."]
    assert complaint(monkeypatch, tmp_path, flags).startswith("error: . holds a run")


def test_an_empty_folder_stays(tmp_path, monkeypatch):
    complaint(monkeypatch, tmp_path, ["--env-id", ID, "--dataset-path", "none.npz", "--run-dir", "."])
    assert tmp_path.exists()


def test_the_second_of_two_that_start_together_leaves_the_first_alone(folder, tmp_path):
    """The first one has not written anything yet."""
    args = lps.Args(env_id=ID, dataset_path=folder / "own.npz", run_dir=tmp_path / "run")
    with lps.open_run(args):
        with pytest.raises(SystemExit, match="error: another process is at work"):
            lps.train(args)
        assert args.run_dir.exists()
    assert not args.run_dir.exists()


def test_drafts_of_the_dead_are_removed_and_of_the_living_are_not(tmp_path):
    dead, living = (tmp_path / f".x.csv.{name}.partial" for name in ("1", "2"))
    dead.touch()
    with open(living, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with lps.replacing(tmp_path / "x.csv") as draft:
            draft.write(b"x")
    assert {path.name for path in tmp_path.iterdir()} == {"x.csv", living.name}


@pytest.mark.parametrize("key, value", [("qpos", np.zeros((22, 99))), ("qpos", np.full((22, 21), np.nan)),
                                        ("qpos", np.full((22, 21), "x")), ("qpos", np.zeros(22))])
def test_positions_that_do_not_fit(tmp_path, monkeypatch, key, value):
    data = dict(observations=np.zeros((22, 28)), actions=np.zeros((22, 5)), terminals=np.arange(22) == 21)
    np.savez(tmp_path / "bad.npz", **data, **{key: value})
    message = complaint(monkeypatch, tmp_path, ["--dataset-path", "bad.npz"])
    assert "bad.npz is not a dataset of cube-single-play-singletask-v0" in message


def test_a_torn_file_of_observations_is_made_again(folder, tmp_path):
    (tmp_path / "own.npz").write_bytes((folder / "own.npz").read_bytes())
    args = lps.Args(env_id=ID, dataset_path=tmp_path / "own.npz", dataset_on_host=True, total_steps=1, eval_episodes=0,
                    **TINY)
    lps.train(lps.replace(args, run_dir=tmp_path / "one"))
    [unpacked] = tmp_path.glob("*.observations")
    whole = unpacked.read_bytes()
    unpacked.write_bytes(whole[:-8])
    lps.train(lps.replace(args, run_dir=tmp_path / "two"))
    assert unpacked.read_bytes() == whole


def test_a_batch_larger_than_the_data_is_drawn_with_repeats(folder, tmp_path):
    lps.train(lps.Args(env_id=ID, dataset_path=folder / "own.npz", total_steps=1, eval_episodes=0,
                       run_dir=tmp_path / "run", **TINY | dict(batch_size=500)))
    assert np.isfinite(float(rows(tmp_path / "run/train.csv")[0]["policy_loss"]))


def test_a_gpu_that_is_not_there(folder):
    ran = subprocess.run([sys.executable, lps.__file__, "--env-id", ID, "--dataset-path", "own.npz"], cwd=folder,
                         capture_output=True, text=True, env=os.environ | dict(JAX_PLATFORMS="cuda"))
    assert ran.returncode == 1 and ran.stderr.startswith("error: JAX has no device of JAX_PLATFORMS=cuda")
    assert ran.stderr.count("\n") == 1 and not list(folder.glob("runs/*"))


def refuse(**_):
    raise RuntimeError("no API key configured")


@pytest.mark.parametrize("wandb, reason", [(None, "ModuleNotFoundError"), (SimpleNamespace(init=refuse), "no API key")])
def test_weights_and_biases_that_do_not_start(folder, monkeypatch, wandb, reason):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags = ["--env-id", ID, "--dataset-path", "own.npz", "--track", "--run-dir", "new", *as_flags(TINY)]
    message = complaint(monkeypatch, folder, flags)
    assert "--track: Weights & Biases did not start" in message and reason in message


def test_a_network_that_does_not_fit_into_memory(folder, tmp_path, monkeypatch):
    def raise_it(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nMore of it")

    monkeypatch.setattr(lps, "init", raise_it)
    flags = ["--env-id", ID, "--dataset-path", str(folder / "own.npz"), "--run-dir", "new", *as_flags(TINY)]
    assert complaint(monkeypatch, tmp_path, flags).startswith("error: JAX: RESOURCE_EXHAUSTED: Out of memory")


def lost(*_, **__):
    raise ConnectionError("lost")


def test_weights_and_biases_that_fail_do_not_stop_the_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: None, log=lost))
    lps.train(lps.Args(env_id=ID, dataset_path=folder / "own.npz", total_steps=4, log_interval=2, eval_episodes=0,
                       track=True, run_dir=tmp_path / "run", **TINY))
    assert [row["step"] for row in rows(tmp_path / "run/train.csv")] == ["2", "4"]
    assert capsys.readouterr().err.count("misses step") == 2


@pytest.mark.parametrize("write", range(1, 8))
def test_a_disk_that_is_full(folder, tmp_path, monkeypatch, write):
    """From the n-th write on; with room again the run goes on to what it would have been."""
    args = lps.Args(env_id=ID, dataset_path=folder / "own.npz", total_steps=6, log_interval=2, eval_interval=3,
                    eval_episodes=0, run_dir=tmp_path / "run", **TINY)
    writes = []

    def fsync(file):
        writes.append(file)
        if len(writes) >= write:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        if write > 6:  # args.json, three rows and two checkpoints: no more are written
            lps.train(args)
        else:
            told = "^error: .*No space left on device: '.*/run/[a-z.]*'" + "; --resume goes" * (write > 1)
            with pytest.raises(SystemExit, match=told):
                lps.train(args)
            assert not list((tmp_path / "run").glob(".*")) and (write > 1 or not (tmp_path / "run").exists())
            if write > 3:
                assert arrays(tmp_path / "run")["step"] == 3
    lps.train(lps.replace(args, resume=write > 1))
    assert [row["step"] for row in rows(tmp_path / "run/train.csv")] == ["2", "4", "6"]
    lps.train(lps.replace(args, run_dir=tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole", tables=["train.csv"])


@pytest.mark.parametrize("name", ["Faulty", "Stuck"])  # in a step, or before its first
def test_a_worker_that_hangs(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FAULT", "hangs")
    monkeypatch.setattr(lps, "PATIENCE", 3)
    args = lps.Args(env_id=f"toy_envs:{name}-v0", run_dir=tmp_path, eval_episodes=2)
    with pytest.raises(SystemExit, match="an evaluation worker died or hung"):
        lps.evaluate(args, lambda *x: np.ones((*x[3].shape, 5)), None, None, 0)


@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_run_whose_worker_failed_goes_on_to_what_it_would_have_been(folder, tmp_path, monkeypatch, fault):
    args = lps.Args(env_id="toy_envs:Faulty-v0", dataset_path=folder / "own.npz", total_steps=6, log_interval=2,
                    eval_interval=3, eval_episodes=2, run_dir=tmp_path / "run", **TINY)
    with monkeypatch.context() as patch:
        patch.setenv("FAULT", fault)
        patch.setattr(lps, "PATIENCE", 5)
        with pytest.raises(SystemExit, match="an evaluation worker died or hung .*--resume goes on"):
            lps.train(args)
    assert arrays(tmp_path / "run")["step"] == 3
    lps.train(lps.replace(args, resume=True))
    lps.train(lps.replace(args, run_dir=tmp_path / "whole"))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:.*ERROR")  # its traceback
@pytest.mark.parametrize("fault, reason", [("fails", ".*its joints ache"), ("fails and cannot say", "Empty")])
def test_an_environment_that_fails(tmp_path, monkeypatch, fault, reason):
    monkeypatch.setenv("FAULT", fault)
    args = lps.Args(env_id="toy_envs:Faulty-v0", run_dir=tmp_path, eval_episodes=2)
    with pytest.raises(SystemExit, match=f"^error: toy_envs:Faulty-v0 failed in an evaluation: {reason}"):
        lps.evaluate(args, lambda *x: np.ones((*x[3].shape, 5)), None, None, 0)


def test_environments_are_closed(tmp_path, monkeypatch):
    """What an environment has started, it can end."""
    monkeypatch.setenv("CLOSED", str(tmp_path / "closed"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(2))
    args = lps.Args(env_id="toy_envs:Faulty-v0", run_dir=tmp_path, eval_episodes=3)
    lps.evaluate(args, lambda *x: np.ones((*x[3].shape, 5)), None, None, 0)
    assert (tmp_path / "closed").read_text() == "closed\n" * 3  # Gymnasium makes one more, to see its spaces


@pytest.mark.parametrize("hangs", [False, True])
def test_workers_do_not_outlive_a_killed_run(folder, tmp_path, hangs):
    flags = as_flags(TINY | dict(env_id="toy_envs:Faulty-v0", dataset_path=folder / "own.npz", run_dir=tmp_path / "run",
                                 total_steps=1, eval_episodes=100_000))
    process = subprocess.Popen([sys.executable, lps.__file__, *flags], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | dict(PYTHONPATH=os.path.dirname(__file__), FAULT="hangs" * hangs))
    family = lambda: subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True).stdout.split()
    until(lambda: len(family()) >= 3)  # itself, a resource tracker, a worker
    time.sleep(4)
    process.kill()
    process.wait()
    until(lambda: not family())


def test_a_clock_that_jumps(folder, tmp_path, monkeypatch):
    """By up to a day, forward or back, whenever someone looks at it: the same run, with honest rates."""
    args = lps.Args(env_id=ID, dataset_path=folder / "own.npz", total_steps=6, log_interval=2, eval_interval=3,
                    eval_episodes=2, run_dir=tmp_path / "steady", **TINY)
    lps.train(args)
    steady, looks = time.time(), []

    def jumping():
        looks.append(steady + np.random.default_rng(len(looks)).uniform(-86400, 86400))
        return looks[-1]

    for clock in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, jumping)
    lps.train(lps.replace(args, run_dir=tmp_path / "jumping"))
    assert looks
    steady, jumped = arrays(tmp_path / "steady"), arrays(tmp_path / "jumping")
    for key, x in steady.items():
        np.testing.assert_array_equal(x, jumped[key], err_msg=key)
    for name, measured in (("train", "updates_per_second"), ("eval", "seconds")):
        for one, other in zip(*(rows(tmp_path / run / f"{name}.csv") for run in ("steady", "jumping")), strict=True):
            assert 0 < float(other.pop(measured)) < 86400 and one.pop(measured) and one == other


def test_the_second_signal_is_not_caught():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        caught = lps.catch_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: caught)
        assert caught == [signal.SIGTERM]
        assert {signal.getsignal(number) for number in handlers} == {signal.SIG_DFL}
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_memory_does_not_grow(folder, tmp_path, monkeypatch):
    """Resident memory at each of 60 evaluations of a run that does little else, after the first twenty."""
    used, evaluate = [], lps.evaluate

    def measured(*given):
        with open("/proc/self/statm") as file:
            used.append(int(file.read().split()[1]) * resource.getpagesize() / 1e6)
        return evaluate(*given)

    monkeypatch.setattr(lps, "evaluate", measured)
    lps.train(lps.Args(env_id=ID, dataset_path=folder / "own.npz", total_steps=300, log_interval=5, eval_interval=5,
                       eval_episodes=1, run_dir=tmp_path / "run", **TINY))
    assert len(used) == 60 and max(used[20:]) - used[20] < 10, used
    record = json.loads((tmp_path / "run/args.json").read_text())
    assert record["total_steps"] == 300 and sum(path.stat().st_size for path in (tmp_path / "run").iterdir()) < 10**6
