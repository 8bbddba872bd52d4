"""What can be checked of what README.md and the other pages say: commands, flags, links, and numbers."""

import csv
import re
import subprocess
from importlib import import_module

import pytest
from carry import ROOT

PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "runs"} & {*path.relative_to(ROOT).parts})
README = (ROOT / "README.md").read_text()
RESULTS = "benchmark/results"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page.read_text())
    for link in filter(None, sum(links, ())):
        if not link.startswith("http"):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            headings = [re.sub(r"[^\w -]", "", line.strip("# ").lower()).replace(" ", "-")
                        for line in target.read_text().splitlines() if line.startswith("#")] if heading else [heading]
            assert heading in headings, link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_scripts_and_flags_that_exist(page):
    """Of this state of the repository: what was measured with an older one stands in the notebook."""
    lines = page.read_text().replace("\\\n", " ").splitlines()
    commands = [line for line in lines if re.match(r"    .*\b(python|bash) \S+\.(py|sh)", line)]
    assert commands or page.name != "README.md" or page.parent.name == "results"
    if page.name == "notebook.md":
        return
    for command in commands:
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


def test_the_results_are_those_of_the_tables_they_come_from():
    def read(path, task, column="success"):
        with open(ROOT / RESULTS / path) as file:
            return {row["method"]: row[column] for row in csv.DictReader(file) if row["task or domain"] == task}

    columns = [
        read("scaled-down/curves.csv", "cube-single", "published"),
        read("scaled-down/curves.csv", "cube-single-play-singletask-v0"),
        read("comparison/puzzle-3x3.csv", "puzzle-3x3", "published"),
        read("comparison/puzzle-3x3.csv", "puzzle-3x3-play-singletask-task1-v0")]
    table = README[README.index("## Results"):].split("\n\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for method, *told in rows:
        expected = [column.get(method.strip("`").removesuffix(".py"), "") for column in columns]
        assert told == [f"{float(x):.2f}" if x else "" for x in expected], method
    assert len(rows) >= 7
