"""The reference trainer against ours, the arithmetic of a comparison, and the script."""

import copy
import dataclasses
import itertools
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import backbones
from backbones.classifier import Classifier
from scripts import benchmark
from utils import costs
from utils.data import Batch, Preprocess
from utils.images import train_transform
from utils.measure import by_steps, compare_throughput, peak_memory, time_by_turns
from utils.peers import TorchvisionTrainer, torchvision_loader, torchvision_transform
from utils.recipe import RECIPES
from utils.study import Arm
from utils.training import Trainer

CPU = torch.device("cpu")
PLAIN = dataclasses.replace(
    RECIPES["imagenet"],
    batch_size=8,
    train_crop_px=32,
    warmup_epochs=0.0,
    trivial_augment=False,
    random_erasing=0.0,
    cutmix_alpha=0.0,
    mixup_alpha=0.0,
    precision="float32",
    channels_last=False,
)


def test_both_sides_take_the_same_steps():
    """Losses of three steps: the second and third see updated weights, momentum and decay."""
    recipe = dataclasses.replace(PLAIN, weight_decay=0.1, lr_per_1024=8.0)
    torch.manual_seed(0)
    model = Classifier(backbones.create("cspdarknet19", width=0.125), 3)
    theirs = TorchvisionTrainer(copy.deepcopy(model).train(), recipe)
    ours = Trainer(model.train(), recipe, steps_per_epoch=10**6, num_classes=3)
    rng = np.random.default_rng(0)
    for _ in range(3):
        pixels = torch.from_numpy(rng.integers(0, 256, (8, 3, 64, 64), dtype=np.uint8))
        labels = torch.from_numpy(rng.integers(0, 3, 8))
        image, target = ours.preprocess(Batch(pixels, labels, []))
        expected, top1_pct, top5_pct = theirs.train_step(image.clone(), target)
        assert ours.train_step(Batch(pixels, labels, [])).item() == pytest.approx(expected, 1e-4)
        assert 0 <= top1_pct <= top5_pct == 100  # five guesses at three classes
    assert theirs.ema.n_averaged == 1  # at the first step, then every 32nd


def test_both_sides_normalise_alike():
    """No crop or flip changes an image of one colour."""
    image = Image.new("RGB", (48, 40), (200, 30, 90))
    pixels = train_transform(PLAIN)(image)[None]
    ours, _ = Preprocess(CPU, 3)(Batch(pixels, torch.zeros(1, dtype=torch.long), []))
    theirs = torchvision_transform(PLAIN)(image)[None]
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_peer_augments_and_mixes_too(folders):
    recipe = dataclasses.replace(RECIPES["imagenet"], batch_size=8, train_crop_px=32)
    names = [type(step).__name__ for step in torchvision_transform(recipe).transforms]
    assert "TrivialAugmentWide" in names
    assert names[-1] == "RandomErasing"
    loader = torchvision_loader(folders / "train", recipe, workers=0)
    images, targets = next(iter(loader))
    assert (len(loader), images.shape, targets.shape) == (6, (8, 3, 32, 32), (8, 3))
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_throughput_as_computed_by_hand():
    """Two sides on a clock of their own: ours takes 1 s a step, the peer 2 s, in round 2 4 s."""
    now_s, calls = 0.0, []

    def side(name, seconds):
        def train(steps):
            nonlocal now_s
            calls.append((name, steps))
            now_s += steps * next(seconds)

        return train

    ours = side("ours", iter([9, 9, 1, 9, 1]))
    peer = side("peer", iter([9, 9, 2, 9, 4]))
    found = compare_throughput(
        ours, peer, batch_size=8, steps=5, rounds=2, settle_steps=3, clock=lambda: now_s
    )
    turn = {name: [(name, 3), (name, 5)] for name in ("ours", "peer")}
    order = turn["ours"] + turn["peer"] + turn["peer"] + turn["ours"]
    assert calls == [("ours", 3), ("peer", 3), *order]
    assert found.ours_images_per_s == [8, 8]
    assert found.peer_images_per_s == [4, 2]
    assert found.summary() == {
        "ours_images_per_s": 8, "peer_images_per_s": 3,
        "ratio_median": 3, "ratio_min": 2, "ratio_max": 4,
    }  # fmt: skip


def test_turns_rotate_and_are_settled():
    now_s, calls = 0.0, []

    def side(name, seconds):
        def call():
            nonlocal now_s
            calls.append(name)
            now_s += next(seconds)

        return call

    sides = {name: side(name, itertools.count(start)) for name, start in (("a", 0), ("b", 10))}
    sides["c"] = side("c", itertools.repeat(0.5))
    found = time_by_turns(sides, 4, clock=lambda: now_s)
    assert calls[3::2] == list("abcbcacababc")
    assert calls[3::2] == calls[4::2]
    assert found["a"] == [2, 4, 6, 8]  # the even ones settle
    assert found["b"] == [12, 14, 16, 18]
    assert found["c"] == [0.5] * 4


def allocation(mib):
    return lambda: np.ones(mib << 20, dtype=np.uint8).sum()


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_that_of_the_call():
    ballast = np.ones(200 << 20, dtype=np.uint8)  # this process's own does not count
    assert peak_memory(allocation, 64) / 2**20 == pytest.approx(64, abs=4)
    assert len(ballast)


def test_steps_go_on_over_the_end_of_an_epoch(folders):
    loader = torchvision_loader(folders / "train", PLAIN, workers=0)
    seen = []
    train = by_steps(lambda batches: seen.append([len(target) for _, target in batches]), loader)
    train(4)
    train(5)
    assert seen == [[8] * 4, [8] * 5]


def test_script_writes_its_row(folders, tmp_path, capsys):
    path = tmp_path / "new" / "benchmark.csv"
    command = ["--data-dir", str(folders), "--train-crop-px", "32", "--batch-size", "8"]
    command += ["--recipe", "quick", "--steps", "2", "--rounds", "2", "--threads", "1"]
    assert benchmark.main([*command, "--output", str(path)]) == 0
    table = pd.read_csv(path)
    assert path.read_text().splitlines()[0] == (
        "task,backbone,crop_px,batch_size,workers,threads,peer,ours_images_per_s,"
        "peer_images_per_s,ratio_median,ratio_min,ratio_max,rounds,steps,autocast,torch,hardware,"
        "commit,command"
    )
    row = table.iloc[0]
    assert len(table) == 1
    assert (row.task, row.backbone, row.crop_px, row.batch_size) == ("train", "cspdarknet19", 32, 8)
    assert (row.workers, row.threads, row.rounds, row.steps) == (1, 1, 2, 2)
    assert 0 < row.ratio_min <= row.ratio_median <= row.ratio_max
    assert f"{row.ratio_median:.2f}" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_script_measures_networks(tmp_path, capsys, monkeypatch):
    arms = [Arm("a", "darknet19"), Arm("b", "cspdarknet19", {"split": "slice"})]
    monkeypatch.setattr(benchmark.studies, "networks", lambda: {arm.network: arm for arm in arms})
    monkeypatch.setattr(costs, "PEAK_ROUNDS", 1)  # a new process each
    command = ["--task", "networks", "--recipe", "quick", "--width", "0.125", "--batch-size", "4"]
    command += ["--train-crop-px", "32", "--rounds", "2", "--threads", "1"]
    path = tmp_path / "networks.csv"
    assert benchmark.main([*command, "--output", str(path)]) == 0
    assert "cspdarknet19 split=slice" in capsys.readouterr().out
    table = pd.read_csv(path)
    assert not table.isna().any().any()
    assert (table.value > 0).all()
    rounds = {"latency": 2, "inference": 2, "training": 2}
    rounds |= {"inference peak": 1, "training peak": 1, "parameters": 1, "multiply-accumulates": 1}
    for (_, quantity), rows in table.groupby(["network", "quantity"]):
        assert list(rows["round"]) == list(range(rounds[quantity]))
    assert len(table) == 2 * sum(rounds.values())
    found = table.set_index(["network", "quantity"]).value
    model = Classifier(backbones.create("darknet19", width=0.125), 10)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found["darknet19", "parameters"].item() == pytest.approx(count / 1e6, abs=1e-4)


def test_training_needs_a_folder(capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--task", "train"])
    assert stop.value.code == 2
    assert "needs --data-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch-size", "49", "batch_size=49 is more than the 48 training images"),
        ("--backbone", "cspdarknet91", "cspdarknet91"),
        ("--steps", "0", "steps=0 must be at least 1"),
        ("--threads", "0", "threads=0 must be at least 1"),
        ("--data-dir", "nowhere", "nowhere"),
    ],
)
def test_script_refuses_in_one_line(folders, capsys, option, value, message):
    command = ["--data-dir", str(folders), "--batch-size", "8", "--recipe", "quick"]
    assert benchmark.main([*command, option, value]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
