"""The recipe's values, its errors and its command-line flags."""

import argparse
import dataclasses
import re

import pytest

from utils import recipe
from utils.recipe import RECIPES, DetectorRecipe, Recipe


def test_imagenet_preset_is_the_designs():
    expected = {
        "epochs": 100, "batch_size": 1024, "lr_per_1024": 0.5, "momentum": 0.9,
        "weight_decay": 2e-5, "norm_weight_decay": 0.0, "warmup_epochs": 5.0,
        "label_smoothing": 0.1, "train_crop_px": 176, "accumulate": 1, "min_crop_area": 0.08,
        "eval_resize_px": 232, "eval_crop_px": 224, "trivial_augment": True,
        "random_erasing": 0.1, "cutmix_alpha": 1.0, "mixup_alpha": 0.2, "ema_decay": 0.9998,
        "width": 1.0, "precision": "bf16", "channels_last": True,
        "optimizer": "sgd", "nesterov": False, "flat_share": 0.0,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        "eval_interpolation": "bilinear", "freeze": -1,
        "backbone_lr_factor": 1.0, "class_weights": False,
    }  # fmt: skip
    assert dataclasses.asdict(RECIPES["imagenet"]) == expected


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("small", {"random_erasing", "cutmix_alpha", "mixup_alpha", "label_smoothing"}),
        ("large", {"train_crop_px", "batch_size"}),
    ],
)
def test_presets_change_what_they_say(name, changed):
    base, other = (dataclasses.asdict(RECIPES[n]) for n in ("imagenet", name))
    assert {key for key in base if base[key] != other[key]} == changed


def test_learning_rate_is_linear_in_the_batch_size():
    assert Recipe(batch_size=1024).peak_lr == 0.5
    assert Recipe(batch_size=256).peak_lr == 0.125


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("epochs", 1.5, "of type int"),
        ("lr_per_1024", float("nan"), "a finite number"),
        ("lr_per_1024", 0, "above 0"),
        ("momentum", 1.0, r"in \[0, 1\)"),
        ("weight_decay", -1e-5, "at least 0"),
        ("random_erasing", 1.1, r"in \[0, 1\]"),
        ("min_crop_area", 0, r"in \(0, 1\]"),
        ("warmup_epochs", 100, "below epochs=100"),
        ("train_crop_px", 5000, "at least 1 and at most 4096"),
        ("eval_resize_px", 200, "at least eval_crop_px"),
        ("precision", "fp8", "one of"),
        ("trivial_augment", 1, "of type bool"),
        ("freeze", -2, "at least -1"),
        ("mean", (0.5, 0.5), "three finite numbers"),
        ("std", (1, 1, 0), r"in \(0, 1\]"),
        ("mean", (123.675, 116.28, 103.53), r"in \[0, 1\]"),
    ],
)
def test_bad_values_are_named(field, value, wanted):
    with pytest.raises(ValueError, match=f"{field}={re.escape(repr(value))} must be {wanted}"):
        Recipe(**{field: value})


def parse(argv, preset):
    parser = argparse.ArgumentParser()
    recipe.add_arguments(parser, preset)
    return recipe.from_arguments(parser.parse_args(argv), preset)


def test_fields_are_flags_that_override_the_preset():
    """One of each type."""
    assert parse([], "quick") == RECIPES["quick"]
    argv = ["--epochs", "7", "--lr-per-1024", "0.25", "--optimizer", "muon"]
    argv += ["--no-trivial-augment", "--mean", "0.5", "0.25", "1"]
    given = {"epochs": 7, "lr_per_1024": 0.25, "optimizer": "muon", "trivial_augment": False}
    expected = dataclasses.replace(RECIPES["small"], **given, mean=(0.5, 0.25, 1.0))
    assert parse(argv, "small") == expected


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (Recipe, {"optimizer": "muon", "precision": "fp16"}, "'fp16' must be bf16 or float32"),
        (DetectorRecipe, {"lr": float("inf")}, "lr=inf must be"),
    ],
)
def test_other_bad_recipes(kind, values, words):
    with pytest.raises(ValueError, match=words):
        kind(**values)
