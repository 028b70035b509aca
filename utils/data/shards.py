"""Images in WebDataset tar files ("shards"): loading and packing them.

Every shard describes its complete split, so that one from a pipe needs no other file:

    __meta__/index.json   split, number of this shard, images in every shard, classes, packing seed,
                          SHA-256 of all file names; other WebDataset readers skip this name
    000000123.cls         the label as text; 123 counts through all shards of the split
    000000123.jpg         the bytes of the image file, in any format
    000000123.path        its class folder and file name

Training images are shuffled when they are packed, so every shard is a mix of all classes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial, partialmethod
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from braceexpand import braceexpand
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import DataPipeline, TarWriter, batched, detshuffle
from webdataset.gopen import Pipe, gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator

from utils.cli import DataError, printable, progress_bar
from utils.data import folders
from utils.data.transforms import Transform, eval_transform, open_image, train_transform
from utils.distributed import rank, world_size
from utils.recipe import Recipe
from utils.records import file_digest, lock, write_atomic

BUFFER_IMAGES = 1000  # encoded images that each worker shuffles: 110 MB of ImageNet
SUMS = "SHA256SUMS"
PACK_STREAM = 3  # first word of the packing order's seed; utils.data.folders has 0 to 2
Sample = dict[str, Any]  # of webdataset: __key__, cls, jpg and path


def open_shards(pattern: str | Path, recipe: Recipe, seed: int = 0) -> folders.Splits:
    """The train and val shards of a brace pattern with the recipe's transforms.

    Raises:
        DataError: a split is missing or incomplete, its first shard cannot be read, or the two were
            not packed together. All other shards are checked when they are read.
    """
    train = Shards(str(pattern), "train", train_transform(recipe), seed)
    val = Shards(str(pattern), "val", eval_transform(recipe), seed)
    if val.index != train.index | {"split": "val", "counts": val.counts}:
        raise DataError(f"{val.urls[0]}: not packed together with {train.urls[0]}")
    return folders.Splits(train, val, train.classes)


def read_samples(url: str) -> Iterator[Sample]:
    """The index of a shard, then its images.

    Raises:
        DataError: the shard cannot be opened, is damaged, or ends before the next sample.
    """
    stream = None
    try:
        if url.startswith("pipe:"):  # in its own session: at Ctrl-C the trainer saves first
            options = {"shell": True, "start_new_session": True, "ignore_errors": True}
            stream = Pipe(url.removeprefix("pipe:"), mode="rb", **options)
        else:
            stream = gopen(url)
        with stream:
            files = tar_file_iterator(stream, skip_meta=None)
            samples = group_by_keys(file | {"__url__": url} for file in files)
            index = json.loads(next(samples)["json"])
            if index["format"] != 1:
                raise ValueError("no index that scripts/make_shards.py of this version writes")
            yield index
            yield from samples
            raise EOFError("ends before its last image")
    except Exception as error:  # tarfile raises many types on broken headers
        reason = re.split(" @ |\n", f"{type(error).__name__}: {error}")[0]
        if status := getattr(stream, "status", None):
            reason += f"; its command ended with exit status {status}"
        raise DataError(f"{url}: not a complete shard ({reason})") from error


class Shards:
    """The images of one split, in the shards of a brace pattern; the rest as in `ImageFiles`."""

    def __init__(self, pattern: str, split: str, transform: Transform, seed: int = 0) -> None:
        self.urls = [u for u in braceexpand(pattern) if re.search(rf"\b{split}-\d+\.tar", u)]
        if not self.urls:
            example = "shards/{train-{000000..001281},val-{000000..000049}}.tar"
            raise DataError(f"{pattern}: names no {split} shard; write it as in {example}")
        self.transform, self.seed = transform, seed
        self.index = next(read_samples(self.urls[0]))
        self.classes, self.counts = self.index["classes"], self.index["counts"]
        self.packed = {"files": self.index["files"], "packing_seed": self.index["seed"]}
        self.packed["images_per_shard"] = self.counts[0]
        self.starts = np.cumsum([0, *self.counts])
        self.labels = {str(label).encode(): label for label in range(len(self.classes))}
        if (found := len(self.urls)) != len(self.counts):
            raise DataError(f"{self.urls[0]}: one of {len(self.counts)} shards, not of {found}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """As of `ImageFiles`, of the names of both splits' files."""
        return self.index["files"]

    def path(self, index: int) -> str:
        """Shard and key of an image."""
        shard = np.searchsorted(self.starts, index, side="right") - 1
        return f"{self.urls[shard]}: {index:09d}"

    def read(self, order: Iterable[int], first: int, last: int) -> Iterator[Sample]:
        """Images `first` to `last - 1` of the shards laid end to end in this order."""
        for shard in order:
            count = self.counts[shard]
            if first < count and last > 0:
                yield from islice(self._read_shard(shard), max(first, 0), last)
            first, last = first - count, last - count

    def _read_shard(self, shard: int) -> Iterator[Sample]:
        samples = read_samples(self.urls[shard])
        if next(samples) != self.index | {"shard": shard}:
            raise DataError(f"{self.urls[shard]}: not shard {shard} of the set of {self.urls[0]}")
        for index in range(self.starts[shard], self.starts[shard + 1]):
            sample = next(samples)
            is_complete = sample.get("cls") in self.labels and {"jpg", "path"} <= sample.keys()
            if sample["__key__"] != f"{index:09d}" or not is_complete:
                raise DataError(f"{self.path(index)}: damaged; copy or pack the shard again")
            yield sample

    def decode(self, epoch: int, sample: Sample) -> tuple[Tensor, int]:
        """Image and label."""
        index = int(sample["__key__"])
        name = f"{self.path(index)} ({printable(os.fsdecode(sample['path']))})"
        image = open_image(name, sample["jpg"])
        rng = folders.sample_rng(self.seed, epoch, index)
        return self.transform(image, rng), self.labels[sample["cls"]]

    def train_loader(self, batch_size: int, *options: Any, train: bool = True) -> DataLoader:
        """As of `ImageFiles`."""
        return folders.make_loader(ShardBatches(self, batch_size, train), None, *options)

    eval_loader = partialmethod(train_loader, train=False)


class ShardBatches(IterableDataset):
    """This process's batches of one pass over the shards.

    Every epoch lays the shards end to end in a new order. Each process reads an equal contiguous
    part of this series, and each of its workers a part of that, through a shuffle buffer: were
    complete shards dealt, a small one would come many times in an epoch of equal steps. In training
    the last images, fewer than a batch, are left out; in evaluation each image comes once. After a
    resume the rest of an epoch has a new order. A shard's DataError comes in place of a batch.
    """

    def __init__(self, shards: Shards, batch_size: int, train: bool) -> None:
        self.shards, self.train, count = shards, train, len(shards)
        if train:
            count = len(folders.TrainBatches(count, batch_size, shards.seed)) * batch_size
        # Here, as a worker has no process group.
        self.first, self.last = (count * each // world_size() for each in (rank(), rank() + 1))
        self.batch_size = max(1, batch_size // world_size())
        self.position = torch.zeros(2, dtype=torch.long).share_memory_()  # by persistent workers

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def begin(self, epoch: int, first_step: int = 0) -> None:
        """As of `TrainBatches`."""
        self.position.copy_(torch.tensor([epoch, first_step]))

    def __iter__(self) -> Iterator[folders.Batch | DataError]:
        epoch, first_step = self.position.tolist()
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Where batches start. The loader asks its workers in turn: the first ones have one more.
        starts = range(self.first, self.last, self.batch_size)[: len(self) - first_step]
        starts = np.array_split(starts, workers)[number]
        if not len(starts):
            return
        order, shuffle = range(len(self.shards.urls)), None
        if self.train:
            seed = folders.stream_seed(folders.ORDER_STREAM, self.shards.seed, epoch, first_step)
            order = np.random.default_rng(seed).permutation(order)
            shuffle = detshuffle(BUFFER_IMAGES, seed=seed)
        end = min(starts[-1] + self.batch_size, self.last)
        samples = partial(self.shards.read, order, starts[0], end)
        decode = partial(self.shards.decode, epoch)
        try:
            for some in DataPipeline(samples, shuffle, batched(self.batch_size, None)):
                yield folders.load_batch(decode, some, [int(each["__key__"]) for each in some])
        except DataError as error:
            yield error


def make_shards(
    data_dir: Path, output_dir: Path, images_per_shard: int = 1000, seed: int = 0
) -> str:
    """Packs `data_dir/train` and `data_dir/val` into shards and returns a summary.

    The same files and options give the same bytes, so the same command resumes, and packs shards
    again that differ from SHA256SUMS, which it writes at its end in the format of sha256sum.

    Raises:
        DataError: from `open_folders`, or `output_dir` has shards of other files or options.
    """
    jobs, packed = list(_plan(data_dir, images_per_shard, seed)), 0
    output_dir.mkdir(parents=True, exist_ok=True)
    with lock(output_dir):
        sums = _read_sums(output_dir)
        for index, *content in progress_bar(jobs, unit=" shards"):
            path = output_dir / f"{index['split']}-{index['shard']:06d}.tar"
            digest = file_digest(path) if path.exists() else None
            if digest is None or digest != sums.get(path.name, digest):
                write_atomic(path, partial(_pack, index, *content))
                digest, packed = file_digest(path), packed + 1
            elif next(read_samples(str(path))) != index:
                raise DataError(f"{path}: of other files or options; choose another --output-dir")
            sums[path.name] = digest
        lines = [f"{sums[name]}  {name}\n" for name in sorted(sums)]
        write_atomic(output_dir / SUMS, partial(Path.write_text, data="".join(lines)))
    return f"{len(jobs)} shards: packed {packed}, {len(jobs) - packed} were there already"


def _plan(data_dir: Path, images_per_shard: int, seed: int) -> Iterator[tuple]:
    """The index of each shard, the `ImageFiles` of its split, and which of them are in it."""
    data = folders.open_folders(data_dir, Recipe())
    files = hashlib.sha256(data.train.names.tobytes() + data.val.names.tobytes()).hexdigest()
    shuffled = np.random.default_rng((PACK_STREAM, seed)).permutation(len(data.train))
    for split, order in (("train", shuffled), ("val", np.arange(len(data.val)))):
        parts = np.split(order, range(images_per_shard, len(order), images_per_shard))
        counts = [len(part) for part in parts]
        for shard, part in enumerate(parts):
            index = {"format": 1, "split": split, "shard": shard, "counts": counts}
            index |= {"classes": data.classes, "seed": seed, "files": files}
            yield index, getattr(data, split), part


def _pack(index: Sample, images: folders.ImageFiles, part: np.ndarray, path: Path) -> None:
    first = sum(index["counts"][: index["shard"]])
    # Times, owners and modes are fixed, and so the bytes.
    with path.open("wb") as file, TarWriter(file, user="", group="", mtime=0) as tar:
        tar.write({"__key__": "__meta__/index", "json": index})
        for key, image in enumerate(part, start=first):
            name, label = bytes(images.names[image]), images.labels[image]
            sample = {"jpg": images.path(image).read_bytes(), "cls": label, "path": name}
            tar.write({"__key__": f"{key:09d}", **sample})


def _read_sums(output_dir: Path) -> dict[str, str]:
    text = (output_dir / SUMS).read_text() if (output_dir / SUMS).exists() else ""
    return {name: digest for digest, name in re.findall(r"([0-9a-f]{64})  (\S+)\n", text)}
