"""What can be checked of what README.md and the other pages say: commands, flags, links, and numbers."""

import csv
import re
import subprocess
from importlib import import_module
from statistics import mean

import pytest
from carry import ROOT

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmark/results"
PAGES = ["README.md", "benchmark/README.md", "benchmark/results/README.md", "benchmark/results/slips/README.md",
         "tests/README.md"]


@pytest.mark.parametrize("page", [*PAGES, "benchmark/results/notebook.md"])
def test_links_lead_to_files(page):
    for link in re.findall(r'(?:\]\(|src=")([^)"\s]+)', (ROOT / page).read_text()):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = (ROOT / page).parent / path
            assert target.exists(), link
            if heading:
                titles = re.findall("^#+ (.*)", target.read_text(), re.M)
                assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], link


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_scripts_and_flags_that_exist(page):
    lines = (ROOT / page).read_text().replace("\\\n", " ").splitlines()
    for command in [line for line in lines if re.match(r"    .*\b(python|bash) \S+\.(py|sh)", line)]:
        command = command.replace("benchmark/bfloat16.py ", "")  # the flags are those of the script after it
        path, flags = re.search(r"(?:python|bash) (\S+\.(?:py|sh))(.*)", command.partition("  #")[0]).groups()
        assert (ROOT / path).exists(), command
        if path.endswith(".py") and path != "tests/carry.py":
            known = import_module(path.removesuffix(".py").removeprefix("tests/").replace("/", ".")).Args
            fields = {name.replace("_", "-") for name in known.__dataclass_fields__}
            assert {*re.findall(r" --([\w-]+)", flags)} - {"help"} <= fields, command


def test_diffs_are_as_long_as_the_table_says():
    rows = re.findall(r"\| `diff (\S+) (\S+)` \| (\d+) \|", README)
    for a, b, told in rows:
        diff = subprocess.run(["diff", ROOT / a, ROOT / b], capture_output=True, text=True).stdout
        assert sum(line[0] in "<>" for line in diff.splitlines()) == int(told), (a, b)
    assert len(rows) >= 5


def table(head):
    """The cells of README's table that begins with head: its first row, and those under the line."""
    lines = README[README.index(head):].split("\n\n")[0].splitlines()
    first, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return first, rows


def test_the_results_are_those_of_the_tables_they_come_from():
    def read(path, task, column="success"):
        with open(RESULTS / path) as file:
            return {row["method"]: row[column] for row in csv.DictReader(file) if row["task or domain"] == task}

    columns = [
        read("scaled-down/curves.csv", "cube-single", "published"),
        read("scaled-down/curves.csv", "cube-single-play-singletask-v0"),
        read("comparison/puzzle-3x3.csv", "puzzle-3x3", "published"),
        read("comparison/puzzle-3x3.csv", "puzzle-3x3-play-singletask-task1-v0")]
    _, rows = table("| | cube-single, published")
    for method, *told in rows:
        expected = [column.get(method.strip("`").removesuffix(".py"), "") for column in columns]
        assert told == [f"{float(x):.2f}" if x else "" for x in expected], method
    assert len(rows) >= 7


def test_the_second_table_of_results_is_of_runs_and_of_published_curves():
    def read(path, **of):
        """The success of one run, or published mean, after 50,000 and 100,000 updates."""
        with open(path) as file:
            rows = [row for row in csv.DictReader(file) if of.items() <= row.items()]
        at = {row.get("step") or row["updates"]: float(row["success"]) for row in rows}
        return at["50000"], at["100000"]

    places, rows = table("| | puzzle-3x3, task 1")
    for method, *told in rows:
        for place, success in zip(places[1:], told, strict=True):
            domain, task = re.match(r"(\S+), task (\d)", place).groups()
            if method.startswith("published "):
                of = dict(domain=f"{domain} (sparse)", task=task, method=method.removeprefix("published "))
                seeds = [read(ROOT / "benchmark/published_curves.csv", **of)]
            else:
                name = method.replace(".py", "").replace(" --", "_").replace(" ", "-")  # of its directory
                runs = RESULTS / f"hundred/{domain}-play-singletask-task{task}-v0" / name
                seeds = [read(run / "eval.csv", seed=run.name.removeprefix("seed")) for run in runs.glob("seed*")]
            means = ", ".join(f"{mean(at):.2f}" for at in zip(*seeds))
            assert success == means, (place, method)
    assert len(rows) >= 11
