"""The studies of notebooks 04 to 06, a table each: what varies, over which values and seeds.

Sizes are chosen so that a study of real photographs takes two cores about an hour: Imagenette at 64
pixels, a quarter of the width, eight epochs. Test crops are multiples of 32 pixels: with final maps
of 2 x 2 pixels any other size shifts the grid on which the strided convolutions sample.
"""

from dataclasses import replace
from typing import Any

from utils.recipe import RECIPES
from utils.study import Arm, Study

BACKBONE = "cspdarknet19"  # of the studies of the recipe
_SIZES = {
    "epochs": 8,
    "batch_size": 64,
    "lr_per_1024": 2.0,
    "warmup_epochs": 1.0,
    "train_crop_px": 64,
    "eval_resize_px": 73,
    "eval_crop_px": 64,
    "width": 0.25,
}
SHORT = replace(RECIPES["small"], **_SIZES)
THREE, FIVE = (0, 1, 2), (0, 1, 2, 3, 4)

# Each trick on and off. FixRes trains at a smaller size than it tests at.
TRICKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TrivialAugment": ({"trivial_augment": True}, {"trivial_augment": False}),
    "RandomErasing": ({"random_erasing": 0.1}, {"random_erasing": 0.0}),
    "CutMix": ({"cutmix_alpha": 1.0}, {"cutmix_alpha": 0.0}),
    "MixUp": ({"mixup_alpha": 0.2}, {"mixup_alpha": 0.0}),
    "label smoothing": ({"label_smoothing": 0.1}, {"label_smoothing": 0.0}),
    "warm-up": ({"warmup_epochs": 1.0}, {"warmup_epochs": 0.0}),
    "FixRes": ({"train_crop_px": 48}, {"train_crop_px": 64}),
    "no decay on norm": ({"norm_weight_decay": 0.0}, {"norm_weight_decay": 2e-5}),
}
FULL = {name: value for on, _ in TRICKS.values() for name, value in on.items()}
BARE = {name: value for _, off in TRICKS.values() for name, value in off.items()}


def _csp_split() -> Study:
    splits = ("separate", "slice", "partial")
    arms = [Arm(split, "cspdarknet53", {"split": split}) for split in splits]
    arms.append(Arm("no split", "darknet53"))
    return Study("csp_split", "CSP split", "separate", SHORT, tuple(arms), FIVE)


def _vovnet() -> Study:
    versions: dict[str, dict[str, Any]] = {
        "V1": {"residual": False, "ese": False},
        "V1 + residual": {"residual": True, "ese": False},
        "V1 + eSE": {"residual": False, "ese": True},
        "V2": {"residual": True, "ese": True},
        "V2, eSE last": {"residual": True, "ese": "last"},
    }
    arms = tuple(Arm(value, "vovnet39", options) for value, options in versions.items())
    return Study("vovnet", "VoVNet version", "V1", SHORT, arms, FIVE)


def _leave_one_out() -> Study:
    arms = [_trained("full", FULL)]
    arms += [_trained(f"without {name}", {**FULL, **off}) for name, (_, off) in TRICKS.items()]
    return Study("recipe_leave_one_out", "recipe", "full", SHORT, tuple(arms), THREE)


def _add_one() -> Study:
    arms = [_trained("bare", BARE)]
    arms += [_trained(f"with {name}", {**BARE, **on}) for name, (on, _) in TRICKS.items()]
    # Raw weights: EMA is one of the tricks, and comes with every run.
    return Study("recipe_add_one", "recipe", "bare", SHORT, tuple(arms), THREE, weights="raw")


def _trained(value: str, recipe: dict[str, Any]) -> Arm:
    """An arm of a study of the recipe; those that FixRes tells apart are tested at four sizes."""
    sizes_px = (32, 96, 128) if value in ("full", "bare") or "FixRes" in value else ()
    return Arm(value, BACKBONE, recipe=recipe, test_sizes_px=sizes_px)


def _length() -> Study:
    arms = tuple(
        Arm(f"{name}, {epochs} epochs", BACKBONE, recipe={**tricks, "epochs": epochs})
        for epochs in (4, 8, 16)
        for name, tricks in (("small", {}), ("full", FULL))
    )
    return Study("length", "recipe and epochs", "small, 8 epochs", SHORT, arms, THREE)


def networks() -> dict[str, Arm]:
    """An arm for each network that the studies train, by its name."""
    found = {}
    for study in STUDIES.values():
        for arm in study.arms:
            found.setdefault(arm.network, arm)
    return found


STUDIES = {
    study.name: study
    for study in (_csp_split(), _vovnet(), _leave_one_out(), _add_one(), _length())
}
