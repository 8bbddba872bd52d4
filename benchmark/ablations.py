"""LPS with one of its choices exchanged: what the paper's ablations vary, and more, as flags beside those of lps.py.

    python benchmark/ablations.py --latent normal --env-id scene-play-singletask-v0
    python benchmark/ablations.py --base flow --flow-steps 1
    python benchmark/ablations.py --resume --run-dir runs/...

Everything but the functions below is lps.py's own. A run's args.json names the script "ablations" and holds these flags
with the others, so that --resume and report.py know which ablation it was. (Resume with this script, not with lps.py.)
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient as sg

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where the scripts lie
import flow_bc
import lps


@dataclass(frozen=True)
class Args(lps.Args):
    # What is exchanged. The defaults are lps.py:
    latent: Literal["sphere", "normal", "truncated-normal"] = "sphere"  # where the latents live
    base: Literal["meanflow", "flow"] = "meanflow"  # the policy that is steered
    flow_steps: int = 10  # Euler steps from a latent to a chunk, all of them differentiated, if the base is a flow
    predict: Literal["action", "velocity"] = "action"  # what the MeanFlow network says
    # Against a latent actor that finds chunks which the critics overrate:
    clip: bool = True  # the chunk is clipped in the actor's loss
    climb: Literal["mean", "min"] = "mean"  # which of the critics' values the actor climbs
    imitate: int | None = None  # it does not climb, but learns the best by min_k Q_k of so many random latents
    corner: bool = False  # an eighth of the batch trains f at t = 1, r = 0, where one step decodes
    average: bool = False  # f's tau-average decodes, in the loss, in y and in acting


OWN = {name: getattr(lps, name) for name in ("sphere", "imitation_loss", "decode", "init", "update", "act")}
OWN_TRAIN = lps.train


def normal(x):
    """A normal latent is a draw of the Gaussian, or the actor's output, as it is."""
    return x


def truncated_normal(x):
    """The actor's output, brought to the square of +-2 where the truncated Gaussian lives."""
    return 2 * jnp.tanh(x)


def truncated_imitation_loss(imitation_loss):
    """The same loss, with noise that is drawn from the Gaussian truncated at 2, in place of the noise given."""
    def loss(policy, params, s, a, e, key):
        prior_key, key = jax.random.split(key)
        return imitation_loss(policy, params, s, a, jax.random.truncated_normal(prior_key, -2, 2, a.shape), key)
    return loss


def flow_init(args, key, s):
    """The same state, but for the policy v(s, z, t), which takes one time."""
    return OWN["init"](args, key, s) | flow_bc.init(args, jax.random.split(key, 3)[0], s)


def velocity_init(args, key, s):
    """The same state, but the network is u, the mean velocity, and f(s, z, t, t-r) = z - u(s, z, t, t-r)."""
    state = OWN["init"](args, key, s)
    u = state["policy"].apply_fn

    def f(params, s, *inputs, encode=False):
        output = u(params, s, *inputs, encode=encode)
        return output if encode else inputs[0] - output

    return state | dict(policy=state["policy"].replace(apply_fn=f))


def unclipped_decode(args, policy, s, z):
    """The chunk f(s, z, 1, 1) as it is, or of n steps. act clips it."""
    h = policy.apply_fn(policy.params, s, encode=True)
    dt = jnp.full_like(z[:, :1], 1 / args.decode_steps)
    for i in range(args.decode_steps):
        z = z - (z - policy.apply_fn(policy.params, h, z, 1 - i * dt, dt)) * dt
    return z


def corner_imitation_loss(policy, params, s, a, e, key):
    """The same, and for the last eighth of the batch with t = 1 and r = 0: u* = sg(v - (v - df/dt)) = sg(df/dt)"""
    n = len(a) // 8
    loss, _ = OWN["imitation_loss"](policy, params, s[:-n], a[:-n], e[:-n], key)
    s, a, e = s[-n:], a[-n:], e[-n:]
    h, one = policy.apply_fn(params, s, encode=True), jnp.ones((n, 1))

    def f(z, t, r):
        return policy.apply_fn(params, h, z, t, t - r)

    f_z, df_dt = jax.jvp(f, (e, one, 0 * one), (e - a, one, 0 * one))
    err = jnp.mean((e - f_z - sg(df_dt)) ** 2, axis=-1)
    return 7 / 8 * loss + jnp.mean(err / jnp.sqrt(sg(err + 1e-3))) / 8, {}


def average_init(args, key, s):
    """The same state, and f's average."""
    state = OWN["init"](args, key, s)
    return state | dict(average=state["policy"].params)


def averaged(state):
    """The state with the policy that decodes: f, or its average."""
    return state | dict(policy=state["policy"].replace(params=state["average"])) if "average" in state else state


def act(args, state, s, key):
    """The same chunks, of f's average if there is one, and clipped in any case."""
    return jnp.clip(OWN["act"](args, averaged(state), s, key), -1, 1)


def update(args, state, batch, key):
    """lps.py's update, but for the loss of the latent actor, and with f's average if there is one."""
    new_state, metrics = OWN["update"](args, state, batch, key)
    s, policy, critic, actor = batch["observations"], averaged(state)["policy"], state["critic"], state["latent_actor"]

    def q(z):
        return critic.apply_fn(critic.params, s, lps.decode(args, policy, s, z))

    def latent_actor_loss(params):
        """As in lps.py, of the mean of both critics or the lesser; or E mean_d (l(s) - z_best)^2, where
        z_best = argmax_i min_k Q_k(s, f(s, z_i, 1, 1))"""
        l_s = lps.sphere(actor.apply_fn(params, s))
        q_k = q(l_s)
        value = q_k.min(axis=0) if args.climb == "min" else q_k.mean(axis=0)
        loss = -args.alpha * sg(1 / jnp.abs(value).mean()) * value.mean()
        if args.imitate:
            z = lps.sphere(jax.random.normal(jax.random.fold_in(key, 3), (args.imitate, *l_s.shape)))
            chosen = jax.lax.map(q, z).min(axis=1).argmax(axis=0)  # of each state
            loss = jnp.mean((l_s - jnp.take_along_axis(z, chosen[None, :, None], axis=0)[0]) ** 2)
        return loss, dict(q=q_k.mean())

    moved, metrics_of_actor = lps.descend(state, dict(latent_actor=latent_actor_loss))
    new_state["latent_actor"] = moved["latent_actor"]
    if args.average:
        new_state["average"] = optax.incremental_update(new_state["policy"].params, state["average"], args.tau)
    return new_state, metrics | metrics_of_actor


def exchange(args):
    """Puts into lps what these arguments ask for. With the default ones it is lps.py again."""
    remedies = not args.clip, args.climb == "min", args.imitate, args.corner, args.average
    if any(remedies) and (args.base, args.predict, args.latent) != ("meanflow", "action", "sphere"):
        raise SystemExit("--no-clip, --climb, --imitate, --corner and --average are for LPS as it is otherwise")
    if args.climb == "min" and args.imitate:
        raise SystemExit("--climb min or --imitate: the actor has one loss")
    functions = dict(OWN)
    if not args.clip or args.average:
        functions |= dict(act=act)
    if not args.clip:
        functions |= dict(decode=unclipped_decode)
    if args.corner:
        functions |= dict(imitation_loss=corner_imitation_loss)
    if args.average:
        functions |= dict(init=average_init)
    if args.climb == "min" or args.imitate or args.average:
        functions |= dict(update=update)
    if args.base == "flow":
        functions |= dict(init=flow_init, imitation_loss=flow_bc.imitation_loss, decode=flow_bc.decode)
    if args.predict == "velocity":
        if args.base == "flow":
            raise SystemExit("--predict velocity is for a MeanFlow: a flow predicts a velocity as it is")
        functions |= dict(init=velocity_init)
    if args.latent == "normal":
        functions |= dict(sphere=normal)
    if args.latent == "truncated-normal":
        loss = truncated_imitation_loss(functions["imitation_loss"])
        functions |= dict(sphere=truncated_normal, imitation_loss=loss)
    vars(lps).update(functions)


def train(args, stop=()):
    exchange(args)
    return OWN_TRAIN(args, stop)


def main():
    lps.Args, lps.train, lps.__file__ = Args, train, __file__  # lps.main() reads these flags, and names this script
    lps.main()


if __name__ == "__main__":
    main()
