"""The training loop: schedule, parameter groups, EMA, losses, resuming, the dry run."""

import copy
import dataclasses
import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, TINY, assert_same_run
from torch import nn

import backbones
from backbones.classifier import Classifier
from utils import distributed
from utils.data.folders import Batch, CorruptImageError, open_folders
from utils.plotting import plot_curves
from utils.training.loop import DivergedError, Trainer, dry_run, fit
from utils.training.optimizer import Muon, lr_factor, make_optimizer, param_groups

CPU = torch.device("cpu")


def make_model(seed=0, num_classes=3, **options):
    torch.manual_seed(seed)
    return Classifier(backbones.create("cspdarknet19", width=0.125, **options), num_classes)


def make_batch(count=8, seed=0, num_classes=3, size_px=32):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, size_px, size_px), dtype=np.uint8))
    return Batch(images, torch.from_numpy(rng.integers(0, num_classes, count)), [])


def test_compiled_steps_are_the_same_steps():
    recipe = dataclasses.replace(TINY, precision="float32", warmup_epochs=0.0)
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))  # a network takes a minute
    trainers = [
        Trainer(copy.deepcopy(model), recipe, 10, 3, compile=compile) for compile in (False, True)
    ]
    for trainer in trainers:
        trainer.net.train()
    for seed in range(2):  # the second sees updated weights
        losses = [trainer.train_step(make_batch(seed=seed)).item() for trainer in trainers]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain, compiled = (trainer.state_dict() for trainer in trainers)
    assert list(compiled["model"]) == list(plain["model"])
    trainers[0].load_state_dict(compiled)


def test_schedule_as_written_out():
    """Five steps up to the peak, then half a cosine over ten."""
    up = [0.2, 0.4, 0.6, 0.8, 1.0]
    down = [1.0, 0.975528, 0.904508, 0.793893, 0.654508]
    down += [0.5, 0.345492, 0.206107, 0.095492, 0.024472]
    found = [lr_factor(step, 5, 15) for step in range(15)]
    np.testing.assert_allclose(found, up + down, atol=1e-6)
    flat = [lr_factor(step, 5, 25, flat_share=0.5) for step in range(25)]
    np.testing.assert_allclose(flat, up + [1.0] * 10 + down, atol=1e-6)
    assert lr_factor(0, 0, 10) == 1.0
    assert lr_factor(15, 5, 15) == pytest.approx(0)


@pytest.mark.parametrize(
    ("fields", "kind", "values"),
    [
        ({"nesterov": True}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"betas": (0.8, 0.999)}),
    ],
)
def test_optimizers_get_the_values_of_the_recipe(fields, kind, values):
    recipe = dataclasses.replace(TINY, lr_per_1024=16.0, momentum=0.8, **fields)
    optimizer = make_optimizer(without_batchnorm(), recipe)
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert group.items() >= {"lr": 0.125, **values}.items()


def test_muon_is_pytorchs_for_kernels_and_adamws_for_the_rest():
    """torch.optim.Muon takes matrices alone, and orthogonalizes in bfloat16."""
    shapes = (6, 3, 3, 3), (32, 3, 1, 1), (4, 1, 3, 3)  # the last one is depthwise
    *matrices, depthwise = [nn.Parameter(torch.full(s, 0.1).flatten(1)) for s in shapes]
    ours = [nn.Parameter(torch.full(shape, 0.1)) for shape in shapes]
    ours[0].data = ours[0].data.contiguous(memory_format=torch.channels_last)
    options = {"lr": 0.1, "weight_decay": 0.5}
    optimizers = [
        Muon(ours, 0.9, torch.bfloat16, fused=True, **options),
        torch.optim.Muon(matrices, momentum=0.9, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW([depthwise], betas=(0.9, 0.999), **options),
    ]
    for step in range(3):
        torch.manual_seed(step)
        for kernel, matrix in zip(ours, [*matrices, depthwise], strict=True):
            kernel.grad = torch.randn(kernel.shape)
            matrix.grad = kernel.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
        state = optimizers[0].state_dict()  # of a run that is resumed
        optimizers[0] = Muon(ours, 0.9, torch.bfloat16, fused=True, **options)
        optimizers[0].load_state_dict(state)
    for kernel, matrix in zip(ours, [*matrices, depthwise], strict=True):
        difference, moved = kernel.flatten(1) - matrix, matrix - 0.1
        assert difference.norm() < 0.06 * moved.norm()  # the iterations amplify rounding


def test_weight_decay_spares_norms_and_biases_by_type():
    """A weight that two layers share counts once; frozen ones are left out."""
    layers = {name: nn.Linear(4, 4) for name in ("bn_head", "tied", "frozen")}
    norms = {"group": nn.GroupNorm(2, 4), "batch": nn.BatchNorm2d(4), "layer": nn.LayerNorm(4)}
    net = nn.ModuleDict({**layers, **norms, "conv": nn.Conv2d(3, 4, 1)})
    net["tied"].weight = net["bn_head"].weight
    net["frozen"].requires_grad_(False)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed, plain = param_groups(net, 0.1, 0.02)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.02)
    assert sorted(names[id(p)] for p in decayed["params"]) == ["bn_head.weight", "conv.weight"]
    expected = {f"{name}.{kind}" for name in norms for kind in ("weight", "bias")}
    expected |= {"bn_head.bias", "tied.bias", "conv.bias"}
    assert sorted(names[id(p)] for p in plain["params"]) == sorted(expected)


def without_batchnorm():
    """A classifier whose images do not see each other."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 3))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """Also of 8 images in 3 parts, mixed before they are parted."""
    found = []
    for parts in (1, 3, 8):
        recipe = dataclasses.replace(TINY, precision="float32", accumulate=parts)
        trainer = Trainer(without_batchnorm(), recipe, steps_per_epoch=10, num_classes=3)
        losses = [trainer.train_step(make_batch(seed=step)).item() for step in range(3)]
        found.append((losses, trainer.model.state_dict()))
    for losses, weights in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, found[0][1][name], rtol=1e-4, atol=1e-6)


def test_float16_scales_the_loss_and_skips_steps_that_overflow(monkeypatch):
    """Its first step overflows, and then it trains as float32. On a CPU in this test alone."""
    recipe = dataclasses.replace(TINY, warmup_epochs=0.0, weight_decay=0.1)
    make = functools.partial(Trainer, steps_per_epoch=10**6, num_classes=3)
    wide = make(without_batchnorm(), dataclasses.replace(recipe, precision="float32"))
    monkeypatch.setattr("utils.training.loop.autocast_dtype", lambda *_: torch.float16)
    half = make(without_batchnorm(), recipe)
    before = copy.deepcopy(half.model.state_dict())
    half.scaler.load_state_dict({**half.scaler.state_dict(), "scale": 2.0**120})
    half.train_step(make_batch())
    assert all(torch.equal(value, before[name]) for name, value in half.model.state_dict().items())
    assert half.scaler.get_scale() == 2.0**119
    half.scaler.update(2.0**16)
    half.step = 0  # which seeds the mixing
    batches = [make_batch(seed=step) for step in range(5)]
    wide_losses, half_losses = ([t.train_step(b).item() for b in batches] for t in (wide, half))
    assert half_losses == pytest.approx(wide_losses, rel=0.01)

    other = make(without_batchnorm(), recipe)
    other.load_state_dict(half.state_dict())
    assert other.scaler.get_scale() == 2.0**16
    other.scaler.load_state_dict({**half.scaler.state_dict(), "scale": 1e-5})
    with pytest.raises(DivergedError, match="a gradient is not finite"):
        other.synchronize()


def test_seed_step_and_process_draw_the_mixing(monkeypatch):
    """Each of them alone changes how one batch is mixed, and so its loss before any update."""
    recipe, losses = dataclasses.replace(TINY, precision="float32"), []
    for seed, step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        trainer = Trainer(without_batchnorm(), recipe, 9, num_classes=3, seed=seed)
        trainer.step = step
        losses.append(trainer.train_step(make_batch()).item())
    assert losses[0] == losses[4]
    assert len(set(losses)) == 4


def test_raw_and_ema_weights_are_evaluated_under_their_names():
    """The raw weights predict class 0 and the EMA weights class 1, of images of class 0."""
    trainer = Trainer(make_model(), TINY, steps_per_epoch=1, num_classes=3)
    for model, label in ((trainer.model, 0), (trainer.ema.module, 1)):
        model.head.bias.data[label] = 1e4
    found = trainer.evaluate([Batch(make_batch().images, torch.zeros(8, dtype=torch.long), [])])
    assert (found[""]["top1_pct"], found["ema_"]["top1_pct"]) == (100, 0)


SHARE = """
import sys, torch
from utils import distributed
from test_training import TINY, make_batch, without_batchnorm
from utils.data.folders import Batch
from utils.training.loop import Trainer
import dataclasses
recipe = dataclasses.replace(TINY, precision="float32", cutmix_alpha=0.0, mixup_alpha=0.0,
                             accumulate=2)
def main():
    with distributed.process_group(torch.device("cpu")):
        rank, world = distributed.rank(), distributed.world_size()
        trainer = Trainer(without_batchnorm(), recipe, steps_per_epoch=10, num_classes=3)
        for step in range(3):
            images, labels, _, _ = make_batch(seed=step)
            trainer.train_step(Batch(images[rank::world], labels[rank::world], []))
        if rank == 0:
            torch.save(trainer.model.state_dict(), sys.argv[1])
main()  # or what holds the process group would end with the interpreter, which may abort
"""


def test_two_processes_take_the_steps_of_one(tmp_path):
    """The averaged gradient of two halves, in two parts each, is that of the batch."""
    recipe = dataclasses.replace(TINY, precision="float32", cutmix_alpha=0.0, mixup_alpha=0.0)
    trainer = Trainer(without_batchnorm(), recipe, steps_per_epoch=10, num_classes=3)
    for step in range(3):
        trainer.train_step(make_batch(seed=step))
    (tmp_path / "share.py").write_text(SHARE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", "2", tmp_path / "share.py", tmp_path / "w"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(list(map(str, command)), check=True, env=env, capture_output=True, timeout=120)
    weights = torch.load(tmp_path / "w", weights_only=True)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-6)


def test_the_first_bad_step_is_named_with_its_images():
    trainer = Trainer(make_model(), TINY, steps_per_epoch=9, num_classes=3)
    for step, loss in enumerate((1.0, 3.0, math.nan, 1.0, math.inf)):
        trainer.loss_sum += loss
        trainer.recent.append((step, torch.tensor(loss), [7, step]))
    with pytest.raises(DivergedError, match="not finite at step 2;") as error:
        trainer.synchronize()
    assert (error.value.step, error.value.indices) == (2, [7, 2])
    trainer.loss_sum.zero_()
    trainer.recent.clear()
    next(trainer.model.parameters()).data.fill_(math.nan)
    with pytest.raises(DivergedError, match="a weight or a gradient is not finite"):
        trainer.synchronize()


def test_a_run_that_diverges_names_its_images_and_writes_no_checkpoint(folders, tmp_path):
    recipe = dataclasses.replace(TINY, lr_per_1024=1e30, warmup_epochs=0.0)
    data = open_folders(folders, recipe)
    with pytest.raises(DivergedError, match=r"not finite at step \d.* rate \d.*\.JPEG") as error:
        fit(make_model(), data, recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "diverged.json", ".lock"}
    record = json.loads((tmp_path / "run" / "diverged.json").read_text())
    order = np.random.default_rng((1, 0, 0)).permutation(48)[8 * record["step"] :][:8]
    assert record["images"] == [str(data.train.path(i)) for i in order]
    assert record["learning_rate"] == pytest.approx(1e30 / 128 * lr_factor(record["step"], 0, 18))


def test_fit_learns_and_writes_down_what_it_did(folders, tmp_path):
    recipe = dataclasses.replace(
        TINY, epochs=24, lr_per_1024=8.0, cutmix_alpha=0.0, mixup_alpha=0.0, trivial_augment=False
    )
    trainer = fit(make_model(), open_folders(folders, recipe), recipe, tmp_path / "run", workers=1)
    assert trainer.metrics[-1]["ema_val_top1_pct"] > 80  # chance is 33
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert list(table.epoch) == list(range(1, 25))
    assert list(table.step) == [6 * epoch for epoch in range(1, 25)]
    assert not table.isna().any().any()
    assert table.to_dict("records") == [pytest.approx(row) for row in trainer.metrics]
    speed = pd.read_csv(tmp_path / "run" / "speed.csv")
    assert (speed[["train_time_s", "eval_time_s", "train_images_per_s"]] > 0).all().all()


def test_epochs_without_evaluation_train_the_same(folders, tmp_path):
    recipe = dataclasses.replace(TINY, epochs=4)
    found = {}
    for every, evaluated in ((1, [1, 2, 3, 4]), (3, [3, 4]), (0, [4])):
        run_dir = tmp_path / f"every {every}"
        data = open_folders(folders, recipe)
        trainer = fit(make_model(), data, recipe, run_dir, eval_every=every, quiet=True)
        table = pd.read_csv(run_dir / "metrics.csv")
        assert list(table.epoch) == [1, 2, 3, 4]
        assert list(table.dropna().epoch) == evaluated
        best = torch.load(run_dir / "best.pt")["metrics"][-1]
        assert best["ema_val_top1_pct"] == table.ema_val_top1_pct.max()
        found[every] = trainer.metrics[-1]
        plot_curves(table)
    assert found[0] == found[1] == found[3]


@pytest.mark.parametrize(
    ("checkpoint_steps", "optimizer"),
    [(0, "sgd"), (2, "muon")],
    ids=["an epoch's end", "its middle"],
)
def test_resumed_is_uninterrupted(folders, tmp_path, monkeypatch, checkpoint_steps, optimizer):
    """Stopped in the middle of an epoch and started again with other workers: the same bits."""
    recipe = dataclasses.replace(TINY, optimizer=optimizer)
    data = open_folders(folders, recipe, seed=3)
    fit(make_model(), data, recipe, tmp_path / "whole", seed=3)
    train_step, steps = Trainer.train_step, 9
    options = {"seed": 3, "checkpoint_steps": checkpoint_steps}

    def interrupt(self, batch):
        if self.step == steps:
            raise KeyboardInterrupt
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), data, recipe, tmp_path / "parts", **options)
    monkeypatch.setattr(Trainer, "train_step", train_step)
    torch.manual_seed(99)
    torch.rand(7)
    fit(make_model(seed=8), data, recipe, tmp_path / "parts", **options, workers=2)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_unreadable_image_stops_the_run_or_is_listed(folders, tmp_path, monkeypatch):
    names = ["train/n00000000/3.JPEG", "val/n00000002/1.JPEG"]
    root = shutil.copytree(folders, tmp_path / "images")
    for name in names:
        (root / name).write_bytes(b"\xff\xd8 no image")
    recipe = dataclasses.replace(TINY, epochs=2)
    for workers in (0, 1):
        with pytest.raises(CorruptImageError) as error:
            fit(make_model(), open_folders(root, recipe), recipe, tmp_path / "run", workers=workers)
        assert str(root / names[0]) in str(error.value)
        assert "\n" not in str(error.value)
    data = open_folders(root, recipe)
    monkeypatch.setattr("utils.training.loop.PROGRESS_STEPS", 1)
    trainer = fit(make_model(), data, recipe, tmp_path / "run", skip_corrupt=True)
    assert len(trainer.skipped) == 2
    assert all(any(name in message for message in trainer.skipped) for name in names)
    correct = trainer.metrics[-1]["val_top1_pct"] * 17 / 100  # of 18 images one was skipped
    assert correct == pytest.approx(round(correct))


def test_dry_run_prints_a_plan_and_writes_nothing(folders, tmp_path, monkeypatch, capsys):
    """The estimate adds up the times that it prints."""
    monkeypatch.chdir(tmp_path)
    for workers in (0, 1):
        model, data = make_model(), open_folders(folders, TINY)
        total_s = dry_run(model, data, TINY, name="net", workers=workers, device=CPU)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("model: net, 0.25 M parameters with its head, 0.00")
        assert "0.00391 at step 5" in lines[2]  # 0.5 * 8 / 1024, at the end of the warm-up
        times = r"epochs of ([\d.e-]+) s .* 3 evaluations of ([\d.e-]+) s"
        epoch_s, eval_s = map(float, re.search(times, lines[-1]).groups())
        assert total_s == pytest.approx(3 * (epoch_s + eval_s), rel=0.02)
        assert 0 < total_s < 600
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="accumulate=9 must be at most 8, the images per step"):
        dry_run(make_model(), data, dataclasses.replace(TINY, accumulate=9), device=CPU)
