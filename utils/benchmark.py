"""Interleaved timing against timm, torchvision and ONNX Runtime; costs of the studies' networks.

The trainers of the baselines are written here after the projects' training scripts, which their
packages lack. What a benchmark does not need (accuracy, printing) is left out, in their favour.
"""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

from backbones import create, create_classifier
from backbones.deploy import optimize
from utils import measure
from utils.cli import import_optional
from utils.data import sample
from utils.data.folders import Batch, ImageFiles, Preprocess
from utils.data.transforms import train_transform
from utils.recipe import RECIPES, Recipe
from utils.records import write_table
from utils.studies.definitions import networks
from utils.training.evaluation import autocast, autocast_dtype, dtype_name
from utils.training.loop import Trainer, param_groups

Rows = list[dict[str, Any]]
# Rows that agree in these columns are measured, and replaced, together.
RUN = ["task", "network", "quantity", "batch_size", "image_px", "width", "threads", "hardware"]
NUM_CLASSES = 10
PEAK_ROUNDS = 3
EMA_STEPS = 32  # the default of torchvision's --model-ema-steps

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


@dataclass(frozen=True)
class Case:
    """What is measured: columns of a record. Training follows the preset "imagenet" at its sizes.

    Args:
        network: a key of `SHARED`; for costs, of `utils.studies.definitions.networks`.
        width: factor on the channels, for costs.
        implementation: ends with its dtype.
    """

    task: str
    network: str
    batch_size: int
    image_px: int
    width: float = 1.0
    device: str = "cpu"
    implementation: str = "ours float32"

    @property
    def recipe(self) -> Recipe:
        sizes = {"batch_size": self.batch_size, "train_crop_px": self.image_px}
        return replace(RECIPES["imagenet"], **sizes, width=self.width)

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
        case: gives the task ("inference", "step", "input" or "costs"), the network and the sizes.
        compile: also measure compiled networks.
        peaks: also measure peak memory, on a CPU.
    """
    if case.task == "costs":
        return costs(case, rounds, peaks)
    names = list(IMPLEMENTATIONS[case.task])
    if case.task == "inference":
        names += COMPILED if compile else []
        names += ["torchvision float32"] if case.network.startswith("resnet") else []
        names += ["ONNX Runtime float32"] if case.device == "cpu" else []
    if autocast_dtype(torch.device(case.device), "bf16") is None:  # emulated, so slow
        names = dict.fromkeys(name.replace("bfloat16", "float32") for name in names)
    torch.compiler.reset()  # a ninth graph of timm's forward would silently run uncompiled
    cases = [replace(case, implementation=name) for name in names]
    prepare = {"inference": inference_call, "step": step_call, "input": input_call}[case.task]
    # The second training step needs the most memory: the first has allocated the momentum.
    return measure_cases(prepare, cases, rounds, case.task, 2 * (peaks and case.task != "input"))


def measure_cases(
    prepare: Callable[[Case], Any], cases: list[Case], rounds: int, quantity: str, peak_calls: int
) -> Rows:
    """Times calls in interleaved rounds, and measures their peak memory one after another.

    Args:
        prepare: a function of a module that returns the call of a case.
        cases: the first is the reference of `ratios`.
        peak_calls: calls that a peak is of; 0 measures none. Compiled and exported networks have
            none: compiler and exporter would change it.
    """
    times_s = measure.time_interleaved({case: prepare(case) for case in cases}, rounds)
    unit, rows = "ms" if quantity == "latency" else "ms/image", []
    for case in cases:
        rows += tidy(case, quantity, unit, [1e3 * t / case.batch_size for t in times_s[case]])
        if peak_calls and not {"compiled", "ONNX"} & set(case.implementation.split()):
            peak = partial(measure.peak_memory, prepare, case, calls=peak_calls)
            peaks = [peak() / 2**20 for _ in range(PEAK_ROUNDS)]
            rows += tidy(case, f"{quantity} peak", "MiB", peaks)
    return rows


def tidy(case: Case, quantity: str, unit: str, values: Sequence[float]) -> Rows:
    """A row per round, with six significant digits."""
    facts = {**vars(case), "dtype": dtype_name(case.dtype), "quantity": quantity, "unit": unit}
    return [{**facts, "round": k, "value": float(f"{v:.6g}")} for k, v in enumerate(values)]


def inference_call(case: Case) -> measure.Call:
    """Feature maps of random images by random weights; for costs, logits under autocast.

    The channels_last forms get images in the memory format of their weights, and timm's in their
    dtype; `optimize` converts them in each call.
    """
    (images, _), name, words = case.batch(), case.network, case.implementation.split()
    if case.task == "costs":
        net, images = (x.to(memory_format=torch.channels_last) for x in (classifier(case), images))
        return measure.forward(net, images, autocast_dtype(images.device, case.recipe.precision))
    if "ours" in words:
        net = optimize(create(name, **SHARED[name][1]), case.dtype, "compiled" in words)
        return measure.forward(net, images)
    if "torchvision" in words:
        nodes = ["relu", "layer1", "layer2", "layer3", "layer4"]
        return measure.forward(create_feature_extractor(models.get_model(name), nodes), images)
    net = timm_network(case, features_only=True)
    if "ONNX" in words:
        return measure.onnx_forward(net.eval(), images)
    if "channels_last" in words:
        net, images = (x.to(case.dtype, memory_format=torch.channels_last) for x in (net, images))
    return measure.forward(net, images, compile="compiled" in words)


def timm_network(case: Case, **options: Any) -> nn.Module:
    """timm's network, with random weights."""
    timm = import_optional("timm", "to compare with it")
    return timm.create_model(SHARED[case.network][0], **options).to(case.device)


def step_call(case: Case) -> measure.Call:
    """A step from a batch in memory to updated weights, of our network or of timm's.

    All follow the recipe's label smoothing, weight decay and momentum; ours alone mixes images and
    updates its EMA in every step.
    """
    torch.manual_seed(0)
    if case.implementation.startswith("timm"):
        model = timm_network(case, num_classes=NUM_CLASSES)
        return baseline_step(case, model.to(memory_format=torch.channels_last))
    if case.implementation.startswith("torchvision"):
        return baseline_step(case, classifier(case))
    trainer = Trainer(classifier(case).train(), case.recipe, 10**6, NUM_CLASSES)
    images, labels = case.batch()
    pixels = torch.randint(256, images.shape, dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)  # as our loader gives them
    batch = Batch(pixels, labels.cpu(), [])
    return lambda: trainer.train_step(batch).item()


def baseline_step(case: Case, model: nn.Module) -> measure.Call:
    """The loop body of another project's training script, with PyTorch's default SGD.

    - torchvision: references/classification/train.py of github.com/pytorch/vision with --model-ema:
      float32, NCHW, gradients cleared before the backward pass, an EMA of weights and buffers every
      32 steps, `loss.item()`.
    - timm: train.py of github.com/huggingface/pytorch-image-models with --amp --amp-dtype bfloat16
      --channels-last: autocast where bfloat16 is not emulated, gradients cleared after the update,
      no EMA (its default), `loss.item()`.
    """
    recipe = case.recipe
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    groups = param_groups(model.train(), recipe.weight_decay, recipe.norm_weight_decay)
    optimizer = torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=recipe.momentum)
    decay = recipe.ema_decay**EMA_STEPS  # the recipe's is per step
    ema = AveragedModel(model, avg_fn=lambda a, b, _: decay * a + (1 - decay) * b, use_buffers=True)
    steps, (images, labels) = itertools.count(), case.batch()
    dtype = autocast_dtype(images.device, "bf16")

    def timm_step() -> float:
        batch = images.contiguous(memory_format=torch.channels_last)
        with autocast(images.device, dtype):
            loss = criterion(model(batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    def torchvision_step() -> float:
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if next(steps) % EMA_STEPS == 0:
            ema.update_parameters(model)
        return loss.item()

    return timm_step if case.implementation.startswith("timm") else torchvision_step


def classifier(case: Case) -> nn.Module:
    """Our classifier for a network of `SHARED` or of a study."""
    if case.task == "costs":
        variant = networks()[case.network]
        name, options = variant.backbone, {**variant.options, **case.recipe.backbone_options}
    else:
        name, options = case.network, SHARED[case.network][1]
    return create_classifier(name, NUM_CLASSES, **options).to(case.device)


def input_call(case: Case) -> measure.Call:
    """The next batch, decoded from JPEG files, augmented and normalised in this process."""
    folder = tempfile.TemporaryDirectory()
    draw_jpegs(Path(folder.name) / "images")
    if case.implementation.startswith("torchvision"):
        loader, preprocess = torchvision_loader(folder.name, case.recipe), list
    else:
        images = ImageFiles(Path(folder.name), ["images"], train_transform(case.recipe))
        loader = images.train_loader(case.batch_size, 0)
        preprocess = Preprocess(torch.device(case.device), NUM_CLASSES)
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


def torchvision_loader(folder: str | Path, recipe: Recipe) -> DataLoader:
    """ClassificationPresetTrain and the loader of references/classification/ of pytorch/vision.

    With --auto-augment ta_wide --random-erase --workers 0: Pillow's decoder, transforms v1 on PIL
    images, then on float32 tensors.
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
    return DataLoader(dataset, recipe.batch_size, shuffle=True, drop_last=True)


def costs(case: Case, rounds: int, peaks: bool) -> Rows:
    """Parameters, GMACs, times and peak memory of the studies' networks; `case` gives the sizes."""
    dtype = dtype_name(autocast_dtype(torch.device(case.device), case.recipe.precision))
    ours = replace(case, implementation=f"ours {dtype}")
    cases, rows = [replace(ours, network=name) for name in networks()], []
    for each in cases:
        net = classifier(each)
        macs = measure.count_macs(net, case.image_px, case.image_px)
        rows += tidy(each, "parameters", "million", [measure.count_parameters(net) / 1e6])
        rows += tidy(each, "multiply-accumulates", "GMACs", [macs / 1e9])
    single = [replace(each, batch_size=1) for each in cases]
    rows += measure_cases(inference_call, single, rounds, "latency", 0)
    rows += measure_cases(inference_call, cases, rounds, "inference", int(peaks))
    return rows + measure_cases(step_call, cases, rounds, "training", int(peaks))


def read_benchmark(path: Path) -> pd.DataFrame:
    """Reads a table that `save` wrote. Raises ValueError for any other file."""
    try:
        table = pd.read_csv(path, dtype={"commit": str})  # some are all digits
    except ValueError:
        table = pd.DataFrame()
    if not set(RUN) <= set(table):
        raise ValueError(f"{path} is not a table of scripts/benchmark.py; choose another --output")
    return table


def save(path: Path, rows: Rows) -> None:
    """Adds rows to a table, in place of those of the same `RUN`."""
    table = pd.DataFrame(rows)
    if path.exists():
        old = read_benchmark(path)
        replaced = old.set_index(RUN).index.isin(table.set_index(RUN).index)
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
        table: the record of `read_benchmark`; of several machines, the last one is shown.
    """
    table = table[(table.task != "costs") & (table.unit == "ms/image")]
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
