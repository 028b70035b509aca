"""The environment of notebook kernels under `pytest --nbval`."""

import os
from pathlib import Path


def pytest_configure(config):
    """Kernels start in notebooks/ and inherit the environment, not pytest's `pythonpath`."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # One thread: sums are the same on every machine, so outputs can be compared.
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(config.option, "nbval_current_env"):
        config.option.nbval_current_env = True  # not the kernel named in the notebook
    if getattr(config.option, "nbval", False) and getattr(config.option, "dist", "no") == "load":
        config.option.dist = "loadfile"  # a notebook's cells share one kernel, also under -n 2
