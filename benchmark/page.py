"""Writes benchmark/page.html, on which any two scripts are read side by side, without a network.

    python -m benchmark.page

Pygments colours the scripts here. In the browser, where page.js is in charge, jsdiff aligns two
of them and uPlot draws the curves (both lie in vendor/, with their licences).
"""

import json
import re
import subprocess

import numpy as np
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from benchmark import ROOT, SCRIPTS
from benchmark.figures import PALE, choose_looks, name_task
from benchmark.report import read_runs, task_rows, text, union

HERE = ROOT / "benchmark"
RUNS = ["results/main", "results/hundred"]  # the main table, and beside published curves
DASHES = {"-": (), "--": (4, 2), "-.": (5, 2, 1, 2), ":": (1, 1)}  # the names in figures.py


def read_scripts():
    """{script: {section: {definition: the numbers of its lines in the list of all lines}}}, and
    that list. (What stands before a section's first definition has the name "".)"""
    scripts = {}
    numbers = {}  # of each line
    for name in SCRIPTS:
        code = (ROOT / f"{name}.py").read_text()
        lines = highlight(code, PythonLexer(), HtmlFormatter(nowrap=True)).splitlines()
        section = "Docstring, imports"
        definition = ""
        for line, source in zip(lines, code.splitlines(), strict=True):
            banner = re.fullmatch("# =+ (.+)", source)
            head = re.match(r"(?:def|class) (\w+)", source)
            if banner:
                section = banner[1]
                definition = ""
            elif head:
                definition = head[1]
            definitions = scripts.setdefault(name, {}).setdefault(section, {})
            definitions.setdefault(definition, []).append(numbers.setdefault(line, len(numbers)))
    return scripts, list(numbers)


def count_changes(a, b):
    """As many as diff shows: the number that README tells, too."""
    diff = subprocess.run(["diff", f"{a}.py", f"{b}.py"], cwd=ROOT, capture_output=True, text=True)
    return len(re.findall("^[<>]", diff.stdout, re.M))


def read_lessons():
    """README's diffs that teach: (a, b, sentence)."""
    row = r"^\| `diff (\w+)\.py (\w+)\.py` \|.*?([^| ][^|]*) \|$"
    return re.findall(row, (ROOT / "README.md").read_text(), re.M)


def tell(rows, runs):
    """Which runs the rows of a task come from."""
    updates = text({max(row["updates"]) for row in rows})
    trajectories = text({run["trajectories"] for run in runs})
    evaluations, episodes = text(union(rows, "evaluations")), text(union(rows, "episodes"))
    return (
        f"{updates} updates on {trajectories} episodes of data ({text(union(rows, 'data'))}). "
        f"Success is the mean of a run's last {evaluations} evaluations, of {episodes} episodes "
        f"each, and then of {text(union(rows, 'seeds'))} seeds."
    )


def read_lines(rows):
    """{method: its line in the chart, its success}, and published curves up to where ours end."""
    lines = {}
    for row in rows:
        colour, style, _ = row["look"]
        means = np.mean(list(row["curve"].values()), axis=1)
        lines[row["method"]] = dict(
            colour=colour,
            dash=[3 * length for length in DASHES.get(style, style[-1])],
            success=f"{row['success']:.2f}",
            points=[list(row["curve"]), means.round(4).tolist()],
        )
    end = max(max(row["curve"]) for row in rows)
    for name, curve in rows[0]["published curves"].items():
        points = zip(*[point for point in curve.items() if point[0] <= end])
        lines[f"published {name}"] = dict(colour=PALE, dash=[], points=list(points))
    return lines


def read_tasks():
    tasks = []
    for place in RUNS:
        runs = read_runs([HERE / place])
        all_rows = [row for row in task_rows(runs) if row["measure"] == "success"]
        choose_looks(all_rows)
        for task in dict.fromkeys(row["task or domain"] for row in all_rows):
            rows = [row for row in all_rows if row["task or domain"] == task]
            told = tell(rows, [run for run in runs if run["env_id"] == task])
            tasks.append(dict(name=name_task(task), told=told, lines=read_lines(rows)))
    return tasks


def make_page():
    scripts, lines = read_scripts()
    counts = {a: {b: count_changes(a, b) for b in SCRIPTS} for a in SCRIPTS}
    data = dict(scripts=scripts, lines=lines, counts=counts)
    data |= dict(lessons=read_lessons(), tasks=read_tasks())
    files = [HERE / "page.js", *(HERE / "vendor").iterdir()]
    parts = {path.name: path.read_text() for path in files}
    parts["data"] = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")  # no tags
    template = (HERE / "page_template.html").read_text()
    return re.sub(r"\{\{(\S+)\}\}", lambda match: parts[match[1]], template)


if __name__ == "__main__":
    (HERE / "page.html").write_text(make_page())
    print(HERE / "page.html")
