"""Makes a dataset in OGBench's format with OGBench's own scripted experts.

    python -m benchmark.collect cube-single-play-v0
    python lps.py --dataset-dir ~/.ogbench/collected

Arrays, types, episodes and procedure are the published ones (Park et al., arXiv 2410.20092): a
"play" expert follows plans with temporally correlated noise, a "noisy" expert is Markovian with
Gaussian noise, and each pursues one random target after another. What is collected here is
nevertheless not what was published. The file says so in the comment of its zip archive, and every
run that reads it says COLLECTED HERE.

Each episode has random numbers of its own, made from the seed and the episode's number. So the
result does not depend on the number of workers, and more episodes begin with the same ones.
"""

import json
import multiprocessing
import os
import signal
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path

import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

CUBES = ["cube-single", "cube-double", "cube-triple", "cube-quadruple", "cube-octuple"]
PUZZLES = ["puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6"]
SCENES = [*CUBES, *PUZZLES, "scene"]
NAMES = ["-".join(words) + "-v0" for words in product(SCENES, ["play", "noisy"])]
NAMES += [f"visual-{name}" for name in NAMES if "octuple" not in name]  # which OGBench lacks
# How likely the next target is on top of another cube: an episode draws from this range.
P_STACK = dict(single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5))
P_STACK |= dict(octuple=(0, 0.35))
PUBLISHED = Path("~/.ogbench/data")  # where OGBench's own files belong


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]  # such as cube-single-play-v0 or visual-scene-noisy-v0
    num_episodes: int = 1000  # episodes
    episode_length: int = 1000  # transitions of an episode, which has one row more: its final state
    seed: int = 0  # of the whole dataset
    dataset_dir: Path = Path("~/.ogbench/collected")  # where the file is written
    num_workers: int = len(os.sched_getaffinity(0))  # processes; they do not change the result
    overwrite: bool = False  # replace a file that is there


# ======================================================================================== Episodes


def make_experts(env, dataset):
    """{kind of target: the scripted expert that pursues it}"""
    kind = "markov" if "-noisy-" in dataset else "plan"
    settings = dict(min_norm=0.4) if kind == "markov" else dict(noise=0.1, noise_smoothing=0.5)
    targets = ["cube", "button", "drawer", "window"]
    if "puzzle" in dataset:
        targets = ["button"]
        settings |= dict(gripper_always_closed=True)
    if "cube" in dataset:
        targets = ["cube"]
    experts = {}
    for target in targets:
        module = import_module(f"ogbench.manipspace.oracles.{kind}.{target}_{kind}")
        oracle = getattr(module, f"{target.title()}{kind.title()}Oracle")
        experts[target] = oracle(env=env, **settings)
    return experts


@cache
def make_scene(dataset, episode_length):
    """The environment and its experts, once in each worker."""
    os.environ.setdefault("MUJOCO_GL", "egl" if dataset.startswith("visual-") else "disable")
    import ogbench  # noqa: F401  registers the environments

    env_id = dataset.replace("-play-", "-").replace("-noisy-", "-")
    settings = dict(mode="data_collection", terminate_at_goal=False)
    settings |= dict(max_episode_steps=episode_length + 1, disable_env_checker=True)
    env = gymnasium.make(env_id, **settings)
    return env, make_experts(env, dataset)


def play_episode(env, experts, dataset, seed):
    """The rows of one episode, in which everything random comes from the seed."""
    np.random.seed(seed)  # the experts draw from NumPy's global stream
    ranges = [between for name, between in P_STACK.items() if name in dataset]
    p_stack = np.random.uniform(*(ranges or [(0.5, 0.5)])[0])
    noise = np.zeros(5)
    if "-noisy-" in dataset:
        noise = np.random.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10])
    s, info = env.reset(seed=seed)
    expert = experts[info["privileged/target_task"]]
    expert.reset(s, info)
    rows = dict(observations=[], actions=[], terminals=[], qpos=[], qvel=[])
    if "prev_button_states" in env.unwrapped.get_step_info():
        rows["button_states"] = []
    done = False
    while not done:
        action = np.clip(np.random.normal(expert.select_action(s, info), noise), -1, 1)
        next_s, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if expert.done:  # on to the next target
            target_s, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            expert = experts[target_info["privileged/target_task"]]
            expert.reset(target_s, target_info)
        row = dict(observations=s, actions=action, terminals=done)
        for name, values in rows.items():
            values.append(row[name] if name in row else info[f"prev_{name}"])
        s = next_s
    dtypes = dict(terminals=bool, button_states=np.int64)
    if s.dtype == np.uint8:
        dtypes["observations"] = np.uint8
    return {name: np.array(x, dtypes.get(name, np.float32)) for name, x in rows.items()}


def is_healthy(qpos):
    """Scene's cube must stay within reach of arm and camera: in front, or inside the drawer."""
    y = qpos[:, 15]
    z = qpos[:, 16]
    is_in_drawer = (z >= 0.06) & (z <= 0.08)
    return not ((y >= 0.29) | ((y <= -0.3) & ~is_in_drawer)).any()


def collect_episode(args, episode):
    """One episode. One in which the cube of scene was lost is played again, otherwise."""
    for attempt in range(100):
        stream = np.random.SeedSequence([args.seed, episode, attempt]).generate_state(1)[0]
        env, experts = make_scene(args.dataset, args.episode_length)
        rows = play_episode(env, experts, args.dataset, int(stream))
        if "scene" not in args.dataset or is_healthy(rows["qpos"]):
            return rows
    raise RuntimeError(f"episode {episode}: the cube left the reachable area in 100 attempts")


# ============================================================================================ File


def find_path(args):
    """Where the file is written to: nowhere that something else lies or belongs."""
    if args.dataset not in NAMES:
        raise SystemExit(f"{args.dataset} is none of what can be collected: {', '.join(NAMES)}")
    directory = args.dataset_dir.expanduser()
    if directory.resolve() == PUBLISHED.expanduser().resolve():
        raise SystemExit(f"{PUBLISHED} is for OGBench's own files: choose another --dataset-dir")
    path = directory / f"{args.dataset}.npz"
    if path.exists() and not args.overwrite:
        raise SystemExit(f"{path} exists; --overwrite replaces it")
    directory.mkdir(parents=True, exist_ok=True)
    return path


def collect_arrays(args):
    """All episodes, one after the other, as arrays."""
    length = args.episode_length + 1  # rows of an episode
    ignore_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # it is for the parent
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(args.num_workers, spawn, ignore_ctrl_c)
    data = {}
    try:
        episodes = executor.map(partial(collect_episode, args), range(args.num_episodes))
        bar = tqdm(episodes, args.dataset, args.num_episodes, unit="episode", mininterval=1)
        for i, rows in enumerate(bar):  # straight into its place, so that the data exist once
            for name, x in rows.items():
                if i == 0:
                    data[name] = np.empty((args.num_episodes * length, *x.shape[1:]), x.dtype)
                data[name][i * length : (i + 1) * length] = x
    finally:
        executor.shutdown(cancel_futures=True)
    return data


def save(path, data, comment):
    """A draft takes the file's place when it is whole."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        with open(draft, "wb") as file:
            np.savez_compressed(file, **data)
        with zipfile.ZipFile(draft, "a") as archive:
            archive.comment = json.dumps(comment).encode()
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def collect(args):
    """Collects the dataset, and returns the path of its file."""
    path = find_path(args)
    comment = dict(collected_by="benchmark.collect", dataset=args.dataset, seed=args.seed)
    comment |= dict(num_episodes=args.num_episodes, episode_length=args.episode_length)
    comment |= {name: version(name) for name in ("ogbench", "mujoco")}
    save(path, collect_arrays(args), comment)
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(collect(tyro.cli(Args, description=__doc__.partition("\n")[0])))
    except KeyboardInterrupt:
        raise SystemExit("stopped; no file was left unfinished")
