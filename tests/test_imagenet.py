"""Sorting, undoing and checking the ImageNet layout, on small trees of files.

Expected trees are written out from IMAGES, never taken from the code. A snapshot holds inode and
bytes of every file, so a copy that is put in the place of a file shows as a change.
"""

import fcntl
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
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

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "imagenet.py"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
main = runpy.run_path(str(SCRIPT))["main"]

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
    """Returns relative path -> (inode, bytes), or what a link or folder is."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            content = os.readlink(path)
        else:
            content = "folder" if path.is_dir() else (path.stat().st_ino, path.read_bytes())
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


def start(folder, *more):
    command = [sys.executable, str(SCRIPT), *options(folder, *more)]
    return subprocess.Popen(command, env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE)


# --- what a run does --------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [(), list(IMAGES)[::2], list(IMAGES)], ids=str)
def test_sort_and_undo_rename_only_and_twice_changes_nothing(tmp_path, capsys, nested):
    val = make(tmp_path, nested=nested)
    inodes = {Path(path).name: x[0] for path, x in tree(val).items() if x != "folder"}
    for more, expected, to_move in (
        ([], sorted_tree(), 7 - len(nested)),
        ([], sorted_tree(), 0),
        (["--undo"], flat_tree(), 7),
        (["--undo"], flat_tree(), 0),
    ):
        assert main(options(tmp_path, *more)) == 0
        assert contents(val) == expected
        assert {Path(p).name: x[0] for p, x in tree(val).items() if x != "folder"} == inodes
        captured = capsys.readouterr()
        assert f"7 images: moved {to_move} into" in captured.out
        assert f"{7 - to_move} already there" in captured.out
        assert ("7/7" in captured.err) == (to_move == 7)  # the progress bar


@pytest.mark.parametrize(("more", "count"), [([], 5), (["--undo"], 2)])
def test_dry_run_only_tells(tmp_path, capsys, more, count):
    make(tmp_path, nested=[ONE, TWO])
    before = tree(tmp_path)
    assert main(options(tmp_path, "--dry-run", *more)) == 0
    assert tree(tmp_path) == before
    assert f"would move {count} " in capsys.readouterr().out


def test_undo_removes_only_empty_class_folders_of_the_csv(tmp_path):
    val = make(tmp_path, nested=IMAGES)
    write(val / A / "notes.txt", b"mine")
    (val / "n99999999").mkdir()
    assert main(options(tmp_path, "--undo")) == 0
    kept = {A: "folder", f"{A}/notes.txt": b"mine", "n99999999": "folder"}
    assert contents(val) == flat_tree() | kept


@pytest.mark.parametrize("more", [[], ["--undo"]])
def test_images_left_alone_are_told(tmp_path, capsys, more):
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
    (val / "album.jpg").mkdir()
    extra["album.jpg"] = "folder"
    assert main(options(tmp_path, *more)) == 0
    folders = {B: "folder", C: "folder"}
    assert contents(val) == (flat_tree() | folders if more else sorted_tree()) | extra
    told = capsys.readouterr().out.splitlines()[1:]
    second = f"{B}/{ONE}.JPEG" if more else f"{ONE}.JPEG"
    assert told == [
        f"left alone, not named in the CSV: 2 ({C}/{ONE}.JPEG, 'stray\\udcff.JPEG')",
        f"left alone, same bytes already in place: 1 ({second})",
    ]


# --- what stops a run, with nothing moved -----------------------------------------------------


def put(path, content):
    return lambda folder: write(folder / path, content)


def lines(*rows, head=HEAD):
    return put("solution.csv", (head + "".join(f"{row}\n" for row in rows)).encode())


def replace(path, change):
    def prepare(folder):
        (folder / path).unlink()
        change(folder / path)

    return prepare


def remove_all(folder):
    for path in folder.glob("val/**/*.JPEG"):
        path.unlink()


ERRORS = {
    "no csv": (replace("solution.csv", lambda path: None), 2, ["solution.csv is not a file"]),
    "csv is a folder": (replace("solution.csv", Path.mkdir), 2, ["solution.csv is not a file"]),
    "empty csv": (put("solution.csv", b""), 1, ["columns []", "ImageId,PredictionString"]),
    "only a header": (lines(), 1, ["no images"]),
    "other columns": (lines("a,b", head="id,label\n"), 1, ["'id', 'label'"]),
    "no second column": (lines(ONE, head="ImageId\n"), 1, ["expected ImageId,PredictionString"]),
    "semicolons": (lines(f"{ONE};{B}", head="ImageId;PredictionString\n"), 1, ["expected ImageId"]),
    "latin-1": (put("solution.csv", HEAD.encode() + b"caf\xe9,x\n"), 1, ["not UTF-8 text", "28"]),
    "utf-16": (put("solution.csv", HEAD.encode("utf-16")), 1, ["not UTF-8 text"]),
    "open quote": (lines(f'"{ONE},{B}'), 1, ["not CSV"]),
    "too few cells": (lines(ONE), 1, ["bad lines: 1", f"line 2 '{ONE}'"]),
    "too many cells": (lines(f"{ONE},{B},1"), 1, [f"line 2 '{ONE},{B},1'"]),
    "no prediction": (lines(f"{ONE},{B}", f"{TWO}, "), 1, [f"line 3 '{TWO},'"]),
    "no id": (lines(f",{B}"), 1, [f"line 2 ',{B}'"]),
    "both blank": (lines(","), 1, ["line 2 ','"]),
    "short wnid": (lines(f"{ONE},n0144076"), 1, ["n0144076'", "ILSVRC2012_val_00000001,n01440764"]),
    "long wnid": (lines(f"{ONE},{B}1"), 1, [f"{B}1'"]),
    "wnid of other digits": (lines(f"{ONE},n0144353\u0667"), 1, ["line 2"]),
    "wnid leads out": (lines(f"{ONE},../{B}"), 1, [f"'{ONE},../{B}'"]),
    "wnid is a path": (lines(f"{ONE},{B}/{C}"), 1, [f"'{ONE},{B}/{C}'"]),
    "id leads out": (lines(f"../{ONE},{B}"), 1, [f"'../{ONE},{B}'"]),
    "id is a path": (lines(f"{B}/{ONE},{B}"), 1, [f"'{B}/{ONE},{B}'"]),
    "id is dots": (lines(f"..,{B}"), 1, [f"'..,{B}'"]),
    "id with backslash": (lines(f"a\\b,{B}"), 1, ["line 2"]),
    "id with suffix": (lines(f"{ONE}.JPEG,{B}"), 1, [f"'{ONE}.JPEG,{B}'"]),
    "duplicate": (lines(*[f"{ONE},{B}"] * 2), 1, [f"line 3 {ONE} again, {B} and {B}"]),
    "conflict": (lines(f"{ONE},{B}", f"{ONE},{C}"), 1, [f"line 3 {ONE} again, {B} and {C}"]),
    "many bad lines": (
        lines(*[f"{ONE},x{i}" for i in range(9)]),
        1,
        ["bad lines: 9 (", "x0", "x2', ...)"],
    ),
    "one image missing": (
        lambda folder: (folder / f"val/{ONE}.JPEG").unlink(),
        1,
        ["images of the CSV missing: 1 (", f"{ONE}.JPEG", "class folder"],
    ),
    "all images missing": (remove_all, 1, ["missing: 7 (", f"{TWO}.JPEG", ", ...)"]),
    "image in another class folder": (
        lambda folder: (folder / f"val/{ONE}.JPEG").rename(folder / f"val/{C}/{ONE}.JPEG"),
        1,
        ["missing: 1 ("],
    ),
    "other bytes in the class folder": (
        put(f"val/{B}/{ONE}.JPEG", b"something else"),
        1,
        ["different bytes: 1 (", f"{B}/{ONE}.JPEG", "overwritten"],
    ),
    "class folder is a file": (put(f"val/{B}", b""), 1, [f"in the way: 1 ({B})"]),
    "class folder is a link": (
        lambda folder: (folder / "val" / B).symlink_to("../elsewhere"),
        1,
        [f"in the way: 1 ({B})", "no links"],
    ),
    "image is a folder": (replace(f"val/{ONE}.JPEG", Path.mkdir), 1, [f"1 ({ONE}.JPEG)"]),
    "image is a link": (
        replace(f"val/{ONE}.JPEG", lambda path: path.symlink_to(f"{C}/{TWO}.JPEG")),
        1,
        [f"1 ({ONE}.JPEG)", "no links"],
    ),
    "target is a folder": (
        lambda folder: (folder / f"val/{B}/{ONE}.JPEG").mkdir(parents=True),
        1,
        [f"1 ({B}/{ONE}.JPEG)"],
    ),
    "no val": (lambda folder: (folder / "val").rename(folder / "away"), 2, ["val is not a folder"]),
    "val is a file": (
        lambda folder: [(folder / "val").rename(folder / "away"), write(folder / "val", b"")],
        2,
        ["val is not a folder"],
    ),
}


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--undo"]], ids=str)
@pytest.mark.parametrize(("prepare", "code", "words"), ERRORS.values(), ids=ERRORS)
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
    assert [word for word in words if word not in captured.err] == []


@pytest.mark.parametrize("undo", [False, True])
def test_a_target_that_appears_after_the_plan_is_not_overwritten(tmp_path, undo):
    val = make(tmp_path, nested=IMAGES if undo else ())
    moves, _ = plan(IMAGES, val, undo=undo)
    assert len(moves) == 7
    write(val / moves[3][1], b"newcomer")
    with pytest.raises(LayoutError, match=r"cannot move .*File exists"):
        apply(moves, val)
    assert (val / moves[3][1]).read_bytes() == b"newcomer"
    assert sorted(x for x in contents(val).values() if x != "folder") == sorted(
        [*flat_tree().values(), b"newcomer"]
    )


def test_a_source_that_goes_after_the_plan_is_told(tmp_path):
    val = make(tmp_path)
    moves, _ = plan(IMAGES, val)
    (val / moves[3][0]).unlink()
    with pytest.raises(LayoutError, match=r"cannot move .*No such file"):
        apply(moves, val)


# --- a kill, and two runs at once --------------------------------------------------------------

# Python reports every change of the file system to an audit hook before it happens, however the
# code asks for it; here the process kills itself at the n-th one.
KILLS_ITSELF = """
import os, runpy, signal, sys

left = int(sys.argv.pop(1))
def hook(event, args):
    global left
    if event in {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link", "os.truncate"}:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.argv.pop(0)
sys.path.insert(0, os.environ["PYTHONPATH"])
main = runpy.run_path(sys.argv[0])["main"]  # imports done before the hook counts
sys.addaudithook(hook)
main(sys.argv[1:])
"""
MANY = {f"ILSVRC2012_val_{i:08d}": f"n{i % 20:08d}" for i in range(3000)}


@pytest.mark.parametrize(
    ("undo", "nth"), [(False, 7), (False, 21), (False, 1500), (False, 3020), (True, 3010)]
)
def test_kill_9_in_the_middle_loses_nothing_and_a_rerun_finishes(tmp_path, undo, nth):
    val = make(tmp_path, images=MANY, nested=MANY if undo else ())
    more = ["--undo"] if undo else []
    command = [sys.executable, "-c", KILLS_ITSELF, str(nth), str(SCRIPT), *options(tmp_path, *more)]
    killed = subprocess.run(command, env=ENV, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    files = {path: x for path, x in contents(val).items() if x != "folder"}
    assert {Path(path).name: x for path, x in files.items()} == flat_tree(MANY)
    assert len(files) == 3000
    done = sum(("/" in path) != undo for path in files)
    assert done == (3000 if undo else max(0, nth - 21))  # 20 folders first, then file by file
    assert main(options(tmp_path, *more)) == 0
    assert contents(val) == (flat_tree(MANY) if undo else sorted_tree(MANY))


def test_a_run_waits_for_another_one(tmp_path):
    val = make(tmp_path)
    before = tree(val)
    handle = os.open(val, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    process = start(tmp_path)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        assert tree(val) == before
    finally:
        os.close(handle)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert contents(val) == sorted_tree()


def test_two_runs_at_once_both_succeed(tmp_path):
    val = make(tmp_path, images=MANY)
    both = [start(tmp_path) for _ in range(2)]
    summaries = [process.communicate(timeout=60)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("moved 3000" in text for text in summaries) == [False, True]
    assert contents(val) == sorted_tree(MANY)


# --- the command line --------------------------------------------------------------------------


def test_help_shows_the_example():
    shown = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], env=ENV, capture_output=True, text=True
    )
    assert shown.returncode == 0
    assert "python scripts/imagenet.py --val_solution_path LOC_val_solution.csv" in shown.stdout
    for option in ("--val_image_dir", "--dry-run", "--undo"):
        assert option in shown.stdout


@pytest.mark.parametrize(("csv", "code"), [("solution.csv", 0), ("val", 2), ("bad.csv", 1)])
def test_exit_code_of_the_process(tmp_path, csv, code):
    make(tmp_path)
    write(tmp_path / "bad.csv", b"")
    command = [sys.executable, str(SCRIPT), "--val_solution_path", csv, "--val_image_dir", "val"]
    run = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert run.returncode == code
    assert run.stderr.startswith("error: ") == (code != 0)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--val_solution_path", "solution.csv"],
        ["--val_image_dir", "val"],
        ["--val_solution_path", "solution.csv", "--val_image_dir", "val", "--force"],
        ["--val_solution_path", "solution.csv", "--val_image", "val"],  # no abbreviations
        ["--val-solution-path", "solution.csv", "--val-image-dir", "val"],
    ],
)
def test_bad_usage_is_2(tmp_path, monkeypatch, capsys, argv):
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert tree(tmp_path) == before


# --- reading -----------------------------------------------------------------------------------


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
def test_read_solution_survives(tmp_path, text):
    write(tmp_path / "solution.csv", text.encode())
    labels = read_solution(tmp_path / "solution.csv")
    assert labels == {"a_1": "n01440764", "b-2": "n01443537"}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_read_synsets(tmp_path, start, end):
    text = f"{start}n01440764 tench, Tinca tinca{end}n03126707 crane{end}"
    write(tmp_path / "names.txt", text.encode())
    names = read_synsets(str(tmp_path / "names.txt"))
    assert names == {"n01440764": "tench, Tinca tinca", "n03126707": "crane"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "no classes"),
        (b"n01440764\n", "line 1 'n01440764'"),
        (b"n1 tench\n", "line 1 'n1 tench'"),
        (b"n01440764 tench\n\nn01440764 shark\n", "bad lines: 1 .line 3 'n01440764 shark'"),
        (b"n01440764 caf\xe9\n", "not UTF-8"),
    ],
)
def test_read_synsets_errors(tmp_path, text, words):
    write(tmp_path / "names.txt", text)
    with pytest.raises(LayoutError, match=words):
        read_synsets(tmp_path / "names.txt")


def test_read_synsets_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"names\.txt is not a file"):
        read_synsets(tmp_path / "names.txt")


# --- the layout --------------------------------------------------------------------------------


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
        "train/n1/ train/n2/ val/n2/ val/n1/y.JPEG",  # empty ones are for the loader
        "train/n1/ train/n2/ train/.git/ train/a.tar val/n1/ val/n2/ val/._a.JPEG val/a.txt",
    ],
)
def test_check_layout(tmp_path, paths):
    touch(tmp_path, paths)
    assert check_layout(str(tmp_path)) == check_layout(tmp_path) == ["n1", "n2"]


@pytest.mark.parametrize(
    ("paths", "words", "command"),
    [
        ("", ["train is missing", "train/ and val/"], False),
        ("val/n1/", ["train is missing"], False),
        ("train/n1/", ["val is missing"], False),
        ("train/n1/ val", ["val is missing"], False),
        ("train/ val/", ["are empty"], False),
        ("train/n1/ val/a.JPEG val/b.jpg", ["val is not sorted", "2 (a.JPEG, b.jpg)"], True),
        ("train/n1/ val/n1/a.JPEG val/b.JPEG", ["val is half sorted", "1 (b.JPEG)"], True),
        ("train/n1/ train/n2/ val/n1/", ["classes in train/ and not in val/: 1 (n2)"], False),
        ("train/n1/ val/n1/ val/n2/", ["classes in val/ and not in train/: 1 (n2)"], False),
        (
            "train/n1/ val/n1/ val/n5/ val/n4/ val/n3/ val/n2/",
            ["in val/ and not in train/: 4 (n2, n3, n4, ...)"],
            False,
        ),
    ],
)
def test_check_layout_errors(tmp_path, paths, words, command):
    data = tmp_path / "my data"
    touch(data, f"readme.txt {paths}")
    with pytest.raises(LayoutError) as caught:
        check_layout(data)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert [word for word in words if word not in text] == []
    assert "\n" not in text
    assert str(data) in text
    run = "python scripts/imagenet.py --val_solution_path LOC_val_solution.csv --val_image_dir"
    assert (f"{run} '{data}/val'" in text) == command


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
