"""A core for each of pytest's workers; code that is compiled quickly, since most of it runs only for a moment, and that
is shared by all processes."""

import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true")
MADE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's workers inherit it, and so do the scripts they start
    MADE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # gw0, gw1, ...: sharing all cores is slower
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it, and so would what they start


def pytest_unconfigure():
    if MADE:
        shutil.rmtree(MADE, ignore_errors=True)
