"""What a user can get wrong ends in one line that names it, and leaves what was there as it was. The text is shared by
all scripts (test_shared_text.py), so flow_bc, which compiles fastest, stands for them."""

import signal
import sys

import jax.numpy as jnp
import numpy as np
import ogbench
import pytest
import toy_envs
from carry import ROOT
from helpers import COUNTING, TINY, as_flags, checkpoint, finish, load, make_data, read_csv, start

import flow_bc


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """own.npz and a run on it."""
    folder = tmp_path_factory.mktemp("own")
    np.savez(folder / "own.npz", **make_data([9, 9, 3, 30]))
    flow_bc.train(flow_bc.Args(env_id=COUNTING, dataset_path=str(folder / "own.npz"), total_steps=2, eval_episodes=0,
                       run_dir=str(folder / "run"), **TINY))
    return folder


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def complaint(folder, function, *given):
    """The one line with which a call ends: a text, that is, which Python prints before it exits with 1. Every file that
    was there is as it was, and no other was made."""
    before = files(folder)
    with pytest.raises(SystemExit) as error:
        function(*given)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert files(folder) == before
    return error.value.code


@pytest.mark.parametrize("given, told", [
    (dict(batch_size=0), "--batch-size 0"), (dict(batch_size=-3), "--batch-size -3"), (dict(gamma=1.5), "--gamma 1.5"),
    (dict(gamma=-0.1), "--gamma -0.1"), (dict(gamma=float("nan")), "--gamma nan"), (dict(tau=2.0), "--tau 2.0"),
    (dict(total_steps=0), "--total-steps 0"), (dict(horizon=0), "--horizon 0"), (dict(horizon=31), "--horizon 31"),
    (dict(num_seeds=0), "--num-seeds 0"), (dict(seed=-1), "--seed -1"), (dict(learning_rate=-1.0), "--learning-rate"),
    (dict(log_interval=-5), "--log-interval -5"), (dict(eval_interval=-1), "--eval-interval -1"),
    (dict(eval_episodes=-1), "--eval-episodes -1"), (dict(flow_steps=0), "--flow-steps 0"),
    (dict(env_id="cube-singel-play-singletask-v0"), "cube-singel-play-singletask-v0"),
    (dict(env_id="cube-single-play-singletask-task9-v0"), "cube-single-play-singletask-task9-v0"),
    (dict(env_id="no_module:No-v0"), "no_module:No-v0"), (dict(env_id="toy_envs:No-v0"), "toy_envs:No-v0"),
    (dict(env_id="toy_envs:Discrete-v0"), "toy_envs:Discrete-v0"), (dict(run_dir="run"), "run holds a run"),
    (dict(run_dir="own.npz"), "own.npz"), (dict(run_dir="/proc/no"), "/proc/no"),
    (dict(dataset_path="no.npz"), "no.npz"),
    (dict(env_id="toy_envs:Bandit-v0"), "own.npz: observations must be numbers (55, 4)")], ids=str)
def test_arguments(folder, monkeypatch, given, told):
    monkeypatch.chdir(folder)
    args = flow_bc.Args(**dict(env_id=COUNTING, dataset_path="own.npz", run_dir="new", **TINY) | given)
    assert told in complaint(folder, flow_bc.train, args)


@pytest.mark.parametrize("name, given, told", [
    ("cfgrl", dict(expectile=1.5), "--expectile 1.5"), ("ifql", dict(num_samples=0), "--num-samples 0"),
    ("qc_fql", dict(alpha=-3.0), "--alpha -3.0"), ("lps", dict(decode_steps=0), "--decode-steps 0"),
    ("gfp", dict(eta=-1.0), "--eta -1.0")])
def test_arguments_of_a_method(tmp_path, name, given, told):
    script = load(name)
    assert told in complaint(tmp_path, script.prepare, script.Args(run_dir=str(tmp_path / "new"), **given))


@pytest.mark.parametrize("name, domain, expected", [
    ("qc_fql", "cube-single", dict(alpha=30, sparse=False)), ("qc_fql", "cube-double", dict(alpha=3, sparse=False)),
    ("qc_mfql", "visual-scene", dict(alpha=1, sparse=True)), ("qc_mfql", "puzzle-3x3", dict(alpha=3, sparse=True)),
    ("qc_fql", "puzzle-4x4", dict(alpha=10, sparse=False)), ("ifql", "scene", dict(expectile=0.9, sparse=True)),
    ("ifql", "puzzle-3x3", dict(expectile=0.95, sparse=True)),
    ("gfp", "cube-single", dict(alpha=10, eta=0.1, target="both", sparse=False)),
    ("gfp", "cube-double", dict(alpha=1, eta=0.01, target="both", sparse=False)),
    ("gfp", "scene", dict(alpha=10, eta=1e-3, target="student", sparse=True)),
    ("gfp", "puzzle-3x3", dict(alpha=3, eta=1e-3, target="student", sparse=True)),
    ("gfp", "puzzle-4x4", dict(alpha=3, eta=1e-5, target="student", sparse=False))])
def test_what_was_not_given_follows_the_domain(tmp_path, name, domain, expected):
    script, own = load(name), dict(run_dir=str(tmp_path), env_id=f"{domain}-play-singletask-task2-v0")
    args = vars(script.prepare(script.Args(**own)))
    assert {key: args[key] for key in expected} == expected
    given = {key: dict(sparse=not args["sparse"], target="student").get(key, 0.5) for key in expected}
    args = vars(script.prepare(script.Args(**own, **given)))
    assert {key: args[key] for key in given} == given


# ------------------------------------------------------------------------------------------------------------- datasets


def put(data, name, where, value):
    data[name][where] = value


BAD = [  # (what the line must say after the name of the file, what was done to the data, of 14 rows)
    ("observations must be numbers", lambda data: data.pop("observations")),
    ("actions must be numbers (14, 1)", lambda data: data.pop("actions")),
    ("rewards must be numbers (14,)", lambda data: data.pop("rewards")),
    ("terminals must be numbers (14,)", lambda data: data.pop("terminals")),
    ("rewards must be numbers (14,)", lambda data: data.update(rewards=np.zeros(13))),
    ("masks must be numbers (14,)", lambda data: data.update(masks=np.zeros((14, 1)))),
    ("observations must be numbers (14, 2)", lambda data: data.update(observations=np.zeros((14, 1)))),
    ("actions must be numbers (14, 1)", lambda data: data.update(actions=np.zeros((14, 2)))),
    ("actions must be numbers (14, 1)", lambda data: data.update(actions=np.zeros(14))),
    ("actions must be numbers (14, 1)", lambda data: data.update(actions=np.zeros((14, 1), complex))),
    ("terminals must be numbers (14,)", lambda data: data.update(terminals=np.full(14, "x"))),
    ("observations must lie within", lambda data: put(data, "observations", (3, 1), np.nan)),
    ("observations must lie within", lambda data: put(data, "observations", (3, 1), 1e300)),
    ("actions must lie within", lambda data: put(data, "actions", (3, 0), np.nan)),
    ("rewards must lie within", lambda data: put(data, "rewards", 2, np.inf)),
    ("masks must lie within", lambda data: put(data, "masks", 2, np.nan)),
    ("terminals must lie within", lambda data: put(data, "terminals", 2, np.nan)),
    ("actions must lie within +-1, but reach from", lambda data: put(data, "actions", 0, 1.5)),
    ("the last row must end a trajectory", lambda data: put(data, "terminals", -1, 0)),
    ("no trajectory is as long as a chunk", lambda data: data.update(terminals=np.ones(14))),
    ("is no dataset of", lambda data: data.update(actions=np.array([[object()]] * 14))),  # nothing is unpickled
    ("must be numbers", lambda data: data.clear())]


@pytest.mark.parametrize("told, spoil", BAD)
def test_bad_data(tmp_path, told, spoil):
    data = make_data([6, 6])
    spoil(data)
    np.savez(tmp_path / "bad.npz", **data)
    args = flow_bc.Args(env_id=COUNTING, dataset_path=str(tmp_path / "bad.npz"), action_dim=1, **TINY)
    path, _, rest = complaint(tmp_path, flow_bc.load_dataset, args, flow_bc.make_env(args)).partition("/bad.npz")
    assert path == str(tmp_path) and told in rest


def test_images_of_another_kind(tmp_path):
    data = toy_envs.film_data(2)
    data["observations"] = data["observations"] / 255
    np.savez(tmp_path / "bad.npz", **data)
    args = flow_bc.Args(env_id="toy_envs:Film-v0", dataset_path=str(tmp_path / "bad.npz"), action_dim=1)
    assert "images uint8" in complaint(tmp_path, flow_bc.load_dataset, args, flow_bc.make_env(args))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "flipped", "text", "an empty folder"])
def test_damaged_files(tmp_path, damage):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, **make_data([600, 60]))
    whole = path.read_bytes()
    path.unlink()
    if damage == "an empty folder":
        path.mkdir()
    elif damage != "missing":
        flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
        path.write_bytes({"empty": b"", "cut off": whole[:-100], "flipped": flipped, "text": b"no archive"}[damage])
    args = flow_bc.Args(env_id=COUNTING, dataset_path=str(path), action_dim=1)
    assert "bad.npz" in complaint(tmp_path, flow_bc.load_dataset, args, flow_bc.make_env(args))


def test_a_dataset_of_another_environment(tmp_path):
    """Its observations do not fit, or already the positions from which its rewards are computed."""
    args = flow_bc.Args(env_id="puzzle-3x3-play-singletask-v0", dataset_path=str(tmp_path / "data.npz"), action_dim=5)
    env, data = flow_bc.make_env(args), make_data([6])
    np.savez(args.dataset_path, **data, qpos=np.zeros((7, 21)))
    assert "observations must be numbers" in complaint(tmp_path, flow_bc.load_dataset, args, env)
    del data["rewards"]
    np.savez(args.dataset_path, **data, qpos=np.zeros((7, 21)))
    assert "is no dataset of puzzle-3x3-play-singletask-v0" in complaint(tmp_path, flow_bc.load_dataset, args, env)


def test_no_dataset_and_no_network(tmp_path, monkeypatch):
    """The line names both ways out."""
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
    args = flow_bc.Args(dataset_dir=str(tmp_path), action_dim=5)
    message = complaint(tmp_path, flow_bc.load_dataset, args, flow_bc.make_env(args))
    assert "http://127.0.0.1:9/cube-single-play-v0.npz" in message
    assert "python benchmark/collect.py cube-single-play-v0" in message and "--dataset-path" in message


# --------------------------------------------------------------------------------------------------- runs, and resuming


@pytest.mark.parametrize("flags, told", [
    ("--resume", "need the --run-dir of a run"), ("--eval-only", "need the --run-dir of a run"),
    ("--resume --run-dir nowhere", "nowhere"),
    ("--resume --run-dir run --gamma 0.5 --seed 3", "another seed, gamma"),
    ("--resume --run-dir run --env-id toy_envs:Silent-v0", "another env_id"),
    ("--resume --run-dir run --actor-hidden-dims 9 9", "another actor_hidden_dims"),
    ("--resume --run-dir run --flow-steps 3", "another flow_steps"),
    ("--eval-only --run-dir run --num-seeds 4", "another num_seeds")])
def test_resuming_what_cannot_be_resumed(folder, monkeypatch, flags, told):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["flow_bc.py", *flags.split()])
    assert told in complaint(folder, flow_bc.main)


def test_a_run_of_another_method(folder, monkeypatch):
    """Whose arguments and networks may well have the same names and sizes."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["mf_bc.py", "--resume", "--run-dir", "run", "--total-steps", "4"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert "--run-dir" in complaint(folder, load("mf_bc").main)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    """In update 57, after the checkpoint of update 40, which stays. One line for however many seeds."""
    np.savez(tmp_path / "data.npz", **make_data([9, 9]))
    update = flow_bc.update

    def spoilt(args, state, batch, key):
        state, metrics = update(args, state, batch, key)
        return state, dict(policy_loss=jnp.where(state["policy"].step == 57, jnp.nan, metrics["policy_loss"]))

    monkeypatch.setattr(flow_bc, "update", spoilt)
    args = flow_bc.Args(env_id=COUNTING, dataset_path=str(tmp_path / "data.npz"), total_steps=100, eval_interval=40,
                        eval_episodes=0, log_interval=20, num_seeds=12, run_dir=str(tmp_path / "run"), **TINY)
    with pytest.raises(SystemExit) as error:
        flow_bc.train(args)
    assert "not finite" in error.value.code and "policy_loss" in error.value.code and "\n" not in error.value.code
    assert checkpoint(tmp_path / "run")["step"] == 40
    assert [row["step"] for row in read_csv(tmp_path / "run/train.csv")] == 12 * ["20"] + 12 * ["40"]


def test_a_fault_is_one_line_of_the_command(folder):
    """As its user sees it: no traceback, exit code 1."""
    flags = as_flags(TINY | dict(env_id=COUNTING, dataset_path="own.npz", gamma=1.5))
    _, err = finish(start(folder, ROOT / "flow_bc", *flags, PYTHONPATH=str(ROOT / "tests")), code=1)
    assert err.count("\n") == 1 and "--gamma 1.5" in err
