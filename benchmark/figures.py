"""The figures of report.py, whose rows these are: fit for a lecture, lines named at their ends."""

import math
import re
import textwrap
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.text import Annotation
from scipy.optimize import isotonic_regression
from scipy.stats import t as student

from benchmark import SCRIPTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# (colour, line style, marker). Okabe and Ito's colours, the pale ones darkened for projectors, can
# be told apart by the colour-blind; line styles and markers survive grey print. Imitation is grey.
LOOKS = {
    "lps": ("#D55E00", "-", "o"),
    "mf_bon": ("#D55E00", (0, (3, 1)), ">"),
    "dsrl": ("#0072B2", "--", "s"),
    "reform": ("#0072B2", (0, (3, 1)), "d"),
    "qc_fql": ("#009E73", "-.", "^"),
    "qc_mfql": ("#C0589A", ":", "D"),
    "gfp": ("#009E73", (0, (2, 1)), "<"),
    "cfgrl": ("#A87900", (0, (5, 1, 1, 1)), "v"),
    "ifql": ("#000000", "-", "h"),
    "qgf": ("#000000", (0, (3, 1)), "p"),
    "qam": ("#6A3D9A", "--", "*"),
    "rql": ("#A31545", "-.", "H"),
    "flow_bc": ("#6B6B6B", (0, (1, 1)), "X"),
    "mf_bc": ("#6B6B6B", (0, (4, 2)), "P"),
}
# Of other methods, in the order of the tables:
SPARE_COLOURS = ("#3A8FC7", "#2F5D1E", "#8C564B", "#24248F", "#7A7A00")
SPARE_STYLES = ("--", ":", "-.", (0, (6, 1, 1, 1)), "-")
SPARE_MARKERS = "8>v<D"
NAMES = {"mf_bon": "MF-BoN", "reform": "ReFORM", "flow_bc": "Flow-BC"}  # others: capital letters
STYLE = {
    "font.size": 14,
    "axes.titlesize": 16,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "report",  # the same runs make the same .svg
}
PALE = "#7F7F7F"  # of published curves
TICKS = "Ticks at the right edge: published after 1,000,000 updates, mean of five tasks."
ENOUGH = 6  # seeds for an interval in a figure; of fewer, every one is shown

# =========================================================================================== Names


def name_task(task):
    """cube-single-play-singletask-task1-v0 is called cube-single, task 1."""
    if "-singletask" not in task:
        return task
    domain, _, number = task.removesuffix("-v0").replace("-play", "").partition("-singletask")
    return f"{domain}, {number.replace('-task', 'task ') or 'default task'}"


def name_method(method):
    """lps --latent truncated-normal is called LPS, latent truncated normal."""
    script, *flags = method.split(" --")
    if script in SCRIPTS:
        script = NAMES.get(script, script.upper().replace("_", "-"))
    return ", ".join([script, *[re.sub("(?<=[a-z])-(?=[a-z])", " ", flag) for flag in flags]])


def choose_looks(rows):
    """Gives every row its method's (colour, line style, marker)."""
    looks = dict(LOOKS)
    spare = zip(cycle(SPARE_COLOURS), cycle(SPARE_STYLES), cycle(SPARE_MARKERS))
    for row in rows:
        method = row["method"]
        if method not in looks:
            looks[method] = next(spare)
        row["look"] = looks[method]


# ========================================================================================== Panels


def interval(values, measure):
    """Student's 95% interval of the mean over seeds; nan for a single seed."""
    if len(values) == 1:
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    ends = np.mean(values) + error * student.ppf((0.025, 0.975), len(values) - 1)
    return np.clip(ends, 0, 1) if measure == "success" else ends


def make_panels(rows, height=4.6, sharey=False):
    """A figure and {task: its panel}, five in a line."""
    tasks = list(dict.fromkeys(row["task or domain"] for row in rows))
    columns, lines = min(len(tasks), 5), math.ceil(len(tasks) / 5)
    size = 2 + 5.5 * columns, height * lines + 1
    how = dict(squeeze=False, sharey=sharey, layout="constrained", figsize=size)
    figure, axes = plt.subplots(lines, columns, **how)
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    panels = dict(zip(tasks, axes.flat))
    for task, axis in panels.items():
        axis.set_title(name_task(task))
        axis.grid(alpha=0.3)
    return figure, panels


def draw_seeds(axis, x, y, look):
    colour, _, marker = look
    axis.plot(x, y, marker, color=colour, ms=7, mec="white", mew=0.5, alpha=0.8, clip_on=False)


def draw_line(axis, curve, row, method):
    """The mean of {x: a value for each seed}, with every seed, or of many seeds the interval."""
    colour, style, _ = row["look"]
    axis.set_ylabel(row["measure"])
    if row["measure"] == "success":
        axis.set_ylim(-0.03, 1.03)
    means = [np.mean(values) for values in curve.values()]
    axis.plot(list(curve), means, color=colour, ls=style, lw=2.5)
    if min(len(values) for values in curve.values()) < ENOUGH:
        for x, values in curve.items():
            draw_seeds(axis, len(values) * [x], values, row["look"])
    else:
        ends = [interval(values, row["measure"]) for values in curve.values()]
        axis.fill_between(list(curve), *np.transpose(ends), color=colour, alpha=0.15, lw=0)
    put_label(axis, max(curve), means[-1], name_method(method), colour)


def put_label(axis, x, y, name, colour):
    """A name right of the panel, tied to the end of its line."""
    tie = dict(arrowstyle="-", color=colour, lw=0.8, relpos=(0, 0.5), shrinkA=1, shrinkB=5)
    where = dict(xytext=(1.06, y), textcoords=axis.get_yaxis_transform(), va="center")
    axis.annotate(name, (x, y), **where, color=colour, arrowprops=tie, annotation_clip=False)


def move_labels_apart(figure):
    """To the nearest places, in least squares, that keep the order and are a line apart."""
    figure.draw_without_rendering()  # gives the panels their sizes
    for axis in figure.axes:
        labels = sorted(axis.findobj(Annotation), key=lambda label: label.xy[1])
        if labels:
            bottom, top = axis.get_ylim()
            points = axis.get_window_extent().height * 72 / figure.dpi
            steps = 18 * (top - bottom) / points * np.arange(len(labels))
            heights = isotonic_regression([x.xy[1] for x in labels] - steps).x
            for label, height in zip(labels, np.clip(heights, bottom, top - steps[-1]) + steps):
                label.set_y(height)


def finish(figure, caption, path):
    """Writes the figure with its caption, as .svg too."""
    lines = textwrap.fill(caption, int(10 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=STYLE["font.size"])
    move_labels_apart(figure)
    for file in sorted({path, path.with_suffix(".svg")}):
        about = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=150, bbox_inches="tight", metadata=about)
        print(file)
    plt.close(figure)


# ========================================================================================= Figures


def draw_published(axis, curves, end):
    """Other groups' curves of the task, up to where ours end."""
    for name, curve in curves.items():
        steps, values = list(curve), list(curve.values())
        axis.plot(steps, values, ".-", color=PALE, lw=1, ms=4)
        last = min(end, max(steps))
        put_label(axis, last, np.interp(last, steps, values), f"published {name}", PALE)


def draw_curves(rows, caption, path):
    """Every evaluation over updates, and what is published."""
    choose_looks(rows)
    figure, panels = make_panels(rows)
    told = [caption]
    for task, axis in panels.items():
        here = [row for row in rows if row["task or domain"] == task]
        end = 1.025 * max(max(row["curve"]) for row in here)
        axis.set(xlabel="updates", xlim=(0, end))
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        published = {name: x for name, x in here[0]["published curves"].items() if min(x) < end}
        draw_published(axis, published, end)
        if published:
            told.append("Thin grey: other groups' published runs of this task.")
        for i, row in enumerate(here):
            # A little to the side, so that the marks of two methods do not hide each other.
            beside = 0.005 * end * (i - (len(here) - 1) / 2)
            curve = {step + beside: values for step, values in row["curve"].items()}
            draw_line(axis, curve, row, row["method"])
            if row["final"] is not None:
                at_edge = dict(transform=axis.get_yaxis_transform(), clip_on=False)
                axis.plot(1.012, row["final"], "_", color=row["look"][0], ms=9, mew=3, **at_edge)
                told.append(TICKS)
    finish(figure, " ".join(dict.fromkeys(told)), path)


def draw_alpha(sweeps, caption, path):
    """Of {(task, method): rows that differ in alpha} the last evaluations over alpha."""
    rows = [row for group in sweeps.values() for row in group]
    choose_looks(rows)
    figure, panels = make_panels(rows)
    for (task, method), group in sweeps.items():
        axis, first = panels[task], group[0]
        first["look"] = LOOKS.get(method, first["look"])
        axis.set(xlabel="alpha", xscale="log")
        axis.xaxis.set_major_formatter("{x:,g}")
        draw_line(axis, {row["alpha"]: row["ends"] for row in group}, first, method)
        for row in group:
            if row["method"] == method:
                ring = dict(ms=18, mfc="none", mec=first["look"][0], mew=2)
                axis.plot(row["alpha"], row[row["measure"]], "o", **ring)
    finish(figure, f"{caption} Rings: the published alpha.", path)


def draw_bars(rows, caption, path):
    """The last evaluations of each method."""
    choose_looks(rows)
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = make_panels(rows, 1 + 0.5 * len(methods), sharey=True)
    for row in rows:
        axis, ends = panels[row["task or domain"]], row["ends"]
        value, y = row[row["measure"]], methods.index(row["method"])
        axis.barh(y, value, 0.6, color=row["look"][0], alpha=0.4)
        if len(ends) < ENOUGH:
            draw_seeds(axis, ends, len(ends) * [y], row["look"])
        else:
            axis.plot(interval(ends, row["measure"]), (y, y), color="black")
        axis.text(1.03, y, f"{value:.2f}", va="center", transform=axis.get_yaxis_transform())
        axis.set_xlabel(row["measure"])
        if row["measure"] == "success":
            axis.set_xlim(0, 1)
    figure.axes[0].set_yticks(range(len(methods)), map(name_method, methods))
    figure.axes[0].invert_yaxis()  # the first on top; the panels share the axis
    finish(figure, caption, path)
