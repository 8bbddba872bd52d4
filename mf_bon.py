# /// script
# dependencies = ["flax", "gymnasium>=1.1", "jax>=0.6", "moviepy", "ogbench>=1.2", "optax", "tqdm", "tyro", "wandb"]
# ///
"""MF-BoN, the best of N chunks of a one-step MeanFlow: offline RL in one file. After Q-chunking, arXiv 2507.07969.

A MeanFlow policy f imitates: in one call it turns a latent z on the sphere |z| = sqrt(d) into a chunk of actions.
No actor chooses the latent: N random ones are decoded, and the critic chooses among the chunks. 32 candidates of a
one-step policy cost about as much as one chunk of a flow in ten steps.

    policy   min_f  E |u - u*|^2,  u = z_t - f(s, z_t, t, t-r)               imitates (MeanFlow, see imitation_loss)
    critic   min_Q  E (Q_k(s, a) - y)^2,  y = sum_i gamma^i r_i + gamma^H m max_i min_k Qbar_k(s', a'_i)
    acting   argmax_i min_k Q_k(s, a_i),  a_i = f(s, z_i, 1, 1)              improves

    diff lps.py mf_bon.py   # the same policy: a gradient finds the latent, or a search, in acting and in y
"""

import json
import os
import re
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import resource_tracker
from pathlib import Path

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
from jax.lax import stop_gradient as sg
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

# ================================================================================================================ Args

@dataclass(frozen=True)
class Args:
    env_id: str = "cube-single-play-singletask-v0"  # an OGBench single-task id; any Gymnasium id with --dataset-path
    dataset_dir: str = "~/.ogbench/data"  # where OGBench's datasets lie; a missing one is downloaded to it
    dataset_path: str | None = None  # an .npz of your own; unzipped into a folder, its observations stay on the disk
    sparse: bool | None = None  # rewards are -1 until the task is solved, then 0 (default: scene and puzzle-3x3)
    seed: int = 0  # the first seed
    num_seeds: int = 1  # n: the seeds seed ... seed+n-1 are trained in one process
    total_steps: int = 1_000_000  # updates
    batch_size: int = 256  # chunks in a batch
    learning_rate: float = 3e-4  # of Adam, for every network
    gamma: float = 0.99  # discount
    tau: float = 0.005  # rate at which the target critics follow the critics
    horizon: int = 5  # H, actions in a chunk
    actor_hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # layer widths of the policy
    critic_hidden_dims: tuple[int, ...] = (256, 256, 256, 256)  # layer widths of the critics
    log_interval: int = 5_000  # updates between rows of train.csv; 0: only at the end
    eval_interval: int = 100_000  # updates between evaluations, each with a checkpoint; 0: only at the end
    eval_episodes: int = 50  # episodes in an evaluation of a seed; 0: never evaluate
    run_dir: str | None = None  # everything the run writes (default: runs/{env_id}__{script}__{seed}__{time})
    resume: bool = False  # go on from the last checkpoint in --run-dir, with that run's arguments
    eval_only: bool = False  # evaluate the checkpoint in --run-dir, train nothing
    capture_video: bool = False  # film the first episode of every evaluation, to {run_dir}/videos
    track: bool = False  # log to Weights & Biases too (honours WANDB_MODE)
    action_dim: tyro.conf.Suppress[int] = 0  # numbers in an action; train() asks the environment
    # The algorithm's own:
    num_samples: int = 32  # N, when acting
    num_samples_target: int = 4  # N in y, chosen and valued by the target critics

BY_DOMAIN = {  # arguments that were not given: the first entry whose name is in the env id
    "sparse": {"scene": True, "puzzle-3x3": True, "": False},
}

# ============================================================================================================ Networks

Dense = partial(nn.Dense, kernel_init=nn.initializers.xavier_uniform())
Conv = partial(nn.Conv, kernel_size=(3, 3), kernel_init=nn.initializers.xavier_uniform())


class Encoder(nn.Module):
    """impala_small: pixels become 512 features. Flat observations, and features, pass as they are."""
    @nn.compact
    def __call__(self, s):
        if s.ndim == 2:
            return s
        x = s / 255.0
        for channels in (16, 32, 32):
            x = nn.max_pool(Conv(channels)(x), (3, 3), strides=(2, 2), padding="SAME")
            y = Conv(channels)(nn.relu(x))
            x = x + Conv(channels)(nn.relu(y))
        return nn.gelu(Dense(512)(nn.relu(x).reshape(len(x), -1)))


class Network(nn.Module):
    """An MLP of observations and other inputs. Observations may be encoded first, to be used several times."""
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
    """Two critics behind one encoder, as published: Q_k(s, a), or V_k(s), k along the first axis."""
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, s, *inputs, encode=False):
        h = Encoder()(s)
        if encode:
            return h
        return jnp.stack([Network(self.hidden_dims, 1, layer_norm=True)(h, *inputs)[..., 0] for _ in range(2)])


def create(args, key, module, *inputs):
    """The train state of a network that takes such inputs."""
    return TrainState.create(apply_fn=module.apply, params=module.init(key, *inputs), tx=optax.adam(args.learning_rate))


# =========================================================================================================== Algorithm

def descend(state, losses):
    """One Adam step of each network on its own loss, which gives a value and what else to log."""
    new_state, metrics = dict(state), {}
    for name, loss in losses.items():
        (value, more), grads = jax.value_and_grad(loss, has_aux=True)(state[name].params)
        new_state[name] = state[name].apply_gradients(grads=grads)
        metrics |= {f"{name}_loss": value, **{f"{name}_{key}": x for key, x in more.items()}}
    return new_state, metrics


def sphere(x):
    """x rescaled to norm sqrt(d)."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-12)


def imitation_loss(policy, params, s, a, e, key):
    """MeanFlow from noise e at t = 1 to a chunk a at t = 0: u = z - f(s, z, t, t-r) is the mean velocity from r to t,
    u* = sg(v - (t - r) (v - df/dt)),  err = mean_d (u - u*)^2,  loss = E err / sg(err + 1e-3)^0.5"""
    h = policy.apply_fn(params, s, encode=True)
    r, t = jnp.sort(jax.nn.sigmoid(jax.random.normal(key, (2, len(a), 1)) - 0.4), axis=0)
    r = jnp.where(jnp.arange(len(a))[:, None] < len(a) * 3 // 4, t, r)  # r = t: the velocity at t, as in a flow
    z = (1 - t) * a + t * e
    v = e - a

    def f(z, t, r):
        return policy.apply_fn(params, h, z, t, t - r)

    f_z, df_dt = jax.jvp(f, (z, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)))
    u = z - f_z
    u_star = sg(v - (t - r) * (v - df_dt))
    err = jnp.mean((u - u_star) ** 2, axis=-1)
    return jnp.mean(err / jnp.sqrt(sg(err + 1e-3))), {}


def decode(args, policy, s, z):
    """The chunk f(s, z, 1, 1), clipped."""
    one = jnp.ones_like(z[:, :1])
    return jnp.clip(policy.apply_fn(policy.params, s, z, one, one), -1, 1)


def best_of(args, state, critic_params, s, z):
    """Of the chunks made of several latents z for an observation, that with the greatest min_k Q_k, and this value."""
    policy, critic = state["policy"], state["critic"]
    n = len(z) // len(s)
    a = decode(args, policy, jnp.repeat(policy.apply_fn(policy.params, s, encode=True), n, axis=0), z)
    h = jnp.repeat(critic.apply_fn(critic_params, s, encode=True), n, axis=0)
    q = critic.apply_fn(critic_params, h, a).min(axis=0).reshape(len(s), n)
    best = jnp.arange(len(s)) * n + q.argmax(axis=1)
    return a[best], q.max(axis=1)


def init(args, key, s):
    """The state before the first update, for observations like s."""
    keys = jax.random.split(key, 3)
    d = args.horizon * args.action_dim
    a, t = jnp.zeros((1, d)), jnp.zeros((1, 1))
    policy = create(args, keys[0], Network(args.actor_hidden_dims, d), s, a, t, t)
    critic = create(args, keys[1], Critic(args.critic_hidden_dims), s, a)
    return dict(policy=policy, critic=critic, target_critic=critic.params)


def update(args, state, batch, key):
    """The state after one update on a batch, and what to log of it."""
    policy, critic = state["policy"], state["critic"]
    s, a, next_s = batch["observations"], batch["actions"], batch["next_observations"]
    act_key, prior_key, imitation_key = jax.random.split(key, 3)
    e = sphere(jax.random.normal(prior_key, a.shape))

    # y = sum_i gamma^i r_i + gamma^H m max_i min_k Qbar_k(s', a'_i),  a'_i = f(s', z_i, 1, 1)
    z = sphere(jax.random.normal(act_key, (len(s) * args.num_samples_target, a.shape[-1])))
    _, next_v = best_of(args, state, state["target_critic"], next_s, z)
    y = batch["rewards"] + args.gamma**args.horizon * batch["masks"] * next_v

    def policy_loss(params):
        return imitation_loss(policy, params, s, a, e, imitation_key)

    def critic_loss(params):
        """E (Q_k(s, a) - y)^2"""
        q = critic.apply_fn(params, s, a)
        return jnp.mean((q - y) ** 2), dict(q=q.mean())

    state, metrics = descend(state, dict(policy=policy_loss, critic=critic_loss))
    state["target_critic"] = optax.incremental_update(state["critic"].params, state["target_critic"], args.tau)
    return state, metrics


def act(args, state, s, key):
    """The chunks of actions at observations s, flattened."""
    z = sphere(jax.random.normal(key, (len(s) * args.num_samples, args.horizon * args.action_dim)))
    return best_of(args, state, state["critic"].params, s, z)[0]


# ============================================================================================================= Dataset

FRAMES = 3  # of pixels that make an observation


class Chunks(gymnasium.Wrapper):
    """A step plays a chunk of actions, or what the episode leaves of it."""
    def step(self, chunk):
        for action in chunk.reshape(-1, *self.action_space.shape):
            observation, reward, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                break
        return observation, reward, terminated, truncated, info


def make_env(args, film=None):
    """The environment as it is played, its actions in [-1, 1]; its first episode is filmed under the name of a film."""
    os.environ.setdefault("MUJOCO_GL", "egl" if "visual" in args.env_id or args.capture_video else "disable")
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # no warnings of OGBench's action boxes
    try:
        env = gymnasium.make(re.sub("-[a-z]+-singletask", "-singletask", args.env_id), disable_env_checker=True)
        env = wrappers.RecordEpisodeStatistics(wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))
    except Exception as error:  # no such environment, discrete actions
        raise SystemExit(f"cannot make the environment {args.env_id}: {error}")
    if film:
        env.unwrapped.render_mode = "rgb_array"  # OGBench's environments can render, but do not say so
        env = wrappers.RecordVideo(env, f"{args.run_dir}/videos", lambda episode: episode == 0, name_prefix=film)
    return Chunks(wrappers.FrameStackObservation(env, FRAMES))


def load_dataset(args, env):
    """A dataset, and what to tell of it. A trajectory of T transitions is T+1 rows; the last one is its final state."""
    path = Path(args.dataset_path or f"{args.dataset_dir}/{args.env_id.split('-singletask')[0]}-v0.npz").expanduser()
    names = ["observations", "terminals", "actions", "rewards", "masks", "qpos", "button_states"]
    try:
        if args.dataset_path is None and not path.exists():
            ogbench.download_datasets([path.stem], args.dataset_dir)
        file = {x.stem: np.load(x, mmap_mode="r") for x in path.glob("*.npy")} if path.is_dir() else np.load(path)
        data = {name: file[name] for name in names if name in file}
        if "rewards" not in data and "-singletask" in args.env_id:
            ogbench.relabel_utils.relabel_dataset(env.spec.id, env, data)  # OGBench 1.2's rule: r_t speaks of s_t
            if args.sparse:
                data["rewards"] = (data["masks"] == 0) - 1.0
    except Exception as error:  # no network, a damaged file, one of another environment
        raise SystemExit(f"{path} is no dataset of {args.env_id} ({error!r}). OGBench's: {ogbench.utils.DATASET_URL}/"
                         f"{path.name}; one like it: python benchmark/collect.py {path.stem}; your own: --dataset-path")
    rows = len(data.get("observations", ()))
    data.setdefault("masks", np.ones(rows))
    shapes = dict(observations=env.observation_space.shape[1:], actions=(args.action_dim,))
    for name in names[:5]:
        x, shape = data.get(name, np.array("missing")), (rows, *shapes.get(name, ()))
        if rows == 0 or x.shape != shape or x.dtype.kind not in "fiub" or (x.ndim == 4 and x.dtype != np.uint8):
            raise SystemExit(f"{path}: {name} must be numbers {shape}, images uint8, but are {x.dtype} {x.shape}")
        if name in ("actions", "rewards", "masks"):
            x = data[name] = np.array(x, np.float32)
            x[data["terminals"] != 0] = 0  # they are not used there, and may be NaN
        limit = 1 + 1e-5 if name == "actions" else np.finfo(np.float32).max
        if x.dtype != np.uint8 and not -limit <= x.min() <= x.max() <= limit:
            raise SystemExit(f"{path}: {name} must lie within +-{limit:.3g}, but reach from {x.min()} to {x.max()}")
    if data["terminals"][-1] == 0:
        raise SystemExit(f"{path}: the last row must end a trajectory, terminals = 1")
    t, ends = np.arange(rows), np.flatnonzero(data["terminals"])
    starts = t[t + args.horizon <= ends[np.searchsorted(ends, t)]]  # H actions and s_t+H in one trajectory
    if len(starts) == 0:
        raise SystemExit(f"{path}: no trajectory is as long as a chunk, --horizon {args.horizon}")
    firsts = np.append(0, ends + 1)[np.searchsorted(ends, starts)]  # where these trajectories begin
    facts = dict(dataset=str(path), transitions=rows - len(ends), trajectories=len(ends), chunks=len(starts))
    return dict(observations=data["observations"], actions=np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5),
                rewards=data["rewards"], masks=data["masks"], starts=np.int32(starts), firsts=np.int32(firsts)), facts


def stack(frames):
    """Observations of frames [batch, frame, ...]: the last one, or of pixels the channels of all."""
    return frames[:, -1] if frames.ndim == 3 else jnp.concatenate([frames[:, i] for i in range(FRAMES)], axis=-1)


def shift(images, key):
    """With probability 0.5 the images of a batch are moved, each by up to 3 pixels, their edges repeated."""
    coin_key, corner_key = jax.random.split(key)
    corners = jnp.where(jax.random.bernoulli(coin_key), jax.random.randint(corner_key, (len(images), 2), 0, 7), 3)
    padded = jnp.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), mode="edge")
    return jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))(padded, corners)


def sample_batch(args, data, on_disk, key):
    """Chunks that start at random rows t: s_t, a_t ... a_t+H-1, sum_i gamma^i r_t+i, prod_i m_t+i and s_t+H. (Published
    Q-chunking also draws chunks that cross the end of a trajectory, and masks what lies beyond it.)"""
    draw_key, shift_key = jax.random.split(key)
    i = jax.random.randint(draw_key, (args.batch_size,), 0, len(data["starts"]))
    t, first = data["starts"][i], data["firsts"][i]
    rows = t[:, None, None] + jnp.array([[0], [args.horizon]]) + jnp.arange(1 - FRAMES, 1)
    rows = jnp.maximum(rows, first[:, None, None])  # before the first frame stands that frame again
    if on_disk is None:
        frames = data["observations"][rows]
    else:
        like = jax.ShapeDtypeStruct((*rows.shape, *on_disk.shape[1:]), jax.dtypes.canonicalize_dtype(on_disk.dtype))
        frames = jax.pure_callback(lambda rows: on_disk[rows].astype(like.dtype), like, rows, vmap_method="expand_dims")
    s, next_s = stack(frames[:, 0]), stack(frames[:, 1])
    if s.ndim == 4:
        s, next_s = shift(s, shift_key), shift(next_s, shift_key)  # both alike
    steps = t[:, None] + jnp.arange(args.horizon)
    return dict(observations=s, next_observations=next_s, masks=data["masks"][steps].prod(axis=1),
                actions=data["actions"][steps].reshape(args.batch_size, -1),
                rewards=(data["rewards"][steps] * args.gamma ** jnp.arange(args.horizon)).sum(axis=1))


# ========================================================================================================== Evaluation

def evaluate(args, policy, states, k, step, stop):
    """A row of eval.csv: means over --eval-episodes episodes of the k-th seed, dealt out to a process a core."""
    began, workers = time.perf_counter(), min(args.eval_episodes, len(os.sched_getaffinity(0)))
    state, seed = jax.tree.map(lambda x: x[k], states), args.seed + k
    films = [f"step{step}_seed{seed}" if args.capture_video else None] + [None] * (workers - 1)
    resource_tracker.ensure_running()  # its start would unblock what is blocked in the next line
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the processes inherit it: Ctrl-C is not for them
    envs = gymnasium.vector.AsyncVectorEnv([partial(make_env, args, film) for film in films], context="spawn")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    to_play = np.array([len(range(i, args.eval_episodes, workers)) for i in range(workers)])
    outcomes, key = [], jax.random.key(seed)
    s, _ = envs.reset(seed=1000 * seed)
    while to_play.any() and not stop:
        key, act_key = jax.random.split(key)
        s, _, terminated, truncated, infos = envs.step(np.asarray(policy(state, stack(s), act_key)))
        for i in np.flatnonzero((terminated | truncated) & (to_play > 0)):
            to_play[i] -= 1
            success, episode = infos.get("success", np.full(workers, np.nan)), infos["episode"]
            outcomes.append([success[i], episode["r"][i], episode["l"][i]])
    envs.close(terminate=bool(stop))
    success, total, length = np.mean(outcomes or [3 * [np.nan]], axis=0).tolist()
    return {"success": success, "return": total, "length": length, "episodes": args.eval_episodes,
            "seconds": time.perf_counter() - began}


# ============================================================================================================ Training

def prepare(args):
    """The arguments with what depends on the domain, and with a run directory. What cannot be meant is refused."""
    for name, by_domain in BY_DOMAIN.items():
        if getattr(args, name) is None:
            args = replace(args, **{name: next(x for domain, x in by_domain.items() if domain in args.env_id)})
    for name, x in vars(args).items():
        least = 0 if name in ("seed", "log_interval", "eval_interval", "eval_episodes", "action_dim") else 1
        most = 1 if name in ("gamma", "tau", "expectile") else np.inf
        if (type(x) is int and x < least) or (type(x) is float and not 0 <= x <= most):
            raise SystemExit(f"--{name.replace('_', '-')} {x} is out of range")
    name = f"{args.env_id.replace('/', '_')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    args = replace(args, run_dir=args.run_dir or f"runs/{name}")
    if Path(args.run_dir, "args.json").exists() and not (args.resume or args.eval_only):
        raise SystemExit(f"{args.run_dir} holds a run: --resume it, or choose another --run-dir")
    try:
        os.makedirs(args.run_dir, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--run-dir cannot be made: {error}")
    return args


def write(path, content):
    """A draft takes the file's place when it is whole."""
    Path(f"{path}.draft").write_bytes(content)
    os.replace(f"{path}.draft", path)


def report(args, step, name, rows):
    """Adds a row a seed to a csv file, in place of what a killed run left for the same step or later ones."""
    rows = [dict(step=step, seed=args.seed + k) | row for k, row in enumerate(rows)]
    path = Path(args.run_dir, f"{name}.csv")
    lines = path.read_text().splitlines() if path.exists() else [",".join(rows[0])]
    lines[1:] = [line for line in lines[1:] if int(line.split(",")[0]) < step]
    lines += [",".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in row.values()) for row in rows]
    write(path, "\n".join([*lines, ""]).encode())
    if args.track:
        import wandb
        wandb.log({f"{name}/{key}/{row['seed']}": x for row in rows for key, x in row.items()}, step=step)


def train(args, stop=()):
    """A run, from its first update or last checkpoint on. A signal that is added to stop ends it, with a checkpoint."""
    args = prepare(args)
    env, checkpoint = make_env(args), Path(args.run_dir, "checkpoint.msgpack")
    s, args = stack(np.zeros((1, *env.observation_space.shape))), replace(args, action_dim=env.action_space.shape[0])
    data, facts = ({}, {}) if args.eval_only else load_dataset(args, env)
    env.close()
    facts |= {package: version(package) for package in ("jax", "ogbench", "mujoco")}
    facts |= dict(script=Path(__file__).stem, device=jax.devices()[0].device_kind)
    print(f"{args.env_id}, --sparse {args.sparse}", *(f"{name}: {x}" for name, x in facts.items()), sep="\n  ")
    mesh = Mesh(jax.devices()[: np.gcd(args.num_seeds, jax.device_count())], "seed")  # spread over these devices
    by_seed, everywhere = NamedSharding(mesh, PartitionSpec("seed")), NamedSharding(mesh, PartitionSpec())
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed)))(args.seed + np.arange(args.num_seeds))
    states = jax.jit(jax.vmap(lambda key: init(args, key, s)), out_shardings=by_seed)(keys[:, 0])
    keys, step, recent = jax.device_put(keys[:, 1], by_seed), 0, []  # recent: of each call since the last row
    if args.eval_only or (args.resume and checkpoint.exists()):
        saved = msgpack_restore(checkpoint.read_bytes())
        states = jax.device_put(from_state_dict(states, saved["states"]), by_seed)
        step, recent = saved["step"], saved["recent"]
    policy = jax.jit(partial(act, args))
    if args.eval_only:
        return print(*[evaluate(args, policy, states, k, step, stop) for k in range(args.num_seeds)], sep="\n")
    write(Path(args.run_dir, "args.json"), json.dumps(vars(args) | facts, indent=2).encode())
    if args.track:
        import wandb
        wandb.init(project="latent-policy-steering", name=args.run_dir, dir=args.run_dir, config=vars(args) | facts)
    on_disk = data.pop("observations") if isinstance(data["observations"], np.memmap) else None
    data = jax.device_put(data, everywhere)
    n = int(np.gcd.reduce([100 if s.ndim == 2 else 10, args.log_interval, args.eval_interval, args.total_steps, step]))

    @partial(jax.jit, donate_argnums=0)
    def n_updates(states, keys, data, step):
        def one_seed(state_and_key):
            def one_update(state, step):
                batch_key, update_key = jax.random.split(jax.random.fold_in(state_and_key[1], step))
                return update(args, state, sample_batch(args, data, on_disk, batch_key), update_key)
            return jax.lax.scan(one_update, state_and_key[0], step + jnp.arange(n))
        at_once = None if jax.default_backend() == "cpu" else args.num_seeds  # one after another is faster on a CPU
        return jax.lax.map(one_seed, (states, keys), batch_size=at_once)

    def due(interval):
        return step >= args.total_steps or (interval and step and step % interval == 0)
    with tqdm(total=args.total_steps, initial=step, unit=" updates", mininterval=1) as bar:
        while True:
            if stop or due(args.eval_interval):
                content = dict(states=to_state_dict(jax.device_get(states)), step=step, recent=recent)
                write(checkpoint, msgpack_serialize(content))
            if due(args.eval_interval) and args.eval_episodes and not stop:
                rows = [evaluate(args, policy, states, k, step, stop) for k in range(args.num_seeds)]
                if not stop:
                    report(args, step, "eval", rows)
                    bar.set_postfix(success=f"{np.mean([row['success'] for row in rows]):.2f}")
            if stop:
                print(f"stopped after update {step}: --resume --run-dir {args.run_dir} goes on")
                raise SystemExit(128 + stop[0])
            if step >= args.total_steps:
                return args.run_dir
            began = time.perf_counter()
            states, metrics = n_updates(states, keys, data, step)
            means = {name: x.mean(axis=1) for name, x in jax.device_get(metrics).items()}
            step += n
            bar.update(n)
            if bad := [name for name, x in means.items() if not np.isfinite(x).all()]:
                raise SystemExit(f"not finite before update {step}: {', '.join(bad)}; {args.run_dir} is from before")
            recent.append(dict(updates_per_second=np.full(args.num_seeds, n / (time.perf_counter() - began))) | means)
            if due(args.log_interval):
                columns = "updates_per_second", *metrics  # in this order after --resume as well
                means = {name: np.mean([x[name] for x in recent], axis=0).tolist() for name in columns}
                rows = [{name: x[k] for name, x in means.items()} for k in range(args.num_seeds)]
                report(args, step, "train", rows)
                recent = []


# ================================================================================================================ main

def main():
    args = tyro.cli(Args, description=__doc__.partition("\n")[0])
    if args.resume or args.eval_only:
        path = Path(args.run_dir or "", "args.json")
        record = json.loads(path.read_text()) if path.exists() else {}
        if record.get("script") != Path(__file__).stem:
            raise SystemExit(f"--resume and --eval-only need the --run-dir of a run of this script, not {args.run_dir}")
        saved = {name: x for name, x in record.items() if name in vars(args) and name != "resume"}
        saved |= {name: tuple(x) for name, x in saved.items() if isinstance(x, list)}
        args = tyro.cli(Args, default=Args(**saved))  # that run's arguments are the defaults now
        may_change = "total_steps log_interval eval_interval eval_episodes run_dir capture_video track".split()
        changed = [name for name in saved if saved[name] != vars(args)[name] and name not in may_change]
        if changed and (args.resume or "num_seeds" in changed):
            raise SystemExit(f"the run in {args.run_dir} has another {', '.join(changed)}")
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    train(args, stop)


if __name__ == "__main__":
    main()
