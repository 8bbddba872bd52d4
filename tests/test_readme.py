"""What the pages name is there: files, commands, flags, and the numbers of README's tables."""

import csv
import re
import subprocess

import pytest

from benchmark import ROOT

README = ROOT / "README.md"
TOOLS = [*ROOT.glob("*.py"), *ROOT.glob("benchmark/**/*.py"), *ROOT.glob("tests/**/*.py")]
PAGES = [README, ROOT / "tests/README.md", *sorted(ROOT.glob("benchmark/**/*.md"))]
of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def flags_of(paths):
    """The fields of dataclasses, and argparse's flags, in these files."""
    text = "".join(path.read_text() for path in paths)
    names = re.findall(r'^    (\w+): |add_argument\("--([\w-]+)"', text, re.M)
    return {(field or flag).replace("_", "-") for field, flag in names} | {"help"}


@of_each_page
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r'(?:\]\(|src=")([^)"\s]+)', page.read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            titles = re.findall("^#+ (.*)", target.read_text(), re.M)
            titles = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in titles, link


@of_each_page
def test_commands_name_files_and_flags_that_are_there(page):
    text = page.read_text().replace("\\\n", " ")
    for command in re.findall(r"(?:python|bash|uv run) [^`\n]*", text):
        command = command.partition("  #")[0]
        names = re.findall(r" ([\w/]+\.(?:py|sh))\b", command)
        for module in re.findall(r"-m (benchmark[.\w]*)", command):
            names.append(module.replace(".", "/") + ".py")
        paths = [ROOT / name for name in names]
        assert all(path.exists() for path in paths), command
        if paths:
            flags = {*re.findall(r" --(?:no-)?([a-z0-9-]+)", command)}
            if re.search("ablations|studies.pixels", command):  # which have those of lps.py, too
                paths.append(ROOT / "lps.py")
            assert flags <= flags_of(paths), command


@of_each_page
def test_flags_and_files_that_are_named_are_there(page):
    text = page.read_text()
    flags = {*re.findall(r"`(?:\w+\.py )?--(?:no-)?([a-z0-9-]+)[ `]", text)}
    assert flags <= flags_of(TOOLS)
    places = [ROOT, ROOT / "benchmark", ROOT / "tests", page.parent]
    for name in re.findall(r"`([\w/-]+\.(?:py|sh|ipynb|md|toml))`", text):
        assert any((place / name).exists() for place in places), name


def test_diffs_are_as_long_as_the_table_says():
    rows = re.findall(r"\| `diff (\S+) (\S+)` \| (\d+) \|", README.read_text())
    for a, b, told in rows:
        diff = subprocess.run(["diff", ROOT / a, ROOT / b], capture_output=True, text=True).stdout
        assert sum(line[0] in "<>" for line in diff.splitlines()) == int(told), (a, b)
    assert len(rows) >= 5


def test_successes_are_those_of_committed_tables():
    """README's head is | success | script | ..., its rows | source: domain | number | ..."""
    known = set()
    for path in ROOT.glob("benchmark/**/*.csv"):
        with open(path) as file:
            for row in csv.DictReader(file):
                place = "published" if "place" in row else "ours"
                domain = re.sub("-play.*", "", row.get("task or domain") or row.get("place") or "")
                if row.get("success") and "method" in row:
                    known.add((place, domain, row["method"], f"{float(row['success']):.2f}"))
    table = re.search(r"^\| success \|(?:.*\n\|)*.*", README.read_text(), re.M)[0].splitlines()
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    for place, *cells in rows:
        source, domain = re.match(r"(\w+): ([\w-]+)", place).groups()
        for script, cell in zip(head[1:], cells, strict=True):
            assert not cell or (source, domain, script, cell) in known, (place, script)
    assert len(rows) >= 2 and len(head) > 10
