"""The scripts are one text outside their methods, and close to each other within."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib

import pytest
from carry import METHOD, ROOT, SCRIPTS, SECTIONS, carry, common_args, definitions, sections
from helpers import load

import benchmark

TEXT = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
CLOSE = """
flow_bc-mf_bc mf_bc-lps lps-mf_bon dsrl-lps qc_mfql-lps flow_bc-qc_fql qc_fql-qc_mfql qc_fql-gfp
flow_bc-cfgrl cfgrl-ifql ifql-qgf
"""
PAIRS = [pair.split("-") for pair in CLOSE.split() if {*pair.split("-")} <= {*SCRIPTS}]


def test_the_tools_know_all_scripts():
    assert sorted(benchmark.SCRIPTS) == SCRIPTS


@pytest.mark.parametrize("a", SCRIPTS)
def test_shared_text_is_the_same(a):
    for b in SCRIPTS:
        assert carry(TEXT[a], TEXT[b]) == TEXT[b]


@pytest.mark.parametrize(
    "name", ["discount", "Encoder(", "descend(", "observe(", "play(", "begin(", "main("]
)
def test_an_edit_of_shared_text_is_carried(name):
    edited = TEXT["lps"].replace(f" {name}", f" {name}  # edited\n", 1)
    assert carry(edited, TEXT["cfgrl"]).count("# edited") == 1


@pytest.mark.parametrize("name", sorted(METHOD))
def test_an_edit_of_a_method_is_not_carried(name):
    edited = TEXT["lps"].replace(f"def {name}(", f"def {name}(edited, ")
    assert edited != TEXT["lps"] and carry(edited, TEXT["cfgrl"]) == TEXT["cfgrl"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_airy_and_its_method_comes_first(name):
    assert list(sections(TEXT[name])) == ["", *SECTIONS]
    assert max(map(len, TEXT[name].splitlines())) <= 100
    most = 345 if name == "qam" else 300  # adjoint matching takes two walks along a path
    assert TEXT[name].partition(" Dataset\n")[0].count("\n") < most
    for node in ast.walk(ast.parse(TEXT[name])):
        if isinstance(node, ast.FunctionDef) and node.name not in ("update", "train"):
            assert node.end_lineno - node.lineno < 45, node.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_algorithm_is_three_functions(name):
    """The rest of the script knows nothing else of it."""
    script = load(name)
    public = dict(init="(args, key, s)", update="(args, state, batch, key)")
    public |= dict(act="(args, state, s, key)")
    for function, signature in public.items():
        assert str(inspect.signature(getattr(script, function))) == signature
    parts = sections(TEXT[name])
    private = {*definitions(parts["Networks"]), *definitions(parts["Algorithm"])} - public.keys()
    assert METHOD - public.keys() <= private
    own = re.findall(r"^    (\w+):", parts["Args"].removeprefix(common_args(parts["Args"])), re.M)
    for section in ("Dataset", "Evaluation", "Training", "main"):
        for called in private:
            assert not re.search(rf"(?<![\w.]){called}\(", parts[section]), called
        assert not [field for field in own if f"args.{field}" in parts[section]]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_needs_what_requirements_txt_says(name):
    """Its lines up to the comment on the figures and the tests."""
    header = re.match(r"# /// script\n(.*?)# ///\n", TEXT[name], re.S)[1]
    needed = tomllib.loads(header.replace("\n# ", "\n").removeprefix("# "))
    scripts, figures, _ = (ROOT / "requirements.txt").read_text().partition("# The figures")
    lines = [line.partition("#")[0].replace(" ", "") for line in scripts.splitlines()]
    assert figures and sorted(needed["dependencies"]) == sorted(filter(None, lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert needed["requires-python"] == project["requires-python"] == ">=3.11,<3.13"


@pytest.mark.parametrize("a, b", PAIRS)
def test_diffs_are_short(a, b):
    files = [ROOT / f"{a}.py", ROOT / f"{b}.py"]
    diff = subprocess.run(["diff", *files], capture_output=True, text=True).stdout
    assert 0 < len(re.findall("^[<>]", diff, re.M)) <= 80


def test_importing_the_scripts_has_no_side_effect():
    look = "dict(os.environ), signal.getsignal(2), signal.getsignal(15)"
    code = f"import os, signal; before = {look}; import {', '.join(SCRIPTS)}; "
    code += f"assert before == ({look})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
