"""Published weights by name: where a file is, and what it needs of the network and the images.

- timm 1.0.31: default configs and results-imagenet.csv. Its VoVNets round a pooled map of odd size
  down; ours round up, so the maps differ at image sizes that are no multiple of 32.
- vision_toolbox: gau-nernst/vision-toolbox at 9586d5b, README and code. Files hold no head, and no
  licence is stated. Mean and deviation are those of classifier.py when a file was added (0.5 until
  commit d03d0cb, then 0 and 1). darknet_yolov5, vovnet19_ese, vovnet27_slim do not load.
- torchvision: the meta of its enumerations, which state neither training size nor licence.
"""

import hashlib
import re
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torchvision.models import WeightsEnum, get_model_weights

from backbones.formats import WeightsError
from backbones.torchvision_ports import INVERTED_RESIDUALS, RESNETS

TIMEOUT_S = 60


class Preprocessing(NamedTuple):
    """What weights expect of images: RGB from 0 to 1, less `mean`, divided by `std`, per channel.

    `train_px` (None: unknown) and `test_px` are the sizes of the crops in training and evaluation;
    the latter keeps `crop_share` of the resized shorter side. `interpolation` is "bilinear" or
    "bicubic".
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    train_px: int | None
    test_px: int
    crop_share: float
    interpolation: str = "bilinear"

    @property
    def resize_px(self) -> int:
        """The shorter side from which the evaluation crop is cut."""
        return int(self.test_px / self.crop_share + 1e-6)

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> "Preprocessing":
        """That of the fields of a recipe, `utils.recipe.Recipe`."""
        crop_px, norm = recipe["eval_crop_px"], (tuple(recipe["mean"]), tuple(recipe["std"]))
        sizes = (recipe.get("train_crop_px"), crop_px, crop_px / recipe["eval_resize_px"])
        return cls(*norm, *sizes, recipe["eval_interpolation"])

    def as_recipe(self) -> dict[str, Any]:
        """The fields of a recipe that it decides."""
        return {
            "mean": self.mean,
            "std": self.std,
            "eval_resize_px": self.resize_px,
            "eval_crop_px": self.test_px,
            "eval_interpolation": self.interpolation,
        }


# Darknet's classifiers take RGB from 0 to 1; darknet53.cfg has 256 pixels.
DARKNET = Preprocessing((0.0,) * 3, (1.0,) * 3, 256, 256, 1.0)


class Published(NamedTuple):
    """A published file: the `options` that it needs, its ImageNet top-1 at `test_px`.

    `licence` is "" if none is stated.
    """

    backbone: str
    name: str
    url: str
    top1_pct: float
    preprocessing: Preprocessing
    licence: str = ""
    options: Mapping[str, Any] = {}

    @property
    def file_name(self) -> str:
        """Its name in the cache; all files on the hub have the same one, so without folders."""
        repository, _, name = self.url.rpartition("/resolve/main/")
        return f"{repository.rpartition('/')[2]}-{name}" if repository else Path(name).name

    @property
    def sha256(self) -> str:
        """Its first digits, with which the file's name ends; "" if none are published."""
        return next(iter(re.findall(r"-([0-9a-f]{8,})\.\w+$", self.file_name)), "")

    def merge(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The file's options and those given; ValueError if they contradict each other."""
        needed = {"width": 1.0, **self.options}
        for key, value in needed.items():
            if given.get(key, value) != value:
                raise ValueError(
                    f"{self.backbone} with {self.name} has {key}={value!r}; "
                    f"{key}={given[key]!r} contradicts it"
                )
        return {**self.options, **given}


class Table(tuple[Published, ...]):
    """Published weights; prints as a table."""

    def __repr__(self) -> str:
        lines = [("backbone", "weights", "top-1 (%)", "at (px)", "options", "licence", "file")]
        for row in self:
            options = " ".join(f"{key}={value}" for key, value in row.options.items())
            numbers = f"{row.top1_pct:.1f}", str(row.preprocessing.test_px)
            lines.append((*row[:2], *numbers, options, row.licence, row.file_name))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


# fmt: off
_IMAGENET, _HALF = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)
_UNIT = (0.0,) * 3, (1.0,) * 3
_CSP = {"layout": "darknet", "act": "leaky_relu_0.01"}
_ESE = {"ese": "last", "stem_stride": 4, "residual": True, "act": "relu"}
_OSA = {"stem_stride": 2, "residual": True}
_TIMM = (
    ("cspdarknet53", "ra_in1k", "v0.1-weights/cspdarknet53_ra_256-d05c7c21.pth", 80.078,
     (*_IMAGENET, 256, 256, 0.887), _CSP),
    ("darknet53", "c2ns_in1k", "v0.1-tpu-weights/darknet53_256_c2ns-3aeff817.pth", 80.542,
     (*_IMAGENET, 256, 288, 1.0, "bicubic"), {"act": "leaky_relu_0.01"}),
    ("vovnet39", "ra_in1k", "ese_vovnet39b.ra_in1k", 80.378,
     (*_IMAGENET, 224, 288, 0.95, "bicubic"), _ESE),
    ("vovnet57", "ra4_e3600_r256_in1k", "ese_vovnet57b.ra4_e3600_r256_in1k", 83.298,
     (*_HALF, 256, 320, 1.0, "bicubic"), _ESE),
)
_TOOLBOX = (
    ("darknet19", "in1k", "darknet19-2cb641ca", 73.5, _HALF, 176, {}),
    ("darknet53", "in1k", "darknet53-94427f5b", 76.9, _HALF, 176, {}),
    ("cspdarknet53", "in1k", "cspdarknet53-3bfa0423", 77.5, _HALF, 176, {"layout": "half"}),
    ("vovnet39", "in1k", "vovnet39-4c79d629", 78.2, _UNIT, 176, {"ese": False, **_OSA}),
    ("vovnet57", "in1k", "vovnet57-ecb9cc34", 79.3, _UNIT, 176, {"ese": False, **_OSA}),
    ("vovnet19_slim", "ese_in1k", "vovnet19_slim_ese-f8075640", 70.8, _HALF, 176,
     {"ese": True, "slim_channels": 128, **_OSA}),
    ("vovnet39", "ese_in1k", "vovnet39_ese-9ce81b0d", 78.1, _HALF, 176, {"ese": True, **_OSA}),
    ("vovnet57", "ese_in1k", "vovnet57_ese-ae1a7f89", 79.2, _HALF, 176, {"ese": True, **_OSA}),
    ("vovnet99", "ese_in1k", "vovnet99_ese-713f3062", 80.7, _HALF, 224, {"ese": True, **_OSA}),
)
# fmt: on


def published(backbone: str | None) -> dict[str, Published]:
    """The published weights of a backbone by name, torchvision's "DEFAULT" included."""
    if backbone in (*RESNETS, *INVERTED_RESIDUALS):
        members = get_model_weights(backbone).__members__
        return {name: _torchvision(backbone, member) for name, member in members.items()}
    github, rows = "https://github.com/{}/releases/download/{}", []
    for name, tag, file, top1_pct, images, options in _TIMM:
        url = f"https://huggingface.co/timm/{file}/resolve/main/model.safetensors"
        if file.endswith(".pth"):
            url = github.format("rwightman/pytorch-image-models", file)
        made = (top1_pct, Preprocessing(*images), "apache-2.0", options)
        rows.append(Published(name, f"timm.{tag}", url, *made))
    for name, tag, file, top1_pct, norm, train_px, options in _TOOLBOX:
        url = github.format("gau-nernst/vision-toolbox", f"v0.0.1/{file}.pth")
        made = (
            top1_pct,
            Preprocessing(*norm, train_px, 224, 224 / 232),
            "",
            {"act": "relu", **options},
        )
        rows.append(Published(name, f"vision_toolbox.{tag}", url, *made))
    return {row.name: row for row in rows if row.backbone == backbone}


def _torchvision(backbone: str, member: WeightsEnum) -> Published:
    images, top1_pct = member.transforms(), member.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    (test_px,), (resize_px,) = images.crop_size, images.resize_size
    sizes = (None, test_px, test_px / resize_px, images.interpolation.value)
    images = Preprocessing(tuple(images.mean), tuple(images.std), *sizes)
    return Published(backbone, member.name, member.url, top1_pct, images)


def download(row: Published) -> Path:
    """The file in torch.hub's cache, downloaded with a progress bar if it is not there.

    It gets its name when it is complete and its hash is right, so several processes may do this at
    once. The hash is printed if none is published. WeightsError has the URL and the path.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", row.file_name)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
            part = Path(folder, path.name)
            _fetch(row.url, part)
            digest = hashlib.sha256(part.read_bytes()).hexdigest()
            if not digest.startswith(row.sha256):
                raise OSError(f"it has SHA-256 {digest}, expected {row.sha256}")
            part.replace(path)
    except (OSError, HTTPException) as error:
        failure = f"not in the cache, and the download failed ({error})"
        raise WeightsError(f"{failure}; put {row.url} at {path}") from error
    if not row.sha256:
        print(f"{path.name}: SHA-256 {digest}; none is published", file=sys.stderr)
    return path


def _fetch(url: str, path: Path) -> None:
    """Writes what is at the URL; unlike torch.hub's function it notices a download cut short."""
    request = urllib.request.Request(url, headers={"User-Agent": "vision-backbones"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response, path.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        with torch.hub.tqdm(total=size, unit="B", unit_scale=True, desc=path.name) as bar:
            while chunk := response.read(1 << 16):
                bar.update(file.write(chunk))
    if path.stat().st_size < size:
        raise OSError("it broke off; try again")
