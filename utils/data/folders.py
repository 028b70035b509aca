"""Images from class folders to batches on the device.

The random state of a sample depends on (seed, epoch, index) alone, so a run is the same with any
number of workers and after any interruption. Images stay uint8 until `Preprocess` normalises and
mixes them on the device.
"""

import copy
import hashlib
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from utils.cli import DataError, summarize, warn
from utils.data.imagenet import IMAGE_SUFFIXES, LayoutError, check_layout
from utils.data.transforms import (
    CorruptImageError,
    Transform,
    eval_transform,
    open_image,
    train_transform,
)
from utils.distributed import rank, world_size
from utils.recipe import Recipe

# First word of every seed, so that no two uses of (seed, ...) draw the same numbers.
SAMPLE_STREAM, ORDER_STREAM, STEP_STREAM = range(3)
MAX_THREADS = 4  # decoding holds the interpreter's lock for a sixth of its time


def stream_seed(*words: int) -> int:
    """Mixes non-negative integers to a seed of 64 bits."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def sample_rng(seed: int, epoch: int, index: int) -> random.Random:
    """The random numbers of one image in one epoch."""
    return random.Random(stream_seed(SAMPLE_STREAM, seed, epoch, index))


@contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Runs the block with PyTorch's CPU generator seeded by `words`, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(*words))
        yield


class Key(NamedTuple):
    """What a sampler requests of a dataset; it carries the epoch to the workers."""

    epoch: int
    index: int


class Batch(NamedTuple):
    """uint8 `images` `[N, 3, H, W]` in channels_last, `labels` `[N]`, and their dataset `indices`.

    `corrupt` holds the errors of the unreadable images, which the others leave out.
    """

    images: Tensor
    labels: Tensor
    corrupt: list[CorruptImageError]
    indices: Sequence[int] = ()


class ImageFiles(Dataset):
    """The images in and below `folder/<class>/`, in the order of torchvision's ImageFolder.

    What is left out is printed in one line; see `find_images`.

    Args:
        classes: names of the class folders; their order numbers the labels.
        transform: may run in several threads.
        seed: seed of the transform's random numbers and of the training order.

    Attributes:
        packed: identifies the files of shards when a run is resumed; None for class folders.

    Raises:
        LayoutError: a class folder holds no image.
    """

    packed: dict[str, str] | None = None

    def __init__(
        self, folder: Path, classes: list[str], transform: Transform, seed: int = 0
    ) -> None:
        self.folder, self.classes, self.transform, self.seed = folder, classes, transform, seed
        found, left_out = find_images(folder)
        if left_out:
            warn(
                f"{folder}: left out, as not named like images, hidden, or in no class folder: "
                + summarize(left_out)
            )
        parts = {name: [] for name in classes}
        for path in sorted(found):
            parts.setdefault(path.split("/")[0], []).append(found[path])
        counts = [sum(map(len, parts[name])) for name in classes]
        if 0 in counts:
            empty, suffixes = folder / classes[counts.index(0)], " ".join(IMAGE_SUFFIXES)
            raise LayoutError(f"{empty}: no image in this class folder; names end in {suffixes}")
        self.names = np.concatenate([part for name in classes for part in parts[name]])
        self.labels = np.repeat(np.arange(len(classes)), counts)

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """Identifies the images when a run is resumed: a hash of their paths and sizes.

        Asks for the status of every file, six seconds for a million on a local disk.
        """
        prefix, sizes = os.fsencode(self.folder / "_")[:-1], np.full(len(self), -1)
        for index, name in enumerate(self.names.tolist()):
            with suppress(OSError):  # a broken link
                sizes[index] = os.stat(prefix + name).st_size
        content = hashlib.sha256(self.names.tobytes() + sizes.tobytes())
        return f"paths and sizes {content.hexdigest()[:32]}"

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.folder / os.fsdecode(bytes(self.names[index]))

    def __getitems__(self, keys: list[Key]) -> Batch:
        """A complete batch, as a DataLoader requests it."""
        return load_batch(self.__getitem__, keys, [key.index for key in keys])

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        image = open_image(self.path(key.index))
        return self.transform(image, sample_rng(self.seed, *key)), int(self.labels[key.index])

    def train_loader(self, batch_size: int, *options: Any) -> DataLoader:
        """A loader of this process's share of the training batches; `begin` sets the epoch.

        Args:
            batch_size: images per step over all processes.
            options: workers, pin_memory, timeout_s; see `make_loader`.
        """
        return make_loader(self, TrainBatches(len(self), batch_size, self.seed), *options)

    def eval_loader(self, batch_size: int, *options: Any) -> DataLoader:
        """A loader of this process's share of the images, each once."""
        return make_loader(self, eval_batches(len(self), batch_size), *options)


def find_images(root: Path, top: bool = False) -> tuple[dict[str, np.ndarray], list[str]]:
    """Walks through class folders, nested ones and links, as torchvision's ImageFolder does.

    Unlike it, hidden files and folders are left out. Broken links are reported when read.

    Args:
        top: whether images in `root` itself count, under "".

    Returns:
        The images of each folder, as "class/name" or "class/.../name" in bytes, sorted. Arrays, not
        a million str: a worker that reads a str gets a copy of its memory page. And what is left
        out, but for hidden files other than images, such as .DS_Store.
    """
    found, left_out, folders = {}, [], [""]
    for folder in folders:  # which grows
        prefix, names = folder and f"{folder}/", []
        with os.scandir(root / folder) as entries:
            for entry in entries:  # a million: nothing here asks the disk again
                is_hidden = entry.name.startswith(".")
                is_image = entry.name.lower().endswith(IMAGE_SUFFIXES)
                is_taken = is_image and (folder or top) and not is_hidden
                if is_taken and (entry.is_symlink() or entry.is_file()):
                    names.append(entry.name)
                elif entry.is_dir() and not is_hidden:
                    folders.append(prefix + entry.name)
                elif is_image or not is_hidden or entry.is_dir():
                    left_out.append(prefix + entry.name)
        if names:
            found[folder] = np.array([os.fsencode(prefix + name) for name in sorted(names)])
    return found, sorted(left_out)


def images_below(folder: str | Path) -> list[str]:
    """Paths of the images in and below a folder, sorted; prints which files are left out.

    Raises:
        DataError: there is no image.
    """
    images, left_out = find_images(Path(folder), top=True)
    if not images:
        raise DataError(f"{folder}: no image in this folder; names end in {IMAGE_SUFFIXES}")
    if left_out:
        warn(f"{folder}: left out, as not named like images, or hidden: {summarize(left_out)}")
    names = (os.fsdecode(name) for part in images.values() for name in part.tolist())
    return sorted(os.path.join(folder, name) for name in names)


def load_batch(
    load: Callable[[Any], tuple[Tensor, int]], items: Sequence[Any], indices: Sequence[int] = ()
) -> Batch:
    """Loads images in as many threads as PyTorch uses (a worker has one), and stacks them.

    Args:
        load: image and label of an item; its CorruptImageError ends up in the batch.
        indices: indices of the items in the dataset.
    """

    def attempt(item: Any) -> tuple[Tensor, int] | CorruptImageError:
        try:
            return load(item)
        except CorruptImageError as error:
            # Without its traceback: a worker would raise it with several lines.
            return CorruptImageError(str(error))

    threads = min(torch.get_num_threads(), MAX_THREADS, len(items))
    if threads < 2:
        samples = [attempt(item) for item in items]
    else:
        with ThreadPoolExecutor(threads) as pool:  # made in 0.1 ms
            samples = list(pool.map(attempt, items))
    corrupt = [sample for sample in samples if isinstance(sample, CorruptImageError)]
    good = [k for k, sample in enumerate(samples) if not isinstance(sample, CorruptImageError)]
    if not good:
        return Batch(torch.empty(0, 3, 0, 0), torch.empty(0, dtype=torch.long), corrupt)
    # Stacking [H, W, 3] keeps channels_last.
    images = torch.stack([samples[k][0].permute(1, 2, 0) for k in good]).permute(0, 3, 1, 2)
    labels = torch.tensor([samples[k][1] for k in good])
    return Batch(images, labels, corrupt, [indices[k] for k in good] if indices else ())


def readable(
    batches: Iterable[Batch | DataError], skip_corrupt: bool, skipped: dict[str, None]
) -> Iterator[Batch]:
    """Passes batches on; raises the DataError that stands in place of a batch.

    Args:
        skip_corrupt: add the messages of unreadable images to the keys of `skipped` instead of
            raising the first one's CorruptImageError.
    """
    for batch in batches:
        if isinstance(batch, DataError):
            raise type(batch)(str(batch))  # `raise batch` would keep the loader in a cycle
        if batch.corrupt and not skip_corrupt:
            raise CorruptImageError(f"{batch.corrupt[0]}; --skip-corrupt leaves such files out")
        skipped.update((str(error), None) for error in batch.corrupt)
        yield batch


class TrainBatches(Sampler[list[Key]]):
    """This process's share of every batch of one epoch; an incomplete last batch is dropped.

    Args:
        count: images in the dataset.
        batch_size: images per step over all processes.

    Raises:
        ValueError: there are fewer images than one batch, or it does not split evenly.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size > count:
            raise ValueError(
                f"batch_size={batch_size} is more than the {count} training images; give a smaller "
                "--batch-size"
            )
        if batch_size % world_size():
            raise ValueError(f"batch_size={batch_size} must divide by {world_size()} processes")
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.begin(epoch=0)

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Sets the epoch of the next pass, and how many of its batches are skipped."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng((ORDER_STREAM, self.seed, self.epoch))
        order = rng.permutation(self.count)
        for step in range(self.first_step, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield [Key(self.epoch, int(i)) for i in batch[rank() :: world_size()]]


def eval_batches(count: int, batch_size: int) -> BatchSampler:
    """Every image once over all processes, in order, without padding."""
    keys = [Key(0, index) for index in range(rank(), count, world_size())]
    return BatchSampler(keys, max(1, batch_size // world_size()), drop_last=False)


class _Loader(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        """Starts workers with signals blocked: none may reach one before `_quiet_worker`."""
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def make_loader(
    dataset: Dataset,
    batches: Sampler | None,
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
    if workers:  # in processes of multiprocessing atexit runs nothing
        multiprocessing.util.Finalize(None, _kill_workers, exitpriority=0)
    return _Loader(
        dataset,
        **sampling,
        num_workers=workers,
        collate_fn=torch.nn.Identity(),  # they are collated
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        timeout=timeout_s if workers else 0,
        worker_init_fn=_quiet_worker,
        generator=torch.Generator(),  # else every epoch would draw from the global one
    )


def begin(loader: DataLoader, epoch: int, first_step: int = 0) -> None:
    """Sets the epoch of a training loader's next pass, and how many of its batches are skipped."""
    (loader.batch_sampler or loader.dataset).begin(epoch, first_step)


def _quiet_worker(worker: int) -> None:
    """Leaves signals, which terminals send to every process, and errors to the trainer.

    PyTorch hands a worker's errors over; what is left for the hook is multiprocessing's thread that
    shares memory, when the trainer closes its end.
    """
    sys.excepthook = lambda *error: None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    """Kills what is left at exit: Python would send SIGTERM, which workers ignore, and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


@dataclass(frozen=True)
class Splits:
    """Training and validation images, as ImageFiles or utils.data.shards.Shards; class names."""

    train: Any
    val: Any
    classes: list[str]

    def describe(self, batch_size: int) -> str:
        """What a run trains on, in a line."""
        return (
            f"data: {len(self.train)} training and {len(self.val)} validation images, "
            f"{len(self.train) // batch_size} steps of {batch_size} images per epoch; classes: "
            f"{summarize(self.classes)}"
        )


def open_folders(
    data_dir: str | Path, recipe: Recipe, seed: int = 0, val_share: float = 0.0
) -> Splits:
    """Opens `data_dir/train` and `data_dir/val` with the recipe's transforms.

    Args:
        val_share: share of each class that is held out for validation where there is no `val/`;
            `data_dir` may then hold the class folders itself.

    Raises:
        LayoutError: from `utils.data.imagenet.check_layout`, or a class folder holds no image.
    """
    folder = Path(data_dir)
    if not val_share:
        classes = check_layout(folder)
        train = ImageFiles(folder / "train", classes, train_transform(recipe), seed)
        val = ImageFiles(folder / "val", classes, eval_transform(recipe))
        return Splits(train, val, classes)
    if (folder / "val").is_dir():
        raise LayoutError(f"{folder / 'val'} exists; omit --val-share, or give train/ alone")
    train = folder / "train"  # unless that is the name of a class
    split = "train" * (train.is_dir() and any(entry.is_dir() for entry in train.iterdir()))
    classes = check_layout(folder, [split])
    train = ImageFiles(folder / split, classes, train_transform(recipe), seed)
    return hold_out(Splits(train, None, classes), recipe, val_share)


def hold_out(data: Splits, recipe: Recipe, share: float) -> Splits:
    """Replaces the validation images by a share of the training images, to tune choices on.

    Raises:
        LayoutError: a class has too few images.
    """
    train, val = split_share(data.train, share)
    val.transform = eval_transform(recipe)
    return Splits(train, val, data.classes)


def split_share(images: ImageFiles, share: float) -> tuple[ImageFiles, ImageFiles]:
    """Splits images into two; the second has a share, such as every tenth image, of each class.

    Raises:
        LayoutError: a class has too few images.
    """
    labels = images.labels
    position = np.arange(len(labels)) - np.searchsorted(labels, labels)  # within the class
    before, after = ((position + i) * share + 1e-9 for i in (0, 1))  # 10 x 0.1 counts as 1
    taken, parts = np.floor(before) < np.floor(after), []
    for mask in (~taken, taken):
        counts = np.bincount(labels[mask], minlength=len(images.classes))
        if not counts.all():
            folder = images.folder / images.classes[counts.argmin()]
            raise LayoutError(f"{folder}: too few images to split off a share of {share:g}")
        part = copy.copy(images)
        part.names, part.labels = images.names[mask], labels[mask]
        parts.append(part)
    return parts[0], parts[1]


class Preprocess:
    """Turns uint8 images into the network's input, on the device.

    Args:
        recipe: for mean, deviation, memory format and mixing.
        mix_classes: number of classes for CutMix and MixUp, of which each batch gets one if the
            recipe has any; None never mixes.
    """

    def __init__(
        self, device: torch.device, recipe: Recipe, mix_classes: int | None = None
    ) -> None:
        mean, std = 255 * torch.tensor([recipe.mean, recipe.std], dtype=torch.float64)
        self.scale, self.shift = (1 / std).float().to(device), (-mean / std).float().to(device)
        self.memory_format = (
            torch.channels_last if recipe.channels_last else torch.contiguous_format
        )
        self.device = device
        mixes = [(v2.CutMix, recipe.cutmix_alpha), (v2.MixUp, recipe.mixup_alpha)]
        mixes = [mix(alpha=alpha, num_classes=mix_classes) for mix, alpha in mixes if alpha > 0]
        self.mix = v2.RandomChoice(mixes) if mixes and mix_classes else None

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalized images `[N, 3, H, W]`, and targets.

        Targets are class numbers `[N]`, or probabilities `[N, num_classes]` where images are mixed.
        Random numbers come from PyTorch's CPU generator.
        """
        images = batch.images.to(self.device, non_blocking=True)
        labels = batch.labels.to(self.device, non_blocking=True)
        width = images.shape[3]
        # Rows [N, H, W * 3]: CPUs are slow at sums whose innermost axis has length 3.
        rows = images.permute(0, 2, 3, 1).float(memory_format=torch.contiguous_format).flatten(2)
        shift, scale = self.shift.repeat(width), self.scale.repeat(width)
        rows = torch.addcmul(shift, rows, scale, out=rows)
        images = rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)
        if self.mix:
            images, labels = self.mix(images, labels)
        return images.contiguous(memory_format=self.memory_format), labels
