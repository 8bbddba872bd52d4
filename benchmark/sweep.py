"""Every run of an experiment: what is missing is run, what was interrupted goes on, what is done is left alone.

    python benchmark/sweep.py alpha                                   # a process per core; again: it goes on
    python benchmark/sweep.py alpha --dry-run                         # list the runs and how far they are
    python benchmark/sweep.py state --jobs 1 --seeds-per-process 8    # on a GPU
    python benchmark/sweep.py state --seeds-per-process 8 --slurm --slurm-gpus 1

An experiment is a short file in benchmark/experiments: scripts with their flags, tasks, seeds. A run lives in
{out}/{experiment}/{task}/{variant}/seed{first}, and what it printed in seed{first}.log beside it.
"""

import contextlib
import difflib
import fcntl
import io
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter, deque
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "benchmark/experiments"
OURS = {"env_id", "seed", "num_seeds", "run_dir", "resume", "eval_only"}  # what the sweep itself sets
MAY_CHANGE = {"total_steps", "log_interval", "eval_interval", "eval_episodes", "dataset_dir", "dataset_path",
              "dataset_on_host", "capture_video", "track"}  # what a run may be given anew when it goes on
QUIET = {"TQDM_DISABLE": "1"}  # no progress bars in the logs
# What becomes a run: it has these cores, and gets SIGTERM when its sweep dies (PR_SET_PDEATHSIG is 1), however it does.
PRELUDE = """import ctypes, json, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):  # it has not died yet
    os.sched_setaffinity(0, json.loads(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])"""


@dataclass
class Args:
    experiment: Annotated[str, tyro.conf.Positional]
    """a name in benchmark/experiments, or the path of a .toml file of your own"""
    out: Path = Path("runs")
    """where the runs of all experiments lie"""
    jobs: int | None = None
    """processes at once, each on its own share of the cores (default: one per core); give 1 with a GPU"""
    seeds_per_process: int = 1
    """seeds trained together in one process; with a GPU, as many as there are"""
    dry_run: bool = False
    """list the runs and how far they are, and run nothing"""
    slurm: bool = False
    """hand the runs to SLURM as a job array, one process a job, and return"""
    slurm_partition: str | None = None
    """where they queue (default: the cluster's)"""
    slurm_timeout_min: int = 1440
    """minutes after which a job makes room and queues again, to go on; at least 3"""
    slurm_gpus: int = 0
    """GPUs of a job"""
    slurm_cpus: int = 1
    """cores of a job"""
    slurm_mem_gb: int | None = None
    """memory of a job (default: the cluster's)"""
    slurm_max_parallel: int = 100
    """jobs at once"""


def fail(message):
    raise SystemExit(f"error: {message}")


# ========================================================================================================== Experiment


@dataclass
class Cell:
    """One process of the matrix: a variant of a script on a task, with one seed or several."""

    run_dir: Path
    script: str
    flags: list[str]
    seeds: range
    steps: int
    evaluates: bool
    facts: dict  # what args.json must agree with

    @property
    def log(self):
        return self.run_dir.with_name(f"{self.run_dir.name}.log")


def parse(path, script, settings):
    """Settings such as {"alpha": 3, "actor-hidden-dims": [8, 8], "track": true} as flags, the Args that the script
    makes of them, and those of them that a run keeps for good."""
    module, flags = import_module(script), []
    defaults = {field.name: field.default for field in fields(module.Args) if field.name not in OURS}
    for key, value in settings.items():
        if key.replace("-", "_") not in defaults:
            near = difflib.get_close_matches(key, [name.replace("_", "-") for name in defaults], 3, 0)
            fail(f"{path}: --{key} is no flag of {script}.py, or the sweep's own to set; near: {', '.join(near)}")
        if isinstance(defaults[key.replace("-", "_")], bool):
            flags.append(f"--{key}" if value else f"--no-{key}")
        else:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            args = tyro.cli(module.Args, args=flags)
            module.check_args(args)
    except SystemExit:
        fail(f"{path}: {script}.py refuses {shlex.join(flags)}: see python {script}.py --help")
    keep = {key.replace("-", "_") for key in settings} - MAY_CHANGE
    return flags, args, json.loads(json.dumps({name: getattr(args, name) for name in keep}, default=str))


def variants(run):
    """(name, settings): a list of values makes one variant of each; a list in it is one flag's several values."""
    settings = {key: x if isinstance(x, list) else [x] for key, x in run.items() if key != "script"}
    for values in itertools.product(*settings.values()):
        words = ["-".join(map(str, [key, *(x if isinstance(x, list) else [x])])) for key, x in zip(settings, values)]
        yield "_".join([run["script"], *words]).replace("/", "-"), dict(zip(settings, values))


def read_experiment(args):
    """The experiment's name and cells: the first seed of everything, then the next."""
    paths = [Path(args.experiment), EXPERIMENTS / f"{args.experiment}.toml"]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        there = ", ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.toml")))
        fail(f"no experiment {args.experiment}: name the path of a .toml file, or one of {there}")
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        fail(f"cannot read {path}: {error}")
    kinds = dict(seeds=int, tasks=list, runs=list, flags=dict)
    if ({key: type(x) for key, x in content.items()} != kinds or content["seeds"] < 1
            or not content["tasks"] or not content["runs"]):
        fail(f"{path} must hold seeds (a number), tasks and runs (lists), [flags], and nothing else")
    scripts, plans, cells = sorted(path.stem for path in ROOT.glob("*.py")), {}, []
    sys.path.insert(0, str(ROOT))  # where the scripts are
    for run in content["runs"]:
        if not isinstance(run, dict) or run.get("script") not in scripts:
            fail(f"{path}: a run needs a script, one of {', '.join(scripts)}, but one is {run}")
        for name, settings in variants(run):
            if name in plans:
                fail(f"{path}: two runs are {name}")
            plans[name] = run["script"], *parse(path, run["script"], content["flags"] | settings)
    tasks = [task.replace("*", str(i)) for task in map(str, content["tasks"])
             for i in (range(1, 6) if "*" in task else [0])]
    for first in range(0, content["seeds"], args.seeds_per_process):
        seeds = range(first, min(first + args.seeds_per_process, content["seeds"]))
        for task, (name, (script, flags, parsed, facts)) in itertools.product(tasks, plans.items()):
            run_dir = args.out / path.stem / task.replace("/", "_") / name / f"seed{first}"
            which = ["--env-id", task, "--seed", str(first), "--num-seeds", str(len(seeds))]
            cells.append(Cell(run_dir, script, [*which, *flags], seeds, parsed.total_steps, parsed.eval_episodes > 0,
                              facts | dict(num_seeds=len(seeds))))
    if not cells:
        fail(f"{path} makes no run")
    return path.stem, cells


# =============================================================================================================== Cells


def read_rows(csv):
    """(step, seed) of every row."""
    try:
        lines = csv.read_text().splitlines()[1:] if csv.exists() else []
        return [(int(step), int(seed)) for step, seed, _ in (line.split(",", 2) for line in lines)]
    except ValueError as error:
        fail(f"{csv} is no table of a run: {error}")


def updates(cell):
    """How far a run is, all its seeds together, as far as train.csv tells."""
    return len(cell.seeds) * max((step for step, _ in read_rows(cell.run_dir / "train.csv")), default=0)


def check_record(cell):
    """What is there was made with the flags that it would be made with now."""
    path = cell.run_dir / "args.json"
    try:
        record = {**json.loads(path.read_text())} if path.exists() else cell.facts
    except (ValueError, TypeError) as error:
        fail(f"cannot read {path}: {error}")
    differ = [f"{key} was {record.get(key)} and is {x}" for key, x in cell.facts.items() if record.get(key) != x]
    if differ:
        fail(f"{cell.run_dir} holds another run: {'; '.join(differ)}: move it away, or choose another --out")


def is_held(path):
    """Whether a process holds it: a script its run directory, and from its very start its log."""
    if not path.exists():
        return False
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def saved_step(cell):
    """The update after which the last checkpoint was saved."""
    try:
        with np.load(cell.run_dir / "checkpoint.npz") as file:
            return int(file["step"])
    except Exception:  # none, or whatever a damaged file can raise
        return None


def state(cell):
    csv = cell.run_dir / ("eval.csv" if cell.evaluates else "train.csv")
    if {(cell.steps, seed) for seed in cell.seeds} <= {*read_rows(csv)}:
        # A run saves its last checkpoint before it evaluates, but after its last row of train.csv.
        if cell.evaluates or saved_step(cell) == cell.steps:
            return "done"
    if is_held(cell.log) or is_held(cell.run_dir):
        return "busy"
    return "interrupted" if (cell.run_dir / "args.json").exists() else "missing"


def start(cell, cores):
    """The process of a run, fresh or resumed, in a session of its own, so that Ctrl-C is ours to answer."""
    cell.run_dir.parent.mkdir(parents=True, exist_ok=True)
    again = ["--resume"] if (cell.run_dir / "args.json").exists() else []
    run = [sys.executable, str(ROOT / f"{cell.script}.py"), *cell.flags, "--run-dir", str(cell.run_dir), *again]
    prelude = [sys.executable, "-S", "-c", PRELUDE, str(os.getpid()), json.dumps(cores)]
    with open(cell.log, "a") as log, open(cell.log) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the process inherits it
        print(f"$ {shlex.join(run)}", file=log, flush=True)
        return subprocess.Popen([*prelude, *run], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                start_new_session=True, pass_fds=[lock.fileno()], env=os.environ | QUIET)


def failure(cell, code):
    lines = [line for line in cell.log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n    ".join([f"failed with exit code {code}: {cell.run_dir}; the end of {cell.log}:", *lines[-10:]])


# ============================================================================================================= Running


def run_here(cells, jobs):
    """Runs the cells, as many at once as there are jobs. Returns how many of them ended how."""
    caught, told = [], 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    cores = sorted(os.sched_getaffinity(0))
    jobs = jobs or len(cores)
    free = deque(cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs))
    waiting, running = deque(cell for cell in cells if state(cell) != "done"), {}
    ended = Counter(done=len(cells) - len(waiting), failed=0)
    reached = {cell.run_dir: updates(cell) for cell in cells}
    with tqdm(total=sum(cell.steps * len(cell.seeds) for cell in cells), initial=sum(reached.values()), smoothing=0,
              unit=" updates", mininterval=2, miniters=0) as bar:
        while running or (waiting and not caught):
            while waiting and free and not caught:
                cell = waiting.popleft()
                now, process = state(cell), None
                if now in ("missing", "interrupted"):
                    try:
                        process = start(cell, free[0])
                    except BlockingIOError:
                        now = "busy"  # another sweep was quicker
                if process:
                    running[process] = cell, free.popleft()
                    continue
                ended[now] += 1
                if now == "busy":
                    bar.write(f"busy: another process is at work in {cell.run_dir}", sys.stderr)
            time.sleep(0.5)
            for process, (cell, share) in list(running.items()):
                code = process.poll()
                reached[cell.run_dir] = updates(cell)
                if code is None:
                    continue
                free.append(share)
                del running[process]
                if code and not caught:
                    bar.write(failure(cell, code), sys.stderr)
                ended["done" if not code else "stopped" if caught else "failed"] += 1
            bar.set_postfix(ended, running=len(running), refresh=False)
            bar.update(sum(reached.values()) - bar.n)
            if len(caught) > told:  # the first signal lets them save, a second one ends them at once
                told = len(caught)
                for process in running:
                    process.terminate()
    if caught:
        print(f"stopped, {ended['done']} of {len(cells)} runs are done: the same command goes on", file=sys.stderr)
        raise SystemExit(128 + caught[0])
    return ended


class OnSlurm:
    """A cell as a job. Before its time is up, or where it must make room, it saves, queues again and goes on."""

    process = None

    def __call__(self, cell):
        if (now := state(cell)) == "done":
            return
        if now == "busy":
            raise RuntimeError(f"another process is at work in {cell.run_dir}")
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # the run inherits it: what SLURM says is said to us
        self.process = start(cell, sorted(os.sched_getaffinity(0)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        while self.process.poll() is None:
            time.sleep(1)
        if self.process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            time.sleep(120)  # SLURM stops every process of a job, and will end this one too, unless it grants a grace
            signal.raise_signal(signal.SIGUSR2)  # to submitit, which queues the job again
        if self.process.returncode:
            raise RuntimeError(failure(cell, self.process.returncode))

    def checkpoint(self, cell):
        """What submitit calls from its signal handler; so no Popen.wait, inside which we may already be."""
        from submitit.helpers import DelayedSubmission

        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(OnSlurm(), cell)


def submit(cells, name, args):
    try:
        import submitit
    except ImportError:
        fail("--slurm needs submitit: pip install -r benchmark/requirements.txt")
    try:
        executor = submitit.AutoExecutor(args.out / name / "slurm", cluster="slurm", slurm_max_num_timeout=1000)
        executor.update_parameters(
            name=name, timeout_min=args.slurm_timeout_min, cpus_per_task=args.slurm_cpus, mem_gb=args.slurm_mem_gb,
            gpus_per_node=args.slurm_gpus or None, slurm_partition=args.slurm_partition,
            slurm_array_parallelism=args.slurm_max_parallel, slurm_additional_parameters=dict(requeue=True))
        jobs = [job for i in range(0, len(cells), 1000)  # SLURM's own limit on an array is 1001
                for job in executor.map_array(OnSlurm(), cells[i : i + 1000])]
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        fail(f"SLURM does not take the runs: {' '.join(str(error).split())}")
    arrays = ", ".join(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))
    print(f"{len(jobs)} run(s) handed to SLURM, array {arrays}: squeue shows them, --dry-run how far they are")


def main(args):
    least = dict(jobs=1, seeds_per_process=1, slurm_timeout_min=3, slurm_cpus=1, slurm_mem_gb=1, slurm_max_parallel=1)
    for name, value in ((name, getattr(args, name)) for name in least):
        if value is not None and value < least[name]:
            fail(f"--{name.replace('_', '-')} must be at least {least[name]}, got {value}")
    name, cells = read_experiment(args)
    for cell in cells:
        check_record(cell)
    if args.dry_run:
        states = [state(cell) for cell in cells]
        for cell, now in zip(cells, states):
            print(f"{now:<11} {updates(cell):>11,} of {cell.steps * len(cell.seeds):,} updates  {cell.run_dir}")
        print(", ".join(f"{n} {now}" for now, n in Counter(states).items()))
    elif args.slurm:
        submit([cell for cell in cells if state(cell) in ("missing", "interrupted")], name, args)
    else:
        ended = run_here(cells, args.jobs)
        print(", ".join(f"{n} {how}" for how, n in ended.items()))
        if ended["done"] < len(cells):
            fail(f"{len(cells) - ended['done']} of {len(cells)} runs are not done: the same command tries them again")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__.split("\n")[0]))
    except KeyboardInterrupt:
        fail("stopped before the first run")
    except OSError as error:
        fail(error)
