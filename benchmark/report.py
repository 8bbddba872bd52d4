"""From run directories to learning curves and tables.

    python benchmark/report.py runs/a runs/b --out curves.png     # these two runs
    python benchmark/report.py runs/state --aggregate             # all runs below runs/state

Writes the tables beside the figure (.md, .csv), success over alpha where runs differ in it (_alpha.png), and with
--aggregate interquartile means (_aggregate.png). A method is a script with its overrides:
`lps` and `lps --latent normal` are two, everywhere. Unfinished runs are listed under the tables.
"""

import csv
import json
import math
import re
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from scipy.stats import t as student
from scipy.stats import trim_mean

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the scripts know their defaults

# Okabe and Ito's colours: they survive colour-blindness; line styles and markers survive grey print. The ablations of
# lps share a colour where they replace the same part.
LOOKS = {"lps": ("#D55E00", "-", "o"), "mf_bon": ("#D55E00", (0, (3, 1)), ">"), "dsrl": ("#0072B2", "--", "s"),
         "qc_fql": ("#009E73", "-.", "^"), "qc_mfql": ("#CC79A7", ":", "D"), "gfp": ("#009E73", (0, (2, 1)), "<"),
         "cfgrl": ("#E69F00", (0, (5, 1, 1, 1)), "v"), "ifql": ("#56B4E9", "-", "h"),
         "flow_bc": ("#000000", (0, (1, 2)), "X"), "mf_bc": ("#000000", (0, (4, 2)), "P"),
         "lps --latent truncated-normal": ("#56B4E9", "--", "s"), "lps --latent normal": ("#56B4E9", ":", "D"),
         "lps --base flow": ("#8C8C8C", "--", "^"), "lps --base flow --flow-steps 1": ("#8C8C8C", ":", "v"),
         "lps --predict velocity": ("#6B3E1D", "-.", "*")}

SOURCE = "arXiv 2603.05296, 1,000,000 updates on OGBench's own data, means over five tasks a domain, approximate"
PLACES = ("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4", "all visual tasks")
PUBLISHED = {method: {place: percent / 100 for place, percent in zip(PLACES, percents)} for method, percents in {
    "lps": (95, 41, 79, 100, 22, 45), "dsrl": (99, 6, 78, 87, 21, 30), "qc_fql": (98, 39, 49, 39, 22, 35),
    "qc_mfql": (96, 31, 46, 47, 24, 34), "cfgrl": (14, 3, 42, 2, 1, 47)}.items()}
for method, percent in {"lps": 66, "lps --latent truncated-normal": 24, "lps --latent normal": 4, "lps --base flow": 54,
                        "lps --base flow --flow-steps 1": 17, "lps --predict velocity": 0}.items():
    PUBLISHED.setdefault(method, {})["all state tasks"] = percent / 100

# What may differ between the runs of one method.
NOT_METHOD = ("env_id dataset_dir dataset_path seed num_seeds total_steps log_interval eval_interval eval_episodes "
              "run_dir resume eval_only capture_video track action_dim").split()
COLUMNS = ("task or domain", "method", "success", "95% from", "95% to", "published",
           "tasks", "updates", "seeds", "episodes", "data")  # the last five, sets, say what stands behind a number
LOCAL = ", collected locally"
REPS = 2000  # of the bootstrap


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # run directories, or directories to search for them
    out: Path = Path("curves.png")  # the figure to write; tables and further figures go beside it
    aggregate: bool = False  # interquartile means over the tasks that all methods have


# ================================================================================================================ Runs

def read_method(record):
    """A run's script with the flags in which it departs from the script's defaults for its environment. Runs up to
    commit 3e837bb say "algorithm", mf_bc was flow_bc --policy meanflow, and the flags of ablations.py were lps's."""
    script = record.get("script") or record["algorithm"]
    if record.get("policy") == "meanflow":
        script = "mf_bc"
    name = "lps" if script == "ablations" else script
    by_domain = import_module(name).BY_DOMAIN
    args = import_module("benchmark.ablations" if name == "lps" else name).Args()
    for flag, default in vars(args).items():
        if default is None and flag in by_domain:
            default = next(x for domain, x in by_domain[flag].items() if domain in record["env_id"])
        if flag not in NOT_METHOD and np.any(record.get(flag, default) != np.array(default)):
            name += f" --{flag.replace('_', '-')} {' '.join(map(str, np.ravel(record[flag])))}"
    return name


def but_alpha(method):
    return re.sub(r" --alpha \S+", "", method)


def describe_data(record):
    """Of older records the dataset holds what is told of it, of newer ones its path."""
    facts = record["dataset"] if isinstance(record["dataset"], dict) else record
    mark = facts.get("mark", "")
    if facts is record and zipfile.is_zipfile(record["dataset"]):
        mark = zipfile.ZipFile(record["dataset"]).comment.decode(errors="replace")
    return f"{facts['transitions']:,} transitions" + (LOCAL if "collect.py" in mark else "")


def read_runs(places):
    """{(task, method, seed): run} of all runs in and below the given directories, in the order of the tables. A run's
    curve is {step: (success, episodes)}, without evaluations that report no success."""
    runs = {}
    for path in sorted({file.parent.resolve() for place in places for file in place.rglob("args.json")}):
        record, rows = json.loads((path / "args.json").read_text()), []
        if (path / "eval.csv").exists():
            with open(path / "eval.csv") as file:
                rows = [row for row in csv.DictReader(file) if row["success"] != "nan"]
        for seed in range(record["seed"], record["seed"] + record["num_seeds"]):
            key = record["env_id"], read_method(record), seed
            if key in runs:
                raise SystemExit(f"two runs of {key[1]} on {key[0]}, seed {seed}: {runs[key]['path']} and {path}")
            curve = {int(row["step"]): (float(row["success"]), int(row["episodes"]))
                     for row in rows if int(row["seed"]) == seed}
            runs[key] = dict(path=path, curve=curve, alpha=record.get("alpha"), total_steps=record["total_steps"],
                             data=describe_data(record))
    order = [*LOOKS, *sorted(but_alpha(method) for _, method, _ in runs)]

    def place_in_table(key):
        return key[0], order.index(but_alpha(key[1])), runs[key]["alpha"] or 0, key[2]

    return {key: runs[key] for key in sorted(runs, key=place_in_table)}


# ============================================================================================================== Tables

def interval(values):
    """Student's 95% interval of the mean over seeds, within [0, 1]; nan for a single seed."""
    if len(values) == 1:
        return math.nan, math.nan
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return max(0.0, np.mean(values) - half), min(1.0, np.mean(values) + half)


def task_rows(runs):
    """For each task and method the mean over seeds after the last step that all evaluated seeds reached; and for the
    figures the curve, {step: successes}, and each seed's success at its end."""
    cells, rows = {}, []
    for (task, method, seed), run in runs.items():
        if run["curve"]:
            cells.setdefault((task, method), {})[seed] = run
    for (task, method), cell in cells.items():
        steps = sorted(set.intersection(*(set(run["curve"]) for run in cell.values())))
        if steps:
            curve = {step: [run["curve"][step][0] for run in cell.values()] for step in steps}
            values = curve[steps[-1]]
            behind = ({1}, {steps[-1]}, {len(cell)}, {run["curve"][steps[-1]][1] for run in cell.values()},
                      {run["data"] for run in cell.values()})
            row = dict(zip(COLUMNS, (task, method, np.mean(values), *interval(values), None, *behind)))
            rows.append(row | dict(curve=curve, at_end=dict(zip(cell, values)), alpha=[*cell.values()][0]["alpha"]))
    return rows


def union(rows, column):
    return set.union(*(row[column] for row in rows))


def mean_row(name, rows):
    """The mean of tasks' rows of one method, and all that stands behind it."""
    method, success = rows[0]["method"], np.mean([row["success"] for row in rows])
    published = PUBLISHED.get(method, {}).get(name)
    behind = [union(rows, column) for column in COLUMNS[7:]]
    return dict(zip(COLUMNS, (name, method, success, None, None, published, {len(rows)}, *behind)))


def mean_rows(rows):
    """Per domain (env_id up to -play; noisy data keep their -noisy), and over all state or visual tasks, if a method
    has them of several domains."""
    domains, kinds = {}, {}
    for row in rows:
        domain, method = re.split("-play|-singletask", row["task or domain"])[0], row["method"]
        kind = "all visual tasks" if domain.startswith("visual-") else "all state tasks"
        domains.setdefault((domain, method), []).append(row)
        kinds.setdefault((kind, method), []).append(row)
    groups = domains | {key: group for key, group in kinds.items() if group not in domains.values()}
    return [mean_row(name, group) for (name, _), group in groups.items()]


def aggregate(rows):
    """Interquartile means over the tasks that all methods have, as in rliable (arXiv 2108.13264). The 95% intervals are
    of the bootstrap, seeds drawn anew for each task; a single seed has none."""
    of, means, iqm = {}, [], partial(trim_mean, proportiontocut=0.25, axis=None)
    for row in rows:
        of.setdefault(row["method"], {})[row["task or domain"]] = row
    tasks = sorted(set.intersection(*map(set, of.values())))
    for method, row_of in of.items():
        ends = [row_of[task]["at_end"] for task in tasks]
        seeds = sorted(set.intersection(*map(set, ends))) if ends else []
        if not seeds:
            raise SystemExit(f"--aggregate needs tasks that every method, and a seed of {method}, was evaluated on")
        scores, rng = np.array([[end[seed] for end in ends] for seed in seeds]), np.random.default_rng(0)
        draws = [rng.integers(len(seeds), size=scores.shape) for _ in range(REPS)]
        low, high = np.percentile([iqm(np.take_along_axis(scores, draw, axis=0)) for draw in draws], (2.5, 97.5))
        if len(seeds) == 1:
            low = high = math.nan
        row = mean_row(f"IQM of {len(tasks)} task(s)", [row_of[task] for task in tasks])
        means.append(row | {"success": iqm(scores), "95% from": low, "95% to": high, "seeds": {len(seeds)}})
    return means


def text(x, digits=2):
    """An entry of a table; of a set its words, or the range of its numbers."""
    if isinstance(x, set) and isinstance(min(x), str):
        return "; ".join(sorted(x))
    if isinstance(x, set):
        return " to ".join(f"{n:,}" for n in sorted({min(x), max(x)}))
    if isinstance(x, str):
        return x
    return "" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def markdown(rows):
    """A table of the columns in which any row has something."""
    cells = [[text(row[column]) for column in COLUMNS] for row in rows]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    return "\n".join("| " + " | ".join(line[i] or "-" for i in shown) + " |" for line in lines)


# ============================================================================================================= Figures

def look(method):
    if method not in LOOKS:
        LOOKS[method] = LOOKS[method.split()[0]][0], "-", "pHd<>8"[len(LOOKS) % 6]  # its script's colour
    colour, style, marker = LOOKS[method]
    return dict(color=colour, ls=style, marker=marker, ms=5, lw=1.8)


def save(figure, path):
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(path)


def draw(rows, xlabel, title, path):
    """The rows' curves, one panel a task."""
    tasks = list(dict.fromkeys(row["task or domain"] for row in rows))
    columns, lines = min(len(tasks), 5), math.ceil(len(tasks) / 5)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharey=True, layout="constrained",
                                figsize=(max(6, 3.6 * columns), 1.4 + 2.9 * lines))
    handles = {}
    for axis in axes.flat[len(tasks):]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks):
        here = [row for row in rows if row["task or domain"] == task]
        for row in here:
            x, values, looks = list(row["curve"]), list(row["curve"].values()), look(row["method"])
            handles[row["method"]], = axis.plot(x, [np.mean(v) for v in values], **looks)
            axis.fill_between(x, *zip(*map(interval, values)), color=looks["color"], alpha=0.13, lw=0)
        local = any(LOCAL in data for data in union(here, "data"))
        axis.set_title(f"{task}\n(data collected locally)" if local else task, fontsize=9)
        axis.set(xlabel=xlabel, ylim=(-0.03, 1.03), xscale="log" if xlabel == "alpha" else "linear")
        if xlabel != "alpha":
            axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter("{x:,g}")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("success rate")
    seeds, episodes = text(union(rows, "seeds")), text(union(rows, "episodes"))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, handlelength=4,
                  fontsize=8, title_fontsize=8,
                  title=f"{title}: mean over seeds ({seeds}; {episodes} episodes each), band: its 95% interval")
    save(figure, path)


def draw_aggregate(means, path):
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.3 * len(means)), layout="constrained")
    for row in means[::-1]:
        x = row["95% from"], row["success"], row["95% to"]
        axis.plot(x, 3 * [row["method"]], **look(row["method"]))
    tasks, seeds = text(union(means, "tasks")), text(union(means, "seeds"))
    axis.set(xlim=(-0.03, 1.03), xlabel="interquartile mean of the success rate and its 95% interval",
             title=f"{tasks} task(s), seeds a method: {seeds}")
    axis.grid(alpha=0.3)
    save(figure, path)


# ================================================================================================================ main

def main(args):
    runs = read_runs(args.run_dirs)
    rows = task_rows(runs)
    if not rows:
        raise SystemExit("in and below these directories no run's success has been evaluated")
    means, iqms = mean_rows(rows), aggregate(rows) if args.aggregate else []
    parts = [markdown(part) for part in (rows, means, iqms) if part]
    note = ("A task's success is the mean over seeds after the last step that all of them reached, with Student's 95% "
            "interval; episodes are per seed. Several tasks: the mean of their means. ")
    if iqms:
        note += f"IQM: over seeds and tasks, {REPS:,} stratified bootstrap samples. "
    parts.append(f"{note}Published: {SOURCE}.")
    ends = [(*key, max(run["curve"], default=0), run["total_steps"]) for key, run in runs.items()]
    unfinished = [f"- {method} on {task}, seed {seed}: evaluated up to {end:,} of {total:,} updates"
                  for task, method, seed, end, total in ends if end < total]
    if unfinished:
        parts += ["Unfinished:", "\n".join(unfinished)]
    print("\n\n".join(parts))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    with open(args.out.with_suffix(".csv"), "w", newline="") as file:
        table = [[re.sub(r"(?<=\d),(?=\d)", "", text(row[key], 6)) for key in COLUMNS] for row in rows + means + iqms]
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
    groups = {}  # of runs that differ in nothing but alpha; 0 has no place on a log axis
    for row in rows:
        if row["alpha"]:
            groups.setdefault((row["task or domain"], but_alpha(row["method"])), []).append(row)
    sweeps = {key: group for key, group in groups.items() if len(group) > 1}
    swept = [id(row) for group in sweeps.values() for row in group if "--alpha" in row["method"]]  # too many curves
    if curves := [row for row in rows if id(row) not in swept]:
        draw(curves, "updates", "success over updates", args.out)
    if sweeps:
        ends = [mean_row(task, group) | dict(
            method=method, curve={row["alpha"]: list(row["at_end"].values()) for row in group})
            for (task, method), group in sweeps.items()]
        title = f"success after {text(union(ends, 'updates'))} updates"
        draw(ends, "alpha", title, args.out.with_stem(f"{args.out.stem}_alpha"))
    if iqms:
        draw_aggregate(iqms, args.out.with_stem(f"{args.out.stem}_aggregate"))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
