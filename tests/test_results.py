"""Every number in docs/results.md is in a record under results/."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import torch
from torchvision import models

import backbones
from backbones import create_classifier
from utils.benchmark import RUN, read_benchmark, speed_table
from utils.measure import count_parameters
from utils.recipe import RECIPES, DetectorRecipe
from utils.studies.definitions import FINETUNING, NETWORKS, STARTS, STUDIES, TRANSFER_RATES
from utils.studies.runner import curves_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = " ".join((ROOT / "docs" / "results.md").read_text().split())


PENDING = ("references_rates", "references", "imagenette_20")


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_a_study_is_recorded_completely(study):
    """Every value with the same seeds, at least three, at its test sizes, and every epoch of it."""
    path = ROOT / "results" / f"study_{study.name}.csv"
    if study.name in PENDING:
        assert not path.exists(), f"{path.name} is recorded: remove {study.name} from PENDING"
        pytest.skip("declared and not recorded yet")
    table, curves = pd.read_csv(path), pd.read_csv(curves_path(path))
    seeds = study.seeds[: table.seed.nunique()]
    assert study.tuning or len(seeds) >= 3
    runs = dataclasses.replace(study, seeds=seeds).runs()
    expected = [(v.value, seed, px) for v, seed in runs for px in study.sizes_px(v)]
    found = table[["value", "seed", "test_crop_px"]].itertuples(index=False, name=None)
    assert list(found) == expected
    assert set(table.status) == {"done"}
    epochs = curves.groupby(["value", "seed"]).epoch.agg(["size", "max"])
    assert len(epochs) == len(runs)
    for variant, seed in runs:
        recipe = study.recipe_of(variant)
        assert epochs.loc[(variant.value, seed)].tolist() == [recipe.epochs] * 2
        with torch.device("meta"):
            options = {**variant.options, **recipe.backbone_options}
            classes = 2 if study.name.startswith("finetune") else 10
            net = create_classifier(variant.backbone, classes, **options)
        declared = {
            "network": variant.network,
            "epochs": recipe.epochs,
            "train_crop_px": recipe.train_crop_px,
            **({"lr_per_1024": recipe.lr_per_1024} if "lr_per_1024" in table else {}),
            "parameters": count_parameters(net),  # which hold it to the width
        }
        rows = table[(table.value == variant.value) & (table.seed == seed)]
        assert rows[list(declared)].drop_duplicates().to_dict("records") == [declared]


def test_every_quantity_of_the_benchmark_is_measured_more_than_once():
    table = read_benchmark(ROOT / "results" / "benchmark.csv")
    rounds = table.groupby([*RUN, "implementation"])["round"].agg(["size", "nunique"])
    assert (rounds >= 3).all(axis=None)
    assert len(speed_table(table)) <= 12


def test_published_numbers_of_torchvision_are_those_of_its_weights():
    published = pd.read_csv(ROOT / "results" / "published_imagenet.csv")
    assert published.source.notna().all()
    assert set(published.backbone) <= set(backbones.list_models())
    theirs = published[published.trained_by.str.startswith("torchvision")]
    for row in theirs.itertuples():
        weights = models.get_model_weights(row.backbone)[row.trained_by.split()[1]]
        assert row.top1_pct == weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        assert row.test_crop_px == weights.transforms.keywords["crop_size"]
        assert row.parameters == weights.meta["num_params"]


def test_records_say_how_they_were_made():
    others = ["feature_maps_compared.csv", "published_imagenet.csv"]  # no measurements of ours
    for path in (ROOT / "results").glob("*.csv"):
        if path.name in others or path.name.endswith("_curves.csv"):  # of the record's own runs
            continue
        table = pd.read_csv(path)
        assert {"hardware", "torch", "commit", "command", "threads"} <= set(table)
        assert "autocast" in table or "dtype" in table
        assert not table.isna().any(axis=None), path.name


TUNED = [
    *(("finetune", way, rates, best) for way, (_, rates, best) in FINETUNING.items()),
    *(
        ("transfer", f"{start}, {share:.0%}", rates, best)
        for (start, share), (rates, best) in TRANSFER_RATES.items()
    ),
    *(
        ("initialization", f"{backbone}, last norm {start}", rates, best)
        for start, (rates, by_backbone) in STARTS.items()
        for backbone, best in by_backbone.items()
    ),
    *(("networks", name, rates, best) for name, (*_, rates, best) in NETWORKS.items()),
]


@pytest.mark.parametrize(("study", "value", "rates", "best"), TUNED)
def test_rates_are_the_best_of_their_grids(study, value, rates, best):
    """And not at an edge."""
    table = pd.read_csv(ROOT / "results" / f"study_{study}_rates.csv")
    top1_pct = table.groupby("value")[STUDIES[study].top1_column].mean()
    found = top1_pct[[f"{value}, {rate:g}" for rate in rates]]
    assert found[f"{value}, {best:g}"] == found.max()
    assert best in rates[1:-1]


def test_the_preset_for_short_runs_is_the_best_recipe_of_its_study():
    """Of the recipes without a change, for VoVNet-39; image sizes and width differ."""
    study, preset = STUDIES["short_recipe"], RECIPES["imagenette"]
    table = pd.read_csv(ROOT / "results" / "study_short_recipe.csv").set_index("value")
    bases = study.variants[:4]
    best = max(bases, key=lambda variant: table.top1_raw_pct[variant.value])
    sizes = ("train_crop_px", "eval_resize_px", "eval_crop_px", "width")
    sizes = {name: getattr(preset, name) for name in sizes}
    assert dataclasses.replace(study.recipe_of(best), **sizes) == preset


def test_the_detection_study_is_recorded_completely():
    """Five seeds of both variants, by the recipe and the counts that docs/results.md names."""
    table = pd.read_csv(ROOT / "results" / "detection_sample.csv")
    variants = ("from scratch", "pretrained")
    assert table[["value", "seed"]].values.tolist() == [[a, s] for s in range(5) for a in variants]
    assert set(table.status) == {"done"}
    assert table.map_pct.between(0, table.map50_pct).all()
    (row,) = table[["epochs", "train_images", "val_images", "threads"]].drop_duplicates().values
    epochs, train_images, val_images, threads = row.tolist()
    assert (epochs, threads) == (DetectorRecipe().epochs, 1)
    assert f"{train_images} drawn pictures of {DetectorRecipe().image_px} pixels" in RESULTS
    assert f"for {epochs} epochs" in RESULTS
    assert f"on {val_images} other scenes" in RESULTS
