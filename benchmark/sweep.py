"""Makes every run of an experiment: the missing ones, and the rest of those that were interrupted.

    python -m benchmark.sweep alpha               # a run on each core; the same command goes on
    python -m benchmark.sweep alpha --dry-run     # only lists the runs and how far they are
    python -m benchmark.sweep alpha --slurm="-p gpu -G 1 -t 240"    # as jobs of a cluster

An experiment is a short file in benchmark/experiments with scripts and their flags, tasks and a
number of seeds. Its runs lie in {out}/{experiment}/{task}/{variant}/seed{seed}, and what a run has
printed lies beside it in seed{seed}.log.
"""

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmark import ROOT

# The same run goes on with others of these:
MAY_CHANGE = "total-steps log-interval eval-interval eval-episodes capture-video track".split()


@dataclass
class Args:
    experiment: tyro.conf.Positional[str]  # a name in benchmark/experiments, or your own .toml file
    out: Path = Path("runs")  # where the runs of all experiments lie
    jobs: int | None = None  # runs at once, on a share of the cores each (default: one per core)
    bfloat16: bool = False  # through bfloat16.py: faster on CPUs that are made for it
    dry_run: bool = False  # list the runs and how far they are, and run nothing
    slurm: str | None = None  # hand each run to SLURM as a job, with these flags of sbatch


# ============================================================================================ Runs


@dataclass
class Run:
    """A variant of a script on a task with a seed."""

    run_dir: Path
    program: list[str]  # what Python starts
    settings: dict  # such as {"alpha": 3, "policy-hidden-dims": [8, 8], "track": true}
    bfloat16: bool  # through bfloat16.py

    @property
    def log(self):
        return Path(f"{self.run_dir}.log")

    @property
    def command(self):
        flags = []
        for name, x in self.settings.items():
            if isinstance(x, bool) and name != "sparse":  # which is True, False or by domain
                flags.append(f"--{name}" if x else f"--no-{name}")
            else:
                flags += [f"--{name}", *map(str, x if isinstance(x, list) else [x])]
        return [sys.executable, "-m", *self.program, *flags, "--run-dir", str(self.run_dir)]

    def step(self, name):
        """The last update in train.csv or eval.csv, 0 without one."""
        path = self.run_dir / f"{name}.csv"
        if not path.exists():
            return 0
        return max(int(row["step"]) for row in csv.DictReader(path.open()))

    def state(self):
        """A run saves its last checkpoint after its last row of train.csv, and then evaluates."""
        if not (self.run_dir / "args.json").exists():
            return "missing"
        if self.settings.get("eval-episodes", 50):
            is_done = self.step("eval") >= self.settings["total-steps"]
        else:
            saved = self.run_dir / "checkpoint.msgpack"
            logged = self.run_dir / "train.csv"
            is_done = self.step("train") >= self.settings["total-steps"] and saved.exists()
            is_done = is_done and saved.stat().st_mtime_ns >= logged.stat().st_mtime_ns
        return "done" if is_done else "interrupted"

    def check(self):
        """What is there was made with the flags that it would be made with now."""
        path = self.run_dir / "args.json"
        if not path.exists():
            return
        record = json.loads(path.read_text())
        changes = []
        if ("products" in record) != self.bfloat16:
            changes.append(f"--bfloat16 was {not self.bfloat16} and is {self.bfloat16}")
        for name, x in self.settings.items():
            before = record.get(name.replace("-", "_"))
            if name not in MAY_CHANGE and before != x:
                changes.append(f"--{name} was {before} and is {x}")
        if changes:
            changes = ", ".join(changes)
            raise SystemExit(f"{self.run_dir}: {changes}: choose another --out for another run")


def variants(run):
    """Pairs of a name and settings. A list of values makes one variant of each of them."""
    settings = {name: x if isinstance(x, list) else [x] for name, x in run.items()}
    del settings["script"]
    for values in itertools.product(*settings.values()):
        words = [run["script"]]
        for name, x in zip(settings, values):
            words.append("-".join(map(str, [name, *(x if isinstance(x, list) else [x])])))
        yield "_".join(words).replace("/", "-"), dict(zip(settings, values))


def find_program(name, bfloat16):
    """What Python starts for a script at the root or one in benchmark/."""
    for path in (f"{name}.py", f"benchmark/{name}.py"):
        if (ROOT / path).exists():
            if bfloat16:
                return ["benchmark.bfloat16", path]
            return [path.removesuffix(".py").replace("/", ".")]
    raise SystemExit(f"there is no script {name}")


def read_experiment(args):
    """All runs: the first seed of everything, then the next."""
    path = Path(args.experiment)
    if path.suffix != ".toml":
        path = ROOT / f"benchmark/experiments/{args.experiment}.toml"
    if not path.exists():
        names = ", ".join(sorted(path.stem for path in path.parent.glob("*.toml")))
        raise SystemExit(f"{path} does not exist; beside it lie {names}")
    content = tomllib.loads(path.read_text())
    tasks = []
    for task in content["tasks"]:
        tasks += [task.replace("*", str(i)) for i in range(1, 6)] if "*" in task else [task]
    runs = []
    for seed, task, run in itertools.product(range(content["seeds"]), tasks, content["runs"]):
        program = find_program(run["script"], args.bfloat16)
        for name, own in variants(run):
            settings = {"env-id": task, "seed": seed} | content["flags"] | own
            if "total-steps" not in settings:
                raise SystemExit(f"{path}: total-steps must be given, in [flags] or for each run")
            run_dir = args.out / path.stem / task.replace("/", "_") / name / f"seed{seed}"
            runs.append(Run(run_dir, program, settings, args.bfloat16))
    return runs


# ========================================================================================= Running


def start(run, cores):
    """The process of a run, on these cores."""
    command = run.command + ["--resume"] * (run.run_dir / "args.json").exists()
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a") as log:
        print(f"$ {shlex.join(command)}", file=log, flush=True)
        command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        settings = dict(env=os.environ | {"TQDM_DISABLE": "1"}, start_new_session=True)
        return subprocess.Popen(command, stdout=log, stderr=log, **settings)


def run_here(runs, jobs):
    """Makes the runs, so many at once. A failing one does not stop the others, a signal does."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    cores = sorted(os.sched_getaffinity(0))
    jobs = jobs or len(cores)
    free = [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]
    waiting = [run for run in runs if run.state() != "done"]
    running = {}
    told = 0  # of the signals
    while running or (waiting and not caught):
        while waiting and free and not caught:
            run = waiting.pop(0)
            share = free.pop(0)
            running[start(run, share)] = run, share
            print(f"started, {len(waiting)} more to come: {run.run_dir}", flush=True)
        time.sleep(0.5)
        for process, (run, share) in list(running.items()):
            if process.poll() is not None:
                del running[process]
                free.append(share)
                print(f"ended with exit code {process.returncode}: {run.run_dir}", flush=True)
                if process.returncode and not caught:
                    print(*run.log.read_text(errors="replace").splitlines()[-10:], sep="\n    ")
        if len(caught) > told:  # the runs save and end; at a second signal they end at once
            told = len(caught)
            for process in running:
                process.terminate()


# A run as SLURM's job. Shortly before its time is up (USR1) it saves, and is queued again to go on.
# Where SLURM ends it to make room (TERM to all of its processes) it saves, and SLURM queues it.
JOB = """#!/bin/bash
export TQDM_DISABLE=1
if [ -f {run_dir}/args.json ]; then again=--resume; fi
{command} $again &
trap 'kill $!; wait $!; scontrol requeue $SLURM_JOB_ID' USR1
trap 'wait $!; sleep infinity' TERM
wait $!
"""


def submit(run, flags):
    """Hands a run to SLURM."""
    run.run_dir.parent.mkdir(parents=True, exist_ok=True)
    job = JOB.format(run_dir=shlex.quote(str(run.run_dir)), command=shlex.join(run.command))
    command = ["sbatch", "--requeue", "--signal=B:USR1@90", "--open-mode=append"]
    command += [f"--output={run.log}", f"--job-name={run.run_dir}", *shlex.split(flags)]
    subprocess.run(command, input=job, text=True, check=True)


def main(args):
    runs = read_experiment(args)
    for run in runs:
        run.check()
    if args.dry_run:
        for run in runs:
            steps = f"{run.step('train'):>9,} of {run.settings['total-steps']:,}"
            print(f"{run.state():<11} {steps} updates  {run.run_dir}")
    elif args.slurm is not None:
        for run in runs:
            if run.state() != "done":
                submit(run, args.slurm)
    else:
        run_here(runs, args.jobs)
    states = Counter(run.state() for run in runs)
    print(", ".join(f"{number} {state}" for state, number in states.items()))
    if states["done"] < len(runs) and not args.dry_run and args.slurm is None:
        raise SystemExit("not all runs are done: the same command goes on")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
