"""What we are measured against: timm's and torchvision's networks, and the trainers of both.

`TorchvisionTrainer` goes through the steps of references/classification/train.py of
github.com/pytorch/vision (its train_one_epoch and load_data, and ClassificationPresetTrain of
presets.py): Pillow's decoder, transforms v1 to float32 in the workers, NCHW, float32, default SGD,
meters that wait for every step. The script is not part of the torchvision package; the steps are
written here anew. What they leave open is set in its favour: workers live from epoch to epoch, and
no progress is printed.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import v2

from utils.cli import import_optional
from utils.recipe import Recipe
from utils.training.evaluation import autocast, autocast_dtype, dtype_name
from utils.training.loop import param_groups

# ImageNet's RGB values, 0 to 1, as the presets have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TO_COMPARE = "to compare with it"
EMA_STEPS = 32  # the default of --model-ema-steps


@dataclass(frozen=True)
class Shared:
    """An architecture that both have: timm's name, our options for the same function."""

    timm: str
    options: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()  # of torchvision's feature extractor, where it has the network


_RESNET = ("relu", "layer1", "layer2", "layer3", "layer4")
_TIMM_DARKNET = {"act": "leaky_relu_0.01"}
_TIMM_VOVNET = {"ese": "last", "stem_stride": 4}
SHARED = {
    "cspdarknet53": Shared("cspdarknet53", {"layout": "darknet", **_TIMM_DARKNET}),
    "darknet53": Shared("darknet53", _TIMM_DARKNET),
    "vovnet19_slim": Shared("ese_vovnet19b_slim", _TIMM_VOVNET),
    "vovnet39": Shared("ese_vovnet39b", _TIMM_VOVNET),
    "vovnet57": Shared("ese_vovnet57b", _TIMM_VOVNET),
    "vovnet99": Shared("ese_vovnet99b", _TIMM_VOVNET),
    **{
        name: Shared(name, nodes=_RESNET)
        for name in (
            *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d"),
            *("resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
        )
    },
    "mobilenet_v2": Shared("mobilenetv2_100", {"tap": "block"}),
    # timm's have the final 1x1 convolution, so the same layers as ours give with "expansion".
    "mobilenet_v3_large": Shared("mobilenetv3_large_100"),
    "mobilenet_v3_small": Shared("mobilenetv3_small_100"),
    **{f"efficientnet_b{i}": Shared(f"efficientnet_b{i}", {"tap": "block"}) for i in range(8)},
}


def timm_backbone(name: str) -> nn.Module:
    """timm's network of feature maps for one of `SHARED`, with random weights."""
    return _timm().create_model(SHARED[name].timm, features_only=True, pretrained=False)


def timm_classifier(name: str, num_classes: int) -> nn.Module:
    """timm's classifier for one of `SHARED`, with random weights."""
    return _timm().create_model(SHARED[name].timm, num_classes=num_classes, pretrained=False)


def torchvision_backbone(name: str) -> nn.Module:
    """torchvision's feature extractor for one of `SHARED` with nodes."""
    return create_feature_extractor(get_model(name, weights=None), list(SHARED[name].nodes))


def onnxruntime_call(net: nn.Module, images: Tensor, threads: int) -> Callable[[], object]:
    """A forward pass of `net` in ONNX Runtime on the CPU, exported for the size of `images`."""
    runtime = import_optional("onnxruntime", TO_COMPARE)
    program = torch.onnx.export(net.eval(), (images,), dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: images.numpy()}
    return partial(session.run, None, feed)


def timm_side(device: torch.device) -> str:
    """What `TimmTrainer` is called in records."""
    return f"timm {dtype_name(autocast_dtype(device, 'bf16'))} channels_last"


def _timm() -> Any:
    return import_optional("timm", TO_COMPARE)


def torchvision_transform(recipe: Recipe) -> transforms.Compose:
    """The training preset, from RGB image to normalised float32 `[3, H, W]`."""
    crop_area = (recipe.min_crop_area, 1.0)
    steps = [
        transforms.RandomResizedCrop(recipe.train_crop_px, scale=crop_area),
        transforms.RandomHorizontalFlip(0.5),
    ]
    if recipe.trivial_augment:
        bilinear = transforms.InterpolationMode.BILINEAR
        steps.append(transforms.TrivialAugmentWide(interpolation=bilinear))
    steps += [
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(MEAN, STD),
    ]
    if recipe.random_erasing:
        steps.append(transforms.RandomErasing(recipe.random_erasing))
    return transforms.Compose(steps)


def torchvision_loader(
    folder: str | Path, recipe: Recipe, workers: int, pin_memory: bool = False
) -> DataLoader:
    """Batches of images and targets from `folder/<class>/`, mixed in the workers.

    An incomplete last batch is dropped, as ours is; the reference trains on it.
    """
    dataset = ImageFolder(str(folder), torchvision_transform(recipe))
    mixes = [(v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha)]
    classes = len(dataset.classes)
    mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in mixes if alpha > 0]
    return DataLoader(
        dataset,
        batch_size=recipe.batch_size,
        sampler=RandomSampler(dataset),
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=partial(_mix, v2.RandomChoice(mixes)) if mixes else None,
        drop_last=True,
        persistent_workers=workers > 0,
    )


def _mix(mix: v2.Transform, samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    return mix(*default_collate(samples))


class TorchvisionTrainer:
    """Trains `model` in place, on the device it is on, in float32 and at the peak learning rate.

    Weight decay is grouped as ours is, which the reference has options for. Its schedule moves once
    an epoch and takes no time worth measuring.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.optimizer = torch.optim.SGD(
            param_groups(model, recipe.weight_decay, recipe.norm_weight_decay),
            lr=recipe.peak_lr,
            momentum=recipe.momentum,
        )
        decay = recipe.ema_decay**EMA_STEPS  # ours is per step
        self.ema = AveragedModel(
            model,
            avg_fn=lambda average, new, _: decay * average + (1 - decay) * new,
            use_buffers=True,
        )
        self.step = 0

    def train_step(self, image: Tensor, target: Tensor) -> tuple[float, float, float]:
        """One update; returns its loss, top-1 and top-5 in %."""
        image, target = image.to(self.device), target.to(self.device)
        output = self.model(image)
        loss = self.criterion(output, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.step % EMA_STEPS == 0:
            self.ema.update_parameters(self.model)
        self.step += 1
        top1_pct, top5_pct = _accuracy(output, target)
        return loss.item(), top1_pct.item(), top5_pct.item()

    def train_one_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        """One pass over `batches`; returns the means of what `train_step` returns."""
        self.model.train()
        rows = [self.train_step(image, target) for image, target in batches]
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@torch.inference_mode()
def _accuracy(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5 in %; a mixed target counts as its larger share."""
    if target.ndim == 2:
        target = target.argmax(1)
    right = output.topk(min(5, output.shape[1])).indices == target[:, None]
    percent = 100 / len(target)
    return right[:, 0].sum() * percent, right.sum() * percent


class TimmTrainer:
    """Trains `model` in place by the steps of timm's train.py, at its fastest.

    Those of train_one_epoch in train.py of github.com/huggingface/pytorch-image-models, at its
    `--amp --amp-dtype bfloat16 --channels-last --opt momentum`, without averaged weights; without
    `--amp` where the device only emulates bfloat16.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.device = next(model.parameters()).device
        self.dtype = autocast_dtype(self.device, "bf16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self.optimizer = torch.optim.SGD(
            param_groups(model, recipe.weight_decay, recipe.norm_weight_decay),
            lr=recipe.peak_lr,
            momentum=recipe.momentum,
        )

    def train_step(self, image: Tensor, target: Tensor) -> float:
        """One update; returns its loss."""
        image = image.to(self.device).contiguous(memory_format=torch.channels_last)
        target = target.to(self.device)
        with autocast(self.device, self.dtype):
            output = self.model(image)
            loss = self.criterion(output, target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def torchvision_command(
    script: Path, name: str, folder: Path, recipe: Recipe, workers: int, output_dir: Path
) -> list[str]:
    """references/classification/train.py by `recipe`, in float32 and NCHW as it is, on the CPU.

    It trains our network, as all sides do.
    """
    register = (
        "import torchvision.models._api as m; m.BUILTIN_MODELS['ours'] = "
        "lambda weights=None, num_classes=1000: make(num_classes)"
    )
    options = {
        "data-path": folder,
        "model": "ours",
        "device": "cpu",
        "epochs": recipe.epochs,
        "batch-size": recipe.batch_size,
        "lr": recipe.peak_lr,
        "wd": recipe.weight_decay,
        "norm-weight-decay": recipe.norm_weight_decay,
        "lr-scheduler": "cosineannealinglr",
        "label-smoothing": recipe.label_smoothing,
        "mixup-alpha": recipe.mixup_alpha,
        "cutmix-alpha": recipe.cutmix_alpha,
        "random-erase": recipe.random_erasing,
        "train-crop-size": recipe.train_crop_px,
        "val-resize-size": recipe.eval_resize_px,
        "val-crop-size": recipe.eval_crop_px,
        "workers": workers,
        "output-dir": output_dir,
        "print-freq": 100,
    }
    if recipe.trivial_augment:
        options["auto-augment"] = "ta_wide"
    return _with_ours(script, name, register, options)


def _with_ours(script: Path, name: str, register: str, options: dict[str, Any]) -> list[str]:
    """Runs a training script with averaged weights after `register`, which gives it our network.

    The line finds `make`, which makes our classifier from a number of classes, and calls it "ours":
    ours may be made with the script's own of the same name.
    """
    # torchvision's script has a utils.py beside it, so its folder must come before ours.
    lines = (
        f"import runpy, sys; sys.path.insert(0, {str(script.parent)!r})",
        "from backbones import create_classifier",
        f"make = lambda num_classes: create_classifier({name!r}, num_classes)",
        register,
        f"sys.argv[0] = {str(script)!r}",
        f"runpy.run_path({str(script)!r}, run_name='__main__')",
    )
    flags = [f"--{key}={value}" for key, value in options.items()]
    return [sys.executable, "-c", "\n".join(lines), *flags, "--model-ema"]


def timm_command(
    script: Path, name: str, folder: Path, recipe: Recipe, workers: int, output_dir: Path
) -> list[str]:
    """timm's train.py by `recipe`, in channels_last, on the CPU, training our network.

    In bf16 as `TimmTrainer` is. It has no TrivialAugment; RandAugment with one operation stands for
    it.
    """
    register = (
        "import timm.models._registry as r; r._model_entrypoints['ours'] = "
        "lambda pretrained=False, num_classes=1000, **others: make(num_classes)"
    )
    options = {
        "data-dir": folder,
        "model": "ours",
        "device": "cpu",
        "num-classes": len([path for path in (folder / "train").iterdir() if path.is_dir()]),
        "img-size": recipe.train_crop_px,
        "crop-pct": recipe.eval_crop_px / recipe.eval_resize_px,
        "epochs": recipe.epochs,
        "warmup-epochs": 0,
        "cooldown-epochs": 0,
        "batch-size": recipe.batch_size,
        "opt": "momentum",
        "lr": recipe.peak_lr,
        "weight-decay": recipe.weight_decay,
        "smoothing": recipe.label_smoothing,
        "mixup": recipe.mixup_alpha,
        "cutmix": recipe.cutmix_alpha,
        "reprob": recipe.random_erasing,
        "workers": workers,
        "output": output_dir,
        "log-interval": 100,
    }
    if recipe.trivial_augment:
        options["aa"] = "rand-m9-n1"
    has_bf16 = autocast_dtype(torch.device("cpu"), "bf16") is not None
    amp = ["--amp", "--amp-dtype=bfloat16"] * has_bf16
    return [*_with_ours(script, name, register, options), *amp, "--channels-last"]
