"""What one of the tests' processes has compiled, the others do not compile again."""

import os
import shutil
import tempfile

MADE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's workers inherit it, and what they start
    MADE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure():
    if MADE:
        shutil.rmtree(MADE, ignore_errors=True)
