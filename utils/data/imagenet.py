"""ImageNet on disk: sorts the flat validation folder into class folders and checks the layout.

The layout is that of the Kaggle download, "ImageNet Object Localization Challenge"
(https://www.kaggle.com/c/imagenet-object-localization-challenge/data):

    LOC_synset_mapping.txt                    lines of "<wnid> <names>"
    LOC_val_solution.csv                      ImageId,PredictionString; its first token is the wnid
    ILSVRC/Data/CLS-LOC/train/<wnid>/*.JPEG
    ILSVRC/Data/CLS-LOC/val/*.JPEG            flat: only the CSV has the class of an image

Sorting plans first, checks everything, and then only renames. At any moment every image has either
its old or its new name, so a run may be killed and started again.
"""

import csv
import errno
import filecmp
import io
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from utils.cli import DataError, progress_bar, summarize
from utils.records import lock

WNID = re.compile(r"n[0-9]{8}")
IMAGE_ID = re.compile(r"[A-Za-z0-9_-]+")  # a plain file name: no separator, no dot
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")

# Lines of the synset file for Imagenette, which comes without it.
IMAGENETTE = {
    "n01440764": "tench, Tinca tinca",
    "n02102040": "English springer, English springer spaniel",
    "n02979186": "cassette player",
    "n03000684": "chain saw, chainsaw",
    "n03028079": "church, church building",
    "n03394916": "French horn, horn",
    "n03417042": "garbage truck, dustcart",
    "n03425413": "gas pump, gasoline pump, petrol pump, island dispenser",
    "n03445777": "golf ball",
    "n03888257": "parachute, chute",
}

Moves = list[tuple[str, str]]  # (source, target), relative to the validation folder


class LayoutError(DataError):
    """The files do not have ImageNet's layout."""


def sort_val(
    solution_path: str | Path,
    val_dir: str | Path,
    *,
    undo: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> str:
    """Moves the images of the CSV into their class folders, or back, and returns a summary.

    Undoing also removes class folders of the CSV that are empty afterwards.

    Raises:
        FileNotFoundError, NotADirectoryError: a path is not a file, or not a folder.
        LayoutError: from `read_solution` or `plan` (nothing has moved), or from `apply`.
    """
    val_dir = Path(val_dir)
    if not val_dir.is_dir():
        raise NotADirectoryError(f"{val_dir} is not a folder: give the one with the images of val")
    labels = read_solution(solution_path)
    with lock(val_dir):
        moves, left_alone = plan(labels, val_dir, undo=undo)
        if not dry_run:
            apply(moves, val_dir, progress=progress)
            for folder in {val_dir / wnid for wnid in labels.values()} if undo else ():
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
    summary = f"{len(labels)} images: {'would move' if dry_run else 'moved'} {len(moves)}"
    summary += f" into {'the flat folder' if undo else 'class folders'}"
    if dry_run and moves:
        summary += f", as {moves[0][0]} to {moves[0][1]}"
    summary += f"; {len(labels) - len(moves)} already there"
    if left_alone:
        summary += f"\nleft alone, not in the CSV or already in place: {summarize(left_alone)}"
    return summary


def plan(
    labels: dict[str, str], val_dir: str | Path, *, undo: bool = False
) -> tuple[Moves, list[str]]:
    """Plans the moves in a folder that may be half sorted.

    Returns:
        The moves, and the images that are left alone: not in the CSV, or a second copy, with the
        same bytes, of one that is already in place.

    Raises:
        LayoutError: an image is missing, its target has other bytes, or a name is taken. Links are
            not accepted: a relative one would break, a folder may be on another volume.
    """
    val_dir = Path(val_dir)
    found = _scan(val_dir)
    pairs = [(f"{image}.JPEG", f"{wnid}/{image}.JPEG") for image, wnid in labels.items()]
    if undo:
        pairs = [(nested, flat) for flat, nested in pairs]
    named = {wnid: "folder" for wnid in labels.values()}
    named |= {path: "file" for pair in pairs for path in pair}
    copies = [(a, b) for a, b in pairs if found.get(a) == found.get(b) == "file"]
    taken = [path for path, kind in named.items() if found.get(path, kind) != kind]
    missing = [source for source, target in pairs if not found.keys() & {source, target}]
    differing = [a for a, b in copies if not filecmp.cmp(val_dir / a, val_dir / b, shallow=False)]
    for problem, paths in {
        "names in the way; images must be plain files, class folders real folders, no links": taken,
        "images of the CSV missing": missing,
        "images differ from those in place, and are not overwritten": differing,
    }.items():
        if paths:
            raise LayoutError(f"{val_dir}: {problem}: {summarize(paths)}")
    unnamed = [p for p in found.keys() - named if found[p] != "folder" and _is_image(p)]
    moves = [(source, target) for source, target in pairs if target not in found]
    return moves, sorted([*unnamed, *(source for source, _ in copies)])


def apply(moves: Moves, val_dir: str | Path, *, progress: bool = False) -> None:
    """Renames each source to its target, never over an existing file.

    Raises:
        LayoutError: the files have changed since the plan, or the system refuses. No image is
            lost, and a second run resumes.
    """
    val_dir = Path(val_dir)
    for folder in sorted({(val_dir / target).parent for _, target in moves}):
        folder.mkdir(exist_ok=True)
    for source, target in progress_bar(moves, unit=" images", disable=not (progress and moves)):
        try:
            # os.rename overwrites silently. The lock excludes other runs, this other programs.
            if os.path.lexists(val_dir / target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(val_dir / source, val_dir / target)
        except OSError as error:
            raise LayoutError(
                f"{val_dir}: cannot move {source} to {target}: {error.strerror}: no image is lost; "
                "fix this and run the command again"
            ) from error


def read_solution(path: str | Path) -> dict[str, str]:
    """Reads `LOC_val_solution.csv` and returns image id -> wnid.

    Raises:
        FileNotFoundError: there is no such file.
        LayoutError: not a CSV in UTF-8, a column missing, no images, bad or repeated lines.
    """
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    labels, bad_lines = {}, []
    try:
        header = [cell.strip() for cell in next(reader, [])]
        if not {"ImageId", "PredictionString"} <= set(header):
            raise LayoutError(f"{path}: columns {header}: expected ImageId,PredictionString")
        for row in reader:
            cells = dict(zip(header, map(str.strip, row), strict=False))
            image, objects = (cells.get(name, "") for name in ("ImageId", "PredictionString"))
            wnid = objects.partition(" ")[0]
            is_valid = IMAGE_ID.fullmatch(image) and WNID.fullmatch(wnid) and image not in labels
            if is_valid and len(row) == len(header):
                labels[image] = wnid
            elif any(cells.values()):
                bad_lines.append(f"line {reader.line_num} {','.join(row)[:80]!r}")
    except csv.Error as error:
        raise LayoutError(f"{path}: line {reader.line_num} is not CSV: {error}") from error
    _validate_lines(path, labels, bad_lines, "ILSVRC2012_val_00000001,n01440764 1 2 3 4")
    return labels


def read_synsets(path: str | Path) -> dict[str, str]:
    """Reads `LOC_synset_mapping.txt` and returns wnid -> names, such as "tench, Tinca tinca".

    Raises:
        FileNotFoundError: there is no such file.
        LayoutError: not UTF-8, no lines, bad or repeated lines.
    """
    names, bad_lines = {}, []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        wnid, _, text = line.strip().partition(" ")
        if wnid and WNID.fullmatch(wnid) and text and wnid not in names:
            names[wnid] = text.strip()
        elif wnid:
            bad_lines.append(f"line {number} {line.strip()!r}")
    _validate_lines(path, names, bad_lines, "n01440764 tench, Tinca tinca")
    return names


def _validate_lines(path: str | Path, found: dict, bad_lines: list[str], example: str) -> None:
    if bad_lines or not found:
        lines = summarize(bad_lines or ["no entries"])
        raise LayoutError(f"{path}: bad lines: {lines}: expected each name once, as in {example}")


def class_names(data_dir: str | Path, classes: Sequence[str]) -> list[str]:
    """Readable names of class folders, such as "tench" for n01440764.

    From the download's `LOC_synset_mapping.txt`, three folders above `train/`, if it exists, or for
    Imagenette's ten classes. Other names are returned unchanged.
    """
    synsets = Path(data_dir, "..", "..", "..", "LOC_synset_mapping.txt")
    words = read_synsets(synsets) if synsets.is_file() else IMAGENETTE
    return [words.get(name, name).split(",")[0] for name in classes]


def check_layout(data_dir: str | Path) -> list[str]:
    """Returns the sorted class names of a folder whose train/ and val/ have the same classes.

    Raises:
        NotADirectoryError: there is no such folder.
        LayoutError: train/ or val/ is missing, val/ is flat or half sorted, the classes differ, or
            there are none.
    """
    if not Path(data_dir).is_dir():
        raise NotADirectoryError(f"{data_dir} is not a folder: give the one with train/ and val/")
    classes = {}
    for split in ("train", "val"):
        folder = Path(data_dir) / split
        if not folder.is_dir():
            hint = "; shards are given by a brace pattern" * any(Path(data_dir).glob("*.tar"))
            raise LayoutError(f"{folder} is missing: {data_dir} must hold train/ and val/{hint}")
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        classes[split] = {entry.name for entry in entries if entry.is_dir()}
    images = sorted(e.name for e in entries if e.name not in classes["val"] and _is_image(e.name))
    if images:
        state = "half sorted" if classes["val"] else "not sorted into class folders"
        more = " and take away what the CSV does not name" if classes["val"] else ""
        raise LayoutError(
            f"{folder} is {state}: images directly in it: {summarize(images)}: run python "
            "scripts/imagenet.py --val_solution_path LOC_val_solution.csv "
            f"--val_image_dir {shlex.quote(str(folder))}{more}"
        )
    for one, other in (("train", "val"), ("val", "train")):
        if only := sorted(classes[one] - classes[other]):
            raise LayoutError(
                f"{data_dir}: classes in {one}/ and not in {other}/: {summarize(only)}"
            )
    if not classes["train"]:
        raise LayoutError(f"{data_dir}: train/ and val/ are empty: expected a folder per class")
    return sorted(classes["train"])


def _scan(folder: str | Path, prefix: str = "") -> dict[str, str]:
    """Relative path -> "file", "folder" or "other" (links), two levels deep."""
    found = {}
    for entry in os.scandir(folder):
        path = prefix + entry.name
        if entry.is_dir(follow_symlinks=False):
            found |= {path: "folder"} | ({} if prefix else _scan(entry.path, f"{path}/"))
        else:
            found[path] = "file" if entry.is_file(follow_symlinks=False) else "other"
    return found


def _read_text(path: str | Path) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the one from the Kaggle download")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LayoutError(f"{path} is not UTF-8 text: {error.reason} {error.start}") from error


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
