"""Every run of an experiment: what is missing is run, what was interrupted goes on, what is done is left alone.

    python benchmark/sweep.py alpha                                   # a process per core; again: it goes on
    python benchmark/sweep.py alpha --dry-run                         # list the runs and how far they are
    python benchmark/sweep.py state --jobs 1 --seeds-per-process 8    # on a GPU
    python benchmark/sweep.py state --seeds-per-process 8 --slurm --slurm-gpus 1

An experiment is a short file in benchmark/experiments: scripts with their flags, tasks, seeds. A run lives in
{out}/{experiment}/{task}/{variant}/seed{first}, and what it printed in seed{first}.log beside it.
"""

import contextlib
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

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT / "benchmark/experiments"
MAY_CHANGE = ("total-steps", "log-interval", "eval-interval", "eval-episodes", "dataset-dir", "dataset-path",
              "capture-video", "track")  # a run that differs only in these is the same run


@dataclass
class Args:
    experiment: tyro.conf.Positional[str]  # a name in benchmark/experiments, or the path of a .toml file of your own
    out: Path = Path("runs")  # where the runs of all experiments lie
    jobs: int | None = None  # processes at once, each on its share of the cores (default: one per core); 1 with a GPU
    seeds_per_process: int = 1  # seeds trained together in one process; with a GPU, as many as there are
    bfloat16: bool = False  # through bfloat16.py: faster on CPUs that are made for it
    dry_run: bool = False  # list the runs and how far they are, and run nothing
    slurm: bool = False  # hand the runs to SLURM as a job array, one process a job, and return
    slurm_partition: str | None = None  # where they queue (default: the cluster's)
    slurm_timeout_min: int = 1440  # minutes after which a job makes room and queues again, to go on; at least 3
    slurm_gpus: int = 0  # GPUs of a job
    slurm_cpus: int = 1  # cores of a job
    slurm_mem_gb: int | None = None  # memory of a job (default: the cluster's)
    slurm_max_parallel: int = 100  # jobs at once


# ================================================================================================================ Runs

@dataclass
class Run:
    """One process: a variant of a script on a task, with one seed or several."""
    run_dir: Path
    script: Path
    settings: dict  # such as {"alpha": 3, "actor-hidden-dims": [8, 8], "track": true}
    seeds: range
    bfloat16: bool  # through bfloat16.py

    @property
    def log(self):
        return self.run_dir.with_name(f"{self.run_dir.name}.log")

    @property
    def command(self):
        flags = []
        for name, x in self.settings.items():
            if isinstance(x, bool) and name != "sparse":  # which is True, False or by domain
                flags.append(f"--{name}" if x else f"--no-{name}")
            else:
                flags += [f"--{name}", *map(str, x if isinstance(x, list) else [x])]
        again = ["--resume"] if (self.run_dir / "args.json").exists() else []
        through = [str(ROOT / "benchmark/bfloat16.py")] if self.bfloat16 else []
        return [sys.executable, *through, str(self.script), *flags, "--run-dir", str(self.run_dir), *again]

    def step(self, name):
        """The last update in train.csv or eval.csv, 0 without one."""
        path = self.run_dir / f"{name}.csv"
        rows = list(csv.DictReader(path.open())) if path.exists() else []
        return max((int(row["step"]) for row in rows), default=0)

    def state(self):
        """A run saves its last checkpoint after its last row of train.csv, and then evaluates."""
        if not (self.run_dir / "args.json").exists():
            return "missing"
        if self.settings.get("eval-episodes", 50):
            done = self.step("eval") >= self.settings["total-steps"]
        else:
            saved, logged = (self.run_dir / name for name in ("checkpoint.msgpack", "train.csv"))
            done = self.step("train") >= self.settings["total-steps"] and saved.exists()
            done = done and saved.stat().st_mtime_ns >= logged.stat().st_mtime_ns
        return "done" if done else "interrupted"

    def check(self):
        """What is there was made with the flags that it would be made with now."""
        path = self.run_dir / "args.json"
        record = json.loads(path.read_text()) if path.exists() else {}
        differ = [f"--{name} was {record[name.replace('-', '_')]} and is {x}" for name, x in self.settings.items()
                  if record and name not in MAY_CHANGE and record.get(name.replace("-", "_")) != x]
        if record and ("products" in record) != self.bfloat16:
            differ.append(f"--bfloat16 was {not self.bfloat16} and is {self.bfloat16}")
        if differ:
            raise SystemExit(f"{self.run_dir} holds another run: {', '.join(differ)}: choose another --out")

    def start(self, cores):
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            print(f"$ {shlex.join(self.command)}", file=log, flush=True)
            return subprocess.Popen(["taskset", "-c", ",".join(map(str, cores)), *self.command], stdout=log, stderr=log,
                                    env=os.environ | {"TQDM_DISABLE": "1"}, start_new_session=True)

    def failure(self, code):
        return f"failed with exit code {code}: {self.run_dir}\n    " + "\n    ".join(
            self.log.read_text(errors="replace").splitlines()[-10:])


def variants(run):
    """(name, settings): a list of values makes one variant of each; a list in it is one flag's several values."""
    settings = {name: x if isinstance(x, list) else [x] for name, x in run.items() if name != "script"}
    for values in itertools.product(*settings.values()):
        words = ["-".join(map(str, [name, *(x if isinstance(x, list) else [x])])) for name, x in zip(settings, values)]
        yield "_".join([run["script"], *words]).replace("/", "-"), dict(zip(settings, values))


def read_experiment(args):
    """The experiment's name and runs: the first seed of everything, then the next."""
    path = next(filter(Path.is_file, [Path(args.experiment), EXPERIMENTS / f"{args.experiment}.toml"]), None)
    if path is None:
        there = ", ".join(sorted(path.stem for path in EXPERIMENTS.glob("*.toml")))
        raise SystemExit(f"no experiment {args.experiment}: name the path of a .toml file, or one of {there}")
    content, runs = tomllib.loads(path.read_text()), []
    tasks = [task.replace("*", str(i)) for task in content["tasks"] for i in (range(1, 6) if "*" in task else [0])]
    for first in range(0, content["seeds"], args.seeds_per_process):
        seeds = range(first, min(first + args.seeds_per_process, content["seeds"]))
        for task, run in itertools.product(tasks, content["runs"]):
            script = next((p for p in (ROOT / f"{run['script']}.py", ROOT / f"benchmark/{run['script']}.py")
                           if p.exists()), None)
            if script is None:
                raise SystemExit(f"{path}: there is no script {run['script']}")
            for name, settings in variants(run):
                if "total-steps" not in content["flags"] | settings:
                    raise SystemExit(f"{path}: total-steps must be given, in [flags] or for each run")
                which = {"env-id": task, "seed": first, "num-seeds": len(seeds)}
                runs.append(Run(args.out / path.stem / task.replace("/", "_") / name / f"seed{first}", script,
                                which | content["flags"] | settings, seeds, args.bfloat16))
    return path.stem, runs


# ============================================================================================================= Running

def run_here(runs, jobs):
    """Makes the runs, as many at once as there are jobs. A failing one does not stop the others."""
    caught, cores = [], sorted(os.sched_getaffinity(0))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    jobs = jobs or len(cores)
    free = [cores[i::jobs] or [cores[i % len(cores)]] for i in range(jobs)]
    waiting, running, failed, told = [run for run in runs if run.state() != "done"], {}, 0, 0
    while running or (waiting and not caught):
        while waiting and free and not caught:
            run, share = waiting.pop(0), free.pop(0)
            running[run.start(share)] = run, share
            print(f"started, {len(waiting)} more to come: {run.run_dir}", flush=True)
        time.sleep(0.5)
        for process, (run, share) in list(running.items()):
            if process.poll() is not None:
                del running[process]
                free.append(share)
                failed += process.returncode != 0
                print(run.failure(process.returncode) if process.returncode and not caught else
                      f"ended: {run.run_dir}", flush=True)
        if len(caught) > told:  # they save and end
            told = len(caught)
            for process in running:
                process.terminate()
    if caught or failed:
        raise SystemExit(f"{failed + len(waiting)} of {len(runs)} runs are not done: the same command goes on")


class OnSlurm:
    """A run as a job. Before its time is up, or where it must make room, it saves, queues again and goes on."""
    process = None

    def __call__(self, run):
        if run.state() == "done":
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})  # the run inherits it: what SLURM says is said to us
        self.process = run.start(sorted(os.sched_getaffinity(0)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
        while self.process.poll() is None:
            time.sleep(1)
        if self.process.returncode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            time.sleep(120)  # SLURM stops every process of a job, and will end this one too, unless it grants a grace
            signal.raise_signal(signal.SIGUSR2)  # to submitit, which queues the job again
        if self.process.returncode:
            raise RuntimeError(run.failure(self.process.returncode))

    def checkpoint(self, run):
        """What submitit calls from its signal handler; so no Popen.wait, inside which we may already be."""
        from submitit.helpers import DelayedSubmission

        if self.process and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(OnSlurm(), run)


def submit(runs, name, args):
    import submitit  # pip install -r benchmark/requirements.txt

    executor = submitit.AutoExecutor(args.out / name / "slurm", cluster="slurm", slurm_max_num_timeout=1000)
    executor.update_parameters(
        name=name, timeout_min=args.slurm_timeout_min, cpus_per_task=args.slurm_cpus, mem_gb=args.slurm_mem_gb,
        gpus_per_node=args.slurm_gpus or None, slurm_partition=args.slurm_partition,
        slurm_array_parallelism=args.slurm_max_parallel, slurm_additional_parameters=dict(requeue=True))
    jobs = [job for i in range(0, len(runs), 1000)  # SLURM's own limit on an array is 1001
            for job in executor.map_array(OnSlurm(), runs[i : i + 1000])]
    arrays = ", ".join(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))
    print(f"{len(jobs)} runs handed to SLURM, array {arrays}: squeue shows them, --dry-run how far they are")


def main(args):
    name, runs = read_experiment(args)
    for run in runs:
        run.check()
    if args.dry_run:
        for run in runs:
            steps = f"{run.step('train'):>9,} of {run.settings['total-steps']:,}"
            print(f"{run.state():<11} {steps} updates  {run.run_dir}")
    elif args.slurm:
        submit([run for run in runs if run.state() != "done"], name, args)
    else:
        run_here(runs, args.jobs)
    print(", ".join(f"{n} {state}" for state, n in Counter(run.state() for run in runs).items()))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
