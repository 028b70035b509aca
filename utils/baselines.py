"""The trainers of torchvision and timm, written after the scripts that their packages lack.

- torchvision: references/classification/ of github.com/pytorch/vision.
- timm: train.py of github.com/huggingface/pytorch-image-models.

What no benchmark needs (accuracy of batches, printing, checkpoints) is left out, in their favour.

The functions of `TRAINERS` train for an epoch with each `next` and yield the raw model, then the
EMA model if the project reports it. `folder` holds links to `images` for the projects' own readers.
Ours has no worker processes: it decodes in threads.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

from utils.cli import import_optional
from utils.data.folders import ImageFiles, begin
from utils.recipe import RECIPES, Recipe
from utils.training.evaluation import autocast, autocast_dtype
from utils.training.loop import Trainer, train_one_epoch

EMA_STEPS = 32  # the default of torchvision's --model-ema-steps
# Of torchvision's weights of 2021, and the defaults of timm's script.
REFERENCES = {
    "torchvision": replace(RECIPES["imagenet"], epochs=600),
    "timm": replace(RECIPES["imagenet"], epochs=300, lr_per_1024=0.4),
}

Epochs = Iterator[dict[str, nn.Module]]
Step = tuple[Callable[[Tensor, Tensor], float], Optimizer]


def train_ours(
    model: nn.Module, recipe: Recipe, images: ImageFiles, folder: Path, workers: int
) -> Epochs:
    loader = images.train_loader(recipe.batch_size, 0)
    trainer = Trainer(model, recipe, len(loader), len(images.classes), images.seed)
    for epoch in range(recipe.epochs):
        begin(loader, epoch)
        train_one_epoch(trainer, loader)
        yield {"raw": model, "EMA": trainer.ema.module}


def train_torchvision(
    model: nn.Module, recipe: Recipe, images: ImageFiles, folder: Path, workers: int
) -> Epochs:
    """Without --model-ema, whose decay for 600 epochs of ImageNet is too slow for short runs."""
    loader = torchvision_loader(folder, recipe, num_workers=workers)
    mixes = (v2.MixUp, recipe.mixup_alpha), (v2.CutMix, recipe.cutmix_alpha)
    count, device = len(images.classes), next(model.parameters()).device
    mix = v2.RandomChoice([each(alpha=alpha, num_classes=count) for each, alpha in mixes])
    step, optimizer = torchvision_step(model, recipe)
    warmup_epochs = round(recipe.warmup_epochs)
    schedule = CosineAnnealingLR(optimizer, recipe.epochs - warmup_epochs)
    if warmup_epochs:
        warmup = LinearLR(optimizer, 0.01, total_iters=warmup_epochs)
        schedule = SequentialLR(optimizer, [warmup, schedule], [warmup_epochs])
    for _ in range(recipe.epochs):
        model.train()
        for batch in loader:
            step(*(each.to(device) for each in mix(batch)))
        schedule.step()
        yield {"raw": model}


def train_timm(
    model: nn.Module, recipe: Recipe, images: ImageFiles, folder: Path, workers: int
) -> Epochs:
    """By default there is no EMA."""
    timm, labels = import_timm(), {name: k for k, name in enumerate(images.classes)}
    loader = timm.data.create_loader(
        timm.data.create_dataset("", folder, is_training=True, class_map=labels),
        (3, recipe.train_crop_px, recipe.train_crop_px),
        recipe.batch_size,
        is_training=True,
        interpolation="random",
        num_workers=workers,
        device=next(model.parameters()).device,
    )
    step, optimizer = timm_step(model, recipe, "sgd")
    lengths = {"num_epochs": recipe.epochs, "warmup_epochs": round(recipe.warmup_epochs)}
    schedule, _ = timm.scheduler.create_scheduler_v2(optimizer, **lengths)
    for epoch in range(recipe.epochs):
        model.train()
        losses = timm.utils.AverageMeter()
        for batch, targets in loader:
            losses.update(step(batch, targets), len(targets))
        schedule.step(epoch + 1)
        yield {"raw": model}


TRAINERS = {"ours": train_ours, "torchvision": train_torchvision, "timm": train_timm}


def torchvision_loader(folder: str | Path, recipe: Recipe, **options: Any) -> DataLoader:
    """ClassificationPresetTrain with --auto-augment ta_wide --random-erase, and a loader.

    Pillow's decoder, transforms v1 on PIL images, then on float32 tensors.
    """
    crop_px, bilinear = recipe.train_crop_px, transforms.InterpolationMode.BILINEAR
    steps = [
        transforms.RandomResizedCrop(crop_px, (recipe.min_crop_area, 1.0), interpolation=bilinear),
        transforms.RandomHorizontalFlip(0.5),
        transforms.TrivialAugmentWide(interpolation=bilinear),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        transforms.RandomErasing(recipe.random_erasing),
    ]
    dataset = datasets.ImageFolder(folder, transforms.Compose(steps))
    return DataLoader(dataset, recipe.batch_size, shuffle=True, **options)


def torchvision_step(model: nn.Module, recipe: Recipe, ema: bool = False) -> Step:
    """The loop body of the reference, float32, with --model-ema if `ema`; and its optimizer."""
    norms, others = split_normalization_params(model)
    groups = [{"params": norms, "weight_decay": recipe.norm_weight_decay}, {"params": others}]
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = SGD(groups, recipe.peak_lr, **options)
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    decay, steps = recipe.ema_decay**EMA_STEPS, itertools.count()  # the recipe's is per step
    average = lambda a, b, _: decay * a + (1 - decay) * b  # noqa: E731
    averaged = AveragedModel(model, avg_fn=average, use_buffers=True)

    def step(images: Tensor, targets: Tensor) -> float:
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema and next(steps) % EMA_STEPS == 0:
            averaged.update_parameters(model)
        return loss.item()

    return step, optimizer


def timm_step(model: nn.Module, recipe: Recipe, optimizer_name: str) -> Step:
    """The loop body with --amp --amp-dtype bfloat16 --channels-last, and its optimizer.

    Autocast where bfloat16 is not emulated. timm's "sgd" has Nesterov momentum, "momentum" has not.
    """
    timm, model = import_timm(), model.to(memory_format=torch.channels_last)
    options = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = timm.optim.create_optimizer_v2(model, optimizer_name, recipe.peak_lr, **options)
    criterion = timm.loss.LabelSmoothingCrossEntropy(recipe.label_smoothing)

    def step(images: Tensor, targets: Tensor) -> float:
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(images.device, autocast_dtype(images.device, "bf16")):
            loss = criterion(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, optimizer


def import_timm() -> ModuleType:
    """timm with the parts that its script imports."""
    timm = import_optional("timm", "to compare with it")
    for part in ("data", "loss", "optim", "scheduler", "utils"):
        importlib.import_module(f"timm.{part}")
    return timm
