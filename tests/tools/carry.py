"""Carries the text that all scripts share from one of them to the rest.

    python tests/tools/carry.py lps.py

Shared are the sections Dataset, Evaluation, Training and main, the common Args, and every function,
class and constant of Networks and Algorithm that both scripts have, but for the five of a method.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
SECTIONS = ["Args", "Networks", "Algorithm", "Dataset", "Evaluation", "Training", "main"]
METHOD = {"init", "update", "act", "imitation_loss", "decode"}


def sections(text):
    """{heading: text up to the next one}; the docstring and the imports come first, under ""."""
    parts = re.split(r"^(# =+ (\w+)\n)", text, flags=re.M)
    found = {"": parts[0]}
    for banner, name, body in zip(parts[1::3], parts[2::3], parts[3::3]):
        found[name] = banner + body
    return found


def common_args(section):
    return section.partition("    # The algorithm's own:\n")[0]


def definitions(section):
    """{name: source} of a section's functions, classes and constants."""
    found = {}
    for node in ast.parse(section).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
        found[name] = ast.get_source_segment(section, node)
    return found


def carry(source, target):
    """The text of the script target, with what it shares with the script source as it is there."""
    old = sections(source)
    new = sections(target)
    for name in ("Dataset", "Evaluation", "Training", "main"):
        new[name] = old[name]
    new["Args"] = new["Args"].replace(common_args(new["Args"]), common_args(old["Args"]))
    for name in ("Networks", "Algorithm"):
        theirs = definitions(new[name])
        for definition, text in definitions(old[name]).items():
            if definition in theirs and definition not in METHOD:
                new[name] = new[name].replace(theirs[definition], text)
    return "".join(new.values())


def main(source):
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        old = path.read_text()
        new = carry(source.read_text(), old)
        if new != old:
            path.write_text(new)
            print(f"{source.name} -> {path.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
