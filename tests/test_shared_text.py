"""The six scripts are one text outside their algorithms, and close to each other within."""

import inspect
import re
import subprocess
from importlib import import_module
from itertools import permutations

import pytest
from carry import METHOD, ROOT, SCRIPTS, SECTIONS, carry, common_args, functions, sections

TEXT = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def test_there_are_no_others():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("a, b", list(permutations(SCRIPTS, 2)))
def test_shared_text_is_the_same(a, b):
    assert carry(TEXT[a], TEXT[b]) == TEXT[b]


def test_carrying_carries():
    """An edit of each kind of shared text arrives; a method's own does not."""
    edits = {"Args": "the first seed", "Dataset": "def sample_batch(", "Networks": "def mlp(",
             "Algorithm": "def descend(", "Evaluation": "class Episodes(", "Training": "def check_args(",
             "main": "def main("}
    for section, old in edits.items():
        new = old.replace("(", "(edited, ") if "(" in old else "edited"
        edited = TEXT["lps"].replace(old, new)
        assert edited != TEXT["lps"] and new in sections(carry(edited, TEXT["cfgrl"]))[section]
    assert carry(TEXT["lps"].replace("def update(", "def update(edited, "), TEXT["cfgrl"]) == TEXT["cfgrl"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_algorithm_is_three_functions(name):
    script, parts = import_module(name), sections(TEXT[name])
    assert list(parts) == ["", *SECTIONS]
    signatures = dict(init="(args, key, s_shape, a_dim)", update="(args, state, batch, key)",
                      act="(args, state, s, key)")
    assert {function: str(inspect.signature(getattr(script, function))) for function in METHOD} == signatures
    private = functions(parts["Networks"]).keys() | functions(parts["Algorithm"]).keys() - METHOD
    for section in ("Dataset", "Evaluation", "Training", "main"):  # know nothing else of it
        assert not {function for function in private if re.search(rf"(?<![\w.]){function}\(", parts[section])}
    own = parts["Args"].removeprefix(common_args(parts["Args"]))
    for field in re.findall(r"^    (\w+):", own, re.M):
        assert f"args.{field}" not in "".join(parts[name] for name in ("Dataset", "Evaluation", "Training", "main"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_imports_nothing_from_here(name):
    assert not re.search(rf"^\s*(?:from|import) (?:tests|benchmark|{'|'.join(SCRIPTS)})\b", TEXT[name], re.M)


@pytest.mark.parametrize("a, b, most", [("lps", "qc_mfql", 90), ("flow_bc", "qc_fql", 110), ("qc_fql", "qc_mfql", 110),
                                        ("qc_fql", "cfgrl", 110), ("dsrl", "lps", 110)])
def test_diffs_are_short(a, b, most):
    diff = subprocess.run(["diff", ROOT / f"{a}.py", ROOT / f"{b}.py"], capture_output=True, text=True).stdout
    changed = sum(line[0] in "<>" for line in diff.splitlines())
    assert 20 < changed <= most
    assert f"| `diff {a}.py {b}.py` | {changed} |" in (ROOT / "README.md").read_text()
