"""Our trainer against plain loops of other projects' parts; training time to an accuracy."""

import copy
import dataclasses
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from helpers import run
from scipy import stats
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel
from torchvision import models, transforms
from torchvision.ops._utils import split_normalization_params
from torchvision.transforms import v2

import backbones
from backbones.weights import load_weights
from conftest import write_image
from utils import baselines, benchmark
from utils.data.folders import STEP_STREAM, Batch, stream_seed
from utils.recipe import RECIPES
from utils.training.loop import Trainer

# ---- the same steps ----------------------------------------------------------------------------

# 20 of 30 steps: 5 of warm-up, then the cosine; the decay of the EMA stops rising at the ninth.
# A high learning rate would raise differences of rounding from step to step.
STEPS, WARMUP_STEPS, TOTAL_STEPS, PEAK_LR, WEIGHT_DECAY = 20, 5, 30, 3e-3, 0.05
BATCH_SIZE = 8
TOLERANCE = 2e-3  # of what the steps have changed
RECIPE = dataclasses.replace(
    RECIPES["imagenet"], precision="float32", channels_last=False, epochs=3, warmup_epochs=0.5,
    batch_size=BATCH_SIZE, lr_per_1024=PEAK_LR * 1024 / BATCH_SIZE, weight_decay=WEIGHT_DECAY,
    ema_decay=0.5,
)  # fmt: skip
NOT_MIXED = {"cutmix_alpha": 0.0, "mixup_alpha": 0.0}
NORMALISE = transforms.Compose(
    [
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def batches():
    """uint8 images of 4 x 4 blocks; with plain noise all features of a deep network are alike."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        blocks = rng.integers(0, 256, (BATCH_SIZE, 3, 4, 4), dtype=np.uint8)
        images = torch.from_numpy(blocks.repeat(16, 2).repeat(16, 3))
        yield images, torch.from_numpy(rng.integers(0, 10, BATCH_SIZE))


def ours(model, recipe):
    trainer = Trainer(model.train(), recipe, TOTAL_STEPS // 3, num_classes=10)
    for images, labels in batches():
        trainer.train_step(Batch(images, labels, []))
    return trainer.model, trainer.ema.module


def torchvision_loop(model):
    """The parts of torchvision's reference, with our schedules per step and our random numbers."""
    norms, others = split_normalization_params(model.train())
    biases = [p for p in others if p.ndim == 1]  # which torchvision would decay
    groups = [{"params": norms + biases, "weight_decay": 0.0}]
    groups += [{"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.SGD(groups, lr=PEAK_LR, momentum=0.9)
    warmup = LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS - 1)
    cosine = CosineAnnealingLR(optimizer, TOTAL_STEPS - WARMUP_STEPS)
    schedule = SequentialLR(optimizer, [warmup, cosine], [WARMUP_STEPS])
    ema = AveragedModel(
        model,
        avg_fn=lambda a, b, n: b + (a - b) * min(0.5, (1 + n) / (10 + n)),
        use_buffers=True,
    )
    mix = v2.RandomChoice(
        [v2.CutMix(alpha=1.0, num_classes=10), v2.MixUp(alpha=0.2, num_classes=10)]
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    for step, (images, labels) in enumerate(batches()):
        torch.manual_seed(stream_seed(STEP_STREAM, 0, step, 0))
        images, targets = mix(NORMALISE(images), labels)
        loss = criterion(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        ema.update_parameters(model)
    return model, ema.module


def timm_loop(model):
    """The parts of timm; its mixing has random numbers of its own and is left out."""
    options = {"lr": PEAK_LR, "weight_decay": WEIGHT_DECAY, "momentum": 0.9}
    optimizer = timm.optim.create_optimizer_v2(model.train(), "momentum", **options)  # no Nesterov
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer, TOTAL_STEPS - WARMUP_STEPS, warmup_t=WARMUP_STEPS, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
    # Equal to (1 + n) / (10 + n) after n updates.
    ema = timm.utils.ModelEmaV3(model, 0.5, use_warmup=True, warmup_gamma=9, warmup_power=1)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    for step, (images, labels) in enumerate(batches()):
        # timm's warm-up begins at 0 and reaches the peak once; ours at a fifth, and twice.
        schedule.step_update(step + (step < WARMUP_STEPS))
        criterion(model(NORMALISE(images)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step=step + 2 if step else 1)
    return model, ema.module


def distances(found, expected, initial):
    """Of weights, of norms and biases, and of running statistics, over how far these have moved."""
    sums = {}
    for name, value in expected.items():
        if value.is_floating_point():
            kind = "statistics" if "running" in name else ("plain", "weights")[value.ndim > 1]
            moved = sums.setdefault(kind, np.zeros(2))
            moved += [float((x[name] - value).double().square().sum()) for x in (found, initial)]
    assert len(sums) == 3
    return {kind: (different / moved) ** 0.5 for kind, (different, moved) in sums.items()}


def smooth(net):
    """SiLU for the ReLUs: one that rounding flips would change a gradient by a percent."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.LeakyReLU)):
                module.set_submodule(name, nn.SiLU())
    return net


def as_ours(net, name, **options):
    """Our classifier with the weights of torchvision's or timm's."""
    model = backbones.create_classifier(name, 10, **options)
    load_weights(model.backbone, net.state_dict())
    model.head.load_state_dict(
        net.get_submodule("fc" if name == "resnet18" else "head.fc").state_dict()
    )
    return smooth(model)


@pytest.mark.parametrize("project", ["torchvision", "timm"])
def test_20_steps_are_those_of_a_plain_loop(project):
    """Weights, BatchNorm's statistics and EMA weights, from the same weights and uint8 images.

    They differ by rounding, which a deep network with BatchNorm over few images raises from 1e-7 to
    4e-4 of what the steps have changed.
    """
    torch.manual_seed(0)
    if project == "torchvision":
        net, loop, recipe = models.resnet18(num_classes=10), torchvision_loop, RECIPE
        name, options = "resnet18", {}
    else:
        net, loop = timm.create_model("cspdarknet53", num_classes=10), timm_loop
        recipe = dataclasses.replace(RECIPE, **NOT_MIXED)
        name, options = "cspdarknet53", {"layout": "darknet", "act": "leaky_relu_0.01"}
    model = as_ours(smooth(net), name, **options)
    initial = copy.deepcopy(model.state_dict())
    for mine, other in zip(ours(model, recipe), loop(net), strict=True):
        expected = as_ours(other, name, **options).state_dict()
        assert max(distances(mine.state_dict(), expected, initial).values()) < TOLERANCE


MISTAKES = {
    "none": {},
    "weight decay": {"weight_decay": 0.06},
    "decayed norms": {"norm_weight_decay": WEIGHT_DECAY},
    "momentum": {"momentum": 0.89},
    "a step more of warm-up": {"warmup_epochs": 0.6},
    "peak": {"lr_per_1024": 1.01 * RECIPE.lr_per_1024},
    "smoothing": {"label_smoothing": 0.12},
    "EMA": {"ema_decay": 0.53},
    "mixing": {"mixup_alpha": 0.3},
}


@pytest.mark.parametrize("loop", [torchvision_loop, timm_loop])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_recipe_would_be_seen(loop, mistake):
    """Each moves a small network, in which rounding is 2e-6, by more than the tolerance."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10))
    initial, recipe = copy.deepcopy(model.state_dict()), RECIPE
    if loop is timm_loop:
        recipe = dataclasses.replace(RECIPE, **NOT_MIXED)
    found = ours(copy.deepcopy(model), dataclasses.replace(recipe, **MISTAKES[mistake]))
    worst = max(
        max(distances(a.state_dict(), b.state_dict(), initial).values())
        for a, b in zip(found, loop(model), strict=True)
    )
    assert worst < 1e-5 if mistake == "none" else worst > 2 * TOLERANCE, worst


# ---- training time to an accuracy --------------------------------------------------------------


def test_the_script_trains_by_all_on_the_same_images(folders, tmp_path, capsys, monkeypatch):
    """Without the held-out ones: every tenth of a class by name, here its fourth."""
    given = []

    def recorded(trainer, model, recipe, images, folder, workers):
        given.append({path.resolve() for path in folder.glob("*/*")})
        given.append({images.path(k).resolve() for k in range(len(images))})
        return trainer(model, recipe, images, folder, workers)

    for name, trainer in benchmark.TRAINERS.items():
        monkeypatch.setitem(benchmark.TRAINERS, name, partial(recorded, trainer))
    path = tmp_path / "new" / "accuracy.csv"
    sizes = ("--image-px", 32, "--batch-size", 8, "--epochs", 1, "--threads", 1, "--workers", 0)
    args = ("--task", "accuracy", "--data-dir", folders, "--backbones", "resnet18", *sizes)
    assert run("benchmark.py", *args, "--seeds", 2, "--lr", 0.1, "--output", path) == 0
    held_out = {folders / "train" / f"n0000000{k}" / "3.JPEG" for k in range(3)}
    assert given == [set(folders.resolve().glob("train/*/*")) - held_out] * 12
    table = pd.read_csv(path)
    assert not table.isna().any(axis=None)
    assert table.implementation.tolist() == ["ours", "torchvision", "timm"] * 2
    assert table.weights.tolist() == ["EMA", "raw", "raw"] * 2
    assert table.recipe.tolist() == ["imagenet", "reference", "reference"] * 2
    assert table.lr_per_1024.tolist() == [0.05, 0.05, 0.04] * 2
    out = capsys.readouterr().out
    assert out.count("0.1 x its learning rate, seed 1: 75 %") == 3
    assert "2 and 2" in out  # seeds of an interval


def test_minutes_and_differences_as_calculated_by_hand():
    """Differences of 10 and 0, variances 2 and 8 of two seeds: 1.47 degrees of freedom."""
    curves = {("ours", 0): (60, 80, 79), ("ours", 1): (60, 70, 81)}
    curves |= {("timm", 0): (50, 60, 68), ("timm", 1): (50, 75, 72), ("torchvision", 0): (9, 9, 9)}
    facts = dict.fromkeys(benchmark.CURVE, 1)
    rows = [
        facts | {"implementation": name, "seed": seed, "top1_pct": top1, "top1_raw_pct": 0.5 * top1}
        | {"train_time_s": 60.0 * (1 + k)}
        for (name, seed), values in curves.items()
        for k, top1 in enumerate(values)
    ]  # fmt: skip
    finals = benchmark.time_to_accuracy(pd.DataFrame(rows), 75)
    assert finals.minutes.fillna(0).tolist() == [2, 3, 0, 2, 0]
    assert finals.top1_pct.tolist() == [79, 81, 68, 72, 9]
    found = benchmark.accuracy_differences(finals)
    assert found["ours minus"].tolist() == ["timm", "timm"]
    assert found.difference.tolist() == [10, 5]
    half = stats.t.ppf(0.95, (1 + 4) ** 2 / (1**2 + 4**2)) * (1 + 4) ** 0.5
    assert (found.low[0], found.high[0]) == pytest.approx((10 - half, 10 + half))


def test_recipes_at_the_sizes_of_a_run():
    """At the preset's own size its own test crop; else its ratio, in steps of 32 pixels."""
    sizes = {176: (224, 232), 128: (160, 166), 224: (288, 298), 32: (32, 33)}
    for px, expected in sizes.items():
        case = ("accuracy", "resnet18", 64, px, "cpu")
        found = benchmark.TrainingRun(*case, "ours", epochs=20).eval_recipe
        assert (found.eval_crop_px, found.eval_resize_px) == expected
    recipes = [
        benchmark.TrainingRun(*case, who, 20, lr_factor=2.0).recipe for who in benchmark.TRAINERS
    ]
    assert [recipe.lr_per_1024 for recipe in recipes] == [1.0, 1.0, 0.8]
    assert [recipe.warmup_epochs for recipe in recipes] == pytest.approx([1, 1 / 6, 1 / 3])


def test_timm_gets_our_numbers_of_classes(tmp_path, monkeypatch):
    """It would sort c10 after c2. Colours show the labels that its loader gives."""
    classes, seen = ["c1", "c10", "c2"], []
    for name, colour in zip(classes, ((250, 60, 60), (60, 250, 60), (60, 60, 250)), strict=True):
        for k in range(4):
            write_image(tmp_path / name / f"{k}.JPEG", np.random.default_rng(k), colour)
    recipe = dataclasses.replace(RECIPES["imagenet"], epochs=1, warmup_epochs=0.0, batch_size=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    step = lambda *batch: seen.append(batch) or 0.0  # noqa: E731
    monkeypatch.setattr(baselines, "timm_step", lambda *args: (step, optimizer))
    images = SimpleNamespace(classes=classes)
    next(baselines.train_timm(nn.Linear(1, 1), recipe, images, tmp_path, 0))
    assert len(seen) == 3
    for inputs, labels in seen:
        assert inputs.mean((2, 3)).argmax(1).tolist() == labels.tolist()
