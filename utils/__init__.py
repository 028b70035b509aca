"""What scripts and notebooks share: data, training, studies and measurements."""

import sys
from importlib.util import find_spec

_PACKAGES = (
    *("torch", "torchvision", "numpy", "pandas", "scipy", "PIL", "cv2", "simplejpeg"),
    *("matplotlib", "tqdm", "filelock", "webdataset", "braceexpand"),
)
if _missing := [name for name in _PACKAGES if find_spec(name) is None]:
    sys.exit(f"error: {_missing[0]} is not installed; run `make setup`, then use .venv/bin/python")
