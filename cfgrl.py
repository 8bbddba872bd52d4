"""CFGRL, classifier-free guidance as policy improvement: offline RL in one file. Paper: arXiv 2505.23458.

No network climbs a critic here. A flow policy v imitates the data twice: all of them (o = 0), and only the chunks that
are better than expected (o = 1), by a critic Q and an expectile V of it. Acting extrapolates from the first to the
second by the guidance weight w: w = 0 is imitation, w = 1 imitation of the better chunks, beyond 1 is improvement.

    policy   min_v   E o |v(s, x_t, t, 1) - (a - x0)|^2 + 0.1 |v(s, x_t, t, 0) - (a - x0)|^2    imitates (flow matching)
             with    o = 1[min_k Qbar_k(s, a) > V(s)]
    critic   min_Q   E (Q(s, a) - y)^2,  y = sum_i gamma^i r_i + gamma^H m V(s')
    value    min_V   E |tau - 1[u < 0]| u^2,  u = min_k Qbar_k(s, a) - V(s),  tau = 0.9
    acting           dx/dt = v_0 + w (v_1 - v_0)                                                improves

    diff qc_fql.py cfgrl.py  # guidance instead of a student: no gradient of a critic reaches a policy
"""

import difflib
import fcntl
import hashlib
import http.client
import json
import mmap
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cloudpickle
import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# ================================================================================================================ Args


@dataclass
class Args:
    env_id: str = "cube-single-play-singletask-v0"
    """an OGBench single-task id, or any Gymnasium id (module:Name-v0 too) together with --dataset-path"""
    dataset_dir: Path = Path("~/.ogbench/data")
    """where OGBench datasets lie; a missing one is downloaded to it"""
    dataset_path: Path | None = None
    """one .npz of your own, or a folder of them"""
    dataset_on_host: bool = False
    """unpack the observations into a file beside the dataset and map that into memory, for data larger than memory"""
    sparse: bool | None = None
    """True: OGBench's rewards are -1 until the task is solved, then 0 (default: for scene and puzzle-3x3)"""
    seed: int = 0
    """the first seed"""
    num_seeds: int = 1
    """n: seeds seed ... seed+n-1 are trained in one process"""
    total_steps: int = 1_000_000
    """updates"""
    batch_size: int = 256
    """chunks in a batch"""
    learning_rate: float = 3e-4
    """of Adam, for every network"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """rate at which the target critics follow the critics"""
    horizon: int = 5
    """actions in a chunk"""
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)
    """layer widths of the policy"""
    critic_hidden_dims: tuple[int, ...] = (256, 256, 256, 256)
    """layer widths of the critics"""
    log_interval: int = 5_000
    """updates between rows of train.csv; 0: only at the end"""
    eval_interval: int = 100_000
    """updates between evaluations, each with a checkpoint; 0: only at the end"""
    eval_episodes: int = 50
    """episodes per evaluation and seed; 0: never evaluate"""
    run_dir: Path | None = None
    """everything the run writes (default: runs/{env_id}__{exp_name}__{seed}__{time})"""
    resume: bool = False
    """go on from the last checkpoint in --run-dir, with that run's arguments; it may be given more --total-steps"""
    eval_only: bool = False
    """evaluate the checkpoint in --run-dir and print the result; train and write nothing"""
    capture_video: bool = False
    """film each seed's first episode of every evaluation, to {run_dir}/videos"""
    track: bool = False
    """log to Weights & Biases too (honours WANDB_MODE)"""

    # the algorithm's own
    expectile: float = 0.9
    """V is this expectile of Q over the data's chunks"""
    guidance: float = 1.5
    """w: 0 imitates, 1 imitates the better chunks, more extrapolates"""
    flow_steps: int = 10
    """Euler steps from noise to a chunk, if the policy is a flow"""


DOMAIN_DEFAULTS = dict(
    sparse={"scene": True, "puzzle-3x3": True, "other": False},
)

# ============================================================================================================= Dataset

OGBENCH_ID = re.compile(r"((?:visual-)?(?:cube-\w+|scene|puzzle-\dx\d))-(play|noisy)-singletask((?:-task\d)?)-v0")
OGBENCH_URL = "https://rail.eecs.berkeley.edu/datasets/ogbench"
ARRAYS = ("observations", "actions", "rewards", "terminals", "masks", "qpos", "button_states")  # what is read of a file
FRAMES = 3  # that make one observation of pixels


def fail(message):
    raise SystemExit("error: " + " ".join(message.split()))


@contextmanager
def replacing(path):
    """A file that takes path's place once it is complete: nobody ever finds half of it there. What processes that were
    killed have left of theirs is removed."""
    for left in path.parent.glob(f".{path.name}.*.partial"):
        with suppress(OSError), open(left) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    draft = path.with_name(f".{path.name}.{os.urandom(8).hex()}.partial")
    try:
        with open(draft, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def make_env(env_id, film=False):
    """The environment, its actions in [-1, 1]. The workers of an evaluation call this: no JAX in here."""
    name, settings = env_id, dict(render_mode="rgb_array") if film else {}  # OGBench's render unasked
    renders = film or env_id.startswith("visual-")
    if match := OGBENCH_ID.fullmatch(env_id):
        os.environ.setdefault("MUJOCO_GL", "egl" if renders else "disable")
        name = f"{match[1]}-singletask{match[3]}-v0"
        settings = dict(success_timing="pre")  # OGBench 1.2: r_t and success speak of s_t, as in its datasets
    warnings.filterwarnings("ignore", ".*precision lowered by casting")  # OGBench's action space
    try:
        import ogbench  # noqa: F401  registers its environments

        env = gymnasium.make(name, disable_env_checker=True, **settings)
        if renders:  # a renderer that cannot start shows it here
            env.reset(seed=0)
            if env.render() is None:
                raise ValueError("render() returns nothing")
        if film:
            import imageio_ffmpeg  # noqa: F401
    except Exception as error:  # whatever an environment can raise
        if renders and not isinstance(error, gymnasium.error.Error):
            way_out = (f"; install what MUJOCO_GL={os.environ.get('MUJOCO_GL')} needs, "
                       "or set MUJOCO_GL to egl (a GPU, or Mesa's libEGL) or osmesa")
            fail(f"{env_id} cannot render: {error}{way_out * bool(match)}")
        kinds = ("-play-singletask", "-noisy-singletask")
        ids = [id.replace("-singletask", kind) for kind in kinds for id in gymnasium.registry]
        near = difflib.get_close_matches(env_id, filter(OGBENCH_ID.fullmatch, ids), 5, 0)
        fail(f"cannot make the environment {env_id}: {error}; near: {', '.join(near)}")
    for space, ranks in (env.observation_space, (1, 3)), (env.action_space, (1,)):
        rank = len(space.shape) if isinstance(space, gymnasium.spaces.Box) else None
        if rank not in ranks or (rank == 3 and space.dtype != np.uint8):
            fail(f"{env_id}: observations must be a flat box or uint8 images, actions a flat box, but one is {space}")
    if not env.action_space.is_bounded():
        fail(f"{env_id}: actions must be bounded, but are {env.action_space}")
    if (env.action_space.low != -1).any() or (env.action_space.high != 1).any():
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return env


def find_dataset(args):
    """The path of the dataset, downloaded if need be."""
    if args.dataset_path is not None:
        return Path(os.path.expanduser(args.dataset_path))
    match = OGBENCH_ID.fullmatch(args.env_id)
    if not match:
        fail(f"{args.env_id} is not an OGBench single-task id: name its dataset with --dataset-path")
    name = f"{match[1]}-{match[2]}-v0"
    path, url = Path(os.path.expanduser(args.dataset_dir), f"{name}.npz"), f"{OGBENCH_URL}/{name}.npz"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(url, timeout=30) as response, replacing(path) as file:
                with tqdm.wrapattr(file, "write", total=response.length, desc=url) as sink:
                    shutil.copyfileobj(response, sink)
                if response.length:
                    raise OSError(f"cut off {response.length} bytes before the end")
    except (OSError, http.client.HTTPException) as error:
        fail(f"no {path}, and no download ({error}): fetch {url} or run python benchmark/collect.py {name}")
    return path


def free_memory():
    """Bytes that are free, on the host and, if that is another, on the device."""
    free = [1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])]
    group = Path("/sys/fs/cgroup", Path("/proc/self/cgroup").read_text().splitlines()[-1].split(":", 2)[2].lstrip("/"))
    for folder in (group, *group.parents):  # a container's limit, or a cluster's
        with suppress(OSError, ValueError, TypeError):  # it has none
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
            free.append(limit - used + int(cached[1]))
    if stats := jax.local_devices()[0].memory_stats():
        free.append(stats["bytes_limit"] - stats["bytes_in_use"])
    return min(free)


@contextmanager
def open_npz(path, kind="dataset"):
    """An .npz file; nothing in it is ever unpickled."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file
    except Exception as error:  # whatever a damaged file can raise
        fail(f"cannot read the {kind} {path}: {str(error) or repr(error)}")


def header(source):
    """An empty array of the shape and dtype that an .npy begins with; it takes no memory."""
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = read[np.lib.format.read_magic(source)[0]](source)
    if fortran_order and len(shape) > 1:
        raise ValueError("its observations must be stored in C order")
    return np.broadcast_to(np.empty((), dtype), shape)


@np.errstate(over="ignore")  # what float32 cannot hold is infinity then
def load_part(args, env, path):
    """What one file holds, checked; of the observations only their shape and dtype."""
    with open_npz(path) as file:
        data = {key: np.asarray(file[key]) for key in ARRAYS[1:] if key in file}
        if "observations" in file:
            with file.zip.open("observations.npy") as source:
                data["observations"] = header(source)
    length = len(np.atleast_1d(data.get("observations", 0)))
    if "rewards" not in data and "qpos" in data and OGBENCH_ID.fullmatch(args.env_id):
        from ogbench.relabel_utils import relabel_dataset

        try:
            if data["qpos"].shape != (length, len(env.unwrapped.data.qpos)) or not np.isfinite(data["qpos"]).all():
                raise ValueError(f"qpos is {data['qpos'].dtype} {data['qpos'].shape}, or NaN")
            relabel_dataset(env.spec.id, env, data)
        except Exception as error:  # whatever arrays that do not fit can raise
            fail(f"{path} is not a dataset of {args.env_id}: {error!r}")
        until = "until solved (sparse)" if args.sparse else "per unsolved part"
        data["rule"] = f"OGBench 1.2 (r_t speaks of s_t), -1 {until}"
        if args.sparse:
            data["rewards"] = (data["masks"] == 0) - 1.0
    data.setdefault("masks", np.ones(length))
    shapes = dict(observations=env.observation_space.shape, terminals=(), actions=env.action_space.shape)
    for key, shape in (shapes | dict(rewards=(), masks=())).items():
        if key not in data:
            fail(f"{path} has no {key}")
        if data[key].shape != (length, *shape) or data[key].dtype.kind not in "fiub":
            fail(f"{path}: {key} must be numbers {(length, *shape)}, but are {data[key].dtype} {data[key].shape}")
        if len(shape) == 3 and data[key].dtype != np.uint8:
            fail(f"{path}: images must be uint8, but {key} are {data[key].dtype}")
        if key != "observations":
            data[key] = data[key].astype(np.float32, copy=False)
            if not np.isfinite(data[key] if key == "terminals" else data[key][data["terminals"] == 0]).all():
                fail(f"{path}: {key} hold NaN or infinity")
    if length == 0 or data["terminals"][-1] == 0:
        fail(f"{path}: terminals must be 1 in the last row of every trajectory, and are not in the very last")
    return {key: x for key, x in data.items() if key not in ("qpos", "button_states")}


@np.errstate(over="ignore")
def load_observations(args, path, files, fingerprint, shape):
    """The observations of all files as one array, never twice in memory: pixels as uint8, others as float32."""
    dtype = np.dtype(np.uint8 if len(shape) == 4 else np.float32)
    size, found = int(np.prod(shape)) * dtype.itemsize, 0
    unpacked = path.resolve().with_name(f"{path.resolve().name}.{fingerprint}.observations")
    if not (args.dataset_on_host and unpacked.exists() and unpacked.stat().st_size == size):
        # Memory of its own pages is aligned so that JAX on a CPU takes it as it is.
        sink = replacing(unpacked) if args.dataset_on_host else nullcontext(mmap.mmap(-1, size))
        with tqdm(total=size, desc="observations", unit="B", unit_scale=True, delay=3) as bar, sink as memory:
            for name in files:
                with open_npz(name) as file, file.zip.open("observations.npy") as source:
                    stored = header(source).dtype
                    while piece := source.read(2**24):
                        piece = np.frombuffer(piece, stored).astype(dtype, copy=False)
                        if not np.isfinite(piece).all():
                            fail(f"{name}: observations hold NaN or infinity")
                        found += memory.write(piece)
                        bar.update(piece.nbytes)
            if found != size:
                fail(f"{path}: observations are {found} bytes, not {size}")
    if args.dataset_on_host:
        return np.memmap(unpacked, dtype, "r", shape=shape)
    return np.frombuffer(memory, dtype).reshape(shape)


def load_dataset(args, env):
    """The arrays observations, actions, rewards, masks and starts, and the facts to print and keep. A file is in
    OGBench's compact form: a trajectory of T transitions is T+1 rows, the last of them marked by terminals."""
    path = find_dataset(args)
    files = sorted(x for x in path.glob("*.npz") if not x.stem.endswith("-val")) if path.is_dir() else [path]
    items, mark = [], ""
    for name in files:
        with open_npz(name) as file:
            items += file.zip.infolist()
            mark = file.zip.comment.decode()
    size = sum(item.file_size for item in items if item.filename[:-4] in ARRAYS[args.dataset_on_host :])
    fingerprint = hashlib.sha256(repr([(item.filename, item.CRC) for item in items]).encode()).hexdigest()[:16]
    more = 1 if len(env.observation_space.shape) == 1 else 3
    if size + more * 1e9 > (free := free_memory()):
        fail(f"{path} takes {size / 1e9:.1f} GB and training about {more}, but {free / 1e9:.1f} are free"
             + "; --dataset-on-host leaves its observations on the disk" * (not args.dataset_on_host))
    parts = [load_part(args, env, name) for name in files]
    if not parts:
        fail(f"{path} holds no .npz")
    data = {key: np.concatenate([part[key] for part in parts]) for key in ("actions", "rewards", "masks", "terminals")}
    inner = data["terminals"] == 0
    actions, rewards, masks = (data[key][inner] for key in ("actions", "rewards", "masks"))
    if np.abs(actions).max(initial=0) > 1 + 1e-5:
        fail(f"{path}: actions must lie in [-1, 1], but reach {np.abs(actions).max():.3g}")
    ends, t = np.flatnonzero(~inner), np.arange(len(inner))
    starts = t[t + args.horizon <= ends[np.searchsorted(ends, t)]]  # H actions and s_t+H within one trajectory
    firsts = np.append(0, ends + 1)[np.searchsorted(ends, starts)]  # where those trajectories begin
    if len(starts) == 0:
        fail(f"{path}: no trajectory is as long as a chunk, --horizon {args.horizon}")
    if rewards.min() == rewards.max():
        print(f"warning: every reward is {rewards.min()}, there is nothing to improve", file=sys.stderr)
    observations = load_observations(args, path, files, fingerprint, (len(t), *env.observation_space.shape))
    facts = dict(path=str(path), bytes=sum(name.stat().st_size for name in files), mark=mark,
                 rewards=parts[0].get("rule", "as in the file"), fingerprint=fingerprint,
                 transitions=len(rewards), trajectories=len(ends), chunks=len(starts),
                 reward_range=[float(rewards.min()), float(rewards.max())], terminal_share=float((masks == 0).mean()))
    return dict(observations=observations, rewards=data["rewards"], masks=data["masks"],
                actions=np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5), starts=starts.astype(np.int32),
                firsts=firsts.astype(np.int32)), facts


def stacked(shape):
    """The shape of what a network sees of observations of a shape."""
    return shape if len(shape) == 1 else (*shape[:2], FRAMES * shape[2])


def observe(observations, t, first):
    """s_t: row t, or of pixels the rows t-2, t-1, t in the channels, where row first stands for all before it."""
    if observations.ndim == 2:
        return observations[t]
    frames = observations[jnp.maximum(t[:, None] + jnp.arange(1 - FRAMES, 1), first[:, None])]
    return jnp.moveaxis(frames, 1, 3).reshape(len(t), *stacked(observations.shape[1:]))


def shift(images, key):
    """With probability 0.5 each image of the batch is moved, by up to 3 pixels, its edges repeated."""
    corner = jax.random.randint(key, (len(images), 2), 0, 7)
    corner = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1)), corner, 3)
    padded = jnp.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    return jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (*at, 0), images.shape[1:]))(padded, corner)


def draw_chunks(args, chunks, key):
    """The numbers of the chunks in a batch."""
    return jax.random.randint(key, (args.batch_size,), 0, chunks)


def windows(args, data, i):
    """The rows that the chunks i need, in NumPy, as a small dataset for each batch in i: its chunks are 0, 1, 2, ..."""
    t, first = data["starts"][i][..., None], data["firsts"][i][..., None]
    rows = np.maximum(t + np.arange(1 - FRAMES, args.horizon + 1), first)
    small = {key: data[key][rows.reshape(*i.shape[:-1], -1)] for key in ("observations", "actions", "rewards", "masks")}
    firsts = np.broadcast_to(np.arange(i.shape[-1], dtype=np.int32) * rows.shape[-1], i.shape)
    return small | dict(starts=firsts + np.int32(FRAMES - 1), firsts=firsts)


def sample_batch(args, data, i, key):
    """The chunks i, starting at t: s_t, a_t:t+H, sum_i gamma^i r_t+i, prod_i m_t+i, s_t+H. (Published Q-chunking also
    draws chunks that cross the end of a trajectory, and masks what lies beyond it.)"""
    t, first = data["starts"][i], data["firsts"][i]
    rows = t[:, None] + jnp.arange(args.horizon)
    s, next_s = (observe(data["observations"], t, first) for t in (t, t + args.horizon))
    if s.ndim > 2:
        s, next_s = (shift(x, jax.random.fold_in(key, 1)) for x in (s, next_s))  # both alike
    return dict(observations=s,
                actions=data["actions"][rows].reshape(args.batch_size, -1),
                rewards=(data["rewards"][rows] * args.gamma ** jnp.arange(args.horizon)).sum(axis=1),
                masks=data["masks"][rows].prod(axis=1),
                next_observations=next_s)


# ============================================================================================================ Networks


def init_mlp(key, dims, layer_norm=False):
    """Layers from dims[0] inputs to dims[-1] outputs."""
    uniform = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
    layers = [dict(w=uniform(k, shape), b=jnp.zeros(shape[1]))
              for k, shape in zip(jax.random.split(key, len(dims) - 1), zip(dims, dims[1:]))]
    for layer in layers[:-1] if layer_norm else ():
        layer |= dict(scale=jnp.ones_like(layer["b"]), shift=jnp.zeros_like(layer["b"]))
    return layers


def mlp(layers, *inputs):
    x = jnp.concatenate(inputs, axis=-1)
    for layer in layers[:-1]:
        x = jax.nn.gelu(x @ layer["w"] + layer["b"])
        if "scale" in layer:
            x = jax.nn.standardize(x, epsilon=1e-6) * layer["scale"] + layer["shift"]
    return x @ layers[-1]["w"] + layers[-1]["b"]


def init_encoder(key, height, width, channels):
    """impala_small: three stacks of 16, 32 and 32 channels, each with a residual block, then 512 features."""
    uniform, stacks = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), []
    for n in (16, 32, 32):
        key, *keys = jax.random.split(key, 4)
        stacks.append([dict(w=uniform(k, (3, 3, m, n)), b=jnp.zeros(n)) for k, m in zip(keys, (channels, n, n))])
        height, width, channels = -(-height // 2), -(-width // 2), n
    return dict(stacks=stacks, dense=init_mlp(key, (height * width * channels, 512)))


def init_network(key, s_shape, dims, layer_norm=False):
    """An MLP of an observation and of dims[0] other inputs; pixels reach it through an encoder of its own."""
    if len(s_shape) == 1:
        return dict(mlp=init_mlp(key, (s_shape[0] + dims[0], *dims[1:]), layer_norm))
    keys = jax.random.split(key)
    return init_encoder(keys[0], *s_shape) | dict(mlp=init_mlp(keys[1], (512 + dims[0], *dims[1:]), layer_norm))


def encode(network, s):
    """What a network's MLP gets to see of s: flat observations as they are, features of pixels."""
    if "stacks" not in network:
        return s
    conv = lambda x, p: p["b"] + jax.lax.conv_general_dilated(
        x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = s.reshape(-1, *s.shape[-3:]) / 255.0
    for first, second, third in network["stacks"]:
        x = jax.lax.reduce_window(conv(x, first), -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
        x = x + conv(jax.nn.relu(conv(jax.nn.relu(x), second)), third)
    return jax.nn.gelu(mlp(network["dense"], jax.nn.relu(x).reshape(*s.shape[:-3], -1)))


def apply(network, s, *inputs):
    return mlp(network["mlp"], encode(network, s), *inputs)


def init_critics(args, key, s_shape, d):
    """Two critics, as published behind one encoder."""
    first, second = (init_network(k, s_shape, (d, *args.critic_hidden_dims, 1), True) for k in jax.random.split(key))
    return first | dict(mlp=[first["mlp"], second["mlp"]])


def q_values(critics, s, a):
    """Q_k(s, a), the critics k along the first axis."""
    s = encode(critics, s)
    return jnp.stack([mlp(critic, s, a)[..., 0] for critic in critics["mlp"]])


# =========================================================================================================== Algorithm


class State(NamedTuple):
    params: dict
    target: dict | None  # the tau-average of the critics
    opt_state: tuple


def descend(args, state, losses):
    """One Adam step of each network on its own loss; then the targets follow the critics at rate tau."""
    grads, metrics = {}, {}
    for name, loss in losses.items():
        (value, more), grads[name] = jax.value_and_grad(loss, has_aux=True)(state.params[name])
        metrics |= {f"{name}_loss": value} | {f"{name}_{key}": x for key, x in more.items()}
    steps, opt_state = optax.adam(args.learning_rate).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, steps)
    target = jax.tree.map(lambda x, y: (1 - args.tau) * x + args.tau * y, state.target, params.get("critics"))
    return State(params, target, opt_state), metrics


def td_target(args, batch, next_v):
    """y = sum_i gamma^i r_i + gamma^H m V(s'), V(s') = agg_k Qbar_k(s', a') or a network's."""
    return batch["rewards"] + args.gamma**args.horizon * batch["masks"] * next_v


def critic_loss(critics, s, a, y):
    q = q_values(critics, s, a)
    return jnp.mean((q - y) ** 2), dict(q=q.mean())


def flow_matching_loss(v, s, a, x0, key, weight=1.0):
    """x_t = (1 - t) x0 + t a; v(s, x_t, t) predicts a - x0."""
    t = jax.random.uniform(key, (len(a), 1))
    return jnp.mean(weight * (v(s, (1 - t) * x0 + t * a, t) - (a - x0)) ** 2), {}


def euler(v, s, x0, steps):
    """dx/dt = v(s, x, t) from t = 0 to t = 1."""
    return jax.lax.fori_loop(0, steps, lambda i, x: x + v(s, x, jnp.full_like(x[..., :1], i / steps)) / steps, x0)


def velocity(policy, o):
    """v(s, x, t, o) as a function of s, x and t: o = 1 for chunks better than expected, o = 0 for all."""
    return lambda s, x, t: mlp(policy["mlp"], s, x, t, jnp.full_like(t, o))


def guided_loss(policy, s, a, x0, o, key):
    """o-weighted conditional loss + 0.1 times the unconditional one."""
    s = encode(policy, s)
    conditional, _ = flow_matching_loss(velocity(policy, 1), s, a, x0, key, o[:, None])
    unconditional, _ = flow_matching_loss(velocity(policy, 0), s, a, x0, key)
    return conditional + 0.1 * unconditional, dict(better=o.mean())


def expectile_loss(args, value, s, q):
    """|tau - 1[u < 0]| u^2, u = Q - V(s)."""
    v = apply(value, s)[..., 0]
    u = q - v
    return jnp.mean(jnp.abs(args.expectile - (u < 0)) * u**2), dict(v=v.mean())


def init(args, key, s_shape, a_dim):
    """The state before the first update."""
    d, keys = args.horizon * a_dim, jax.random.split(key, 4)
    params = dict(
        policy=init_network(keys[0], s_shape, (d + 2, *args.actor_hidden_dims, d)),
        critics=init_critics(args, keys[1], s_shape, d),
        value=init_network(keys[2], s_shape, (0, *args.critic_hidden_dims, 1), layer_norm=True))
    return State(params, params["critics"], optax.adam(args.learning_rate).init(params))


def update(args, state, batch, key):
    """The state after one update, and what to log of it."""
    s, a, next_s = batch["observations"], batch["actions"], batch["next_observations"]
    prior_key, time_key = jax.random.split(key)
    y = td_target(args, batch, apply(state.params["value"], next_s)[..., 0])
    q = q_values(state.target, s, a).min(axis=0)
    o = (q > apply(state.params["value"], s)[..., 0]).astype(jnp.float32)
    x0 = jax.random.normal(prior_key, a.shape)
    return descend(args, state, dict(
        policy=lambda policy: guided_loss(policy, s, a, x0, o, time_key),
        critics=lambda critics: critic_loss(critics, s, a, y),
        value=lambda value: expectile_loss(args, value, s, q)))


def act(args, state, s, key):
    """The chunk of actions at s, flattened. The key is for methods that act with noise."""
    policy = state.params["policy"]
    all_data, better = velocity(policy, 0), velocity(policy, 1)
    # v_0 + w (v_1 - v_0)
    guided = lambda s, x, t: (1 - args.guidance) * all_data(s, x, t) + args.guidance * better(s, x, t)
    s = encode(policy, s)
    x0 = jax.random.normal(key, s.shape[:-1] + policy["mlp"][-1]["b"].shape)
    return jnp.clip(euler(guided, s, x0, args.flow_steps), -1, 1)


# ========================================================================================================== Evaluation


PATIENCE = 600  # seconds for an environment to start, or to play a chunk


class Episodes(gymnasium.Wrapper):
    """Plays one episode after another, each reset with a seed of its own. A step executes a whole chunk open loop; its
    info says how the episode went, if it ended. Lives in a worker process: no JAX in here."""

    def __init__(self, env_id, horizon, seeds, film):
        if parent := multiprocessing.parent_process():  # a worker: Ctrl-C reaches it too, but the parent decides
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # and it outlives none
        super().__init__(make_env(env_id, film is not None))
        self.seeds, self.film = iter(seeds), film
        self.action_space = gymnasium.spaces.Box(-1, 1, (horizon * self.env.action_space.shape[0],))
        shape, dtype = self.env.observation_space.shape, self.env.observation_space.dtype
        self.observation_space = gymnasium.spaces.Box(0, 255, stacked(shape), dtype)

    def reset(self, **_):
        self.seed = next(self.seeds, None)
        if self.seed is None:  # this worker has played all its episodes
            self.env.close()
        else:
            observation, _ = self.env.reset(seed=self.seed)
            self.seen = FRAMES * [observation]
            self.rewards, self.frames = [], [self.env.render()] if self.film else []
        return self.observe(), {}

    def observe(self):
        return np.concatenate(self.seen, axis=-1) if self.seen[0].ndim > 1 else self.seen[-1]

    def step(self, chunk):
        outcome = {}
        for action in chunk.reshape(-1, *self.env.action_space.shape) if self.seed is not None else ():
            observation, reward, terminated, truncated, info = self.env.step(action)
            self.seen = [*self.seen[1:], observation]
            self.rewards.append(reward)
            if self.film:
                self.frames.append(self.env.render())
            if terminated or truncated:
                success = float(info.get("success", np.nan))
                outcome["outcome"] = np.array([success, sum(self.rewards), len(self.rewards)])
                if self.film:
                    import imageio

                    self.film.parent.mkdir(exist_ok=True)
                    imageio.mimwrite(self.film, self.frames, fps=20, macro_block_size=2)
                    self.film = None
                self.reset()
                break
        return self.observe(), 0.0, False, False, outcome


def make_policy(args):
    """act for all seeds and environments, compiled. A chunk's noise follows from seed, episode and its number there."""

    def act_once(state, key, observation, episode, chunk):
        return act(args, state, observation, jax.random.fold_in(jax.random.fold_in(key, episode), chunk))

    return jax.jit(jax.vmap(jax.vmap(act_once, (None, None, 0, 0, 0))))


def evaluate(args, policy, state, keys, step, caught=()):
    """Plays --eval-episodes episodes of every seed, all seeds together. Returns the rows of eval.csv, one a seed, or
    none once a signal is caught. Each worker is dealt its episodes beforehand, so that no short one is favoured."""
    began, seeds = time.perf_counter(), range(args.seed, args.seed + args.num_seeds)
    per_seed = min(args.eval_episodes, -(-len(os.sched_getaffinity(0)) // args.num_seeds))  # a worker a core
    films = args.run_dir.absolute() / "videos"
    jobs = [partial(Episodes, args.env_id, args.horizon,
                    range(100_000 * seed + first, 100_000 * seed + args.eval_episodes, per_seed),
                    films / f"step{step}_seed{seed}.mp4" if args.capture_video and first == 0 else None)
            for seed in seeds for first in range(per_seed)]
    # Workers get Episodes by value and see no main module: else they would import this file, and JAX with it.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    no_main = mock.patch.multiple(sys.modules["__main__"], create=True, __spec__=None, __file__=None)
    episode, chunk = np.tile(np.arange(per_seed), args.num_seeds), np.zeros(len(jobs), int)
    outcomes, envs = np.full((args.num_seeds, args.eval_episodes, 3), np.nan), None
    too_long = threading.Timer(PATIENCE, lambda: [process.kill() for process in multiprocessing.active_children()])
    too_long.start()
    try:
        with no_main:
            envs = gymnasium.vector.AsyncVectorEnv(jobs, context="spawn")
        envs.error_queue.get = partial(envs.error_queue.get, timeout=10)  # an error that cannot be pickled never comes
        observations, _ = envs.reset()
        too_long.cancel()
        while np.isnan(outcomes[..., 2]).any() and not caught:
            grid = [x.reshape(args.num_seeds, per_seed, *x.shape[1:]) for x in (observations, episode, chunk)]
            envs.step_async(np.asarray(policy(state, keys, *grid)).reshape(len(jobs), -1))
            observations, *_, infos = envs.step_wait(timeout=PATIENCE)
            chunk += 1
            for i in np.flatnonzero(infos.get("_outcome", ())):
                outcomes[i // per_seed, episode[i]] = infos["outcome"][i]
                episode[i], chunk[i] = episode[i] + per_seed, 0
    except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
        if not caught:  # else the same signal may have ended the workers
            fail(f"an evaluation worker died or hung ({error!r}); --resume goes on from the checkpoint")
    except Exception as error:  # whatever an environment can raise; its traceback has been printed
        fail(f"{args.env_id} failed in an evaluation: {error!r}; --resume goes on from the checkpoint")
    finally:
        too_long.cancel()
        if envs:
            for process in envs.processes:
                process.kill()
                process.join()
            envs.closed = True
    return [] if caught else [
        {"step": step, "seed": seed, "success": success, "return": total, "length": length,
         "episodes": args.eval_episodes, "seconds": time.perf_counter() - began}
        for seed, (success, total, length) in zip(seeds, outcomes.mean(axis=1).tolist())]


# ============================================================================================================ Training


def check_args(args):
    """Fills in what depends on the domain, and refuses what cannot be meant."""
    for name, by_domain in DOMAIN_DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, by_domain[next((domain for domain in by_domain if domain in args.env_id), "other")])
    for name, value in asdict(args).items():
        least = 0 if name in ("seed", "log_interval", "eval_interval", "eval_episodes") else 1
        is_share = name in ("gamma", "tau", "learning_rate", "expectile")
        if ((type(value) is int and not least <= value < 2**31) or (type(value) is tuple and min(value, default=0) < 1)
                or (type(value) is float and not (0 < value <= 1 if is_share else 0 <= value < float("inf")))):
            fail(f"--{name.replace('_', '-')} {value} is out of range")
    if args.eval_only and not args.eval_episodes:
        fail("--eval-only needs --eval-episodes")


def read_record(run_dir):
    try:
        record = json.loads((run_dir / "args.json").read_text())
        return record | dict(algorithm=record["algorithm"], fingerprint=record["dataset"]["fingerprint"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        fail(f"{run_dir} holds no run that can be read: {error}")


@contextmanager
def open_run(args):
    """Makes or finds the run directory, and keeps other processes out of it."""
    again = args.resume or args.eval_only
    if again and not (args.run_dir and (args.run_dir / "args.json").exists()):
        fail(f"--resume and --eval-only need the --run-dir of a run, not {args.run_dir}")
    name = f"{args.env_id.replace('/', '_')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    args.run_dir = args.run_dir or Path("runs") / name
    try:
        made = not args.run_dir.exists()
        args.run_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(args.run_dir, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work in {args.run_dir}")
    except OSError as error:
        fail(f"cannot write to {args.run_dir}: {error}")
    try:
        if not args.eval_only and not os.access(args.run_dir, os.W_OK):
            fail(f"cannot write to {args.run_dir}")
        names = ("args.json", "train.csv", "eval.csv", "checkpoint.npz")
        if not again and any((args.run_dir / name).exists() for name in names):
            fail(f"{args.run_dir} holds a run: --resume it, or choose another --run-dir")
        yield
    except jax.errors.JaxRuntimeError as error:  # too little memory, for one
        fail(f"JAX: {str(error).splitlines()[0]}")
    except OSError as error:
        begun = (args.run_dir / "args.json").exists()
        fail(f"{error}" + f"; --resume goes on from the last checkpoint in {args.run_dir}, if there is one" * begun)
    finally:
        with suppress(OSError):
            if made:
                args.run_dir.rmdir()  # if it is empty
        os.close(lock)


def make_record(args, facts):
    """What args.json will hold. A resumed run may be longer or report more, but must compute what it did before."""
    record = dict(algorithm=Path(__file__).stem) | asdict(args) | dict(device=jax.devices()[0].device_kind)
    record |= dict(dataset=facts, versions={name: version(name) for name in ("jax", "ogbench", "mujoco")})
    record = json.loads(json.dumps(record, default=str))
    if args.resume or args.eval_only:
        old, may_differ = read_record(args.run_dir), {
            "total_steps", "log_interval", "eval_interval", "eval_episodes", "dataset_dir", "dataset_path",
            "dataset_on_host", "run_dir", "resume", "eval_only", "capture_video", "track", "device", "dataset",
            "versions"}
        differ = [f"{key} was {old.get(key)} and is {value}" for key, value in record.items()
                  if key not in may_differ and value != old.get(key)]
        if facts and facts["fingerprint"] != old["fingerprint"]:
            differ.append(f"the content of the dataset {facts['path']}")
        if differ:
            fail(f"{args.run_dir} holds another run: {'; '.join(differ)}")
    return record


def by_name(tree):
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(tree)}


def save_checkpoint(path, state, **extra):
    with replacing(path) as file:
        np.savez(file, **by_name(state), **extra)


def load_checkpoint(path, state):
    """What was saved: a state, whose names and shapes must be those of the state given, and the extra arrays."""
    with open_npz(path, "checkpoint") as file:
        saved = dict(file)
    like = by_name(state)
    for name, x in like.items():
        if name not in saved or saved[name].shape != x.shape or saved[name].dtype != x.dtype:
            fail(f"{path} is of another network: {name} is not there in the shape {x.shape}")
    return jax.tree.unflatten(jax.tree.structure(state), [saved.pop(name) for name in like]), saved


def earlier_lines(path, step):
    """The header of a csv file, and its rows before a step."""
    try:
        header, *lines = path.read_text().splitlines()
        return [header, *(line for line in lines if int(line.split(",")[0]) < step)]
    except ValueError as error:
        fail(f"{path} is no table of a run: {error}")


def write_rows(path, rows):
    """Adds rows to a csv file, in place of what a killed run wrote for the same step or later ones."""
    lines = earlier_lines(path, rows[0]["step"]) if path.exists() else [",".join(rows[0])]
    lines += [",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values()) for row in rows]
    with replacing(path) as file:
        file.write("\n".join([*lines, ""]).encode())


def make_updates(args, chunks, pixels):
    """n updates of all seeds in one compiled call: (n, state, keys, data, step) -> state, metrics [seed, update]. With
    --dataset-on-host the data are the windows [seed, update] that are drawn then; the second function says which."""

    def draw(key, step):
        batch_key, update_key = jax.random.split(jax.random.fold_in(key, step))
        return draw_chunks(args, chunks, batch_key), batch_key, update_key

    def one_update(data, key, state, x):
        i, batch_key, update_key = draw(key, x[0])
        if args.dataset_on_host:
            data, i = x[1], jnp.arange(args.batch_size)
        return update(args, state, sample_batch(args, data, i, batch_key), update_key)

    def updates(n, state, keys, data, step):
        data, windows = (None, data) if args.dataset_on_host else (data, None)
        def one_seed(state, key, windows):
            xs = step + jnp.arange(n), windows
            # One update is unrolled: in a loop, XLA on a CPU takes twenty times as long for a convolution's gradient.
            return jax.lax.scan(partial(one_update, data, key), state, xs, unroll=2 if n == 1 else 1)

        x = state, keys, windows
        if args.num_seeds > 1:
            return jax.vmap(one_seed)(*x)
        return jax.tree.map(lambda x: x[None], one_seed(*jax.tree.map(lambda x: x[0], x)))  # faster so

    draws = jax.jit(jax.vmap(jax.vmap(lambda *x: draw(*x)[0], (None, 0)), (0, None)))
    # Pixels on a CPU: one operation after another takes 1.5 GB less. (Older releases of JAX cannot be told so.)
    lean = pixels and jax.default_backend() == "cpu" and jax.__version_info__ >= (0, 9, 2)
    options = dict(xla_cpu_scheduler_type="CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED") if lean else None
    return jax.jit(updates, static_argnums=0, donate_argnums=1, compiler_options=options), draws


def train(args, catch=list):
    """A run from its first update or its checkpoint to its end, or until a signal is caught; with --eval-only, its
    evaluation alone. catch() is called when there is something to lose; it returns a list, to which a signal that ends
    the run is added. Returns the run directory."""
    args = replace(args)
    check_args(args)
    with open_run(args):
        run(args, catch)
    return args.run_dir


def run(args, catch):
    try:
        jax.devices()
    except Exception as error:  # an AssertionError, for one
        fail(f"JAX has no device of JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}: {error}")
    env = make_env(args.env_id, args.capture_video)
    dims = stacked(env.observation_space.shape), *env.action_space.shape
    data, facts = (None, {}) if args.eval_only else load_dataset(args, env)
    env.close()
    del env  # and the half GB that its renderer holds
    record = make_record(args, facts)
    print(f"{record['algorithm']} on {args.env_id}, {args.num_seeds} seed(s) from {args.seed}, {record['device']}")
    facts |= {name: getattr(args, name) for name in DOMAIN_DEFAULTS}
    print("\n".join(f"  {name.replace('_', ' ')}: {value}" for name, value in facts.items()))

    # The seeds are spread over the devices; each device holds the dataset.
    devices = max(n for n in range(1, jax.device_count() + 1) if args.num_seeds % n == 0)
    mesh = Mesh(jax.devices()[:devices], "seed")
    by_seed, everywhere = NamedSharding(mesh, PartitionSpec("seed")), NamedSharding(mesh, PartitionSpec())
    seeds = range(args.seed, args.seed + args.num_seeds)
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), 3))(jnp.array(seeds))
    init_keys, train_keys, eval_keys = (jax.device_put(keys[:, i], by_seed) for i in range(3))
    start = jax.jit(jax.vmap(lambda key: init(args, key, *dims)), out_shardings=by_seed)
    pixels = len(dims[0]) > 1
    policy, (updates, draws) = make_policy(args), make_updates(args, facts.get("chunks"), pixels)
    checkpoint, this_run = args.run_dir / "checkpoint.npz", f"{record['algorithm']} on {args.env_id}, seed {args.seed}"
    if args.eval_only or (args.resume and checkpoint.exists()):
        state, since_log = load_checkpoint(checkpoint, jax.eval_shape(start, init_keys))
        if str(since_log.pop("run", "")) != this_run:
            fail(f"{checkpoint} is not of {this_run}")
        state, step = jax.device_put(state, by_seed), int(since_log.pop("step"))
        for path in filter(Path.exists, (args.run_dir / "train.csv", args.run_dir / "eval.csv")):
            earlier_lines(path, step)  # a damaged one is refused before any work
    else:
        state, step, since_log = start(init_keys), 0, {}  # since_log: sums since the last row of train.csv
    if step > args.total_steps and not args.eval_only:
        fail(f"{checkpoint} is of update {step}, beyond --total-steps {args.total_steps}")
    caught = catch()
    if args.eval_only:
        print(*map(json.dumps, evaluate(args, policy, state, eval_keys, step, caught)), sep="\n")
        if caught:
            raise SystemExit(128 + caught[0])
        return

    if args.track:
        try:
            import wandb

            os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # seconds; a lost connection would hold it for hours
            wandb.init(project="latent-policy-steering", name=args.run_dir.name, dir=args.run_dir, config=record)
        except Exception as error:  # not installed, not logged in, no network
            fail(f"--track: Weights & Biases did not start: {error!r}")
    with replacing(args.run_dir / "args.json") as file:
        file.write(json.dumps(record, indent=2).encode())
    intervals = [interval for interval in (args.total_steps, args.log_interval, args.eval_interval) if interval]
    a_second_or_two = 50 // args.num_seeds if jax.default_backend() == "cpu" else 1000
    updates_per_call = max(1, a_second_or_two // 50 if pixels else a_second_or_two)
    updates_after = lambda step: min(updates_per_call, *(interval - step % interval for interval in intervals))
    reader = ThreadPoolExecutor(1)

    def read_ahead(step):
        """Begins to read what the call after a step draws."""
        i = draws(train_keys, step + np.arange(updates_after(step)))
        return reader.submit(lambda: jax.device_put(windows(args, data, np.asarray(i)), by_seed))

    if args.dataset_on_host:
        ahead = read_ahead(step)
    else:
        drawn = data = jax.device_put(data, everywhere)
    due = lambda interval: step == args.total_steps or step and interval and step % interval == 0

    def report(name, rows):
        write_rows(args.run_dir / f"{name}.csv", rows)
        try:
            if args.track:
                wandb.log({f"{name}/{key}/{row['seed']}": x for row in rows for key, x in row.items()}, step=step)
        except Exception as error:  # the run itself needs no network
            print(f"warning: Weights & Biases misses step {step}: {error!r}", file=sys.stderr)

    with tqdm(total=args.total_steps, initial=step, unit=" updates", mininterval=1) as bar:
        while not caught:
            if due(args.eval_interval) and args.eval_episodes:
                rows = evaluate(args, policy, state, eval_keys, step, caught)
                if caught:
                    break
                report("eval", rows)
                bar.set_postfix({k: f"{np.mean([row[k] for row in rows]):.2f}" for k in ("success", "return")})
            if step == args.total_steps:
                return
            began, n = time.perf_counter(), updates_after(step)
            if args.dataset_on_host:
                drawn, ahead = ahead.result(), read_ahead(step + n)
            state, metrics = updates(n, state, train_keys, drawn, step)
            for name, values in jax.device_get(metrics).items():
                for k, i in np.argwhere(~np.isfinite(values)):
                    fail(f"{name} of seed {seeds[k]} is {values[k, i]} in update {step + i + 1}; "
                         f"what {args.run_dir} holds is from before")
                since_log[name] = since_log.get(name, 0) + values.sum(axis=1, dtype=float)
            since_log["updates"] = since_log.get("updates", 0) + n
            since_log["seconds"] = since_log.get("seconds", 0) + time.perf_counter() - began
            step += n
            bar.update(n)
            if due(args.log_interval):
                count, seconds = since_log.pop("updates"), since_log.pop("seconds")
                report("train", [dict(step=step, seed=seed, updates_per_second=float(count / seconds))
                                 | {name: float(total[k] / count) for name, total in since_log.items()}
                                 for k, seed in enumerate(seeds)])
                since_log = {}
            if due(args.eval_interval):
                save_checkpoint(checkpoint, state, run=this_run, step=step, **since_log)
    save_checkpoint(checkpoint, state, run=this_run, step=step, **since_log)
    print(f"stopped after update {step}; python {Path(__file__).name} --resume --run-dir {args.run_dir} goes on")
    raise SystemExit(128 + caught[0])


# ================================================================================================================ main


def catch_signals():
    """The list to which the first SIGINT or SIGTERM is added; the second one ends the process at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def handle(number, _):
        caught.append(number)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, handle)
    return caught


def keep_compiled():
    """What is compiled is kept for later runs, apart for each kind of CPU, unless the user has chosen a place."""
    warnings.filterwarnings("ignore", "Error .* persistent compilation cache")  # a full disk's: it is compiled again
    if not jax.config.jax_compilation_cache_dir:
        kind = re.search(r"(flags|Features).*", Path("/proc/cpuinfo").read_text())[0].encode()
        place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "jax", hashlib.sha256(kind).hexdigest()[:8])
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(place))


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until there is something to save
    keep_compiled()
    args = tyro.cli(Args, description=__doc__.split("\n")[0])
    if args.run_dir and (args.resume or args.eval_only):  # the arguments of that run are the defaults now
        saved = read_record(args.run_dir)
        saved = {field.name: saved[field.name] for field in fields(Args) if field.name in saved}
        saved |= {name: tuple(value) for name, value in saved.items() if isinstance(value, list)}
        saved |= {name: Path(value) for name, value in saved.items() if value and name.endswith(("_dir", "_path"))}
        args = tyro.cli(Args, default=Args(**saved))
    try:
        train(args, catch_signals)
    except KeyboardInterrupt:
        fail("stopped before the first update")


if __name__ == "__main__":
    main()
