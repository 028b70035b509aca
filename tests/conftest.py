"""Small images for tests, drawn here, and the real photographs where they are to be had."""

import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from utils.data import sample

REAL_TAR = Path(__file__).parents[2] / "shared" / "data" / "imagenette2-224sq.tar"

# A few examples, the same in every run; many new ones with --hypothesis-profile long.
_ALWAYS = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=60, derandomize=True, **_ALWAYS)
settings.register_profile("long", max_examples=5000, **_ALWAYS)
settings.load_profile("few")


@pytest.fixture(autouse=True)
def _deterministic():
    """One thread: small networks gain nothing from more, and sums are the same on every machine."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def write_image(path, rng, colour, size_px=(40, 32)):
    """A noisy JPEG of one colour: a class that any classifier can learn."""
    pixels = rng.normal(colour, 40, (size_px[1], size_px[0], 3)).clip(0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "JPEG")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """train/ with 3 x 16 and val/ with 3 x 6 images; read only."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 6)):
        for label, colour in enumerate(((180, 60, 60), (60, 180, 60), (60, 60, 180))):
            for k in range(count):
                write_image(root / split / f"n0000000{label}" / f"{k}.JPEG", rng, colour)
    return root


@pytest.fixture(scope="session")
def unpack(tmp_path_factory):
    """A function that unpacks photographs of Imagenette; skips where the archive is not there.

    Its arguments: how many of each class for each split, and the classes (default: all).
    """
    path = Path(os.environ.get("IMAGENETTE_TAR", REAL_TAR))
    if not path.exists():
        pytest.skip(f"{path.name} is not there; set IMAGENETTE_TAR to its path")

    def extract(counts, classes=()):
        root, taken = tmp_path_factory.mktemp("photographs"), Counter()
        with tarfile.open(path) as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                _, split, name, _ = Path(member.name).parts
                if taken[split, name] < counts[split] and (not classes or name in classes):
                    taken[split, name] += 1
                    tar.extract(member, root, filter="data")
        return root / "imagenette2-224sq"

    return extract


@pytest.fixture(scope="session")
def photographs(unpack):
    """A few photographs of each class of Imagenette."""
    return unpack({"train": 8, "val": 8})


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """24 training and 8 validation scenes with boxes; read only."""
    root = tmp_path_factory.mktemp("scenes") / "drawn"
    return sample.draw_scenes(root, seed=1, train_images=24, val_images=8)
