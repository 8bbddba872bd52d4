"""benchmark/report.py on made-up runs, against numbers worked out by hand."""

import csv
import json
import math
import sys

import numpy as np
import pytest

import lps
from benchmark import report

CUBE, PUZZLE, SCENE = (f"{name}-play-singletask-v0" for name in ("cube-single", "puzzle-3x3", "scene"))


def make_run(path, algorithm, successes, seed=0, task=CUBE, mark="", total=20, fingerprint="x", **arguments):
    """A run directory; successes: {step: one for each seed}."""
    path.mkdir(parents=True)
    num_seeds = len(next(iter(successes.values()), [0]))
    record = dict(env_id=task, algorithm=algorithm, seed=seed, num_seeds=num_seeds, total_steps=total,
                  dataset=dict(transitions=1000, mark=mark, fingerprint=fingerprint)) | arguments
    (path / "args.json").write_text(json.dumps(record))
    if successes:
        lines = [f"{step},{seed + i},{x},0,1,50,1" for step, values in successes.items() for i, x in enumerate(values)]
        (path / "eval.csv").write_text("\n".join(["step,seed,success,return,length,episodes,seconds", *lines, ""]))
    return path


def run_report(*run_dirs, out, **more):
    """The lines of the .md and the rows of the .csv that it wrote."""
    report.main(report.Args(run_dirs=run_dirs, out=out, **more))
    with open(out.with_suffix(".csv")) as file:
        return out.with_suffix(".md").read_text().splitlines(), list(csv.DictReader(file))


def test_means_intervals_and_what_stands_behind_them(tmp_path, capsys):
    make_run(tmp_path / "runs/a", "lps", {10: [0.2, 0.4], 20: [0.6, 0.8]})
    make_run(tmp_path / "runs/b", "lps", {10: [0.6], 20: [1.0]}, seed=2)
    make_run(tmp_path / "runs/c", "dsrl", {20: [0.5]}, mark='{"collected_by": "benchmark/collect.py"}')
    lines, rows = run_report(tmp_path / "runs", out=tmp_path / "new/curves.png")
    # lps: mean 0.8, standard deviation 0.2, t of 2 degrees of freedom 4.3027: 0.8 +- 0.4968, cut off at 1
    assert lines[2] == f"| {CUBE} | lps | 0.80 | 0.30 | 1.00 | 1 | 20 | 3 | 50 | 1,000 transitions |"
    assert lines[3] == f"| {CUBE} | dsrl | 0.50 | - | - | 1 | 20 | 1 | 50 | 1,000 transitions, collected locally |"
    assert float(rows[0]["95% from"]) == pytest.approx(0.8 - 4.302653 * 0.2 / math.sqrt(3), abs=1e-5)
    assert [rows[0][key] for key in ("success", "95% to", "updates", "seeds")] == ["0.800000", "1.000000", "20", "3"]
    assert "- dsrl, seed 1, 2: no run on " + CUBE in lines and len([x for x in lines if x.startswith("- ")]) == 1
    assert "\n".join(lines) in capsys.readouterr().out
    assert (tmp_path / "new/curves.png").stat().st_size > 10_000


def test_unequal_lengths_and_missing_runs_are_reported(tmp_path):
    make_run(tmp_path / "a", "lps", {10: [0.2, 0.4], 20: [0.6, 0.9]})
    make_run(tmp_path / "b", "lps", {10: [0.6]}, seed=2)  # stopped early
    make_run(tmp_path / "c", "lps", {}, seed=3)  # not evaluated yet
    make_run(tmp_path / "d", "lps", {20: [0.5] * 4}, task=PUZZLE)
    make_run(tmp_path / "e", "cfgrl", {20: [0.1] * 4}, task=PUZZLE, fingerprint="y")
    make_run(tmp_path / "f", "dsrl", {10: [0.1, 0.1], 20: [0.1, 0.1]}, task=PUZZLE)
    make_run(tmp_path / "g", "dsrl", {15: [0.1, 0.1]}, seed=2, task=PUZZLE, total=15)  # no step in common
    lines, rows = run_report(tmp_path, out=tmp_path / "x.png")
    assert [rows[0][key] for key in ("success", "updates", "seeds")] == ["0.400000", "10", "3"]
    assert sorted(line for line in lines if line.startswith("- ")) == sorted([
        f"- lps, seed 2: evaluated up to 10 of 20 updates on {CUBE}",
        f"- lps, seed 3: evaluated up to 0 of 20 updates on {CUBE}",
        f"- cfgrl, seed 0, 1, 2, 3: no run on {CUBE}", f"- dsrl, seed 0, 1, 2, 3: no run on {CUBE}",
        f"- {PUZZLE}: not all runs were trained on the same data",
        f"- dsrl on {PUZZLE} is left out: there is no step at which all its seeds were evaluated",
        f"- dsrl, seed 2, 3: evaluated up to 15 of 20 updates on {PUZZLE}"])


def test_overrides_are_methods_of_their_own(tmp_path):
    """What the script sets by domain, and where and how long a run ran, is no override."""
    args = lps.Args(env_id=CUBE, total_steps=20)
    lps.check_args(args)
    defaults = json.loads(json.dumps(lps.asdict(args), default=str))
    make_run(tmp_path / "a", "lps", {20: [0.9]}, **{key: x for key, x in defaults.items() if key != "seed"})
    make_run(tmp_path / "b", "lps", {20: [0.7]}, seed=1, eval_interval=7, batch_size=256)
    make_run(tmp_path / "c", "lps", {20: [0.1]}, latent="normal")
    make_run(tmp_path / "d", "lps", {20: [0.2]}, base="flow", flow_steps=1, latent_actor_hidden_dims=[8, 8])
    make_run(tmp_path / "e", "qc_fql", {20: [0.4]}, alpha=30.0)
    make_run(tmp_path / "f", "qc_fql", {20: [0.5]}, alpha=3.0, task=PUZZLE, sparse=True)
    make_run(tmp_path / "g", "qc_fql", {20: [0.6]}, alpha=3.0)
    make_run(tmp_path / "h", "flow_bc", {20: [0.0]}, policy="meanflow")
    cells = report.gather([tmp_path])
    assert {key: sorted(cell) for key, cell in cells.items()} == {
        (CUBE, "lps"): [0, 1], (CUBE, "lps --latent normal"): [0], (CUBE, "qc_fql"): [0], (PUZZLE, "qc_fql"): [0],
        (CUBE, "lps --latent-actor-hidden-dims 8 8 --base flow --flow-steps 1"): [0], (CUBE, "qc_fql --alpha 3.0"): [0],
        (CUBE, "flow_bc --policy meanflow"): [0]}
    look = report.looks(sorted({method for _, method in cells}))
    assert len({tuple(map(str, x.values())) for x in look.values()}) == len(look)
    assert (look["lps"]["color"], look["lps"]["ls"]) == report.LOOKS["lps"]


def test_domain_means_beside_the_published(tmp_path):
    tasks = {"cube-single-play-singletask-task1-v0": 0.2, "cube-single-play-singletask-task2-v0": 0.6,
             "cube-single-noisy-singletask-task1-v0": 0.1, SCENE: 0.9, "module:Env-v0": 0.3}
    for i, (task, x) in enumerate(tasks.items()):
        make_run(tmp_path / str(i), "lps", {20: [x]}, task=task, sparse=task == SCENE)
    rows = [report.task_row(*key, cell) for key, cell in report.gather([tmp_path]).items()]
    means = {row["task or domain"]: (pytest.approx(row["success"]), row["published"], row["tasks"])
             for row in report.mean_rows(rows)}
    assert means == {"cube-single": (0.4, 0.95, {2}), "cube-single-noisy": (0.1, None, {1}), "scene": (0.9, 0.79, {1}),
                     "module:Env-v0": (0.3, None, {1}), "all state tasks": (0.42, 0.66, {5})}
    one_domain = [row for row in rows if row["task or domain"].startswith("cube-single-play")]
    assert [row["task or domain"] for row in report.mean_rows(one_domain)] == ["cube-single"]
    one_of_each = one_domain + [row | {"task or domain": "visual-" + row["task or domain"]} for row in one_domain]
    assert [row["task or domain"] for row in report.mean_rows(one_of_each)] == ["cube-single", "visual-cube-single"]


def test_success_over_alpha(tmp_path):
    for i, alpha in enumerate((0.1, 1.0, 10.0)):
        make_run(tmp_path / f"l{i}", "lps", {10: [0.1, 0.1], 20: [0.4, 0.6]}, alpha=alpha)
        make_run(tmp_path / f"q{i}", "qc_mfql", {20: [0.2]}, alpha=alpha)
    cells = report.gather([tmp_path])
    assert [method for _, method in cells][:4] == ["lps --alpha 0.1", "lps", "lps --alpha 10.0", "qc_mfql --alpha 0.1"]
    sweeps = report.find_sweeps(cells)
    assert {key: sorted(sweep) for key, sweep in sweeps.items()} == {
        (CUBE, "lps"): [0.1, 1.0, 10.0], (CUBE, "qc_mfql"): [0.1, 1.0, 10.0]}
    run_report(tmp_path, out=tmp_path / "x.png")
    assert (tmp_path / "x_alpha.png").stat().st_size > 10_000


def test_the_aggregate_is_rliables(tmp_path, monkeypatch):
    pytest.importorskip("rliable")
    from rliable import library, metrics

    monkeypatch.setattr(report, "REPS", 50)
    scores = dict(lps=np.array([[0.9, 0.2], [0.7, 0.5], [0.8, 0.1]]), dsrl=np.array([[0.3, 0.6]]))
    for method, x in scores.items():
        for i, task in enumerate((CUBE, PUZZLE)):
            make_run(tmp_path / f"{method}{i}", method, {20: x[:, i].tolist()}, task=task)
    make_run(tmp_path / "more", "lps", {20: [0.5]}, seed=3)  # on one of the two tasks alone
    make_run(tmp_path / "other", "lps", {20: [0.5]}, task=SCENE)  # where dsrl has no run
    lines, rows = run_report(tmp_path, out=tmp_path / "x.png", aggregate=True)
    by_hand = {"lps": np.mean([0.2, 0.5, 0.7, 0.8]), "dsrl": 0.45}  # a quarter of the six, and of the two, is cut off
    np.random.seed(0)
    means, ends = library.get_interval_estimates(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=50)
    iqms = {row["method"]: row for row in rows if row["task or domain"] == "IQM of 2 task(s)"}
    for method in scores:
        assert float(iqms[method]["success"]) == pytest.approx(means[method][0]) == pytest.approx(by_hand[method])
    assert [float(iqms["lps"][key]) for key in ("95% from", "95% to")] == pytest.approx(ends["lps"][:, 0], abs=1e-5)
    assert (iqms["lps"]["seeds"], iqms["dsrl"]["seeds"], iqms["dsrl"]["95% from"]) == ("3", "1", "")
    cells = report.gather([tmp_path])
    _, profiles = report.aggregate(cells, [report.task_row(*key, cell) for key, cell in cells.items()])
    assert profiles["lps"][0][[0, 25, 50]] == pytest.approx([1, 0.5, 0])  # above 0, above 0.5, above 1
    assert (tmp_path / "x_aggregate.png").stat().st_size > 10_000


def test_bad_input_is_one_clear_line(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", "lps", {20: [0.5]})

    def fails(line, *run_dirs, **more):
        with pytest.raises(SystemExit, match=f"^error: .*{line}") as caught:
            run_report(*run_dirs, **dict(out=tmp_path / "x.png") | more)
        assert "\n" not in str(caught.value)

    fails("name at least one run directory")
    fails("is no run directory, and there is none below it", tmp_path / "nowhere")
    fails("a figure is a .png, .pdf or .svg", run, out=tmp_path / "x.csv")
    fails("two runs of lps on .* with seed 0", run, make_run(tmp_path / "b", "lps", {20: [0.5]}))
    fails("none of these runs has been evaluated", make_run(tmp_path / "c", "lps", {}))
    fails("its environment reports no success", make_run(tmp_path / "d", "lps", {20: [math.nan]}))
    fails("there is no script nobody", make_run(tmp_path / "e", "nobody", {20: [0.5]}))
    (run / "eval.csv").write_text("step,seed\n1,2\n")
    fails("a holds no run that can be read", run)
    (run / "args.json").write_text("[]")
    fails("a holds no run that can be read", run)
    monkeypatch.setitem(sys.modules, "rliable", None)
    fails("pip install -r benchmark/requirements.txt", make_run(tmp_path / "f", "lps", {20: [0.5]}), aggregate=True)
