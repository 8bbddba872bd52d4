"""benchmark/report.py on made-up runs."""

import json

import pytest

from benchmark import report


def make_run(path, algorithm, seeds, successes, task="cube-single-play-singletask-v0", mark=""):
    path.mkdir()
    record = dict(env_id=task, algorithm=algorithm, eval_episodes=50, dataset=dict(transitions=1000, mark=mark))
    (path / "args.json").write_text(json.dumps(record))
    lines = ["step,seed,success,return,length,episodes,seconds"]
    for step, values in successes.items():
        lines += [f"{step},{seed},{value},0,1,50,1" for seed, value in zip(seeds, values)]
    (path / "eval.csv").write_text("\n".join(lines) + "\n")
    return path


def test_means_are_over_seeds_and_steps_that_all_reached(tmp_path):
    runs = [make_run(tmp_path / "a", "lps", [0, 1], {10: [0.2, 0.4], 20: [0.6, 0.9]}),
            make_run(tmp_path / "b", "lps", [2], {10: [0.6]}),  # stopped early
            make_run(tmp_path / "c", "dsrl", [0], {20: [0.5]}, mark='{"collected_by": "benchmark/collect.py"}')]
    curves, facts = report.gather(runs)
    task = "cube-single-play-singletask-v0"
    assert report.mean_curve(curves[task]["lps"]) == [(10, pytest.approx(0.4))]
    lines = report.table(curves, facts).splitlines()
    assert lines[2] == f"| {task} | dsrl | 0.50 | 20 | 1 | 50 | 1,000 transitions, collected locally |"
    assert lines[3] == f"| {task} | lps | 0.40 | 10 | 3 | 50 | 1,000 transitions |"


def test_the_figure_is_drawn(tmp_path, capsys):
    runs = (make_run(tmp_path / "a", "lps", [0, 1], {10: [0.2, 0.4], 20: [0.6, 0.9]}),
            make_run(tmp_path / "b", "cfgrl", [0], {10: [0.2]}, task="scene-play-singletask-v0"))
    report.main(report.Args(run_dirs=runs, out=tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "| scene-play-singletask-v0 | cfgrl | 0.20 |" in capsys.readouterr().out


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(SystemExit, match="is no run directory"):
        report.gather([tmp_path])
