"""Pixels: encoders, frame stacks and random shifts against NumPy, and visual runs from collecting to evaluation."""

import csv
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carry import ROOT, SCRIPTS
from test_scripts import as_flags

import lps

TINY = dict(horizon=2, batch_size=6, actor_hidden_dims=(8,), critic_hidden_dims=(8,))


def np_conv(x, p):
    """3 x 3, stride 1, zero padding."""
    height, width, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=2)
    return np.einsum("hwkc,kco->hwo", patches, p["w"].reshape(9, *p["w"].shape[2:])) + p["b"]


def np_max_pool(x):
    """3 x 3, stride 2, padded where even sizes need it: on the right and below."""
    height, width, _ = x.shape
    padded = np.pad(x, ((height % 2, 1), (width % 2, 1), (0, 0)), constant_values=-np.inf)
    return np.array([[padded[i : i + 3, j : j + 3].max((0, 1)) for j in range(0, width, 2)]
                     for i in range(0, height, 2)])


def np_encode(network, image):
    relu = lambda x: np.maximum(x, 0)
    x = image / 255
    for first, second, third in network["stacks"]:
        x = np_max_pool(np_conv(x, first))
        x = x + np_conv(relu(np_conv(relu(x), second)), third)
    x = relu(x).reshape(-1) @ network["dense"][0]["w"] + network["dense"][0]["b"]
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("size", [(16, 16), (12, 9)])
def test_encoder(size):
    network = lps.init_network(jax.random.key(0), (*size, 9), (2, 8, 3))
    images = np.random.default_rng(0).integers(0, 256, (4, *size, 9), np.uint8)
    network64 = jax.tree.map(lambda x: np.asarray(x, np.float64), network)
    expected = np.array([np_encode(network64, image) for image in images])
    np.testing.assert_allclose(lps.encode(network, images), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(lps.encode(network, images[0]), expected[0], rtol=1e-3, atol=1e-5)  # without a batch
    assert network["mlp"][0]["w"].shape == (514, 8)


def test_impala_small():
    network = lps.init_network(jax.random.key(0), (64, 64, 9), (0, 8))
    assert [[p["w"].shape for p in stack] for stack in network["stacks"]] == [
        [(3, 3, 9, 16), (3, 3, 16, 16), (3, 3, 16, 16)], [(3, 3, 16, 32), (3, 3, 32, 32), (3, 3, 32, 32)],
        [(3, 3, 32, 32), (3, 3, 32, 32), (3, 3, 32, 32)]]
    assert network["dense"][0]["w"].shape == (2048, 512)


class Film(gymnasium.Env):
    """Every frame is filled with its episode and time; an episode ends after seven steps."""

    observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def frame(self):
        return np.full((8, 8, 3), (10 * self.seed + self.t, self.seed, self.t), np.uint8)

    def reset(self, *, seed=None, options=None):
        self.seed, self.t = seed, 0
        return self.frame(), {}

    def step(self, action):
        self.t += 1
        return self.frame(), 0.0, False, self.t == 7, {"success": True}


gymnasium.register("Film-v0", "test_pixels:Film")


def film_data(path, episodes=3):
    """The episodes 0 ... of Film, as a dataset."""
    frames = []
    env = Film()
    for seed in range(episodes):
        frames += [env.reset(seed=seed)[0], *(env.step(None)[0] for _ in range(7))]
    n = len(frames)
    np.savez(path, observations=np.array(frames), actions=np.zeros((n, 1)), rewards=np.arange(n) * 1.0,
             terminals=np.arange(n) % 8 == 7)
    return path


def load_film(tmp_path, **more):
    args = lps.Args(env_id="test_pixels:Film-v0", dataset_path=film_data(tmp_path / "film.npz"), **TINY | more)
    data, facts = lps.load_dataset(args, Film())
    return args, data, facts


def stack_by_hand(observations, t, first):
    return np.concatenate([observations[max(i, first)] for i in (t - 2, t - 1, t)], axis=-1)


def test_frames_are_stacked_within_the_trajectory(tmp_path):
    args, data, facts = load_film(tmp_path)
    assert data["observations"].dtype == np.uint8 and facts["trajectories"] == 3
    assert data["starts"].tolist() == [8 * i + t for i in range(3) for t in range(6)]
    for delay in (0, 2):
        rows = data["starts"] + delay
        stacks = lps.observe(*(jnp.asarray(x) for x in (data["observations"], rows, data["firsts"])))
        expected = [stack_by_hand(data["observations"], t, t // 8 * 8) for t in rows]
        np.testing.assert_array_equal(stacks, expected)


def test_random_shift(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 9), np.uint8)
    padded = np.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    moved, places = 0, set()
    for seed in range(40):
        shifted = np.asarray(lps.shift(jnp.asarray(images), jax.random.key(seed)))
        at = [[(i, j) for i in range(7) for j in range(7) if np.array_equal(x, p[i : i + 8, j : j + 8])][:1]
              for x, p in zip(shifted, padded)]
        assert all(at)  # each is a crop of its own padded image
        moved += any(place != [(3, 3)] for place in at)
        places |= {place[0] for place in at}
    assert 12 <= moved <= 28 and len(places) == 49  # half of the batches; every place occurs


def test_a_batch_is_shifted_alike_now_and_later(tmp_path):
    args, data, _ = load_film(tmp_path, batch_size=64)
    data = jax.tree.map(jnp.asarray, data)
    for seed in range(4):
        key = jax.random.key(seed)
        i = lps.draw_chunks(args, len(data["starts"]), key)
        batch = lps.sample_batch(args, data, i, key)
        t, first = np.asarray(data["starts"])[i], np.asarray(data["firsts"])[i]
        for name, at in (("observations", t), ("next_observations", t + 2)):
            raw = np.array([stack_by_hand(np.asarray(data["observations"]), x, y) for x, y in zip(at, first)])
            np.testing.assert_array_equal(batch[name], lps.shift(jnp.asarray(raw), jax.random.fold_in(key, 1)))


def test_a_rollouts_stacks_are_the_samplers(tmp_path):
    """Episode 1 of Film, as an evaluation sees it, chunk by chunk, and as the sampler builds it from the dataset."""
    args, data, _ = load_film(tmp_path)
    episodes = lps.Episodes("test_pixels:Film-v0", 2, [1], None)
    assert episodes.observation_space.shape == (8, 8, 9) and episodes.observation_space.dtype == np.uint8
    seen = [episodes.reset()[0]] + [episodes.step(np.zeros(2))[0] for _ in range(3)]
    rows = jnp.array([8, 10, 12, 14])
    np.testing.assert_array_equal(seen, lps.observe(jnp.asarray(data["observations"]), rows, jnp.full(4, 8)))


def test_images_of_another_kind_are_refused(tmp_path):
    args, data, _ = load_film(tmp_path)
    with np.load(args.dataset_path) as file:
        content = dict(file)
    np.savez(args.dataset_path, **content | dict(observations=content["observations"].astype(np.float32)))
    with pytest.raises(SystemExit, match="images must be uint8"):
        lps.load_dataset(args, Film())


# (network, observation) pairs of an update, and how many of them are differentiated: e.g. lps has (policy, s),
# (policy, s'), (critics, s), (target, s'), (latent actor, s), (latent actor, s'), and trains three networks, all on s.
PAIRS = dict(lps=(6, 3), dsrl=(7, 4), qc_fql=(5, 3), qc_mfql=(5, 3), cfgrl=(5, 3), flow_bc=(1, 1))


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_network_encodes_each_observation_once(name):
    """An encoder has 9 convolutions; backwards there are 9 for its weights and 8 for what lies between them. The
    compiled update has these and no more: no jvp, Euler step or second look at the same observation adds any."""
    script = import_module(name)
    args = script.Args(**TINY)
    script.check_args(args)
    state = jax.eval_shape(lambda key: script.init(args, key, (8, 8, 9), 1), jax.random.key(0))
    image, one = jax.ShapeDtypeStruct((6, 8, 8, 9), np.uint8), jax.ShapeDtypeStruct((6,), np.float32)
    batch = dict(observations=image, next_observations=image, rewards=one, masks=one,
                 actions=jax.ShapeDtypeStruct((6, 2), np.float32))
    update = jax.jit(lambda state, batch: script.update(args, state, batch, jax.random.key(0)))
    text = update.lower(state, batch).compile().as_text()
    encoded, differentiated = PAIRS[name]
    assert len(re.findall(r"= \S+ convolution\(", text)) == 9 * encoded + 17 * differentiated


@pytest.fixture(scope="module")
def visual(tmp_path_factory):
    """A folder with scripts and a tiny visual dataset from OGBench's experts."""
    folder = tmp_path_factory.mktemp("visual")
    for name in ("lps", "dsrl"):
        shutil.copy(ROOT / f"{name}.py", folder)
    result = subprocess.run(
        [sys.executable, ROOT / "benchmark/collect.py", "visual-cube-single-play-v0", "--num-episodes", "1",
         "--episode-length", "12", "--dataset-dir", folder / "data"], capture_output=True, text=True)
    if "EGL" in result.stderr or "GLContext" in result.stderr:
        pytest.skip("no EGL renderer on this machine")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("name", ["lps", "dsrl"])
def test_visual_run(visual, name):
    ran = subprocess.run(
        [sys.executable, f"{name}.py", "--env-id", "visual-cube-single-play-singletask-v0", "--dataset-dir", "data",
         "--total-steps", "2", "--eval-episodes", "0", "--run-dir", name, *as_flags(TINY)],
        cwd=visual, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with open(visual / name / "train.csv") as file:
        assert [np.isfinite(float(row["policy_loss"])) for row in csv.DictReader(file)] == [True]


def test_a_renderer_that_cannot_start_ends_the_run_at_once(visual):
    """The user's MUJOCO_GL counts, even one that cannot render."""
    ran = subprocess.run(
        [sys.executable, "lps.py", "--env-id", "visual-cube-single-play-singletask-v0", "--dataset-dir", "data"],
        cwd=visual, capture_output=True, text=True, env=os.environ | dict(MUJOCO_GL="disable"))
    assert ran.returncode == 1 and ran.stdout == "" and not any((visual / "runs").glob("*"))
    assert ran.stderr.startswith("error: visual-cube-single-play-singletask-v0 cannot render: ")
    assert ran.stderr.count("\n") == 1 and "MUJOCO_GL" in ran.stderr
