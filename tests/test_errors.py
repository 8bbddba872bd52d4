"""A mistake ends in one line that names it, and leaves what was there. A bug keeps its traceback.

The text is shared by all scripts (test_shared_text.py), so flow_bc stands for them.
"""

import os
import shutil
import signal
import socket
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import ogbench
import pytest
from helpers import COUNTING, TINY, as_flags, checkpoint, finish, load, make_data, start
from toy_envs import film_data

import flow_bc
from benchmark import ROOT

OGBENCH = "cube-single-play-singletask-v0"
SHORT = TINY | dict(env_id=COUNTING, dataset_path="own.npz", total_steps=100, eval_episodes=0)
NEW = SHORT | dict(run_dir="new")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """own.npz and a run on it."""
    folder = tmp_path_factory.mktemp("original")
    np.savez(folder / "own.npz", **make_data([9, 9, 3, 30]))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(signal, "signal", lambda number, handler: None)
        flow_bc.train(flow_bc.Args(**SHORT | dict(run_dir="run")))
    return folder


@pytest.fixture
def folder(original, tmp_path, monkeypatch):
    """Where a user works. The scripts, called here, leave the handlers of signals as they are."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    return tmp_path


def files():
    return {path: path.read_bytes() for path in Path(".").rglob("*") if path.is_file()}


def line_of(function, *given):
    """The line with which a call ends; Python exits with 1. No file in the folder has changed."""
    before = files()
    with pytest.raises(SystemExit) as error:
        function(*given)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert files() == before
    return error.value.code


ARGUMENTS = {  # what the line must say: what was given
    "cube-singel-singletask": dict(env_id="cube-singel-play-singletask-v0"),
    "No module named 'no_module'": dict(env_id="no_module:No-v0"),
    "Discrete(3) is no Box": dict(env_id="toy_envs:Discrete-v0"),
    "needs a --dataset-path": dict(dataset_path=None),
    "no.npz cannot be read": dict(dataset_path="no.npz"),
    "own.npz: observations must be float32 (55, 4)": dict(env_id="toy_envs:Bandit-v0"),
    "no trajectory is as long as --horizon 31": dict(horizon=31),
    "run holds a run": dict(run_dir="run"),
    "--run-dir own.npz cannot be made": dict(run_dir="own.npz"),
}


@pytest.mark.parametrize("told", ARGUMENTS)
def test_arguments(folder, told):
    assert told in line_of(flow_bc.train, flow_bc.Args(**NEW | ARGUMENTS[told]))


DATA = {  # what the line must say: what was done to the 14 rows of the data
    "has no observations": dict(observations=None),
    "has no rewards": dict(rewards=None),
    "holds mask, ": dict(mask=np.ones(14)),
    "rewards must be float32 (14,), but are float64 (13,)": dict(rewards=np.zeros(13)),
    "actions must be float32 (14, 1), but are <U1": dict(actions=np.full((14, 1), "x")),
    "masks must be finite": dict(masks=np.append(np.nan, np.ones(13))),
    "actions must lie in [-1, 1], but reach 1.5": dict(actions=np.full((14, 1), -1.5)),
    "the last row must end a trajectory, terminals = 1": dict(terminals=np.zeros(14)),
    "cannot be read": dict(rewards=np.array(14 * [object()])),  # nothing is unpickled
}


def line_about(env_id, data):
    """What is said of a dataset."""
    np.savez("bad.npz", **{name: x for name, x in data.items() if x is not None})
    args = flow_bc.Args(**TINY, env_id=env_id, dataset_path="bad.npz", action_dim=1)
    return line_of(flow_bc.load_dataset, args, flow_bc.make_env(args))


@pytest.mark.parametrize("told", DATA)
def test_data(folder, told):
    line = line_about(COUNTING, make_data([6, 6]) | DATA[told])
    assert line.startswith("bad.npz") and told in line


def test_images_of_another_kind(folder):
    data = film_data(2)
    data["observations"] = data["observations"].astype("uint16")
    told = "observations must be uint8 (16, 8, 8, 3), but are uint16 (16, 8, 8, 3)"
    assert told in line_about("toy_envs:Film-v0", data)


def test_files_that_cannot_be_read(folder):
    path = folder / "own.npz"
    x = path.read_bytes()
    flipped = x[:600] + bytes([x[600] ^ 1]) + x[601:]
    for content in (b"", x[:-9], flipped, b"no archive"):
        path.write_bytes(content)
        line = line_of(flow_bc.read_dataset, path)
        assert "own.npz cannot be read" in line and "delete it" in line


def test_a_download_without_a_network(folder, monkeypatch):
    """The line names the server, the mirror, and what makes such a dataset, if anything does."""
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
    for name in ("cube-single-play", "visual-scene-noisy", "antmaze-large-navigate"):
        args = flow_bc.Args(env_id=f"{name}-singletask-v0", dataset_dir=".")
        line = line_of(flow_bc.find_dataset, args)
        assert f"http://127.0.0.1:9/{name}-v0.npz" in line
        assert "huggingface.co/datasets/zhouzypaul/ogbench_datasets" in line
        collects = f"python -m benchmark.collect {name}-v0, --dataset-dir ~/.ogbench/collected"
        assert (collects in line) == ("collect" in line) == ("antmaze" not in name)


def test_a_download_that_is_cut_off(folder, monkeypatch):
    """It does not lie where the whole file belongs."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = server.accept()
        connection.recv(4096)
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\na hundredth")
        connection.close()

    Thread(target=answer).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", url)
    with pytest.raises(SystemExit, match="retrieval incomplete: got only 11 out of 1000"):
        flow_bc.find_dataset(flow_bc.Args(env_id=OGBENCH, dataset_dir="."))
    assert [path.name for path in folder.glob("*.npz")] == ["own.npz"]


def resumed(monkeypatch, flags, name="flow_bc"):
    """The line with which a command ends."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
    return line_of(load(name).main)


def test_what_cannot_be_resumed(folder, monkeypatch):
    assert "holds no run" in resumed(monkeypatch, "--resume")
    assert "nowhere holds no run" in resumed(monkeypatch, "--eval-only --run-dir nowhere")
    changed = "--env-id toy_envs:Silent-v0 --gamma 0.5 --policy-hidden-dims 9 9 --seed 3"
    line = resumed(monkeypatch, f"--resume --run-dir run {changed}")
    assert "has another env_id, gamma, policy_hidden_dims, seed" in line
    # Another script's arguments and networks may well have the same names and sizes.
    line = resumed(monkeypatch, "--resume --run-dir run", "mf_bc")
    assert "run holds a run of flow_bc.py" in line
    np.savez("own.npz", **make_data([9, 9, 3, 31]))
    line = resumed(monkeypatch, "--resume --run-dir run")
    assert "own.npz is not what the run began with: 51" in line


NOT_WHOLE = {"args.json": "holds no run", "checkpoint.msgpack": "is no checkpoint"}


@pytest.mark.parametrize("name", NOT_WHOLE)
def test_a_run_that_is_not_whole(folder, monkeypatch, name):
    path = folder / "run" / name
    content = path.read_bytes()
    evaluating = "--eval-only --eval-episodes 1 --run-dir run"
    for size in (len(content) - 1, len(content) // 2, 0):
        path.write_bytes(content[:size])
        for flags in ("--resume --run-dir run", evaluating):
            assert NOT_WHOLE[name] in resumed(monkeypatch, flags)
    path.unlink()
    assert NOT_WHOLE[name] in resumed(monkeypatch, evaluating)


def test_losses_that_are_not_finite(folder):
    """The line names them. The checkpoint before them stays, and no table has them."""
    data = make_data([9, 9, 3, 30])
    np.savez("own.npz", **data | dict(observations=data["observations"] * np.nan))
    with pytest.raises(SystemExit, match="not finite at update 100: policy_loss"):
        flow_bc.train(flow_bc.Args(**NEW))
    assert checkpoint(folder / "new")["step"] == 0 and not (folder / "new/train.csv").exists()


def fails(folder, name, given, *flags, **environment):
    """What a script prints as it ends with 1."""
    environment |= dict(PYTHONPATH=str(ROOT / "tests"))
    return finish(start(folder, ROOT / name, *as_flags(NEW | given), *flags, **environment), 1)[1]


def test_tracking_without_a_login(folder, monkeypatch):
    """One line, and what it leaves does not count as a run."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    err = fails(folder, "mf_bc", dict(), "--track", HOME=str(folder))
    assert err.startswith("--track: ") and err.count("\n") == 1
    assert not (folder / "new/args.json").exists()


@pytest.mark.parametrize("place", ["Init", "Step"])
def test_a_bug_in_an_environment_keeps_its_traceback(folder, place):
    """It shows before the first update."""
    err = fails(folder, "flow_bc", dict(env_id=f"toy_envs:Broken{place}-v0", eval_episodes=2))
    assert "toy_envs.py" in err and "AttributeError: 'Broken" in err
    assert not (folder / "new/train.csv").exists()


def test_the_renderer_is_chosen_for_ogbench_only(monkeypatch):
    """And only if the user has chosen none."""
    chosen = [(COUNTING, True, None), (f"visual-{OGBENCH}", False, "egl")]
    chosen += [(OGBENCH, False, "disable"), (OGBENCH, True, "egl")]
    monkeypatch.setattr(flow_bc.gymnasium, "make", lambda env_id, **given: 1 / 0)
    for env_id, film, expected in chosen:
        for given in ({}, dict(MUJOCO_GL="osmesa")):
            monkeypatch.setattr(os, "environ", dict(given))
            with pytest.raises(ZeroDivisionError):
                flow_bc.make_env(flow_bc.Args(env_id=env_id, capture_video=film))
            assert os.environ.get("MUJOCO_GL") == given.get("MUJOCO_GL", expected)
