"""Sorting, undoing and checking the ImageNet layout, on small trees of files.

Expected trees are written out from IMAGES, never taken from the code. A snapshot holds inode and
bytes of every file, so a copy in place of a file shows as a change.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from torchvision.datasets import Imagenette

from utils.data.imagenet import (
    IMAGENETTE,
    LayoutError,
    apply,
    check_layout,
    class_names,
    plan,
    read_solution,
    read_synsets,
)
from utils.records import LOCK_NAME, lock

main = runpy.run_path(str(ROOT / "scripts" / "imagenet.py"))["main"]

A, B, C = "n01440764", "n01443537", "n15075141"
IMAGES = {f"ILSVRC2012_val_{i:08d}": (A, B, C)[i % 3] for i in range(1, 8)}
ONE, TWO = list(IMAGES)[:2]  # in B and in C
HEAD = "ImageId,PredictionString\n"


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def make(folder, images=IMAGES, nested=()):
    """Writes the CSV and val/, with the images in `nested` already in their class folders."""
    rows = "".join(f"{name},{wnid} 1 2 30 40 {wnid} 5 6 7 8 \n" for name, wnid in images.items())
    write(folder / "solution.csv", (HEAD + rows).encode())
    for name, wnid in images.items():
        place = f"{wnid}/{name}.JPEG" if name in nested else f"{name}.JPEG"
        write(folder / "val" / place, f"bytes of {name}".encode())
    return folder / "val"


def tree(folder):
    """Relative path -> (inode, bytes), or what a link or folder is; without the lock's file."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            content = os.readlink(path)
        else:
            content = "folder" if path.is_dir() else (path.stat().st_ino, path.read_bytes())
        if path.name != LOCK_NAME:
            found[str(path.relative_to(folder))] = content
    return found


def contents(folder):
    return {path: x if isinstance(x, str) else x[1] for path, x in tree(folder).items()}


def flat_tree(images=IMAGES):
    return {f"{name}.JPEG": f"bytes of {name}".encode() for name in images}


def sorted_tree(images=IMAGES):
    files = {f"{w}/{name}.JPEG": f"bytes of {name}".encode() for name, w in images.items()}
    return files | dict.fromkeys(images.values(), "folder")


def options(folder, *more):
    paths = ["--val_solution_path", folder / "solution.csv", "--val_image_dir", folder / "val"]
    return [*map(str, paths), *more]


# ---- what a run does -----------------------------------------------------------------------------


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
        f"{ONE}.JPEG": f"bytes of {ONE}".encode(),  # the same image flat and in its class folder
        f"{B}/{ONE}.JPEG": f"bytes of {ONE}".encode(),
        "stray\udcff.JPEG": b"not in the CSV, not UTF-8 either",
        f"{C}/{ONE}.JPEG": b"in a class folder that is not its own",
        "._hidden.JPEG": b"not an image",
        "readme.txt": b"not an image",
    }
    for path, content in extra.items():
        write(val / path, content)
    for folder in ("album.jpg", "n99999999"):
        (val / folder).mkdir()
        extra[folder] = "folder"
    assert main(options(tmp_path, *more)) == 0
    folders = {B: "folder", C: "folder"}  # not empty, A is removed
    assert contents(val) == (flat_tree() | folders if more else sorted_tree()) | extra
    copy = f"{B}/{ONE}.JPEG" if more else f"{ONE}.JPEG"
    assert capsys.readouterr().out.splitlines()[1:] == [
        "left alone, not in the CSV or already in place: 3 "
        f"({', '.join(sorted([copy, f'{C}/{ONE}.JPEG']))}, 'stray\\udcff.JPEG')"
    ]


# ---- what stops a run, with nothing moved --------------------------------------------------------


def lines(*rows, head=HEAD):
    return head + "".join(f"{row}\n" for row in rows)


BAD_SOLUTIONS = {
    "columns [] expected ImageId,PredictionString": [""],
    "no entries": [lines()],
    "columns expected ImageId,PredictionString": [
        lines("a,b", head="id,label\n"),
        lines(ONE, head="ImageId\n"),
        lines(f"{ONE};{B}", head="ImageId;PredictionString\n"),
    ],
    "not UTF-8 text": [HEAD.encode() + b"caf\xe9,x\n", HEAD.encode("utf-16")],
    "not CSV": [lines(f'"{ONE},{B}')],
    "bad lines: 1 line 3": [lines(f"{TWO},{C}", bad) for bad in (
        ONE, f"{ONE},{B},1", f"{ONE}, ", f",{B}", f"{ONE},n0144076", f"{ONE},{B}1",
        f"{ONE},n0144353\u0667", f"{ONE},../{B}", f"{ONE},{B}/{C}", f"../{ONE},{B}",
        f"{B}/{ONE},{B}", f"..,{B}", f"a\\b,{B}", f"{ONE}.JPEG,{B}", f"{TWO},{C}", f"{TWO},{A}",
    )],
    "bad lines: 9 ( x0 x2', ...)": [lines(*[f"{ONE},x{i}" for i in range(9)])],
}  # fmt: skip


@pytest.mark.parametrize("words", BAD_SOLUTIONS)
def test_bad_solutions(tmp_path, words):
    for text in BAD_SOLUTIONS[words]:
        write(tmp_path / "x.csv", text if isinstance(text, bytes) else text.encode())
        with pytest.raises(LayoutError) as error:
            read_solution(tmp_path / "x.csv")
        assert str(error.value).startswith(str(tmp_path / "x.csv"))
        assert "\n" not in str(error.value)
        assert [word for word in words.split() if word not in str(error.value)] == []


def replace(path, change):
    def prepare(folder):
        (folder / path).unlink()
        change(folder / path)

    return prepare


BAD_TREES = {
    "no csv": (replace("solution.csv", lambda path: None), 2, "solution.csv is not a file"),
    "bad csv": (replace("solution.csv", Path.touch), 1, "columns []"),
    "no val": (lambda folder: (folder / "val").rename(folder / "away"), 2, "val is not a folder"),
    "one image missing": (
        replace(f"val/{ONE}.JPEG", lambda path: None),
        1,
        "images of the CSV missing: 1 (",
    ),
    "image in another class folder": (
        lambda folder: (folder / f"val/{ONE}.JPEG").rename(folder / f"val/{C}/{ONE}.JPEG"),
        1,
        "images of the CSV missing: 1 (",
    ),
    "other bytes in the class folder": (
        lambda folder: write(folder / f"val/{B}/{ONE}.JPEG", b"something else"),
        1,
        "differ from those in place, and are not overwritten: 1 (",
    ),
    "class folder is a file": (lambda folder: write(folder / f"val/{B}", b""), 1, f"1 ({B})"),
    "class folder is a link": (
        lambda folder: (folder / "val" / B).symlink_to("../elsewhere"),
        1,
        f"no links: 1 ({B})",
    ),
    "image is a folder": (replace(f"val/{ONE}.JPEG", Path.mkdir), 1, f"1 ({ONE}.JPEG)"),
    "image is a link": (
        replace(f"val/{ONE}.JPEG", lambda path: path.symlink_to(f"{C}/{TWO}.JPEG")),
        1,
        f"no links: 1 ({ONE}.JPEG)",
    ),
    "target is a folder": (
        lambda folder: (folder / f"val/{B}/{ONE}.JPEG").mkdir(parents=True),
        1,
        f"1 ({B}/{ONE}.JPEG)",
    ),
}


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--undo"]], ids=str)
@pytest.mark.parametrize(("prepare", "code", "words"), BAD_TREES.values(), ids=BAD_TREES)
def test_errors_are_one_line_and_nothing_moves(tmp_path, capsys, prepare, code, words, more):
    make(tmp_path, nested=[TWO])
    (tmp_path / "elsewhere").mkdir()
    prepare(tmp_path)
    before = tree(tmp_path)
    assert main(options(tmp_path, *more)) == code
    assert tree(tmp_path) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {tmp_path}")
    assert captured.err.count("\n") == 1
    assert words in captured.err


def test_files_that_change_after_the_plan_are_not_overwritten(tmp_path):
    val = make(tmp_path)
    moves, _ = plan(IMAGES, val)
    write(val / moves[3][1], b"newcomer")
    with pytest.raises(LayoutError, match=r"cannot move .*File exists"):
        apply(moves, val)
    (val / moves[4][0]).unlink()
    with pytest.raises(LayoutError, match=r"cannot move .*No such file"):
        apply(moves[4:], val)
    assert contents(val)[moves[3][1]] == b"newcomer"
    assert contents(val)[moves[3][0]] == flat_tree()[moves[3][0]]


# ---- a kill, and two runs at once ----------------------------------------------------------------

MANY = {f"ILSVRC2012_val_{i:08d}": f"n{i % 20:08d}" for i in range(300)}
fork = multiprocessing.get_context("fork")


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


@pytest.mark.parametrize(
    ("undo", "nth"), [(False, 7), (False, 21), (False, 150), (False, 320), (True, 310)]
)
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


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "ImageId,PredictionString\na_1,n01440764 1 2 3 4\nb-2,n01443537\n",
        "\ufeffImageId,PredictionString\na_1,n01440764\nb-2,n01443537",
        "ImageId,PredictionString\r\na_1,n01440764 1 2 \r\nb-2,n01443537\r\n\r\n",
        "ImageId,PredictionString\n\na_1,n01440764\n  \nb-2,n01443537\n\n\n",
        " ImageId , PredictionString \n a_1 ,  n01440764  1 2  \nb-2 , n01443537 \n",
        'PredictionString,other,ImageId\nn01440764,"x,y",a_1\n"n01443537 1 2",,b-2\n',
    ],
)
def test_solutions_are_read(tmp_path, text):
    write(tmp_path / "solution.csv", text.encode())
    labels = read_solution(tmp_path / "solution.csv")
    assert labels == {"a_1": "n01440764", "b-2": "n01443537"}


def test_synsets_are_read(tmp_path):
    path = tmp_path / "names.txt"
    for start, end in (("", "\n"), ("\ufeff", "\r\n"), ("", "\n\n")):
        write(path, f"{start}{A} tench, Tinca tinca{end}n03126707 crane{end}".encode())
        assert read_synsets(path) == {A: "tench, Tinca tinca", "n03126707": "crane"}
    for text, words in (
        (b"", "no entries"),
        (b"n01440764\n", "line 1 'n01440764'"),
        (b"n1 tench\n", "line 1 'n1 tench'"),
        (b"n01440764 tench\n\nn01440764 shark\n", "bad lines: 1 .line 3 'n01440764 shark'"),
        (b"n01440764 caf\xe9\n", "not UTF-8"),
    ):
        write(path, text)
        with pytest.raises(LayoutError, match=words):
            read_synsets(path)


# ---- the layout ----------------------------------------------------------------------------------


def touch(folder, paths):
    for path in paths.split():
        if path.endswith("/"):
            (folder / path).mkdir(parents=True, exist_ok=True)
        else:
            write(folder / path, b"")


@pytest.mark.parametrize(
    "paths",
    [
        "train/n2/x.JPEG train/n1/x.JPEG val/n1/y.JPEG val/n2/y.JPEG",
        "train/n1/ train/n2/ train/.git/ train/a.tar val/n1/ val/n2/ val/._a.JPEG val/a.txt",
    ],
)
def test_a_good_layout(tmp_path, paths):
    touch(tmp_path, paths)
    assert check_layout(str(tmp_path)) == check_layout(tmp_path) == ["n1", "n2"]


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("val/n1/", ["train is missing", "train/ and val/"]),
        ("train/n1/ val", ["val is missing"]),
        ("train/ val/", ["are empty"]),
        ("train/n1/ val/a.JPEG val/b.jpg", ["val is not sorted", "2 (a.JPEG, b.jpg)", "{run}"]),
        ("train/n1/ val/n1/a.JPEG val/b.JPEG", ["val is half sorted", "1 (b.JPEG)", "{run}"]),
        ("train/n1/ train/n2/ val/n1/", ["classes in train/ and not in val/: 1 (n2)"]),
        ("train/n1/ val/n1/ val/n5/ val/n4/ val/n3/ val/n2/", ["train/: 4 (n2, n3, n4, ...)"]),
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


def test_class_names(tmp_path, monkeypatch):
    """From the download's file where it is, else Imagenette's, else the folder's own."""
    data = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    data.mkdir(parents=True)
    classes = ["n01440764", "n03888257", "cats"]
    assert class_names(data, classes) == ["tench", "parachute", "cats"]
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 fish, big fish\n")
    monkeypatch.chdir(data)
    assert class_names(".", classes) == ["fish", "n03888257", "cats"]


def test_imagenettes_names_are_torchvisions():
    expected = {key: ", ".join(words) for key, words in Imagenette._WNID_TO_CLASS.items()}
    assert expected == IMAGENETTE
