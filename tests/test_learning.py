"""Every network learns a small real task: photographs of three classes of Imagenette.

With the last BatchNorm of each block at weight 1, PyTorch's default, Darknet-53 is at 42 % here.
"""

import dataclasses

import pytest
import torch

from backbones import create_classifier, list_models
from utils.data.folders import Batch, open_folders
from utils.recipe import RECIPES
from utils.training.loop import Trainer

STEPS, BATCH_SIZE, PX = 100, 16, 48
RECIPE = dataclasses.replace(
    RECIPES["quick"],
    epochs=1,
    batch_size=BATCH_SIZE,
    lr_per_1024=4.0,
    warmup_epochs=0.25,
    train_crop_px=PX,
    eval_resize_px=PX + 8,
    eval_crop_px=PX,
)


@pytest.fixture(scope="module")
def task(unpack):
    """Images and labels of 100 training and 50 validation photographs of each of three classes."""
    root = unpack({"train": 100, "val": 50}, ("n01440764", "n03394916", "n03888257"))
    data = open_folders(root, RECIPE)
    data.train.transform = data.val.transform
    batches = [next(iter(split.eval_loader(300, 0))) for split in (data.train, data.val)]
    return [(batch.images, batch.labels) for batch in batches]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(
            (name, {"width": 0.125})
            for name in (*list_models("*darknet*"), *list_models("vovnet*"))
        ),
        ("resnet18", {}),
        ("mobilenet_v2", {}),
    ],
)
def test_a_hundred_steps_are_far_above_chance(task, name, options):
    (images, labels), (val_images, val_labels) = task
    torch.manual_seed(0)
    trainer = Trainer(create_classifier(name, 3, **options), RECIPE, STEPS, num_classes=3)
    trainer.net.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        flip = torch.rand(BATCH_SIZE, 1, 1, 1, generator=generator) < 0.5
        batch = torch.where(flip, images[chosen].flip(3), images[chosen])
        batch = batch.contiguous(memory_format=torch.channels_last)
        trainer.train_step(Batch(batch, labels[chosen], []))
    found = trainer.evaluate([Batch(val_images, val_labels, [])])
    assert max(result["top1_pct"] for result in found.values()) > 50  # chance is 33
