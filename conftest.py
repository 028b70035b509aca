"""The environment of notebook kernels under `pytest --nbval`."""

import os
from pathlib import Path


def pytest_configure(config):
    """A kernel starts in notebooks/ and inherits the environment, not pytest's `pythonpath`."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # One thread: sums come out the same on every machine, so that outputs can be compared.
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(config.option, "nbval_current_env"):
        config.option.nbval_current_env = True  # the kernel of this environment, not one by name
    if getattr(config.option, "nbval", False) and getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadfile"  # under -n 2 as well, a notebook's cells share one kernel
