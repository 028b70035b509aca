"""The studies: what varies, over which values and seeds.

Most train narrow networks on Imagenette at 64 pixels, a few minutes a run. Test crops are multiples
of 32 pixels: with final maps of 2 x 2 pixels any other size shifts the sampling grid of the strided
convolutions.
"""

from dataclasses import replace
from typing import Any

from utils.recipe import RECIPES
from utils.studies.runner import Study, Variant

BACKBONE = "cspdarknet19"  # of the studies of the recipe
SHORT = replace(
    RECIPES["small"],
    epochs=8,
    batch_size=64,
    lr_per_1024=2.0,
    warmup_epochs=1.0,
    train_crop_px=64,
    eval_resize_px=73,
    eval_crop_px=64,
    width=0.25,
)
THREE, FIVE = (0, 1, 2), (0, 1, 2, 3, 4)
TRAIN_PX, LARGER_PX = SHORT.train_crop_px, 96

# Each trick on and off. Two more need no training of their own: EMA weights, and FixRes
# (arXiv:1906.06423), which tests at a larger size than it trains at.
TRICKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "TrivialAugment": ({"trivial_augment": True}, {"trivial_augment": False}),
    "RandomErasing": ({"random_erasing": 0.1}, {"random_erasing": 0.0}),
    "CutMix": ({"cutmix_alpha": 1.0}, {"cutmix_alpha": 0.0}),
    "MixUp": ({"mixup_alpha": 0.2}, {"mixup_alpha": 0.0}),
    "label smoothing": ({"label_smoothing": 0.1}, {"label_smoothing": 0.0}),
    "warm-up": ({"warmup_epochs": 1.0}, {"warmup_epochs": 0.0}),
    "no decay on norm": ({"norm_weight_decay": 0.0}, {"norm_weight_decay": 2e-5}),
}
FULL = {name: value for on, _ in TRICKS.values() for name, value in on.items()}
BARE = {name: value for _, off in TRICKS.values() for name, value in off.items()}


# Initial weights of each block's last norm: the rates per 1024 images that were tried, and the best
# of them for each network.
STARTS: dict[float, tuple[tuple[float, ...], dict[str, float]]] = {
    1.0: (
        (2.0, 0.8, 0.3, 0.1, 0.03),
        {"darknet53": 0.1, "cspdarknet53": 0.8, "vovnet57": 0.8},
    ),
    0.2: (
        (8.0, 4.0, 2.0, 0.8, 0.3, 0.1),
        {"darknet53": 0.8, "cspdarknet53": 4.0, "vovnet57": 2.0},
    ),
    0.05: (
        (4.0, 2.0, 0.8, 0.3),
        {"darknet53": 0.8, "cspdarknet53": 0.8, "vovnet57": 2.0},
    ),
}


def _initialization(name: str, tuning: bool) -> Study:
    """The initial weight of each block's last norm, with its own learning rate."""
    variants = tuple(
        Variant(
            f"{backbone}, last norm {start}, {rate:g}",
            backbone,
            {"last_norm": start},
            {"lr_per_1024": rate},
        )
        for backbone in ("darknet53", "cspdarknet53", "vovnet57")
        for start, (rates, best) in STARTS.items()
        for rate in (rates if tuning else (best[backbone],))
    )
    recipe = replace(SHORT, epochs=4, trivial_augment=False, min_crop_area=0.35)
    seeds, baseline = (0,) if tuning else FIVE, variants[0].value
    return Study(name, "last norm", baseline, recipe, variants, seeds, "raw", tuning=tuning)


# Five epochs of SGD, from which the study short_recipe departs.
FIVE_EPOCHS = replace(
    SHORT,
    epochs=5,
    trivial_augment=False,
    min_crop_area=0.35,
    label_smoothing=0.1,
    nesterov=True,
    weight_decay=5e-5,
    lr_per_1024=4.0,
)


def _short_recipe() -> Study:
    """What a run of five epochs needs, one change at a time from four recipes."""
    flat = {"flat_share": 0.7}
    adamw = {**flat, "optimizer": "adamw", "nesterov": False, "weight_decay": 0.05}
    bases: dict[str, dict[str, Any]] = {
        "SGD": {},
        "AdamW": {**adamw, "lr_per_1024": 0.032},
        "SGD, flat 0.7": flat,
        "Muon": {**adamw, "optimizer": "muon", "momentum": 0.95, "lr_per_1024": 0.128},
    }
    of_both: dict[str, dict[str, Any]] = {  # of AdamW and Muon
        "flat 0": {"flat_share": 0.0},
        "flat 0.4": {"flat_share": 0.4},
        "weight decay 0.2": {"weight_decay": 0.2},
        "crops from 0.2": {"min_crop_area": 0.2},
        "crops from 0.6": {"min_crop_area": 0.6},
    }
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "SGD": {
            "half the rate": {"lr_per_1024": 2.0},
            "twice the rate": {"lr_per_1024": 8.0},
            "without Nesterov": {"nesterov": False},
            "weight decay 2e-4": {"weight_decay": 2e-4},
            "TrivialAugment": {"trivial_augment": True},
        },
        "AdamW": {
            "half the rate": {"lr_per_1024": 0.016},
            "twice the rate": {"lr_per_1024": 0.064},
            **of_both,
        },
        "SGD, flat 0.7": {
            "half the rate": {"lr_per_1024": 2.0},
            "twice the rate": {"lr_per_1024": 8.0},
            "flat 0.5": {"flat_share": 0.5},
            "crops from 0.6": {"min_crop_area": 0.6},
        },
        "Muon": {
            "a quarter of the rate": {"lr_per_1024": 0.032},
            "half the rate": {"lr_per_1024": 0.064},
            "twice the rate": {"lr_per_1024": 0.256},
            "four times the rate": {"lr_per_1024": 0.512},
            "momentum 0.9": {"momentum": 0.9},
            **of_both,
        },
    }
    shared = {"batch 32": {"batch_size": 32}, "no label smoothing": {"label_smoothing": 0.0}}
    variants = [Variant(name, "vovnet39", {}, base) for name, base in bases.items()]
    for name, base in bases.items():
        for title, change in {**changes[name], **shared}.items():
            variants.append(Variant(f"{name}, {title}", "vovnet39", {}, {**base, **change}))
    for name in ("AdamW", "SGD, flat 0.7", "Muon"):
        for act in ("silu", "mish"):
            variants.append(Variant(f"{name}, {act}", "vovnet39", {"act": act}, bases[name]))
    for backbone, width in (("resnet18", 1.0), ("cspdarknet53", 0.25)):
        for name, base in bases.items():
            variants.append(Variant(f"{backbone}, {name}", backbone, {}, {**base, "width": width}))
    settings = {"tuning": True, "held_out_share": 0.25}
    return Study("short_recipe", "recipe", "SGD", FIVE_EPOCHS, tuple(variants), (0,), **settings)


# The tuned recipe at a quarter of the width and 64 pixels; torchvision's networks have full width.
NARROW = replace(
    RECIPES["imagenette"], train_crop_px=64, eval_resize_px=73, eval_crop_px=64, width=0.25
)
V1, FULL_WIDTH = {"residual": False, "ese": False}, {"width": 1.0}
RATES = (0.064, 0.16, 0.4)  # per 1024 images; one more where the best of these is at an edge
LOWER, HIGHER = (0.025, *RATES), (*RATES, 1.0)
# Backbone, its options, changes of the recipe, the rates that are tried, and the best of them.
Networks = dict[str, tuple[str, dict[str, Any], dict[str, Any], tuple[float, ...], float]]
NETWORKS: Networks = {
    "CSPDarknet-53": ("cspdarknet53", {}, {}, LOWER, 0.064),
    "CSPDarknet-53, partial": ("cspdarknet53", {"split": "partial"}, {}, HIGHER, 0.4),
    "Darknet-53": ("darknet53", {}, {}, HIGHER, 0.4),
    "Darknet-53, narrow": ("darknet53", {}, {"width": 0.2}, HIGHER, 0.4),  # CSPDarknet-53's MACs
    "VoVNet-57 V1": ("vovnet57", V1, {}, HIGHER, 0.4),
    "VoVNet-57 V1 + residual": ("vovnet57", {"ese": False}, {}, HIGHER, 0.4),
    "VoVNet-57 V1 + eSE": ("vovnet57", {"residual": False}, {}, HIGHER, 0.4),
    "VoVNet-57": ("vovnet57", {}, {}, RATES, 0.16),
}
# Comparisons among them, the first of each the baseline.
GROUPS = {"CSP split": tuple(NETWORKS)[:4], "VoVNet version": tuple(NETWORKS)[4:]}
REFERENCES: Networks = {  # the best rates are not known until references_rates is recorded
    "ResNet-18": ("resnet18", {}, FULL_WIDTH, LOWER, 0.16),
    "ResNet-50": ("resnet50", {}, FULL_WIDTH, RATES, 0.16),
    "MobileNetV2": ("mobilenet_v2", {}, FULL_WIDTH, RATES, 0.16),
    "Darknet-19": ("darknet19", {}, {}, HIGHER, 0.16),
    "CSPDarknet-19": ("cspdarknet19", {}, {}, RATES, 0.16),
    "VoVNet-39 V1": ("vovnet39", V1, {}, RATES, 0.16),
    "VoVNet-39": ("vovnet39", {}, {}, RATES, 0.16),
}


def _networks(name: str, networks: Networks, seeds: tuple[int, ...], tuning: bool = False) -> Study:
    """Networks under one recipe, each at its own learning rate."""
    variants = tuple(
        Variant(
            f"{value}, {rate:g}" if tuning else value,
            backbone,
            options,
            {**changes, "lr_per_1024": rate},
        )
        for value, (backbone, options, changes, rates, best) in networks.items()
        for rate in (rates if tuning else (best,))
    )
    settings = {"tuning": True, "held_out_share": 0.25} if tuning else {}
    baseline = variants[0].value
    return Study(name, "network", baseline, NARROW, variants, seeds, "raw", **settings)


def _noise_floor() -> Study:
    """Two forms of one function (`backbones.darknet.convert_split`): all differences are noise.

    With SGD: Muon orthogonalizes whole kernels, of which "separate" has two for one of "slice".
    """
    recipe = replace(FIVE_EPOCHS, flat_share=0.7)
    splits = ("separate", "slice")
    variants = tuple(Variant(split, BACKBONE, {"split": split}) for split in splits)
    return Study("noise_floor", "split", "separate", recipe, variants, tuple(range(25)), "raw")


def _imagenette(epochs: int) -> Study:
    """Full width at 128 pixels, as on Imagenette's leaderboard (github.com/fastai/imagenette)."""
    variant = Variant("VoVNet-39", "vovnet39", {"act": "silu"})
    recipe = replace(RECIPES["imagenette"], epochs=epochs)
    return Study(f"imagenette_{epochs}", "network", variant.value, recipe, (variant,), FIVE)


def _leave_one_out() -> Study:
    variants = [Variant("full", BACKBONE, recipe=FULL, test_sizes_px=(TRAIN_PX,))]
    for name, (_, off) in TRICKS.items():
        variants.append(Variant(f"without {name}", BACKBONE, recipe={**FULL, **off}))
    recipe, name = SHORT.tested_at(LARGER_PX), "recipe_leave_one_out"
    extra = {"without EMA": ("raw", LARGER_PX), "without FixRes": ("ema", TRAIN_PX)}
    return Study(name, "recipe", "full", recipe, tuple(variants), THREE, extra_evaluations=extra)


def _add_one() -> Study:
    variants = [Variant("bare", BACKBONE, recipe=BARE, test_sizes_px=(LARGER_PX,))]
    for name, (on, _) in TRICKS.items():
        variants.append(Variant(f"with {name}", BACKBONE, recipe={**BARE, **on}))
    extra = {"with EMA": ("ema", TRAIN_PX), "with FixRes": ("raw", LARGER_PX)}
    return Study("recipe_add_one", "recipe", "bare", SHORT, tuple(variants), THREE, "raw", extra)


def _fixres() -> Study:
    variants = tuple(
        Variant(f"trained at {px} px", BACKBONE, {}, {"train_crop_px": px}, (64, 128, 160))
        for px in (LARGER_PX, TRAIN_PX)
    )
    recipe, baseline = SHORT.tested_at(LARGER_PX), variants[0].value
    return Study("fixres", "training size", baseline, recipe, variants, THREE)


def _length() -> Study:
    variants = tuple(
        Variant(f"{name}, {epochs} epochs", BACKBONE, recipe={**tricks, "epochs": epochs})
        for epochs in (3, 6, 12)
        for name, tricks in (("small", {}), ("full", FULL))
    )
    return Study("length", "recipe and epochs", "small, 6 epochs", SHORT, variants, THREE)


# Ways of fine-tuning: what is trained, the rates of the head per 1024 images, and the best of them.
FINETUNING: dict[str, tuple[dict[str, Any], tuple[float, ...], float]] = {
    "from scratch": ({}, (0.064, 0.256, 1.0, 4.0), 1.0),
    "frozen features": ({"freeze": 5}, (0.032, 0.128, 0.512), 0.128),
    "all layers": ({}, (0.008, 0.032, 0.128), 0.032),
    "discriminative rates": ({"backbone_lr_factor": 0.1}, (0.016, 0.064, 0.256, 1.0), 0.064),
}


def _finetune(name: str, tuning: bool) -> Study:
    """Ways of fine-tuning, each at its best rate; those are chosen on a quarter of the images."""
    variants = tuple(
        Variant(
            f"{way}, {rate:g}" if tuning else way,
            "mobilenet_v2",
            recipe={**settings, "lr_per_1024": rate},
            pretrained=way != "from scratch",
        )
        for way, (settings, rates, best) in FINETUNING.items()
        for rate in (rates if tuning else (best,))
    )
    baseline = variants[0].value if tuning else "frozen features"
    options = {"tuning": True, "held_out_share": 0.25} if tuning else {}
    seeds = (0,) if tuning else FIVE
    recipe = RECIPES["finetune"]
    return Study(name, "fine-tuning", baseline, recipe, variants, seeds, **options)


# Training on a share of Imagenette's images, from random weights or those of a backbone trained on
# the embedded sample: rates per 1024 images, and the best of them.
TRANSFER_RATES = {
    ("scratch", 0.01): ((0.5, 2.0, 8.0), 2.0),
    ("sample", 0.01): ((0.5, 2.0, 8.0), 2.0),
    ("scratch", 0.1): ((0.125, 0.5, 2.0, 8.0), 0.5),
    ("sample", 0.1): ((0.5, 2.0, 8.0, 32.0), 8.0),
    ("scratch", 1.0): ((0.5, 2.0, 8.0), 2.0),
    ("sample", 1.0): ((0.5, 2.0, 8.0, 32.0), 8.0),
}


def _transfer(name: str, tuning: bool) -> Study:
    """Shares of Imagenette from the embedded sample's weights or from scratch."""
    recipe = replace(SHORT, batch_size=32, trivial_augment=False, min_crop_area=0.35)
    epochs = {0.01: 60, 0.1: 24, 1.0: 6}
    variants = tuple(
        Variant(
            f"{start}, {share:.0%}, {rate:g}",
            BACKBONE,
            recipe={"epochs": epochs[share], "lr_per_1024": rate},
            pretrained=start == "sample",
            train_share=share,
        )
        for (start, share), (rates, best) in TRANSFER_RATES.items()
        for rate in (rates if tuning else (best,))
    )
    factor, baseline = "start and share of the images", variants[0].value
    seeds = (0,) if tuning else FIVE
    return Study(name, factor, baseline, recipe, variants, seeds, tuning=tuning)


STUDIES = {
    study.name: study
    for study in (
        _initialization("initialization_rates", tuning=True),
        _initialization("initialization", tuning=False),
        _networks("networks_rates", NETWORKS, (0,), tuning=True),
        _networks("networks", NETWORKS, (*FIVE, 5)),
        _networks("references_rates", REFERENCES, (0,), tuning=True),
        _networks("references", REFERENCES, THREE),
        *(_imagenette(5), _imagenette(20), _noise_floor()),
        *(_short_recipe(), _leave_one_out(), _add_one(), _fixres(), _length()),
        *(_finetune("finetune_rates", tuning=True), _finetune("finetune", tuning=False)),
        *(_transfer("transfer_rates", tuning=True), _transfer("transfer", tuning=False)),
    )
}
