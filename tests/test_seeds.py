"""Seeds that benchmark/seeds.py trains at once are the same runs as the script's own."""

import os
import signal
import sys

import jax
import numpy as np
import pytest
from gymnasium.vector import SyncVectorEnv
from helpers import TINY, as_flags, checkpoint

import flow_bc
from benchmark import seeds


@pytest.fixture
def handlers():
    """Of signals, which are put back."""
    found = {number: signal.getsignal(number) for number in flow_bc.SIGNALS}
    yield
    for number, handler in found.items():
        signal.signal(number, handler)


def read(run_dir):
    """What a run has left, but for the times in it."""
    tables = [np.genfromtxt(run_dir / f"{x}.csv", delimiter=",") for x in ("train", "eval")]
    return checkpoint(run_dir), np.delete(tables[0], 2, axis=1), np.delete(tables[1], -1, axis=1)


def test_three_seeds_are_three_runs_though_stopped_and_killed(tmp_path, monkeypatch, handlers):
    add_row = flow_bc.add_row
    x = np.random.default_rng(0).uniform(-1, 1, (300, 5))
    data = dict(observations=x[:, :3], actions=x[:, 3:4], rewards=x[:, 4])
    np.savez(tmp_path / "data.npz", terminals=np.arange(300) % 30 == 29, **data)
    flags = as_flags(TINY | dict(eval_interval=100, log_interval=100, eval_episodes=2))
    flags += ["--env-id", "Pendulum-v1", "--dataset-path", tmp_path / "data.npz"]
    flags += ["--total-steps", 300]

    def start(program, run_dir, *flags):
        command = ["x", *flags, "--run-dir", tmp_path / run_dir]
        monkeypatch.setattr(sys, "argv", [*map(str, command)])
        program.main()

    def add_row_and_stop(path, row):
        add_row(path, row)
        if (row["seed"], row["step"]) == (3, 200) and "success" in row:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(flow_bc, "AsyncVectorEnv", lambda x, context, **y: SyncVectorEnv(x, **y))
    monkeypatch.setattr(flow_bc, "add_row", add_row_and_stop)
    with pytest.raises(SystemExit) as stopped:
        start(seeds, "at-once", "flow_bc.py", "--seeds", 3, 4, 5, *flags)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(flow_bc, "add_row", add_row)
    assert checkpoint(tmp_path / "at-once/seed5")["step"] == 200
    (tmp_path / "at-once/seed4/checkpoint.msgpack").unlink()  # as if killed before the first
    start(seeds, "at-once", "flow_bc.py", "--resume")
    start(flow_bc, "at-once/seed5", "--resume", "--total-steps", 400)
    for seed, steps in ((3, 300), (4, 300), (5, 400)):
        start(flow_bc, f"alone/seed{seed}", *flags, "--seed", seed, "--total-steps", steps)
        runs = [read(tmp_path / folder / f"seed{seed}") for folder in ("at-once", "alone")]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-4, 1e-4), *runs)
