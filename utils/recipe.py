"""Every hyper-parameter of a training run, with its unit, and the presets.

The `imagenet` preset follows torchvision's reference for its 2021 weights
(pytorch/vision, references/classification, issue 3995, and the post "How to train state-of-the-art
models using TorchVision's latest primitives"). What differs, by intention:

- Length: 100 epochs for 600, and each image once per epoch, without `--ra-sampler`.
- The schedule moves in every step, not once per epoch, and its warm-up begins at the first step's
  share of the peak, not at 0.01 of it.
- Biases are not decayed; `--norm-weight-decay 0` of torchvision spares norms alone.
- EMA weights are updated in every step: torchvision's decay of 0.99998 every 32 steps of 1024
  images over 100 epochs, rescaled by its own rule, is 0.9998 per step. At the start the decay rises
  (`utils.training.optimizer.ema_decay_at`); torchvision copies the weights until its warm-up ends.
- An incomplete last batch is dropped. torchvision trains on it.
- RandomErasing writes the mean colour, rounded to 1/255; torchvision writes 0 after normalising.
- bfloat16 autocast without loss scaling; torchvision's `--amp` is float16 on GPUs.

tests/test_baselines.py compares 20 steps with plain loops of torchvision's and timm's parts, and
tests/test_transforms.py the augmentation.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

MAX_PX = 4096  # a larger image takes gigabytes

# Ranges of values: in words, and as a function.
RANGES: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 0": lambda value: value >= 0,
    "at least -1": lambda value: value >= -1,
    "above 0": lambda value: value > 0,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    f"at least 1 and at most {MAX_PX}": lambda value: 1 <= value <= MAX_PX,
}
AT_LEAST_1, AT_LEAST_0, AT_LEAST_MINUS_1, ABOVE_0, BELOW_1, SHARE, POSITIVE_SHARE, PIXELS = RANGES


RGB = tuple[float, float, float]


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _field(default: Any, text: str, wanted: str | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "range": wanted})


class _Checked:
    """The base of recipes. A bad value is a ValueError that names the field and the range."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, wanted = getattr(self, field.name), field.metadata["range"]
            if get_origin(field.type) is Literal:
                choices = get_args(field.type)
                self._check(field.name, value in choices, f"one of {choices}")
            elif field.type is float:
                self._check(field.name, _is_finite(value), "a finite number")
            elif field.type == RGB:
                numbers = value if isinstance(value, (list, tuple)) else ()
                is_rgb = len(numbers) == 3 and all(map(_is_finite, numbers))
                self._check(field.name, is_rgb, "three finite numbers")
                object.__setattr__(self, field.name, tuple(value))  # a list, if read from JSON
            else:
                is_type = type(value) is field.type
                self._check(field.name, is_type, f"of type {field.type.__name__}")
            values = value if field.type == RGB else [value]
            self._check(field.name, wanted is None or all(map(RANGES[wanted], values)), wanted)
        below = f"below epochs={self.epochs}"
        self._check("warmup_epochs", self.warmup_epochs < self.epochs, below)

    def _check(self, name: str, good: bool, wanted: str | None) -> None:
        if not good:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {wanted}")


@dataclass(frozen=True)
class Recipe(_Checked):
    """How to train a classifier."""

    epochs: int = _field(100, "passes over the training images", AT_LEAST_1)
    batch_size: int = _field(1024, "images per step, over all processes", AT_LEAST_1)
    accumulate: int = _field(1, "gradient accumulation steps per update", AT_LEAST_1)
    lr_per_1024: float = _field(0.5, "peak learning rate per 1024 images of batch size", ABOVE_0)
    optimizer: Literal["sgd", "adamw", "muon"] = _field(
        "sgd", "muon: Muon for kernels of convolutions, AdamW for the rest"
    )
    momentum: float = _field(0.9, "of SGD and Muon; beta1 of AdamW, whose beta2 is 0.999", BELOW_1)
    nesterov: bool = _field(False, "Nesterov momentum of SGD; Muon always has it")
    weight_decay: float = _field(2e-5, "weight decay of conv and linear weights", AT_LEAST_0)
    norm_weight_decay: float = _field(0.0, "weight decay of norms and biases", AT_LEAST_0)
    warmup_epochs: float = _field(5.0, "epochs of linear warm-up before the cosine", AT_LEAST_0)
    flat_share: float = _field(0.0, "share of the steps after warm-up at the peak rate", BELOW_1)
    label_smoothing: float = _field(0.1, "share of the target spread over all classes", BELOW_1)
    train_crop_px: int = _field(176, "side of the training crops, pixels", PIXELS)
    min_crop_area: float = _field(0.08, "smallest training crop, share of area", POSITIVE_SHARE)
    eval_resize_px: int = _field(232, "shorter side of validation images, pixels", PIXELS)
    eval_crop_px: int = _field(224, "side of the validation's center crop, pixels", PIXELS)
    trivial_augment: bool = _field(True, "TrivialAugmentWide (arXiv:2103.10158)")
    random_erasing: float = _field(0.1, "probability of RandomErasing (arXiv:1708.04896)", SHARE)
    cutmix_alpha: float = _field(1.0, "Beta parameter of CutMix (arXiv:1905.04899)", AT_LEAST_0)
    mixup_alpha: float = _field(0.2, "Beta parameter of MixUp (arXiv:1710.09412)", AT_LEAST_0)
    ema_decay: float = _field(0.9998, "decay of the EMA weights per step, warmed up", BELOW_1)
    mean: tuple[float, float, float] = _field(
        (0.485, 0.456, 0.406), "subtracted from RGB of 0 to 1", SHARE
    )
    std: tuple[float, float, float] = _field(
        (0.229, 0.224, 0.225), "RGB is divided by it after subtracting mean", POSITIVE_SHARE
    )
    eval_interpolation: Literal["bilinear", "bicubic"] = _field("bilinear", "of validation images")
    freeze: int = _field(-1, "stages to freeze, with the stem; -1: nothing", AT_LEAST_MINUS_1)
    backbone_lr_factor: float = _field(1.0, "factor on the backbone's learning rate", ABOVE_0)
    class_weights: bool = _field(False, "weight the loss by 1 / images of the class")
    width: float = _field(1.0, "factor on the channels of Darknet and VoVNet", ABOVE_0)
    precision: Literal["bf16", "fp16", "float32"] = _field(
        "bf16", "autocast type, where the device has it; fp16: on GPUs, with loss scaling"
    )
    channels_last: bool = _field(True, "channels_last memory format")

    def __post_init__(self) -> None:
        super().__post_init__()
        is_larger = self.eval_resize_px >= self.eval_crop_px
        self._check("eval_resize_px", is_larger, "at least eval_crop_px")
        is_sgd = self.optimizer == "sgd"
        self._check("nesterov", is_sgd or not self.nesterov, "False unless optimizer is sgd")
        good = self.optimizer != "muon" or self.precision != "fp16"  # it takes no scaled gradients
        self._check("precision", good, "bf16 or float32 with muon")

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
    # Short runs on Imagenette. Tuned with VoVNet-39 at a quarter of the width and 64 pixels: 76.6 %
    # after 5 epochs on a held-out slice. At full width and 128 pixels it reaches 89.2 % on the
    # validation images, without further tuning (docs/results.md).
    "imagenette": dataclasses.replace(
        _SMALL,
        epochs=5,
        batch_size=64,
        optimizer="muon",
        lr_per_1024=0.128,
        momentum=0.95,
        weight_decay=0.05,
        warmup_epochs=1.0,
        flat_share=0.7,
        label_smoothing=0.1,
        train_crop_px=128,
        min_crop_area=0.35,
        eval_resize_px=146,
        eval_crop_px=128,
        trivial_augment=False,
    ),
    # From published weights to some hundred photographs; tuned on a slice of hymenoptera's train.
    "finetune": dataclasses.replace(
        _SMALL,
        epochs=10,
        batch_size=32,
        optimizer="adamw",
        lr_per_1024=0.032,
        weight_decay=0.05,
        warmup_epochs=2.0,
        train_crop_px=224,
        min_crop_area=0.35,
        eval_resize_px=256,
        label_smoothing=0.1,
    ),
}


@dataclass(frozen=True)
class DetectorRecipe(_Checked):
    """How to train a detector; the rate is the best of six for the embedded sample's scenes."""

    epochs: int = _field(12, "passes over the training images", AT_LEAST_1)
    batch_size: int = _field(8, "images per step", AT_LEAST_1)
    lr: float = _field(4e-3, "peak learning rate of AdamW", ABOVE_0)
    weight_decay: float = _field(0.05, "weight decay of conv and linear weights", AT_LEAST_0)
    warmup_epochs: float = _field(1.0, "epochs of linear warm-up before the cosine", AT_LEAST_0)
    image_px: int = _field(128, "longer side of the resized images, pixels", PIXELS)
    out_channels: int = _field(64, "channels of the pyramid and the head", AT_LEAST_1)


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
        elif field.type == RGB:
            options.update(type=float, nargs=3, metavar=("R", "G", "B"))
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        group.add_argument(flag, **options)


def from_arguments(args: argparse.Namespace, preset: str) -> Recipe:
    """The preset with the values that were given; ValueError for a bad one."""
    names = [field.name for field in dataclasses.fields(Recipe)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(RECIPES[preset], **given)
