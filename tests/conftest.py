"""A core for each process, signals as a terminal gives them; what one has compiled, the others do not compile again."""

import os
import shutil
import signal
import tempfile

MADE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # pytest's workers inherit it, and what they start
    MADE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # gw0, gw1, ...: sharing all cores is a tenth slower
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})

signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background jobs, and what they start, ignore it


def pytest_unconfigure():
    if MADE:
        shutil.rmtree(MADE, ignore_errors=True)
