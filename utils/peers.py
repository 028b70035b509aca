"""The trainers we are measured against, in their own steps.

`TorchvisionTrainer` goes through the steps of references/classification/train.py of
github.com/pytorch/vision (its train_one_epoch and load_data, and ClassificationPresetTrain of
presets.py): Pillow's decoder, transforms v1 to float32 in the workers, NCHW, float32, default SGD,
meters that wait for every step. The script is not part of the torchvision package; the steps are
written here anew. What they leave open is set in its favour: workers live from epoch to epoch, and
no progress is printed.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from utils.recipe import Recipe
from utils.training import param_groups

# ImageNet's RGB values, 0 to 1, as the presets have them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EMA_STEPS = 32  # the default of --model-ema-steps


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
