"""Carries the text that all scripts share from one of them to the rest.

    python tests/carry.py lps.py

Shared are the sections Dataset, Evaluation, Training and main, the common Args, and every function, class and constant
of Networks and Algorithm that both scripts have, but for the five that make a method.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ("flow_bc", "mf_bc", "lps", "mf_bon", "dsrl", "qc_fql", "qc_mfql", "gfp", "cfgrl", "ifql")
SECTIONS = ["Args", "Networks", "Algorithm", "Dataset", "Evaluation", "Training", "main"]
METHOD = {"init", "update", "act", "imitation_loss", "decode"}


def sections(text):
    """{heading: text up to the next one}; the docstring and the imports come first, under ""."""
    starts = [(0, ""), *((match.start(), match[1]) for match in re.finditer(r"^# =+ (\w+)$", text, re.M))]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return {name: text[start:end] for (start, name), end in zip(starts, ends)}


def common_args(section):
    return section[: section.index("    # The algorithm's own:\n")]


def definitions(section):
    """{name: source} of a section's functions, classes and constants."""
    lines, found = section.split("\n"), {}
    for node in ast.parse(section).body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
        found[name] = "\n".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def carry(source, target):
    """The text of the script target, with what it shares with the script source as it stands there."""
    old, new = sections(source), sections(target)
    for name in ("Dataset", "Evaluation", "Training", "main"):
        new[name] = old[name]
    new["Args"] = new["Args"].replace(common_args(new["Args"]), common_args(old["Args"]))
    for name in ("Networks", "Algorithm"):
        theirs = definitions(new[name])
        for definition, text in definitions(old[name]).items():
            if definition in theirs and definition not in METHOD:
                new[name] = new[name].replace(theirs[definition], text)
    return "".join(new.values())


if __name__ == "__main__":
    source = Path(sys.argv[1])
    for path in (ROOT / f"{name}.py" for name in SCRIPTS):
        changed = carry(source.read_text(), path.read_text())
        if changed != path.read_text():
            path.write_text(changed)
            print(f"{source.name} -> {path.name}")
