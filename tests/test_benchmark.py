"""benchmark/'s tools, each on tiny input: they run, and write and print what they say."""

import json
import signal
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_csv, until
from matplotlib.text import Text

import lps
import mf_bon
from benchmark import ablations, bfloat16, collect, figures, grasp, latency, report, sweep, throughput, toy

RESULTS = Path(report.__file__).parent / "results"
CUBE = "cube-single-play-singletask-v0"


def save_data(path):
    """Random data of Pendulum-v1: ten trajectories of nine transitions."""
    rng = np.random.default_rng(0)
    np.savez(path, observations=rng.normal(size=(100, 3)), actions=rng.uniform(-1, 1, (100, 1)), rewards=np.zeros(100),
             terminals=np.arange(100) % 10 == 9)


# ============================================================================================================= collect

def test_collect_makes_the_same_data_with_any_number_of_workers(tmp_path):
    for workers in (1, 2):
        args = collect.Args("puzzle-3x3-noisy-v0", num_episodes=2, episode_length=20, seed=5, num_workers=workers,
                            dataset_dir=tmp_path / str(workers))
        collect.collect(args)
    for name, episodes in (("puzzle-3x3-noisy-v0.npz", 2), ("puzzle-3x3-noisy-v0-val.npz", 1)):
        data, same = dict(np.load(tmp_path / "1" / name)), dict(np.load(tmp_path / "2" / name))
        kinds = {key: (x.dtype.name, x.shape[1:]) for key, x in data.items()}
        assert kinds == dict(observations=("float32", (55,)), actions=("float32", (5,)), terminals=("bool", ()),
                             qpos=("float32", (23,)), qvel=("float32", (23,)), button_states=("int64", (9,)))
        assert np.flatnonzero(data["terminals"]).tolist() == [20 + 21 * i for i in range(episodes)]
        assert all(np.array_equal(data[key], same[key]) for key in data)
        assert b"collect.py" in zipfile.ZipFile(tmp_path / "1" / name).comment
    with pytest.raises(SystemExit, match="--overwrite replaces"):
        collect.collect(args)
    with pytest.raises(SystemExit, match="near: puzzle-3x3-play-v0"):
        collect.collect(collect.Args("pzzle-3x3-play-v0"))


def test_ctrl_c_leaves_no_half_file(tmp_path):
    process = subprocess.Popen([sys.executable, collect.__file__, "cube-single-play-v0", "--dataset-dir", tmp_path,
                                "--num-workers", "1", "--episode-length", "50"], stderr=subprocess.PIPE, text=True)
    assert "0/1100" in process.stderr.read(60)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "stopped; no file was left unfinished"
    assert process.returncode == 1 and not list(tmp_path.iterdir())


# =============================================================================================================== sweep

def test_sweep_stops_goes_on_and_never_repeats(tmp_path):
    save_data(tmp_path / "data.npz")
    experiment, run_dir = tmp_path / "tiny.toml", tmp_path / "runs/tiny/Pendulum-v1/flow_bc_tau-0.5/seed0"

    def run_sweep(steps):
        experiment.write_text(f"""
            seeds = 1
            tasks = ["Pendulum-v1"]
            runs = [{{ script = "flow_bc", tau = [0.5] }}]
            [flags]
            dataset-path = "{tmp_path}/data.npz"
            actor-hidden-dims = [8, 8]
            horizon = 1
            total-steps = {steps}
            log-interval = 100
            eval-episodes = 0
            """)
        return subprocess.Popen([sys.executable, sweep.__file__, experiment, "--out", tmp_path / "runs"],
                                stdout=subprocess.PIPE, text=True)

    process = run_sweep(1_000_000)
    until((run_dir / "train.csv").exists)
    process.send_signal(signal.SIGINT)
    assert "1 interrupted" in process.communicate()[0] or process.returncode == 1
    reached = int(read_csv(run_dir / "train.csv")[-1]["step"])
    process = run_sweep(reached + 100)
    assert "1 done" in process.communicate()[0] and process.returncode == 0
    log = (run_dir.parent / "seed0.log").read_text()
    commands = [line for line in log.splitlines() if line.startswith("$ ")]
    assert ["--resume" in command for command in commands] == [False, True]
    assert int(read_csv(run_dir / "train.csv")[-1]["step"]) == reached + 100
    process = run_sweep(reached + 100)
    assert "started" not in process.communicate()[0] and process.returncode == 0
    assert (run_dir.parent / "seed0.log").read_text() == log


@pytest.mark.parametrize("name, runs", [("state", 2000), ("visual", 2000), ("ablations", 1000), ("alpha", 288),
                                        ("comparison", 20), ("scaled-down", 60), ("scaled-down-ablations", 5),
                                        ("scaled-down-alpha", 18), ("hundred", 32), ("hundred-baselines", 16),
                                        ("slips", 35), ("slips-full", 9), ("slips-remedies", 8), ("teachers", 4),
                                        ("million", 2)])
def test_every_experiment_is_made_of_flags_that_exist(name, runs):
    found = sweep.read_experiment(sweep.Args(name))[1]
    assert len(found) == runs == len({run.run_dir for run in found})
    for run in found:
        module = ablations if run.script.stem == "ablations" else __import__(run.script.stem)
        assert {key.replace("-", "_") for key in run.settings} <= {*vars(module.Args())}


# ============================================================================================================ bfloat16

def test_bfloat16_rounds_the_factors_and_nothing_else():
    x, y = np.random.default_rng(0).normal(size=(2, 40, 40)).astype(np.float32)
    how = dict(dimension_numbers=(((1,), (0,)), ((), ())), precision=None, out_sharding=None)
    rounded = [z.astype(jnp.bfloat16).astype(np.float64) for z in (x, y)]
    z = jax.jit(partial(bfloat16.product, preferred_element_type=None, **how))(x, y)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, rounded[0] @ rounded[1], atol=1e-5)
    assert np.abs(z - x @ y).max() > 1e-3


def test_a_sweep_through_bfloat16_trains_nearly_alike_and_is_not_mixed_with_another(tmp_path):
    save_data(tmp_path / "data.npz")
    experiment, runs = tmp_path / "tiny.toml", {}
    experiment.write_text(f"""
        seeds = 1
        tasks = ["Pendulum-v1"]
        runs = [{{ script = "mf_bc" }}]
        [flags]
        dataset-path = "{tmp_path}/data.npz"
        actor-hidden-dims = [32]
        total-steps = 20
        eval-episodes = 0
        """)

    def run_sweep(out, *flags):
        return subprocess.run([sys.executable, sweep.__file__, experiment, "--out", tmp_path / out, *flags],
                              capture_output=True, text=True)

    for out, flags in (("float32", []), ("bfloat16", ["--bfloat16"])):
        assert run_sweep(out, *flags).returncode == 0
        run_dir = tmp_path / out / "tiny/Pendulum-v1/mf_bc/seed0"
        assert json.loads((run_dir / "args.json").read_text()).get("products", "float32") == out
        runs[out] = {name: float(x) for name, x in read_csv(run_dir / "train.csv")[0].items() if "per" not in name}
    assert runs["float32"] != runs["bfloat16"]
    np.testing.assert_allclose([*runs["bfloat16"].values()], [*runs["float32"].values()], rtol=0.02, atol=1e-3)
    refused = run_sweep("bfloat16")
    assert refused.returncode and "--bfloat16 was True and is False" in refused.stderr


# =========================================================================================================== ablations

def test_ablations_exchange_what_they_say(monkeypatch):
    s, z = jnp.ones((6, 3)), 3 * jax.random.normal(jax.random.key(0), (6, 4))

    def decoded(**settings):
        """What a policy makes of latents if all its weights are 0."""
        args = ablations.Args(action_dim=2, horizon=2, actor_hidden_dims=(8,), critic_hidden_dims=(8,), **settings)
        ablations.exchange(args)
        policy = jax.eval_shape(partial(lps.init, args), jax.random.key(0), s[:1])["policy"]
        assert policy.params["params"]["Dense_0"]["kernel"].shape[0] == 3 + 4 + (1 if args.base == "flow" else 2)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), policy.params)
        return lps.decode(args, policy.replace(params=params), s, z)

    ablations.exchange(ablations.Args(latent="normal"))
    np.testing.assert_array_equal(lps.sphere(z), z)
    ablations.exchange(ablations.Args(latent="truncated-normal"))
    np.testing.assert_array_equal(lps.sphere(z), 2 * jnp.tanh(z))
    noise = []
    monkeypatch.setitem(ablations.OWN, "imitation_loss", lambda policy, params, s, a, e, key: noise.append(e))
    ablations.exchange(ablations.Args(latent="truncated-normal"))
    lps.imitation_loss(None, None, s, jnp.zeros((1000, 4)), None, jax.random.key(0))
    assert 1.9 < jnp.abs(noise[0]).max() <= 2 and noise[0].std() == pytest.approx(0.88, abs=0.02)
    monkeypatch.undo()
    np.testing.assert_allclose(decoded(base="flow", flow_steps=1), jnp.clip(z, -1, 1))  # a velocity of 0
    np.testing.assert_allclose(decoded(predict="velocity"), jnp.clip(z, -1, 1))
    np.testing.assert_array_equal(decoded(), 0)
    assert all(getattr(lps, name) is x for name, x in ablations.OWN.items() if name != "train")


@pytest.fixture
def tiny():
    """Of settings of ablations.py, (arguments, state, batch), f's output far beyond the clip; lps.py afterwards."""
    rng = np.random.default_rng(0)
    names = "observations", "actions", "next_observations", "rewards", "masks"
    batch = {name: rng.uniform(-1, 1, shape).astype(np.float32)
             for name, shape in zip(names, [(16, 3), (16, 4), (16, 3), (16,), (16,)])}

    def make(**settings):
        args = ablations.Args(action_dim=2, horizon=2, actor_hidden_dims=(8,), critic_hidden_dims=(8,), **settings)
        ablations.exchange(args)
        state = jax.jit(partial(lps.init, args))(jax.random.key(0), batch["observations"][:1])
        state["policy"] = state["policy"].replace(params=jax.tree.map(lambda x: 3 * x, state["policy"].params))
        return args, state, batch

    yield make
    ablations.exchange(ablations.Args())


def q_of(state, s, a):
    return state["critic"].apply_fn(state["critic"].params, s, a)


def test_without_the_clip_the_loss_sees_f_as_it_is_and_acting_does_not(tiny):
    args, state, batch = tiny(clip=False)
    key, s, own = jax.random.key(1), batch["observations"], ablations.OWN

    @jax.jit
    def run(state):
        policy = state["policy"]
        raw = policy.apply_fn(policy.params, s, lps.sphere(state["latent_actor"].apply_fn(
            state["latent_actor"].params, s)), jnp.ones((16, 1)), jnp.ones((16, 1)))
        return raw, lps.act(args, state, s, key), own["act"](args, state, s, key), q_of(state, s, raw).mean(), \
            lps.update(args, state, batch, key)[1]["latent_actor_q"]

    raw, acted, seen, expected, q = run(state)
    assert jnp.abs(raw).max() > 1.1
    np.testing.assert_allclose(acted, jnp.clip(raw, -1, 1), atol=1e-5)
    np.testing.assert_allclose(seen, raw, atol=1e-5)
    assert q == pytest.approx(float(expected), rel=1e-4)


def test_a_changed_update_moves_the_latent_actor_alone_otherwise(tiny):
    args, state, batch = tiny()
    key, s, actor = jax.random.key(1), batch["observations"], state["latent_actor"]
    changed = dict(own={}, climb=dict(climb="min"), imitate=dict(imitate=3))

    def climbing_loss(params):
        value = q_of(state, s, lps.decode(args, state["policy"], s, lps.sphere(actor.apply_fn(params, s)))).min(axis=0)
        return -value.mean() / jnp.abs(jax.lax.stop_gradient(value)).mean()

    def imitating_loss(params):
        z = lps.sphere(jax.random.normal(jax.random.fold_in(key, 3), (3, 16, 4)))
        q = jnp.stack([q_of(state, s, lps.decode(args, state["policy"], s, z_i)).min(axis=0) for z_i in z])
        best = jnp.where((q == q.max(axis=0))[..., None], z, 0).sum(axis=0)
        return jnp.mean((lps.sphere(actor.apply_fn(params, s)) - best) ** 2)

    @jax.jit
    def run(state):
        new = {}
        for name, settings in changed.items():
            changed_args, _, _ = tiny(**settings)
            new[name] = lps.update(changed_args, state, batch, key)
        expected = dict(climb=jax.value_and_grad(climbing_loss)(actor.params),
                        imitate=jax.value_and_grad(imitating_loss)(actor.params))
        return new, expected, q_of(state, s, lps.act(args, state, s, key)).mean()

    new, expected, q = run(state)
    own, own_metrics = new.pop("own")
    for name, (state_after, metrics) in new.items():
        loss, grads = expected[name]
        assert metrics["latent_actor_loss"] == pytest.approx(float(loss), rel=1e-4)
        assert metrics["latent_actor_q"] == pytest.approx(float(q), rel=1e-4) and set(metrics) == set(own_metrics)
        moved = actor.apply_gradients(grads=grads)
        close = partial(np.testing.assert_allclose, atol=1e-5)
        jax.tree.map(close, state_after["latent_actor"].params, moved.params)
        for network in ("policy", "critic"):
            jax.tree.map(close, state_after[network].params, own[network].params)
        assert any(np.abs(x - y).max() > 1e-4 for x, y in zip(
            *map(jax.tree.leaves, (state_after["latent_actor"].params, own["latent_actor"].params))))


def test_an_average_decodes(tiny):
    args, state, batch = tiny(average=True, tau=0.25, clip=False)
    key, s, act = jax.random.key(1), batch["observations"], ablations.OWN["act"]

    @jax.jit
    def run(state):
        averaged = state | dict(policy=state["policy"].replace(params=state["average"]))
        a = act(args, averaged, s, key)  # the state beyond s' is s as well: y = r + gamma^H min_k Qbar_k(s, clip a)
        y = batch["rewards"] + args.gamma**2 * q_of(state, s, jnp.clip(a, -1, 1)).min(axis=0)
        loss = ((q_of(state, s, batch["actions"]) - y) ** 2).mean()
        return (*lps.update(args, state, dict(batch, next_observations=s, masks=jnp.ones(16)), key), a,
                lps.act(args, state, s, key), act(args, state, s, key), q_of(state, s, a).mean(), loss)

    new, metrics, a, acted, own, q, loss = run(state)
    mean = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, new["policy"].params, state["average"])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), new["average"], mean)
    np.testing.assert_allclose(acted, jnp.clip(a, -1, 1), atol=1e-6)
    assert jnp.abs(acted - own).max() > 0.1  # f itself, which the fixture has made larger
    assert metrics["latent_actor_q"] == pytest.approx(float(q), rel=1e-4)
    assert metrics["critic_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_the_corner_is_an_eighth_of_the_batch_at_t_1_and_r_0(tiny):
    args, state, batch = tiny(corner=True)
    policy, s, a, key = state["policy"], batch["observations"], batch["actions"], jax.random.key(1)

    @jax.jit
    def run(policy):
        e, one, h = lps.sphere(jax.random.normal(key, a.shape)), jnp.ones((2, 1)), 1e-3

        def f(h):
            return policy.apply_fn(policy.params, s[14:], e[14:] + h * (e - a)[14:], one + h, one + h)

        err = ((e[14:] - f(0) - (f(h) - f(-h)) / (2 * h)) ** 2).mean(axis=1)
        rest = ablations.OWN["imitation_loss"](policy, policy.params, s[:14], a[:14], e[:14], key)[0]
        loss = 7 / 8 * rest + (err / jnp.sqrt(err + 1e-3)).mean() / 8
        return loss, lps.imitation_loss(policy, policy.params, s, a, e, key)[0]

    expected, loss = run(policy)
    assert loss == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("settings", [dict(imitate=2, climb="min"), dict(average=True, base="flow"),
                                      dict(clip=False, latent="normal"), dict(corner=True, predict="velocity")])
def test_ablations_that_exclude_each_other_are_refused(settings):
    with pytest.raises(SystemExit, match="--climb"):
        ablations.exchange(ablations.Args(**settings))


def test_an_ablation_is_recorded_and_goes_on(tmp_path, monkeypatch):
    save_data(tmp_path / "data.npz")
    for name in ("Args", "train", "__file__"):
        monkeypatch.setattr(lps, name, getattr(lps, name))  # and put back at the end
    flags = ["--env-id", "Pendulum-v1", "--dataset-path", f"{tmp_path}/data.npz", "--horizon", "1",
             "--actor-hidden-dims", "8", "--critic-hidden-dims", "8", "--total-steps", "10", "--eval-episodes", "0"]
    for more in ([*flags, "--latent", "normal"], ["--resume", "--total-steps", "20"]):
        monkeypatch.setattr(sys, "argv", ["ablations.py", "--run-dir", f"{tmp_path}/run", *more])
        ablations.main()
        assert lps.sphere is ablations.normal
    ablations.exchange(ablations.Args())
    record = json.loads((tmp_path / "run/args.json").read_text())
    assert (record["script"], record["latent"], record["base"]) == ("ablations", "normal", "meanflow")
    assert [row["step"] for row in read_csv(tmp_path / "run/train.csv")] == ["10", "20"]


# ============================================================================================================== report

def make_run(path, record, success, task=CUBE, steps=(10, 20)):
    """A run as report.py reads it, with a seed for each success, the one at its end."""
    path.mkdir(parents=True)
    record = dict(env_id=task, seed=0, num_seeds=len(success), total_steps=steps[-1], dataset="x.npz",
                  transitions=1000) | record
    (path / "args.json").write_text(json.dumps(record))
    rows = [f"{step},{seed},{x * step / steps[-1]},0,1,50,1"
            for step in steps for seed, x in enumerate(success, record["seed"])]
    (path / "eval.csv").write_text("\n".join(["step,seed,success,return,length,episodes,seconds", *rows, ""]))


def test_report_reads_the_committed_results(tmp_path):
    own = [RESULTS / f"first-version/{CUBE}/lps/seed0", RESULTS / f"scaled-down/{CUBE}/qc_mfql/seed0"]
    for folder, more, figure in (("scaled-down-alpha", own, "alpha"), ("scaled-down-ablations", own[:1], "bars")):
        report.main(report.Args((RESULTS / folder, *more), tmp_path / folder / "curves.png"))
        for name in ("curves.md", "curves.csv"):
            assert (tmp_path / folder / name).read_text() == (RESULTS / folder / name).read_text()
        for name in ("curves.png", "curves.svg", f"curves_{figure}.png", f"curves_{figure}.svg"):
            assert (tmp_path / folder / name).stat().st_size > 10_000 and (RESULTS / folder / name).exists()


def test_report_reads_new_runs_and_old_ones(tmp_path, capsys):
    for task in (CUBE, "cube-single-play-singletask-task1-v0", "scene-play-singletask-v0"):
        folder = tmp_path / task
        make_run(folder / "a", dict(script="lps", alpha=1.0, batch_size=256), [0.6, 0.8], task)
        make_run(folder / "b", dict(script="lps", seed=2, products="bfloat16"), [1.0], task)
        make_run(folder / "c", dict(script="ablations", latent="normal"), [0.1, 0.2, 0.3], task)
        make_run(folder / "d", dict(algorithm="flow_bc", policy="meanflow", total_steps=30,
                                    dataset=dict(transitions=1000, mark="benchmark/collect.py")), [0.2], task)
    report.main(report.Args((tmp_path,), tmp_path / "new/curves.png", aggregate=True))
    rows = {(row["task or domain"], row["method"]): row for row in read_csv(tmp_path / "new/curves.csv")}
    # mean 0.8, standard deviation 0.2, t of 2 degrees of freedom 4.3027: 0.8 +- 0.4968, cut off at 1
    row = rows[CUBE, "lps"]
    assert [float(row[x]) for x in ("success", "95% from", "95% to")] == pytest.approx([0.8, 0.3032, 1], abs=1e-4)
    assert [row[x] for x in ("updates", "seeds", "episodes", "published")] == ["20", "3", "50", ""]
    assert row["data"] == "1000 transitions; 1000 transitions, trained through bfloat16.py"
    assert rows["cube-single", "lps"]["published"] == "0.950000"
    assert rows["all state tasks", "lps --latent normal"]["published"] == "0.040000"
    assert float(rows["IQM of 3 task(s)", "lps"]["success"]) == pytest.approx(0.8)
    assert f"- mf_bc on {CUBE}, seed 0: evaluated up to 20 of 30 updates" in capsys.readouterr().out.splitlines()
    assert all((tmp_path / f"new/curves{x}").stat().st_size > 5_000 for x in (".png", ".svg", "_aggregate.png"))


def test_a_caption_names_the_tasks_of_each_kind_of_data_where_panels_differ():
    def tell(*data):
        return report.tell_data([{"task or domain": f"scene-play-singletask-task{i}-v0", "data": x}
                                 for i, x in enumerate(data, 1)])

    assert tell({"a"}, {"a"}) == "a"
    assert tell({"a", "b"}, {"a", "b"}) == "a; b"
    assert tell({"a", "b"}, {"b"}) == "a (scene, task 1); b (scene, task 1; scene, task 2)"


def test_report_compares_with_published_curves(tmp_path):
    task = "puzzle-3x3-play-singletask-task1-v0"
    make_run(tmp_path / "early", dict(script="dsrl"), [0.9], task, (60_000, 120_000))  # published at 100,000: 0.528
    make_run(tmp_path / "default", dict(script="dsrl"), [0.5], "scene-play-singletask-v0", (40_000,))
    make_run(tmp_path / "whole", dict(script="lps"), [0.9], task, (500_000, 1_000_000))
    report.main(report.Args((tmp_path,), tmp_path / "curves.png"))
    rows = {(row["task or domain"], row["method"]): row for row in read_csv(tmp_path / "curves.csv")}
    told = [rows[task, "dsrl"][x] for x in ("published curve", "difference", "point of the curve")]
    assert told == ["0.528000", "0.372000", "same task after 100000 updates"]
    assert rows["scene-play-singletask-v0", "dsrl"]["published curve"] == ""  # nothing is published before 50,000
    told = [rows["puzzle-3x3", "lps"][x] for x in ("published curve", "difference", "point of the curve")]
    assert told == ["1.000000", "-0.100000", "mean of five tasks after 1000000 updates"]


def test_report_figures_can_be_read_and_claim_no_interval_of_few_seeds(tmp_path, monkeypatch):
    drawn = {}

    def keep(figure, path):
        drawn[path.stem] = figure

    monkeypatch.setattr(figures, "save", keep)
    for name, seeds in (("few", 5), ("enough", 6)):
        make_run(tmp_path / name / "lps", dict(script="lps"), np.linspace(0.1, 0.9, seeds).tolist())
        make_run(tmp_path / name / "normal", dict(script="ablations", latent="normal"), np.zeros(seeds).tolist())
        report.main(report.Args((tmp_path / name,), tmp_path / f"{name}.png"))
        bands, words = drawn[name].axes[0].collections, [word for word in drawn[name].findobj(Text) if word.get_text()]
        assert len(bands) == (2 if name == "enough" else 0)
        assert {"cube-single, default task", "LPS", "LPS, latent normal"} <= {word.get_text() for word in words}
        assert any(f"n = {seeds}, 50 episodes each" in word.get_text() for word in words)
        assert min(word.get_size() for word in words) >= 14
    make_run(tmp_path / "few/scene", dict(script="lps", products="bfloat16"), [0.5], "scene-play-singletask-task1-v0")
    report.main(report.Args((tmp_path / "few",), tmp_path / "few.png"))
    caption = " ".join(word.get_text().replace("\n", " ") for word in drawn["few"].findobj(Text))
    where = "cube-single, default task", "trained through bfloat16.py (scene, task 1)"
    assert "1,000 transitions ({}); 1,000 transitions, {}".format(*where) in caption
    assert figures.spread([0.5, 0.0, 0.0, 0.01], 0.1) == pytest.approx([0.5, -0.03, 0.07, 0.17])


# =============================================================================================== throughput and latency

def test_throughput_writes_its_table(tmp_path):
    throughput.main(throughput.Args(("flow_bc",), (1,), updates=2, repeats=2, eval_episodes=0, out=tmp_path / "x.csv"))
    rows = {row["what"]: row for row in read_csv(tmp_path / "x.csv")}
    assert {"updates, all seeds together", "peak memory", "share of the machine's products"} <= {*rows}
    assert all(0 < float(row["least"]) <= float(row["median"]) <= float(row["most"]) for row in rows.values())
    # 256 rows of 28 + 25 + 1 numbers through 512x4 to 25, there and twice back, but for the first layer's inputs
    products = 2 * 256 * (3 * (54 * 512 + 3 * 512 * 512 + 512 * 25) - 54 * 512)
    assert float(rows["floating-point operations of an update"]["median"]) == pytest.approx(products / 1e9, rel=0.1)


def test_latency_counts_evaluations_and_writes_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(mf_bon, "Args", partial(mf_bon.Args, actor_hidden_dims=(8,), critic_hidden_dims=(8,)))
    latency.main(latency.Args(("mf_bon",), calls=5, out=tmp_path / "new/x.csv"))
    rows = {row["method"]: row for row in read_csv(tmp_path / "new/x.csv")}
    assert rows["mf_bon"]["of which"] == "policy 32, critic 32"
    assert all(0 < float(row["median (us)"]) <= float(row["99th percentile (us)"]) for row in rows.values())


# =============================================================================================================== grasp

def test_choices_of_the_latent(tiny):
    args, state, batch = tiny()
    s, key = batch["observations"][:1], jax.random.key(1)
    found = grasp.choices(lps, args)

    @jax.jit
    def run(state):
        chunks = {choice: act(state, s, key) for choice, (act, _) in found.items()}
        values = {choice: q_of(state, s, a).min() for choice, a in chunks.items()}
        z = lps.sphere(jax.random.normal(jax.random.key(0), (100, 4)))
        random = lps.decode(args, state["policy"], s.repeat(100, axis=0), z)
        unusual = grasp.unusual(lps, args, state, 100, s, jnp.ones(4))
        return chunks, values, lps.act(args, state, s, key), random, unusual

    chunks, values, acted, random, (distance, usual) = run(state)
    np.testing.assert_array_equal(chunks["as trained"], acted)
    assert all(a.shape == (1, 4) and jnp.abs(a).max() <= 1 for a in chunks.values())
    assert values["best of l(s) and 31 latents"] >= values["as trained"]
    assert found["two steps"][1].decode_steps == 2 and jnp.abs(chunks["two steps"] - acted).max() > 1e-3
    mean = np.mean(random, axis=0)
    assert distance == pytest.approx(np.linalg.norm(1 - mean), rel=1e-4)
    assert usual == pytest.approx(np.percentile(np.linalg.norm(random - mean, axis=1), 99.9), rel=1e-4)


def test_searching_wider_and_climbing_find_what_the_critics_value_more(tiny):
    _, state, batch = tiny()
    policy = state["policy"]
    state["policy"] = policy.replace(params=jax.tree.map(lambda x: x / 3, policy.params))  # so that not all is clipped
    s, found, values = batch["observations"], grasp.choices(mf_bon, mf_bon.Args(action_dim=2, horizon=2)), {}
    for choice, (act, _) in found.items():
        values[choice] = q_of(state, s, jax.jit(act)(state, s, jax.random.key(1)))
    searched = [values[choice].min(axis=0).mean()
                for choice in ("a random latent", "best of 8 latents", "as trained", "best of 128 latents")]
    assert (np.diff(searched) > 0).all()
    gained = (values["a latent climbed to"] - values["a random latent"]).mean(axis=0)
    assert (gained > -1e-3).all() and gained.mean() > 0.01


def test_what_the_critics_promise_of_a_grasp_and_what_is_got(tiny, monkeypatch):
    """The sixth chunk of two steps closes the hand, and in the first step after it the task is solved."""
    args, state, batch = tiny()
    seen, before, chunks = np.zeros((14, 28)), batch["observations"][:, None], batch["actions"]
    seen[11:, grasp.OPENING] = grasp.CLOSED
    rewards = np.array([-5.0] * 10 + [-1, -1, 0])
    monkeypatch.setattr(grasp, "load", lambda run_dir: ("lps", lps, args, state))
    monkeypatch.setattr(grasp, "play", lambda *_: (seen, before, chunks, rewards, True))
    row = next(grasp.rows_of(grasp.Args(episodes=1, latents=10), None))
    assert row["promised"] == pytest.approx(float(q_of(state, before[5], chunks[5:6]).mean()), rel=1e-5)
    assert row["got"] == pytest.approx(-1.99)
    assert row["promised at the start"] == pytest.approx(float(q_of(state, before[0], chunks[:1]).mean()), rel=1e-5)
    assert row["got from there"] == pytest.approx(rewards @ 0.99 ** np.arange(13))


def test_grasps_are_found_in_observations(tmp_path):
    """One that holds, 1 cm beside the centre, one that does not, and a hand that closes where no cube is."""
    s = np.zeros((200, 28))
    s[20:60, grasp.OPENING] = s[100:120, grasp.OPENING] = s[150:160, grasp.OPENING] = 0.5 * grasp.CLOSED
    s[20, 12] = 0.01 * grasp.METRE
    s[30:60, 21] = 0.1 * grasp.METRE
    s[150:160, 13] = 0.2 * grasp.METRE
    found = grasp.grasps(s)
    assert [(t, hold) for t, _, hold in found] == [(20, True), (100, False)]
    np.testing.assert_allclose([apart for _, apart, _ in found], [1, 0], atol=1e-9)
    np.savez(tmp_path / "data.npz", observations=np.tile(s, (2, 1)), terminals=np.arange(400) % 200 == 199)
    grasp.main(grasp.Args(data=tmp_path / "data.npz", out=tmp_path / "grasp.csv"))
    assert read_csv(tmp_path / "grasp.csv") == [
        {"run": "the data", "grasps": "4", "hold": "0.5", "median cm": "0.5", "beyond 1 cm": "0"}]


# ================================================================================================================= toy

def test_toy_draws_and_counts(tmp_path, monkeypatch):
    """The clusters, with tiny nets. (The gradient trains three times, too long for a test.)"""
    tiny = dict(batch_size=8, actor_hidden_dims=(8,), critic_hidden_dims=(8,))
    monkeypatch.setattr(toy, "SETTINGS", toy.SETTINGS | tiny)
    monkeypatch.setattr(toy, "METHODS", {"lps": toy.METHODS["lps"]})
    toy.main(toy.Args(("clusters",), tmp_path, num_seeds=1, total_steps=2))
    rows = read_csv(tmp_path / "clusters.csv")
    assert [row["acts"] for row in rows] == ["f alone", "steered"]
    assert all(0 <= float(row["paid"]) <= float(row["on_data"]) <= 1 for row in rows)
    assert (tmp_path / "clusters.png").stat().st_size > 10_000 and (tmp_path / "clusters.svg").stat().st_size < 500_000
    on_data, paid, distance = toy.judge(toy.draw_data(jax.random.key(0), 2000))
    assert on_data.all() and abs(paid.mean() - 1 / 9) < 0.03 and abs(distance.mean() - 0.7) < 0.02
