"""Ours against what a user would pick instead: inference, a training step, input, size, import.

Sides run by turns (`measure.time_interleaved`), and a row for each pair of them has the median of each
and how many times ours is better, within each round. Only peaks of memory, the two sizes of a
listing and the rate of a matrix product are measured one after another.
"""

import collections
import copy
import dataclasses
import io
import mmap
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from utils import data as inputs
from utils import peers
from utils.data.folders import (
    Batch,
    ImageFiles,
    Preprocess,
    Splits,
    TrainBatches,
    make_loader,
)
from utils.data.shards import make_shards
from utils.data.transforms import decode, train_transform
from utils.measure import (
    by_steps,
    count_macs,
    peak_memory,
    repeat,
    seconds_per_call,
    throughputs,
    time_interleaved,
)
from utils.recipe import Recipe
from utils.training.evaluation import autocast_dtype, dtype_name
from utils.training.loop import Trainer, train_one_epoch

Row = dict[str, Any]
NUM_CLASSES = 10
PEAK_ROUNDS = START_ROUNDS = 3
LISTED_SOURCES = 64  # images that the million names of a listing stand for
PER_FOLDER = 1000  # of those names, as in ImageNet


def compare(
    found: Mapping[str, Sequence[float]],
    pairs: Sequence[tuple[str, str]],
    unit: str,
    *,
    more_is_better: bool = False,
    **facts: Any,
) -> list[Row]:
    """A row per pair (ours, peer) of sides.

    Args:
        found: what each side took or gave, one entry per round.
        unit: of `found`.
        more_is_better: whether `found` is a speed; else it is a time or a size.
        facts: columns that come first.

    Returns:
        `ours`, `peer`, `unit`, medians `ours_value` and `peer_value`, and `ratio_median`,
        `ratio_min`, `ratio_max`: how many times better ours is, above 1 where it is ahead.
    """
    rows = []
    for ours, peer in pairs:
        rounds = list(zip(found[ours], found[peer], strict=True))
        ratios = [a / b if more_is_better else b / a for a, b in rounds]
        rows.append(
            {
                **facts,
                "ours": ours,
                "peer": peer,
                "unit": unit,
                "ours_value": statistics.median(found[ours]),
                "peer_value": statistics.median(found[peer]),
                "ratio_median": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "rounds": len(ratios),
            }
        )
    return rows


# ---- inference -----------------------------------------------------------------------------------

Make = Callable[[], nn.Module]
PLAIN, TORCHVISION, ONNX = "timm float32", "torchvision float32", "onnxruntime float32"


def fast_dtypes(device: torch.device) -> list[torch.dtype]:
    """float32, and bfloat16 where the device computes it: nobody would pick an emulated one."""
    return [torch.float32] + [torch.bfloat16] * (autocast_dtype(device, "bf16") is not None)


def inference(
    name: str,
    optimized: Callable[..., nn.Module],
    batch_size: int,
    side_px: int,
    rounds: int,
    compiled: bool,
    device: torch.device,
) -> list[Row]:
    """Forward passes of one architecture of `peers.SHARED`.

    Args:
        optimized: makes our network for inference from `name`, `dtype` and `compile`.
        compiled: whether to measure compiled sides and ONNX Runtime too.
    """
    images = torch.randn(batch_size, 3, side_px, side_px, device=device)
    calls, pairs = {PLAIN: _pass(peers.timm_backbone(name).eval().to(device), images)}, []
    for dtype in fast_dtypes(device):
        ours, peer = f"ours {dtype_name(dtype)}", f"timm {dtype_name(dtype)} channels_last"
        calls[ours] = _pass(optimized(name, dtype, False).to(device), images)
        calls[peer] = _timm_pass(name, images, dtype)
        pairs += [(ours, PLAIN), (ours, peer)]
    if peers.SHARED[name].nodes:
        calls[TORCHVISION] = _pass(peers.torchvision_backbone(name).eval().to(device), images)
        pairs += [("ours float32", TORCHVISION)]
    if compiled:
        more, other = _compiled(name, optimized, images)
        calls, pairs = calls | more, pairs + other
    times_s = seconds_per_call({side: _done(call, device) for side, call in calls.items()}, rounds)
    times_ms = {side: [1e3 * t for t in times] for side, times in times_s.items()}
    setting = f"batch {batch_size}, {side_px} px"
    rows = compare(times_ms, pairs, "ms", task="inference", what=name, setting=setting)
    rows += _gpu_peaks(calls, pairs, device, task="inference", what=name, setting=setting)
    operations = 2 * count_macs(peers.timm_backbone(name), side_px, side_px) * batch_size
    for dtype in fast_dtypes(device):
        side = f"ours {dtype_name(dtype)}"
        speeds = {
            side: [operations / t / 1e9 for t in times_s[side]],
            "matmul": [matmul_flops(dtype, device) / 1e9] * rounds,
        }
        rows += compare(
            speeds, [(side, "matmul")], "GFLOP/s", more_is_better=True,
            task="inference", what=name, setting=setting,
        )  # fmt: skip
    return rows


def _compiled(
    name: str, optimized: Callable[..., nn.Module], images: Tensor
) -> tuple[dict[str, Callable[[], object]], list[tuple[str, str]]]:
    """Sides under torch.compile, with frozen weights on both, and ONNX Runtime; their pairs."""
    torch.compiler.reset()  # graphs of earlier networks would count against timm's, eight at most
    calls, pairs = {}, []
    for dtype in fast_dtypes(images.device):
        ours, peer = (f"{side} {dtype_name(dtype)} compiled" for side in ("ours", "timm"))
        calls[ours] = _pass(optimized(name, dtype, True).to(images.device), images)
        calls[peer] = _timm_pass(name, images, dtype, compile=True)
        pairs.append((ours, peer))
    if images.device.type == "cpu":
        threads = torch.get_num_threads()
        calls[ONNX] = peers.onnxruntime_call(peers.timm_backbone(name), images, threads)
        pairs += [("ours float32 compiled", ONNX), ("ours float32", ONNX)]
    return calls, pairs


def _timm_pass(
    name: str, images: Tensor, dtype: torch.dtype, compile: bool = False
) -> Callable[[], object]:
    """timm's network at its fastest: images and weights of one type and channels_last."""
    how = {"dtype": dtype, "memory_format": torch.channels_last}
    net = peers.timm_backbone(name).eval().to(images.device, **how)
    if not compile:
        return _pass(net, images.to(**how))
    from torch._inductor import config  # a second's work, which other tasks are spared

    # As `deploy.optimize` does: the option of torch.compile of that name comes too late, and
    # weights are packed for one size alone.
    net = torch.compile(net, dynamic=False)
    return config.patch(freezing=True)(_pass(net, images.to(**how)))


def inference_peaks(
    name: str, optimized: Callable[..., nn.Module], batch_size: int, side_px: int
) -> list[Row]:
    """Memory of forward passes beyond weights and images, by processes of their own, on the CPU."""
    makes = {
        f"ours {dtype_name(dtype)}": partial(optimized, name, dtype, False)
        for dtype in fast_dtypes(torch.device("cpu"))
    }
    pairs = [(side, PLAIN) for side in makes]
    peaks = {
        side: [
            _mebibytes(peak_memory(_prepared_passes, make, batch_size, side_px))
            for _ in range(PEAK_ROUNDS)
        ]
        for side, make in {**makes, PLAIN: partial(peers.timm_backbone, name)}.items()
    }
    setting = f"peak memory, batch {batch_size}, {side_px} px"
    return compare(peaks, pairs, "MiB", task="inference", what=name, setting=setting)


def _mebibytes(count: int) -> float:
    return max(count, mmap.PAGESIZE) / 2**20  # what fits into memory at hand counts as a page


def _prepared_passes(make: Make, batch_size: int, side_px: int) -> Callable[[], None]:
    """The first passes: what is packed and kept for later ones counts too."""
    call = _pass(make().eval(), torch.randn(batch_size, 3, side_px, side_px))
    return partial(repeat, call, 3)


def _pass(net: nn.Module, images: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return net(images)

    return call


def _done(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call that returns when the device has done it."""
    if device.type != "cuda":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return wait


def _gpu_peaks(
    calls: Mapping[str, Callable[[], object]],
    pairs: Sequence[tuple[str, str]],
    device: torch.device,
    *,
    setting: str,
    **facts: Any,
) -> list[Row]:
    """Memory of calls beyond what is held before them, by PyTorch's count; no rows of a CPU.

    Of later steps: the optimizer's momentum is held, and so are torchvision's gradients, which its
    script lets go of when the next step begins.
    """
    if device.type != "cuda":
        return []
    peaks: dict[str, list[float]] = {side: [] for side in calls}
    for _ in range(PEAK_ROUNDS):
        for side, call in calls.items():
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            call()
            peaks[side].append(_mebibytes(torch.cuda.max_memory_allocated(device) - held))
    return compare(peaks, pairs, "MiB", setting=f"peak memory, {setting}", **facts)


def matmul_flops(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations per second of the best of a few square matrix products."""
    best = 0.0
    for side in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        call = _done(partial(torch.mm, a, a, out=out), device)
        times_s = seconds_per_call({"mm": call}, 5)["mm"]
        best = max(best, 2 * side**3 / min(times_s))
    return best


# ---- training ------------------------------------------------------------------------------------


def step(
    name: str, make_ours: Callable[[str, int], nn.Module], recipe: Recipe, rounds: int,
    compiled: bool, device: torch.device,
) -> list[Row]:  # fmt: skip
    """A training step, from a batch in memory to updated weights, waited for.

    Args:
        make_ours: makes our classifier from a name and a number of classes.
        recipe: batch size, crop, label smoothing; ours runs by all of it.
    """
    sides = {"ours": False} | ({"ours compiled": True} if compiled else {})
    calls = {
        side: _our_step(partial(make_ours, name, NUM_CLASSES), recipe, device, compile)
        for side, compile in sides.items()
    }
    calls[TORCHVISION] = _peer_step(
        peers.TorchvisionTrainer, partial(make_ours, name, NUM_CLASSES), recipe, device
    )
    make_timm = partial(peers.timm_classifier, name, NUM_CLASSES)
    timm = peers.timm_side(device)
    calls[timm] = _peer_step(peers.TimmTrainer, make_timm, recipe, device)
    times_s = seconds_per_call({side: _done(call, device) for side, call in calls.items()}, rounds)
    pairs = [(side, peer) for side in sides for peer in (TORCHVISION, timm)]
    times_ms = {side: [1e3 * t for t in times] for side, times in times_s.items()}
    facts = {"task": "step", "what": name}
    facts["setting"] = f"batch {recipe.batch_size}, {recipe.train_crop_px} px"
    rows = compare(times_ms, pairs, "ms", **facts)
    return rows + _gpu_peaks(calls, pairs, device, **facts)


def step_peaks(name: str, make_ours: Callable[[str, int], nn.Module], recipe: Recipe) -> list[Row]:
    """Memory of training beyond the network and its average, by processes of their own."""
    ours = partial(make_ours, name, NUM_CLASSES)
    cpu = torch.device("cpu")
    timm = peers.timm_side(cpu)
    sides = {
        "ours": (_our_step, ours, recipe, cpu, False),
        TORCHVISION: (_peer_step, peers.TorchvisionTrainer, ours, recipe, cpu),
        timm: (
            *(_peer_step, peers.TimmTrainer),
            *(partial(peers.timm_classifier, name, NUM_CLASSES), recipe, cpu),
        ),
    }
    peaks = {
        side: [_mebibytes(peak_memory(_first_steps, *args)) for _ in range(PEAK_ROUNDS)]
        for side, args in sides.items()
    }
    pairs = [("ours", TORCHVISION), ("ours", timm)]
    setting = f"peak memory, batch {recipe.batch_size}, {recipe.train_crop_px} px"
    return compare(peaks, pairs, "MiB", task="step", what=name, setting=setting)


def _first_steps(prepare: Callable[..., Callable[[], object]], *args: Any) -> Callable[[], None]:
    """Two, from a process that has trained nothing: the first allocates what stays.

    Beyond a first step, sides that leave more freed memory in the process would seem to need less.
    """
    return partial(repeat, prepare(*args), 2)


def _our_step(
    make: Make, recipe: Recipe, device: torch.device, compile: bool
) -> Callable[[], float]:
    torch.manual_seed(0)
    trainer = Trainer(make().to(device), recipe, 10**6, NUM_CLASSES, compile=compile)
    trainer.net.train()
    count, side = recipe.batch_size, recipe.train_crop_px
    pixels = torch.randint(256, (count, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    batch = Batch(pixels, torch.zeros(count, dtype=torch.long), [])
    return lambda: trainer.train_step(batch).item()


def _peer_step(
    trainer_class: type, make: Make, recipe: Recipe, device: torch.device
) -> Callable[[], object]:
    torch.manual_seed(0)
    trainer = trainer_class(make().to(device).train(), recipe)
    count, side = recipe.batch_size, recipe.train_crop_px
    image = torch.randn(count, 3, side, side, device=device)
    target = torch.zeros(count, dtype=torch.long, device=device)
    return partial(trainer.train_step, image, target)


def loop(
    name: str,
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    rounds: int,
    steps: int,
    workers: int,
) -> list[Row]:
    """Images per second of scripts/train.py's loop, from files to updated weights, on the CPU.

    Both sides train the same network from the same weights, on the same files, at the same sizes
    and augmentations.

    Args:
        model: trained in place.
        steps: timed steps per round and side.
        workers: decoding processes of each side.
    """
    batches = TrainBatches(len(data.train), recipe.batch_size, seed=0)
    theirs = peers.TorchvisionTrainer(copy.deepcopy(model), recipe)
    ours = Trainer(model, recipe, len(batches), len(data.classes))
    our_loader = make_loader(data.train, batches, workers)
    their_loader = peers.torchvision_loader(data.train.folder, recipe, workers)
    peer = "torchvision references/classification (float32, NCHW)"
    trains = {
        "ours": by_steps(partial(train_one_epoch, ours), our_loader),
        peer: by_steps(theirs.train_one_epoch, their_loader),
    }
    settle_steps = 2 * workers + 1  # a loader prefetches two batches per worker
    speeds = throughputs(
        trains, recipe.batch_size, steps=steps, rounds=rounds, settle_steps=settle_steps
    )
    setting = f"{recipe.train_crop_px} px, batch {recipe.batch_size}, {workers} workers"
    pairs = [("ours", peer)]
    facts = {"task": "loop", "what": name, "setting": setting}
    return compare(speeds, pairs, "images/s", more_is_better=True, **facts)


# ---- input ---------------------------------------------------------------------------------------


def draw_imagenet_sized(source: ImageFiles, folder: Path, count: int, kilobytes: int = 110) -> None:
    """Writes `count` JPEG files of 500 x 375 pixels to `folder/images/`, near `kilobytes` each.

    Images of `source`, enlarged, with the grain of a camera, at the quality that gives the size.
    """
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        image = decode(source.path(i * len(source) // count)).resize((500, 375), Image.BICUBIC)
        grain = rng.normal(0, 6, (375, 500, 1))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        for quality in range(98, 40, -3):
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= 1000 * kilobytes:
                break
        (folder / "images" / f"{i:05d}.JPEG").write_bytes(buffer.getvalue())


def input_speed(folder: Path, recipe: Recipe, rounds: int, steps: int) -> list[Row]:
    """Images per second of one core, from files in `folder/<class>/` to normalised batches.

    Both decode in this process, without workers; ours normalises after stacking, on the device.
    """
    torch.set_num_threads(1)
    recipe = dataclasses.replace(recipe, cutmix_alpha=0.0, mixup_alpha=0.0)  # part of a step
    data = ImageFiles(folder, ["images"], train_transform(recipe))
    loader = make_loader(data, TrainBatches(len(data), recipe.batch_size, seed=0), workers=0)
    preprocess = Preprocess(torch.device("cpu"), NUM_CLASSES)
    theirs = peers.torchvision_loader(folder, recipe, workers=0)
    calls = {
        "ours": by_steps(lambda batches: _use_up(map(preprocess, batches)), loader),
        "torchvision preset": by_steps(_use_up, theirs),
    }
    speeds = throughputs(calls, recipe.batch_size, steps=steps, rounds=rounds, settle_steps=1)
    sizes = [data.path(i).stat().st_size for i in range(len(data))]
    image = decode(data.path(0))
    what = f"{image.width} x {image.height} px, {np.mean(sizes) / 1e3:.0f} kB"
    return compare(
        speeds, [("ours", "torchvision preset")], "images/s per core", more_is_better=True,
        task="input", what=what, setting=f"crop {recipe.train_crop_px} px",
    )  # fmt: skip


def _use_up(batches: Iterable[object]) -> None:
    """Lets go of each before the next, as training does."""
    collections.deque(batches, maxlen=0)


def shards_speed(
    data_dir: Path, folder: Path, recipe: Recipe, rounds: int, steps: int, workers: int
) -> list[Row]:
    """Images per second from shards, beside the class folders that they are packed from.

    Args:
        folder: an empty one, for the shards.
    """
    make_shards(data_dir, folder)
    names = ",".join(sorted(path.stem for path in folder.glob("*.tar")))
    reads = {}
    for side, source in {"shards": f"{folder}/{{{names}}}.tar", "folders": data_dir}.items():
        images = inputs.open_data(source, recipe).train
        loader = inputs.train_loader(images, recipe.batch_size, 0, workers)
        reads[side] = by_steps(_use_up, loader)
    settle_steps = 2 * workers + 1
    speeds = throughputs(
        reads, recipe.batch_size, steps=steps, rounds=rounds, settle_steps=settle_steps
    )
    setting = f"{len(images)} images, crop {recipe.train_crop_px} px, {workers} workers"
    return compare(
        speeds, [("shards", "folders")], "images/s", more_is_better=True,
        task="shards", what="class folders", setting=setting,
    )  # fmt: skip


# ---- whole epochs --------------------------------------------------------------------------------


def epochs(
    name: str, commands: Mapping[str, list[str]], recipe: Recipe, rounds: int, logs: Path
) -> list[Row]:
    """Wall time of whole training commands, start-up and evaluation included, by turns.

    Args:
        commands: what each side runs, with as many threads as this process; the first is ours.
        logs: folder for their output.

    Raises:
        ValueError: a command fails; the message names its log.
    """
    times_s: dict[str, list[float]] = {side: [] for side in commands}
    for k in range(rounds):
        for side, command in list(commands.items())[:: -1 if k % 2 else 1]:
            log = logs / f"{name}-{re.sub('[^a-z]+', '-', side)}-{k}.log"
            times_s[side].append(_wall_s(side, command, log))
    ours, *others = commands
    setting = f"{recipe.epochs} epoch, batch {recipe.batch_size}, {recipe.train_crop_px} px"
    pairs = [(ours, peer) for peer in others]
    return compare(times_s, pairs, "s", task="epoch", what=name, setting=setting)


def _wall_s(side: str, command: list[str], log: Path, until: Path | None = None) -> float:
    """Seconds of a command; its output goes to `log`.

    Args:
        until: a file with which it has done enough, and is ended.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    start_s = time.perf_counter()
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            while process.poll() is None and not (until and until.exists()):
                time.sleep(0.01)
            time_s = time.perf_counter() - start_s
        finally:  # an interrupt ends it, too
            process.kill()
    if process.returncode if until is None else not until.exists():
        raise ValueError(f"{side}: exit code {process.returncode}, see {log}")
    return time_s


# ---- size and import -----------------------------------------------------------------------------


def listing(
    source: ImageFiles,
    folder: Path,
    counts: Sequence[int],
    recipe: Recipe,
    start: Callable[[Path, Path], list[str]],
    logs: Path,
) -> list[Row]:
    """A training's start, its memory and its reading, by how many files it lists.

    Hard links to a few images stand for the files.

    Args:
        folder: an empty one, for the links.
        start: makes the command of a training that saves its first step, from a folder with train/
            and val/ and the run's.
        logs: folder for its output.

    Returns:
        Rows that set each count beside the first one: seconds from the command to the first step,
        saved; bytes per file of a process while it lists them; and images per second.

    Raises:
        ValueError: the command fails; the message names its log.
    """
    start_s, peaks, reads = {}, {}, {}
    for count in counts:
        side, root = f"{count} files", folder / str(count)
        _link(source, root / "train", count)
        _link(source, root / "val", -(-count // PER_FOLDER), per_folder=1)
        log, start_s[side] = logs / f"listing-{count}.log", []
        for k in range(START_ROUNDS):
            run = root / f"run-{k}"
            start_s[side].append(_wall_s(side, start(root, run), log, until=run / "last.pt"))
        peaks[side] = [
            max(peak_memory(_listing_call, root / "train"), mmap.PAGESIZE) / count
            for _ in range(PEAK_ROUNDS)
        ]
        data = _list(root / "train", source.transform)
        batches = TrainBatches(count, recipe.batch_size, seed=0)
        reads[side] = by_steps(_use_up, make_loader(data, batches, workers=0))
    speeds = throughputs(reads, recipe.batch_size, steps=4, rounds=9, settle_steps=1)
    first, *others = start_s
    pairs = [(side, first) for side in others]
    facts = {"task": "listing", "what": "image files"}
    reading = f"reading, crop {recipe.train_crop_px} px"
    return [
        *compare(start_s, pairs, "s", **facts, setting="scripts/train.py to its first step"),
        *compare(peaks, pairs, "bytes per file", **facts, setting="peak memory"),
        *compare(speeds, pairs, "images/s", more_is_better=True, **facts, setting=reading),
    ]


def _list(root: Path, transform: Callable | None = None) -> ImageFiles:
    return ImageFiles(root, sorted(path.name for path in root.iterdir()), transform)


def _listing_call(root: Path) -> Callable[[], ImageFiles]:
    return partial(_list, root)


def _link(source: ImageFiles, root: Path, count: int, per_folder: int = PER_FOLDER) -> None:
    """`count` names of files, about as ImageNet has them: hard links to a few.

    A file has at most 65,000 names on ext4, so that a million need sixteen.
    """
    originals = root.with_suffix(".originals")
    originals.mkdir(parents=True)
    for i in range(min(LISTED_SOURCES, len(source))):
        shutil.copyfile(source.path(i), originals / str(i))
    for i in range(count):
        folder = root / f"n{i // per_folder:08d}"
        if i % per_folder == 0:
            folder.mkdir(parents=True)
        os.link(
            originals / str(i % min(LISTED_SOURCES, len(source))),
            folder / f"{folder.name}_{i}.JPEG",
        )


def imports(rounds: int) -> list[Row]:
    """Seconds of an interpreter that imports backbones, and of one that imports what it needs."""
    lines = {"import backbones": "import backbones", "import torch, torchvision": ""}
    calls = {
        side: partial(
            subprocess.run,
            [sys.executable, "-c", f"import torch, torchvision; {line}"],
            check=True,
        )
        for side, line in lines.items()
    }
    times_s = time_interleaved(calls, rounds)
    pairs = [tuple(lines)]
    return compare(times_s, pairs, "s", task="import", what="backbones", setting="new interpreter")
