"""The ten scripts are one text outside their methods, and close to each other within."""

import inspect
import re
import subprocess
from importlib import import_module

import pytest
from carry import METHOD, ROOT, SCRIPTS, SECTIONS, carry, common_args, definitions, sections

TEXT = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}


def test_there_are_no_others():
    assert {path.stem for path in ROOT.glob("*.py")} == set(SCRIPTS)


@pytest.mark.parametrize("a", SCRIPTS)
def test_shared_text_is_the_same(a):
    for b in SCRIPTS:
        assert carry(TEXT[a], TEXT[b]) == TEXT[b]


def test_carrying_carries():
    """An edit of each kind of shared text arrives; one of a method's own does not."""
    edits = {"Args": "# the first seed", "Networks": "return nn.gelu(Dense(512)", "Algorithm": "def descend(",
             "Dataset": "def sample_batch(", "Evaluation": "def evaluate(", "Training": "def prepare(",
             "main": "def main("}
    for section, old in edits.items():
        edited = TEXT["lps"].replace(old, f"{old}  # edited\n")
        assert edited != TEXT["lps"] and f"{old}  # edited\n" in sections(carry(edited, TEXT["cfgrl"]))[section]
    for name in METHOD:
        edited = TEXT["lps"].replace(f"def {name}(", f"def {name}(edited, ")
        assert edited != TEXT["lps"] and carry(edited, TEXT["cfgrl"]) == TEXT["cfgrl"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_its_method_comes_first(name):
    lines = TEXT[name].splitlines()
    assert len(lines) <= 500 and max(map(len, lines)) <= 120
    assert list(sections(TEXT[name])) == ["", *SECTIONS]
    assert 1 + next(i for i, line in enumerate(lines) if re.fullmatch("# =+ Dataset", line)) <= 240


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_algorithm_is_three_functions(name):
    """The rest of the script knows nothing else of it."""
    script, parts = import_module(name), sections(TEXT[name])
    signatures = dict(init="(args, key, s)", update="(args, state, batch, key)", act="(args, state, s, key)")
    assert {function: str(inspect.signature(getattr(script, function))) for function in signatures} == signatures
    private = {*definitions(parts["Networks"]), *definitions(parts["Algorithm"])} - set(signatures)
    assert METHOD - set(signatures) <= private
    own = re.findall(r"^    (\w+):", parts["Args"].removeprefix(common_args(parts["Args"])), re.M)
    for section in ("Dataset", "Evaluation", "Training", "main"):
        assert not [name for name in private if re.search(rf"(?<![\w.]){name}\(", parts[section])]
        assert not [field for field in own if f"args.{field}" in parts[section]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_dependencies_are_those_of_requirements_txt(name):
    """Its lines up to the comment on the figures and the tests."""
    header = re.match(r"# /// script\n# dependencies = (\[.*\])\n# ///\n", TEXT[name])
    listed, figures, _ = (ROOT / "requirements.txt").read_text().partition("# The figures and the tests")
    packages = [line.partition("#")[0].replace(" ", "") for line in listed.splitlines()]
    assert figures and sorted(re.findall(r'"([^"]+)"', header[1])) == sorted(filter(None, packages))


@pytest.mark.parametrize("a, b, most", [
    ("flow_bc", "mf_bc", 90), ("mf_bc", "lps", 90), ("lps", "mf_bon", 60), ("flow_bc", "qc_fql", 90),
    ("qc_fql", "qc_mfql", 90), ("qc_mfql", "lps", 90), ("flow_bc", "cfgrl", 90), ("dsrl", "lps", 90),
    ("cfgrl", "ifql", 90), ("flow_bc", "ifql", 90), ("qc_fql", "gfp", 90)])
def test_diffs_are_short(a, b, most):
    diff = subprocess.run(["diff", ROOT / f"{a}.py", ROOT / f"{b}.py"], capture_output=True, text=True).stdout
    assert 20 < sum(line[0] in "<>" for line in diff.splitlines()) <= most
