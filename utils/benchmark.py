"""Interleaved timing against timm and torchvision in four runtimes; training time to an accuracy.

The trainers of the baselines are in `utils.baselines`, written after the projects' training
scripts, which their packages lack.
"""

import itertools
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy import stats
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from backbones import create, create_classifier
from backbones.deploy import NamedOutputs, optimize
from utils import measure
from utils.baselines import (
    REFERENCES,
    TRAINERS,
    import_timm,
    timm_step,
    torchvision_loader,
    torchvision_step,
)
from utils.data import sample
from utils.data.folders import Batch, ImageFiles, Preprocess, hold_out, open_folders
from utils.data.transforms import train_transform
from utils.exporting import (
    Settings,
    optimized_graph,
    read_onnx,
    read_openvino,
    to_onnx,
    to_openvino,
)
from utils.recipe import RECIPES, Recipe
from utils.records import write_table
from utils.studies.runner import HELD_OUT_SHARE
from utils.training.evaluation import MAX_BATCH_SIZE, autocast_dtype, dtype_name, evaluate
from utils.training.loop import Trainer

Rows = list[dict[str, Any]]
# Rows that agree in these columns are measured, and replaced, together.
RUN = ["task", "network", "quantity", "batch_size", "image_px", "threads", "hardware"]
# Settings that training runs are compared at, and what identifies a learning curve.
SETTING = ["network", "batch_size", "train_px", "epochs", "lr_factor", "threads"]
CURVE = ["implementation", "recipe", *SETTING, "seed", "hardware"]
NUM_CLASSES = 10
PEAK_ROUNDS = 3

_VOVNET = {"ese": "last", "stem_stride": 4}
# Our names to timm's, with the options that make ours the same function.
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "cspdarknet53": ("cspdarknet53", {"layout": "darknet", "act": "leaky_relu_0.01"}),
    "darknet53": ("darknet53", {"act": "leaky_relu_0.01"}),
    "vovnet19_slim": ("ese_vovnet19b_slim", _VOVNET),
    **{f"vovnet{depth}": (f"ese_vovnet{depth}b", _VOVNET) for depth in (39, 57, 99)},
    **{f"resnet{depth}": (f"resnet{depth}", {}) for depth in (18, 50)},
    "mobilenet_v3_large": ("mobilenetv3_large_100", {}),
    "efficientnet_b0": ("efficientnet_b0", {"tap": "block"}),
}
# What each task compares; the first is the reference of ratios.
IMPLEMENTATIONS = {
    "inference": (
        "timm float32",
        "ours float32",
        "timm channels_last float32",
        "ours bfloat16",
        "timm channels_last bfloat16",
    ),
    "step": ("torchvision float32", "timm bfloat16", "ours bfloat16"),
    "input": ("torchvision float32", "ours float32"),
}
COMPILED = [
    f"{whose} compiled {dtype}"
    for dtype in ("float32", "bfloat16")
    for whose in ("ours", "timm channels_last")
]
EXPORTED = [
    f"{whose} {runtime}"
    for runtime in (
        "ONNX Runtime float32",
        "ONNX Runtime int8",
        "OpenVINO float32",
        "OpenVINO bfloat16",
    )
    for whose in ("ours", "timm")
]


@dataclass(frozen=True)
class Case:
    """What is measured: columns of a record. Training follows the preset "imagenet" at its sizes.

    Args:
        network: a key of `SHARED`.
        implementation: ends with its dtype.
    """

    task: str
    network: str
    batch_size: int
    image_px: int
    device: str = "cpu"
    implementation: str = "ours float32"

    @property
    def recipe(self) -> Recipe:
        sizes = {"batch_size": self.batch_size, "train_crop_px": self.image_px}
        return replace(RECIPES["imagenet"], **sizes)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.implementation.split()[-1])

    def batch(self) -> tuple[Tensor, Tensor]:
        """Random images and labels."""
        images = torch.randn(self.batch_size, 3, self.image_px, self.image_px)
        labels = torch.randint(NUM_CLASSES, (self.batch_size,))
        return images.to(self.device), labels.to(self.device)


def run(case: Case, rounds: int, compile: bool = False, peaks: bool = False) -> Rows:
    """Measures the implementations of a task.

    Args:
        case: gives the task ("inference", "step" or "input"), the network and the sizes.
        compile: also measure compiled networks.
        peaks: also measure peak memory, on a CPU.
    """
    names = list(IMPLEMENTATIONS[case.task])
    if case.task == "inference":
        names += COMPILED if compile else []
        names += ["torchvision float32"] if case.network.startswith("resnet") else []
        if case.device == "cpu":
            has_openvino = find_spec("openvino") is not None
            names += [name for name in EXPORTED if has_openvino or "OpenVINO" not in name]
    if autocast_dtype(torch.device(case.device), "bf16") is None:  # emulated, so slow
        names = dict.fromkeys(name.replace("bfloat16", "float32") for name in names)
    torch.compiler.reset()  # a ninth graph of timm's forward would silently run uncompiled
    cases = [replace(case, implementation=name) for name in names]
    prepare = {"inference": inference_call, "step": step_call, "input": input_call}[case.task]
    times_s, rows = measure.time_interleaved({each: prepare(each) for each in cases}, rounds), []
    for each in cases:
        times_ms = [1e3 * time_s / each.batch_size for time_s in times_s[each]]
        rows += tidy(each, case.task, "ms/image", times_ms)
        # A compiler or exporter would change the peak of the process.
        words = {"compiled", "ONNX", "OpenVINO"} & set(each.implementation.split())
        if peaks and case.task != "input" and not words:
            # The second step needs the most memory: the first has allocated the momentum.
            peak = partial(measure.peak_memory, prepare, each, calls=2)
            found = [peak() / 2**20 for _ in range(PEAK_ROUNDS)]
            rows += tidy(each, f"{case.task} peak", "MiB", found)
    return rows


def tidy(case: Case, quantity: str, unit: str, values: Sequence[float]) -> Rows:
    """A row per round, with six significant digits."""
    facts = {**vars(case), "dtype": dtype_name(case.dtype), "quantity": quantity, "unit": unit}
    return [{**facts, "round": k, "value": float(f"{v:.6g}")} for k, v in enumerate(values)]


def inference_call(case: Case) -> measure.Call:
    """Feature maps of random images by random weights, which share dtype and memory format."""
    (images, _), name, words = case.batch(), case.network, case.implementation.split()
    if {"ONNX", "OpenVINO"} & set(words):
        return exported_call(case, images)
    if "ours" in words:
        net = optimize(create(name, **SHARED[name][1]), case.dtype, "compiled" in words)
        return measure.forward(net, images.to(case.dtype, memory_format=torch.channels_last))
    if "torchvision" in words:
        nodes = ["relu", "layer1", "layer2", "layer3", "layer4"]
        return measure.forward(create_feature_extractor(models.get_model(name), nodes), images)
    net = timm_network(case, features_only=True)
    if "channels_last" in words:
        net, images = (x.to(case.dtype, memory_format=torch.channels_last) for x in (net, images))
    return measure.forward(net, images, compile="compiled" in words)


def exported_call(case: Case, images: Tensor) -> measure.Call:
    """Our optimized graph, or timm's, in ONNX Runtime or OpenVINO."""
    if case.implementation.startswith("ours"):
        net = NamedOutputs(optimized_graph(create(case.network, **SHARED[case.network][1])))
    else:
        theirs = timm_network(case, features_only=True)
        theirs.in_channels = 3  # which `NamedOutputs` asks for
        net = NamedOutputs(theirs)
        net.names = [f"map_{k}" for k in range(len(theirs.feature_info))]
    net, (count, _, *sides) = net.eval(), images.shape
    settings = Settings((count, *sides), int8=images if case.dtype is torch.int8 else None)
    if "OpenVINO" in case.implementation:
        return partial(read_openvino(to_openvino(net, settings), net, case.dtype), images)
    return partial(read_onnx(to_onnx(net, settings), net), images)


def timm_network(case: Case, **options: Any) -> nn.Module:
    """timm's network, with random weights."""
    return import_timm().create_model(SHARED[case.network][0], **options).to(case.device)


def step_call(case: Case) -> measure.Call:
    """A step from a batch in memory to updated weights, of our network or of timm's.

    All follow the recipe's label smoothing, weight decay and momentum; ours alone mixes images and
    updates its EMA in every step.
    """
    torch.manual_seed(0)
    if case.implementation.startswith("timm"):
        return baseline_step(case, timm_network(case, num_classes=NUM_CLASSES))
    if case.implementation.startswith("torchvision"):
        return baseline_step(case, classifier(case))
    trainer = Trainer(classifier(case).train(), case.recipe, 10**6, NUM_CLASSES)
    images, labels = case.batch()
    pixels = torch.randint(256, images.shape, dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as our loader gives them
    batch = Batch(pixels, labels.cpu(), [])
    return lambda: trainer.train_step(batch).item()


def baseline_step(case: Case, model: nn.Module) -> measure.Call:
    """The loop body of another project's script, with --model-ema of torchvision's; plain SGD."""
    model.train()
    if case.implementation.startswith("timm"):
        step, _ = timm_step(model, case.recipe, "momentum")
    else:
        step, _ = torchvision_step(model, case.recipe, ema=True)
    return partial(step, *case.batch())


def classifier(case: Case, num_classes: int = NUM_CLASSES) -> nn.Module:
    """Our classifier for a network of `SHARED`."""
    return create_classifier(case.network, num_classes, **SHARED[case.network][1]).to(case.device)


def input_call(case: Case) -> measure.Call:
    """The next batch, decoded from JPEG files, augmented and normalised in this process."""
    folder = tempfile.TemporaryDirectory()
    draw_jpegs(Path(folder.name) / "images")
    if case.implementation.startswith("torchvision"):
        loader, preprocess = torchvision_loader(folder.name, case.recipe, drop_last=True), list
    else:
        images = ImageFiles(Path(folder.name), ["images"], train_transform(case.recipe))
        loader = images.train_loader(case.batch_size, 0)
        preprocess = Preprocess(torch.device(case.device), case.recipe)
    batches = map(preprocess, itertools.chain.from_iterable(itertools.repeat(loader)))
    call = partial(next, batches)
    call.folder = folder  # is removed with the call
    return call


def draw_jpegs(folder: Path, count: int = 128) -> None:
    """Draws images of the embedded sample as JPEG files of ImageNet's size: 500 x 375 px, 110 kB.

    Enlarged images compress too well; noise, like that of a camera, makes up for it.
    """
    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng(i)
        drawn, _ = sample.render(rng, class_index=i % len(sample.CLASSES))
        pixels = np.asarray(drawn.resize((500, 375), Image.Resampling.BICUBIC))
        pixels = (pixels + rng.normal(0, 6, (375, 500, 1))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.JPEG", quality=97)


# ---- training time to an accuracy ----------------------------------------------------------------


@dataclass(frozen=True)
class TrainingRun(Case):
    """A training run by an implementation of `utils.baselines.TRAINERS`, on its own recipe.

    Args:
        lr_factor: multiplies the peak learning rate of the recipe.
        preset: our recipe, a key of `RECIPES`.
        workers: decoding processes of torchvision and timm.
    """

    epochs: int = 1
    lr_factor: float = 1.0
    preset: str = "imagenet"
    seed: int = 0
    workers: int = 0

    @property
    def recipe(self) -> Recipe:
        """At the sizes of the run; the warm-up keeps its share of the epochs."""
        recipe = REFERENCES.get(self.implementation, RECIPES[self.preset])
        return replace(
            recipe,
            epochs=self.epochs,
            warmup_epochs=recipe.warmup_epochs * self.epochs / recipe.epochs,
            batch_size=self.batch_size,
            train_crop_px=self.image_px,
            lr_per_1024=float(f"{self.lr_factor * recipe.lr_per_1024:.6g}"),
            width=1.0,
        )

    @property
    def eval_recipe(self) -> Recipe:
        """The test crop keeps the preset's ratio to the training crop, in steps of 32 pixels."""
        recipe = RECIPES[self.preset]
        if self.image_px == recipe.train_crop_px:
            return recipe
        ratio = recipe.eval_crop_px / recipe.train_crop_px
        return recipe.tested_at(32 * max(1, round(self.image_px * ratio / 32)))

    def model(self, num_classes: int) -> nn.Module:
        """The project's own network, or ours where torchvision has none."""
        if self.implementation == "timm":
            return timm_network(self, num_classes=num_classes)
        if self.implementation == "torchvision" and self.network in models.list_models():
            return models.get_model(self.network, num_classes=num_classes).to(self.device)
        return classifier(self, num_classes)

    def facts(self) -> dict[str, Any]:
        """Columns of a record. torchvision's script has autocast on GPUs only, to float16."""
        precision = "float32" if self.implementation == "torchvision" else self.recipe.precision
        dtype = autocast_dtype(torch.device(self.device), precision)
        return {
            **{name: getattr(self, name) for name in ("task", "implementation", "network")},
            "recipe": "reference" if self.implementation in REFERENCES else self.preset,
            "lr_factor": self.lr_factor,
            "lr_per_1024": self.recipe.lr_per_1024,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "train_px": self.image_px,
            "test_px": self.eval_recipe.eval_crop_px,
            "workers": 0 if self.implementation == "ours" else self.workers,
            "dtype": dtype_name(dtype),
            "seed": self.seed,
        }


def learning_curve(run: TrainingRun, data_dir: Path) -> Rows:
    """Trains, and returns a row per epoch: the accuracy, and the training time so far.

    `HELD_OUT_SHARE` of the training images is left out of training; the accuracy is
    that on these, in float32, of `weights`. The time holds everything but making the network and
    the evaluation.
    """
    data = hold_out(open_folders(data_dir, run.recipe, run.seed), run.eval_recipe, HELD_OUT_SHARE)
    random.seed(run.seed)
    np.random.seed(run.seed)
    torch.manual_seed(run.seed)
    model, rows, train_time_s = run.model(len(data.classes)), [], 0.0
    preprocess = Preprocess(torch.device(run.device), run.eval_recipe)
    loader = data.val.eval_loader(min(run.batch_size, MAX_BATCH_SIZE), 0)
    with tempfile.TemporaryDirectory() as folder:
        for index, label in enumerate(data.train.labels):
            path = data.train.path(index)
            link = Path(folder, data.classes[label], f"{index:07d}{path.suffix}")
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(path.resolve())
        trainer = TRAINERS[run.implementation]
        epochs = trainer(model, run.recipe, data.train, Path(folder), run.workers)
        for epoch in range(1, run.epochs + 1):
            start_s = time.perf_counter()
            trained = next(epochs)
            train_time_s += time.perf_counter() - start_s
            found = evaluate(trained, loader, preprocess, len(data.classes))
            top1_pct = {name: round(each["top1_pct"], 3) for name, each in found.items()}
            weights = list(trained)[-1]
            row = {"epoch": epoch, "weights": weights, "top1_pct": top1_pct[weights]}
            row |= {"top1_raw_pct": top1_pct["raw"], "train_time_s": round(train_time_s, 3)}
            rows.append({**run.facts(), **row})
    return rows


def time_to_accuracy(table: pd.DataFrame, target_pct: float) -> pd.DataFrame:
    """A row per run: the final accuracy, and the minutes of training until the target.

    Minutes are NaN where no epoch reaches it.
    """
    keys = [name for name in CURVE if name != "hardware"]
    reached = table[table.top1_pct >= target_pct].groupby(keys, sort=False)
    minutes = (reached.train_time_s.first() / 60).rename("minutes")
    finals = table.groupby(keys, sort=False)[["top1_pct", "top1_raw_pct"]].last()
    return finals.join(minutes).reset_index()


def accuracy_differences(finals: pd.DataFrame) -> pd.DataFrame:
    """Final accuracy of ours minus each baseline's, with Welch's 90 % interval over seeds.

    Args:
        finals: of `time_to_accuracy`. Settings with one seed of either are left out.
    """
    rows = []
    for setting, group in finals.groupby(SETTING, sort=False):
        for name, column in itertools.product(REFERENCES, ("top1_pct", "top1_raw_pct")):
            ours, other = (group[group.implementation == who][column] for who in ("ours", name))
            if min(len(ours), len(other)) < 2:
                continue
            low, high = stats.ttest_ind(ours, other, equal_var=False).confidence_interval(0.9)
            difference = ours.mean() - other.mean()
            found = {"ours minus": name, "of": column, "difference": difference, "low": low}
            found |= {"high": high, "seeds": f"{len(ours)} and {len(other)}"}
            rows.append({**dict(zip(SETTING, setting, strict=True)), **found})
    return pd.DataFrame(rows)


# ---- records -------------------------------------------------------------------------------------


def read_benchmark(path: Path, key: Sequence[str] = RUN) -> pd.DataFrame:
    """Reads a table that `save` wrote with this key. Raises ValueError for any other file."""
    try:
        table = pd.read_csv(path, dtype={"commit": str})  # some are all digits
    except ValueError:
        table = pd.DataFrame()
    if not set(key) <= set(table):
        raise ValueError(f"{path} is not a table of scripts/benchmark.py; choose another --output")
    return table


def save(path: Path, rows: Rows, key: list[str] = RUN) -> None:
    """Adds rows to a table, in place of those that agree with them in `key`."""
    table = pd.DataFrame(rows)
    if path.exists():
        old = read_benchmark(path, key)
        replaced = old.set_index(key).index.isin(table.set_index(key).index)
        table = pd.concat([old[~replaced], table])
    write_table(path, table.to_dict("records"))


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """How many times as fast as its run's reference each implementation is, within each round.

    Returns:
        A row per run and implementation: columns `RUN`, `implementation`, `unit`, the median
        `value`, and `ratio_median`, `ratio_min` and `ratio_max`.
    """
    reference = table.groupby([*RUN, "round"]).value.transform("first")
    table = table.assign(ratio=reference / table.value)
    groups = table.groupby([*RUN, "implementation", "unit"], sort=False)
    spread = groups.ratio.agg(["median", "min", "max"]).add_prefix("ratio_")
    return groups.value.median().to_frame().join(spread).reset_index()


def speed_table(table: pd.DataFrame) -> pd.DataFrame:
    """README's table: our fastest form and the fastest baseline, each against the run's reference.

    Args:
        table: the record of `read_benchmark`; of several machines, the last one is shown, and
            without 8-bit networks, which compute something else.
    """
    table = table[(table.unit == "ms/image") & (table.dtype != "int8")]
    found = ratios(table[table.hardware.isin(table.hardware.tail(1))])
    found["text"] = [
        f"{row.implementation}: {row.ratio_median:.2f} ({row.ratio_min:.2f} to "
        f"{row.ratio_max:.2f}), {1e3 / row.value:.1f} images/s"
        for row in found.itertuples()
    ]
    titles = {True: "ours, times the reference", False: "fastest baseline, times the reference"}
    found["title"] = found.implementation.str.startswith("ours").map(titles)
    best = found.loc[found.groupby([*RUN, "title"], sort=False).ratio_median.idxmax()]
    runs = ["task", "network", "batch_size", "image_px"]
    best = best.drop_duplicates([*runs, "title"], keep="last")  # of other thread counts
    shown = best.pivot(index=runs, columns="title", values="text")
    return shown.reindex(columns=titles.values()).reset_index()


def runtime_table(table: pd.DataFrame) -> pd.DataFrame:
    """Table of docs/deploy.md: times timm in eager float32, ours and timm's, by runtime and type.

    Args:
        table: as of `speed_table`.
    """
    table = table[(table.task == "inference") & (table.unit == "ms/image")]
    found = ratios(table[table.hardware.isin(table.hardware.tail(1))])
    found[["whose", "runtime"]] = found.implementation.str.split(n=1, expand=True)
    names = {"compiled": "torch.compile", "^(float32|bfloat16)": r"eager \1"}
    found["runtime"] = found.runtime.str.replace("channels_last ", "").replace(names, regex=True)
    index = ["batch_size", "runtime", "network"]
    best = found.pivot_table("ratio_median", index, "whose", "max", sort=False)
    text = best.apply("{ours:.2f}, {timm:.2f}".format_map, axis=1)
    shown = text.unstack(sort=False).add_suffix(": ours, timm").reset_index()
    return shown.rename_axis(columns=None)
