"""Make an OGBench dataset with OGBench's own scripted experts, for when none can be downloaded.

    python benchmark/collect.py cube-single-play-v0 --num-episodes 1000

writes {dataset-dir}/cube-single-play-v0.npz and, a tenth of the episodes long, cube-single-play-v0-val.npz:
the keys, dtypes and episode structure of the published files, made by the same procedure (Park et al.,
OGBench, arXiv 2410.20092, section on data collection). "play" follows plans with temporally correlated
noise, "noisy" a Markovian expert with Gaussian action noise; each pursues one random target after another,
never the evaluation tasks themselves. What was collected here is not what was published: the files say so
in the comment of their zip archive, which report.py reads.

Every episode has its own random stream, made from the seed and the episode's number, so the result does
not depend on the number of workers.
"""

import difflib
import json
import multiprocessing
import os
import signal
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # before mujoco is imported; only visual- datasets render
import gymnasium
import numpy as np
import tyro
from tqdm import tqdm

SCENES = ["cube-single", "cube-double", "cube-triple", "cube-quadruple", "cube-octuple", "scene",
          "puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6"]
NAMES = [f"{ob}{scene}-{kind}-v0" for ob in ("", "visual-") for scene in SCENES for kind in ("play", "noisy")
         if (ob, scene) != ("visual-", "cube-octuple")]  # OGBench has no such environment
P_STACK = dict(single=(0, 0), double=(0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5), octuple=(0, 0.35))


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]  # e.g. cube-single-play-v0, scene-noisy-v0, visual-puzzle-3x3-play-v0
    num_episodes: int = 1000  # training episodes; a tenth as many go to the -val file
    episode_length: int = 1000  # transitions of an episode (OGBench: 1000), which has one row more: its final state
    seed: int = 0  # seed of the whole dataset
    dataset_dir: Path = Path("~/.ogbench/data")  # directory to write to
    num_workers: int = len(os.sched_getaffinity(0))  # processes; does not change the result
    overwrite: bool = False  # replace files that are there


def make_experts(env, dataset):
    """The scripted experts of a scene by target: Markovian for the "noisy" datasets."""
    if "-noisy-" in dataset:
        from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle as Button
        from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle as Cube
        from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle as Drawer
        from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle as Window
        settings = dict(env=env, min_norm=0.4)
    else:
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle as Button
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle as Cube
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle as Drawer
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle as Window
        settings = dict(env=env, noise=0.1, noise_smoothing=0.5)
    if "puzzle" in dataset:
        return {"button": Button(gripper_always_closed=True, **settings)}
    if "cube" in dataset:
        return {"cube": Cube(**settings)}
    return {"cube": Cube(**settings), "button": Button(**settings), "drawer": Drawer(**settings),
            "window": Window(**settings)}


@cache
def make_scene(dataset, episode_length):
    """The environment and its experts, once in a worker."""
    import ogbench  # noqa: F401  registers the environments

    env_id = dataset.replace("-play-", "-").replace("-noisy-", "-")
    env = gymnasium.make(env_id, disable_env_checker=True, terminate_at_goal=False, mode="data_collection",
                         max_episode_steps=episode_length + 1)
    return env, make_experts(env, dataset)


def is_healthy(qpos):
    """Scene's cube must stay where the arm and the camera reach it: in front, or inside the drawer."""
    y, z = qpos[:, 15], qpos[:, 16]
    too_far_right = y >= 0.29
    too_far_left = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return not (too_far_right | too_far_left).any()


def play_episode(env, experts, dataset, seed):
    """One episode as {key: rows}; everything random in it comes from seed."""
    np.random.seed(seed)  # the experts draw from NumPy's global stream
    low, high = next((p for name, p in P_STACK.items() if name in dataset), (0.5, 0.5))
    p_stack = np.random.uniform(low, high)
    noise = np.random.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10]) if "-noisy-" in dataset else np.zeros(5)
    ob, info = env.reset(seed=seed)
    expert = experts[info["privileged/target_task"]]
    expert.reset(ob, info)
    rows = dict(observations=[], actions=[], terminals=[], qpos=[], qvel=[])
    if "prev_button_states" in env.unwrapped.get_step_info():
        rows["button_states"] = []
    done = False
    while not done:
        action = np.clip(np.random.normal(expert.select_action(ob, info), noise), -1, 1)
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if expert.done:  # on to the next target
            expert_ob, expert_info = env.unwrapped.set_new_target(p_stack=p_stack)
            expert = experts[expert_info["privileged/target_task"]]
            expert.reset(expert_ob, expert_info)
        step = dict(observations=ob, actions=action, terminals=done)
        for key, values in rows.items():
            values.append(step[key] if key in step else info[f"prev_{key}"])
        ob = next_ob
    dtypes = dict(terminals=bool, button_states=np.int64, observations=ob.dtype if ob.dtype == np.uint8 else np.float32)
    return {key: np.array(values, dtypes.get(key, np.float32)) for key, values in rows.items()}


def collect_episode(args, episode):
    for attempt in range(100):
        stream = np.random.SeedSequence([args.seed, episode, attempt]).generate_state(1)[0]
        rows = play_episode(*make_scene(args.dataset, args.episode_length), args.dataset, int(stream))
        if "scene" not in args.dataset or is_healthy(rows["qpos"]):
            return rows
    raise RuntimeError(f"episode {episode}: the cube left the reachable area in 100 attempts")


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
    """Collects the dataset and returns the path of its training file."""
    if args.dataset not in NAMES:
        near = difflib.get_close_matches(args.dataset, NAMES, n=3, cutoff=0)
        raise SystemExit(f"no dataset {args.dataset!r} can be collected; near: {', '.join(near)}")
    directory = args.dataset_dir.expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{args.dataset}.npz", directory / f"{args.dataset}-val.npz"]
    if not args.overwrite and any(path.exists() for path in paths):
        raise SystemExit(f"{paths[0]} or its -val file exists; --overwrite replaces both")
    counts, length = [args.num_episodes, max(1, args.num_episodes // 10)], args.episode_length + 1  # rows
    comment = dict(collected_by="benchmark/collect.py", dataset=args.dataset, seed=args.seed,
                   num_episodes=args.num_episodes, episode_length=args.episode_length,
                   **{name: version(name) for name in ("ogbench", "mujoco")})
    ignore_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # it is the parent's to answer
    executor = ProcessPoolExecutor(args.num_workers, multiprocessing.get_context("spawn"), ignore_ctrl_c)
    try:
        episodes = executor.map(partial(collect_episode, args), range(sum(counts)))
        parts = []
        with tqdm(total=sum(counts), desc=args.dataset, unit="episode", mininterval=1) as bar:
            for count in counts:
                data = {}
                for i in range(count):  # straight into its place: the data exist once
                    for key, x in next(episodes).items():
                        if i == 0:
                            data[key] = np.empty((count * length, *x.shape[1:]), x.dtype)
                        data[key][i * length : (i + 1) * length] = x
                    bar.update()
                parts.append(data)
    finally:
        executor.shutdown(cancel_futures=True)
    for path, data in zip(paths[::-1], parts[::-1]):  # the training file comes last, when all is there
        save(path, data, comment)
    return paths[0]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(collect(tyro.cli(Args, description=__doc__.split("\n")[0])))
    except KeyboardInterrupt:
        raise SystemExit("stopped; no file was left unfinished")
