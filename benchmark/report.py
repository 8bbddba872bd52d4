"""From run directories to learning curves and a table.

    python benchmark/report.py runs/a runs/b --out curves.png

One panel a task, one colour an algorithm: the mean over seeds, and each seed thinly beside it.
"""

import csv
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import matplotlib
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours: they survive colour-blindness; line styles survive grey print.
LOOKS = dict(lps=("#D55E00", "-"), dsrl=("#0072B2", "--"), qc_fql=("#009E73", "-."), qc_mfql=("#CC79A7", ":"),
             cfgrl=("#E69F00", (0, (5, 1, 1, 1))), flow_bc=("#000000", (0, (1, 2))))


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories of the scripts"""
    out: Path = Path("curves.png")
    """the figure to write"""


def read_run(run_dir):
    """(args.json, rows of eval.csv) of a run that was evaluated at least once."""
    try:
        record = json.loads((run_dir / "args.json").read_text())
        with open(run_dir / "eval.csv") as file:
            return record, list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {run_dir} is no run directory with an evaluation: {error}") from None


def gather(run_dirs):
    """{task: {algorithm: {seed: [(step, success)]}}}, and what stands behind it: {(task, algorithm): facts}."""
    curves, facts = defaultdict(lambda: defaultdict(dict)), {}
    for run_dir in run_dirs:
        record, rows = read_run(run_dir)
        task, algorithm = record["env_id"], record["algorithm"]
        for row in rows:
            curve = curves[task][algorithm].setdefault(int(row["seed"]), [])
            curve.append((int(row["step"]), float(row["success"])))
        facts[task, algorithm] = dict(episodes=record["eval_episodes"], transitions=record["dataset"]["transitions"],
                                      local="collect.py" in record["dataset"]["mark"])
    return curves, facts


def mean_curve(seeds):
    """The mean over seeds at every step that all of them reached."""
    by_step = defaultdict(list)
    for curve in seeds.values():
        for step, success in curve:
            by_step[step].append(success)
    return [(step, sum(x) / len(x)) for step, x in sorted(by_step.items()) if len(x) == len(seeds)]


def table(curves, facts):
    lines = ["| task | algorithm | success | updates | seeds | episodes each | data |", "|---|---|---|---|---|---|---|"]
    for task, algorithms in sorted(curves.items()):
        for algorithm, seeds in sorted(algorithms.items()):
            fact, (step, success) = facts[task, algorithm], mean_curve(seeds)[-1]
            data = f"{fact['transitions']:,} transitions" + ", collected locally" * fact["local"]
            cells = (task, algorithm, f"{success:.2f}", f"{step:,}", len(seeds), fact["episodes"], data)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(curves, facts, path):
    figure, axes = plt.subplots(1, len(curves), figsize=(1 + 4.2 * len(curves), 3.6), squeeze=False, sharey=True)
    for axis, (task, algorithms) in zip(axes[0], sorted(curves.items())):
        for algorithm, seeds in sorted(algorithms.items()):
            colour, style = LOOKS[algorithm]
            if len(seeds) > 1:
                for curve in seeds.values():
                    axis.plot(*zip(*sorted(curve)), color=colour, alpha=0.3, lw=0.8)
            label = f"{algorithm} ({len(seeds)} seed(s), {facts[task, algorithm]['episodes']} episodes each)"
            axis.plot(*zip(*mean_curve(seeds)), color=colour, ls=style, lw=2, marker="o", ms=4, label=label)
        local = any(fact["local"] for (name, _), fact in facts.items() if name == task)
        axis.set_title(task + ("\n(data collected locally)" if local else ""), fontsize=9)
        axis.set(xlabel="updates", ylim=(-0.03, 1.03), xlim=(0, None))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.2), frameon=False)
    axes[0, 0].set_ylabel("success rate")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(args):
    if not args.run_dirs:
        raise SystemExit("error: name at least one run directory")
    curves, facts = gather(args.run_dirs)
    print(table(curves, facts))
    draw(curves, facts, args.out)
    print(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
