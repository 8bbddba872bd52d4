"""A core for each of pytest's workers, and quick compilation, shared by all processes."""

import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", flags)
CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's workers inherit it, and their scripts
    CACHE = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

worker = os.environ.get("PYTEST_XDIST_WORKER")  # gw0, gw1, ...
if worker:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore Ctrl-C


def pytest_unconfigure():
    if CACHE:
        shutil.rmtree(CACHE, ignore_errors=True)
