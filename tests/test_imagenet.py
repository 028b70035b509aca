"""Sorting, undoing and checking the ImageNet layout, on small trees of files.

Expected trees are written out from IMAGES, never taken from the code. A snapshot holds inode and
bytes of every file, so a copy in place of a file shows as a change.
"""

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from torchvision.datasets import Imagenette
from torchvision.models import MobileNet_V2_Weights

from utils.data.imagenet import (
    LayoutError,
    apply,
    check_layout,
    class_names,
    find_synsets,
    plan,
    read_class_names,
    read_solution,
    read_synsets,
)
from utils.records import LOCK_NAME, lock

main = runpy.run_path(str(ROOT / "scripts" / "imagenet.py"))["main"]
fork = multiprocessing.get_context("fork")

A, B, C = "n01440764", "n01443537", "n15075141"
IMAGES = {f"ILSVRC2012_val_{i:08d}": (A, B, C)[i % 3] for i in range(1, 8)}
MANY = {f"ILSVRC2012_val_{i:08d}": f"n{i % 20:08d}" for i in range(300)}
ONE, TWO = list(IMAGES)[:2]  # in B and in C
HEAD = "ImageId,PredictionString\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(errors="surrogateescape"))


def make(folder, images=IMAGES, nested=()):
    """Writes the CSV and val/, with the images in `nested` already in their class folders."""
    rows = "".join(f"{name},{wnid} 1 2 30 40 {wnid} 5 6 7 8 \n" for name, wnid in images.items())
    write(folder / "solution.csv", HEAD + rows)
    for name, wnid in images.items():
        place = f"{wnid}/{name}.JPEG" if name in nested else f"{name}.JPEG"
        write(folder / "val" / place, f"bytes of {name}")
    return folder / "val"


def tree(folder):
    """Relative path -> (inode, bytes), or "folder"; without the lock's file."""
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: "folder" if path.is_dir() else (path.stat().st_ino, path.read_bytes())
        for name, path in paths.items()
        if path.name != LOCK_NAME
    }


def contents(folder):
    """Relative path -> bytes, or "folder"."""
    return {path: x if x == "folder" else x[1] for path, x in tree(folder).items()}


def flat_tree(images=IMAGES):
    return {f"{name}.JPEG": f"bytes of {name}".encode() for name in images}


def sorted_tree(images=IMAGES):
    files = {f"{w}/{name}.JPEG": f"bytes of {name}".encode() for name, w in images.items()}
    return files | dict.fromkeys(images.values(), "folder")


def options(folder, *more):
    paths = ["--val_solution_path", folder / "solution.csv", "--val_image_dir", folder / "val"]
    return [*map(str, paths), *more]


@pytest.mark.parametrize("nested", [(), list(IMAGES)[::2]], ids=str)
def test_sort_and_undo_only_rename_and_twice_changes_nothing(tmp_path, capsys, nested):
    val = make(tmp_path, nested=nested)
    inodes = {Path(path).name: x[0] for path, x in tree(val).items() if x != "folder"}
    for more, expected, to_move in (
        ([], sorted_tree(), 7 - len(nested)),
        ([], sorted_tree(), 0),
        (["--undo"], flat_tree(), 7),
        (["--undo"], flat_tree(), 0),
    ):
        before = tree(val)
        assert main(options(tmp_path, "--dry-run", *more)) == 0
        assert tree(val) == before
        assert f"7 images: would move {to_move} into" in capsys.readouterr().out
        assert main(options(tmp_path, *more)) == 0
        assert contents(val) == expected
        assert {Path(p).name: x[0] for p, x in tree(val).items() if x != "folder"} == inodes
        captured = capsys.readouterr()
        assert f"7 images: moved {to_move} into" in captured.out
        assert f"{7 - to_move} already there" in captured.out
        assert ("7/7" in captured.err) == (to_move == 7)  # the progress bar


@pytest.mark.parametrize("more", [[], ["--undo"]])
def test_other_files_stay_and_are_reported(tmp_path, capsys, more):
    val = make(tmp_path, nested=[ONE])
    extra = {
        "stray\udcff.JPEG": b"not in the CSV, not UTF-8 either",
        f"{C}/{ONE}.JPEG": b"in a class folder that is not its own",
        "._hidden.JPEG": b"not an image",
        "album.jpg/readme.txt": b"in a folder",
    }
    for path, content in extra.items():
        write(val / path, content.decode())
    assert main(options(tmp_path, *more)) == 0
    folders = {C: "folder", "album.jpg": "folder"}  # not empty; A and B are removed
    assert contents(val) == (flat_tree() if more else sorted_tree()) | folders | extra
    words = f"left alone, not in the CSV: 2 ({C}/{ONE}.JPEG, 'stray\\udcff.JPEG')"
    assert capsys.readouterr().out.splitlines()[1:] == [words]


IMAGE = f"val/{ONE}.JPEG"
BAD_TREES = {  # what is changed, and the error
    "no csv": (lambda f: (f / "solution.csv").unlink(), "solution.csv: No such file"),
    "no val": (lambda f: shutil.rmtree(f / "val"), "val is not a folder"),
    "one image missing": (lambda f: (f / IMAGE).unlink(), "CSV missing: 1 ("),
    "image in another class folder": (
        lambda f: (f / IMAGE).rename(f / f"val/{C}/{ONE}.JPEG"), "CSV missing: 1 (",
    ),
    "an image twice": (lambda f: write(f / f"val/{B}/{ONE}.JPEG", "x"), "one of each: 1 ("),
    "class folder is a link": (lambda f: (f / f"val/{B}").symlink_to(f), f"directories: 1 ({B})"),
    "image is a link": (
        lambda f: [(f / IMAGE).unlink(), (f / IMAGE).symlink_to("../solution.csv")],
        f"directories: 1 ({ONE}.JPEG)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("more", [[], ["--undo"]], ids=str)
@pytest.mark.parametrize(("change", "words"), BAD_TREES.values(), ids=BAD_TREES)
def test_errors_are_one_line_and_nothing_moves(tmp_path, capsys, change, words, more):
    make(tmp_path, nested=[TWO])
    change(tmp_path)
    before = tree(tmp_path)
    assert main(options(tmp_path, *more)) in (1, 2)
    assert tree(tmp_path) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_files_that_come_after_the_plan_are_not_overwritten(tmp_path):
    val = make(tmp_path)
    moves, _ = plan(IMAGES, val)
    write(val / moves[3][1], "newcomer")
    with pytest.raises(LayoutError, match="written by another program"):
        apply(moves, val)
    assert contents(val)[moves[3][1]] == b"newcomer"
    assert contents(val)[moves[3][0]] == flat_tree()[moves[3][0]]


def killed_at(nth, val, argv):
    """Runs main and kills itself before the n-th change in `val`, however the code asks for it."""
    left = nth

    def hook(event, args):
        nonlocal left
        if event in {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link"}:
            left -= Path(args[0]) != val  # made sure of by the lock
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    main(argv)


@pytest.mark.parametrize(("undo", "nth"), [(False, 7), (False, 21), (False, 150), (True, 310)])
def test_kill_9_in_the_middle_loses_nothing_and_a_rerun_finishes(tmp_path, undo, nth):
    val = make(tmp_path, images=MANY, nested=MANY if undo else ())
    argv = options(tmp_path, *["--undo"] * undo)
    process = fork.Process(target=killed_at, args=(nth, val, argv))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    files = {path: x for path, x in contents(val).items() if x != "folder"}
    assert {Path(path).name: x for path, x in files.items()} == flat_tree(MANY)
    assert len(files) == 300
    done = sum(("/" in path) != undo for path in files)
    assert done == (300 if undo else max(0, nth - 21))  # 20 folders first, then file by file
    assert main(argv) == 0
    assert contents(val) == (flat_tree(MANY) if undo else sorted_tree(MANY))


def test_two_runs_wait_for_a_third_and_both_succeed(tmp_path):
    val = make(tmp_path, images=MANY)
    both = [fork.Process(target=main, args=(options(tmp_path),)) for _ in range(2)]
    with lock(val):
        for process in both:
            process.start()
        both[0].join(0.3)
        assert contents(val) == flat_tree(MANY)
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert contents(val) == sorted_tree(MANY)


def test_solutions_are_read(tmp_path):
    for text in (
        "ImageId,PredictionString\na_1,n01440764 1 2 3 4\nb-2,n01443537\n",
        "\ufeffImageId,PredictionString\na_1,n01440764\nb-2,n01443537",
        "ImageId,PredictionString\r\na_1,n01440764 1 2 \r\nb-2,n01443537\r\n\r\n",
        " ImageId , PredictionString \n\n a_1 ,  n01440764  1 2  \n  \nb-2 , n01443537 \n\n",
        'PredictionString,other,ImageId\nn01440764,"x,y",a_1\n"n01443537 1 2",,b-2\n',
    ):
        write(tmp_path / "solution.csv", text)
        labels = read_solution(tmp_path / "solution.csv")
        assert labels == {"a_1": "n01440764", "b-2": "n01443537"}


BAD_ROWS = [
    *(ONE, f"{ONE}, ", f",{B}", f"{ONE},n0144076", f"{ONE},{B}1", f"{ONE},n0144353\u0667"),
    *(f"{ONE},../{B}", f"../{ONE},{B}", f"{ONE}.JPEG,{B}", f"{TWO},{A}"),
]
BAD_SOLUTIONS = [
    ("", "not a CSV file in UTF-8: No columns"),
    (f"{HEAD}caf\udce9,x\n", "not a CSV file in UTF-8: .* byte 0xe9"),
    (HEAD, "no entries"),
    (f"ImageId;PredictionString\n{ONE};{B}\n", "columns .*: expected ImageId,PredictionString"),
    *((f"{HEAD}{TWO},{C}\n{row}\n", r"bad lines: 1 \(") for row in BAD_ROWS),
    (HEAD + "".join(f"{ONE},x{i}\n" for i in range(9)), r"bad lines: 9 \(.*,x0, .*,x2, \.\.\.\)"),
]
BAD_SYNSETS = [
    ("\n", "no entries"),
    ("n01440764\n", r"bad lines: 1 \(n01440764\)"),
    ("n01440764 tench\n\nn01440764 shark\n", r"bad lines: 1 \(n01440764 shark\)"),
    ("n01440764 caf\udce9\n", "not a text file in UTF-8"),
]


@pytest.mark.parametrize(
    ("read", "cases"), [(read_solution, BAD_SOLUTIONS), (read_synsets, BAD_SYNSETS)]
)
def test_bad_files_are_one_line(tmp_path, read, cases):
    for text, words in cases:
        write(tmp_path / "x.csv", text)
        with pytest.raises(LayoutError, match=words) as error:
            read(tmp_path / "x.csv")
        assert str(error.value).startswith(str(tmp_path / "x.csv"))
        assert "\n" not in str(error.value)


def test_names_of_classes(tmp_path):
    """From the download's file where it is, else ImageNet's, else the folder's own."""
    data, classes = tmp_path / "ILSVRC" / "Data" / "CLS-LOC", [A, "n03126707"]
    data.mkdir(parents=True)
    assert find_synsets(data) is None
    write(tmp_path / "LOC_synset_mapping.txt", f"\ufeff{A} a, b\r\nn03126707 crane\r\n\r\n")
    assert class_names(classes, find_synsets(data)) == ["a, b", "crane"]
    with pytest.raises(LayoutError, match=r"has no names for the classes 1 \(cats\)"):
        class_names([A, "cats"], find_synsets(data))
    imagenette = {wnid: ", ".join(words) for wnid, words in Imagenette._WNID_TO_CLASS.items()}
    assert class_names([*imagenette, "cats"], None) == [*imagenette.values(), "cats"]


def test_imagenets_classes_are_in_the_order_of_torchvisions_logits():
    words = read_class_names()
    assert list(words) == sorted(words)
    firsts = [names.split(", ")[0] for names in words.values()]
    expected = MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"]
    different = [pair for pair in zip(firsts, expected, strict=True) if pair[0] != pair[1]]
    assert different == [("crane", "crane bird"), ("maillot", "maillot tank suit")]


def test_class_names_of_other_networks(tmp_path):
    write(tmp_path / "names.txt", "golden retriever\ncat\n")
    assert list(read_class_names(tmp_path / "names.txt")) == ["golden retriever", "cat"]
    write(tmp_path / "names.txt", "cat\ncat\n")
    with pytest.raises(LayoutError, match=r"bad lines: 1 \(cat\)"):
        read_class_names(tmp_path / "names.txt")


def touch(folder, paths):
    for path in paths.split():
        write(folder / path / "x" if path.endswith("/") else folder / path, "")


def test_a_good_layout(tmp_path):
    touch(tmp_path, "train/n1/ train/n2/x.JPEG train/.git/ val/n2/ val/._a.JPEG val/n1/")
    assert check_layout(str(tmp_path)) == ["n1", "n2"]


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("train/n1/ val", ["val is missing", "train/ and val/"]),
        ("train/.x val/.x", ["no class folders in train/ and val/"]),
        ("train/n1/ val/a.JPEG val/b.jpg", ["val is not sorted", "2 (a.JPEG, b.jpg)", "{run}"]),
        ("train/n1/ val/n1/a.JPEG val/b.JPEG", ["val is half sorted", "1 (b.JPEG)", "{run}"]),
        ("train/n1/ train/n2/ val/n1/", ["in only one of train/ and val/: 1 (train/n2)"]),
        ("train/caf\xe9/ val/cafe\u0301/", ["caf\xe9", "two Unicode forms (NFC, NFD)"]),
    ],
)
def test_bad_layouts(tmp_path, paths, words):
    data = tmp_path / "my data"
    touch(data, f"readme.txt {paths}")
    with pytest.raises(LayoutError) as caught:
        check_layout(data)
    run = "python scripts/imagenet.py --val_solution_path LOC_val_solution.csv --val_image_dir"
    found = str(caught.value).replace(f"{run} '{data}/val'", "{run}")
    assert [word for word in words if word not in found] == []
    assert ("{run}" in found) == ("{run}" in words)
    assert "\n" not in found
    assert str(data) in found
