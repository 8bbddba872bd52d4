"""The figures of report.py: fit for a lecture, 14 points and more, with the names of lines at their ends."""

import math
import re
import textwrap

import matplotlib
import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import binomtest
from scipy.stats import t as student

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, the pale ones darkened for projectors: they survive colour-blindness; line styles and markers
# survive grey print. Imitation is grey. The ablations of lps share a colour where they replace the same part.
LOOKS = {"lps": ("#D55E00", "-", "o"), "mf_bon": ("#D55E00", (0, (3, 1)), ">"), "dsrl": ("#0072B2", "--", "s"),
         "qc_fql": ("#009E73", "-.", "^"), "qc_mfql": ("#C0589A", ":", "D"), "gfp": ("#009E73", (0, (2, 1)), "<"),
         "cfgrl": ("#A87900", (0, (5, 1, 1, 1)), "v"), "ifql": ("#000000", "-", "h"),
         "flow_bc": ("#6B6B6B", (0, (1, 1)), "X"), "mf_bc": ("#6B6B6B", (0, (4, 2)), "P"),
         "lps --latent truncated-normal": ("#3A8FC7", "--", "s"), "lps --latent normal": ("#3A8FC7", ":", "D"),
         "lps --base flow": ("#6A3D9A", "--", "^"), "lps --base flow --flow-steps 1": ("#6A3D9A", ":", "v"),
         "lps --predict velocity": ("#6B3E1D", "-.", "*"), "lps --clip False": ("#1F6F78", ":", "s"),
         "lps --decode-steps 2": ("#6A3D9A", "-", "p"), "lps --decode-steps 4": ("#6A3D9A", "-.", "d"),
         "mf_bon --num-samples-target 1": ("#A87900", "-.", "<"),
         "mf_bon --num-samples-target 16": ("#A87900", (0, (1, 1)), "v")}
NAMES = {"lps": "LPS", "mf_bon": "MF-BoN", "dsrl": "DSRL", "qc_fql": "QC-FQL", "qc_mfql": "QC-MFQL", "gfp": "GFP",
         "cfgrl": "CFGRL", "ifql": "IFQL", "flow_bc": "Flow-BC", "mf_bc": "MF-BC"}
STYLE = {"font.size": 14, "axes.titlesize": 16, "axes.spines.top": False, "axes.spines.right": False,
         "svg.hashsalt": "report"}  # with the salt the same runs make the same .svg
PALE = "#7F7F7F"  # of published curves, thinner than ours
BOTTOM, TOP = -0.03, 1.03  # of a panel
ENOUGH = 6  # seeds for an interval in a figure; of fewer, every one is shown


def interval(values):
    """Student's 95% interval of the mean over seeds, within [0, 1]; nan for a single seed."""
    if len(values) == 1:
        return math.nan, math.nan
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return max(0.0, np.mean(values) - half), min(1.0, np.mean(values) + half)


# =============================================================================================================== Names

def name_task(task):
    """cube-single-play-singletask-task1-v0 is called cube-single, task 1."""
    domain, single, number = task.removesuffix("-v0").replace("-play", "").partition("-singletask")
    if not single:
        return task.replace("(s)", "s")
    return f"{domain}, {number.replace('-task', 'task ') or 'default task'}"


def name_method(method):
    """lps --latent truncated-normal is called LPS, latent truncated normal."""
    script, *flags = method.split(" --")
    return ", ".join([NAMES[script], *[re.sub("(?<=[a-z])-(?=[a-z])", " ", flag) for flag in flags]])


def look(method):
    if method not in LOOKS:
        LOOKS[method] = LOOKS[method.split()[0]][0], (0, (6, 1, 1, 1)), "pdDs"[len(LOOKS) % 4]  # its script's colour
    return LOOKS[method]


# ============================================================================================================== Panels

def make_panels(rows, height):
    """A figure and {task: its panel}, five in a line."""
    tasks = list(dict.fromkeys(row["task or domain"] for row in rows))
    columns, lines = min(len(tasks), 5), math.ceil(len(tasks) / 5)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharey=True, layout="constrained",
                                figsize=(2 + 5.5 * columns, height * lines + 1))
    for axis in axes.flat[len(tasks):]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks):
        axis.set_title(name_task(task))
        axis.grid(alpha=0.3)
    return figure, dict(zip(tasks, axes.flat))


def draw_seeds(axis, x, y, method):
    colour, _, marker = look(method)
    axis.plot(x, y, marker, color=colour, ms=7, mec="white", mew=0.5, alpha=0.8, clip_on=False)


def draw_line(axis, curve, method):
    """The mean of {x: successes}, and each seed's, or from six seeds on the mean's interval."""
    colour, style, _ = look(method)
    means = [np.mean(values) for values in curve.values()]
    axis.plot(list(curve), means, color=colour, ls=style, lw=2.5)
    for x, values in curve.items():
        if len(values) < ENOUGH:
            draw_seeds(axis, len(values) * [x], values, method)
    if all(len(values) >= ENOUGH for values in curve.values()):
        axis.fill_between(list(curve), *zip(*map(interval, curve.values())), color=colour, alpha=0.15, lw=0)
    put_label(axis, max(curve), means[-1], name_method(method), colour)


def put_label(axis, x, y, name, colour):
    """A name right of the panel, tied to the end of its line."""
    tie = dict(arrowstyle="-", color=colour, lw=0.8, relpos=(0, 0.5), shrinkA=1, shrinkB=5)
    axis.annotate(name, (x, y), (1.06, y), textcoords=axis.get_yaxis_transform(), va="center", color=colour,
                  arrowprops=tie, annotation_clip=False)


def spread(heights, gap):
    """The places nearest to these heights (in least squares) that keep their order, a gap apart, within a panel."""
    order, steps = np.argsort(heights, kind="stable"), gap * np.arange(len(heights))
    places = isotonic_regression(np.array(heights)[order] - steps).x
    return (np.clip(places, BOTTOM, TOP - steps[-1]) + steps)[np.argsort(order)]


def move_labels_apart(figure):
    figure.draw_without_rendering()  # gives the panels their sizes
    for axis in figure.axes:
        if axis.texts:
            points = axis.get_window_extent().height * 72 / figure.dpi
            places = spread([label.xy[1] for label in axis.texts], gap=18 * (TOP - BOTTOM) / points)
            for label, place in zip(axis.texts, places):
                label.set_y(place)


def write_caption(figure, caption):
    lines = textwrap.fill(caption, int(10 * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=STYLE["font.size"])


def save(figure, path):
    for file in sorted({path, path.with_suffix(".svg")}):
        about = {"Date": None} if file.suffix == ".svg" else None
        figure.savefig(file, dpi=150, bbox_inches="tight", metadata=about)
        print(file)
    plt.close(figure)


# ============================================================================================================= Figures

def draw_curves(rows, caption, path):
    """Success over updates, and what is published."""
    figure, panels = make_panels(rows, 4.6)
    told = {"n": caption}
    for task, axis in panels.items():
        here = [row for row in rows if row["task or domain"] == task]
        end = 1.025 * max(max(row["curve"]) for row in here)
        axis.set(xlabel="updates", xlim=(0, end), ylim=(BOTTOM, TOP))
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        for name, curve in here[0]["published_curves"].items():
            if min(curve) < end:
                axis.plot(list(curve), list(curve.values()), ".-", color=PALE, lw=1, ms=4)
                last = min(end, max(curve))
                put_label(axis, last, np.interp(last, list(curve), list(curve.values())), f"published {name}", PALE)
                told["curves"] = "Thin grey: other groups' published runs of this task."
        for i, row in enumerate(here):
            beside = 0
            if min(row["seeds"]) < ENOUGH:  # then the marks of two methods do not hide each other
                beside = 0.005 * end * (i - (len(here) - 1) / 2)
            draw_line(axis, {x + beside: values for x, values in row["curve"].items()}, row["method"])
            if row["final"] is not None:
                axis.plot((1, 1.025), 2 * [row["final"]], color=look(row["method"])[0], lw=2.5, solid_capstyle="butt",
                          transform=axis.get_yaxis_transform(), clip_on=False, zorder=4)
                told["ticks"] = "Ticks at the right edge: published after 1,000,000 updates, mean of five tasks."
    figure.axes[0].set_ylabel("success rate")
    write_caption(figure, " ".join(told.values()))
    move_labels_apart(figure)
    save(figure, path)


def draw_alpha(sweeps, caption, path):
    """Of {(task, method): rows that differ in alpha} the success over alpha."""
    figure, panels = make_panels([row for group in sweeps.values() for row in group], 4.6)
    published, told = [], {"n": caption}
    for i, ((task, method), group) in enumerate(sweeps.items()):
        axis, colour = panels[task], look(method)[0]
        axis.set(xlabel="alpha", xscale="log", ylim=(BOTTOM, TOP))
        axis.xaxis.set_major_formatter("{x:,g}")
        beside = 1.1 ** (i % 2 - 0.5)  # so that the error bars of two methods do not hide each other
        places = [beside * row["alpha"] for row in group]
        draw_line(axis, {x: list(row["at_end"].values()) for x, row in zip(places, group)}, method)
        for x, row in zip(places, group):
            if len(row["at_end"]) == 1:
                n = min(row["episodes"])
                ends = binomtest(round(row["success"] * n), n).proportion_ci(method="wilson")
                axis.plot((x, x), ends, color=colour)
                told["bars"] = "Vertical bars, of single seeds: the 95% interval (Wilson) of their episodes."
            if row["method"] == method:
                axis.plot(x, row["success"], "o", ms=18, mfc="none", mec=colour, mew=2)
                published.append(f"{name_method(method)} {row['alpha']:g}")
                told["rings"] = f"Rings: the published alpha, {', '.join(dict.fromkeys(published))}."
    figure.axes[0].set_ylabel("success rate")
    write_caption(figure, " ".join(told.values()))
    move_labels_apart(figure)
    save(figure, path)


def draw_bars(rows, label, caption, path):
    """The last success of each method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = make_panels(rows, 1 + 0.5 * len(methods))
    for row in rows:
        axis, y, ends = panels[row["task or domain"]], methods.index(row["method"]), list(row["at_end"].values())
        colour = look(row["method"])[0]
        axis.barh(y, row["success"], 0.6, color=colour, alpha=0.4)
        if len(ends) < ENOUGH:
            draw_seeds(axis, ends, len(ends) * [y], row["method"])
        else:
            axis.plot((row["95% from"], row["95% to"]), (y, y), color="black")
        axis.text(1.03, y, f"{row['success']:.2f}", va="center", transform=axis.get_yaxis_transform())
    for axis in panels.values():
        axis.set(xlabel=label, xlim=(0, 1))
    figure.axes[0].set_yticks(range(len(methods)), map(name_method, methods))
    figure.axes[0].invert_yaxis()  # the first on top; the panels share the axis
    write_caption(figure, caption)
    save(figure, path)
