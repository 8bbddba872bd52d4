"""From run directories to learning curves and tables.

    python benchmark/report.py runs/a runs/b --out curves.png     # these two runs
    python benchmark/report.py runs/state --aggregate             # all runs below runs/state

Writes the tables beside the figure (.md, .csv), success over alpha where runs differ in it (_alpha.png), and with
--aggregate interquartile means and performance profiles (_aggregate.png). A method is a script with its overrides:
`lps` and `lps --latent normal` are two, everywhere. Missing, unfinished and uneven runs are listed under the tables.
"""

import csv
import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro
from scipy.stats import t as student

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # the scripts know their defaults

# Okabe and Ito's colours: they survive colour-blindness; line styles and markers survive grey print. The ablations of
# lps share a colour where they replace the same part.
LOOKS = {"lps": ("#D55E00", "-"), "dsrl": ("#0072B2", "--"), "qc_fql": ("#009E73", "-."), "qc_mfql": ("#CC79A7", ":"),
         "cfgrl": ("#E69F00", (0, (5, 1, 1, 1))), "flow_bc": ("#000000", (0, (1, 2))),
         "flow_bc --policy meanflow": ("#000000", (0, (4, 2))),
         "lps --latent truncated-normal": ("#56B4E9", "--"), "lps --latent normal": ("#56B4E9", ":"),
         "lps --base flow": ("#8C8C8C", "--"), "lps --base flow --flow-steps 1": ("#8C8C8C", ":"),
         "lps --predict velocity": ("#6B3E1D", "-.")}
MARKERS = dict(zip(LOOKS, "os^DvXPsD^v*"))

SOURCE = "arXiv 2603.05296, 1,000,000 updates on OGBench's own data, means over five tasks a domain, approximate"
PLACES = ("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4", "all visual tasks")
PUBLISHED = {method: {place: percent / 100 for place, percent in zip(PLACES, percents)} for method, percents in {
    "lps": (95, 41, 79, 100, 22, 45), "dsrl": (99, 6, 78, 87, 21, 30), "qc_fql": (98, 39, 49, 39, 22, 35),
    "qc_mfql": (96, 31, 46, 47, 24, 34), "cfgrl": (14, 3, 42, 2, 1, 47)}.items()}
for method, percent in {"lps": 66, "lps --latent truncated-normal": 24, "lps --latent normal": 4, "lps --base flow": 54,
                        "lps --base flow --flow-steps 1": 17, "lps --predict velocity": 0}.items():
    PUBLISHED.setdefault(method, {})["all state tasks"] = percent / 100

# What may differ between the runs of one method.
NOT_METHOD = {"algorithm", "env_id", "dataset", "dataset_dir", "dataset_path", "dataset_on_host", "seed", "num_seeds",
              "total_steps", "log_interval", "eval_interval", "eval_episodes", "run_dir", "resume", "eval_only",
              "capture_video", "track", "device", "versions"}
BEHIND = ("tasks", "updates", "seeds", "episodes", "data")  # what stands behind a number
COLUMNS = ("task or domain", "method", "success", "95% from", "95% to", "published", *BEHIND)
LOCAL = ", collected locally"
REPS, THRESHOLDS = 2000, np.linspace(0, 1, 51)  # of the bootstrap; of the performance profiles


@dataclass
class Args:
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """run directories of the scripts, or directories to search for them"""
    out: Path = Path("curves.png")
    """the figure to write; tables and further figures go beside it"""
    aggregate: bool = False
    """interquartile means and performance profiles over the tasks that all methods have (needs rliable)"""


def fail(message):
    raise SystemExit(f"error: {message}")


def overrides(record):
    """{argument: value} where a run departs from its script's defaults for its environment."""
    if not (ROOT / f"{record['algorithm']}.py").exists():
        raise ValueError(f"there is no script {record['algorithm']}")
    script = import_module(record["algorithm"])
    args = script.Args(env_id=record["env_id"])
    script.check_args(args)
    defaults = json.loads(json.dumps(asdict(args), default=str))
    keys = [*defaults, *sorted(record.keys() - defaults.keys())]  # one order, whatever the record's
    return {key: record[key] for key in keys if key in record.keys() - NOT_METHOD and record[key] != defaults.get(key)}


def read_run(path):
    """[(task, method, seed, run)], where run["curve"] is {step: (success, episodes)}."""
    try:
        record, rows = json.loads((path / "args.json").read_text()), []
        if (path / "eval.csv").exists():
            with open(path / "eval.csv") as file:
                rows = [(int(row["seed"]), int(row["step"]), float(row["success"]), int(row["episodes"]))
                        for row in csv.DictReader(file)]
        flags = {key: f" --{key.replace('_', '-')} {' '.join(map(str, np.ravel(value)))}"
                 for key, value in overrides(record).items()}
        data, but_alpha = record["dataset"], [flag for key, flag in flags.items() if key != "alpha"]
        run = dict(path=path, alpha=record.get("alpha"), but_alpha="".join([record["algorithm"], *but_alpha]),
                   total_steps=record["total_steps"], fingerprint=data["fingerprint"],
                   data=f"{data['transitions']:,} transitions" + LOCAL * ("collect.py" in data["mark"]))
        seeds = range(record["seed"], record["seed"] + record["num_seeds"])
        task, method = record["env_id"], "".join([record["algorithm"], *flags.values()])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        fail(f"{path} holds no run that can be read: {error!r}")
    if any(math.isnan(success) for _, _, success, _ in rows):
        fail(f"{path}: its environment reports no success")
    return [(task, method, seed, run | dict(curve={row[1]: row[2:] for row in rows if row[0] == seed}))
            for seed in seeds]


def gather(places):
    """{(task, method): {seed: run}} of all runs in and below the given directories."""
    paths, cells = {}, {}
    for place in places:
        found = [place] if (place / "args.json").exists() else sorted(p.parent for p in place.rglob("args.json"))
        if not found:
            fail(f"{place} is no run directory, and there is none below it")
        paths |= {path.resolve(): path for path in found}
    for path in paths.values():
        for task, method, seed, run in read_run(path):
            cell = cells.setdefault((task, method), {})
            if seed in cell:
                fail(f"two runs of {method} on {task} with seed {seed}: {cell[seed]['path']} and {path}")
            cell[seed] = run
    if not any(map(evaluated, cells.values())):
        fail("none of these runs has been evaluated yet")
    facts = {key: next(iter(cell.values())) for key, cell in cells.items()}
    order = [*LOOKS, *sorted(run["but_alpha"] for run in facts.values())]
    place = lambda key: (key[0], order.index(facts[key]["but_alpha"]), facts[key]["alpha"] or 0)
    return {key: cells[key] for key in sorted(cells, key=place)}


def evaluated(cell):
    return {seed: run for seed, run in sorted(cell.items()) if run["curve"]}


def common_curve(cell):
    """{step: the successes of all seeds}, for the steps that all evaluated seeds reached."""
    curves = [run["curve"] for run in evaluated(cell).values()]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return {step: [curve[step][0] for curve in curves] for step in steps}


def interval(values):
    """Student's 95% interval of the mean over seeds, within [0, 1]; nan for a single seed."""
    if len(values) == 1:
        return math.nan, math.nan
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return max(0.0, np.mean(values) - half), min(1.0, np.mean(values) + half)


def task_row(task, method, cell):
    """The mean over seeds after the last step that all of them reached, and what stands behind it."""
    step, values = list(common_curve(cell).items())[-1]
    runs = evaluated(cell).values()
    return dict(zip(COLUMNS, (task, method, np.mean(values), *interval(values), None, {1}, {step}, {len(values)},
                              {run["curve"][step][1] for run in runs}, {run["data"] for run in runs})))


def mean_row(name, rows):
    """The mean of tasks' rows of one method, and all that stands behind it."""
    method, mean = rows[0]["method"], np.mean([row["success"] for row in rows])
    published = PUBLISHED.get(method, {}).get(name)
    return dict(zip(COLUMNS, (name, method, mean, None, None, published, {len(rows)},
                              *(set.union(*(row[key] for row in rows)) for key in BEHIND[1:]))))


def mean_rows(rows):
    """Per domain (env_id up to -play; noisy data keep their -noisy), and over all state or visual tasks, if a method
    has them of several domains."""
    groups, domain = {}, lambda task: re.split("-play|-singletask", task)[0]
    for place in domain, lambda task: f"all {'visual' if task.startswith('visual-') else 'state'} tasks":
        for row in rows:
            groups.setdefault((place(row["task or domain"]), row["method"]), []).append(row)
    domains = lambda group: {domain(row["task or domain"]) for row in group}
    return [mean_row(name, group) for (name, _), group in groups.items()
            if name in domains(group) or len(domains(group)) > 1]


def remarks(cells):
    """What is missing, unfinished or uneven, one line each."""
    lines, found, tasks = [], {}, dict.fromkeys(task for task, _ in cells)
    seeds = sorted({seed for cell in cells.values() for seed in cell})
    for task in tasks:
        here = {method: cells.get((task, method), {}) for _, method in cells}
        runs = [run for cell in here.values() for run in cell.values()]
        most = max(run["total_steps"] for run in runs)
        if len({run["fingerprint"] for run in runs}) > 1:
            lines.append(f"{task}: not all runs were trained on the same data")
        for method, cell in here.items():
            ends = {seed: max(cell[seed]["curve"], default=0) if seed in cell else None for seed in seeds}
            for end in sorted(set(ends.values()) - {most}, key=lambda end: end or -1):
                what = "no run" if end is None else f"evaluated up to {end:,} of {most:,} updates"
                which = ", ".join(str(seed) for seed in seeds if ends[seed] == end)
                found.setdefault(f"{method}, seed {which}: {what} on ", []).append(task)
            if evaluated(cell) and not common_curve(cell):
                lines.append(f"{method} on {task} is left out: there is no step at which all its seeds were evaluated")
    return lines + [what + ("every task" if len(on) == len(tasks) > 1 else ", ".join(on)) for what, on in found.items()]


def aggregate(cells, rows):
    """rliable's interquartile means with stratified bootstrap intervals, as rows, and its performance profiles,
    {method: (profile, band)}. A method's scores are its seeds times the tasks that all methods have."""
    try:
        from rliable import library, metrics
    except ImportError as error:
        fail(f"--aggregate needs rliable: pip install -r benchmark/requirements.txt ({error})")
    own = {}
    for row in rows:
        own.setdefault(row["method"], {})[row["task or domain"]] = row
    tasks, scores = sorted(set.intersection(*map(set, own.values()))), {}
    if not tasks:
        fail("--aggregate needs a task on which every method was evaluated")
    for method in own:
        seeds = sorted(set.intersection(*(set(evaluated(cells[task, method])) for task in tasks)))
        if not seeds:
            fail(f"--aggregate needs a seed of {method} that was evaluated on all of {', '.join(tasks)}")
        last = [(cells[task, method], max(own[method][task]["updates"])) for task in tasks]
        scores[method] = np.array([[cell[seed]["curve"][step][0] for cell, step in last] for seed in seeds])
    np.random.seed(0)  # rliable draws from NumPy's global generator
    means, ends = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=REPS)
    profiles, bands = library.create_performance_profile(scores, THRESHOLDS, reps=REPS)
    iqms = []
    for method, x in scores.items():
        if len(x) == 1:  # resampling a single seed gives it back: an interval of no width would mislead
            ends[method], bands[method] = ends[method] * math.nan, bands[method] * math.nan
        iqms.append(mean_row(f"IQM of {len(tasks)} task(s)", [own[method][task] for task in tasks])
                    | dict(zip(COLUMNS[2:5], (means[method][0], *ends[method][:, 0])), seeds={len(x)}))
    return iqms, {method: (profiles[method], bands[method]) for method in scores}


def text(x, digits):
    if isinstance(x, set):
        low, high = min(x), max(x)
        return "; ".join(sorted(x)) if isinstance(low, str) else f"{low:,}" + f" to {high:,}" * (low < high)
    return x if isinstance(x, str) else "" if x is None or math.isnan(x) else f"{x:.{digits}f}"


def markdown(rows):
    """A table of the columns in which any row has something."""
    cells = [[text(row.get(key), 2) for key in COLUMNS] for row in rows]
    shown = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells)]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    return "\n".join("| " + " | ".join(line[i] or "-" for i in shown) + " |" for line in lines)


def looks(methods):
    """{method: how it is drawn}: overrides that have no look of their own keep their script's colour."""
    result, others = {}, [method for method in methods if method not in LOOKS]
    for method in methods:
        colour, style = LOOKS.get(method) or (LOOKS.get(method.split()[0], ["#555555"])[0], "-")
        result[method] = dict(color=colour, ls=style, marker=MARKERS.get(method), ms=5, lw=1.8)
        if method in others:
            i = others.index(method)
            result[method] |= dict(ls=(0, (1 + 2 * (i % 4), 1 + i % 3)), marker="pHd<>8"[i % 6], mfc="white")
    return result


def finish(figure, path, lines, title):
    """lines: {the legend's text: line}."""
    width, height = figure.get_size_inches()
    columns = min(len(lines), 3, max(1, int(width / (0.9 + 0.062 * max(map(len, lines))))))
    figure.set_figheight(height + 0.17 * -(-len(lines) // columns))
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
                  handlelength=4, title=title, title_fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
    print(path)


def draw(points, thin, rows, xlabel, title, path):
    """One panel a task; points: {(task, method): {x: successes of the seeds}}, thin: [(task, method, curve of a seed)],
    rows: what stands behind them."""
    tasks, methods = (list(dict.fromkeys(key[i] for key in points)) for i in (0, 1))
    columns, lines = min(len(tasks), 5), -(-len(tasks) // 5)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharey=True, layout="constrained",
                                figsize=(max(6, 3.6 * columns), 0.8 + 2.9 * lines))
    figure.get_layout_engine().set(w_pad=0.1)
    panels, look, handles = dict(zip(tasks, axes.flat)), looks(methods), {}
    for axis in axes.flat[len(tasks):]:
        axis.set_visible(False)
    for (task, method), curve in points.items():
        x, values = list(curve), list(curve.values())
        handles[method], = panels[task].plot(x, [np.mean(v) for v in values], **look[method])
        panels[task].fill_between(x, *zip(*map(interval, values)), color=look[method]["color"], alpha=0.13, lw=0)
    for task, method, curve in thin:
        panels[task].plot(*zip(*curve), **look[method] | dict(lw=0.7, marker=""))
    for task, axis in panels.items():
        local = any(LOCAL in data for row in rows if row["task or domain"] == task for data in row["data"])
        axis.set_title(task + "\n(data collected locally)" * local, fontsize=9)
        axis.set(xlabel=xlabel, ylim=(-0.03, 1.03), ylabel="success rate" if axis in axes[:, 0] else None)
        axis.grid(alpha=0.3)
        if xlabel == "alpha":
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        else:
            axis.set_xlim(0)
            axis.locator_params(axis="x", nbins=5)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}")
    behind = {method: mean_row("", [row for row in rows if row["method"] == method]) for method in handles}
    finish(figure, path, {f"{method} ({text(behind[method]['seeds'], 0)} seed{'s' * (behind[method]['seeds'] != {1})}, "
                          f"{text(behind[method]['episodes'], 0)} episodes each)": line
                          for method, line in handles.items()}, title)


def draw_curves(cells, rows, path):
    points = {key: curve for key, cell in cells.items() if (curve := common_curve(cell))}
    thin = [(*key, [(step, x[0]) for step, x in sorted(run["curve"].items()) if step >= max(points[key])])
            for key in points for run in evaluated(cells[key]).values()]
    if points:
        title = "mean over seeds, band: its 95% interval, thin: seeds that went on alone"
        draw(points, thin, rows, "updates", title, path)


def draw_alphas(sweeps, path):
    rows = [task_row(*key, cell) for key, sweep in sweeps.items() for cell in sweep.values()]
    points = {key: {alpha: list(common_curve(cell).values())[-1] for alpha, cell in sorted(sweep.items())}
              for key, sweep in sweeps.items()}
    updates = text(set.union(*(row["updates"] for row in rows)), 0)
    draw(points, [], rows, "alpha", f"after {updates} updates, mean over seeds, band: its 95% interval", path)


def draw_aggregate(iqms, profiles, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", width_ratios=(2, 3))
    look, handles = looks(list(profiles)), {}
    for y, row in enumerate(iqms[::-1]):
        colour = look[row["method"]]["color"]
        left.plot((row["95% from"], row["95% to"]), (y, y), color=colour, lw=9, alpha=0.5, solid_capstyle="butt")
        left.plot(row["success"], y, color="black", marker="|", ms=13, mew=1.5)
    left.set(xlim=(-0.03, 1.03), ylim=(-0.5, len(iqms) - 0.5), xlabel="interquartile mean of the success rate")
    left.set_yticks(range(len(iqms)), [row["method"] for row in iqms[::-1]], fontsize=8)
    for method, (profile, band) in profiles.items():
        handles[method], = right.plot(THRESHOLDS, profile, **look[method], markevery=5)
        right.fill_between(THRESHOLDS, *band, color=look[method]["color"], alpha=0.13, lw=0)
    right.set(xlim=(-0.01, 1.01), ylim=(-0.03, 1.03), xlabel="success rate x", ylabel="share of runs with more than x")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    seeds, tasks = (text(set.union(*(row[key] for row in iqms)), 0) for key in ("seeds", "tasks"))
    finish(figure, path, handles, f"{tasks} task(s), seeds a method: {seeds}; bars and bands: 95% bootstrap intervals")


def find_sweeps(cells):
    """{(task, method but for alpha): {alpha: cell}} where runs differ in nothing but alpha."""
    sweeps = {}
    for (task, _), cell in cells.items():
        run = next(iter(cell.values()))
        if run["alpha"] and common_curve(cell):  # 0 has no place on a log axis
            sweeps.setdefault((task, run["but_alpha"]), {})[run["alpha"]] = cell
    return {key: sweep for key, sweep in sweeps.items() if len(sweep) > 1}


def main(args):
    if not args.run_dirs:
        fail("name at least one run directory")
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        fail(f"--out {args.out}: a figure is a .png, .pdf or .svg")
    cells = gather(args.run_dirs)
    rows = [task_row(*key, cell) for key, cell in cells.items() if common_curve(cell)]
    means, (iqms, profiles) = mean_rows(rows), aggregate(cells, rows) if args.aggregate else ([], {})
    parts = [markdown(part) for part in (rows, means, iqms) if part]
    parts += ["A task's success is the mean over seeds after the last step that all of them reached, with Student's "
              "95% interval; episodes are per seed. Several tasks: the mean of their means. "
              + f"IQM: rliable's, over seeds and tasks, {REPS:,} stratified bootstrap samples. " * bool(iqms)
              + f"Published: {SOURCE}."]
    if lines := remarks(cells):
        parts += ["Missing, unfinished or uneven:", "\n".join(f"- {line}" for line in lines)]
    print("\n\n".join(parts))
    beside = lambda name: args.out.with_name(args.out.stem + name)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    beside(".md").write_text("\n\n".join(parts) + "\n")
    with open(beside(".csv"), "w", newline="") as file:
        bare = lambda x: re.sub(r"(?<=\d),(?=\d)", "", text(x, 6))
        table = [[bare(row[key]) for key in COLUMNS] for row in rows + means + iqms]
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table])
    sweeps = find_sweeps(cells)
    swept = [id(cell) for sweep in sweeps.values() for cell in sweep.values()]  # too many curves to tell apart
    draw_curves({key: x for key, x in cells.items() if id(x) not in swept or "--alpha" not in key[1]}, rows, args.out)
    if sweeps:
        draw_alphas(sweeps, beside("_alpha" + args.out.suffix))
    if iqms:
        draw_aggregate(iqms, profiles, beside("_aggregate" + args.out.suffix))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
