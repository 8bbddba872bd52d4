"""benchmark/collect.py: OGBench's format, the same data for any number of workers, never half a file."""

import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import ogbench
import pytest
from test_cli import until

from benchmark import collect

SAME = ["--num-episodes", 3, "--num-workers", 2, "--seed", 5]


def command(folder, *flags):
    return [sys.executable, collect.__file__, "--dataset-dir", folder, *map(str, flags)]


def start(*given, **how):
    return subprocess.Popen(command(*given), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


def run(*given, **how):
    """Its exit code and what it said on stderr."""
    ran = subprocess.run(command(*given), capture_output=True, text=True, timeout=100, **how)
    return ran.returncode, ran.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    code, err = run(folder, "puzzle-3x3-noisy-v0", *SAME)
    assert code == 0 and "4/4" in err and "arn" not in err, err  # a progress bar, no warning
    return folder


def test_format_is_ogbenchs(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["puzzle-3x3-noisy-v0-val.npz", "puzzle-3x3-noisy-v0.npz"]
    for name, episodes in (("puzzle-3x3-noisy-v0.npz", 3), ("puzzle-3x3-noisy-v0-val.npz", 1)):
        with np.load(folder / name) as file:
            data = dict(file)
        kinds = {key: (x.dtype.name, x.shape[1:]) for key, x in data.items()}
        assert kinds == dict(observations=("float32", (55,)), actions=("float32", (5,)), terminals=("bool", ()),
                             qpos=("float32", (23,)), qvel=("float32", (23,)), button_states=("int64", (9,)))
        assert np.flatnonzero(data["terminals"]).tolist() == [1000 + 1001 * i for i in range(episodes)]
        assert np.abs(data["actions"]).max() <= 1
        # Rows are (s_t, a_t, state t): the arm's joints lead both the observation and qpos.
        np.testing.assert_allclose(data["observations"][:, :6], data["qpos"][:, :6], atol=1e-6)
    env, train, val = ogbench.make_env_and_datasets(
        "puzzle-3x3-noisy-singletask-task1-v0", dataset_path=str(folder / "puzzle-3x3-noisy-v0.npz"))
    assert len(train["rewards"]) == 3000 and len(val["rewards"]) == 1000
    assert train["observations"].shape[1:] == env.observation_space.shape


def test_the_mark(folder):
    comment = json.loads(zipfile.ZipFile(folder / "puzzle-3x3-noisy-v0.npz").comment)
    assert comment["collected_by"] == "benchmark/collect.py" and comment["seed"] == 5 and comment["num_episodes"] == 3


def test_the_number_of_workers_changes_nothing_and_the_seed_everything(folder, tmp_path):
    run(tmp_path / "one", "puzzle-3x3-noisy-v0", "--num-episodes", 3, "--num-workers", 1, "--seed", 5)
    run(tmp_path / "other", "puzzle-3x3-noisy-v0", "--num-episodes", 1, "--seed", 6)
    with np.load(folder / "puzzle-3x3-noisy-v0.npz") as a, np.load(tmp_path / "one/puzzle-3x3-noisy-v0.npz") as b:
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
        first = a["observations"]
    assert not np.array_equal(first[:1001], first[1001:2002])
    with np.load(tmp_path / "other/puzzle-3x3-noisy-v0.npz") as c:
        assert not np.array_equal(c["observations"][0], first[0])


def test_nothing_is_overwritten_unasked(folder):
    before = (folder / "puzzle-3x3-noisy-v0.npz").read_bytes()
    code, err = run(folder, "puzzle-3x3-noisy-v0", "--num-episodes", 1)
    assert code == 1 and "--overwrite" in err and err.count("\n") == 1
    assert (folder / "puzzle-3x3-noisy-v0.npz").read_bytes() == before


@pytest.mark.parametrize("dataset, flags, message", [
    ("cube-singel-play-v0", [], "near: "), ("cube-single-play-singletask-v0", [], "near: cube-single-play-v0"),
    ("cube-single-play-v0", ["--num-episodes", 0], "--num-episodes"), ("cube-single-play-v0", ["--seed", -1], "--seed"),
    ("cube-single-play-v0", ["--dataset-dir", "/proc/none"], "cannot write to /proc/none")])
def test_mistakes_are_told_in_one_line(tmp_path, dataset, flags, message):
    code, err = run(tmp_path, dataset, "--num-episodes", 1, "--episode-length", 9, *flags)
    assert code == 1 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def workers(process):
    """The processes that a collection has started."""
    return [int(child) for thread in Path(f"/proc/{process.pid}/task").iterdir()
            for child in (thread / "children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, None])
def test_a_stopped_collection_begins_again(folder, tmp_path, number):
    """Nothing that could be taken for a dataset is there, no process is left, and the same command makes the same.
    None: killed while it writes."""
    given = [tmp_path, "puzzle-3x3-noisy-v0", *SAME]
    process = start(*given)
    draft = tmp_path / ".puzzle-3x3-noisy-v0.npz.partial"
    until(lambda: workers(process) if number else draft.exists() and draft.stat().st_size)
    time.sleep(random.uniform(0, 2) if number else 0)  # alone on two cores it takes more than four
    there = workers(process)
    process.send_signal(number or signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in err
    assert list(tmp_path.glob("*.npz")) == []
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in there))
    if number in (signal.SIGINT, signal.SIGTERM):
        assert err.endswith("error: stopped; nothing was written\n") and list(tmp_path.iterdir()) == []
        return
    assert run(*given)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    for path in tmp_path.iterdir():
        with np.load(path) as again, np.load(folder / path.name) as first:
            for key in first:
                np.testing.assert_array_equal(again[key], first[key], err_msg=key)


def test_a_worker_that_dies(tmp_path):
    process = start(tmp_path, "cube-single-play-v0", "--num-workers", 1)
    _, worker = until(lambda: sorted(workers(process))[1:] and sorted(workers(process)))  # a resource tracker, a worker
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and err.splitlines()[-1].startswith("error: a worker died") and "Trace" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_renderer_that_cannot_start(tmp_path):
    code, err = run(tmp_path, "visual-cube-single-play-v0", "--num-workers", 1, env=os.environ | dict(MUJOCO_GL="no"))
    assert code == 1 and "Traceback" not in err and list(tmp_path.iterdir()) == []
    assert err.splitlines()[-1].startswith("error: no episode of visual-cube-single-play-v0: invalid value")


def test_a_disk_that_is_full(tmp_path):
    """Files can grow to 4096 bytes, no further."""
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    code, err = run(tmp_path, "cube-single-play-v0", "--num-episodes", 1, "--episode-length", 99, preexec_fn=full)
    assert code == 1 and "Traceback" not in err and list(tmp_path.iterdir()) == []
    assert err.splitlines()[-1] == f"error: cannot write to {tmp_path}: File too large; nothing was written"


def test_two_collections_of_one_dataset(tmp_path):
    """The second one refuses, and leaves the first one's draft alone."""
    draft = tmp_path / ".cube-single-play-v0-val.npz.partial"
    with open(draft, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, err = run(tmp_path, "cube-single-play-v0")
    assert code == 1 and err.startswith("error: another process is collecting cube-single-play")
    assert err.count("\n") == 1 and list(tmp_path.iterdir()) == [draft]


@pytest.mark.parametrize("dataset", [name for name in collect.NAMES if not name.startswith("visual-")])
def test_every_state_dataset(dataset):
    """Twenty rows of each: the expert acts, the rows fit the environment."""
    collect.WORKER.update(collect.make_scene(dataset, episode_length=19))
    rows = collect.collect_episode(dataset, 0, 0)
    assert len(rows["observations"]) == len(rows["terminals"]) == 20 and rows["terminals"].sum() == 1
    assert rows["observations"].shape[1:] == collect.WORKER["env"].observation_space.shape
    assert ("button_states" in rows) == ("cube" not in dataset)
    assert np.abs(np.diff(rows["observations"], axis=0)).max() > 0.05


@pytest.mark.parametrize("dataset", ["visual-cube-single-play-v0", "visual-scene-noisy-v0"])
def test_visual_datasets_hold_the_environments_own_frames(tmp_path, dataset):
    code = f"""
import numpy as np
from benchmark import collect
collect.start_worker({dataset!r}, episode_length=2)
rows = collect.collect_episode({dataset!r}, 0, 0)
assert rows["observations"].shape == (3, 64, 64, 3) and rows["observations"].dtype == np.uint8
frame, _ = collect.WORKER["env"].reset(seed=int(np.random.SeedSequence([0, 0, 0]).generate_state(1)[0]))
assert np.array_equal(rows["observations"][0], frame) and frame.std() > 10
"""
    root = Path(collect.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    if "EGL" in result.stderr or "GLContext" in result.stderr:
        pytest.skip("no EGL renderer on this machine")
    assert result.returncode == 0, result.stderr


def test_scenes_health_check():
    """Columns 14 to 16 of qpos are the cube's place: never too far right, too far left only inside the drawer."""
    qpos = np.zeros((4, 24))
    qpos[:, 14:17] = 0.4, 0.1, 0.02
    assert collect.is_healthy(qpos)
    for y, z, healthy in ((0.29, 0.02, False), (0.28, 0.02, True), (-0.3, 0.02, False), (-0.3, 0.07, True),
                          (-0.35, 0.1, False), (-0.29, 0.02, True)):
        qpos[2, 15:17] = y, z
        assert collect.is_healthy(qpos) == healthy


def test_an_unhealthy_episode_is_played_again(monkeypatch):
    seeds, verdicts = [], iter([False, False, True])
    monkeypatch.setattr(collect, "play_episode", lambda seed, **_: seeds.append(seed) or dict(qpos=None))
    monkeypatch.setattr(collect, "is_healthy", lambda qpos: next(verdicts))
    collect.collect_episode("scene-play-v0", 0, 7)
    assert len(set(seeds)) == 3
