"""Every hyper-parameter of a training run, with its unit, and the presets.

The `imagenet` preset follows torchvision's reference for its 2021 weights
(pytorch/vision, references/classification, and the post "How to train state-of-the-art models
using TorchVision's latest primitives"), with the schedule per step instead of per epoch and the
EMA weights updated every step: torchvision's decay of 0.99998 every 32 steps of 1024 images over
100 epochs, rescaled by its own rule, is 0.9998 per step.
"""

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

MAX_PX = 4096


def _field(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Recipe:
    """How to train a classifier. A bad value is a ValueError that names the field and the range."""

    epochs: int = _field(100, "passes over the training images")
    batch_size: int = _field(1024, "images per step, over all processes")
    accumulate: int = _field(1, "gradient accumulation steps per update")
    lr_per_1024: float = _field(0.5, "peak learning rate per 1024 images of batch size")
    momentum: float = _field(0.9, "momentum of SGD (without Nesterov)")
    weight_decay: float = _field(2e-5, "weight decay of convolution and linear weights")
    norm_weight_decay: float = _field(0.0, "weight decay of normalisation layers and biases")
    warmup_epochs: float = _field(5.0, "epochs of linear warm-up before the cosine")
    label_smoothing: float = _field(0.1, "share of the target spread over all classes, 0 to 1")
    train_crop_px: int = _field(176, "side of the training crops, pixels")
    min_crop_area: float = _field(0.08, "smallest training crop, share of the image's area")
    eval_resize_px: int = _field(232, "shorter side of validation images, pixels")
    eval_crop_px: int = _field(224, "side of the validation's centre crop, pixels")
    trivial_augment: bool = _field(True, "TrivialAugmentWide (arXiv:2103.10158)")
    random_erasing: float = _field(0.1, "probability of RandomErasing (arXiv:1708.04896)")
    cutmix_alpha: float = _field(1.0, "Beta parameter of CutMix (arXiv:1905.04899), 0 = off")
    mixup_alpha: float = _field(0.2, "Beta parameter of MixUp (arXiv:1710.09412), 0 = off")
    ema_decay: float = _field(0.9998, "decay of the EMA weights per step, with a warm-up")
    width: float = _field(1.0, "factor on the channels of Darknet and VoVNet")
    precision: Literal["bf16", "float32"] = _field("bf16", "autocast type, where the device has it")
    channels_last: bool = _field(True, "channels_last memory format")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        counts = ("epochs", "batch_size", "accumulate")
        sizes = ("train_crop_px", "eval_resize_px", "eval_crop_px")
        for name in (*counts, *sizes):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in sizes:  # a larger image takes gigabytes
            self._check(name, getattr(self, name) <= MAX_PX, f"at most {MAX_PX}")
        for name in ("lr_per_1024", "width"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("weight_decay", "norm_weight_decay", "cutmix_alpha", "mixup_alpha"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            self._check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._check("random_erasing", 0 <= self.random_erasing <= 1, "in [0, 1]")
        self._check("min_crop_area", 0 < self.min_crop_area <= 1, "in (0, 1]")
        self._check(
            "warmup_epochs",
            0 <= self.warmup_epochs < self.epochs,
            f"at least 0 and below epochs={self.epochs}",
        )
        self._check(
            "eval_resize_px", self.eval_resize_px >= self.eval_crop_px, "at least eval_crop_px"
        )

    def _check(self, name: str, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up, linear in the batch size."""
        return self.lr_per_1024 * self.batch_size / 1024

    @property
    def backbone_options(self) -> dict[str, Any]:
        """Keyword arguments for the backbone; none at width 1, which not every family takes."""
        return {} if self.width == 1 else {"width": self.width}

    def tested_at(self, crop_px: int) -> "Recipe":
        """The recipe with another test size; images are resized in the same proportion."""
        resize_px = round(crop_px * self.eval_resize_px / self.eval_crop_px)
        return dataclasses.replace(self, eval_crop_px=crop_px, eval_resize_px=resize_px)


def _check_type(field: dataclasses.Field, value: Any) -> None:
    if get_origin(field.type) is Literal:
        good, wanted = value in get_args(field.type), f"one of {get_args(field.type)}"
    elif field.type is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        good, wanted = good and math.isfinite(value), "a finite number"
    else:
        good, wanted = type(value) is field.type, f"of type {field.type.__name__}"
    if not good:
        raise ValueError(f"{field.name}={value!r} must be {wanted}")


_IMAGENET = Recipe()
# for Darknet-19 and VoVNet-19-slim, which are too small for strong regularization
_SMALL = dataclasses.replace(
    _IMAGENET, random_erasing=0.0, cutmix_alpha=0.0, mixup_alpha=0.0, label_smoothing=0.0
)

RECIPES = {
    # torchvision's reference, FixRes included (arXiv:1906.06423: train at 176, test at 224)
    "imagenet": _IMAGENET,
    "small": _SMALL,
    # for VoVNet-99
    "large": dataclasses.replace(_IMAGENET, train_crop_px=224, batch_size=512),
    # For a minute on the embedded sample: in 1,500 steps mixing does not pay, small batches need a
    # higher learning rate and small objects larger crops. It tests at the training size: with maps
    # of 2 x 2 pixels, a size that 32 does not divide shifts the grid.
    "quick": dataclasses.replace(
        _SMALL,
        epochs=12,
        batch_size=16,
        lr_per_1024=2.0,
        warmup_epochs=1.0,
        train_crop_px=64,
        min_crop_area=0.35,
        eval_resize_px=66,
        eval_crop_px=64,
        width=0.25,
    ),
}


@dataclass(frozen=True)
class DetectorRecipe:
    """How to train a detector; checked like `Recipe`."""

    epochs: int = _field(12, "passes over the training images")
    batch_size: int = _field(8, "images per step")
    lr: float = _field(1e-3, "peak learning rate of AdamW")
    weight_decay: float = _field(0.05, "weight decay of convolution and linear weights")
    warmup_epochs: float = _field(1.0, "epochs of linear warm-up before the cosine")
    image_px: int = _field(128, "longer side to which images are resized, pixels")
    out_channels: int = _field(64, "channels of the pyramid and the head")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check_type(field, value)
            may_be_zero = field.name in ("weight_decay", "warmup_epochs")
            if value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(
                    f"{field.name}={value!r} must be {'at least' if may_be_zero else 'above'} 0"
                )
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs!r} must be below the epochs")


def add_arguments(parser: argparse.ArgumentParser, preset: str) -> None:
    """Adds one flag per field of Recipe, `--label-smoothing` for `label_smoothing`.

    Args:
        preset: the key of RECIPES whose values --help shows as defaults.
    """
    group = parser.add_argument_group(f"recipe (defaults: those of --recipe {preset})")
    for field in dataclasses.fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        text = f"{field.metadata['help']} (default: {getattr(RECIPES[preset], field.name)})"
        options: dict[str, Any] = {"default": None, "help": text.replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(field.type) is Literal:
            options["choices"] = get_args(field.type)
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        group.add_argument(flag, **options)


def from_arguments(args: argparse.Namespace, preset: str) -> Recipe:
    """The preset with the values that were given; ValueError for a bad one."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(RECIPES[preset], **given)
