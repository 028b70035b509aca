"""Class folders, samplers, loaders and the random state of samples."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import threading

import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils.cli import DataError
from utils.data import folders, open_val_data
from utils.data.folders import (
    Batch,
    CorruptImageError,
    Key,
    Preprocess,
    TrainBatches,
    begin,
    eval_batches,
    load_batch,
    make_loader,
    open_folders,
    readable,
)
from utils.data.imagenet import IMAGE_SUFFIXES
from utils.recipe import RECIPES, Recipe

CPU, PLAIN = torch.device("cpu"), RECIPES["small"]  # which mixes no images
TINY = Recipe(batch_size=8, train_crop_px=24, eval_resize_px=28, eval_crop_px=24)
images_dir = pytest.fixture(lambda folders: folders)  # the module has the fixture's name


def test_every_image_is_found_with_its_label(images_dir, tmp_path, capsys):
    """Those of torchvision's ImageFolder, in its order: nested ones, links and any names too."""
    root = shutil.copytree(images_dir, tmp_path / "copy")
    folder = root / "train" / "n00000000"
    for name in ("sub/b.JPEG", "sub/deep/a.PGM", "sub-2/c.tif", "folder.JPEG/d.JPEG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "3.JPEG", folder / name)
    (folder / "linked").symlink_to("../../val/n00000000")
    for name in ("a b.jpg", "caf\udce9\udcff.JPEG", "15.jpeg"):
        (folder / name).symlink_to("3.JPEG")
    opened = open_folders(root, TINY)
    assert opened.classes == ["n00000000", "n00000001", "n00000002"]
    assert (len(opened.train), len(opened.val)) == (61, 18)
    paths = [opened.train.path(i) for i in range(61)]
    reference = ImageFolder(root / "train")
    assert list(zip(map(str, paths), opened.train.labels, strict=True)) == reference.samples
    assert {*IMAGE_SUFFIXES} == {*IMG_EXTENSIONS}
    for i in range(61):
        image, label = opened.train[Key(0, i)]
        assert label == reference.targets[i]
        assert (image.shape, image.dtype) == ((3, 24, 24), torch.uint8)
    assert capsys.readouterr().err == ""


def test_files_that_are_left_out_are_counted(images_dir, tmp_path, capsys):
    """A pipe above all, which would block; ImageFolder takes some of them."""
    root = shutil.copytree(images_dir, tmp_path / "copy")
    names = ("a.JPEG", "n00000000/._0.JPEG", "n00000000/sub/b.gif", ".checkpoints/x.JPEG")
    for name in (*names, "n00000000/.DS_Store"):  # which nobody takes for an image
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).write_bytes(b"x")
    os.mkfifo(root / "train" / "n00000001" / "pipe.JPEG")
    assert len(open_folders(root, TINY).train) == 48
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {root}/train: left out, ")
    assert line.endswith(": 5 (.checkpoints, a.JPEG, n00000000/._0.JPEG, ...)")
    (root / "val" / "n00000002" / "loop").symlink_to("..")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_folders(root, TINY)
    found = folders.images_below(root / "train")  # without classes an image may lie at the top
    assert len(found) == 49
    assert found[0] == str(root / "train" / "a.JPEG")
    assert ", or hidden: 4 (.checkpoints, n00000000/._0" in capsys.readouterr().err


def test_broken_folders_are_named(images_dir, tmp_path):
    root = shutil.copytree(images_dir, tmp_path / "copy")
    broken = root / "train" / "n00000000" / "1.JPEG"
    broken.unlink()
    broken.symlink_to("gone.JPEG")
    opened = open_folders(root, TINY)
    corrupt = opened.train.__getitems__([Key(0, i) for i in range(48)]).corrupt
    assert [str(error).split(":")[0] for error in corrupt] == [str(broken)]
    with pytest.raises(DataError, match=r"the network does not have: 1 \(n00000002\)"):
        open_val_data(root, opened.classes[:2], TINY)
    shutil.rmtree(root / "val" / "n00000001")
    (root / "val" / "n00000001").mkdir()
    with pytest.raises(DataError, match="n00000001: no image in this class folder"):
        open_folders(root, TINY)


def test_samples_depend_on_seed_epoch_and_index_alone(images_dir):
    train = open_folders(images_dir, TINY, seed=5).train
    before = torch.get_rng_state()
    first, _ = train[Key(3, 7)]
    train[Key(0, 1)]  # what came before does not matter
    assert torch.equal(train[Key(3, 7)][0], first)
    assert not torch.equal(train[Key(4, 7)][0], first)
    assert not torch.equal(open_folders(images_dir, TINY, seed=6).train[Key(3, 7)][0], first)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("method", "workers"), [("fork", 3), ("spawn", 1), ("forkserver", 1)])
def test_loaders_give_the_same_with_any_workers(images_dir, method, workers):
    """Workers ignore the signals that a terminal or a job manager sends to every process."""
    train = open_folders(images_dir, TINY).train
    alone = train.train_loader(8, 0)
    loader = train.train_loader(8, workers, False, 60)
    loader.multiprocessing_context = method
    for epoch in (0, 1):
        for each in (alone, loader):
            begin(each, epoch, first_step=epoch)
        for expected, found in zip(alone, loader, strict=True):
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.labels, expected.labels)
            assert found.indices == expected.indices
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)


def test_batches_are_the_same_by_any_number_of_threads(images_dir, tmp_path, monkeypatch):
    """Among them files that Pillow reads, and broken ones, which batches leave out."""
    root = tmp_path / "copy"
    shutil.copytree(images_dir, root)
    for number, path in enumerate(sorted((root / "train" / "n00000000").iterdir())):
        if number % 3 == 0:
            Image.open(path).convert("P").save(path, "PNG")
        if number % 3 == 1:
            path.write_bytes(path.read_bytes()[: 50 * number])
    train, found = open_folders(root, TINY, seed=3).train, []
    for threads in (1, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(train.__getitems__([Key(1, i) for i in range(48)]))
    assert torch.equal(found[0].images, found[1].images)
    assert torch.equal(found[0].labels, found[1].labels)
    assert found[0].indices == found[1].indices
    assert list(map(str, found[0].corrupt)) == list(map(str, found[1].corrupt))
    assert len(found[0].corrupt) == 48 - len(found[0].indices) > 2


def test_batches_are_loaded_in_threads_and_unreadable_images_skipped_or_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    meeting = threading.Barrier(2)

    def load(label):
        if label == 0:
            raise CorruptImageError("x.JPEG: broken")
        meeting.wait(timeout=60)  # two at once
        return torch.zeros(3, 4, 4, dtype=torch.uint8), label

    batch = load_batch(load, [1, 0, 2], [7, 8, 9])
    assert (batch.images.shape, batch.labels.tolist()) == ((2, 3, 4, 4), [1, 2])
    assert batch.indices == [7, 9]
    (error,) = batch.corrupt
    assert error.__traceback__ is None
    assert len(load_batch(load, [0]).labels) == 0
    with pytest.raises(ZeroDivisionError):
        load_batch(lambda x: 1 // x, [0, 0])
    skipped = {}
    assert list(readable([batch], True, skipped)) == [batch]
    assert list(skipped) == ["x.JPEG: broken"]
    with pytest.raises(CorruptImageError, match=r"x\.JPEG: broken; --skip-corrupt leaves such"):
        next(readable([batch], False, {}))
    with pytest.raises(CorruptImageError):  # in place of a batch, as of a broken shard
        next(readable([error], True, {}))


def test_train_batches_are_a_new_permutation_every_epoch():
    sampler, epochs = TrainBatches(50, 8, seed=1), []
    for epoch in (0, 1, 0):
        sampler.begin(epoch)
        batches = list(sampler)
        assert [len(b) for b in batches] == [8] * 6 == [8] * len(sampler)
        assert {key.epoch for batch in batches for key in batch} == {epoch}
        epochs.append([key.index for batch in batches for key in batch])
        assert len(set(epochs[-1])) == 48  # no image twice
        assert set(epochs[-1]) <= set(range(50))
        sampler.begin(epoch, first_step=4)
        assert list(sampler) == batches[4:]
    assert epochs[0] == epochs[2] != epochs[1]
    assert [k.index for b in TrainBatches(50, 8, seed=2) for k in b] != epochs[0]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch(images_dir, monkeypatch, world):
    complete = [[k.index for k in batch] for batch in TrainBatches(50, 12, seed=1)]
    val = open_folders(images_dir, TINY).val
    monkeypatch.setattr(folders, "world_size", lambda: world)
    shares, seen, labels = [], [], []
    for rank in range(world):
        monkeypatch.setattr(folders, "rank", lambda rank=rank: rank)
        shares.append([[k.index for k in batch] for batch in TrainBatches(50, 12, seed=1)])
        batches = eval_batches(50, 4)
        assert len(batches) == len(list(batches))
        seen += [k.index for batch in batches for k in batch]
        labels += [int(label) for batch in val.eval_loader(4, 0) for label in batch.labels]
    for step, batch in enumerate(complete):
        assert sorted(batch) == sorted(i for share in shares for i in share[step])
        assert {len(share[step]) for share in shares} == {12 // world}
    assert sorted(seen) == list(range(50))
    assert sorted(labels) == 6 * [0] + 6 * [1] + 6 * [2]
    with pytest.raises(ValueError, match=f"batch_size=7 must divide by {world}"):
        TrainBatches(50, 7, seed=1)
    with pytest.raises(ValueError, match="batch_size=60 is more than the 50 training images"):
        TrainBatches(50, 60, seed=0)


def test_evaluation_input_is_torchvisions_reference(photographs):
    """Resize, center crop, to [0, 1], normalize, by the classic transforms."""
    val = open_folders(photographs, RECIPES["imagenet"]).val
    found, _ = Preprocess(torch.device("cpu"), RECIPES["imagenet"])(val.__getitems__([Key(0, 50)]))
    steps = [transforms.Resize(232), transforms.CenterCrop(224), transforms.ToTensor()]
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    reference = transforms.Compose([*steps, normalize])
    expected = reference(Image.open(val.path(50)).convert("RGB"))
    one_level = 1.01 / 255 / 0.224  # the resized uint8 may be rounded the other way
    torch.testing.assert_close(found[0], expected, rtol=0, atol=one_level)
    assert (found[0] - expected).abs().mean() < 0.01 * one_level
    assert found.is_contiguous(memory_format=torch.channels_last)


RAW = Batch(
    torch.randint(0, 256, (4, 3, 8, 10), generator=torch.Generator().manual_seed(0)).byte(),
    torch.tensor([0, 1, 2, 1]),
    [],
)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixing_against_ten_lines(kind):
    """Both mix each image with the one before it, and the targets by the share of pixels."""
    plain, labels = Preprocess(CPU, PLAIN)(RAW)
    mixed = dataclasses.replace(PLAIN, **{f"{kind}_alpha": 1.0})
    mixer, shares = Preprocess(CPU, mixed, mix_classes=3), []
    before, one_hot = plain[[3, 0, 1, 2]], torch.eye(3)[labels]
    for seed in range(20):
        torch.manual_seed(seed)
        images, targets = mixer(RAW)
        if kind == "cutmix":
            share = (images == plain).all(1)[:, None].float()  # per pixel
            assert torch.equal(share[0], share[1])
        else:
            share = targets[0, 0].expand(4, 1, 1, 1)  # label 0 is not that of the image before
        expected = share * plain + (1 - share) * before
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
        share = share[0].mean()
        expected = share * one_hot + (1 - share) * one_hot[[3, 0, 1, 2]]
        torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-5)
        shares.append(float(share))
    assert max(shares) - min(shares) > 0.4


def test_each_batch_is_mixed_by_one_of_the_two():
    both = Preprocess(CPU, Recipe(cutmix_alpha=1.0, mixup_alpha=0.2), mix_classes=3)
    plain, _ = Preprocess(CPU, PLAIN)(RAW)
    pasted = 0
    for seed in range(40):
        torch.manual_seed(seed)
        images, _ = both(RAW)
        pasted += bool(((images == plain) | (images == plain.roll(1, 0))).all())
    assert 10 <= pasted <= 30


class Reporting(torch.utils.data.IterableDataset):
    """Reports an error as multiprocessing's threads do."""

    def __iter__(self):
        sys.excepthook(EOFError, EOFError("the other end was closed"), None)
        yield os.getpid()


def test_threads_of_workers_print_no_tracebacks(capfd):
    (pid,) = make_loader(Reporting(), None, workers=1)
    assert pid != os.getpid()
    assert capfd.readouterr().err == ""
