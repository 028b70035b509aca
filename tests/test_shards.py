"""Packing class folders into shards, and reading shards: every image once, whatever happens.

Images are tiny and tell who they are: the red of a pixel is the image's place in the order of
paths, so what comes out of a stream is compared with the tree, never with our own reading.
"""

import errno
import fcntl
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import webdataset
from helpers import ROOT, SMALL, assert_same_run, run, small_disk
from PIL import Image
from torch.utils.data import DataLoader

from utils.data import shards
from utils.data.folders import CorruptImageError
from utils.data.packing import make_shards
from utils.data.shards import ShardError, Shards, ShardStream, expand, is_shards, open_shards
from utils.data.transforms import as_tensor
from utils.data.transforms import pixels as rgb_of
from utils.data.workers import watched
from utils.recipe import Recipe
from utils.training.loop import Trainer

SCRIPT = ROOT / "scripts" / "make_shards.py"
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
main = runpy.run_path(str(SCRIPT))["main"]

CLASSES = ["n00000000", "n00000001", "n00000002"]
COUNTS = {"train": (9, 14, 20), "val": (5, 3, 9)}  # 43 and 17 images
ODD_NAMES = ["a.b.c.JPEG", "with space.png", "caf\udce9\udcff.JPEG", "line\nbreak.jpg", "x.cls.jpg"]
BOTH = "{train-{000000..000008},val-{000000..000003}}.tar"  # 5 images per shard


def pixels(image, rng=None):
    """As a transform that changes nothing."""
    return as_tensor(rgb_of(image))


def write_tree(root, counts=COUNTS):
    """Class folders of PNG files of 4 x 4 pixels, some under odd names."""
    for split, per_class in counts.items():
        number = 0
        for name, count in zip(CLASSES, per_class, strict=True):
            names = [*ODD_NAMES, *(f"{k}.JPEG" for k in range(20))][:count]
            for k, file in enumerate(sorted(names)):
                path = root / split / name / file
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (number, k, 7)).save(path, "PNG")
                number += 1
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """The tree; read only."""
    return write_tree(tmp_path_factory.mktemp("tagged"))


@pytest.fixture(scope="session")
def packed(images, tmp_path_factory):
    """Its shards, 9 and 4, the last ones of 3 and 2 images; read only."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(images, folder, images_per_shard=5, seed=1)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def members(path):
    with tarfile.open(path) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar.getmembers()]


def split_of(folder, split, seed=0):
    return Shards(expand(f"{folder}/{BOTH}")[split], pixels, seed)


def loader_of(stream, workers=0):
    return DataLoader(stream, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def tags(batches):
    return [batch.images[:, 0, 0, 0].tolist() for batch in batches]


def flat(batches):
    return [tag for batch in batches for tag in batch]


def passes(stream, workers, epoch=0, first_step=0):
    """Tags of each batch, with workers played one after another as a loader asks them."""
    stream.begin(epoch, first_step)
    lanes = []
    for worker in range(workers):
        info = SimpleNamespace(id=worker, num_workers=workers)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "get_worker_info", lambda info=info: info)
            lanes.append(iter(tags(watched(loader_of(stream, 0)))))
    return list(in_turn(lanes))


def in_turn(lanes):
    while lanes:
        for lane in list(lanes):
            try:
                yield next(lane)
            except StopIteration:
                lanes.remove(lane)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(shards, "rank", lambda: rank)
    monkeypatch.setattr(shards, "world_size", lambda: world)


# ---- packing -----------------------------------------------------------------------------------


def test_shards_hold_every_file_byte_for_byte_under_its_name(images, packed):
    for split, counts in COUNTS.items():
        found, keys, sizes = {}, [], []
        for path in sorted(packed.glob(f"{split}-*.tar")):
            (first, index), *rest = members(path)
            assert first.name == "__meta__/index.json"
            assert json.loads(index)["split"] == split
            sizes.append(len(rest) // 3)
            for (c, label), (j, content), (p, name) in zip(*[iter(rest)] * 3, strict=True):
                key = c.name.removesuffix(".cls")
                assert (j.name, p.name) == (f"{key}.jpg", f"{key}.path")
                keys.append(key)
                found[os.fsdecode(name)] = content
                assert CLASSES[int(label)] == os.fsdecode(name).split("/")[0]
        assert keys == [f"{i:09d}" for i in range(sum(counts))]
        tree = {str(f.relative_to(images / split)): f for f in images.glob(f"{split}/*/*")}
        assert found == {name: file.read_bytes() for name, file in tree.items()}
        assert json.loads(index)["counts"] == sizes
        assert sizes == [5] * (sum(counts) // 5) + [sum(counts) % 5]


def test_training_images_are_mixed_and_validation_is_in_order(packed):
    train = split_of(packed, "train")
    labels = [each.label for each in train.read(range(9), 0, 43)]
    assert [len(set(labels[i : i + 5])) > 1 for i in range(0, 40, 5)].count(True) >= 6
    val = split_of(packed, "val")
    labels = [each.label for each in val.read(range(4), 0, 17)]
    assert labels == sorted(labels)
    assert (train.classes, len(train), len(val)) == (CLASSES, 43, 17)
    assert val.path(16) == f"{packed}/val-000003.tar: 000000016"
    assert train.path(4).endswith("train-000000.tar: 000000004")


def test_same_tree_and_options_give_the_same_bytes(images, packed, tmp_path):
    copied = shutil.copytree(images, tmp_path / "copy", copy_function=shutil.copyfile)
    make_shards(copied, tmp_path / "again", images_per_shard=5, seed=1)
    assert files_of(tmp_path / "again") == files_of(packed)
    make_shards(copied, tmp_path / "other", images_per_shard=5, seed=2)
    first = "train-000000.tar"
    assert files_of(tmp_path / "other")[first] != files_of(packed)[first]


def test_other_programs_read_shards_and_checksums(images, packed):
    urls = [str(path) for path in sorted(packed.glob("train-*.tar"))]
    read = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "cls", "path")
    found = {os.fsdecode(path): (content, CLASSES[int(label)]) for content, label, path in read}
    assert len(found) == 43
    for name, (content, label) in found.items():
        assert content == (images / "train" / name).read_bytes()
        assert name.startswith(label)
    listed = subprocess.run(["tar", "tf", urls[8]], capture_output=True, text=True, check=True)
    assert listed.stdout.split()[:3] == ["__meta__/index.json", "000000040.cls", "000000040.jpg"]
    assert len(listed.stdout.split()) == 1 + 3 * 3
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    told = subprocess.run(check, cwd=packed, capture_output=True, text=True, check=True)
    assert told.stdout.count(": OK\n") == 13


def test_a_second_run_writes_nothing_and_damage_is_mended(images, packed, tmp_path, capsys):
    copied = shutil.copytree(packed, tmp_path / "out")
    options = ["--data-dir", str(images), "--output-dir", str(copied)]
    options += ["--images-per-shard", "5", "--seed", "1"]
    (copied / "backup.tar").write_bytes(b"not ours")
    before = {path: path.stat().st_ino for path in copied.iterdir()}
    assert main(options) == 0
    assert "13 shards of 60 images: packed 0, 13 were there already" in capsys.readouterr().out
    assert {path: path.stat().st_ino for path in copied.iterdir()} == before

    verify = ["--verify", "--output-dir", str(copied)]
    assert main(verify) == 0
    assert "13 shards of 60 images: all as they were made" in capsys.readouterr().out
    flip(copied / "val-000002.tar", -2000)
    (copied / "train-000003.tar").write_bytes(b"")  # not even its index is left
    for damaged in ("train-000003.tar", "val-000002.tar"):
        assert main(verify) == 1
        assert damaged in capsys.readouterr().err
        (copied / "train-000003.tar").write_bytes((packed / "train-000003.tar").read_bytes())
    (copied / "train-000003.tar").write_bytes(b"")
    assert main(options) == 0
    assert "checksum was wrong: 2 (train-000003.tar, val-000002.tar)" in capsys.readouterr().out
    assert files_of(copied) == files_of(packed) | {"backup.tar": b"not ours"}
    (copied / "train-000004.tar").unlink()
    assert main(verify) == 1
    assert "train-000004.tar: missing" in capsys.readouterr().err


def flip(path, place, mask=0xFF):
    content = bytearray(path.read_bytes())
    content[place] ^= mask
    path.write_bytes(content)


def command(images, out, *more):
    options = ["--images-per-shard", "5", "--seed", "1", *more]
    return ["--data-dir", str(images), "--output-dir", str(out), *options]


def forked(options, prepare=lambda: None):
    """Number of a process that runs the script, without the seconds that imports would take."""
    if pid := os.fork():
        return pid
    try:
        prepare()
        os._exit(main(options))
    finally:
        os._exit(99)


def kill_at(nth, *folders):
    """Kills this process at the n-th opening or renaming of a file in these folders.

    Python reports each to an audit hook before it happens: in the middle of a shard, or between two
    renamings.
    """
    left = nth

    def hook(event, args):
        nonlocal left
        if event in ("open", "os.rename") and str(args[0]).startswith(folders):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


@pytest.mark.parametrize("nth", [2, 5, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 90, 120])
def test_kill_9_and_a_rerun_give_the_bytes_of_one_run(images, packed, tmp_path, nth):
    out = tmp_path / "out"
    pid = forked(command(images, out), kill_at(nth, str(images), str(out)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    left = files_of(out)
    whole = {name: content for name, content in left.items() if name.endswith(".tar")}
    assert whole.items() <= files_of(packed).items()  # nothing half made under a shard's name
    inodes = {name: (out / name).stat().st_ino for name in whole}
    assert main(command(images, out)) == 0
    assert files_of(out) == files_of(packed)
    assert {name: (out / name).stat().st_ino for name in whole} == inodes


def test_a_full_disk_is_named_and_packing_goes_on_where_there_is_room(
    images, packed, tmp_path, capsys
):
    out = tmp_path / "disk"
    with small_disk(out, "100k"):  # for four of 13 shards
        for _ in range(2):  # what it could not write takes no room
            assert main(command(images, out)) == 1
            told = capsys.readouterr().err.strip().splitlines()[-1]
            name = "train-000004.tar"
            assert told == f"error: {out / name}: cannot be written (No space left on device)"
            left = files_of(out)
            assert left.keys() == {"SHA256SUMS", *(f"train-00000{k}.tar" for k in range(4))}
        subprocess.run(["mount", "-o", "remount,size=1m", out], check=True)
        inodes = {name: (out / name).stat().st_ino for name in left if name.endswith(".tar")}
        assert main(command(images, out)) == 0
        assert files_of(out) == files_of(packed)
        assert {name: (out / name).stat().st_ino for name in inodes} == inodes


def test_an_image_that_its_disk_cannot_give_is_named(images, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    assert main(command(images, tmp_path / "out")) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(f"error: {images}/train/n0000000")
    assert told.endswith(": Input/output error")
    assert files_of(tmp_path / "out") == {}


def test_two_runs_at_once_both_succeed(images, packed, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    handle = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    fcntl.flock(handle, fcntl.LOCK_EX)
    both = [forked(command(images, out), lambda: os.close(handle)) for _ in range(2)]
    time.sleep(0.5)
    assert [os.waitpid(pid, os.WNOHANG) for pid in both] == [(0, 0), (0, 0)]
    assert files_of(out) == {}  # they wait
    os.close(handle)
    assert [os.waitpid(pid, 0)[1] for pid in both] == [0, 0]
    assert files_of(out) == files_of(packed)


def more_images(tree):
    Image.new("RGB", (4, 4)).save(tree / "train" / CLASSES[0] / "new.png")


def more_classes(tree):
    for split in COUNTS:
        shutil.copytree(tree / split / CLASSES[0], tree / split / "n00000003")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (None, ["--seed", "2"], "train-000000.tar: it was made with --seed 1, not 2"),
        (None, ["--images-per-shard", "43"], "made with --images-per-shard 5, not 43"),
        (more_images, [], "it was made from a tree with other files"),
        (more_classes, [], "its classes differ: 1 (n00000003)"),
    ],
)
def test_shards_of_another_run_are_not_touched(
    images, packed, tmp_path, capsys, change, options, words
):
    tree, out = shutil.copytree(images, tmp_path / "in"), shutil.copytree(packed, tmp_path / "out")
    if change:
        change(tree)
    before = files_of(out)
    assert main(command(tree, out, *options)) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"error: {out}/")
    assert words in told
    assert "another --output-dir" in told
    assert files_of(out) == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--data-dir", "in"], 2, "--output-dir"),
        (["--output-dir", "out"], 2, "--data-dir --verify is required"),
        (["--data-dir", "in", "--verify", "--output-dir", "out"], 2, "not allowed with"),
        (["--data-dir", "in", "--output-dir", "out", "--images-per-shard", "0"], 2, "at least 1"),
        (["--data-dir", "in", "--output-dir", "out", "--seed", "-1"], 2, "at least 0"),
        (["--data-dir", "in", "--output-dir", "out", "--images", "5"], 2, "--images"),
        (["--data-dir", "nowhere", "--output-dir", "out"], 2, "error: nowhere is not a folder"),
        (["--data-dir", "in", "--output-dir", "a file"], 2, "a file"),
        (["--verify", "--output-dir", "nowhere"], 2, "error: nowhere is not a folder"),
        (["--verify", "--output-dir", "in"], 1, "error: in/SHA256SUMS: names no train"),
        (["--data-dir", "flat", "--output-dir", "out"], 1, "flat/val is half sorted"),
        (["--data-dir", "empty", "--output-dir", "out"], 1, "no image in this class folder"),
        (["--data-dir", "in", "--output-dir", "sums"], 1, "SHA256SUMS: line 2 is not a checksum"),
    ],
)
def test_bad_options_and_folders(tmp_path, monkeypatch, capsys, options, code, words):
    monkeypatch.chdir(tmp_path)
    few = {"train": (1, 1, 1), "val": (1, 1, 1)}
    for name in ("in", "flat", "empty"):
        write_tree(tmp_path / name, few)
    (tmp_path / "a file").write_bytes(b"")
    shutil.copy("in/val/n00000000/a.b.c.JPEG", "flat/val")
    Path("empty/val/n00000002/a.b.c.JPEG").unlink()
    Path("sums").mkdir()
    Path("sums/SHA256SUMS").write_text(f"{'0' * 64}  train-000000.tar\n??\n")
    try:
        found = main(options)
    except SystemExit as stopped:
        found = stopped.code
    assert found == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*.tar"))


@pytest.mark.parametrize(("data_dir", "code"), [("in", 0), ("nowhere", 2)])
def test_exit_code_of_the_process(tmp_path, data_dir, code):
    write_tree(tmp_path / "in", {"train": (1, 1, 1), "val": (1, 1, 1)})
    (tmp_path / "out").mkdir()
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--data-dir", data_dir, "--output-dir", "out"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert run.returncode == code
    if code:
        assert run.stderr.startswith("error: ")
        assert run.stderr.count("\n") == 1


# ---- every image once --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_gives_every_image_once(packed, monkeypatch, world, workers):
    found = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        stream = ShardStream(split_of(packed, "val"), 6, train=False)
        batches = tags(watched(loader_of(stream, workers)))
        assert len(batches) == len(stream)
        assert max(map(len, batches)) <= 6 // world
        found += flat(batches)
    assert sorted(found) == list(range(17))
    assert workers > 1 or found == list(range(17))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_gives_every_image_of_whole_batches_once(packed, monkeypatch, world, workers):
    """43 images are 7 global batches of 6; the one that is left out changes with the epoch."""
    found, loaders = set(), []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        loaders.append(loader_of(ShardStream(split_of(packed, "train"), 6, True), workers))
    for epoch in range(4):
        seen = []
        for loader in loaders:
            loader.dataset.begin(epoch)
            batches = tags(watched(loader))
            assert (
                [len(batch) for batch in batches] == [6 // world] * 7 == [6 // world] * len(loader)
            )
            seen += flat(batches)
        assert len(set(seen)) == len(seen) == 42
        found |= set(seen)
    assert found == set(range(43))


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (4, 4), (5, 5), (10, 2), (40, 4)])
def test_splits_that_do_not_come_out_even(packed, monkeypatch, batch_size, world, workers):
    """More workers than batches, parts that end inside of shards, processes without an image."""
    train, val = split_of(packed, "train"), split_of(packed, "val")
    seen, evaluated, lengths = [], [], set()
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        batches = passes(ShardStream(train, batch_size, True), workers)
        lengths.add(len(batches))
        seen += flat(batches)
        evaluated += flat(passes(ShardStream(val, batch_size, False), workers))
    assert lengths == {43 // batch_size}
    assert len(set(seen)) == len(seen) == 43 // batch_size * batch_size
    assert sorted(evaluated) == list(range(17))


def test_more_processes_than_images_evaluate(packed, monkeypatch):
    found = []
    for rank in range(20):
        as_rank(monkeypatch, rank, 20)
        stream = ShardStream(split_of(packed, "val"), 20, train=False)
        batches = passes(stream, 2)
        assert len(batches) == len(stream) <= 1
        found += flat(batches)
    assert found == list(range(17))


def test_real_loaders_ask_workers_in_the_order_that_is_assumed(packed):
    """What the faster tests here play by hand, with workers that outlive their epochs."""
    for workers in (0, 1, 2, 3):
        stream = ShardStream(split_of(packed, "train"), 4, True)
        loader = loader_of(stream, workers)
        for epoch, first_step in ((0, 0), (1, 3), (2, 0), (1, 9), (1, 10)):
            expected = passes(stream, max(1, workers), epoch, first_step)
            assert tags(watched(loader)) == expected
            assert len(expected) == 10 - first_step


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_a_resumed_epoch_is_the_tail_of_the_whole_one(packed, workers):
    stream = ShardStream(split_of(packed, "train"), 4, True)
    whole = passes(stream, workers, epoch=2)
    for first_step in range(11):
        assert passes(stream, workers, 2, first_step) == whole[first_step:]


def test_order_depends_on_seed_and_epoch(packed):
    stream = ShardStream(split_of(packed, "train", seed=3), 4, True)
    first, again, second = (passes(stream, 2, epoch) for epoch in (0, 0, 1))
    assert first == again != second
    other = ShardStream(split_of(packed, "train", seed=4), 4, True)
    assert passes(other, 2) != first
    shard_by_shard = flat(first)
    assert shard_by_shard != flat(passes(stream, 1))


def test_an_image_is_augmented_alike_by_any_worker(packed):
    """Its random numbers depend on (seed, epoch, index) alone, and the global ones stay."""

    def noisy(image, rng):
        return pixels(image) + 128 * rng.randrange(2)

    found = []
    for workers, epoch in ((0, 0), (2, 0), (3, 0), (0, 1)):
        train = split_of(packed, "train")
        train.transform = noisy
        stream = ShardStream(train, 43, True)
        stream.begin(epoch)
        torch.manual_seed(0)
        batches = list(loader_of(stream, workers))
        images = torch.cat([batch.images for batch in batches])
        found.append(images[(images[:, 0, 0, 0] % 128).argsort()])
        assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_a_batch_larger_than_the_data_or_uneven_is_refused(packed, monkeypatch):
    train = split_of(packed, "train")
    with pytest.raises(ValueError, match="batch_size=44 is more than the 43 training images"):
        ShardStream(train, 44, True)
    as_rank(monkeypatch, 0, 3)
    with pytest.raises(ValueError, match="batch_size=7 must divide by 3 processes"):
        ShardStream(train, 7, True)


def test_only_the_shards_of_a_part_are_opened(packed, monkeypatch):
    opened = []
    gopen = shards._open
    monkeypatch.setattr(shards, "_open", lambda url: opened.append(url[-10:-4]) or gopen(url))
    train, _, classes = open_shards(f"{packed}/{BOTH}", Recipe())
    assert (classes, opened) == (CLASSES, ["000000", "000000"])
    opened.clear()
    keys = [each.index for each in train.read([7, 2, 5], 6, 8)]
    assert (keys, opened) == ([11, 12], ["000002"])


# ---- pipes and patterns ------------------------------------------------------------------------


def test_piped_shards_are_the_same(packed, monkeypatch):
    monkeypatch.chdir(packed.parent)
    piped = open_shards(f"pipe:cat {shlex.quote(packed.name)}/{BOTH}", Recipe())
    local = open_shards(f"{packed}/{BOTH}", Recipe())
    for one, other in zip(piped[:2], local[:2], strict=True):
        one.transform = other.transform = pixels
        for workers in (0, 2):
            batches = [
                tags(watched(loader_of(ShardStream(s, 6, True), workers))) for s in (one, other)
            ]
            assert batches[0] == batches[1]
    assert piped[0].path(12) == f"pipe:cat {packed.name}/train-000002.tar: 000000012"


def test_part_of_a_pipe_that_writes_more_than_a_pipe_holds(tmp_path):
    """A command that is cut off in the middle of its shard ends in an error, which is none."""
    write_tree(tmp_path / "in", {"train": (1, 1, 2), "val": (1, 1, 1)})
    for path in tmp_path.glob("in/train/*/*"):
        path.write_bytes(path.read_bytes() + bytes(1 << 20))
    make_shards(tmp_path / "in", tmp_path / "out")
    train = Shards([f"pipe:cat {shlex.quote(str(tmp_path))}/out/train-000000.tar"], pixels)
    assert [each.index for each in train.read([0], 0, 1)] == [0]
    assert [each.index for each in train.read([0], 1, 3)] == [1, 2]
    assert [each.index for each in train.read([0], 0, 4)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("data_dir", "expected"),
    [
        ("shards/{train,val}-{000000..000009}.tar", True),
        ("pipe:cat all.tar", True),
        ("http://host/{train-000000,val-000000}.tar", True),
        ("shards/{train", True),
        ("ILSVRC/Data/CLS-LOC", False),
        ("a {folder}", False),
    ],
)
def test_is_shards(tmp_path, monkeypatch, data_dir, expected):
    monkeypatch.chdir(tmp_path)
    Path("a {folder}").mkdir()
    assert is_shards(data_dir) == expected


@pytest.mark.parametrize(
    ("pattern", "train", "val"),
    [
        (
            "s/{train-{000000..000002},val-000000}.tar",
            [f"s/train-00000{i}.tar" for i in range(3)],
            ["s/val-000000.tar"],
        ),
        (
            "pipe:cat val-set/{train,val}-{1..0}.tar | gunzip",
            [f"pipe:cat val-set/train-{i}.tar | gunzip" for i in range(2)],
            [f"pipe:cat val-set/val-{i}.tar | gunzip" for i in range(2)],
        ),
        (
            "http://h/train-9.tar/{imagenet-train-{8..11},b/val-0}.tar",
            [f"http://h/train-9.tar/imagenet-train-{i}.tar" for i in range(8, 12)],
            ["http://h/train-9.tar/b/val-0.tar"],
        ),
    ],
)
def test_expand(pattern, train, val):
    assert expand(pattern) == {"train": train, "val": val}


# ---- what is wrong is one line -----------------------------------------------------------------


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, at):
    return lambda folder: os.truncate(folder / name, at)


def rewrite(name, change):
    """Packs the members of a shard again after `change` of the list of [name, content]."""

    def prepare(folder):
        found = [[m.name, content] for m, content in members(folder / name)]
        change(found)
        with tarfile.open(folder / name, "w") as tar:
            for member, content in found:
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return prepare


def of_another_set(name, **options):
    def prepare(folder):
        write_tree(folder / "in", options.pop("counts", COUNTS))
        make_shards(folder / "in", folder / "other", **{"images_per_shard": 5, "seed": 1} | options)
        (folder / "other" / name).replace(folder / name)

    return prepare


def index_with(**changes):
    def change(found):
        found[0][1] = json.dumps(json.loads(found[0][1]) | changes).encode()

    return change


def set_part(place, value):
    def change(found):
        found[place] = value if isinstance(value, list) else [found[place][0], value]

    return change


THREE = "train-000003.tar"
FIRST = "train-000000.tar"
ERRORS = {
    "a brace is open": ("{train-{000000..000008}", None, ["brace is not closed", "shards/{train"]),
    "not shards": ("{a,b}.tar", None, ["a.tar: names no shard", "train-000000.tar"]),
    "one not a shard": ("{train-000000,val-000000,extra}.tar", None, ["extra.tar: names no shard"]),
    "no val": ("train-{000000..000008}.tar", None, ["no val shard", "name both splits"]),
    "no train": ("val-{000000..000003}.tar", None, ["no train shard"]),
    "twice": ("{train-000000,train-000000,val-000000}.tar", None, ["train shard 0 is named twice"]),
    "7 of 9": (
        "{train-{000000..000006},val-{000000..000003}}.tar",
        None,
        [f"{FIRST}: one of 9 train shards, not of 7", "2 (7, 8)"],
    ),
    "10 of 9": (
        "{train-{000000..000009},val-{000000..000003}}.tar",
        None,
        ["one of 9 train shards, not of 10", "1 (9)"],
    ),
    "first missing": (BOTH, lambda f: (f / FIRST).unlink(), [f"{FIRST}: cannot be", "No such"]),
    "another missing": (BOTH, lambda f: (f / THREE).unlink(), [f"{THREE}: cannot be", "No such"]),
    "a folder": (
        BOTH,
        lambda f: [(f / THREE).unlink(), (f / THREE).mkdir()],
        [f"{THREE}: cannot be opened: Is a directory"],
    ),
    "empty": (BOTH, put(THREE, b""), [f"{THREE}: not a whole tar file: empty file"]),
    "not a tar": (BOTH, put(FIRST, b"<html>" * 999), [f"{FIRST}: not a whole tar file"]),
    "another tar": (
        BOTH,
        rewrite(THREE, lambda found: found.pop(0)),
        [f"{THREE}: not a shard of scripts/make_shards.py"],
    ),
    "index broken": (BOTH, rewrite(THREE, set_part(0, b"{")), [f"{THREE}: __meta__/index.json"]),
    "index a list": (BOTH, rewrite(FIRST, set_part(0, b"[]")), [f"{FIRST}: __meta__/index.json"]),
    "of the future": (BOTH, rewrite(FIRST, index_with(format=2)), ["has format 2, not 1"]),
    "renamed": (
        BOTH,
        lambda f: shutil.copy(f / "train-000004.tar", f / THREE),
        [f"{THREE}: not of one set with", "holds train shard 4, not train shard 3"],
    ),
    "val as train": (
        BOTH,
        lambda f: shutil.copy(f / "val-000000.tar", f / FIRST),
        [f"{FIRST}: one of 4 val shards, not of 9"],
    ),
    "another order": (BOTH, of_another_set(THREE, seed=2), [f"{THREE}: not of", "--seed 2, not 1"]),
    "another size": (
        BOTH,
        of_another_set(THREE, images_per_shard=7),
        [f"{THREE}: not of one set with", "--images-per-shard 7, not 5"],
    ),
    "another tree": (
        BOTH,
        of_another_set("val-000000.tar", counts={"train": (9, 14, 20), "val": (5, 4, 8)}),
        ["val-000000.tar: not of one set with", FIRST, "tree with other files"],
    ),
    "cut in an image": (BOTH, cut(THREE, 5660), [f"{THREE}: not a whole tar file: unexpected end"]),
    "cut in a header": (BOTH, cut(THREE, 5220), [f"{THREE}: image 000000016 is missing"]),
    "cut between images": (BOTH, cut(THREE, 4096), [f"{THREE}: image 000000016 is missing"]),
    "images missing": (
        BOTH,
        rewrite(THREE, lambda found: found.__delitem__(slice(-6, None))),
        [f"{THREE}: image 000000018 is missing", "5 images"],
    ),
    "an image too many": (
        BOTH,
        rewrite(THREE, lambda found: found.append(["000000020.cls", b"0"])),
        [f"{THREE}: holds more than the images of its index"],
    ),
    "no number": (BOTH, rewrite(THREE, set_part(4, b"x")), ["000000016: b'x' is no label"]),
    "a class too many": (BOTH, rewrite(THREE, set_part(4, b"3")), ["000000016: b'3' is no label"]),
    "pipe fails": (f"pipe:false {BOTH}", None, [f"pipe:false {FIRST}: its command ended", "1"]),
    "no such command": (f"pipe:nowhere-to-be-found {BOTH}", None, ["exit status 127"]),
    "unknown protocol": (f"gopher://host/{BOTH}", None, ["gopher://host/train-000000.tar: cannot"]),
}


@pytest.mark.parametrize(("pattern", "prepare", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(packed, tmp_path, monkeypatch, pattern, prepare, words):
    folder = shutil.copytree(packed, tmp_path / "shards")
    monkeypatch.chdir(folder)
    if prepare:
        prepare(folder)
    with pytest.raises(ShardError) as caught:  # noqa: PT012
        train, val, _ = open_shards(pattern, Recipe())
        train.transform = val.transform = pixels
        for split in (train, val):
            list(watched(loader_of(ShardStream(split, 1, True), 0)))
    text = str(caught.value)
    assert "\n" not in text
    assert "<_io" not in text
    assert [word for word in words if word not in text] == []


def test_a_pipe_that_fails_after_its_last_byte(packed):
    """The bytes are all there, but the command says that something was wrong."""
    url = f"pipe:cat {shlex.quote(str(packed))}/train-000000.tar; exit 3"
    others = expand(f"{packed}/{BOTH}")["train"][1:]
    # A command may end before its few bytes are read, and then its status is seen at once.
    with pytest.raises(ShardError, match=r"train-000000.tar; exit 3: .* exit status 3"):
        list(Shards([url, *others], pixels).read([0], 0, 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_a_worker_is_one_line(packed, tmp_path, workers):
    folder = shutil.copytree(packed, tmp_path / "shards")
    cut(THREE, 5660)(folder)
    loader = loader_of(ShardStream(split_of(folder, "train"), 4, True), workers)
    with pytest.raises(ShardError) as caught:
        list(watched(loader))
    assert str(caught.value) == f"{folder}/{THREE}: not a whole tar file: unexpected end of data"


def test_unreadable_images_are_set_apart(images, tmp_path):
    tree = shutil.copytree(images, tmp_path / "in")
    broken = tree / "val" / CLASSES[1] / ODD_NAMES[2]
    broken.write_bytes(broken.read_bytes()[:40])
    (tree / "val" / CLASSES[1] / "a.b.c.JPEG").write_bytes(b"no image")
    make_shards(tree, tmp_path / "out", images_per_shard=5, seed=1)
    stream = ShardStream(split_of(tmp_path / "out", "val"), 6, train=False)
    batches = list(watched(loader_of(stream, workers=1)))
    errors = [error for batch in batches for error in batch.corrupt]
    assert all(isinstance(error, CorruptImageError) for error in errors)
    place = f"{tmp_path}/out/val-000001.tar: 00000000"
    assert sorted(map(str, errors))[0].startswith(f"{place}5 (n00000001/a.b.c.JPEG): not a")
    assert sorted(map(str, errors))[1].startswith(f"{place}6 (n00000001/caf\\udce9\\udcff.JPEG)")
    assert [len(batch.labels) for batch in batches] == [5, 5, 5]
    assert sorted(flat(tags(batches))) == [i for i in range(17) if i not in (5, 6)]


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_damage_anywhere_is_an_error_or_an_unreadable_image(packed, tmp_path, mask):
    """At many places of a shard: never another exception, nor an image lost in silence."""
    folder = shutil.copytree(packed, tmp_path / "shards")
    train, path = split_of(folder, "train"), folder / THREE
    whole = path.read_bytes()
    bad = []
    for place in range(0, len(whole), 67):
        flip(path, place, mask)
        try:
            found = [train.decode(each, 0) for each in train.read([3], 0, 5)]
            fine = len(found) == 5
        except ShardError as error:
            fine = THREE in str(error) and "\n" not in str(error)
        bad += [] if fine else [place]
        path.write_bytes(whole)
    assert bad == []


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pattern(folders, tmp_path_factory):
    """A pattern of five train and three val shards of the fixture `folders`."""
    root = tmp_path_factory.mktemp("shards")
    make_shards(folders, root, images_per_shard=10)
    return str(root / "{train-{000000..000004},val-{000000..000001}}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_shards_goes_on_after_a_stop_in_the_same_bits(
    pattern, tmp_path, monkeypatch, workers
):
    args = ["--data-dir", pattern, *SMALL, "--workers", workers, "--output-dir"]
    assert run("train.py", *args, tmp_path / "whole") == 0
    train_step = Trainer.train_step

    def stop(self, batch):
        if self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", stop)
    assert run("train.py", *args, tmp_path / "parts") == 75
    monkeypatch.setattr(Trainer, "train_step", train_step)
    assert run("train.py", *args, tmp_path / "parts", "--workers", 3) == 1  # another order
    assert run("train.py", *args, tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_evaluation_is_the_same_from_shards_and_folders(pattern, folders, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert run("train.py", "--data-dir", pattern, *SMALL, "--output-dir", run_dir) == 0
    capsys.readouterr()
    for source in (pattern, folders, f"pipe:cat {pattern}"):
        checkpoint = ["--checkpoint", run_dir / "last.pt", "--workers", 0]
        assert run("evaluate.py", *checkpoint, "--data-dir", source) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:4] == lines[4:]
    assert "(18 images)" in lines[0]


def test_a_broken_shard_ends_training_in_one_line(pattern, tmp_path, capsys):
    for path in expand(pattern)["train"] + expand(pattern)["val"]:
        shutil.copy(path, tmp_path)
    broken = tmp_path / "train-000003.tar"
    broken.write_bytes(broken.read_bytes()[:5000])
    here = tmp_path / Path(pattern).name
    args = ["--data-dir", here, *SMALL, "--output-dir", tmp_path / "run", "--skip-corrupt"]
    for workers in (0, 1):
        assert run("train.py", *args, "--workers", workers) == 1
        told = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(told) == 1
        assert told[0].startswith(f"error: {broken}: ")
