"""From run directories to learning curves and tables.

    python -m benchmark.report runs/a runs/b --out curves.png    # these runs
    python -m benchmark.report runs/state                        # all runs below runs/state

Success is the mean over a run's last three evaluations, then over seeds; where an environment
reports no success, the return takes its place. Beside the figure lie the tables (.md, .csv),
success over alpha where runs differ in nothing else (_alpha), bars where all methods are variants
of one script (_bars), and every figure as .svg.
"""

import csv
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import tyro

from benchmark import SCRIPTS
from benchmark.figures import ENOUGH, STYLE, draw_alpha, draw_bars, draw_curves, interval

# published_means.csv has the paper's own numbers, published_curves.csv other groups' runs.
CURVE_NAMES = {"dsrl": "DSRL", "qc_fql": "FQL", "ifql": "IFQL"}  # what the curves call our methods
DEFAULT_TASKS = {"cube-double": "2", "scene": "2", "puzzle-3x3": "4"}

# What of args.json may differ between the runs of one method.
NOT_METHOD = (
    "env_id dataset_dir dataset_path seed total_steps log_interval eval_interval eval_episodes "
    "run_dir resume eval_only capture_video track action_dim wandb_id products dataset "
    "transitions trajectories python jax ogbench mujoco device"
).split() + ["COLLECTED HERE"]
LAST = 3  # evaluations behind a run's success
NUMBERS = ("success", "return", "95% from", "95% to", "published", "published curve", "difference")
BEHIND = ("tasks", "updates", "evaluations", "seeds", "episodes", "data")  # the numbers, in sets
COLUMNS = ("task or domain", "method", *NUMBERS, *BEHIND)
NOTE = (
    f"Success is the mean over a run's last {LAST} evaluations (fewer if it has fewer) up to the "
    "last step that all seeds reached, never the one at step 0, and then over seeds, with "
    "Student's 95% interval; several tasks: the mean of their means. Published: arXiv 2603.05296, "
    "1,000,000 updates on OGBench's own data, means over five tasks a domain, approximate. "
    "Published curve: other groups' runs, the mean of their points within our updates."
)


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]  # runs, or directories to search for them
    out: Path = Path("curves.png")  # the figure; tables and further figures go beside it


# ============================================================================================ Runs


def read_defaults(record):
    """The default arguments of a run's script in its environment; none of a script of your own."""
    script = module = record["script"]
    if script in ("lps", "ablations"):  # which has the flags of lps.py, and more
        script, module = "lps", "benchmark.ablations"
    if script not in SCRIPTS:
        return {}
    defaults = dict(vars(import_module(module).Args()))
    for flag, by_domain in import_module(script).BY_DOMAIN.items():
        defaults[flag] = next(x for domain, x in by_domain.items() if domain in record["env_id"])
    return defaults


def read_method(record):
    """A run's script with the arguments in which it departs from the script's defaults."""
    name = record["script"]
    if name == "ablations":
        name = "lps"
    for flag, default in read_defaults(record).items():
        values = np.ravel(record.get(flag, default)).tolist()
        if flag not in NOT_METHOD and values != np.ravel(default).tolist():
            name += f" --{flag.replace('_', '-')} {' '.join(map(str, values))}"
    return name


def but_alpha(method):
    return re.sub(r" --alpha \S+", "", method)


def read_run(path):
    """What args.json holds, what follows from it, and {updates: a row of eval.csv}."""
    run = json.loads((path / "args.json").read_text())
    defaults, method = read_defaults(run), read_method(run)
    settings = {name: x for name, x in run.items() if name not in NOT_METHOD}
    run |= dict(path=path, method=method, settings={} if defaults else settings)
    run["alpha"] = run.get("alpha", defaults.get("alpha"))
    run["data"] = f"{run['transitions']:,} transitions"
    if "COLLECTED HERE" in run:
        run["data"] += ", collected locally"
    if "products" in run:
        run["data"] += ", trained through bfloat16.py"
    run["evaluations"] = {}
    if (path / "eval.csv").exists():
        with open(path / "eval.csv") as file:
            for row in csv.DictReader(file):
                run["evaluations"][int(row["step"])] = {key: float(x) for key, x in row.items()}
    return run


def read_runs(places):
    """All runs in and below the given directories, in the order of the tables."""
    paths = set()
    for place in places:
        paths |= {file.parent.resolve() for file in place.rglob("args.json")}

    def place_in_table(run):
        script = run["method"].split()[0]
        order = SCRIPTS.index(script) if script in SCRIPTS else len(SCRIPTS)
        return run["env_id"], order, but_alpha(run["method"]), run["alpha"] or 0, run["seed"]

    return sorted([read_run(path) for path in sorted(paths)], key=place_in_table)


# ======================================================================================= Published


@cache
def read_published(name):
    with open(Path(__file__).with_name(name)) as file:
        return list(csv.DictReader(file))


def find_mean(place, method):
    """The paper's success in a domain, or over all tasks, after 1,000,000 updates."""
    for row in read_published("published_means.csv"):
        if (row["place"], row["method"]) == (place, method):
            return float(row["success"])
    return None


def get_domain(task):
    """Of noisy data it keeps the -noisy."""
    return re.split("-play|-singletask", task)[0]


def find_curves(task):
    """{published name: {updates: success}} of a task, of the methods that we have."""
    domain, curves = get_domain(task), {}
    number = re.search(r"-task(\d+)", task)
    number = number[1] if number else DEFAULT_TASKS.get(domain)
    for row in read_published("published_curves.csv"):
        is_ours = row["domain"].removesuffix(" (sparse)") == domain and row["task"] == number
        if is_ours and row["method"] in CURVE_NAMES.values():
            curves.setdefault(row["method"], {})[int(row["updates"])] = float(row["success"])
    return curves


# ========================================================================================== Tables


def task_row(task, method, cell, measure):
    """A method's row: the mean over each seed's last evaluations up to the last step that all of
    them reached, then over seeds. The evaluation at step 0, of an untrained policy, is drawn but
    never among them. Beside the columns of the tables it has what the figures need."""
    steps = [set(run["evaluations"]) for run in cell]
    curve = {}
    for step in sorted(set.intersection(*steps)):
        values = [run["evaluations"][step][measure] for run in cell]
        if measure == "success":
            values = np.nan_to_num(values)  # where it is told at all, silence is failure
        if not np.isnan(values).any():
            curve[step] = values
    last = [step for step in curve if step > 0][-LAST:]
    if not last:
        return None
    ends = np.mean([curve[step] for step in last], axis=0)
    row = dict.fromkeys(COLUMNS) | {"task or domain": task, "method": method, "tasks": {1}}
    row[measure] = np.mean(ends)
    row["95% from"], row["95% to"] = interval(ends, measure)
    row["updates"], row["evaluations"], row["seeds"] = set(last), {len(last)}, {len(cell)}
    row["episodes"] = {int(run["evaluations"][last[-1]]["episodes"]) for run in cell}
    row["data"] = {run["data"] for run in cell}
    row |= dict(measure=measure, curve=curve, ends=ends, alpha=cell[0]["alpha"])
    row |= {"published curves": {}, "final": None}
    if measure == "success":
        row["final"] = find_mean(get_domain(task), method)
        row["published curves"] = find_curves(task)
        published = row["published curves"].get(CURVE_NAMES.get(method), {})
        points = [x for step, x in published.items() if last[0] <= step <= last[-1]]
        if points:
            row["published curve"] = np.mean(points)
            row["difference"] = row["success"] - row["published curve"]
    return row


def check(cell):
    """The runs of a row, in the order of their seeds, are one method's. (Of a script whose defaults
    are not known, the name alone does not say so.)"""
    for run, other in pairwise(cell):
        both = f"{run['path']} and {other['path']} are runs of {run['method']}"
        if run["seed"] == other["seed"]:
            raise SystemExit(f"{both} with the same task and seed: report one of them")
        differ = [key for key, x in run["settings"].items() if other["settings"].get(key) != x]
        if differ:
            raise SystemExit(f"{both} with another {', '.join(differ)}: report them apart")


def task_rows(runs):
    """A row for each task and method. A task of which no run reports a success has its return."""
    cells, measures = {}, {}
    for run in runs:
        successes = [row["success"] for row in run["evaluations"].values()]
        if not np.isnan(successes).all():
            measures[run["env_id"]] = "success"
        if max(run["evaluations"], default=0) > 0:
            cells.setdefault((run["env_id"], run["method"]), []).append(run)
    rows = []
    for (task, method), cell in cells.items():
        check(cell)
        rows.append(task_row(task, method, cell, measures.get(task, "return")))
    return [row for row in rows if row]


def union(rows, column):
    return set().union(*(row[column] for row in rows))


def mean_row(place, rows):
    """The mean of a method's rows, and all that stands behind it."""
    row = dict.fromkeys(COLUMNS) | {"task or domain": place, "method": rows[0]["method"]}
    row |= {column: union(rows, column) for column in BEHIND} | {"tasks": {len(rows)}}
    row["published"] = find_mean(place, row["method"])
    for column in ("success", "published curve", "difference"):
        if all(row[column] is not None for row in rows):
            row[column] = np.mean([row[column] for row in rows])
    return row


def mean_rows(rows):
    """Per domain, and over all state or visual tasks, if a method has them of several domains."""
    domains, kinds = {}, {}
    for row in rows:
        if row["measure"] == "success":
            domain = get_domain(row["task or domain"])
            kind = "all visual tasks" if domain.startswith("visual-") else "all state tasks"
            domains.setdefault((domain, row["method"]), []).append(row)
            kinds.setdefault((kind, row["method"]), []).append(row)
    several = {key: group for key, group in kinds.items() if group not in domains.values()}
    return [mean_row(place, group) for (place, _), group in (domains | several).items()]


def text(entry, digits=2):
    """An entry of a table; of a set its words, or the range of its numbers."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, set) and all(isinstance(word, str) for word in entry):
        return "; ".join(sorted(entry))
    if isinstance(entry, set):
        return " to ".join(f"{number:,}" for number in sorted({min(entry), max(entry)}))
    return "" if entry is None or math.isnan(entry) else f"{entry:.{digits}f}"


def make_cells(row, digits):
    return [text(row[column], digits) for column in COLUMNS]


def make_markdown(rows):
    """A table of the columns in which any row has something."""
    cells = [make_cells(row, 2) for row in rows]
    shown = [i for i in range(len(COLUMNS)) if any(line[i] for line in cells)]
    lines = []
    for line in (COLUMNS, len(COLUMNS) * ["---"], *cells):
        lines.append("| " + " | ".join(line[i] or "-" for i in shown) + " |")
    return "\n".join(lines)


def write_csv(rows, path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow(re.sub(r"(?<=\d),(?=\d)", "", cell) for cell in make_cells(row, 6))


def list_unfinished(runs):
    lines = []
    for run in runs:
        end, total = max(run["evaluations"], default=0), run["total_steps"]
        if end < total:
            where = f"{run['method']} on {run['env_id']}, seed {run['seed']}"
            lines.append(f"- {where}: evaluated up to {end:,} of {total:,} updates")
    return "\n".join(["Unfinished:", "", *lines]) if lines else ""


# ========================================================================================= Figures


def tell(rows, is_last=False):
    """What stands behind a figure, for its caption."""
    seeds, episodes = union(rows, "seeds"), text(union(rows, "episodes"))
    words = f"Seeds: n = {text(seeds)}, {episodes} episodes an evaluation; a mark is one seed, "
    words += "a line or bar the mean"
    if max(seeds) >= ENOUGH:
        words += f", from {ENOUGH} seeds on with its 95% interval (Student)"
    if is_last:
        words = f"Means over the evaluations after {text(union(rows, 'updates'))} updates. {words}"
    return f"{words}. Data: {text(union(rows, 'data'))}."


def draw(rows, path):
    groups = {}  # of rows that differ in nothing but alpha; 0 has no place on a log axis
    for row in rows:
        if row["alpha"]:
            key = row["task or domain"], but_alpha(row["method"])
            groups.setdefault(key, []).append(row)
    sweeps = {key: group for key, group in groups.items() if len(group) > 1}
    ends = [row for group in sweeps.values() for row in group]
    swept = [id(row) for row in ends if "--alpha" in row["method"]]  # too many for curves
    curves = [row for row in rows if id(row) not in swept]
    methods = {row["method"] for row in curves}
    if curves:
        draw_curves(curves, tell(curves), path)
    if len(methods) > 1 and len({method.split()[0] for method in methods}) == 1:
        draw_bars(curves, tell(curves, is_last=True), path.with_stem(f"{path.stem}_bars"))
    if sweeps:
        draw_alpha(sweeps, tell(ends, is_last=True), path.with_stem(f"{path.stem}_alpha"))


# ============================================================================================ main


def main(args):
    runs = read_runs(args.run_dirs)
    rows = task_rows(runs)
    if not rows:
        raise SystemExit("in and below these directories no run has been evaluated after an update")
    means = mean_rows(rows)
    tables = [make_markdown(table) for table in (rows, means) if table]
    page = "\n\n".join([*tables, NOTE, list_unfinished(runs)]).strip()
    print(page)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".md").write_text(page + "\n")
    write_csv(rows + means, args.out.with_suffix(".csv"))
    with matplotlib.rc_context(STYLE):
        draw(rows, args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.partition("\n")[0]))
