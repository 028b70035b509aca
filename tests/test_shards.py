"""Packing class folders into shards, and loading them: every image once, whatever happens.

Images are tiny and carry their number: the red of a pixel is the image's place in the order of
paths, so what a loader gives is compared with the folders, never with our own reading.
"""

import itertools
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import webdataset
from helpers import ROOT, SMALL, assert_same_run, run
from PIL import Image

from utils.cli import DataError
from utils.data import shards
from utils.data.folders import load_batch, make_loader, readable
from utils.data.shards import ShardBatches, make_shards, open_shards
from utils.data.transforms import as_tensor, pixels
from utils.recipe import Recipe
from utils.training.checkpoint import load_trained
from utils.training.evaluation import evaluate_trained
from utils.training.loop import Trainer

main = runpy.run_path(str(ROOT / "scripts" / "make_shards.py"))["main"]
CLASSES = ["n00000000", "n00000001", "n00000002"]
COUNTS = {"train": (9, 14, 20), "val": (5, 3, 9)}  # 43 and 17 images
ODD_NAMES = ["a.b.c.JPEG", "with space.png", "caf\udce9\udcff.JPEG", "line\nbreak.jpg", "x.cls.jpg"]
BOTH = "{train-{000000..000008},val-{000000..000003}}.tar"  # 5 images per shard
FIRST, THREE, VAL = "train-000000.tar", "train-000003.tar", "val-000000.tar"


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Class folders of PNG files of 4 x 4 pixels, some under odd names; read only."""
    root = tmp_path_factory.mktemp("tagged")
    for split, counts in COUNTS.items():
        numbers = itertools.count()
        for name, count in zip(CLASSES, counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for file in sorted([*ODD_NAMES, *(f"{k}.JPEG" for k in range(20))][:count]):
                image = Image.new("RGB", (4, 4), (next(numbers), 0, 7))
                image.save(root / split / name / file, "PNG")
    return root


@pytest.fixture(scope="session")
def packed(images, tmp_path_factory):
    """Its shards, 9 and 4, the last ones of 3 and 2 images; read only."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(images, folder, images_per_shard=5, seed=1)
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of the shards, to be damaged."""
    return shutil.copytree(packed, tmp_path / "copied")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def keep(image, rng=None):
    """A transform that changes nothing."""
    return as_tensor(pixels(image))


def opened(pattern, seed=0):
    data = open_shards(pattern, Recipe(), seed)
    data.train.transform = data.val.transform = keep
    return data.train, data.val


def tags(batches):
    """Number of each image of each batch; raises what comes in place of a batch."""
    return [batch.images[:, 0, 0, 0].tolist() for batch in readable(batches, True, {})]


def flat(batches):
    return [tag for batch in batches for tag in batch]


def played(batches, workers):
    """The same, with workers played one after another, in the order in which a loader asks them."""
    parts = []
    for worker in range(workers):
        with pytest.MonkeyPatch.context() as patch:
            info = SimpleNamespace(id=worker, num_workers=workers)
            patch.setattr(shards, "get_worker_info", lambda info=info: info)
            parts.append(tags(batches))
    return [batch for row in itertools.zip_longest(*parts) for batch in row if batch is not None]


def test_other_programs_read_every_file_and_the_checksums(images, packed):
    for split, counts in COUNTS.items():
        urls = [str(path) for path in sorted(packed.glob(f"{split}-*.tar"))]
        found = list(webdataset.WebDataset(urls, shardshuffle=False))
        assert [sample["__key__"] for sample in found] == [f"{i:09d}" for i in range(sum(counts))]
        contents = {os.fsdecode(sample["path"]): sample["jpg"] for sample in found}
        assert contents == {
            str(file.relative_to(images / split)): file.read_bytes()
            for file in images.glob(f"{split}/*/*")
        }
        labels = [int(sample["cls"]) for sample in found]
        assert labels == [CLASSES.index(name.split("/")[0]) for name in contents]
        assert (labels == sorted(labels)) == (split == "val")  # training images are shuffled
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=packed, capture_output=True).stdout.count(b": OK\n") == 13


def command(images, out, *more):
    options = ["--images-per-shard", "5", "--seed", "1", *more]
    return ["--data-dir", str(images), "--output-dir", str(out), *options]


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


def test_a_second_run_packs_damaged_shards_only(images, packed, copied, capsys):
    (copied / THREE).write_bytes(b"")  # not even its index is left
    (copied / FIRST).unlink()
    flip(copied / VAL, -2000)
    assert main(command(images, copied)) == 0
    assert "13 shards: packed 3, 10 were there already" in capsys.readouterr().out
    assert files_of(copied) == files_of(packed)


def kill_at(nth, *folders):
    """Kills this process at the n-th opening or renaming of a file in these folders."""
    count = itertools.count(1)

    def hook(event, args):  # Python calls it before it opens or renames
        is_ours = event in ("open", "os.rename") and str(args[0]).startswith(folders)
        if is_ours and next(count) == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("nth", [12, 14, 15, 16, 60])
def test_kill_9_and_a_rerun_give_the_bytes_of_one_run(images, packed, tmp_path, nth):
    out = tmp_path / "out"
    if not (pid := os.fork()):
        kill_at(nth, str(images), str(out))
        os._exit(main(command(images, out)))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    complete = {name: data for name, data in files_of(out).items() if name.endswith(".tar")}
    assert complete.items() <= files_of(packed).items()  # no partial file under a shard's name
    before = {name: (out / name).stat().st_mtime_ns for name in complete}
    assert main(command(images, out)) == 0
    assert files_of(out) == files_of(packed)
    assert {name: (out / name).stat().st_mtime_ns for name in complete} == before


@pytest.mark.parametrize("options", [["--seed", "2"], ["--images-per-shard", "43"], []])
def test_shards_of_another_run_are_not_touched(images, copied, tmp_path, capsys, options):
    tree, before = shutil.copytree(images, tmp_path / "in"), files_of(copied)
    if not options:
        Image.new("RGB", (4, 4)).save(tree / "train" / CLASSES[0] / "new.png")
    assert main(command(tree, copied, *options)) == 1
    assert f"error: {copied}/{FIRST}: of other files or options" in capsys.readouterr().err
    assert files_of(copied) == before


@pytest.mark.parametrize(("workers", "method"), [(0, None), (3, "fork"), (1, "forkserver")])
def test_a_loader_gives_every_image_once(packed, workers, method):
    """43 images are 7 batches of 6; the one that is left out changes with the epoch."""
    train, val = opened(packed / BOTH)
    train, val = ShardBatches(train, 6, True), ShardBatches(val, 6, False)
    loader, found = make_loader(train, None, workers), set()
    loader.multiprocessing_context = method
    for epoch, first_step in ((0, 0), (1, 0), (2, 3)):
        train.begin(epoch, first_step)
        seen = tags(loader)
        assert seen == played(train, max(1, workers))
        assert [len(batch) for batch in seen] == [6] * (7 - first_step)
        assert len(set(flat(seen))) == 6 * (7 - first_step)
        found |= set(flat(seen))
    assert found == set(range(43))
    seen = flat(tags(make_loader(val, None, workers)))
    assert sorted(seen) == list(range(17))
    assert workers > 1 or seen == list(range(17))


@pytest.mark.parametrize(("batch_size", "world"), [(1, 1), (4, 4), (5, 5), (10, 2), (40, 4)])
def test_splits_that_are_not_even(packed, monkeypatch, batch_size, world):
    """More workers than batches, parts that end inside of shards, processes without an image."""
    train, val = opened(packed / BOTH)
    for workers in (1, 2, 3, 5):
        seen, evaluated, steps = [], [], set()
        for rank in range(world):
            for module in ("utils.data.shards", "utils.data.folders"):
                monkeypatch.setattr(f"{module}.rank", lambda rank=rank: rank)
                monkeypatch.setattr(f"{module}.world_size", lambda: world)
            batches = played(ShardBatches(train, batch_size, True), workers)
            assert all(len(batch) == batch_size // world for batch in batches)
            steps.add(len(batches))
            seen += flat(batches)
            evaluated += flat(played(ShardBatches(val, batch_size, False), workers))
        assert steps == {43 // batch_size}  # no process waits for another
        assert len(set(seen)) == len(seen) == 43 // batch_size * batch_size
        assert sorted(evaluated) == list(range(17))


def test_order_depends_on_seed_epoch_and_the_step_of_a_resume(packed):
    orders = []
    for seed, epoch, first_step in ((3, 0, 0), (3, 0, 0), (3, 1, 0), (4, 0, 0), (3, 0, 2)):
        batches = ShardBatches(opened(packed / BOTH, seed)[0], 4, True)
        batches.begin(epoch, first_step)
        orders.append(flat(played(batches, 2))[:32])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 4
    keys = [key for batch in batches for key in batch.indices]
    assert any(j < i and j // 5 == i // 5 for i, j in itertools.pairwise(keys))  # in a shard, too


def test_augmentation_depends_on_seed_epoch_and_index_alone(packed):
    train, found = opened(packed / BOTH)[0], []
    train.transform = lambda image, rng: keep(image) + 43 * rng.randrange(5)
    for workers, epoch in ((1, 0), (3, 0), (1, 1)):
        batches = ShardBatches(train, 1, True)
        batches.begin(epoch)
        found.append(sorted(flat(played(batches, workers))))
    assert found[0] == found[1] != found[2]


@pytest.mark.filterwarnings("error")
def test_only_a_part_is_read_of_a_pipe(packed, monkeypatch):
    """A command that is cut off before its end fails, and that is no error."""
    commands, pipe = [], shards.Pipe
    monkeypatch.setattr(shards, "Pipe", lambda url, **o: commands.append(url) or pipe(url, **o))
    train, _ = opened(f"pipe:cat {shlex.quote(str(packed))}/{BOTH} /dev/zero")
    assert [command.split()[1][-10:] for command in commands] == ["000000.tar"] * 2
    samples = train.read([7, 2, 5], 6, 8)
    assert [sample["__key__"] for sample in samples] == ["000000011", "000000012"]
    assert commands[2:] == [f"cat {packed}/train-000002.tar /dev/zero"]
    assert train.path(12) == f"pipe:{commands[2]}: 000000012"


def change(name, before, offset, after):
    """Overwrites bytes of a shard, at an offset from those that are `before` them."""

    def prepare(folder):
        content = (folder / name).read_bytes()
        at = content.index(before) + offset
        (folder / name).write_bytes(content[:at] + after + content[at + len(after) :])

    return prepare


SOME = "{train-{000000..000006},val-{000000..000003}}.tar"
ERRORS = {
    "no val": ("train-{000000..000008}.tar", None, "names no val shard; write it as in shards/"),
    "7 of 9": (SOME, None, f"{FIRST}: one of 9 shards, not of 7"),
    "missing": (BOTH, lambda f: (f / THREE).unlink(), f"{THREE}: .*No such file"),
    "cut in an image": (BOTH, lambda f: os.truncate(f / THREE, 5660), f"{THREE}: .*unexpected end"),
    "cut between two": (BOTH, lambda f: os.truncate(f / THREE, 4096), "ends before its last"),
    "renamed": (BOTH, lambda f: shutil.copy(f / VAL, f / THREE), f"{THREE}: not shard 3 of"),
    "another set": (
        BOTH, change(VAL, b'"seed": 1', 8, b"2"), f"{VAL}: not packed together with {FIRST}"
    ),
    "a class too many": (
        BOTH, change(THREE, b"000000016.cls", 512, b"3"), f"{THREE}: 000000016: damaged"
    ),
    "the future": (BOTH, change(FIRST, b'"format": 1', 10, b"2"), f"{FIRST}: .*this version"),
    "pipe fails": (f"pipe:head -c 4096 {BOTH}; exit 3", None, "tar; exit 3: .* status 3"),
}  # fmt: skip


def read_all(pattern):
    for split in opened(pattern):
        tags(make_loader(ShardBatches(split, 1, True), None, workers=1))


@pytest.mark.parametrize(("pattern", "prepare", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(copied, monkeypatch, pattern, prepare, words):
    """By opening the shards, or by a worker in place of a batch."""
    monkeypatch.chdir(copied)
    if prepare:
        prepare(Path())
    with pytest.raises(DataError, match=words) as error:
        read_all(pattern)
    assert "\n" not in str(error.value)
    assert "<_io" not in str(error.value)


def test_unreadable_images_are_named_and_left_out(images, tmp_path):
    tree = shutil.copytree(images, tmp_path / "in")
    (tree / "val" / CLASSES[1] / "a.b.c.JPEG").write_bytes(b"no image")
    os.truncate(tree / "val" / CLASSES[1] / ODD_NAMES[2], 40)
    make_shards(tree, tmp_path / "out", images_per_shard=5, seed=1)
    batches = ShardBatches(opened(tmp_path / "out" / BOTH)[1], 6, train=False)
    errors, place = {}, f"{tmp_path}/out/val-000001.tar: 00000000"
    batches = list(readable(make_loader(batches, None, 1), True, errors))
    assert sorted(errors)[0].startswith(f"{place}5 (n00000001/a.b.c.JPEG): not a readable image")
    assert sorted(errors)[1].startswith(f"{place}6 (n00000001/caf\\udce9\\udcff.JPEG)")
    assert sorted(flat(tags(batches))) == [i for i in range(17) if i not in (5, 6)]


def test_damage_anywhere_is_an_error_or_an_unreadable_image(copied):
    """At many places of a shard: never another exception, nor an image lost in silence."""
    train, _ = opened(copied / BOTH)
    content, bad = (copied / THREE).read_bytes(), []
    for place in range(0, len(content), 67):
        flip(copied / THREE, place)
        try:
            batch = load_batch(partial(train.decode, 0), [*train.read([3], 0, 5)])
            is_fine = len(batch.labels) + len(batch.corrupt) == 5
        except DataError as error:
            is_fine = THREE in str(error) and "\n" not in str(error)
        bad += [] if is_fine else [place]
        (copied / THREE).write_bytes(content)
    assert bad == []


@pytest.fixture(scope="module")
def pattern(folders, tmp_path_factory):
    """A pattern of five train and two val shards of the fixture `folders`."""
    root = tmp_path_factory.mktemp("shards")
    make_shards(folders, root, images_per_shard=10)
    return str(root / "{train-{000000..000004},val-{000000..000001}}.tar")


def test_runs_resume_and_evaluate_as_from_folders(pattern, folders, tmp_path, monkeypatch, capsys):
    """At the end of an epoch in the same bits, in its middle with a new order for the rest."""
    train_step, seen = Trainer.train_step, []

    def stop(self, batch):
        seen.extend(batch.indices)
        if len(seen) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batch)

    args = ["--data-dir", pattern, *SMALL, "--workers", 2, "--output-dir"]
    assert run("train.py", *args, tmp_path / "complete") == 0
    monkeypatch.setattr(Trainer, "train_step", stop)
    for name in ("end", "middle"):  # of an epoch of 48 images
        stop_at, workers = {"end": (48, 2), "middle": (72, 1)}[name]
        seen.clear()
        assert run("train.py", *args, tmp_path / name) == 75
        assert run("train.py", *args, tmp_path / name, "--workers", workers) == 0
        assert len(seen) == 96
    assert_same_run(tmp_path / "complete", tmp_path / "end")
    capsys.readouterr()
    checkpoint = ["--checkpoint", tmp_path / "complete" / "last.pt", "--workers", 0]
    for source in (pattern, folders, f"pipe:cat {pattern}"):
        assert run("evaluate.py", *checkpoint, "--data-dir", source) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:4] == lines[4:]
    assert "(18 images)" in lines[0]


def test_two_processes_end_together_on_uneven_shards(folders, tmp_path, monkeypatch):
    ends, split = {48: [30, 32, 34], 18: [1, 17]}, np.split
    with monkeypatch.context() as patch:
        patch.setattr(np, "split", lambda order, _: split(order, ends[len(order)]))
        make_shards(folders, tmp_path)
    pattern = tmp_path / "{train-{000000..000003},val-{000000..000002}}.tar"
    options = ["--data-dir", pattern, "--output-dir", tmp_path / "run", *SMALL, "--workers", "2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = [ROOT / "scripts" / "train.py", "--precision", "float32", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([*launcher, *script, *options], env=env, check=True, timeout=300)
    row = pd.read_csv(tmp_path / "run" / "metrics.csv").iloc[-1]
    assert row["step"] == 12  # two epochs of 48 images
    trained = load_trained(tmp_path / "run" / "last.pt", torch.device("cpu"))
    results, *_ = evaluate_trained(trained, folders)
    for name, prefix in (("raw", "val_"), ("EMA", "ema_val_")):
        assert results[name]["images"] == 18
        for key in ("loss", "top1_pct", "top5_pct"):
            assert row[prefix + key] == pytest.approx(results[name][key], rel=1e-5)
