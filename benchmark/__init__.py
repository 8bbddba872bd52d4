"""What measures and draws. Started from the repository's root as `python -m benchmark.NAME`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The names of the scripts, in the order of README.
SCRIPTS = "lps mf_bon dsrl reform qc_fql qc_mfql gfp cfgrl ifql qgf qam rql flow_bc mf_bc".split()

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # the tools import the scripts
