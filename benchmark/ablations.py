"""LPS with one of its choices exchanged: what the paper's ablations vary, and more.

    python -m benchmark.ablations --latent normal --env-id scene-play-singletask-v0
    python -m benchmark.ablations --base flow --flow-steps 1
    python -m benchmark.ablations --resume --run-dir runs/...
    python -m benchmark.ablations --eval-only --search 32 --run-dir runs/...  # a run of lps.py, too

Each ablation is one to three functions put in place of lps.py's own; all else is lps.py's. A run's
args.json says "script": "ablations" and holds these flags beside those of lps.py.
"""

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient as sg

import flow_bc
import lps
import mf_bon


@dataclass(frozen=True)
class Args(lps.Args):
    # What is exchanged. The defaults are lps.py:
    latent: Literal["sphere", "normal", "truncated-normal"] = "sphere"  # where the latents live
    base: Literal["meanflow", "flow"] = "meanflow"  # the policy that is steered
    flow_steps: int = 10  # Euler steps from a latent to a chunk, all differentiated, of a flow
    predict: Literal["action", "velocity"] = "action"  # what the MeanFlow's network says
    decode_steps: int = 1  # steps in which f is applied to decode a latent
    alpha: float = 1.0  # weight of the latent actor's loss; Adam all but cancels it
    search: int | None = None  # acts by the best by min_k Q_k of so many random latents
    # Against a latent actor that finds chunks which the critics overrate:
    clip: bool = True  # the chunk is clipped in the actor's loss
    climb: Literal["mean", "min"] = "mean"  # which of the critics' values the actor climbs
    imitate: int | None = None  # it learns the best by min_k Q_k of so many latents, climbs nothing
    corner: bool = False  # an eighth of the batch trains f at t = 1, r = 0, where one step decodes
    average: bool = False  # f's tau-average decodes, in the loss, in y and in acting


# ================================================================================ What is exchanged


def normal(x):
    """A latent is a draw of the Gaussian, or the actor's output, as it is."""
    return x


def truncated_normal(x):
    """The actor's output, brought to +-2, where the truncated Gaussian lives."""
    return 2 * jnp.tanh(x)


def truncated_imitation_loss(own, policy, params, s, a, e, key):
    """The same loss, with noise of the Gaussian truncated at 2 in place of the noise given."""
    prior_key, key = jax.random.split(key)
    return own(policy, params, s, a, jax.random.truncated_normal(prior_key, -2, 2, a.shape), key)


def corner_imitation_loss(policy, params, s, a, e, key):
    """The same loss, but an eighth of the batch has t = 1 and r = 0, where u* = sg(df/dt)."""
    n = len(a) // 8
    loss, logs = lps.imitation_loss(policy, params, s[:-n], a[:-n], e[:-n], key)
    e = e[-n:]
    h = policy.apply_fn(params, s[-n:], encode=True)
    one = jnp.ones((n, 1))

    def f(z, t, r):
        return policy.apply_fn(params, h, z, t, t - r)

    f_z, df_dt = jax.jvp(f, (e, one, 0 * one), (e - a[-n:], one, 0 * one))
    err = jnp.mean((e - f_z - sg(df_dt)) ** 2, axis=-1)
    corner_loss = jnp.mean(err / jnp.sqrt(sg(err + 1e-3)))
    return 7 / 8 * loss + corner_loss / 8, logs | dict(corner_err=err.mean())


def decode(args, policy, s, z):
    """In n steps: z <- z - (z - f(s, z, t, 1/n)) / n for t = 1, 1 - 1/n, ..., 1/n."""
    h = policy.apply_fn(policy.params, s, encode=True)
    dt = jnp.full_like(z[:, :1], 1 / args.decode_steps)
    for i in range(args.decode_steps):
        z = z - (z - policy.apply_fn(policy.params, h, z, 1 - i * dt, dt)) * dt
    return jnp.clip(z, -1, 1) if args.clip else z


def init(args, key, s):
    """The same state, but for the policy, and with f's average."""
    state = lps.init(args, key, s)
    u = state["policy"].apply_fn

    def f(params, s, *inputs, encode=False):
        """z - u(s, z, t, t-r): the network says the mean velocity."""
        output = u(params, s, *inputs, encode=encode)
        return output if encode else inputs[0] - output

    if args.predict == "velocity":
        state["policy"] = state["policy"].replace(apply_fn=f)
    if args.base == "flow":
        state |= flow_bc.init(args, jax.random.split(key, 3)[0], s)  # v(s, z, t) takes one time
    if args.average:
        state["average"] = state["policy"].params
    return state


def averaged(state):
    """The state with the policy that decodes: f's average if there is one."""
    if "average" not in state:
        return state
    return state | dict(policy=state["policy"].replace(params=state["average"]))


def act(script, own, args, state, s, key):
    """The same chunks, of the policy that decodes, always clipped; or those that a search finds."""
    state = averaged(state)
    if args.search:
        shape = (len(s) * args.search, args.horizon * args.action_dim)
        z = script.sphere(jax.random.normal(key, shape))
        return mf_bon.best_of(args, state, state["critic"].params, s, z)[0]
    return jnp.clip(own(args, state, s, key), -1, 1)


def update(script, own, args, state, batch, key):
    """The same update (no search in y), but for the latent actor's loss, and with f's average."""
    new_state, metrics = own(replace(args, search=None), state, batch, key)
    s = batch["observations"]
    policy = averaged(state)["policy"]
    critic = state["critic"]
    latent_actor = state["latent_actor"]

    def values(z):
        return critic.apply_fn(critic.params, s, script.decode(args, policy, s, z))  # [K, B]

    def latent_actor_loss(params):
        """-alpha lambda E Q(s, f(s, l(s), 1, 1)), Q = mean_k Q_k or min_k Q_k;

        or alpha E mean_d (l(s) - z)^2, z = argmax_i min_k Q_k(s, f(s, z_i, 1, 1))
        """
        l_s = script.sphere(latent_actor.apply_fn(params, s))
        q_k = values(l_s)
        q = q_k.min(axis=0) if args.climb == "min" else q_k.mean(axis=0)
        loss = -sg(1 / jnp.abs(q).mean()) * q.mean()
        if args.imitate:
            draw_key = jax.random.fold_in(key, 3)
            z = script.sphere(jax.random.normal(draw_key, (args.imitate, *l_s.shape)))
            best = jax.lax.map(values, z).min(axis=1).argmax(axis=0)  # [B]
            loss = jnp.mean((l_s - z[best, jnp.arange(len(s))]) ** 2)
        return args.alpha * loss, dict(q=q_k.mean())

    moved, actor_metrics = lps.descend(state, dict(latent_actor=latent_actor_loss))
    new_state["latent_actor"] = moved["latent_actor"]
    if args.average:
        params = new_state["policy"].params
        new_state["average"] = optax.incremental_update(params, state["average"], args.tau)
    return new_state, metrics | actor_metrics


# ==================================================================================== The exchange


def check(args):
    """A combination that makes no sense ends in one line."""
    is_plain = (args.base, args.predict, args.latent) == ("meanflow", "action", "sphere")
    remedies = (not args.clip, args.climb == "min", args.imitate, args.corner, args.average)
    names = "--no-clip, --climb, --imitate, --corner and --average"
    lps.require(is_plain or not any(remedies), f"{names} are for LPS as it is otherwise")
    has_one_loss = args.climb == "mean" or not args.imitate
    lps.require(has_one_loss, "--climb min or --imitate: the actor has one loss")
    is_one_step = args.base == "meanflow" and args.decode_steps == 1
    can_search = is_one_step and args.latent != "truncated-normal"
    where = "a MeanFlow's one step and latents that are not truncated"
    lps.require(can_search or not args.search, f"--search is for {where}")
    is_mean = args.base == "flow" and (args.predict == "velocity" or args.decode_steps > 1)
    lps.require(not is_mean, "--predict and --decode-steps are for a MeanFlow, not --base flow")


def exchange(args):
    """A copy of lps in which functions are exchanged as these arguments ask for."""
    check(args)
    script = copy_of_lps()
    if args.base == "flow":
        script.imitation_loss = flow_bc.imitation_loss
        script.decode = flow_bc.decode
    if args.decode_steps > 1 or not args.clip:
        script.decode = decode
    if args.latent == "normal":
        script.sphere = normal
    if args.latent == "truncated-normal":
        script.sphere = truncated_normal
        script.imitation_loss = partial(truncated_imitation_loss, script.imitation_loss)
    if args.corner:
        script.imitation_loss = corner_imitation_loss
    if args.base == "flow" or args.predict == "velocity" or args.average:
        script.init = init
    if args.search or args.average or not args.clip:
        script.act = partial(act, script, script.act)
    if args.search or args.average or args.imitate or args.climb == "min" or args.alpha != 1:
        script.update = partial(update, script, script.update)
    return script


def copy_of_lps():
    """The module lps once more: what is put into it changes nothing for others who import lps."""
    spec = spec_from_file_location("lps", lps.__file__)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    script.__doc__ = __doc__
    script.Args = Args
    script.SCRIPT = Path(__file__)
    script.make_env = lps.make_env  # the processes of an evaluation import it by its name
    script.read_record = partial(read_record, script.read_record)
    return script


def read_record(own, args):
    """What args.json says of the run. One of lps.py can be evaluated as one of ours."""
    if args.eval_only and Path(args.run_dir or "", lps.SCRIPT.name).exists():
        return lps.read_record(args)
    return own(args)


def main(args_class=Args):
    script = copy_of_lps()
    script.train = lambda args: exchange(args).train(args)
    script.evaluate_only = lambda args: exchange(args).evaluate_only(args)
    script.main(args_class)


if __name__ == "__main__":
    main()
