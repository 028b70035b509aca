"""Packs the images of class folders into shards, and checks shards (see `utils.data.shards`).

Packing may be killed at any moment and started again: a shard gets its name when it is whole and
its checksum stands in SHA256SUMS, and what has both is left alone.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from webdataset import TarWriter

from utils.cli import progress_bar, summarize
from utils.data.folders import ImageFiles
from utils.data.imagenet import check_layout
from utils.data.shards import FORMAT, INDEX_KEY, SPLITS, Index, ShardError, Shards, read_index
from utils.data.transforms import pixels
from utils.records import lock, write_atomic

SUMS_NAME = "SHA256SUMS"  # as sha256sum writes it and --check reads it
FILE_NAME = re.compile(r"(train|val)-[0-9]{6,}\.tar")
SUMS_LINE = re.compile(rf"([0-9a-f]{{64}})  ({FILE_NAME.pattern})")
PACK_STREAM = 3  # first word of the packing order's seed; utils.data.folders has 0 to 2


class _Job(NamedTuple):
    """One shard to pack: these images of `source`, whose numbers begin with `first`."""

    index: Index
    source: ImageFiles
    order: np.ndarray
    first: int


def make_shards(
    data_dir: str | Path,
    output_dir: str | Path,
    images_per_shard: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> str:
    """Packs `data_dir/train` and `data_dir/val` into shards and returns a summary.

    The same tree and options give the same bytes. Each shard appears whole or not at all, after its
    checksum stands in SHA256SUMS; a second run leaves alone what has its checksum, and so goes on
    where a killed one was, and packs damaged shards anew.

    Raises:
        NotADirectoryError: there is no such `data_dir`.
        LayoutError: see `utils.data.imagenet.check_layout`; or a class folder holds no image.
        ShardError: `output_dir` holds shards of another tree or other options.
        ValueError: `images_per_shard` is below 1.
    """
    output_dir = Path(output_dir)
    jobs = _plan(Path(data_dir), images_per_shard, seed)
    output_dir.mkdir(parents=True, exist_ok=True)
    total = sum(len(job.order) for job in jobs.values())
    with lock(output_dir), progress_bar(total=total, unit=" images", disable=not progress) as bar:
        sums = _read_sums(output_dir)
        present = _refuse_others(output_dir, jobs, sums)
        sums = {name: sums[name] for name in present & sums.keys()}
        packed = []
        for name, job in jobs.items():
            if name in sums and _sha256(output_dir / name) == sums[name]:
                bar.update(len(job.order))
                continue
            write = partial(_write_shard, name=name, job=job, sums=sums, packed_one=bar.update)
            write_atomic(output_dir / name, write)
            packed.append(name)
    anew = sorted(present & set(packed))
    summary = f"{len(jobs)} shards of {total} images: packed {len(packed)}, "
    summary += f"{len(jobs) - len(packed)} were there already"
    return summary + (
        f"; packed anew, as their checksum was wrong: {summarize(anew)}" if anew else ""
    )


def _plan(data_dir: Path, images_per_shard: int, seed: int) -> dict[str, _Job]:
    """What belongs into each shard, by its name."""
    if images_per_shard < 1:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1")
    if not data_dir.is_dir():
        raise NotADirectoryError(f"{data_dir} is not a folder: give the one with train/ and val/")
    classes = check_layout(data_dir)
    sources = {split: ImageFiles(data_dir / split, classes, pixels) for split in SPLITS}
    files = hashlib.sha256()
    for split, source in sources.items():
        for name in source.names:
            files.update(os.fsencode(split) + b"/" + bytes(name) + b"\0")
    jobs = {}
    for split, source in sources.items():
        order = np.arange(len(source))
        if split == "train":
            order = np.random.default_rng((PACK_STREAM, seed)).permutation(len(source))
        firsts = range(0, len(source), images_per_shard)
        parts = [order[first : first + images_per_shard] for first in firsts]
        counts = [len(part) for part in parts]
        for shard, (first, part) in enumerate(zip(firsts, parts, strict=True)):
            index = Index(FORMAT, split, shard, counts, classes, seed, files.hexdigest())
            jobs[f"{split}-{shard:06d}.tar"] = _Job(index, source, part, first)
    return jobs


def _write_shard(
    aside: Path, name: str, job: _Job, sums: dict[str, str], packed_one: Callable[[], Any]
) -> None:
    """Packs a shard that is to be called `name`, and adds its checksum to `sums` and SHA256SUMS."""
    with aside.open("wb") as file:
        _pack(file, job, packed_one)
    # Before the shard has its name: one that is there and has no checksum is not ours.
    sums[name] = _sha256(aside)
    text = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    write_atomic(aside.with_name(SUMS_NAME), lambda path: path.write_bytes(text.encode()))


def _pack(file: IO[bytes], job: _Job, packed_one: Callable[[], Any]) -> None:
    # Times, owners and modes are fixed, and so the bytes.
    with TarWriter(file, encoder=False, user="", group="", mode=0o444, mtime=0) as tar:
        text = json.dumps(dataclasses.asdict(job.index))
        tar.write({"__key__": INDEX_KEY, "json": text.encode()})
        for number, i in enumerate(job.order, start=job.first):
            content = _read(job.source.path(i))
            label, path = str(job.source.labels[i]).encode(), bytes(job.source.names[i])
            tar.write({"__key__": f"{number:09d}", "cls": label, "jpg": content, "path": path})
            packed_one()


def _read(path: Path) -> bytes:
    """A file's bytes; an error names it, also one of a disk that fails amid the file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _refuse_others(output_dir: Path, jobs: dict[str, _Job], sums: dict[str, str]) -> set[str]:
    """Names of the shards that are there; ShardError if one is not of this tree and options."""
    wanted = {job.index.split: job.index for job in jobs.values()}
    wanted |= {name: job.index for name, job in jobs.items()}
    present = {path.name for path in output_dir.iterdir() if FILE_NAME.fullmatch(path.name)}
    for name in sorted(present):
        try:
            found = read_index(str(output_dir / name))
        except ShardError:
            if name in sums and name in jobs:  # ours and damaged
                continue
            raise
        if text := found.difference(wanted.get(name, wanted[name.split("-")[0]])):
            raise ShardError(
                f"{output_dir / name}: {text}; repeat the command that made it, or choose another "
                "--output-dir"
            )
    return present


def verify_shards(output_dir: str | Path, progress: bool = False) -> str:
    """Reads all shards back, checks checksums, counts, keys and labels, and returns a summary.

    Raises:
        NotADirectoryError: there is no such folder.
        ShardError: something is missing or damaged.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise NotADirectoryError(f"{output_dir} is not a folder: give the one with the shards")
    sums = _read_sums(output_dir)
    urls = {s: [str(output_dir / n) for n in sorted(sums) if n.startswith(s)] for s in SPLITS}
    if not all(urls.values()):
        raise ShardError(f"{output_dir / SUMS_NAME}: names no train or no val shards: pack again")
    train, val = (Shards(urls[split], pixels) for split in SPLITS)
    train.refuse_other_set(val)
    total = len(train) + len(val)
    with progress_bar(total=total, unit=" images", disable=not progress) as bar:
        for shards in (train, val):
            for number, url in enumerate(shards.urls):
                _verify(shards, number, sums[os.path.basename(url)])
                bar.update(shards.index.counts[number])
    return f"{len(sums)} shards of {total} images: all as they were made"


def _verify(shards: Shards, number: int, sha256: str) -> None:
    url = shards.urls[number]
    if not os.path.isfile(url):
        raise ShardError(f"{url}: missing, and in {SUMS_NAME}: pack again")
    if _sha256(url) != sha256:
        raise ShardError(f"{url}: damaged: its checksum is not the one in {SUMS_NAME}: pack again")
    for each in shards.read([number], 0, shards.index.counts[number]):
        if each.path.split(b"/")[0] != os.fsencode(shards.classes[each.label]):
            raise ShardError(f"{shards.path(each.index)}: has the label of another class")


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS_NAME
    if not path.exists():
        return {}
    sums = {}
    for number, line in enumerate(path.read_bytes().decode(errors="replace").splitlines(), start=1):
        if not (match := SUMS_LINE.fullmatch(line)):
            raise ShardError(f"{path}: line {number} is not a checksum and a shard's name")
        sums[match[2]] = match[1]
    return sums


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
