# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "flax", "gymnasium>=1.1", "jax>=0.6", "moviepy", "ogbench>=1.2", "optax", "tqdm", "tyro",
#     "wandb",
# ]
# ///
"""QC-FQL, one-step distillation of a flow: offline RL in one file. arXiv 2502.02538, 2507.07969.

A flow policy v imitates: in ten steps it turns noise e into a chunk of actions. A student mu does
so in one step. It is pulled by the critic's gradient to what pays, and by a weight alpha to what v
makes of the same noise. A large alpha imitates, a small one leaves the data: it has to be tuned
for every domain.

Symbols: s is an observation, a a chunk of H actions, e noise, R a reward, m is 0 where the task
ended, else 1, Qbar an average of Q over updates. Time t is 0 at the data and 1 at the noise.

    policy  min_v   E (v(s, z_t, t) - (e - a))^2,  z_t = (1-t) a + t e    imitates
    critic  min_Q   E (Q_k(s, a) - y)^2,  y = sum_i gamma^i R_i + gamma^H m mean_k Qbar_k(s', a')
    student min_mu  E alpha (mu(s, e) - decode(s, e))^2 - lambda Q(s, mu(s, e))    improves

    diff flow_bc.py qc_fql.py  # added to imitation: a critic, and a student that listens to it
    diff qc_fql.py qc_mfql.py  # the teacher takes ten Euler steps, or one MeanFlow step
    diff qc_fql.py gfp.py      # the teacher imitates most what the critic prefers to the student
"""

import json
import math
import multiprocessing
import os
import platform
import re
import signal
import time
import zipfile
import zlib
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path
from urllib.request import urlretrieve

import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
import tyro
from flax.serialization import from_state_dict, msgpack_restore, msgpack_serialize, to_state_dict
from flax.training.train_state import TrainState
from gymnasium import wrappers
from gymnasium.spaces import Box
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from jax.lax import stop_gradient as sg
from tqdm import tqdm

# ============================================================================================ Args


@dataclass(frozen=True)
class Args:
    env_id: str = "cube-single-play-singletask-v0"  # of OGBench, or any with a --dataset-path
    dataset_dir: str = "~/.ogbench/data"  # where OGBench's datasets lie, or are downloaded to
    dataset_path: str | None = None  # an .npz of your own
    sparse: bool | None = None  # rewards are -1 until solved, then 0 (default: scene, puzzle-3x3)
    seed: int = 0  # of initial weights, batches, noise and evaluations
    total_steps: int = 1_000_000  # updates
    batch_size: int = 256  # chunks in a batch
    learning_rate: float = 3e-4  # of Adam, for every network
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate at which the target critics follow the critics
    horizon: int = 5  # H, actions in a chunk
    num_critics: int = 2  # critics in the ensemble
    policy_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # layer widths of the policy
    critic_hidden_dims: tuple[int, ...] = (256, 256, 256, 256)  # layer widths of the critics
    log_interval: int = 5_000  # updates between rows of train.csv; 0: one row, at the end
    eval_interval: int = 100_000  # updates between evaluations; 0: only at the start and the end
    eval_episodes: int = 50  # episodes in an evaluation; 0: never evaluate
    run_dir: str | None = None  # of the run (default: runs/{env_id}__{script}__{seed}__{time})
    resume: bool = False  # go on from the last checkpoint in --run-dir, with that run's arguments
    eval_only: bool = False  # evaluate the checkpoint in --run-dir, train nothing
    capture_video: bool = False  # film the first episode of every evaluation
    track: bool = False  # log to Weights & Biases too (honours WANDB_MODE)
    action_dim: tyro.conf.Suppress[int] = 0  # A, numbers in an action; train() asks the environment
    wandb_id: tyro.conf.Suppress[str | None] = None  # of the run there, which --resume goes on with
    # The algorithm's own:
    alpha: float | None = None  # weight of staying near the teacher (default: by domain)
    flow_steps: int = 10  # Euler steps from noise to a chunk


BY_DOMAIN = {  # defaults: of the first entry whose name is in the env id, as "" always is
    "sparse": {"scene": True, "puzzle-3x3": True, "": False},
    "alpha": {
        "cube-single": 30.0,
        "cube-double": 3.0,
        "scene": 1.0,
        "puzzle-3x3": 3.0,
        "puzzle-4x4": 10.0,
        "": 10.0,
    },
}

# ======================================================================================== Networks

Dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
Conv = partial(nn.Conv, kernel_size=(3, 3), kernel_init=nn.initializers.xavier_uniform())


class Encoder(nn.Module):
    """impala_small: pixels become 512 features. Flat observations, and features, pass as are."""

    @nn.compact
    def __call__(self, s):
        if s.ndim == 2:
            return s
        x = s / 255.0
        for channels in (16, 32, 32):
            x = nn.max_pool(Conv(channels)(x), (3, 3), strides=(2, 2), padding="SAME")
            residual = Conv(channels)(nn.relu(x))
            x = x + Conv(channels)(nn.relu(residual))
        return nn.gelu(Dense(512)(nn.relu(x).reshape(len(x), -1)))


class Network(nn.Module):
    """An MLP. With encode=True it gives the features of s, which it later takes in place of s."""

    hidden_dims: tuple[int, ...]
    output_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, s, *inputs, encode=False):
        h = Encoder()(s)
        if encode:
            return h
        x = jnp.concatenate([h, *inputs], axis=-1)
        for dim in self.hidden_dims:
            x = nn.gelu(Dense(dim)(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return Dense(self.output_dim)(x)


class Critic(nn.Module):
    """Critics behind one encoder, as published: Q_k(s, a), or V_k(s), k along the first axis."""

    hidden_dims: tuple[int, ...]
    num_critics: int

    @nn.compact
    def __call__(self, s, *inputs, encode=False):
        h = Encoder()(s)
        if encode:
            return h
        heads = [Network(self.hidden_dims, 1, layer_norm=True) for _ in range(self.num_critics)]
        return jnp.stack([head(h, *inputs)[:, 0] for head in heads])  # [K, B]


def create(args, key, module, *inputs):
    """The train state of a network that takes such inputs."""
    params = module.init(key, *inputs)
    adam = optax.adam(args.learning_rate)
    return TrainState.create(apply_fn=module.apply, params=params, tx=adam)


# ======================================================================================= Algorithm


def descend(state, losses):
    """One Adam step of each network on its own loss, whose value comes with what else to log."""
    new_state = dict(state)
    metrics = {}
    for name, loss in losses.items():
        (value, logs), grads = jax.value_and_grad(loss, has_aux=True)(state[name].params)
        new_state[name] = state[name].apply_gradients(grads=grads)
        metrics[f"{name}_loss"] = value
        metrics |= {f"{name}_{key}": number for key, number in logs.items()}
    return new_state, metrics


def imitation_loss(policy, params, s, a, e, key):
    """Flow matching from noise e at t = 1 to a chunk a at t = 0.

    E (v(s, z_t, t) - (e - a))^2,  z_t = (1-t) a + t e
    """
    h = policy.apply_fn(params, s, encode=True)
    t = jax.random.uniform(key, (len(a), 1))
    z_t = (1 - t) * a + t * e
    v = policy.apply_fn(params, h, z_t, t)
    return jnp.mean((v - (e - a)) ** 2), {}


def decode(args, policy, s, z):
    """The chunk that v makes of noise z: Euler steps of dz/dt = v(s, z, t) to t = 0, clipped."""
    h = policy.apply_fn(policy.params, s, encode=True)

    def step(i, z):
        t = jnp.full_like(z[:, :1], 1 - i / args.flow_steps)
        return z - policy.apply_fn(policy.params, h, z, t) / args.flow_steps

    return jnp.clip(jax.lax.fori_loop(0, args.flow_steps, step, z), -1, 1)


def init(args, key, s):
    """The state before the first update, for observations like s."""
    keys = jax.random.split(key, 3)
    d = args.horizon * args.action_dim
    a = jnp.zeros((1, d))
    t = jnp.zeros((1, 1))
    policy = create(args, keys[0], Network(args.policy_hidden_dims, d), s, a, t)
    critic = create(args, keys[1], Critic(args.critic_hidden_dims, args.num_critics), s, a)
    student = create(args, keys[2], Network(args.policy_hidden_dims, d), s, a)
    return dict(
        policy=policy,
        critic=critic,
        target_critic=critic.params,
        student=student,
    )


def update(args, state, batch, key):
    """The state after one update on a batch, and what to log of it."""
    policy = state["policy"]
    critic = state["critic"]
    student = state["student"]
    s = batch["observations"]  # [B, S]
    a = batch["actions"]  # [B, H*A]
    next_s = batch["next_observations"]
    act_key, prior_key, imitation_key = jax.random.split(key, 3)
    e = jax.random.normal(prior_key, a.shape)

    # y = sum_i gamma^i R_i + gamma^H m mean_k Qbar_k(s', a'),  a' = clip mu(s', e')
    next_a = act(args, state, next_s, act_key)
    next_v = critic.apply_fn(state["target_critic"], next_s, next_a).mean(axis=0)
    y = batch["rewards"] + args.gamma**args.horizon * batch["masks"] * next_v  # [B]

    def policy_loss(params):
        return imitation_loss(policy, params, s, a, e, imitation_key)

    def critic_loss(params):
        """E (Q_k(s, a) - y)^2"""
        q = critic.apply_fn(params, s, a)  # [K, B]
        return jnp.mean((q - y) ** 2), dict(q=q.mean(), q_min=q.min(), q_max=q.max())

    def student_loss(params):
        """alpha E (mu - sg(decode(s, e)))^2 - lambda E Q(s, clip mu),  mu = mu(s, e)

        Q = mean_k Q_k,  lambda = sg(1 / E |Q|)
        """
        mu = student.apply_fn(params, s, e)
        q = critic.apply_fn(critic.params, s, jnp.clip(mu, -1, 1)).mean(axis=0)
        distillation = jnp.mean((mu - sg(decode(args, policy, s, e))) ** 2)
        loss = args.alpha * distillation - sg(1 / jnp.abs(q).mean()) * q.mean()
        return loss, dict(distillation=distillation, q=q.mean())

    losses = dict(
        policy=policy_loss,
        critic=critic_loss,
        student=student_loss,
    )
    state, metrics = descend(state, losses)
    state["target_critic"] = optax.incremental_update(
        state["critic"].params, state["target_critic"], args.tau
    )
    return state, metrics


def act(args, state, s, key):
    """The chunks of actions at observations s, flattened."""
    e = jax.random.normal(key, (len(s), args.horizon * args.action_dim))
    return jnp.clip(state["student"].apply_fn(state["student"].params, s, e), -1, 1)


# ========================================================================================= Dataset

FRAMES = 3  # of pixels that make an observation


def require(holds, message):
    """Ends the run in one line if something does not hold. (A bug keeps its traceback.)"""
    if not holds:
        raise SystemExit(message)


class Chunks(gymnasium.Wrapper):
    """A step plays a chunk of actions, or less if the episode ends. Its reward is their sum."""

    def __init__(self, env, horizon):
        super().__init__(env)
        self.action_space = Box(-1, 1, (horizon * env.action_space.shape[0],))

    def reset(self, *, seed=None, options=None):
        np.random.seed(seed)  # OGBench's mazes draw from NumPy's own stream
        s, _ = self.env.reset(seed=seed, options=options)
        return s, {}

    def step(self, chunk):
        total = 0.0
        for action in chunk.reshape(-1, *self.env.action_space.shape):
            s, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        success = float(info.get("success", np.nan))  # not every environment tells
        episode = info.get("episode", dict(r=0, l=0))  # its return and length, at its end
        outcome = np.array([success, episode["r"], episode["l"]])
        return s, total, terminated, truncated, dict(outcome=outcome)


def make_env(args, film=None):
    """The environment as it is played: chunks of actions in [-1, 1], of pixels the last frames."""
    if "-singletask" in args.env_id:  # OGBench draws with EGL, or need not draw
        is_drawn = args.env_id.startswith("visual-") or args.capture_video
        os.environ.setdefault("MUJOCO_GL", "egl" if is_drawn else "disable")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # OGBench's action boxes warn
    env_id = re.sub("-[a-z]+-singletask", "-singletask", args.env_id)  # without -play or -noisy
    try:
        env = gymnasium.make(env_id, disable_env_checker=True)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise SystemExit(f"--env-id {args.env_id}: {error}")
    for space in (env.action_space, env.observation_space):
        require(isinstance(space, Box), f"--env-id {args.env_id}: {space} is no Box")
    require(env.action_space.is_bounded(), f"--env-id {args.env_id}: its actions have no bounds")
    env = wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    env = wrappers.RecordEpisodeStatistics(env)
    if film:
        env.unwrapped.render_mode = "rgb_array"  # OGBench can, but does not say so
        folder = f"{args.run_dir}/videos"
        env = wrappers.RecordVideo(env, folder, lambda episode: episode == 0, name_prefix=film)
    if len(env.observation_space.shape) == 3:
        is_uint8 = env.observation_space.dtype == np.uint8
        require(is_uint8, f"--env-id {args.env_id}: its images must be uint8")
        height, width, channels = env.observation_space.shape
        stacked = Box(0, 255, (height, width, FRAMES * channels), np.uint8)
        env.observation_space = env.observation_space  # for which OGBench draws an image
        env = wrappers.FrameStackObservation(env, FRAMES)
        env = wrappers.TransformObservation(env, partial(np.concatenate, axis=-1), stacked)
    return Chunks(env, args.horizon)


def find_dataset(args):
    """The path of the dataset. One of OGBench's is downloaded if it is missing."""
    if args.dataset_path:
        return Path(args.dataset_path).expanduser()
    is_ogbench = "-singletask" in args.env_id
    require(is_ogbench, f"--env-id {args.env_id} is not OGBench's: it needs a --dataset-path")
    name = args.env_id.partition("-singletask")[0]
    path = Path(args.dataset_dir, f"{name}-v0.npz").expanduser()
    if not path.exists():
        download(path)
    return path


def download(path):
    """Gets a dataset of OGBench's from its server."""
    url = f"{ogbench.utils.DATASET_URL}/{path.name}"
    hint = "huggingface.co/datasets/zhouzypaul/ogbench_datasets has it too"
    if re.search("(cube|scene|puzzle).*-(play|noisy)", path.name):
        hint += f"; or: python -m benchmark.collect {path.stem}, --dataset-dir ~/.ogbench/collected"
    draft = f"{path}.{os.getpid()}.draft"  # its own: several runs may begin at once
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tqdm(desc=url, unit="B", unit_scale=True) as bar:
            urlretrieve(url, draft, lambda i, size, total: bar.update(size))
    except OSError as error:
        raise SystemExit(f"{path} is missing, and {url} does not give it: {error}; {hint}")
    os.replace(draft, path)


def read_dataset(path):
    """The arrays of an .npz, and what to record of it."""
    try:
        with np.load(path) as file:
            data = dict(file)
            comment = file.zip.comment
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise SystemExit(f"{path} cannot be read ({error}): if it was cut off, delete it")
    known = "observations actions rewards terminals masks qpos qvel button_states"
    unknown = ", ".join(set(data) - set(known.split()))
    require(not unknown, f"{path} holds {unknown}, but what is read is: {known}")
    record = dict(dataset=str(path))
    if comment.startswith(b'{"collected_by"'):
        record["COLLECTED HERE"] = json.loads(comment)
    return data, record


def checked(path, data, name, shape):
    """An array of the dataset in the type that is used: images as they are, numbers as float32."""
    require(name in data, f"{path} has no {name}")
    x = data[name]
    shape = data["observations"].shape[:1] + shape
    dtype = "float32"
    casting = "same_kind"
    if len(shape) == 4:
        dtype = "uint8"
        casting = "no"
    fits = x.shape == shape and np.can_cast(x.dtype, dtype, casting)
    require(fits, f"{path}: {name} must be {dtype} {shape}, but are {x.dtype} {x.shape}")
    return x.astype(dtype, copy=False)


def chunk_starts(terminals, horizon):
    """The rows at which a chunk begins whose actions and last state lie in one trajectory."""
    rows = np.arange(len(terminals))
    ends = np.flatnonzero(terminals)
    own_end = ends[np.searchsorted(ends, rows)]  # the last row of each row's trajectory
    return rows[rows + horizon <= own_end].astype(np.int32)


def relabel(args, env, data):
    """Adds the rewards and masks of the environment's task, by OGBench's rule."""
    ogbench.relabel_utils.relabel_dataset(args.env_id, env, data)
    if args.sparse:
        data["rewards"] = -data["masks"]


def load_dataset(args, env):
    """The arrays of a dataset, and what to record of it.

    A trajectory of T transitions is T+1 rows. Only the last, its final state, has terminals = 1.
    Masks are 0 where the task ended, 1 elsewhere. The reward of row t speaks of the state of row t.
    """
    path = find_dataset(args)
    data, record = read_dataset(path)
    shape = env.observation_space.shape
    if len(shape) == 3:
        shape = (*shape[:2], shape[2] // FRAMES)
    arrays = dict(
        observations=checked(path, data, "observations", shape),
        actions=checked(path, data, "actions", (args.action_dim,)),
        terminals=checked(path, data, "terminals", ()),
    )
    if "rewards" not in data and "qpos" in data and "-singletask" in args.env_id:
        relabel(args, env, data)
    data.setdefault("masks", np.ones_like(arrays["terminals"]))
    arrays["rewards"] = checked(path, data, "rewards", ())
    arrays["masks"] = checked(path, data, "masks", ())

    is_last = arrays["terminals"] != 0
    require(is_last[-1:].all(), f"{path}: the last row must end a trajectory, terminals = 1")
    for name in ("actions", "rewards", "masks"):
        arrays[name][is_last] = 0  # they are not used there, and may be NaN
        require(np.isfinite(arrays[name]).all(), f"{path}: {name} must be finite")
    most = np.abs(arrays["actions"]).max(initial=0)
    require(most <= 1 + 1e-5, f"{path}: actions must lie in [-1, 1], but reach {most}")
    arrays["actions"] = np.clip(arrays["actions"], -1 + 1e-5, 1 - 1e-5)
    arrays["starts"] = chunk_starts(arrays["terminals"], args.horizon)
    is_long = len(arrays["starts"]) > 0
    require(is_long, f"{path}: no trajectory is as long as --horizon {args.horizon}")
    record["trajectories"] = int(is_last.sum())
    record["transitions"] = len(is_last) - record["trajectories"]
    return arrays, record


def observe(data, rows):
    """The observations at these rows: of pixels, the last frames of the trajectory so far."""
    s = data["observations"][rows]
    if s.ndim == 2:
        return s  # [B, S]
    for _ in range(FRAMES - 1):
        is_first = data["terminals"][rows - 1] != 0  # of row 0 too: row -1 is the last row
        rows = jnp.where(is_first, rows, rows - 1)  # the first frame is repeated
        s = jnp.concatenate([data["observations"][rows], s], axis=-1)
    return s  # [B, height, width, FRAMES * channels]


def shift(images, key):
    """Moves each image by up to 3 pixels, its edges repeated; with probability 0.5, none."""
    coin_key, corner_key = jax.random.split(key)
    corners = jax.random.randint(corner_key, (len(images), 2), 0, 7)
    corners = jnp.where(jax.random.bernoulli(coin_key), corners, 3)  # 3: not moved
    padded = jnp.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def sample_batch(args, data, key):
    """Chunks from random rows on. (Published Q-chunking's may cross a trajectory's end, masked.)"""
    draw_key, shift_key = jax.random.split(key)
    i = jax.random.randint(draw_key, (args.batch_size,), 0, len(data["starts"]))
    rows = data["starts"][i]  # [B]
    chunk_rows = rows[:, None] + jnp.arange(args.horizon)  # [B, H]
    discounts = args.gamma ** jnp.arange(args.horizon)
    s = observe(data, rows)
    next_s = observe(data, rows + args.horizon)
    if s.ndim == 4:
        s = shift(s, shift_key)
        next_s = shift(next_s, shift_key)  # alike
    return dict(
        observations=s,
        actions=data["actions"][chunk_rows].reshape(args.batch_size, -1),  # [B, H*A]
        rewards=(data["rewards"][chunk_rows] * discounts).sum(axis=1),  # sum_i gamma^i R_i
        masks=data["masks"][chunk_rows].prod(axis=1),
        next_observations=next_s,
    )


# ====================================================================================== Evaluation

SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what a cluster sends before it kills


def make_keys(args):
    """One key for the initial weights, one for training and one for evaluation."""
    return jax.random.split(jax.random.key(args.seed), 3)


def act_once(args, state, s, step, episode, turn):
    """The chunk at one observation. (In a batch, rounding would depend on the number of cores.)"""
    _, _, key = make_keys(args)
    for number in (step, episode, turn):
        key = jax.random.fold_in(key, number)
    return act(args, state, s[None], key)[0]


def play(args, envs, act_fn, state, step, stop):
    """Success, return and length of each episode. An environment that ends one takes the next."""
    outcomes = np.zeros((args.eval_episodes, 3))
    episodes = np.arange(envs.num_envs)  # that are being played
    turns = np.zeros_like(episodes)  # chunks played of each
    has_ended = np.full(envs.num_envs, True)
    following = envs.num_envs  # the next episode
    while episodes.min() < args.eval_episodes and not stop:
        if has_ended.any():
            seeds = 1000 * args.seed + episodes
            s, _ = envs.reset(seed=seeds.tolist(), options={"reset_mask": has_ended})
        chunks = [act_fn(state, s[i], step, episodes[i], turns[i]) for i in range(envs.num_envs)]
        s, _, terminated, truncated, infos = envs.step(np.stack(chunks))
        turns += 1
        has_ended = terminated | truncated
        for i in np.flatnonzero(has_ended):
            if episodes[i] < args.eval_episodes:
                outcomes[episodes[i]] = infos["outcome"][i]
            episodes[i] = following
            turns[i] = 0
            following += 1
    return outcomes


def evaluate(args, act_fn, state, step, stop):
    """A row of eval.csv, or None if a signal came. One process a core plays."""
    began = time.perf_counter()
    n = min(args.eval_episodes, len(os.sched_getaffinity(0)))
    env_fns = [partial(make_env, args)] * n
    if args.capture_video:
        env_fns[0] = partial(make_env, args, f"step{step}")
    # The processes are born deaf to signals: only this one answers them.
    resource_tracker.ensure_running()  # first, since its start makes signals heard again
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        envs = AsyncVectorEnv(env_fns, context="spawn", autoreset_mode=AutoresetMode.DISABLED)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        outcomes = play(args, envs, act_fn, state, step, stop)
        envs.close()
    finally:
        for process in multiprocessing.active_children():  # which an error has left, still deaf
            process.kill()
    if stop:
        return None
    if not np.isnan(outcomes[:, 0]).all():  # where success is told at all, silence is failure
        outcomes[:, 0] = np.nan_to_num(outcomes[:, 0])
    row = dict(zip(("success", "return", "length"), outcomes.mean(axis=0).tolist()))
    return row | dict(episodes=args.eval_episodes, seconds=time.perf_counter() - began)


# ======================================================================================== Training

SCRIPT = Path(__file__)


def learn(args, n, data, state, step):
    """The state after n updates, each on a batch of its own, and their mean metrics."""
    _, key, _ = make_keys(args)

    def one_update(state, step):
        batch_key, update_key = jax.random.split(jax.random.fold_in(key, step))
        batch = sample_batch(args, data, batch_key)
        return update(args, state, batch, update_key)

    if n == 1:  # pixels on a CPU: in a loop XLA makes their convolutions twenty times slower
        return one_update(state, step)
    state, metrics = jax.lax.scan(one_update, state, step + jnp.arange(n))
    return state, jax.tree.map(jnp.mean, metrics)


def init_state(args, env):
    """The state before the first update."""
    key, _, _ = make_keys(args)
    s = np.zeros((1, *env.observation_space.shape))
    return jax.jit(partial(init, args))(key, s)


def write(path, content):
    """Replaces a file at once, or not at all."""
    Path(f"{path}.draft").write_bytes(content)
    os.replace(f"{path}.draft", path)


def save_state(args, state, step):
    content = dict(state=to_state_dict(jax.device_get(state)), step=step)
    write(Path(args.run_dir, "checkpoint.msgpack"), msgpack_serialize(content))


def load_state(args, fresh):
    """The state at the last checkpoint, which replaces a fresh one, and its step."""
    path = Path(args.run_dir, "checkpoint.msgpack")
    try:
        saved = msgpack_restore(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is no checkpoint that can be read: {error}")
    return jax.device_put(from_state_dict(fresh, saved["state"])), saved["step"]


def add_row(path, row):
    """Adds a row to a table, in place of what a killed run has left of this step and later ones."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    lines = [line for line in lines if int(line.partition(",")[0]) < row["step"]]
    lines.append(",".join(f"{number:.9g}" for number in row.values()))
    write(path, "\n".join([",".join(row), *lines, ""]).encode())


def note_signals():
    """A list that signals join when they come. One more, half a second later, ends the process."""
    noted = []
    times = []

    def note(number, frame):
        noted.append(number)
        times.append(time.monotonic())
        if times[-1] - times[0] > 0.5:  # earlier it is the same signal: `uv run` doubles it
            os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, note)
    return noted


def prepare(args):
    """The arguments with what depends on the domain, and with a directory that is there."""
    for name, by_domain in BY_DOMAIN.items():
        if getattr(args, name) is None:
            fitting = [value for domain, value in by_domain.items() if domain in args.env_id]
            args = replace(args, **{name: fitting[0]})
    if args.run_dir is None:
        now = f"{datetime.now():%Y%m%d-%H%M%S-%f}"  # to the microsecond: no two share it
        args = replace(args, run_dir=f"runs/{args.env_id}__{SCRIPT.stem}__{args.seed}__{now}")
    is_new = not Path(args.run_dir, "args.json").exists()
    require(is_new or args.resume, f"{args.run_dir} holds a run: --resume it, or choose another")
    try:
        os.makedirs(args.run_dir, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--run-dir {args.run_dir} cannot be made: {error}")
    return args


def begin(args, record):
    """Prints what is run and writes it to args.json. Returns its run on W&B, if it is tracked."""
    record = record | {name: version(name) for name in ("jax", "ogbench", "mujoco")}
    record |= dict(python=platform.python_version(), device=jax.devices()[0].device_kind)
    tracker = None
    if args.track:
        import wandb

        settings = dict(project="latent-policy-steering", name=args.run_dir, dir=args.run_dir)
        settings |= dict(id=args.wandb_id, resume="allow", config=vars(args) | record)
        try:
            tracker = wandb.init(**settings)
        except wandb.Error as error:
            raise SystemExit(f"--track: {error}")
        args = replace(args, wandb_id=tracker.id)
    print(f"{args.env_id}, sparse: {args.sparse}, to {args.run_dir}")
    print(*(f"{name}: {value}" for name, value in record.items()), sep="\n")
    record = dict(script=SCRIPT.stem) | vars(args) | record
    write(Path(args.run_dir, SCRIPT.name), SCRIPT.read_bytes())
    write(Path(args.run_dir, "args.json"), json.dumps(record, indent=2).encode())
    return tracker


def train(args):
    """A run from its first update or its last checkpoint on, to its end or to a signal."""
    args = prepare(args)

    # --- Load ---
    env = make_env(args)
    args = replace(args, action_dim=env.action_space.shape[0] // args.horizon)
    data, record = load_dataset(args, env)
    state = init_state(args, env)
    step = 0
    if args.resume:
        check_dataset(args, record)
        if Path(args.run_dir, "checkpoint.msgpack").exists():
            state, step = load_state(args, state)
    env.close()

    # --- Record ---
    n = 100  # updates in a call of learn_fn, which gives the means of what they log
    if len(env.observation_space.shape) == 3:
        n = 1 if jax.default_backend() == "cpu" else 10
    for name in ("total_steps", "log_interval", "eval_interval"):
        args = replace(args, **{name: math.ceil(getattr(args, name) / n) * n})
    print(f"updates in a call: {n}; the total and the intervals are rounded up to multiples of it")
    tracker = begin(args, record)

    # --- Compile ---
    data = jax.device_put(data)
    learn_fn = jax.jit(partial(learn, args, n), donate_argnums=1)
    learn_fn = learn_fn.lower(data, state, step).compile()
    act_fn = jax.jit(partial(act_once, args))

    def is_due(interval):
        is_start_or_end = step == 0 or step >= args.total_steps
        return is_start_or_end or (interval > 0 and step % interval < n)

    def log(name, row):
        add_row(Path(args.run_dir, f"{name}.csv"), dict(step=step, seed=args.seed) | row)
        if tracker:
            tracker.log({f"{name}/{key}": number for key, number in row.items()}, step=step)

    bar = tqdm(total=args.total_steps, initial=step, unit=" updates", mininterval=1)
    stop = note_signals()
    while True:
        # --- Evaluate ---
        if is_due(args.eval_interval) and not stop:
            save_state(args, state, step)
            if args.eval_episodes:
                row = evaluate(args, act_fn, state, step, stop)
                if row:
                    log("eval", row)
                    bar.set_postfix(success=row["success"])
        if stop or step >= args.total_steps:
            break

        # --- Learn ---
        began = time.perf_counter()
        state, metrics = learn_fn(data, state, step)
        metrics = jax.tree.map(float, jax.device_get(metrics))
        rate = n / (time.perf_counter() - began)
        step += n
        bar.update(n)

        # --- Log ---
        bad = [name for name, number in metrics.items() if not np.isfinite(number)]
        if bad:
            bar.close()
            raise SystemExit(f"not finite at update {step}: {', '.join(bad)}; no checkpoint has it")
        if is_due(args.log_interval):
            log("train", dict(updates_per_second=rate) | metrics)
    bar.close()
    if stop:
        save_state(args, state, step)
        print(f"stopped after update {step}: --resume --run-dir {args.run_dir} goes on")
        raise SystemExit(128 + stop[0])


# ============================================================================================ main


def read_record(args):
    """What args.json says of the run in --run-dir."""
    path = Path(args.run_dir or "", "args.json")
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"--run-dir {args.run_dir} holds no run: {error}")
    script = record.get("script")
    require(script == SCRIPT.stem, f"--run-dir {args.run_dir} holds a run of {script}.py")
    return record


def check_dataset(args, record):
    """A run goes on with the dataset that it began with."""
    before = read_record(args)["transitions"]
    is_same = record["transitions"] == before
    require(is_same, f"{record['dataset']} is not what the run began with: {before} transitions")


def saved_args(args):
    """The arguments of the run in --run-dir. The command line may change some of them."""
    record = read_record(args)
    saved = {name: x for name, x in record.items() if name in vars(args)}
    saved |= {name: tuple(x) for name, x in saved.items() if isinstance(x, list)}
    args = tyro.cli(type(args), default=type(args)(**saved))
    free = {"total_steps", "log_interval", "eval_interval", "eval_episodes", "run_dir"}
    free |= {"capture_video", "track", "resume"}
    changed = {name for name in saved.keys() - free if vars(args)[name] != saved[name]}
    is_same = args.eval_only or not changed
    require(is_same, f"the run in {args.run_dir} has another {', '.join(sorted(changed))}")
    return args


def evaluate_only(args):
    """Prints what an evaluation of the last checkpoint says, as a line of JSON."""
    require(args.eval_episodes > 0, "--eval-only needs --eval-episodes")
    state, step = load_state(args, init_state(args, make_env(args)))
    stop = note_signals()
    row = evaluate(args, jax.jit(partial(act_once, args)), state, step, stop)
    if stop:
        raise SystemExit(128 + stop[0])
    line = json.dumps(dict(step=step, seed=args.seed) | row)
    print(line.replace("NaN", "null"))  # JSON has no NaN


def main(args_class=Args):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save, it just ends
    args = tyro.cli(args_class, description=__doc__.partition("\n")[0])
    if args.resume or args.eval_only:
        args = saved_args(args)
    if args.eval_only:
        evaluate_only(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
