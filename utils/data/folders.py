"""Images from class folders to batches on the device.

The random state of a sample depends on (seed, epoch, index) alone, so that a run is the same with
any number of workers and after any interruption. Images travel as uint8; `Preprocess` normalises
and mixes them on the device.
"""

import atexit
import copy
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from utils.data.imagenet import IMAGE_SUFFIXES, LayoutError, check_layout
from utils.data.transforms import (
    MEAN_RGB,
    STD_RGB,
    CorruptImageError,
    Transform,
    eval_transform,
    open_image,
    train_transform,
)
from utils.distributed import rank, world_size
from utils.recipe import Recipe

if TYPE_CHECKING:
    from utils.data.shards import Shards  # which imports this module

# First word of every seed, so that no two uses of (seed, ...) draw the same numbers.
SAMPLE_STREAM, ORDER_STREAM, STEP_STREAM = range(3)
MAX_THREADS = 4  # decoding a sample holds the interpreter for a sixth of its time
Item, Result = TypeVar("Item"), TypeVar("Result")


def stream_seed(*words: int) -> int:
    """64 well-mixed bits from non-negative integers."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random numbers of one image in one epoch."""
    return random.Random(stream_seed(SAMPLE_STREAM, seed, epoch, index))


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Runs the block with PyTorch's CPU generator seeded by `words`, and restores it afterwards."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(stream_seed(*words))
    try:
        yield
    finally:
        torch.set_rng_state(state)


class Key(NamedTuple):
    """What a sampler asks a dataset for; the epoch reaches the workers this way."""

    epoch: int
    index: int


class Batch(NamedTuple):
    """uint8 `images` `[N, 3, H, W]`, `labels` `[N]`, and the errors of the images left out.

    A loader's images are channels_last, and it gives the dataset's `indices` of its images too.
    """

    images: Tensor
    labels: Tensor
    corrupt: list[CorruptImageError]
    indices: Sequence[int] = ()


class ImageFiles(Dataset):
    """The images under `folder/<class>/`, in the order of their paths.

    Args:
        classes: names of the class folders; their order numbers the labels.
        transform: from an image of `open_image`, not yet decoded, and its generator to a uint8
            tensor `[3, H, W]`; may run in several threads, so that PyTorch's generator is not its
            own.
        seed: of the transform's random numbers.

    Raises:
        LayoutError: a class folder holds no image.
    """

    def __init__(
        self,
        folder: Path,
        classes: list[str],
        transform: Transform,
        seed: int = 0,
    ) -> None:
        self.folder, self.classes, self.transform, self.seed = folder, classes, transform, seed
        # Blocks of bytes, not a million str: a worker touching a str copies its memory page.
        names = [np.array(_image_names(folder / name, name + os.sep)) for name in classes]
        for name, files in zip(classes, names, strict=True):
            if not len(files):
                raise LayoutError(f"{folder / name}: no image in this class folder")
        self.names = np.concatenate(names)
        self.labels = np.repeat(np.arange(len(classes)), [len(files) for files in names])

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.folder / os.fsdecode(bytes(self.names[index]))

    def __getitems__(self, keys: list[Key]) -> Batch:
        """What a loader asks for: a whole batch."""
        return collate(in_threads(self.__getitem__, keys), [key.index for key in keys])

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | CorruptImageError:
        try:
            image = open_image(self.path(key.index))
            return self.transform(image, sample_rng(self.seed, *key)), int(self.labels[key.index])
        except CorruptImageError as error:
            # Returned, not raised: through a worker it would lose its one clear line.
            return CorruptImageError(str(error))


def _image_names(folder: Path, prefix: str) -> list[bytes]:
    """The image files of a folder, sorted, each with `prefix` before its name."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and _may_be_read(e)]
    images = sorted(name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
    return [os.fsencode(prefix + name) for name in images]


def _may_be_read(entry: os.DirEntry) -> bool:
    """Files, and links that lead nowhere, of which the reader tells; never a pipe."""
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def collate(
    samples: list[tuple[Tensor, int] | CorruptImageError], indices: Sequence[int] = ()
) -> Batch:
    """Stacks the readable samples; `images` is empty if none is."""
    corrupt = [s for s in samples if isinstance(s, CorruptImageError)]
    indices = [
        i for i, s in zip(indices, samples, strict=False) if not isinstance(s, CorruptImageError)
    ]
    good = [s for s in samples if not isinstance(s, CorruptImageError)]
    if not good:
        return Batch(torch.empty(0, 3, 0, 0), torch.empty(0, dtype=torch.long), corrupt)
    # Stacked as they lie, pixel by pixel, and so channels_last.
    images = torch.stack([image.permute(1, 2, 0) for image, _ in good]).permute(0, 3, 1, 2)
    return Batch(images, torch.tensor([label for _, label in good]), corrupt, indices)


def readable(
    batches: Iterable[Batch | Exception], skip_corrupt: bool, skipped: dict[str, None]
) -> Iterator[Batch]:
    """Yields batches and reports the images that could not be read.

    Args:
        batches: an exception in place of a batch is raised here: it comes from a worker process,
            through which a raised one would lose its one clear line.
        skip_corrupt: whether to skip such images and add one message each to `skipped`.

    Raises:
        CorruptImageError: there is one, and it may not be skipped.
    """
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        if batch.corrupt and not skip_corrupt:
            raise CorruptImageError(f"{batch.corrupt[0]}; --skip-corrupt skips such files")
        skipped.update((str(error), None) for error in batch.corrupt)
        yield batch


class TrainBatches(Sampler[list[Key]]):
    """This process's share of every global batch of one epoch; an incomplete last batch is dropped.

    Args:
        count: images in the dataset.
        batch_size: images per step over all processes.

    Raises:
        ValueError: there are fewer images than one batch, or it does not split evenly.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size > count:
            raise ValueError(f"batch_size={batch_size} is more than the {count} training images")
        if batch_size % world_size():
            raise ValueError(f"batch_size={batch_size} must divide by {world_size()} processes")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = self.first_step = 0

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Sets the epoch of the next pass, and how many of its batches are left out."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng((ORDER_STREAM, self.seed, self.epoch))
        order = rng.permutation(self.count)
        for step in range(self.first_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [Key(self.epoch, int(i)) for i in batch[rank() :: world_size()]]


class EvalBatches(Sampler[list[Key]]):
    """Every image once over all processes, in order, with no padding."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.indices, self.batch_size = range(rank(), count, world_size()), batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for i in range(0, len(self.indices), self.batch_size):
            yield [Key(0, index) for index in self.indices[i : i + self.batch_size]]


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Applies the function to each item, in as many threads as PyTorch may use.

    Decoding releases the interpreter's lock, so `workers=0` uses all cores. In a worker process,
    where PyTorch has one thread, there is no pool.
    """
    threads = min(torch.get_num_threads(), MAX_THREADS, len(items))
    if threads < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:  # made in 0.1 ms
        return list(pool.map(function, items))


def make_loader(
    dataset: Dataset,
    batches: TrainBatches | EvalBatches | None,
    workers: int,
    pin_memory: bool = False,
    timeout_s: float = 0,
) -> DataLoader:
    """A DataLoader of `Batch`es whose workers live as long as it does.

    Args:
        batches: which images make a batch; None if the dataset yields complete batches.
        workers: decoding processes; 0 decodes in threads of this process.
        timeout_s: longest wait for a batch of a worker before PyTorch's RuntimeError; 0: no limit.
    """
    sampling = {"batch_size": None} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        dataset,
        **sampling,
        num_workers=workers,
        collate_fn=_identity,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        timeout=timeout_s if workers else 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else every epoch would draw from the global one
    )


def _identity(batch: Batch) -> Batch:
    return batch


def _ignore_signals(worker: int) -> None:
    """Terminals and job managers signal every process; only the trainer reacts, by saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """Kills the workers of loaders that are still referenced when Python exits.

    Python ends them with SIGTERM, which they ignore, and would then wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@dataclass(frozen=True)
class Splits:
    """Training and validation images of one `data_dir`, with their class names."""

    train: "ImageFiles | Shards"
    val: "ImageFiles | Shards"
    classes: list[str]


def open_folders(data_dir: str | Path, recipe: Recipe, seed: int = 0) -> Splits:
    """Opens `data_dir/train` and `data_dir/val` with the recipe's transforms.

    Raises:
        LayoutError: no such folders, a flat val, or classes that differ (see
            `utils.data.imagenet.check_layout`).
    """
    classes = check_layout(data_dir)
    train = ImageFiles(Path(data_dir) / "train", classes, train_transform(recipe), seed)
    val = open_val(data_dir, classes, recipe)
    return Splits(train, val, classes)


def hold_out(data: Splits, recipe: Recipe, every: int) -> Splits:
    """`data` with a slice of its training images in the place of its validation images.

    Each `every`-th training image of a class, in the order of names, is taken out of training and
    read with the validation's transform: choices are made on these, and `val` is kept for the end.

    Raises:
        ValueError: `every` is below 2.
        LayoutError: a class would keep nothing on one of the two sides.
    """
    if every < 2:
        raise ValueError(f"every={every} must be at least 2")
    labels = data.train.labels
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)  # within the class
    held = place % every == every - 1
    for label, name in enumerate(data.classes):
        if not held[labels == label].any():
            raise LayoutError(f"{data.train.folder / name}: fewer than {every} images to cut from")
    val = copy.copy(data.train)
    val.transform = eval_transform(recipe.eval_resize_px, recipe.eval_crop_px)
    val.names, val.labels = data.train.names[held], labels[held]
    train = copy.copy(data.train)
    train.names, train.labels = data.train.names[~held], labels[~held]
    return Splits(train, val, data.classes)


def open_val(data_dir: str | Path, classes: list[str], recipe: Recipe) -> ImageFiles:
    """The validation images of `data_dir`, whose classes must be `classes`.

    Raises:
        LayoutError: as `open_folders`, or other classes.
    """
    validate_classes(data_dir, check_layout(data_dir), classes)
    transform = eval_transform(recipe.eval_resize_px, recipe.eval_crop_px)
    return ImageFiles(Path(data_dir) / "val", classes, transform)


def validate_classes(data_dir: str | Path, found: list[str], classes: list[str]) -> None:
    """LayoutError if the classes found are not those of a checkpoint."""
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise LayoutError(
            f"{data_dir}: {len(found)} classes, not the {len(classes)} of the checkpoint; {odd[0]} "
            "is in only one of the two"
        )


class Preprocess:
    """uint8 images to the network's input, on the device they are on.

    Args:
        cutmix_alpha, mixup_alpha: as in Recipe; each batch gets one of those that are on.
    """

    def __init__(
        self,
        device: torch.device,
        num_classes: int,
        channels_last: bool = True,
        cutmix_alpha: float = 0.0,
        mixup_alpha: float = 0.0,
    ) -> None:
        mean, std = torch.tensor(MEAN_RGB), torch.tensor(STD_RGB)
        self.scale, self.shift = (1 / std).to(device), (-mean / std).to(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.device = device
        mixes = [(v2.CutMix, cutmix_alpha), (v2.MixUp, mixup_alpha)]
        mixes = [mix(alpha=alpha, num_classes=num_classes) for mix, alpha in mixes if alpha > 0]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Float images `[N, 3, H, W]` with zero mean and unit variance on ImageNet, and targets.

        Targets are class numbers `[N]`, or `[N, num_classes]` shares where images were mixed. What
        is random comes from PyTorch's CPU generator.
        """
        images = batch.images.to(self.device, non_blocking=True)
        images = self._normalise(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        labels = batch.labels.to(self.device, non_blocking=True)
        if self.mix:
            images, labels = self.mix(images, labels)
        return images.contiguous(memory_format=self.memory_format), labels

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 to float, `[N, H, W, 3]`."""
        width = images.shape[2]
        # Rows of all channels: CPUs are slow at a sum whose innermost axis has length 3.
        rows = images.float(memory_format=torch.contiguous_format).flatten(2)
        shift, scale = self.shift.repeat(width), self.scale.repeat(width)
        return torch.addcmul(shift, rows, scale, out=rows).unflatten(2, (-1, 3))
