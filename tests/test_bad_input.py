"""Whatever is wrong with what a user gives: one clear line, an exit code, and nothing half done.

One table: what is done to a good folder, the command that meets it, its exit code, and words of its
one line. What must be taken as it is stands in the same table with exit code 0. A port in use and
other mistakes of launchers are in tests/test_faults.py.
"""

import codecs
import errno
import fcntl
import io
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers import ROOT, at_most_mb, mounted, run, small_disk
from PIL import Image

A, B = "n00000000", "n00000001"
FIRST = Path("data/train") / A / "0.JPEG"
HEAD = "ImageId,PredictionString\n"
IMAGES = {f"ILSVRC2012_val_0000000{k}": (A, B)[k % 2] for k in range(4)}
ONE = next(iter(IMAGES))  # in A

TRAIN = (
    "train.py --data-dir data --output-dir new --recipe quick --epochs 1 --warmup-epochs 0 "
    "--batch-size 8 --train-crop-px 32 --eval-resize-px 36 --eval-crop-px 32 --width 0.125 "
    "--workers 0 --device cpu"
)
RESUME = f"{TRAIN} --output-dir done"
EVALUATE = "evaluate.py --checkpoint done/last.pt --data-dir data --workers 0 --device cpu"
PREDICT = f"predict.py {FIRST} --checkpoint done/last.pt --device cpu"
EXPORT = "export.py --checkpoint done/last.pt --output new.pt2"
SORT = "imagenet.py --val_solution_path solution.csv --val_image_dir flat"
PACK = "make_shards.py --data-dir data --output-dir new"
VERIFY = "make_shards.py --verify --output-dir shards"
STUDY = "ablate.py csp_split --data-dir data --runs-dir runs --output new.csv --devices cpu"
BENCH = "benchmark.py --backbones resnet18 --device cpu --output new.csv"


# ---- disks and permissions -----------------------------------------------------------------------

UNTIL_THE_END = ExitStack()  # of a test


def full_disk():
    """Folders have room there, and names, but no content has."""
    UNTIL_THE_END.enter_context(small_disk("disk", "8k"))
    Path("disk/full").write_bytes(bytes(8192))
    make_folder("disk/new")()


def read_only(path):
    def prepare():
        UNTIL_THE_END.enter_context(mounted(path, "--bind", path))
        subprocess.run(["mount", "-o", "remount,ro,bind", path], check=True)

    return prepare


def mode(path, bits):
    return lambda: Path(path).chmod(bits)


def little_memory(allowed_mb):
    """Of addresses: what allocators ask for beyond it is refused as it is by a full machine."""

    def prepare():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        UNTIL_THE_END.callback(resource.setrlimit, resource.RLIMIT_AS, before)
        resource.setrlimit(resource.RLIMIT_AS, (size + allowed_mb * 2**20, before[1]))

    return prepare


@contextmanager
def as_nobody():
    """The working directory is nobody's, and so is this process: root may do whatever it likes."""
    if os.geteuid():
        yield
        return
    for parent, folders, files in os.walk("."):
        for name in [".", *folders, *files]:
            os.lchown(os.path.join(parent, name), 65534, 65534)
    codecs.lookup("utf-8-sig")  # which nobody may not be able to import
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ---- images --------------------------------------------------------------------------------------


def picture(mode="RGB", size_px=(40, 32)):
    pixels = np.random.default_rng(1).integers(0, 256, (size_px[1], size_px[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(format, mode="RGB", size_px=(40, 32), **options):
    buffer = io.BytesIO()
    picture(mode, size_px).save(buffer, format, **options)
    return buffer.getvalue()


def first(content):
    """The first training image holds this."""
    return lambda: FIRST.write_bytes(content)


def cut_short():
    FIRST.write_bytes(FIRST.read_bytes()[:-300])


def png(width, height, depth=8, colour=0, rows=b""):
    """A PNG file that claims a size, whatever it holds."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_claiming(width, height):
    """A small JPEG file whose header claims another size."""
    content = saved("JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def sixteen_bits(channels):
    pixels = np.full((32, 40, channels), 40_000, np.uint16).squeeze()
    return cv2.imencode(".png", pixels)[1].tobytes()


def named(name, content=None):
    """A further training image under an odd name; broken if `content` is."""

    def prepare():
        path = os.path.join(b"data/train", A.encode(), name)
        with open(path, "wb") as file:
            file.write(saved("JPEG") if content is None else content)

    return prepare


def second_names():
    """The same name in two classes, and names that differ in case or suffix alone."""
    for name in ("0.jpeg", "0.jpg", "0.Jpeg"):
        shutil.copy(FIRST, FIRST.with_name(name))


def instead(path, make):
    """Something else in the place of a file or folder."""

    def prepare():
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
        make(path)

    return prepare


def link(target):
    return lambda path: Path(path).symlink_to(target)


def all_broken():
    for path in Path("data/train").glob("*/*"):
        path.write_bytes(b"\xff\xd8\xff")


def move(source, target):
    return lambda: Path(source).rename(target)


def make_folder(path):
    return lambda: Path(path).mkdir(parents=True)


def new_class(split):
    return lambda: shutil.copytree(f"data/{split}/{A}", f"data/{split}/n00000009")


def rename_class(name):
    def prepare():
        for split in (b"train", b"val"):
            folder = os.path.join(b"data", split)
            os.rename(os.path.join(folder, B.encode()), os.path.join(folder, name))

    return prepare


def odd_root():
    os.rename("data", b"d\xe9 1")
    os.symlink(b"d\xe9 1", "data")


NOT_READABLE = "0.JPEG: not a readable image"
IMAGE_FILES = {
    "cut short": (cut_short, TRAIN, 1, NOT_READABLE, "--skip-corrupt"),
    "cut short, skipped": (cut_short, f"{TRAIN} --skip-corrupt", 0),
    "cut short in val": (
        lambda: Path(f"data/val/{B}/1.JPEG").write_bytes(saved("JPEG")[:200]),
        EVALUATE, 1, f"val/{B}/1.JPEG: not a readable image",
    ),
    "all broken, skipped": (all_broken, f"{TRAIN} --skip-corrupt", 1, "JPEG: not a readable image"),
    "all but one broken, skipped": (
        lambda: [path.write_bytes(b"") for path in Path("data/train").glob("*/*") if path != FIRST],
        f"{TRAIN} --skip-corrupt", 1, "JPEG: not a readable image", "too few others of its batch",
    ),
    "zero bytes": (first(b""), TRAIN, 1, NOT_READABLE, "of no known format"),
    "text": (first(b"no image\n"), TRAIN, 1, NOT_READABLE),
    "a web page": (first(b"<!DOCTYPE html><html>404"), TRAIN, 1, NOT_READABLE),
    "a header alone": (first(b"\xff\xd8\xff\xe0\x00\x10JFIF\x00"), TRAIN, 1, NOT_READABLE),
    "zeros behind a header": (first(saved("JPEG")[:400] + bytes(4000)), TRAIN, 1, NOT_READABLE),
    "EPS, which is a program": (first(saved("EPS")), TRAIN, 1, NOT_READABLE),
    "PNG with a broken checksum": (
        first(saved("PNG")[:-300] + bytes(300)), TRAIN, 1, NOT_READABLE
    ),
    "PNG of no width": (first(png(0, 9)), TRAIN, 1, NOT_READABLE),
    "PNG bomb": (first(png(20_000, 20_000)), TRAIN, 1, NOT_READABLE, "exceeds limit"),
    "PNG bomb of one bit": (
        first(png(20_000, 20_000, 1, rows=bytes(2501 * 20_000))), TRAIN, 1, "exceeds limit"
    ),
    "PNG bomb below Pillow's limit": (
        first(png(13_000, 13_000, 8, 6)), TRAIN, 1, NOT_READABLE, "exceeds limit"
    ),
    "JPEG bomb": (first(jpeg_claiming(65_500, 65_500)), TRAIN, 1, NOT_READABLE, "exceeds limit"),
    # As Pillow takes it: what is missing is grey.
    "JPEG claiming more than it has": (first(jpeg_claiming(3000, 3000)), TRAIN, 0),
    "a line of pixels": (first(saved("JPEG", size_px=(60_000, 1))), TRAIN, 0),
    "a line of pixels in val": (
        lambda: Path(f"data/val/{B}/1.JPEG").write_bytes(saved("JPEG", size_px=(1, 60_000))),
        f"{EVALUATE} --size 96", 0,
    ),
    **{f"{kind} under .JPEG": (first(saved(kind)), TRAIN, 0)
       for kind in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")},
    "palette with a transparent colour": (first(saved("PNG", "P", transparency=3)), TRAIN, 0),
    "alpha": (first(saved("PNG", "RGBA")), TRAIN, 0),
    "grey": (first(saved("JPEG", "L")), TRAIN, 0),
    "CMYK": (first(saved("JPEG", "CMYK")), TRAIN, 0),
    "16 bits, grey": (first(sixteen_bits(1)), TRAIN, 0),
    "16 bits, RGB": (first(sixteen_bits(3)), TRAIN, 0),
    "1 x 1": (first(saved("JPEG", size_px=(1, 1))), TRAIN, 0),
    "broken EXIF": (
        first(saved("JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00\x01")), TRAIN, 0
    ),
    "EXIF is text": (first(saved("JPEG", exif=b"Exif\x00\x00no directory")), TRAIN, 0),
    "progressive": (first(saved("JPEG", progressive=True)), TRAIN, 0),
}  # fmt: skip

TREES = {
    "an empty class": (
        lambda: [path.unlink() for path in Path("data/train", B).iterdir()],
        TRAIN, 1, f"data/train/{B}: no image in this class folder",
    ),
    "a link that leads nowhere": (instead(FIRST, link("gone.JPEG")), TRAIN, 1, NOT_READABLE),
    "spaces in names": (named(b"  a b .JPEG"), TRAIN, 0),
    "a name that is not UTF-8": (named(b"caf\xe9\xff.JPEG"), TRAIN, 0),
    "a broken image whose name is not UTF-8": (
        named(b"caf\xe9\xff.JPEG", b""), f"{TRAIN} --batch-size 9", 1, r"caf\udce9\udcff.JPEG: not"
    ),
    "such an image, skipped": (
        named(b"caf\xe9\xff.JPEG", b""), f"{TRAIN} --batch-size 9 --skip-corrupt", 0
    ),
    "a line break in a broken image's name": (
        named(b"a\nb\x1b[31m.JPEG", b""), f"{TRAIN} --batch-size 9", 1, r"a\nb\x1b[31m.JPEG: not"
    ),
    "duplicate names": (second_names, TRAIN, 0),
    "a class whose name is not UTF-8": (rename_class(b"caf\xe9 1"), TRAIN, 0),
    "a root whose name is not UTF-8": (odd_root, f"{TRAIN} --data-dir d\udce9\\ 1", 0),
    # Neither is read: opening a pipe would wait for ever.
    "a pipe among the images": (lambda: os.mkfifo(FIRST.with_name("pipe.JPEG")), TRAIN, 0),
    "a folder called .JPEG": (make_folder(FIRST.with_name("folder.JPEG")), TRAIN, 0),
    "a link to an image": (instead(FIRST, link("1.JPEG")), TRAIN, 0),
    "an image that links to itself": (
        instead(FIRST, link("0.JPEG")), TRAIN, 1, "0.JPEG", "symbolic links"
    ),
    "a folder that links to its parent": (
        lambda: Path(f"data/train/{A}/up").symlink_to(".."), TRAIN, 0
    ),
    "a class that links to itself": (
        instead(f"data/train/{A}", link(A)), TRAIN, 1, f"train/{A}", "symbolic links"
    ),
    "a class in val only": (new_class("val"), TRAIN, 1, "in val/ and not in train/: 1 (n00000009)"),
    "a class in train only": (
        new_class("train"), TRAIN, 1, "in train/ and not in val/: 1 (n00000009)"
    ),
    "no data": (move("data", "away"), TRAIN, 2, "data is not a folder"),
    "data is a file": (
        instead("data", lambda path: Path(path).touch()), TRAIN, 2, "data is not a folder"
    ),
    "no val": (move("data/val", "away"), TRAIN, 1, "data/val is missing"),
    "train is a file": (
        instead("data/train", lambda path: Path(path).touch()), TRAIN, 1, "data/train is missing"
    ),
    "no classes": (
        lambda: [shutil.rmtree(path) for path in Path("data").glob("*/*")],
        TRAIN, 1, "data: train/ and val/ are empty",
    ),
    "val not sorted": (
        instead("data/val", lambda path: shutil.copytree("flat", path)), TRAIN, 1, "not sorted"
    ),
    "val half sorted": (
        lambda: shutil.copy(FIRST, "data/val"), TRAIN, 1, "data/val is half sorted"
    ),
    "other classes than the checkpoint's": (
        rename_class(b"n00000007"),
        EVALUATE, 1, "data: 2 classes, not the 2 of the checkpoint; n00000001",
    ),
}  # fmt: skip


# ---- the CSV -------------------------------------------------------------------------------------


def rows(separator=",", end="\n"):
    return "".join(f"{name}{separator}{wnid} 1 2 3 4{end}" for name, wnid in IMAGES.items())


def csv(text, encoding="utf-8"):
    return lambda: Path("solution.csv").write_bytes(text.encode(encoding))


SOLUTIONS = {
    "a byte order mark": (csv(HEAD + rows(), "utf-8-sig"), SORT, 0),
    "CRLF": (csv(HEAD.replace("\n", "\r\n") + rows(end="\r\n")), SORT, 0),
    "extra spaces": (csv(" ImageId , PredictionString \n" + rows(" ,  ", "  \n")), SORT, 0),
    "quotes": (csv(HEAD + rows('","').replace("ILSVRC", '"ILSVRC').replace("\n", '"\n')), SORT, 0),
    "blank lines": (csv(HEAD + "\n" + rows(end="\n\n")), SORT, 0),
    "no newline at the end": (csv((HEAD + rows()).rstrip()), SORT, 0),
    "further columns": (csv("ImageId,PredictionString,note\n" + rows(end=",x\n")), SORT, 0),
    "zero bytes of CSV": (csv(""), SORT, 1, "solution.csv: columns []"),
    "a missing column": (csv("ImageId\n" + rows()), SORT, 1, "expected ImageId,PredictionString"),
    "no header": (csv(rows()), SORT, 1, "expected ImageId,PredictionString"),
    "a CSV of a header alone": (csv(HEAD), SORT, 1, "no images"),
    "a cell too many": (csv(HEAD + rows(end=",1\n")), SORT, 1, "bad lines: 4", "line 2"),
    "an image too many": (
        csv(f"{HEAD}{rows()}extra,{A}\n"), SORT, 1, "images of the CSV missing: 1"
    ),
    "an image twice": (csv(HEAD + rows() + rows()), SORT, 1, "bad lines: 4", f"{ONE} again"),
    "an image that leads out": (csv(f"{HEAD}../x,{A}\n"), SORT, 1, "'../x,"),
    "a class that leads out": (csv(f"{HEAD}{ONE},../../{A}\n"), SORT, 1, "bad lines: 1"),
    "an absolute class": (csv(f"{HEAD}{ONE},/tmp/{A}\n"), SORT, 1, "bad lines: 1"),
    "null bytes": (csv(f"{HEAD}{ONE}\0,{A}\n"), SORT, 1, "line"),
    "a huge cell": (csv(f"{HEAD}{'x' * 200_000},{A}\n"), SORT, 1, "not CSV: field larger than"),
    "an open quote": (csv(f'{HEAD}"{rows()}'), SORT, 1, "not CSV"),
    "UTF-16": (csv(HEAD + rows(), "utf-16"), SORT, 1, "solution.csv is not UTF-8 text"),
    "latin-1": (csv(HEAD + f"\xe9,{A}\n", "latin-1"), SORT, 1, "not UTF-8 text"),
    "binary": (lambda: Path("solution.csv").write_bytes(bytes(range(256))), SORT, 1, "not UTF-8"),
    "no CSV": (move("solution.csv", "away"), SORT, 2, "solution.csv is not a file"),
    "the CSV is a pipe": (
        instead("solution.csv", os.mkfifo), SORT, 2, "solution.csv is not a file"
    ),
    "the CSV links to itself": (
        instead("solution.csv", link("solution.csv")), SORT, 2, "solution.csv is not a file"
    ),
    "no folder of images": (move("flat", "away"), SORT, 2, "flat is not a folder"),
    "an image is missing": (move(f"flat/{ONE}.JPEG", "away"), SORT, 1, "missing: 1", ONE),
    "a class folder's name is taken": (
        lambda: Path("flat", A).touch(), SORT, 1, f"in the way: 1 ({A})"
    ),
}  # fmt: skip


# ---- run folders and checkpoints -----------------------------------------------------------------


class Trap:
    """Makes a file when a pickle is loaded that may run code."""

    def __reduce__(self):
        return (open, ("sprung", "w"))


def last(change):
    """Changes what done/last.pt holds, and saves it as a whole file again."""

    def prepare():
        checkpoint = torch.load("done/last.pt", weights_only=True)
        changed = change(checkpoint)
        torch.save(checkpoint if changed is None else changed, "done/last.pt")

    return prepare


def packed_tightly():
    """The same archive, deflated: it could unpack to any size."""
    with zipfile.ZipFile("done/last.pt") as old:
        content = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile("done/last.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


def flip_bits():
    """In the middle of the largest tensor, which PyTorch itself would not notice."""
    with zipfile.ZipFile("done/last.pt") as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(Path("done/last.pt").read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 0x55
    Path("done/last.pt").write_bytes(content)


def last_is(content):
    return lambda: Path("done/last.pt").write_bytes(content)


def set_config(**entries):
    return last(lambda checkpoint: checkpoint["config"].update(entries))


def other_shapes(checkpoint):
    checkpoint["model"] = {
        key: value[:1] for key, value in checkpoint["model"].items() if value.ndim
    }


def half_of_last():
    content = Path("done/last.pt").read_bytes()
    Path("done/last.pt").write_bytes(content[: len(content) // 2])


def changed(key, change):
    """A checkpoint whose entry is what `change` gives for it, or what `change` did to it."""

    def prepare(checkpoint):
        found = change(checkpoint[key])
        checkpoint[key] = checkpoint[key] if found is None else found

    return last(prepare)


def in_row(name, value, key="metrics"):
    return changed(key, lambda rows: rows[0].update({name: value}))


def without(key, name):
    return changed(key, lambda entry: [entry[0].pop(name), None][1])


def momentum(change):
    """A checkpoint whose first momentum is what `change` gives for it."""

    def prepare(optimizer):
        first = optimizer["state"][0]
        first["momentum_buffer"] = change(first["momentum_buffer"])

    return changed("optimizer", prepare)


LAST = "done/last.pt: not a"
CHECKPOINTS = {
    "no checkpoint": (move("done", "away"), EVALUATE, 2, "done/last.pt: no such checkpoint"),
    "the checkpoint is a folder": (instead("done/last.pt", os.mkdir), EVALUATE, 1, LAST, "no file"),
    "the checkpoint is a pipe": (instead("done/last.pt", os.mkfifo), EVALUATE, 1, LAST, "no file"),
    "a checkpoint of zero bytes": (last_is(b""), EVALUATE, 1, LAST),
    "a checkpoint of text": (last_is(b"no checkpoint\n"), EVALUATE, 1, LAST),
    "half a checkpoint": (half_of_last, EVALUATE, 1, LAST),
    "a checkpoint with changed bits": (flip_bits, EVALUATE, 1, LAST, "damaged"),
    "a compressed checkpoint": (packed_tightly, EVALUATE, 1, LAST, "compressed"),
    "pickle with code": (
        last_is(b"cbuiltins\nopen\n(Vsprung\nVw\ntR."), EVALUATE, 1, LAST
    ),
    "a checkpoint with code": (
        last(lambda c: {**c, "extra": Trap()}), EVALUATE, 1, "would run code"
    ),
    "a state dict": (
        last(lambda c: c["model"]), EVALUATE, 1, "not a checkpoint of scripts/train.py"
    ),
    "a checkpoint that is a list": (
        last(lambda c: [1, 2]), EVALUATE, 1, "not a checkpoint of scripts/train.py"
    ),
    "a checkpoint whose config is text": (
        last(lambda c: c.update(config="x")), EVALUATE, 1, "config"
    ),
    "a checkpoint without classes": (set_config(classes=None), EVALUATE, 1, "classes"),
    "a checkpoint of another recipe's version": (
        set_config(recipe={"epochz": 1}), EVALUATE, 1, "recipe is of another version", "epochz"
    ),
    "a checkpoint whose recipe is impossible": (
        last(lambda c: c["config"]["recipe"].update(epochs=-1)), EVALUATE, 1, "epochs=-1 must be"
    ),
    "weights of another model": (last(other_shapes), EVALUATE, 1, "not those of its own config"),
    "an average of another model": (
        last(lambda c: c.update(ema={})), EVALUATE, 1, "not those of its"
    ),
    "the checkpoint names an unknown model": (
        set_config(backbone="darknet54"), EVALUATE, 1, "names no network", "nearest: darknet53"
    ),
    "the checkpoint names no model": (set_config(options=None), EVALUATE, 1, "names no network"),
    "the checkpoint names another model": (
        set_config(backbone="darknet19"), EVALUATE, 1, "not those of its own config"
    ),
}  # fmt: skip
ODD = "done/last.pt: its {!r} is not that of its own config; put best.pt in its place"
ODD_ENTRIES = {
    f"goes on with {what}": (prepare, RESUME, 1, ODD.format(key))
    for key, kinds in {
        "step": {
            "a step beyond the schedule": changed("step", lambda step: 10**6),
            "a step behind its rows": changed("step", lambda step: 0),
            "a negative step": changed("step", lambda step: -1),
        },
        "metrics": {
            "metrics that are numbers": changed("metrics", lambda rows: [1.0]),
            "metrics that are lists": changed("metrics", lambda rows: [list(rows[0].values())]),
            "a loss of text": in_row("train_loss", "low"),
            "a loss that is a list": in_row("train_loss", [0.5]),
            "a loss that is not finite": in_row("val_loss", math.nan),
            "an accuracy that is a tensor": in_row("ema_val_top1_pct", torch.ones(2)),
            "a column without a name": in_row(3, 3.0),
            "metrics without an accuracy": without("metrics", "ema_val_top1_pct"),
            "metrics without a step": without("metrics", "step"),
            "metrics of another epoch": in_row("epoch", 2),
            "metrics of another step": in_row("step", 7),
        },
        "speed": {
            "speeds of text": in_row("train_time_s", "fast", "speed"),
            "fewer speeds than epochs": changed("speed", lambda rows: []),
            "speeds without a time": without("speed", "eval_time_s"),
        },
        "skipped": {
            "skipped images that are numbers": changed("skipped", lambda lines: [3]),
            "skipped images that are lists": changed("skipped", lambda lines: [[]]),
        },
        "under_way": {
            "nothing under way": changed("under_way", lambda entry: {}),
            "a sum of losses of another shape": changed(
                "under_way", lambda entry: entry.update(loss_sums=torch.zeros(0))
            ),
            "a sum of losses that is a number": changed(
                "under_way", lambda entry: entry.update(loss_sums=0.0)
            ),
            "losses of other steps": changed("under_way", lambda entry: entry.update(loss_count=9)),
            "a time of text": changed("under_way", lambda entry: entry.update(train_time_s="1")),
        },
        "optimizer": {
            "no optimizer": changed("optimizer", lambda entry: {}),
            "an optimizer of text": changed("optimizer", lambda entry: {"state": "x"}),
            "momentum of another shape": momentum(lambda tensor: tensor[:1]),
            "momentum of no shape": momentum(lambda tensor: torch.tensor(0.0)),
            "momentum of integers": momentum(lambda tensor: tensor.long()),
            "sparse momentum": momentum(lambda tensor: tensor.to_sparse()),
            "momentum that is text": momentum(lambda tensor: "x"),
            "momentum of a parameter that is not there": changed(
                "optimizer", lambda entry: entry["state"].update({9999: entry["state"][0]})
            ),
        },
    }.items()
    for what, prepare in kinds.items()
} | {
    # Both follow from the recipe and the step.
    "goes on with another schedule": (
        changed("schedule", lambda entry: {"optimizer": 3, "_last_lr": "x"}), RESUME, 0
    ),
    "goes on with other options of the optimizer": (
        changed("optimizer", lambda entry: entry.update(param_groups="x")), RESUME, 0
    ),
    "goes on with a config of tensors": (
        set_config(recipe={"momentum": torch.ones(2)}), RESUME, 1, LAST, "its config"
    ),
    "goes on with a config of numbered entries": (
        set_config(**{"recipe": {1: 2}}), RESUME, 1, "done/last.pt: holds a run with"
    ),
    "goes on with a config of itself": (
        last(lambda c: c["config"].update(recipe={"x": c["config"]})), RESUME, 1, LAST, "its config"
    ),
    "evaluates a config of tensors": (
        set_config(options={"width": torch.ones(2)}), EVALUATE, 1, LAST, "its config"
    ),
    "evaluates a network that no memory holds": (
        set_config(options={"in_channels": 10**12}), EVALUATE, 1, "its config names no network"
    ),
}  # fmt: skip

CONFIG = "done/config.json: not a config of scripts/train.py"


def config(text):
    return lambda: Path("done/config.json").write_text(text)


CONFIGS = {
    f"a config.json of {text[:30]}": (config(text), RESUME, 1, line)
    for text, line in {
        "": "done/config.json: missing or not readable",
        "[" * 100_000: "done/config.json: missing or not readable",
        "3": "done/config.json: missing or not readable",
        "{}": f"{CONFIG} (its recipe)",
        '{"recipe": 3, "classes": []}': f"{CONFIG} (its recipe)",
        '{"recipe": {}, "classes": {}}': f"{CONFIG} (its classes)",
        '{"recipe": {}, "classes": []}': "done: holds a run with accumulate=None, not 1",
    }.items()
}

RUN_FOLDERS = {
    "goes on": (None, RESUME, 0),
    "a run of another recipe": (
        None, f"{RESUME} --momentum 0.5", 1, "done: holds a run with momentum=0.9"
    ),
    "a run of another backbone": (
        None, f"{RESUME} --backbone darknet19", 1, "backbone='cspdarknet19'"
    ),
    "a run of other data": (new_class("val"), f"{RESUME}", 1, "in val/ and not in train/"),
    "one image more": (named(b"9.JPEG"), RESUME, 1, "done: holds a run with train_images=8, not 9"),
    "resumes half a checkpoint": (half_of_last, RESUME, 1, LAST),
    "resumes changed bits": (flip_bits, RESUME, 1, LAST, "damaged"),
    "resumes a pipe": (instead("done/last.pt", os.mkfifo), RESUME, 1, LAST),
    "resumes weights of another model": (
        last(other_shapes), RESUME, 1, "last.pt: its weights are not"
    ),
    "no config.json": (move("done/config.json", "away"), RESUME, 1, "done/config.json: missing"),
    "half a config.json": (
        lambda: Path("done/config.json").write_text("{"), RESUME, 1, "config.json: missing or not"
    ),
    "config.json is a list": (
        lambda: Path("done/config.json").write_text("[]"), RESUME, 1, "config.json: missing or"
    ),
    "config.json is a pipe": (
        instead("done/config.json", os.mkfifo), RESUME, 1, "config.json: missing or not"
    ),
    "a folder of other files": (
        None, f"{TRAIN} --output-dir flat", 1, "flat: holds other files and no run"
    ),
    "a folder where nobody may write": (
        None, f"{TRAIN} --output-dir /proc/new", 2, "/proc/new: No such file"
    ),
    "the run folder is a file": (
        None, f"{TRAIN} --output-dir solution.csv", 2, "solution.csv: File exists"
    ),
    "the run folder is in a file": (
        None, f"{TRAIN} --output-dir solution.csv/new", 2, "solution.csv/new: Not a"
    ),
    "the run folder links to itself": (
        instead("loop", link("loop")), f"{TRAIN} --output-dir loop", 2, "loop: File exists"
    ),
    "the run folder's name is too long": (
        None, f"{TRAIN} --output-dir {'x' * 300}", 1, "File name too long"
    ),
}  # fmt: skip


# ---- options -------------------------------------------------------------------------------------

OPTIONS = {
    "NaN learning rate": (None, f"{TRAIN} --lr-per-1024 nan", 2, "lr_per_1024=nan must be"),
    "infinite learning rate": (None, f"{TRAIN} --lr-per-1024 1e999", 2, "lr_per_1024=inf must be"),
    "learning rate of text": (None, f"{TRAIN} --lr-per-1024 fast", 2, "--lr-per-1024", "'fast'"),
    "negative epochs": (None, f"{TRAIN} --epochs -1", 2, "epochs=-1 must be at least 1"),
    "epochs and a half": (None, f"{TRAIN} --epochs 1.5", 2, "--epochs", "'1.5'"),
    "a number of 5000 digits": (None, f"{TRAIN} --epochs {'9' * 5000}", 2, "--epochs"),
    "warm-up beyond the epochs": (None, f"{TRAIN} --warmup-epochs 1", 2, "below epochs=1"),
    "batch larger than the data": (
        None, f"{TRAIN} --batch-size 9", 2, "batch_size=9 is more than the 8"
    ),
    "batch of nothing": (None, f"{TRAIN} --batch-size 0", 2, "batch_size=0 must be at least 1"),
    "smoothing of all": (
        None, f"{TRAIN} --label-smoothing 1", 2, "label_smoothing=1.0 must be in [0, 1)"
    ),
    "a crop that no memory holds": (None, f"{TRAIN} --train-crop-px 1000000", 2, "at most 4096"),
    "a test size that no memory holds": (
        None, f"{EVALUATE} --size 1099511627776", 2, "at most 4096"
    ),
    "a test size of 0": (None, f"{EVALUATE} --size 0", 2, "--size: '0' must be a whole number"),
    "a width that no memory holds": (
        None, f"{TRAIN} --width 1e15", 2, "width=1000000000000000.0 must be"
    ),
    "a width the family has not": (
        None, f"{TRAIN} --backbone resnet18", 2, "resnet18 takes no 'width'"
    ),
    "unknown precision": (None, f"{TRAIN} --precision fp8", 2, "--precision", "'fp8'"),
    "unknown backbone": (
        None, f"{TRAIN} --backbone darknet54", 2, "'darknet54'; nearest: darknet53"
    ),
    "unknown recipe": (None, f"{TRAIN} --recipe slow", 2, "--recipe", "'slow'"),
    "unknown device": (None, f"{TRAIN} --device gpu", 2, "device='gpu' is not a device"),
    "a device that is not here": (None, f"{TRAIN} --device cuda:99", 2, "device='cuda:99'"),
    "unknown option": (None, f"{TRAIN} --leanring-rate 1", 2, "--leanring-rate"),
    "an option without its value": (None, f"{TRAIN} --seed", 2, "--seed", "expected one argument"),
    "negative seed": (None, f"{TRAIN} --seed -1", 2, "--seed: '-1' must be"),
    "half a worker": (None, f"{TRAIN} --workers 0.5", 2, "--workers: '0.5' must be"),
    "nothing given": (None, "train.py", 2, "--data-dir"),
    "more parts than images": (
        None, f"{TRAIN} --accumulate 9", 2, "accumulate=9 must be at most the 8 images"
    ),
    "single images for BatchNorm": (
        None, f"{TRAIN} --batch-size 1", 2,
        "batch_size=1 leaves single images to BatchNorm", "1 x 1 at train_crop_px=32",
    ),
    "parts of single images": (
        None, f"{TRAIN} --accumulate 8", 2, "batch_size=8 leaves single images to BatchNorm"
    ),
    "a last part of a single image": (
        None, f"{TRAIN} --batch-size 7 --accumulate 3", 2, "batch_size=7 leaves single images"
    ),
    "rehearses single images": (
        None, f"{TRAIN} --batch-size 1 --dry-run", 2, "batch_size=1 leaves single images"
    ),
    "single images whose maps are larger": (
        None, f"{TRAIN} --batch-size 1 --train-crop-px 64", 0
    ),
}  # fmt: skip


def damage_shard():
    assert run("make_shards.py", "--data-dir", "data", "--output-dir", "shards") == 0
    path = Path("shards/train-000000.tar")
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)


def sums(text):
    def prepare():
        Path("shards").mkdir()
        Path("shards/SHA256SUMS").write_text(text)

    return prepare


def index_is(content):
    """Shards whose first says this of itself; a dict changes what it says."""

    def prepare():
        assert run("make_shards.py", "--data-dir", "data", "--output-dir", "shards") == 0
        path = Path("shards/train-000000.tar")
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        name = next(iter(files))
        if isinstance(content, dict):
            files[name] = json.dumps(json.loads(files[name]) | content).encode()
        else:
            files[name] = content
        with tarfile.open(path, "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return prepare


TRAIN_SHARDS = f"{TRAIN} --data-dir 'shards/{{train,val}}-000000.tar'"
NOT_COMPLETE = "shards/train-000000.tar: not a complete shard"
INDICES = {
    "an index that is a list": (index_is(b"[1]"), TRAIN_SHARDS, 1, NOT_COMPLETE),
    "half an index": (index_is(b'{"format": 1, "split": "tr'), TRAIN_SHARDS, 1, NOT_COMPLETE),
    "an index that says more": (index_is({"more": 1}), TRAIN_SHARDS, 1, NOT_COMPLETE),
    "an index of the future": (index_is({"format": 2}), TRAIN_SHARDS, 1, "of this version"),
    "packs beside a damaged index": (
        lambda: (index_is(b"{")(), Path("shards/SHA256SUMS").unlink()),
        f"{PACK} --output-dir shards", 1, NOT_COMPLETE,
    ),
    "shards as they should be": (index_is({}), TRAIN_SHARDS, 0),
}  # fmt: skip

DRY = f"{TRAIN} --dry-run"
REHEARSALS = {
    "rehearses": (None, DRY, 0),
    "rehearses with a broken image": (cut_short, DRY, 1, NOT_READABLE, "--skip-corrupt"),
    "rehearses without a broken image": (cut_short, f"{DRY} --skip-corrupt", 0),
    "rehearses in nobody's folder": (None, f"{DRY} --output-dir /proc/new", 0),
    "rehearses without data": (None, f"{DRY} --data-dir nowhere", 2, "nowhere is not a folder"),
    "rehearses a batch larger than the data": (
        None, f"{DRY} --batch-size 9", 2, "batch_size=9 is more than the 8"
    ),
    "rehearses a learning rate beyond all": (
        None, f"{DRY} --lr-per-1024 1e38", 1, "not finite", "try a lower --lr-per-1024"
    ),
}  # fmt: skip

PREDICTIONS = {
    "predicts": (None, PREDICT, 0),
    "predicts two images": (None, f"{PREDICT} {FIRST} --json", 0),
    "predicts no image": (None, "predict.py --checkpoint done/last.pt", 2, "IMAGE"),
    "predicts without a checkpoint": (None, f"predict.py {FIRST}", 2, "--checkpoint"),
    "predicts an image that is not there": (
        None, f"{PREDICT} nowhere.jpg", 2, "nowhere.jpg: no such image"
    ),
    "predicts a folder": (None, f"{PREDICT} data", 1, "data: not a readable image (no file"),
    "predicts a pipe": (
        lambda: os.mkfifo("pipe.jpg"), f"{PREDICT} pipe.jpg", 1, "pipe.jpg: not a readable image"
    ),
    "predicts half an image": (cut_short, PREDICT, 1, NOT_READABLE),
    "predicts text": (first(b"no image\n"), PREDICT, 1, NOT_READABLE, "of no known format"),
    "predicts a bomb": (first(png(20_000, 20_000)), PREDICT, 1, NOT_READABLE, "exceeds limit"),
    "predicts an image whose name is not UTF-8": (
        named(b"caf\xe9.JPEG"), f"{PREDICT} 'data/train/{A}/caf\udce9.JPEG'", 0
    ),
    "predicts by a checkpoint that is none": (
        last_is(b"no checkpoint\n"), PREDICT, 1, LAST
    ),
    "predicts by a checkpoint that is not there": (
        move("done", "away"), PREDICT, 2, "done/last.pt: no such checkpoint"
    ),
    "predicts by a state dict": (
        last(lambda c: c["model"]), PREDICT, 1, "done/last.pt: not a checkpoint of scripts/train.py"
    ),
    "predicts by weights of another model": (
        last(other_shapes), PREDICT, 1, "done/last.pt: its weights are not those of its own config"
    ),
    "predicts by weights that are not finite": (
        last(lambda c: c["ema"].update({"module.head.bias": torch.full((2,), math.nan)})),
        PREDICT, 1, "done/last.pt: its weights are not all finite",
    ),
    "predicts classes that are no names": (
        set_config(classes=[A, {}]), PREDICT, 1, "done/last.pt: its config's classes"
    ),
    "predicts at a size of 0": (None, f"{PREDICT} --size 0", 2, "--size: '0' must be"),
    "predicts at a size that no memory holds": (
        None, f"{PREDICT} --size 1099511627776", 2, "at most 4096"
    ),
    "predicts on an unknown device": (None, f"{PREDICT} --device gpu", 2, "device='gpu'"),
    "predicts without the words": (
        None, f"{PREDICT} --synset-mapping words.txt", 2, "words.txt is not a file"
    ),
    "predicts with other words": (
        None, f"{PREDICT} --synset-mapping solution.csv", 1, "solution.csv: bad lines: 5"
    ),
}  # fmt: skip

BY_NAME = "export.py --backbone cspdarknet19 --output new.pt2"
EXPORTS = {
    "exports nothing": (None, "export.py --output new.pt2", 2, "--checkpoint", "--backbone"),
    "exports two things": (None, f"{EXPORT} --backbone resnet18", 2, "not allowed with"),
    "exports to nowhere": (None, "export.py --checkpoint done/last.pt", 2, "--output"),
    "exports to an unknown format": (
        None, f"{EXPORT} --output new.pb", 2, "new.pb: must end in .onnx or .pt2"
    ),
    "exports into no folder": (None, f"{EXPORT} --output no/new.pt2", 2, "no: no such folder"),
    "exports below a file": (
        None, f"{EXPORT} --output solution.csv/x.pt2", 2, "solution.csv: no such folder"
    ),
    "exports over a file": (
        lambda: Path("new.pt2").touch(), EXPORT, 2, "new.pt2: is there already; --overwrite"
    ),
    "exports over a folder": (
        make_folder("new.pt2"), f"{EXPORT} --overwrite", 2, "new.pt2: is there already"
    ),
    "exports where nobody may write": (
        None, f"{EXPORT} --output /proc/new.pt2", 2, "/proc/new.pt2: cannot be written"
    ),
    "exports a checkpoint that is none": (last_is(b"no checkpoint\n"), EXPORT, 1, LAST),
    "exports a checkpoint that is not there": (
        move("done", "away"), EXPORT, 2, "done/last.pt: no such checkpoint"
    ),
    "exports an unknown backbone": (
        None, f"{BY_NAME} --backbone darknet54", 2, "'darknet54'; nearest: darknet53"
    ),
    "exports weights that are not there": (
        None, f"{BY_NAME} --weights nowhere.pt", 2, "nowhere.pt: there is no such file"
    ),
    "exports weights that are none": (
        None, f"{BY_NAME} --weights solution.csv", 1, "solution.csv: not a file of weights"
    ),
    "exports weights of another width": (
        None, f"{BY_NAME} --weights done/last.pt", 1, "stem.conv.weight [8, 3, 3, 3], here"
    ),
    "exports weights beside a checkpoint's": (
        None, f"{EXPORT} --weights done/last.pt", 2, "--weights is for --backbone"
    ),
    "exports options that are no JSON": (
        None, f"{BY_NAME} --options width=1", 2, "'width=1' must be a JSON object"
    ),
    "exports options that are a list": (
        None, f"{BY_NAME} --options '[2]'", 2, "'[2]' must be a JSON object"
    ),
    "exports unknown options": (
        None, BY_NAME + """ --options '{"depth": 2}'""", 2, "cspdarknet19 takes no 'depth'"
    ),
    "exports a map that is not there": (
        None, EXPORT + """ --options '{"out_indices": [9]}'""", 2, "out_indices=(9,) must be"
    ),
    "exports an activation that is a list": (
        None, BY_NAME + """ --options '{"act": []}'""", 2, "act=[] is not an activation"
    ),
    "exports options that are others'": (
        None, BY_NAME + """ --options '{"weights": "x"}'""", 2, "--options takes no name"
    ),
    "exports the head of a backbone": (
        None, f"{BY_NAME} --classifier", 2, "--classifier is for --checkpoint"
    ),
}  # fmt: skip

OTHER_SCRIPTS = {
    "nothing to pack": (None, f"{PACK} --data-dir nowhere", 2, "nowhere is not a folder"),
    "packs a class in val only": (new_class("val"), PACK, 1, "in val/ and not in train/"),
    "packs into a file": (
        None, f"{PACK} --output-dir solution.csv", 2, "solution.csv: File exists"
    ),
    "packs below a file": (None, f"{PACK} --output-dir solution.csv/x", 2, "solution.csv/x: Not a"),
    "packs where nobody may write": (
        None, f"{PACK} --output-dir /proc/new", 2, "/proc/new: No such"
    ),
    "shards of nothing": (
        None, f"{PACK} --images-per-shard 0", 2, "--images-per-shard: '0' must be"
    ),
    "packs and verifies": (None, f"{PACK} --verify", 2, "not allowed with"),
    "no folder of shards": (None, VERIFY, 2, "SHA256SUMS: No such file"),
    "an empty folder of shards": (make_folder("shards"), VERIFY, 2, "SHA256SUMS: No such"),
    "a list of checksums that is none": (sums("??\n"), VERIFY, 1, "SHA256SUMS: lists no shard"),
    "a shard that is missing": (
        sums(f"{'0' * 64}  train-000000.tar\n{'0' * 64}  val-000000.tar\n"),
        VERIFY, 1, "train-000000.tar",
    ),
    "a folder of shards for images": (
        damage_shard, f"{TRAIN} --data-dir shards", 1, "shards are given by a brace pattern"
    ),
    "a brace pattern that the shell has spread": (
        None, f"{TRAIN} --data-dir train-0.tar train-1.tar val-0.tar", 2, "quote the brace pattern"
    ),
    "a damaged shard": (damage_shard, VERIFY, 1, "train-000000.tar: missing, or damaged"),
    "unknown study": (None, "ablate.py nothing --data-dir data", 2, "'nothing'"),
    "a study without data": (None, f"{STUDY} --data-dir nowhere", 2, "nowhere is not a folder"),
    "a study of too few images": (None, STUDY, 1, f"{A}: fewer than 10 images to cut from"),
    "a study of no seeds": (None, f"{STUDY} --seeds 0", 2, "--seeds 0: 1 to"),
    "a study by no processes": (
        None, f"{STUDY} --processes 0", 2, "processes=0 must be at least 1"
    ),
    "a study on an unknown device": (None, f"{STUDY} --devices gpu", 2, "device='gpu' is not"),
    "a benchmark of an unknown backbone": (
        None, f"{BENCH} --task inference --backbones nothing", 2, "invalid choice: 'nothing'"
    ),
    "a benchmark of negative batches": (
        None, f"{BENCH} --task inference --batch-size -1", 2, "--batch-size: '-1' must be"
    ),
    "a benchmark of no rounds": (None, f"{BENCH} --task inference --rounds 0", 2, "--rounds: '0'"),
    "no such notebook": (None, "run_notebooks.py x.ipynb", 2, "x.ipynb: no such notebook"),
    "a notebook of text": (
        None, "run_notebooks.py solution.csv", 1, "solution.csv: not a notebook"
    ),
    "a notebook of other JSON": (
        lambda: Path("x.ipynb").write_text('{"cells": 3}'),
        "run_notebooks.py x.ipynb", 1, "x.ipynb: not a notebook",
    ),
}  # fmt: skip

PERMISSIONS = {
    "an unreadable image": (
        mode(FIRST, 0), TRAIN, 1, f"{FIRST}: not a readable image (Permission denied)"
    ),
    "an unreadable class": (mode(f"data/train/{A}", 0), TRAIN, 1, f"{A}: Permission denied"),
    "an unreadable split": (mode("data/val", 0), TRAIN, 1, "data/val: Permission denied"),
    "a class that lists its images alone": (
        mode(f"data/train/{A}", 0o444), TRAIN, 1, f"{A}/0.JPEG", "Permission denied"
    ),
    "a run folder that may not be written": (
        lambda: os.mkdir("locked", 0o500), f"{TRAIN} --output-dir locked",
        1, "locked/config.json: cannot be written (Permission denied)",
    ),
    "a run folder that may not be read": (
        lambda: os.mkdir("locked", 0o300), f"{TRAIN} --output-dir locked",
        1, "locked: Permission denied",
    ),
    "a run folder where none may be made": (
        lambda: os.mkdir("locked", 0o500), f"{TRAIN} --output-dir locked/new",
        1, "locked/new: Permission denied",
    ),
    "goes on where nothing may be written": (
        mode("done", 0o500), RESUME, 1, "done/metrics.csv: cannot be written (Permission denied)"
    ),
    "goes on by an unreadable checkpoint": (
        mode("done/last.pt", 0), RESUME, 1, f"{LAST} readable checkpoint (Permission denied)"
    ),
    "goes on by an unreadable config.json": (
        mode("done/config.json", 0), RESUME, 1, "done/config.json: missing or not readable"
    ),
    "evaluates an unreadable checkpoint": (
        mode("done/last.pt", 0), EVALUATE, 1, f"{LAST} readable checkpoint (Permission denied)"
    ),
    "predicts an unreadable image": (
        mode(FIRST, 0), PREDICT, 1, f"{FIRST}: not a readable image (Permission denied)"
    ),
    "exports where it may not": (
        lambda: os.mkdir("locked", 0o500), f"{EXPORT} --output locked/x.pt2",
        1, "locked/x.pt2: cannot be written (Permission denied)",
    ),
    "exports unreadable weights": (
        mode("done/last.pt", 0), f"{BY_NAME} --weights done/last.pt",
        1, "done/last.pt", "Permission denied",
    ),
    "sorts by an unreadable CSV": (
        mode("solution.csv", 0), SORT, 1, "solution.csv: Permission denied"
    ),
    "sorts in an unreadable folder": (mode("flat", 0), SORT, 1, "flat", "Permission denied"),
    "sorts where nothing may be written": (
        mode("flat", 0o500), SORT, 1, "flat", "Permission denied"
    ),
    "packs where it may not": (
        lambda: os.mkdir("locked", 0o500), f"{PACK} --output-dir locked",
        1, "locked: Permission denied",
    ),
}  # fmt: skip

DISKS = {
    "a run folder on a full disk": (
        full_disk, f"{TRAIN} --output-dir disk/new",
        1, "disk/new/config.json: cannot be written (No space left on device)",
    ),
    "packs onto a full disk": (
        full_disk, f"{PACK} --output-dir disk/new",
        1, "disk/new/train-000000.tar: cannot be written (No space left on device)",
    ),
    "exports onto a full disk": (
        full_disk, f"{EXPORT} --output disk/new/x.pt2",
        1, "disk/new/x.pt2: cannot be written (No space left on device)",
    ),
    "a run on a disk to be read": (
        read_only("done"), RESUME, 1, "done/metrics.csv: cannot be written (Read-only file system)"
    ),
    "a new run on a disk to be read": (
        read_only("flat"), f"{TRAIN} --output-dir flat/new", 1, "flat/new: Read-only file system"
    ),
    "packs onto a disk to be read": (
        read_only("flat"), f"{PACK} --output-dir flat/new", 1, "flat/new: Read-only file system"
    ),
    "exports onto a disk to be read": (
        read_only("flat"), f"{EXPORT} --output flat/x.pt2",
        1, "flat/x.pt2: cannot be written (Read-only file system)",
    ),
    "sorts on a disk to be read": (read_only("flat"), SORT, 1, "flat", "Read-only file system"),
    "reads a disk to be read": (read_only("data"), TRAIN, 0),
}  # fmt: skip

LITTLE_MEMORY = {
    f"memory runs out in {command.split()[0]}, {part}": (
        little_memory(400),
        command,
        1,
        "not enough memory; try",
        words,
    )
    for part, command, words in (
        ("the input", f"{TRAIN} --train-crop-px 4096", "--accumulate 2, or a smaller --batch-size"),
        ("a step", f"{TRAIN} --train-crop-px 1536", "--accumulate 2, or a smaller --batch-size"),
        ("single images", f"{TRAIN} --train-crop-px 3072 --accumulate 8", "smaller --batch-size"),
        ("the network", f"{TRAIN} --width 16", "or --width"),
        ("a rehearsed step", f"{DRY} --train-crop-px 1536", "--accumulate 2, or a smaller"),
        ("the input", f"{EVALUATE} --size 3600", "a smaller --size"),
        ("the input", f"{PREDICT} {FIRST} {FIRST} {FIRST} --size 3600", "fewer images at a time"),
        ("the network", BY_NAME + """ --options '{"width": 16}'""", "other programs closed"),
    )
}

CASES = {
    **IMAGE_FILES, **TREES, **SOLUTIONS, **CHECKPOINTS, **RUN_FOLDERS, **OPTIONS, **REHEARSALS,
    **PREDICTIONS, **EXPORTS, **OTHER_SCRIPTS, **INDICES, **PERMISSIONS, **DISKS, **ODD_ENTRIES,
    **CONFIGS, **LITTLE_MEMORY,
}  # fmt: skip


# ---- what becomes of them ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Class folders, a flat val with its CSV, and a finished run; read only."""
    root = tmp_path_factory.mktemp("good")
    paths = [
        f"data/{split}/{name}/{k}.JPEG"
        for split, count in (("train", 4), ("val", 2))
        for name in (A, B)
        for k in range(count)
    ]
    for path in paths + [f"flat/{name}.JPEG" for name in IMAGES]:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(saved("JPEG"))
    (root / "solution.csv").write_text(HEAD + rows())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run(*shlex.split(f"{TRAIN} --output-dir done")) == 0
    return root


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    """A copy that may be spoilt, as the working directory; what hangs there fails."""

    def hangs(*args):
        raise AssertionError("it hangs")

    root = shutil.copytree(good, tmp_path / "here")
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["a script"])
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield root
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    UNTIL_THE_END.close()


def state(root):
    """What stands under each name, links not followed."""
    found = {}
    for parent, folders, files in os.walk(os.fsencode(root)):
        for name in folders + files:
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            content = open(path, "rb").read() if stat.S_ISREG(mode) else stat.S_IFMT(mode)  # noqa: SIM115
            found[os.fsdecode(os.path.relpath(path, os.fsencode(root)))] = content
    return found


def told(captured):
    """Lines of stderr but for progress bars."""
    lines = captured.err.splitlines()  # at carriage returns, too
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


@pytest.mark.parametrize("name", CASES)
def test_input_is_taken_or_ends_in_one_line(folder, capsys, name):
    prepare, command, code, *words = CASES[name]
    if prepare:
        prepare()
    capsys.readouterr()
    before = state(folder)
    script, *args = shlex.split(command)
    with at_most_mb(500), as_nobody() if name in PERMISSIONS else nullcontext():
        assert run(script, *args) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert not Path("sprung").exists()
    after, lines = state(folder), told(captured)
    assert not [path for path in after if path.endswith(".partial")]
    if code == 0:
        assert lines == []
        assert_done(script, args, before, after)
        return
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert lines[0].isprintable()
    assert [word for word in words if word not in lines[0]] == []
    # A run that met a broken image or little memory has its config.json, from which it goes on.
    new = {path: after.pop(path) for path in ("new", "new/config.json") if path in after}
    assert after == before
    known = ("not a readable image", "not enough memory")
    assert not new or (script == "train.py" and any(word in lines[0] for word in known))


def assert_done(script, args, before, after):
    """All that an accepted input is for has been made of it."""
    if script == "imagenet.py":
        gone = {f"flat/{name}.JPEG" for name in IMAGES}
        moved = {f"flat/{wnid}/{name}.JPEG" for name, wnid in IMAGES.items()}
        assert before.keys() - after.keys() == gone
        assert after.keys() - before.keys() == moved | {f"flat/{A}", f"flat/{B}"}
    elif script == "train.py" and "--dry-run" not in args:
        run_dir = args[len(args) - args[::-1].index("--output-dir")]
        names = ("config.json", "metrics.csv", "last.pt", "best.pt", "curves.png")
        assert {f"{run_dir}/{name}" for name in names} <= after.keys()
    else:
        assert after == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("command", [TRAIN, PACK, SORT])
def test_a_drive_that_locks_no_folders_is_told_of_in_one_line(
    folder, capsys, monkeypatch, command, number
):
    def flock(handle, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    script, *args = shlex.split(command)
    assert run(script, *args) == 0
    where = "flat" if command is SORT else "new"
    assert told(capsys.readouterr()) == [
        f"warning: {where}: its drive locks no folders ({os.strerror(number)}); see to it that no "
        "other process works there"
    ]


SMALL_SHM = 'mount -t tmpfs -o size=128k tmpfs /dev/shm && exec "$0" "$@"'


def test_too_little_shared_memory_is_named(folder):
    """As containers have it: 64 MB by default."""
    alone = ["unshare", "--mount", "sh", "-c", SMALL_SHM]  # the mount is seen by these alone
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("may mount no file system here")
    script, *args = shlex.split(f"{TRAIN} --train-crop-px 96 --workers 2 --timeout-s 50")
    done = subprocess.run(
        [*alone, sys.executable, ROOT / "scripts" / script, *args],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, done.stderr
    assert re.fullmatch(
        r"error: a batch cannot be shared \(.*No space left on device.*\); /dev/shm has 0.131 MB: "
        "make it larger, or try fewer --workers, or --workers 0",
        lines[0],
    )


def test_there_are_kinds_enough():
    """Which the table would not tell if two rows had one name, nor docs if rows were added."""
    tables = [IMAGE_FILES, TREES, SOLUTIONS, CHECKPOINTS, RUN_FOLDERS, OPTIONS, REHEARSALS]
    tables += [PREDICTIONS, EXPORTS, OTHER_SCRIPTS, INDICES, PERMISSIONS, DISKS]
    tables += [ODD_ENTRIES, CONFIGS, LITTLE_MEMORY]
    assert len(CASES) == sum(map(len, tables)) >= 40
    assert f"| {len(CASES)} kinds, " in (ROOT / "docs" / "reliability.md").read_text()
