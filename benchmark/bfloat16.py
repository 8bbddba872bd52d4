"""Any script, with products of matrices made of bfloat16 numbers and summed in float32, as a TPU makes them by default.

    python benchmark/bfloat16.py lps.py --seed 3        # and all flags of lps.py
    python benchmark/bfloat16.py lps.py --resume --run-dir runs/...

A CPU that has instructions for such products (lscpu says amx_bf16) trains 1.4 to 2 times as fast. JAX makes float32
products on every CPU, whatever its precision flags ask for, so the products are exchanged where XLA gets them: after
gradients and jvps were taken, which therefore need no change. All else stays float32: parameters, Adam, sums,
normalisation, losses. A run's args.json says "products": "bfloat16". (Resume with this script: the other one would go
on in float32.)
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro
from jax._src.lax.lax import _dot_general_lower  # how JAX itself hands a product to XLA; there is no public name
from jax.interpreters import mlir
from jax.lax import dot_general_p


def product(x, y, **how):
    """The float32 product of float32 matrices, after both are rounded to bfloat16."""
    how |= dict(preferred_element_type=jnp.dtype("float32"))
    return dot_general_p.bind(x.astype(jnp.bfloat16), y.astype(jnp.bfloat16), **how)


def lower(context, x, y, **how):
    if context.avals_in[0].dtype == jnp.float32:
        return mlir.lower_fun(product, multiple_results=False)(context, x, y, **how)
    return _dot_general_lower(context, x, y, **how, platform="cpu")


def main():
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        raise SystemExit("name a script first: python benchmark/bfloat16.py lps.py, and then its flags")
    if jax.default_backend() != "cpu":
        raise SystemExit("bfloat16.py is for CPUs; on a GPU or TPU JAX has JAX_DEFAULT_MATMUL_PRECISION")
    path = Path(sys.argv.pop(1))
    sys.path.append(str(path.resolve().parent))
    script = import_module(path.stem)

    @dataclass(frozen=True)
    class Args(script.Args):
        products: tyro.conf.Suppress[str] = "bfloat16"  # for args.json

    script.Args = Args
    mlir.register_lowering(dot_general_p, lower, platform="cpu")
    script.main()


if __name__ == "__main__":
    main()
