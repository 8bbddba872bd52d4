"""LPS with one of its choices exchanged: what the paper's ablations vary, as flags beside those of lps.py.

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


OWN = {name: getattr(lps, name) for name in ("sphere", "imitation_loss", "decode", "init", "train")}


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


def exchange(args):
    """Puts into lps what these arguments ask for. With the default ones it is lps.py again."""
    functions = dict(OWN)
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
    return OWN["train"](args, stop)


def main():
    lps.Args, lps.train, lps.__file__ = Args, train, __file__  # lps.main() reads these flags, and names this script
    lps.main()


if __name__ == "__main__":
    main()
