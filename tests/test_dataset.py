"""The dataset contract: chunks against brute force, OGBench's relabelling, and files that must be refused."""

import io
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

import lps

ID = "toy_envs:Counting-v0"  # two numbers observed, one action


def make_data(lengths, seed=0):
    """Trajectories of so many transitions; every number differs, so that a wrong row shows."""
    rng = np.random.default_rng(seed)
    rows = sum(lengths) + len(lengths)
    terminals = np.zeros(rows)
    terminals[np.cumsum([n + 1 for n in lengths]) - 1] = 1
    return dict(observations=rng.normal(size=(rows, 2)), actions=rng.uniform(-1, 1, (rows, 1)),
                rewards=rng.normal(size=rows), terminals=terminals, masks=(rng.random(rows) < 0.8).astype(float))


def load(data, tmp_path, **settings):
    np.savez(tmp_path / "data.npz", **data)
    args = lps.Args(env_id=ID, dataset_path=tmp_path / "data.npz", **settings)
    env = lps.make_env(ID)
    return args, *lps.load_dataset(args, env)


def draw(args, arrays, key):
    return lps.sample_batch(args, arrays, lps.draw_chunks(args, len(arrays["starts"]), key), key)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_chunks_against_brute_force(tmp_path, horizon):
    """Trajectories shorter than the chunk, as long, one longer, empty ones; each possible chunk equally often."""
    lengths = [horizon - 1, horizon, 0, horizon + 1, 3 * horizon, 1]
    data = make_data(lengths)
    args, arrays, facts = load(data, tmp_path, horizon=horizon, gamma=0.9, batch_size=4000)

    chunks, first = {}, 0
    for n in lengths:
        for t in range(first, first + n + 1):
            if t + horizon <= first + n:
                rewards, masks = data["rewards"][t : t + horizon], data["masks"][t : t + horizon]
                chunks[t] = dict(
                    observations=data["observations"][t],
                    actions=np.concatenate(data["actions"][t : t + horizon]),
                    rewards=sum(0.9**i * r for i, r in enumerate(rewards)),
                    masks=float(min(masks)),
                    next_observations=data["observations"][t + horizon])
        first += n + 1
    assert arrays["starts"].tolist() == sorted(chunks)
    assert facts["transitions"] == sum(lengths) and facts["trajectories"] == len(lengths)

    batch = jax.tree.map(np.asarray, draw(args, arrays, jax.random.key(0)))
    drawn = [min(chunks, key=lambda t: abs(chunks[t]["observations"] - s).sum()) for s in batch["observations"]]
    for key, values in batch.items():
        np.testing.assert_allclose(values, [chunks[t][key] for t in drawn], rtol=1e-5, atol=1e-6)
    counts = np.array([drawn.count(t) for t in chunks])
    expected = 4000 / len(chunks)
    assert ((counts - expected) ** 2 / expected).sum() < len(chunks) + 5 * np.sqrt(2 * len(chunks))  # chi-squared


def test_arrays_are_float32_clipped_and_masks_default_to_one(tmp_path):
    data = make_data([6, 6])
    data["actions"][0] = 1
    data["observations"] = data["observations"].astype(np.uint8)  # flat: not pixels
    del data["masks"]
    args, arrays, _ = load(data, tmp_path, dataset_on_host=True)
    assert lps.windows(args, arrays, np.zeros((1, 3), int))["observations"].dtype == np.float32
    args, arrays, _ = load(data, tmp_path)
    assert arrays["observations"].dtype == arrays["rewards"].dtype == np.float32 and arrays["starts"].dtype == np.int32
    assert arrays["actions"].max() == np.float32(1 - 1e-5)
    assert (arrays["masks"] == 1).all()


def test_the_last_rows_action_and_reward_may_be_anything(tmp_path):
    data = make_data([6, 6])
    for key in ("actions", "rewards", "masks"):
        data[key][[6, 13]] = np.nan
    assert len(load(data, tmp_path, horizon=5)[1]["starts"]) == 4


def test_a_dataset_of_another_environment_is_refused(tmp_path):
    env_id = "puzzle-3x3-play-singletask-v0"
    np.savez(tmp_path / "data.npz", **make_data([6]), qpos=np.zeros((7, 21)))
    args, env = lps.Args(env_id=env_id, dataset_path=tmp_path / "data.npz"), lps.make_env(env_id)
    with pytest.raises(SystemExit, match="observations must be numbers"):
        lps.load_dataset(args, env)
    data = make_data([6])
    del data["rewards"]
    np.savez(tmp_path / "data.npz", **data, qpos=np.zeros((7, 21)))
    with pytest.raises(SystemExit, match="is not a dataset of puzzle-3x3"):
        lps.load_dataset(args, env)


def test_equal_rewards_are_warned_of(tmp_path, capsys):
    load(make_data([6]) | dict(rewards=np.zeros(7)), tmp_path)
    assert "every reward is 0.0" in capsys.readouterr().err


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_windows_hold_what_their_chunks_need(tmp_path, horizon):
    """What --dataset-on-host reads for a batch gives the batch that the whole dataset gives, to the bit."""
    data = make_data([3, horizon, 0, 3 * horizon, 9])
    args, arrays, _ = load(data, tmp_path, horizon=horizon, batch_size=64)
    keys = jax.random.split(jax.random.key(0), 6)
    i = np.array([lps.draw_chunks(args, len(arrays["starts"]), key) for key in keys]).reshape(2, 3, 64)
    windows = lps.windows(args, arrays, i)
    for k, key in zip(np.ndindex(2, 3), keys):
        few = {name: jax.numpy.asarray(x[k]) for name, x in windows.items()}
        assert len(few["actions"]) == 64 * (horizon + 3)
        batch = lps.sample_batch(args, few, np.arange(64), key)
        for name, x in draw(args, jax.tree.map(jax.numpy.asarray, arrays), key).items():
            np.testing.assert_array_equal(batch[name], x)


def test_a_folder_of_files_is_one_dataset(tmp_path):
    data = make_data([6, 4, 9])
    whole = load(data, tmp_path)[1]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, rows in (("b-001", slice(12, 22)), ("b-000", slice(0, 12)), ("b-000-val", slice(0, 7))):
        np.savez_compressed(folder / f"{name}.npz", **{key: x[rows] for key, x in data.items()})
    for on_host in (False, True):
        args = lps.Args(env_id=ID, dataset_path=folder, dataset_on_host=on_host)
        arrays, facts = lps.load_dataset(args, lps.make_env(ID))
        for key, x in arrays.items():
            np.testing.assert_array_equal(np.asarray(x, whole[key].dtype), whole[key])
        assert facts["transitions"] == 19 and facts["trajectories"] == 3
        assert isinstance(arrays["observations"], np.memmap) == on_host
    unpacked = list(tmp_path.glob("folder.*.observations"))
    assert len(unpacked) == 1 and not list(tmp_path.glob(".*.partial"))
    np.savez(folder / "b-000.npz", **{key: x[:10] for key, x in data.items()})
    with pytest.raises(SystemExit, match="b-000.npz: terminals must be 1"):
        lps.load_dataset(args, lps.make_env(ID))
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(SystemExit, match="folder holds no .npz"):
        lps.load_dataset(args, lps.make_env(ID))


def test_the_device_of_a_cpu_takes_the_observations_as_they_are(tmp_path):
    arrays = load(make_data([6]) | dict(observations=np.ones((7, 2), np.float32)), tmp_path)[1]
    on_device = jax.device_put(arrays["observations"])
    assert on_device.unsafe_buffer_pointer() == arrays["observations"].ctypes.data


def test_what_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    total = int(re.search(r"MemTotal: *(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0 < lps.free_memory() <= total
    data = make_data([600])
    load(data, tmp_path)
    size = sum(x.nbytes for x in data.values())
    monkeypatch.setattr(lps, "free_memory", lambda: 10**9 + size - data["observations"].nbytes + 1000)
    with pytest.raises(SystemExit, match="but 1.0 are free; --dataset-on-host leaves its observations on the disk"):
        load(data, tmp_path)
    load(data, tmp_path, dataset_on_host=True)
    monkeypatch.setattr(lps, "free_memory", lambda: 10**9)
    with pytest.raises(SystemExit, match="are free$"):
        load(data, tmp_path, dataset_on_host=True)


def test_fingerprint_follows_the_content(tmp_path):
    data = make_data([6, 6])
    first = load(data, tmp_path)[2]["fingerprint"]
    assert load(data, tmp_path)[2]["fingerprint"] == first
    data["rewards"][0] += 1
    assert load(data, tmp_path)[2]["fingerprint"] != first


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scene", ["cube-double", "puzzle-3x3", "scene"])
def test_ogbench_rewards_are_those_of_the_environment(tmp_path, scene, sparse):
    """Rewards are relabelled from the states of a rollout; OGBench's environment said the same at the time."""
    env_id = f"{scene}-play-singletask-task1-v0"
    env = lps.make_env(env_id)
    ob, info = env.reset(seed=0)
    rng = np.random.default_rng(0)
    rows = dict(observations=[], actions=[], terminals=[], qpos=[], button_states=[])
    rewards, successes = [], []
    for t in range(60):
        action = np.clip(rng.normal(0, 1, 5) + [0, 0, -0.5, 0, 0], -1, 1)
        if t == 30:  # solve the task by force: every part where it belongs
            solve(env.unwrapped)
        next_ob, reward, terminated, _, info = env.step(action)
        rewards.append(reward)
        successes.append(info["success"])
        for key, value in dict(observations=ob, actions=action, terminals=t == 59, qpos=info["prev_qpos"],
                               button_states=info.get("prev_button_states", np.zeros(1))).items():
            rows[key].append(value)
        ob = next_ob
    np.savez(tmp_path / "data.npz", **{key: np.array(values) for key, values in rows.items()})
    args = lps.Args(env_id=env_id, dataset_path=tmp_path / "data.npz", sparse=sparse)
    arrays, facts = lps.load_dataset(args, env)
    assert any(successes) and not all(successes) and len(set(rewards)) > 1
    np.testing.assert_array_equal(arrays["masks"], 1.0 - np.array(successes))
    np.testing.assert_array_equal(arrays["rewards"], -arrays["masks"] if sparse else rewards)
    assert ("sparse" in facts["rewards"]) == sparse and "1.2" in facts["rewards"]


def solve(env):
    if hasattr(env, "_target_button_states"):
        env._cur_button_states[:] = env._target_button_states
        env._apply_button_states()
    for i in range(getattr(env, "_num_cubes", 0)):
        env._data.joint(f"object_joint_{i}").qpos[:3] = env._data.mocap_pos[env._cube_target_mocap_ids[i]]
        env._data.joint(f"object_joint_{i}").qvel[:] = 0
    if hasattr(env, "_target_drawer_pos"):
        env._data.joint("drawer_slide").qpos[0] = env._target_drawer_pos
        env._data.joint("window_slide").qpos[0] = env._target_window_pos
    env.post_step()


class Server(BaseHTTPRequestHandler):
    content, cut = b"", 0

    def do_GET(self):
        self.send_response(200 if self.content else 404)
        self.send_header("Content-Length", len(self.content))
        self.end_headers()
        self.wfile.write(self.content[: len(self.content) - self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    buffer = io.BytesIO()
    np.savez(buffer, anything=np.arange(100_000))
    monkeypatch.setattr(Server, "content", buffer.getvalue())
    monkeypatch.setattr(Server, "cut", 0)
    http = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setattr(lps, "OGBENCH_URL", f"http://127.0.0.1:{http.server_port}")
    yield Server
    http.shutdown()


def test_download(tmp_path, server):
    args = lps.Args(env_id="scene-noisy-singletask-task3-v0", dataset_dir=tmp_path / "new")
    path = lps.find_dataset(args)
    assert path == tmp_path / "new" / "scene-noisy-v0.npz" and path.read_bytes() == server.content
    server.content = b"changed"
    assert lps.find_dataset(args).read_bytes() != b"changed"  # it is there: not downloaded again


@pytest.mark.parametrize("fault", ["cut off", "not there"])
def test_failed_download_leaves_nothing_and_names_both_ways_out(tmp_path, server, fault):
    server.cut, server.content = (1000, server.content) if fault == "cut off" else (0, b"")
    with pytest.raises(SystemExit) as error:
        lps.find_dataset(lps.Args(env_id="cube-triple-noisy-singletask-v0", dataset_dir=tmp_path))
    assert f"{lps.OGBENCH_URL}/cube-triple-noisy-v0.npz" in str(error.value)
    assert "benchmark/collect.py cube-triple-noisy-v0" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("env_id, expected", [
    ("cube-singel-play-singletask-v0", "cube-single-play-singletask-v0"),
    ("cube-single-play-singletask-task7-v0", "cube-single-play-singletask-task"),
    ("puzzle-4x7-play-singletask-task2-v0", "puzzle-4x6-play-singletask-task2-v0"),
    ("no_such_module:Thing-v0", "near: "),
    ("toy_envs:Discrete-v0", "must be a flat box"),
    ("toy_envs:Unbounded-v0", "must be bounded")])
def test_unknown_or_unfit_environments(env_id, expected):
    with pytest.raises(SystemExit) as error:
        lps.make_env(env_id)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scene", [
    "cube-single", "cube-double", "cube-triple", "cube-quadruple", "scene", "puzzle-3x3", "puzzle-4x4", "puzzle-4x5",
    "puzzle-4x6"])
def test_every_manipulation_task_exists(scene):
    import gymnasium
    import ogbench  # noqa: F401

    for kind in ("play", "noisy"):
        for task in ("", "-task1", "-task5"):
            match = lps.OGBENCH_ID.fullmatch(f"{scene}-{kind}-singletask{task}-v0")
            assert match[1] == scene and match[2] == kind
            assert f"{scene}-singletask{match[3]}-v0" in gymnasium.registry


def test_actions_are_rescaled_to_the_environments_box():
    env = lps.make_env("toy_envs:Counting-v0")  # acts in [-2, 2], and pays what it is told to do
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    env.reset(seed=1)
    assert [env.step(np.array([a], np.float32))[1] for a in (-1, 0.25, 1)] == [-2, 0.5, 2]
