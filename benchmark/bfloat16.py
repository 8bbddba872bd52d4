"""Any script, with products of bfloat16 numbers that are summed in float32, for CPUs.

    python -m benchmark.bfloat16 lps.py --seed 3        # and all flags of lps.py
    python -m benchmark.bfloat16 lps.py --resume --run-dir runs/...

A CPU that is made for such products (`lscpu | grep amx_bf16`) trains 1.4 to 2 times as fast. JAX
has flags for this that work on a TPU but not on a CPU. So the products are exchanged where XLA gets
them, after gradients and jvps were taken. All else stays float32: parameters, Adam, sums, losses.
A run's args.json says "products": "bfloat16". Resume such a run with this tool, since its script
alone would go on in float32.
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from jax._src.lax.lax import _dot_general_lower  # JAX's own; there is no public name for it
from jax.interpreters import mlir
from jax.lax import dot_general_p

from benchmark import ROOT


def product(x, y, **how):
    """The float32 product of float32 matrices, after both are rounded to bfloat16."""
    how |= dict(preferred_element_type=jnp.dtype("float32"))
    return dot_general_p.bind(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), **how)


def lower(context, x, y, **how):
    """How a product is handed to XLA."""
    if context.avals_in[0].dtype == jnp.float32:
        return mlir.lower_fun(product, multiple_results=False)(context, x, y, **how)
    return _dot_general_lower(context, x, y, **how, platform="cpu")


def main():
    path = Path(*sys.argv[1:2]).resolve()
    if path.suffix != ".py" or not path.is_relative_to(ROOT) or not path.is_file():
        raise SystemExit("name a script first: python -m benchmark.bfloat16 lps.py, then its flags")
    del sys.argv[1]
    if jax.default_backend() != "cpu":
        raise SystemExit("bfloat16 is for CPUs; elsewhere set JAX_DEFAULT_MATMUL_PRECISION")
    script = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))

    @dataclass(frozen=True)
    class Args(script.Args):
        products: tyro.conf.Suppress[str] = "bfloat16"  # for args.json

    mlir.register_lowering(dot_general_p, lower, platform="cpu")
    script.main(Args)


if __name__ == "__main__":
    main()
