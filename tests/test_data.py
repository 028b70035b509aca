"""Class folders, samplers, batches and the random state of samples."""

import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from utils.data import folders as data
from utils.data.folders import (
    Batch,
    CorruptImageError,
    EvalBatches,
    Key,
    Preprocess,
    TrainBatches,
    in_threads,
)
from utils.recipe import RECIPES, Recipe

TINY = Recipe(batch_size=8, train_crop_px=24, eval_resize_px=28, eval_crop_px=24)


def test_open_folders_finds_every_image_and_its_label(folders):
    opened = data.open_folders(folders, TINY)
    assert opened.classes == ["n00000000", "n00000001", "n00000002"]
    assert (len(opened.train), len(opened.val)) == (48, 18)
    paths = [opened.train.path(i) for i in range(48)]
    assert sorted(paths) == sorted(folders.glob("train/*/*"))
    for i, path in enumerate(paths):
        image, label = opened.train[Key(0, i)]
        assert label == int(path.parent.name[-1])
        assert (image.shape, image.dtype) == ((3, 24, 24), torch.uint8)


def test_other_files_are_left_alone_and_empty_classes_refused(folders, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(folders, root)
    for name in (".DS_Store", "._0.JPEG", "notes.txt"):
        (root / "train" / "n00000000" / name).write_bytes(b"x")
    assert len(data.open_folders(root, TINY).train) == 48
    for path in (root / "val" / "n00000001").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="n00000001: no image in this class folder"):
        data.open_folders(root, TINY)


def test_samples_depend_on_seed_epoch_and_index_alone(folders):
    train = data.open_folders(folders, TINY, seed=5).train
    torch.manual_seed(0)
    first, _ = train[Key(3, 7)]
    after = torch.rand(1)
    for other in (Key(0, 1), Key(3, 8), Key(4, 7)):  # what came before does not matter
        train[other]
    assert torch.equal(train[Key(3, 7)][0], first)
    assert not torch.equal(train[Key(4, 7)][0], first)
    other_seed = data.open_folders(folders, TINY, seed=6).train
    assert not torch.equal(other_seed[Key(3, 7)][0], first)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)  # the global generator is where it was


@pytest.mark.parametrize(("method", "workers"), [("fork", 3), ("spawn", 1), ("forkserver", 1)])
def test_loaders_give_the_same_with_any_workers(folders, method, workers):
    """Workers ignore the signals that a terminal or a job manager sends to every process."""
    train = data.open_folders(folders, TINY).train
    alone = data.make_loader(train, TrainBatches(48, 8, seed=1), 0)
    loader = data.make_loader(train, TrainBatches(48, 8, seed=1), workers)
    loader.multiprocessing_context = method
    for epoch in (0, 1):
        for each in (alone, loader):
            each.batch_sampler.begin(epoch)
        for expected, found in zip(alone, loader, strict=True):
            assert torch.equal(found.images, expected.images)
            assert torch.equal(found.labels, expected.labels)
            assert found.indices == expected.indices
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGINT)


@pytest.fixture
def threads():
    """Sets how many PyTorch may use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_batches_are_the_same_by_any_number_of_threads(folders, tmp_path, threads):
    """Files that Pillow reads, under changed warnings, and broken ones among them."""
    root = tmp_path / "copy"
    shutil.copytree(folders, root)
    folder = root / "train" / "n00000000"
    for number, path in enumerate(sorted(folder.iterdir())):
        if number % 3 == 0:
            Image.open(path).convert("P").save(path, "PNG")
        if number % 3 == 1:
            path.write_bytes(path.read_bytes()[: 50 * number])
    train = data.open_folders(root, TINY, seed=3).train
    keys, found, filters = [Key(1, i) for i in range(48)], [], list(warnings.filters)
    for number in (1, 2, 3, 4):
        threads(number)
        found.append(train.__getitems__(keys))
    assert len(found[0].corrupt) > 2
    assert len(found[0].indices) == 48 - len(found[0].corrupt)
    for batch in found[1:]:
        assert torch.equal(batch.images, found[0].images)
        assert torch.equal(batch.labels, found[0].labels)
        assert batch.indices == found[0].indices
        assert [str(error) for error in batch.corrupt] == [str(e) for e in found[0].corrupt]
    assert warnings.filters == filters


def test_threads_run_at_once_and_their_errors_arrive(threads):
    threads(2)
    meeting = threading.Barrier(2)
    assert sorted(in_threads(lambda _: meeting.wait(timeout=60), range(2))) == [0, 1]
    assert in_threads(lambda x: -x, range(9)) == [-x for x in range(9)]
    with pytest.raises(MemoryError, match="the third"):
        in_threads(lambda x: explode() if x == 2 else x, range(9))
    seen = []
    with pytest.raises(MemoryError):
        in_threads(lambda x: explode() if x == 2 else seen.append(x) or time.sleep(0.05), range(99))
    assert len(seen) < 20  # what was not begun is left
    threads(1)
    assert in_threads(lambda _: threading.current_thread(), range(2)) == 2 * [
        threading.main_thread()
    ]


def explode():
    raise MemoryError("the third")


def test_train_batches_are_a_new_permutation_every_epoch():
    sampler = TrainBatches(50, 8, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.epoch = epoch
        batches = list(sampler)
        assert [len(b) for b in batches] == [8] * 6 == [8] * len(sampler)
        assert {key.epoch for batch in batches for key in batch} == {epoch}
        epochs.append([key.index for batch in batches for key in batch])
        assert len(set(epochs[-1])) == 48  # no image twice
        assert set(epochs[-1]) <= set(range(50))
    assert epochs[0] == epochs[2] != epochs[1]
    assert [k.index for b in TrainBatches(50, 8, seed=2) for k in b] != epochs[0]


def test_eval_batches_hold_every_image_once():
    indices = [key.index for batch in EvalBatches(50, 8) for key in batch]
    assert indices == list(range(50))
    assert len(EvalBatches(50, 8)) == 7


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_every_batch(monkeypatch, world):
    whole = [[k.index for k in batch] for batch in TrainBatches(50, 12, seed=1)]
    monkeypatch.setattr(data, "world_size", lambda: world)
    shares, seen = [], []
    for rank in range(world):
        monkeypatch.setattr(data, "rank", lambda rank=rank: rank)
        shares.append([[k.index for k in batch] for batch in TrainBatches(50, 12, seed=1)])
        seen += [k.index for batch in EvalBatches(50, 4) for k in batch]
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(i for share in shares for i in share[step])
        assert {len(share[step]) for share in shares} == {12 // world}
    assert sorted(seen) == list(range(50))
    with pytest.raises(ValueError, match=f"batch_size=7 must divide by {world}"):
        TrainBatches(50, 7, seed=1)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="batch_size=51 is more than the 50 training images"):
        TrainBatches(50, 51, seed=0)


def test_unreadable_images_are_set_apart():
    good = torch.zeros(3, 4, 4, dtype=torch.uint8)
    error = CorruptImageError("x.JPEG: not a readable image")
    batch = data.collate([(good, 1), error, (good, 2)])
    assert (batch.images.shape, batch.labels.tolist()) == ((2, 3, 4, 4), [1, 2])
    assert batch.corrupt == [error]
    assert len(data.collate([error]).labels) == 0


def test_evaluation_input_is_torchvisions_reference(photographs):
    """Resize, centre crop, to [0, 1], normalise, by the classic transforms."""
    recipe = RECIPES["imagenet"]
    val = data.open_folders(photographs, recipe).val
    image, label = val[Key(0, 50)]
    batch = Batch(image[None], torch.tensor([label]), [])
    found, _ = Preprocess(torch.device("cpu"), 10)(batch)
    reference = transforms.Compose(
        [
            transforms.Resize(232),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    expected = reference(Image.open(val.path(50)).convert("RGB"))
    one_level = 1.01 / 255 / 0.224  # the resized uint8 may be rounded the other way
    torch.testing.assert_close(found[0], expected, rtol=0, atol=one_level)
    assert (found[0] - expected).abs().mean() < 0.01 * one_level
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_mixing_against_ten_lines(kind):
    """Both mix each image with the one before it, and the targets by the share of pixels."""
    rng = np.random.default_rng(0)
    raw = torch.from_numpy(rng.integers(0, 256, (4, 3, 8, 10), dtype=np.uint8))
    labels = torch.tensor([0, 1, 2, 1])
    plain, _ = Preprocess(torch.device("cpu"), 3)(Batch(raw, labels, []))
    mixer = Preprocess(torch.device("cpu"), 3, **{f"{kind}_alpha": 1.0})
    shares = []
    for seed in range(20):
        torch.manual_seed(seed)
        images, targets = mixer(Batch(raw, labels, []))
        before = plain[[3, 0, 1, 2]]
        if kind == "cutmix":
            own = (images == plain).all(1)  # per pixel
            assert torch.equal(images, torch.where(own[:, None], plain, before))
            assert torch.equal(own[0], own[1])
            share = own[0].float().mean()
        else:
            share = targets[0, 0]  # label 0 is not that of the image before
            expected = share * plain + (1 - share) * before
            torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
        one_hot = torch.eye(3)[labels]
        expected = share * one_hot + (1 - share) * one_hot[[3, 0, 1, 2]]
        torch.testing.assert_close(targets, expected, rtol=1e-4, atol=1e-5)
        shares.append(float(share))
    assert max(shares) - min(shares) > 0.4


def test_one_of_the_two_mixes_a_batch():
    raw = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.arange(4)
    both = Preprocess(torch.device("cpu"), 4, cutmix_alpha=1.0, mixup_alpha=0.2)
    plain, _ = Preprocess(torch.device("cpu"), 4)(Batch(raw, labels, []))
    before = plain.roll(1, 0)
    pasted = 0
    for seed in range(40):
        torch.manual_seed(seed)
        images, _ = both(Batch(raw, labels, []))
        pasted += bool(((images == plain) | (images == before)).all())
    assert 10 <= pasted <= 30
