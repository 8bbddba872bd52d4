"""benchmark/report.py: which runs belong together, what the tables say of them, what is drawn."""

import json
from math import nan

import pytest
from helpers import read_csv
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmark import ROOT, report

RESULTS = ROOT / "benchmark/results"
CUBE = "cube-single-play-singletask-v0"
PUZZLE = "puzzle-3x3-play-singletask-task1-v0"
LPS = f"scaled-down-ablations/{CUBE}/lps"
# A committed table that holds other runs than those below its own directory.
PLACES = {"scaled-down-alpha/curves.csv": ["scaled-down-alpha", LPS]}
TABLES = {*PLACES, *(f"{path.parent.name}/curves.csv" for path in RESULTS.glob("*/curves.csv"))}


def make_run(path, script, successes, task=CUBE, seed=0, interval=100, returns=None, **record):
    """A run with an evaluation at 0 and after every interval."""
    path.mkdir(parents=True)
    steps = range(0, interval * len(successes), interval)
    facts = dict(dataset="x.npz", transitions=1000, trajectories=10, device="cpu")
    record = dict(script=script, env_id=task, seed=seed, total_steps=steps[-1]) | record
    (path / "args.json").write_text(json.dumps(record | facts))
    lines = ["step,seed,success,return,length,episodes,seconds"]
    for step, success, value in zip(steps, successes, returns or successes, strict=True):
        lines.append(f"{step},{seed},{success},{value},1,50,1")
    (path / "eval.csv").write_text("\n".join([*lines, ""]))


@pytest.fixture
def make_report(tmp_path, monkeypatch):
    """Reports what lies in tmp_path: {(task, method): its row of the table}, {name: figure}."""
    made = {}

    def keep(figure, path, **how):
        made[path.stem] = figure

    def make():
        report.main(report.Args((tmp_path,), tmp_path / "out/curves.png"))
        rows = read_csv(tmp_path / "out/curves.csv")
        return {(row["task or domain"], row["method"]): row for row in rows}, made

    monkeypatch.setattr(Figure, "savefig", keep)
    return make


def words(figure):
    return {text.get_text(): text.get_color() for text in figure.findobj(Text)}


def test_runs_with_layers_of_another_shape_are_other_methods(tmp_path, make_report):
    make_run(tmp_path / "a", "lps", [0, 0.2], critic_hidden_dims=[256, 256, 256, 256])
    make_run(tmp_path / "b", "lps", [0, 0.4], critic_hidden_dims=[256])
    make_run(tmp_path / "c", "lps", [0, 0.6], critic_hidden_dims=[256, 256], seed=1)
    rows, _ = make_report()
    found = {method: row["success"][:3] for (task, method), row in rows.items() if task == CUBE}
    two = "lps --critic-hidden-dims 256 256"
    assert found == {"lps": "0.2", "lps --critic-hidden-dims 256": "0.4", two: "0.6"}


def test_a_default_that_depends_on_the_domain_makes_no_method(tmp_path, make_report):
    make_run(tmp_path / "a", "qc_fql", [0, 0.2], alpha=30.0, sparse=False)
    make_run(tmp_path / "b", "qc_fql", [0, 0.4], PUZZLE, alpha=3.0, sparse=True)
    make_run(tmp_path / "c", "qc_fql", [0, 0.6], alpha=3.0)
    rows, _ = make_report()
    assert {(CUBE, "qc_fql"), (PUZZLE, "qc_fql"), (CUBE, "qc_fql --alpha 3.0")} <= {*rows}


def test_ablations_are_variants_of_lps(tmp_path, make_report):
    make_run(tmp_path / "a", "lps", [0, 0.5])
    make_run(tmp_path / "b", "ablations", [0, 0.1], latent="normal", alpha=1.0)
    for alpha in (0.1, 10.0):
        make_run(tmp_path / str(alpha), "ablations", [0, 0.5], alpha=alpha)
    rows, made = make_report()
    variants = ["lps --alpha 0.1", "lps --alpha 10.0", "lps --latent normal"]
    assert sorted(method for task, method in rows if task == CUBE) == ["lps", *variants]
    assert {*made} == {"curves", "curves_alpha", "curves_bars"}


def test_runs_of_your_own_script_are_pooled_if_their_arguments_agree(tmp_path, make_report):
    make_run(tmp_path / "lps", "lps", [0, 0.5])
    make_run(tmp_path / "own", "my_method", [0, 0.4], width=3)
    make_run(tmp_path / "own1", "my_method", [0, 0.6], seed=1, width=3)
    make_run(tmp_path / "other", "my_ablations", [0, 0.1])
    rows, made = make_report()
    assert float(rows[CUBE, "my_method"]["success"]) == pytest.approx(0.5)
    colours = words(made["curves"])
    assert len({colours[name] for name in ("LPS", "my_method", "my_ablations")}) == 3
    make_run(tmp_path / "own2", "my_method", [0, 0.9], seed=2, width=4)
    with pytest.raises(SystemExit, match="another width"):
        make_report()
    make_run(tmp_path / "lps2", "lps", [0, 0.5])
    with pytest.raises(SystemExit, match="same task and seed"):
        make_report()


def test_success_is_the_mean_of_the_last_three_evaluations(tmp_path, make_report, capsys):
    make_run(tmp_path / "0", "lps", [0.9, 0.1, 0.2, 0.4, 0.6])
    make_run(tmp_path / "1", "lps", [0.9, 0.5, 0.3, 0.4, 0.8, 1.0], seed=1, total_steps=900)
    make_run(tmp_path / "2", "lps", [0.9], seed=2, total_steps=400)  # has just begun
    rows, made = make_report()
    row = rows[CUBE, "lps"]
    assert [row[name] for name in ("updates", "evaluations", "seeds")] == ["200 to 400", "3", "2"]
    # 0.4 and 0.5: mean 0.45, standard error 0.05, t of one degree of freedom 12.706
    told = [float(row[name]) for name in ("success", "95% from", "95% to")]
    assert told == pytest.approx([0.45, 0, 1], abs=1e-4)
    curve = made["curves"].axes[0].lines[0].get_ydata()
    assert list(curve) == pytest.approx([0.9, 0.3, 0.25, 0.4, 0.7])  # each evaluation as it is
    lines = capsys.readouterr().out.splitlines()
    assert f"- lps on {CUBE}, seed 1: evaluated up to 500 of 900 updates" in lines
    assert f"- lps on {CUBE}, seed 2: evaluated up to 0 of 400 updates" in lines


def test_a_task_without_success_has_its_return(tmp_path, make_report):
    for seed in (0, 1):
        returns = [-900, -500 - seed, -300, -100]
        path = tmp_path / f"pendulum{seed}"
        make_run(path, "lps", 4 * [nan], "Pendulum-v1", seed, returns=returns)
    make_run(tmp_path / "cube", "lps", [0, 0.4], returns=[-200, -150])
    rows, made = make_report()
    row = rows["Pendulum-v1", "lps"]
    assert (row["success"], row["return"]) == ("", "-300.166667")
    assert float(row["95% to"]) == pytest.approx(-300.1667 + 12.706 / 6, abs=1e-3)
    assert (rows[CUBE, "lps"]["success"], rows[CUBE, "lps"]["return"]) == ("0.400000", "")
    assert {task for task, _ in rows} == {"Pendulum-v1", CUBE, "cube-single"}
    heights = {axis.get_ylabel(): axis.get_ylim() for axis in made["curves"].axes}
    assert heights["success"] == pytest.approx((-0.03, 1.03)) and heights["return"][0] < -800


def test_what_is_told_of_the_data_stands_in_args_json(tmp_path, make_report):
    mark = {"COLLECTED HERE": {"collected_by": "benchmark/collect.py"}, "products": "bfloat16"}
    make_run(tmp_path / "a", "lps", [0, 0.5], **mark)
    make_run(tmp_path / "b", "dsrl", [0, 0.5], dataset_dir="~/.ogbench/collected")
    rows, _ = make_report()
    told = rows[CUBE, "lps"]["data"]
    assert told == "1000 transitions, collected locally, trained through bfloat16.py"
    assert rows[CUBE, "dsrl"]["data"] == "1000 transitions"


def test_means_of_tasks_stand_beside_what_is_published(tmp_path, make_report):
    curve = [0, 0.2, 0.4, 0.6]  # published at 50,000: 0.041, at 100,000: 0.528
    make_run(tmp_path / "a", "dsrl", curve, PUZZLE, interval=40_000)
    make_run(tmp_path / "b", "dsrl", [0, 0.5], interval=40_000)
    make_run(tmp_path / "c", "dsrl", [0, 0.1], "scene-play-singletask-v0", interval=40_000)
    rows, made = make_report()
    row = rows[PUZZLE, "dsrl"]
    assert row["updates"] == "40000 to 120000"
    assert float(row["published curve"]) == pytest.approx((0.041 + 0.528) / 2, abs=1e-3)
    assert float(row["difference"]) == pytest.approx(0.4 - (0.041 + 0.528) / 2, abs=1e-3)
    assert rows["scene-play-singletask-v0", "dsrl"]["published curve"] == ""  # from 50,000 on
    assert rows["cube-single", "dsrl"]["published"] == "0.990000"
    assert float(rows["all state tasks", "dsrl"]["success"]) == pytest.approx(1 / 3)
    assert "published DSRL" in words(made["curves"])


def test_figures_claim_no_interval_of_few_seeds(tmp_path, make_report):
    for script, seeds in (("lps", 6), ("dsrl", 5)):
        for seed in range(seeds):
            make_run(tmp_path / f"{script}{seed}", script, [0, 0.1 * seed], seed=seed)
    _, made = make_report()
    assert len(made["curves"].axes[0].collections) == 1  # the band of LPS


def test_the_figure_is_written_as_it_is_asked_for_and_as_svg(tmp_path):
    make_run(tmp_path / "run", "lps", [0, 0.5])
    report.main(report.Args((tmp_path,), tmp_path / "out/success.png"))
    for name in ("success.png", "success.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 5_000


@pytest.mark.parametrize("table", sorted(TABLES))
def test_the_committed_tables_are_those_of_the_committed_runs(table, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda rows, path: None)
    places = PLACES.get(table, [table.partition("/")[0]])
    report.main(report.Args(tuple(RESULTS / place for place in places), tmp_path / "curves.png"))
    for suffix in (".md", ".csv"):
        committed = (RESULTS / table).with_suffix(suffix).read_text()
        assert (tmp_path / "curves").with_suffix(suffix).read_text() == committed


def test_the_arguments_in_committed_records_are_those_of_the_scripts():
    for path in RESULTS.rglob("args.json"):
        record = json.loads(path.read_text())
        arguments = {*[*record][: [*record].index("dataset")]} - {"script", "products"}
        if record["script"] not in ("dsrl_min", "lps_mean"):  # of one question, not kept
            assert arguments <= {*report.read_defaults(record)}, path
