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

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from utils.cli import DataError, progress_bar, summarize, unicode_hint
from utils.records import lock

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")

# Lines of LOC_synset_mapping.txt in the order of the classes: WordNet's lemmas, as timm has them.
CLASSES = Path(__file__).with_name("imagenet_classes.txt")

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
    moves, left_alone = plan(labels, val_dir, undo=undo)
    if not dry_run and (moves or undo):  # else nothing is written, not even the lock
        with lock(val_dir):
            moves, left_alone = plan(labels, val_dir, undo=undo)
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
        summary += f"\nleft alone, not in the CSV: {summarize(left_alone)}"
    return summary


def plan(labels: dict[str, str], val_dir: Path, *, undo: bool = False) -> tuple[Moves, list[str]]:
    """Plans the moves in a folder that may be half sorted.

    Returns:
        The moves, and the images that are not in the CSV and left alone.

    Raises:
        LayoutError: an image is missing or there twice, or a name is taken. Links are not accepted:
            a relative one would break, a folder may be on another volume.
    """
    found = _scan(val_dir)
    pairs = [(f"{image}.JPEG", f"{wnid}/{image}.JPEG") for image, wnid in labels.items()]
    if undo:
        pairs = [(nested, flat) for flat, nested in pairs]
    named = {wnid: "folder" for wnid in labels.values()}
    named |= {path: "file" for pair in pairs for path in pair}
    taken = [path for path, kind in named.items() if found.get(path, kind) != kind]
    missing = [source for source, target in pairs if not found.keys() & {source, target}]
    doubled = [source for source, target in pairs if found.keys() >= {source, target}]
    for problem, paths in {
        "names already taken, or links; images must be files and class folders directories": taken,
        "images of the CSV missing": missing,
        "images both directly in it and in a class folder; remove one of each": doubled,
    }.items():
        if paths:
            raise LayoutError(f"{val_dir}: {problem}: {summarize(paths)}")
    unnamed = [p for p in found.keys() - named if found[p] != "folder" and _is_image(p)]
    return [pair for pair in pairs if pair[1] not in found], sorted(unnamed)


def apply(moves: Moves, val_dir: Path, *, progress: bool = False) -> None:
    """Renames each source to its target; after an OSError or LayoutError a second run resumes."""
    for folder in sorted({(val_dir / target).parent for _, target in moves}):
        folder.mkdir(exist_ok=True)
    for source, target in progress_bar(moves, unit=" images", disable=not (progress and moves)):
        # os.rename overwrites silently. The lock excludes other runs, this other programs.
        if os.path.lexists(val_dir / target):
            raise LayoutError(f"{val_dir / target}: written by another program; run this again")
        os.rename(val_dir / source, val_dir / target)


def read_solution(path: str | Path) -> dict[str, str]:
    """Reads `LOC_val_solution.csv` and returns image id -> wnid.

    Raises:
        FileNotFoundError: there is no such file.
        LayoutError: not a CSV in UTF-8, a column missing, no images, bad or repeated lines.
    """
    try:
        table = pd.read_csv(path, dtype=str, encoding="utf-8-sig", keep_default_na=False).fillna("")
    except ValueError as error:
        raise LayoutError(f"{path}: not a CSV file in UTF-8: {str(error).strip()}") from error
    table.columns = table.columns.str.strip()
    if not {"ImageId", "PredictionString"} <= {*table.columns}:
        raise LayoutError(f"{path}: columns {[*table]}: expected ImageId,PredictionString")
    lines = table["ImageId"].str.strip() + "," + table["PredictionString"].str.strip()
    example = "ILSVRC2012_val_00000001,n01440764 1 2 3 4"
    return _read_pairs(path, lines, r"([A-Za-z0-9_-]+),(n[0-9]{8})(?: .*)?", example)


def read_synsets(path: str | Path) -> dict[str, str]:
    """Reads `LOC_synset_mapping.txt` and returns wnid -> names, such as "tench, Tinca tinca".

    Raises:
        FileNotFoundError: there is no such file.
        LayoutError: not UTF-8, no lines, bad or repeated lines.
    """
    pattern, example = r"(n[0-9]{8})\s+(.+)", "n01440764 tench, Tinca tinca"
    return _read_pairs(path, _read_lines(path), pattern, example)


def read_class_names(path: str | Path = CLASSES) -> dict[str, str]:
    """Class -> words of a file with one class per line: a name, or a wnid and its words.

    Args:
        path: defaults to ImageNet's 1,000 classes in their order.

    Raises:
        FileNotFoundError, LayoutError: as `read_synsets`.
    """
    lines = _read_lines(path)
    if lines.str.match(r"n[0-9]{8}\s").any():
        return read_synsets(path)
    return _read_pairs(path, lines, "((.+))", "golden retriever")


def _read_lines(path: str | Path) -> pd.Series:
    try:
        return pd.Series(Path(path).read_text("utf-8-sig").splitlines(), dtype=str).str.strip()
    except UnicodeDecodeError as error:
        raise LayoutError(f"{path}: not a text file in UTF-8: {error}") from error


def _read_pairs(path: str | Path, lines: pd.Series, pattern: str, example: str) -> dict[str, str]:
    """The two groups of the pattern in each line."""
    lines = lines[~lines.isin(["", ","])]
    pairs = lines.str.extract(rf"\A{pattern}\Z")
    bad = lines[pairs[0].isna() | pairs[0].duplicated()].tolist()
    if bad or lines.empty:
        found = summarize([line[:80] for line in bad]) if bad else "no entries"
        raise LayoutError(f"{path}: bad lines: {found}: expected each name once, as in {example}")
    return dict(zip(pairs[0], pairs[1], strict=True))


def class_names(classes: Sequence[str], path: str | Path | None = None) -> list[str]:
    """Words of class folders, such as "tench, Tinca tinca" for n01440764.

    Args:
        path: a file of `read_class_names`, by name, or in the order of `classes` if it names none
            of them. By default ImageNet's classes get their words, and others keep their names.

    Raises:
        FileNotFoundError, LayoutError: from `read_class_names`, or the file lacks a class.
    """
    words = read_class_names(path or CLASSES)
    if path is None:
        return [words.get(name, name) for name in classes]
    unknown = [name for name in classes if name not in words]
    if len(unknown) == len(classes) == len(words):
        return list(words.values())
    if unknown:
        raise LayoutError(f"{path}: has no names for the classes {summarize(unknown)}")
    return [words[name] for name in classes]


def find_synsets(data_dir: str | Path) -> Path | None:
    """The download's `LOC_synset_mapping.txt`, three folders above `train/`, if there is one."""
    path = Path(data_dir, "..", "..", "..", "LOC_synset_mapping.txt")
    return path if path.is_file() else None


def check_layout(data_dir: str | Path, splits: Sequence[str] = ("train", "val")) -> list[str]:
    """Returns the sorted class names of a folder, whose splits must have the same ones.

    Args:
        splits: folders in `data_dir` to look at, or [""] for `data_dir` itself.

    Raises:
        NotADirectoryError: there is no such folder.
        LayoutError: a split is missing, flat or half sorted, the classes differ, or there are none.
    """
    wanted = " and ".join(f"{split}/" for split in splits if split) or "class folders"
    if not Path(data_dir).is_dir():
        raise NotADirectoryError(f"{data_dir} is not a folder: give the one with {wanted}")
    classes = {}
    for split in splits:
        folder = Path(data_dir) / split
        if not folder.is_dir():
            hint = "; shards are given by a brace pattern" * any(Path(data_dir).glob("*.tar"))
            hint += "; with --val-share 0.2 a folder of images per class is enough"
            raise LayoutError(f"{folder} is missing: {data_dir} must hold {wanted}{hint}")
        entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        classes[split] = {entry.name for entry in entries if entry.is_dir()}
        images = sorted({e.name for e in entries if _is_image(e.name)} - classes[split])
        if images and split == "val":
            state = "half sorted" if classes["val"] else "not sorted into class folders"
            more = " and remove images that the CSV does not list" if classes["val"] else ""
            raise LayoutError(
                f"{folder} is {state}: images directly in it: {summarize(images)}: run python "
                "scripts/imagenet.py --val_solution_path LOC_val_solution.csv "
                f"--val_image_dir {shlex.quote(str(folder))}{more}"
            )
    common = set.intersection(*classes.values())
    if only := sorted(f"{split}/{name}" for split in classes for name in classes[split] - common):
        found = summarize(only) + unicode_hint(name.partition("/")[2] for name in only)
        raise LayoutError(f"{data_dir}: classes in only one of {wanted}: {found}")
    if not common:
        raise LayoutError(f"{data_dir}: no class folders" + f" in {wanted}" * (splits != [""]))
    if len(common) == 1:
        reason = f"one class, {common.pop()}; two are the least to choose from"
        raise LayoutError(f"{data_dir}: holds {reason}, each a folder")
    return sorted(common)


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


def _is_image(path: str) -> bool:
    name = os.path.basename(path)
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
