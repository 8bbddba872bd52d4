"""From run directories to learning curves and tables.

    python benchmark/report.py runs/a runs/b --out curves.png     # these two runs
    python benchmark/report.py runs/state --aggregate             # all runs below runs/state

Writes the tables beside the figure (.md, .csv), success over alpha where runs differ in it (_alpha), bars where all
methods are variants of one script (_bars), and with --aggregate interquartile means (_aggregate); every figure as .svg,
too. A method is a script with its overrides: `lps` and `lps --latent normal` are two, everywhere. Unfinished runs are
listed under the tables.
"""

import csv
import json
import math
import re
import sys
import zipfile
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from scipy.stats import trim_mean

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the scripts know their defaults
from benchmark.figures import ENOUGH, LOOKS, STYLE, draw_alpha, draw_bars, draw_curves, interval, name_task

SOURCE = "arXiv 2603.05296, 1,000,000 updates on OGBench's own data, means over five tasks a domain, approximate"
PLACES = ("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4", "all visual tasks")
PUBLISHED = {method: {place: percent / 100 for place, percent in zip(PLACES, percents)} for method, percents in {
    "lps": (95, 41, 79, 100, 22, 45), "dsrl": (99, 6, 78, 87, 21, 30), "qc_fql": (98, 39, 49, 39, 22, 35),
    "qc_mfql": (96, 31, 46, 47, 24, 34), "cfgrl": (14, 3, 42, 2, 1, 47)}.items()}
for method, percent in {"lps": 66, "lps --latent truncated-normal": 24, "lps --latent normal": 4, "lps --base flow": 54,
                        "lps --base flow --flow-steps 1": 17, "lps --predict velocity": 0}.items():
    PUBLISHED.setdefault(method, {})["all state tasks"] = percent / 100

# published_curves.csv: what its rows call our methods, and the default tasks of its domains.
CURVE_NAMES = {"dsrl": "DSRL", "qc_fql": "FQL", "ifql": "IFQL"}
DEFAULT_TASKS = {"cube-double": "2", "scene": "2", "puzzle-3x3": "4"}

# What may differ between the runs of one method.
NOT_METHOD = ("env_id dataset_dir dataset_path seed num_seeds total_steps log_interval eval_interval eval_episodes "
              "run_dir resume eval_only capture_video track action_dim").split()
COLUMNS = ("task or domain", "method", "success", "95% from", "95% to", "published", "published curve", "difference",
           "tasks", "updates", "seeds", "episodes", "data", "point of the curve")
BEHIND = COLUMNS[8:]  # sets that say what stands behind a number
LOCAL = ", collected locally"
ROUNDED = ", trained through bfloat16.py"
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
    """How many transitions, whether collect.py made them, and whether bfloat16.py trained on them. Of older records the
    dataset holds what is told of it, of newer ones its path."""
    facts = record["dataset"] if isinstance(record["dataset"], dict) else record
    mark = facts.get("mark", "")
    if facts is record and zipfile.is_zipfile(record["dataset"]):
        mark = zipfile.ZipFile(record["dataset"]).comment.decode(errors="replace")
    words = f"{facts['transitions']:,} transitions" + (LOCAL if "collect.py" in mark else "")
    return words + (ROUNDED if "products" in record else "")


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


# =========================================================================================================== Published

@cache
def read_curves():
    """{(domain, task, method): {updates: success}} of other groups' published runs."""
    curves = {}
    with open(Path(__file__).with_name("published_curves.csv")) as file:
        for row in csv.DictReader(file):
            key = row["domain"].removesuffix(" (sparse)"), row["task"], row["method"]
            curves.setdefault(key, {})[int(row["updates"])] = float(row["success"])
    return curves


def get_domain(task):
    """Of noisy data it keeps the -noisy."""
    return re.split("-play|-singletask", task)[0]


def get_number(task):
    found = re.search(r"-task(\d+)", task)
    return found[1] if found else DEFAULT_TASKS.get(get_domain(task))


def find_curves(task):
    """{published name: curve} on a task."""
    domain, number = get_domain(task), get_number(task)
    curves = {name: read_curves().get((domain, number, name)) for name in CURVE_NAMES.values()}
    return {name: curve for name, curve in curves.items() if curve}


def find_point(task, method, updates):
    """The last published success of a method up to a number of updates, and of what it is. Where no curve is published,
    the one number of the domain stands for it."""
    curve, of = find_curves(task).get(CURVE_NAMES.get(method)), "same task"
    if curve is None:
        curve, of = {1_000_000: PUBLISHED.get(method, {}).get(get_domain(task))}, "mean of five tasks"
    steps = [step for step in curve if step <= updates and curve[step] is not None]
    if not steps:
        return None, set()
    return curve[max(steps)], {f"{of} after {max(steps):,} updates"}


# ============================================================================================================== Tables

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
            success, (point, of_point) = np.mean(values), find_point(task, method, steps[-1])
            behind = ({1}, {steps[-1]}, {len(cell)}, {run["curve"][steps[-1]][1] for run in cell.values()},
                      {run["data"] for run in cell.values()}, of_point)
            numbers = task, method, success, *interval(values), None, point, subtract(success, point)
            rows.append(dict(zip(COLUMNS, (*numbers, *behind))) | dict(
                curve=curve, at_end=dict(zip(cell, values)), alpha=[*cell.values()][0]["alpha"],
                final=PUBLISHED.get(method, {}).get(get_domain(task)), published_curves=find_curves(task)))
    return rows


def subtract(success, point):
    return None if point is None else success - point


def union(rows, column):
    return set.union(*(row[column] for row in rows))


def mean_row(name, rows):
    """The mean of tasks' rows of one method, and all that stands behind it."""
    method, success, point = rows[0]["method"], np.mean([row["success"] for row in rows]), None
    behind = {column: union(rows, column) for column in BEHIND} | dict(tasks={len(rows)})
    if all(row["point of the curve"] for row in rows):
        point = np.mean([row["published curve"] for row in rows])
    else:  # the mean of some of the tasks is not to be compared with
        behind["point of the curve"] = set()
    published = PUBLISHED.get(method, {}).get(name)
    numbers = name, method, success, None, None, published, point, subtract(success, point)
    return dict(zip(COLUMNS, numbers)) | behind


def mean_rows(rows):
    """Per domain, and over all state or visual tasks, if a method has them of several domains."""
    domains, kinds = {}, {}
    for row in rows:
        domain, method = get_domain(row["task or domain"]), row["method"]
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
        means.append(row | {"success": iqm(scores), "95% from": low, "95% to": high, "seeds": {len(seeds)},
                            "published curve": None, "difference": None, "point of the curve": set(),
                            "at_end": {seed: iqm(score) for seed, score in zip(seeds, scores)}})
    return means


def text(x, digits=2):
    """An entry of a table; of a set its words, or the range of its numbers."""
    if isinstance(x, set) and all(isinstance(word, str) for word in x):
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

def tell_data(rows):
    """The data behind a figure; where panels differ in them, with their tasks."""
    tasks = {}
    for row in rows:
        for data in sorted(row["data"]):
            tasks.setdefault(data, {})[name_task(row["task or domain"])] = True
    if len({tuple(names) for names in tasks.values()}) == 1:
        return text(union(rows, "data"))
    return "; ".join(f"{data} ({'; '.join(names)})" for data, names in tasks.items())


def tell_n(rows, mean_is, interval_is):
    """What stands behind a figure, for its caption."""
    seeds = union(rows, "seeds")
    words = f"Seeds: n = {text(seeds)}, {text(union(rows, 'episodes'))} episodes each"
    if max(seeds) > 1:
        words += f"; {mean_is}"
    if min(seeds) < ENOUGH:
        words += "; a mark is one seed"
    if max(seeds) >= ENOUGH:
        words += f"; {interval_is}, from {ENOUGH} seeds on"
    return f"{words}. Data: {tell_data(rows)}."


def tell_updates(rows):
    return f"After {text(union(rows, 'updates'))} updates. "


def draw(rows, iqms, path):
    groups = {}  # of runs that differ in nothing but alpha; 0 has no place on a log axis
    for row in rows:
        if row["alpha"]:
            groups.setdefault((row["task or domain"], but_alpha(row["method"])), []).append(row)
    sweeps = {key: group for key, group in groups.items() if len(group) > 1}
    swept = [id(row) for group in sweeps.values() for row in group if "--alpha" in row["method"]]  # too many curves
    line = "a line is their mean", "a band its 95% interval (Student)"
    if curves := [row for row in rows if id(row) not in swept]:
        draw_curves(curves, tell_n(curves, *line), path)
        methods = {row["method"] for row in curves}
        if len(methods) > 1 and len({method.split()[0] for method in methods}) == 1:
            n = tell_n(curves, "a bar is their mean", "a black line its 95% interval (Student)")
            draw_bars(curves, "success rate", tell_updates(curves) + n, path.with_stem(f"{path.stem}_bars"))
    if sweeps:
        ends = [row for group in sweeps.values() for row in group]
        draw_alpha(sweeps, tell_updates(ends) + tell_n(ends, *line), path.with_stem(f"{path.stem}_alpha"))
    if iqms:
        n = tell_n(iqms, "a bar is their interquartile mean", "a black line its 95% interval (bootstrap)")
        draw_bars(iqms, "interquartile mean of the success rate", tell_updates(iqms) + n,
                  path.with_stem(f"{path.stem}_aggregate"))


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
    if any(row["point of the curve"] for row in rows):
        note += ("Published curve: other groups' published runs (published_curves.csv), the last point not beyond our "
                 "updates; difference: our success minus that. ")
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
    with matplotlib.rc_context(STYLE):
        draw(rows, iqms, args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
