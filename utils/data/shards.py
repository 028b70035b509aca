"""Images in WebDataset tar files ("shards"), for data that outgrow a disk: how they are read.

A split is a row of tar files, train-000000.tar and so on. Every one of them says what the whole
split is, so that a shard that comes through a pipe needs no other file:

    __meta__/index.json   an `Index`; the library's own readers leave such names out
    000000123.cls         the label's number, as text; 123 counts through all shards of the split
    000000123.jpg         the bytes of the image file, whatever its format
    000000123.path        its class folder and name, which may hold dots, spaces and any bytes

Training images are shuffled when they are packed (`utils.data.packing`), so that any shard is a mix of
all classes, and an epoch reads the shards in a new order, through a shuffle buffer.
"""

import contextlib
import dataclasses
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import webdataset
from braceexpand import UnbalancedBracesError, braceexpand
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import Pipe, gopen, set_options
from webdataset.tariterators import tar_file_iterator

from utils.cli import DataError, printable, summarize
from utils.data.folders import (
    ORDER_STREAM,
    Batch,
    CorruptImageError,
    collate,
    in_threads,
    sample_rng,
    stream_seed,
)
from utils.data.transforms import Transform, eval_transform, open_image, train_transform
from utils.distributed import rank, world_size
from utils.recipe import Recipe

SPLITS = ("train", "val")
FORMAT = 1
INDEX_KEY = "__meta__/index"
SUFFIXES = ("cls", "jpg", "path")  # in the order in which TarWriter writes them
MOST_IMAGES = 10**9  # of a split: nine digits name them
BUFFER_IMAGES = 1000  # encoded ones that a worker shuffles among: 110 MB of ImageNet
SHARD_NAME = re.compile(r"(?<![A-Za-z0-9])(train|val)-(\d+)\.tar")
EXAMPLE = "shards/{train-{000000..001281},val-{000000..000049}}.tar"


class ShardError(DataError):
    """Shards that cannot be used; the text is one line for the user and names the file."""


@dataclass(frozen=True)
class Index:
    """What every shard says of its split.

    Attributes:
        shard: number of this shard.
        counts: images in each shard of the split.
        classes: names of the classes; their order numbers the labels.
        seed: of the order in which training images were packed.
        files: SHA-256 of the names of all files of the tree, train and val.
    """

    format: int
    split: str
    shard: int
    counts: list[int]
    classes: list[str]
    seed: int
    files: str

    def odd_entry(self) -> str:
        """The first entry that no shard may have, with its value; empty if all may be."""
        counts, classes = (
            values if _all_are(kind, values) else []
            for kind, values in ((int, self.counts), (str, self.classes))
        )
        good = {
            "format": self.format == FORMAT,
            "split": self.split in SPLITS,
            "counts": counts and min(counts) > 0 and sum(counts) <= MOST_IMAGES,
            "shard": type(self.shard) is int and 0 <= self.shard < len(counts),
            "classes": classes
            and classes == sorted(set(classes))
            and all(name not in ("", "..") and not set(name) & {"/", "\0"} for name in classes),
            "seed": type(self.seed) is int and self.seed >= 0,
            "files": isinstance(self.files, str),
        }
        return next((f"{key}={getattr(self, key)!r}" for key in good if not good[key]), "")

    def difference(self, wanted: "Index") -> str:
        """Words for the first thing in which it differs from `wanted`; empty if in nothing."""
        here, there = f"{self.split} shard {self.shard}", f"{wanted.split} shard {wanted.shard}"
        if self.classes != wanted.classes:
            odd = sorted(set(self.classes) ^ set(wanted.classes))
            return f"its classes differ: {summarize(odd)}"
        if self.files != wanted.files:
            return "it was made from a tree with other files"
        if self.seed != wanted.seed:
            return f"it was made with --seed {self.seed}, not {wanted.seed}"
        if self.split == wanted.split and self.counts != wanted.counts:
            return f"it was made with --images-per-shard {self.counts[0]}, not {wanted.counts[0]}"
        return "" if here == there else f"it holds {here}, not {there}"


def _all_are(kind: type, values: Any) -> bool:
    """Whether it is a list of such values, and of one at least."""
    return type(values) is list and values != [] and all(type(each) is kind for each in values)


# ---- opening -----------------------------------------------------------------------------------


def is_shards(data_dir: str) -> bool:
    """Whether a --data-dir names shards, by a pipe or a brace pattern, and no folder."""
    return data_dir.startswith("pipe:") or ("{" in data_dir and not os.path.isdir(data_dir))


def expand(pattern: str) -> dict[str, list[str]]:
    """The URLs of the train and of the val shards in a brace pattern, in order of their numbers.

    Raises:
        ShardError: one of them is no shard's name or is named twice, or a split has none.
    """
    try:
        urls = list(braceexpand(pattern))
    except UnbalancedBracesError as error:
        raise ShardError(f"{pattern}: a brace is not closed; write it as in {EXAMPLE}") from error
    found = {split: {} for split in SPLITS}
    for url in urls:
        split, number = _place(url)
        if number in found[split]:
            raise ShardError(f"{pattern}: {split} shard {number} is named twice")
        found[split][number] = url
    for split, numbered in found.items():
        if not numbered:
            raise ShardError(f"{pattern}: no {split} shard; name both splits, as in {EXAMPLE}")
    return {split: [found[split][number] for number in sorted(found[split])] for split in SPLITS}


def _place(url: str) -> tuple[str, int]:
    """Split and number of a shard by its name, the last in a command."""
    if not (names := SHARD_NAME.findall(url)):
        raise ShardError(f"{url}: names no shard, such as train-000000.tar")
    return names[-1][0], int(names[-1][1])


def open_shards(
    pattern: str, recipe: Recipe, seed: int = 0
) -> tuple["Shards", "Shards", list[str]]:
    """The train and the val shards of a brace pattern with the recipe's transforms; the classes.

    Reads the beginning of one shard of each split; all others are checked when they are read.

    Raises:
        ShardError: from `expand` and `Shards`, or the two splits are not of one set.
    """
    urls = expand(pattern)
    train = Shards(urls["train"], train_transform(recipe), seed)
    val = Shards(urls["val"], eval_transform(recipe.eval_resize_px, recipe.eval_crop_px))
    train.refuse_other_set(val)
    return train, val, train.classes


def read_index(url: str) -> Index:
    """What a shard says of its split, from its first member.

    Raises:
        ShardError: it cannot be read, or is none of `utils.data.packing`'s.
    """
    with contextlib.closing(_files(url)) as files:
        return _parse_index(url, next(files, None))


def _parse_index(url: str, file: tuple[str, bytes] | None) -> Index:
    if file is None or file[0] != f"{INDEX_KEY}.json":
        raise ShardError(f"{url}: not a shard of scripts/make_shards.py, which must make it")
    try:
        found = json.loads(file[1])
    except (ValueError, RecursionError):
        found = None
    version = found.get("format") if isinstance(found, dict) else FORMAT
    if type(version) is int and version != FORMAT:
        raise ShardError(f"{url}: has format {version}, not {FORMAT}: make the shards again")
    try:
        index = Index(**found)
        reason = index.odd_entry()
    except TypeError as error:  # no such entries, or no entries at all
        reason = str(error).partition("__init__() ")[2] or "not what it should be"
    if reason:
        raise ShardError(
            f"{url}: {file[0]} in it is damaged ({reason[:100]}): copy the shard again"
        )
    return index


def _files(url: str, wanted: Callable[[str], bool] | None = None) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file in a tar, or of those whose name is `wanted`.

    Raises:
        ShardError: the tar cannot be opened or is broken, or its command failed.
    """
    stream = _open(url)
    problem = None
    try:
        for file in tar_file_iterator(stream, skip_meta=None, select_files=wanted):
            yield file["fname"], file["data"]
    except GeneratorExit:
        set_options(stream, ignore_errors=True)  # a command that is cut off complains
        stream.close()
        raise
    except Exception as error:  # tarfile raises many types on broken headers
        problem = error
    with contextlib.suppress(OSError):  # a failed command shows in its status
        while stream.read(1 << 20):  # what follows the tar's end, or the command would complain
            pass
    with contextlib.suppress(OSError):
        stream.close()
    if status := getattr(stream, "status", None):
        raise ShardError(f"{url}: its command ended with exit status {status}")
    if problem:
        reason = str(problem).partition(" @ ")[0] or type(problem).__name__
        raise ShardError(f"{url}: not a whole tar file: {reason}") from problem


def _open(url: str) -> IO[bytes]:
    try:
        # The library would take a folder "a:b" for a protocol.
        if os.path.exists(url):
            return open(url, "rb")
        if url.startswith("pipe:"):  # Ctrl-C is for the trainer, which saves first
            command = url.removeprefix("pipe:")
            return Pipe(command, mode="rb", shell=True, start_new_session=True)
        return gopen(url)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ShardError(f"{url}: cannot be opened: {reason}") from error


class Packed(NamedTuple):
    """One image as it lies in a shard: its number in the split, label, old path, file's bytes."""

    index: int
    label: int
    path: bytes
    content: bytes


class Shards:
    """The shards of one split; see `ShardStream` for their images.

    Args:
        urls: paths or pipes of all its shards, in the order of their numbers.
        transform: as in `utils.data.folders.ImageFiles`.
        seed: of the order and of the transform's random numbers.

    Raises:
        ShardError: the first shard cannot be read, or the split has other shards than these.
    """

    def __init__(self, urls: list[str], transform: Transform, seed: int = 0) -> None:
        self.urls, self.transform, self.seed = urls, transform, seed
        self.index = read_index(urls[0])
        self.classes = self.index.classes
        self.starts = np.array([0, *accumulate(self.index.counts)])
        numbers, all_numbers = {_place(url)[1] for url in urls}, set(range(len(self.index.counts)))
        if odd := sorted(numbers ^ all_numbers):
            raise ShardError(
                f"{urls[0]}: one of {len(all_numbers)} {self.index.split} shards, not of "
                f"{len(urls)}: name all of them; missing or too many: {summarize(list(map(str, odd)))}"
            )
        self._refuse(0, self.index)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def path(self, index: int) -> str:
        """Where an image lies: its shard and its key there."""
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return f"{self.urls[shard]}: {index:09d}"

    def refuse_other_set(self, other: "Shards") -> None:
        """ShardError if another split was not packed from the same tree with the same seed."""
        wanted = dataclasses.replace(self.index, split="val", counts=other.index.counts)
        if text := other.index.difference(wanted):
            raise ShardError(f"{other.urls[0]}: not of one set with {self.urls[0]}: {text}")

    def _refuse(self, shard: int, found: Index) -> None:
        split = _place(self.urls[shard])[0]
        if text := found.difference(dataclasses.replace(self.index, split=split, shard=shard)):
            beside = f"not of one set with {self.urls[0]}: " if shard else ""
            raise ShardError(f"{self.urls[shard]}: {beside}{text}")

    def read(self, order: Sequence[int], first: int, last: int) -> Iterator[Packed]:
        """Images `first` to `last - 1` of the shards laid end to end in this order.

        Raises:
            ShardError: a shard is missing, broken, or not what the others say it is.
        """
        place = 0
        for shard in order:
            start, count = int(self.starts[shard]), self.index.counts[shard]
            begin, end = max(first - place, 0), min(last - place, count)
            if begin < end:
                yield from self._read_shard(shard, start + begin, start + end)
            place += count

    def _read_shard(self, shard: int, first: int, last: int) -> Iterator[Packed]:
        url = self.urls[shard]
        # Keys of one length sort as their numbers do, and the index's name after all of them.
        with contextlib.closing(_files(url, lambda name: name >= f"{first:09d}")) as files:
            self._refuse(shard, _parse_index(url, next(files, None)))
            for index in range(first, last):
                wanted = [f"{index:09d}.{suffix}" for suffix in SUFFIXES]
                found = dict(islice(files, len(SUFFIXES)))
                if list(found) != wanted:
                    raise ShardError(
                        f"{url}: image {index:09d} is missing, though its index says "
                        f"{self.index.counts[shard]} images: copy or make the shard again"
                    )
                label, content, path = found.values()
                if not label.isdigit() or int(label) >= len(self.classes):
                    raise ShardError(f"{self.path(index)}: {label[:20]!r} is no label")
                yield Packed(index, int(label), path, content)
            if last == self.starts[shard + 1] and next(files, None):
                raise ShardError(f"{url}: holds more than the images of its index: make it again")

    def decode(self, packed: Packed, epoch: int) -> tuple[Tensor, int] | CorruptImageError:
        """Image and label, or the error, as of `utils.data.folders.ImageFiles`."""
        path = os.fsdecode(packed.path)
        name = f"{self.path(packed.index)} ({printable(path)})"
        try:
            image = open_image(name, packed.content)
            rng = sample_rng(self.seed, epoch, packed.index)
            return self.transform(image, rng), packed.label
        except CorruptImageError as error:
            return CorruptImageError(str(error))


# ---- batches -----------------------------------------------------------------------------------


class ShardStream(IterableDataset):
    """This process's batches of one pass over shards, for a DataLoader with batch_size=None.

    Every epoch lays the shards end to end in an order of its own. Each process has an equal,
    contiguous part of that row, and each of its workers a contiguous part of the process's: batches
    w, w + n, ... of worker w of n. A worker opens only the shards that its part touches and
    shuffles within it, so that the order depends on seed, epoch, processes and workers (0 workers
    are as 1), while the random state of an image depends on (seed, epoch, index) alone.

    In training the images that fill no batch, at the end of the row, are left out of this epoch.
    In evaluation every image comes once, in order within a worker, and parts may be uneven.

    A shard's error comes in the place of a batch: `utils.data.workers.watched` raises it.

    Args:
        batch_size: images per step over all processes.

    Raises:
        ValueError: there are fewer training images than one batch, or it does not split evenly.
    """

    def __init__(self, shards: Shards, batch_size: int, train: bool) -> None:
        self.shards, self.train, count, world = shards, train, len(shards), world_size()
        # Known here: a worker process belongs to no process group.
        self.rank, self.batch_size = rank(), max(1, batch_size // world)
        if train:
            if batch_size > count:
                raise ValueError(
                    f"batch_size={batch_size} is more than the {count} training images"
                )
            if batch_size % world:
                raise ValueError(f"batch_size={batch_size} must divide by {world} processes")
            count -= count % batch_size
        self.first, self.last = (count * each // world for each in (self.rank, self.rank + 1))
        # Shared, as workers that outlive an epoch have copies of everything else.
        self._position = torch.zeros(2, dtype=torch.long).share_memory_()

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """Makes the next pass that of `epoch`, without the batches before `first_step`."""
        self._position.copy_(torch.tensor([epoch, first_step]))

    def __iter__(self) -> Iterator[Batch | ShardError]:
        epoch, first_step = self._position.tolist()  # now, not at the first batch
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # A loader asks worker 0 first, so that one must have batch `first_step`.
        lane = (number + first_step) % workers
        return self._batches(epoch, lane, workers, len(range(lane, first_step, workers)))

    def _batches(
        self, epoch: int, lane: int, workers: int, skip: int
    ) -> Iterator[Batch | ShardError]:
        """Batches `lane`, `lane + workers`, ..., without the first `skip` of them."""
        counts = [len(range(each, len(self), workers)) for each in range(workers)]
        first = self.first + sum(counts[:lane]) * self.batch_size
        last = min(first + counts[lane] * self.batch_size, self.last)
        seed, order = self.shards.seed, np.arange(len(self.shards.urls))
        if self.train:
            order = np.random.default_rng((ORDER_STREAM, seed, epoch)).permutation(order)
        images = self.shards.read(order, first, last)
        if self.train:
            rng = random.Random(stream_seed(ORDER_STREAM, seed, epoch, self.rank, lane))
            images = webdataset.shuffle(BUFFER_IMAGES, rng=rng)(images)
        try:
            images = islice(images, skip * self.batch_size, None)
            while chosen := list(islice(images, self.batch_size)):
                samples = in_threads(lambda packed: self.shards.decode(packed, epoch), chosen)
                yield collate(samples, [each.index for each in chosen])
        except ShardError as error:
            # Given, not raised: through a worker it would lose its one clear line.
            yield ShardError(str(error))
