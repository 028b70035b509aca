"""The peers against ours, the arithmetic of a comparison, and the script."""

import copy
import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import needs_onednn, run
from PIL import Image
from torch._inductor.utils import run_and_get_code

import backbones
from backbones.classifier import Classifier
from scripts import benchmark
from utils import contest, costs
from utils.data.folders import Batch, Preprocess
from utils.data.transforms import train_transform
from utils.measure import (
    by_steps,
    count_macs,
    count_parameters,
    peak_memory,
    seconds_per_call,
    throughputs,
    time_interleaved,
)
from utils.peers import (
    SHARED,
    TimmTrainer,
    TorchvisionTrainer,
    timm_backbone,
    torchvision_backbone,
    torchvision_loader,
    torchvision_transform,
)
from utils.recipe import RECIPES
from utils.studies.runner import Arm
from utils.training.loop import Trainer

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


def test_timms_steps_learn_the_same():
    """Its bf16 steps on our model follow ours: same losses to bf16's precision."""
    recipe = dataclasses.replace(PLAIN, precision="bf16", channels_last=True)
    torch.manual_seed(0)
    model = Classifier(backbones.create("cspdarknet19", width=0.125), 3)
    theirs = TimmTrainer(copy.deepcopy(model).train(), recipe)
    ours = Trainer(model.train(), recipe, steps_per_epoch=10**6, num_classes=3)
    pixels = torch.randint(256, (8, 3, 64, 64), dtype=torch.uint8)
    batch = Batch(pixels, torch.randint(3, (8,)), [])
    image, target = ours.preprocess(batch)
    for _ in range(3):
        expected = theirs.train_step(image.clone(), target)
        assert ours.train_step(batch).item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("name", SHARED)
def test_shared_architectures_are_the_same(name):
    """As many parameters as timm's and torchvision's, and as many multiply-accumulates."""
    with torch.device("meta"):
        ours = backbones.create(name, **SHARED[name].options)
        nets = [timm_backbone(name)]
    if SHARED[name].nodes:
        nets.append(torchvision_backbone(name))
    for net in nets:
        assert count_parameters(net) == count_parameters(ours)
        assert count_macs(net, 64, 96) == count_macs(ours, 64, 96)


def test_throughputs_as_computed_by_hand():
    """Two sides on a clock of their own: ours takes 1 s a step, the peer 2 s, in round 2 4 s."""
    now_s, calls = 0.0, []

    def side(name, seconds):
        def train(steps):
            nonlocal now_s
            calls.append((name, steps))
            now_s += steps * next(seconds)

        return train

    sides = {
        "ours": side("ours", iter([9, 9, 1, 9, 1])),
        "peer": side("peer", iter([9, 9, 2, 9, 4])),
    }
    found = throughputs(sides, batch_size=8, steps=5, rounds=2, settle_steps=3, clock=lambda: now_s)
    turn = {name: [(name, 3), (name, 5)] for name in ("ours", "peer")}
    order = turn["ours"] + turn["peer"] + turn["peer"] + turn["ours"]
    assert calls == [("ours", 3), ("peer", 3), *order]
    assert found == {"ours": [8, 8], "peer": [4, 2]}


def test_ratios_are_taken_within_rounds():
    """The peer's slow round does not meet our fast one."""
    found = {"ours": [1.0, 2.0, 4.0], "peer": [3.0, 2.0, 8.0]}
    (row,) = contest.compare(found, [("ours", "peer")], "s", task="t")
    assert row == {
        "task": "t", "ours": "ours", "peer": "peer", "unit": "s", "ours_value": 2.0,
        "peer_value": 3.0, "ratio_median": 2.0, "ratio_min": 1.0, "ratio_max": 3.0, "rounds": 3,
    }  # fmt: skip
    (row,) = contest.compare(found, [("ours", "peer")], "images/s", more_is_better=True)
    assert (row["ratio_median"], row["ratio_min"], row["ratio_max"]) == (0.5, 1 / 3, 1.0)


def test_short_calls_are_repeated():
    """For about 30 ms a turn on a clock of their own: 30 calls of 1 ms, one of 50."""
    now_ms, counts = 0, dict.fromkeys("ab", 0)

    def call(name, milliseconds):
        nonlocal now_ms
        counts[name] += 1
        now_ms += milliseconds

    calls = {"a": lambda: call("a", 1), "b": lambda: call("b", 50)}
    found = seconds_per_call(calls, rounds=3, turn_s=0.03, clock=lambda: now_ms / 1000)
    assert found == {"a": pytest.approx([0.001] * 3), "b": pytest.approx([0.05] * 3)}
    untimed = 2 + 1 + 3  # to be counted, before the first round, before each turn
    assert counts == {"a": untimed + 3 * 30, "b": untimed + 3}


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
    found = time_interleaved(sides, 4, clock=lambda: now_s)
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


def test_memory_of_training_counts_from_before_the_first_step():
    calls = []
    steps = contest._first_steps(lambda name: lambda: calls.append(name), "net")
    assert calls == []
    steps()
    assert calls == ["net", "net"]


@needs_onednn
def test_the_compiled_peer_has_packed_weights_too():
    torch.compiler.reset()
    for size_px in (32, 64):
        images = torch.randn(1, 3, size_px, size_px)
        call = contest._timm_pass("resnet18", images, torch.float32, compile=True)
        _, (code,) = run_and_get_code(call)
        assert "mkldnn._convolution_pointwise" in code


def test_steps_go_on_over_the_end_of_an_epoch(folders):
    loader = torchvision_loader(folders / "train", PLAIN, workers=0)
    seen = []
    train = by_steps(lambda batches: seen.append([len(target) for _, target in batches]), loader)
    train(4)
    train(5)
    assert seen == [[8] * 4, [8] * 5]


SMALL = ["--backbones", "resnet18", "--recipe", "quick", "--batch-size", "4", "--rounds", "2"]
SMALL += ["--train-crop-px", "32", "--steps", "2", "--threads", "1", "--image-px", "64"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_script_writes_a_row_per_pair(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(contest, "PEAK_ROUNDS", 1)  # a new process each
    monkeypatch.setattr(contest, "START_ROUNDS", 1)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "new" / "benchmark.csv"
    command = ["--data-dir", str(folders), *SMALL, "--batch-sizes", "2", "--output", str(path)]
    command += ["--task", "inference", "step", "input", "loop", "listing"]
    assert benchmark.main([*command, "--files", "50", "1100"]) == 0
    assert path.read_text().splitlines()[0] == (
        "task,what,setting,ours,peer,unit,ours_value,peer_value,ratio_median,ratio_min,ratio_max,"
        "rounds,freed_memory_kept_by,threads,torch,hardware,commit,command"
    )
    table = pd.read_csv(path)
    assert not table.isna().any().any()
    assert (table.ratio_min > 0).all()
    assert (table.ratio_min <= table.ratio_median).all()
    assert (table.ratio_median <= table.ratio_max).all()
    assert table.groupby("task", sort=False).size().to_dict() == {
        "inference": 1 + 4 * len(contest.fast_dtypes(CPU)), "step": 4, "input": 1, "loop": 1,
        "listing": 3,
    }  # fmt: skip
    peers = set(table[table.task == "inference"].peer)
    dtypes = [str(dtype).removeprefix("torch.") for dtype in contest.fast_dtypes(CPU)]
    best = {f"timm {dtype} channels_last" for dtype in dtypes}
    assert peers == {contest.PLAIN, *best, contest.TORCHVISION, "matmul"}
    listed = table[table.task == "listing"]
    assert set(listed.ours) == {"1100 files"}
    assert set(table[table.task == "input"].threads) == {1}
    printed = capsys.readouterr().out
    for row in table.itertuples():
        assert f"{row.task}: {row.what}, {row.setting}: {row.ours} " in printed


def test_imports_are_timed_in_new_interpreters(monkeypatch):
    codes = []
    monkeypatch.setattr(contest.subprocess, "run", lambda command, check: codes.append(command[2]))
    (row,) = contest.imports(2)
    assert (row["ours"], row["peer"]) == ("import backbones", "import torch, torchvision")
    assert set(codes) == {f"import torch, torchvision; {ours}" for ours in ("", row["ours"])}


def test_rows_of_the_same_pair_are_replaced(tmp_path):
    key = {"task": "t", "what": "w", "setting": "s", "ours": "o", "unit": "ms"}
    key |= {"freed_memory_kept_by": "none", "threads": 2}
    rows = [{**key, "peer": peer, "ours_value": value} for peer, value in (("a", 1.0), ("b", 2.0))]
    path = tmp_path / "table.csv"
    benchmark.save(path, pd.DataFrame(rows))
    benchmark.save(path, pd.DataFrame([{**key, "peer": "a", "ours_value": 3.0}]))
    table = pd.read_csv(path)
    assert dict(zip(table.peer, table.ours_value, strict=True)) == {"b": 2.0, "a": 3.0}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "", b"\xff\xfe\x00"])
def test_another_table_is_refused_before_the_measuring(tmp_path, capsys, monkeypatch, content):
    path = tmp_path / "another.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setitem(benchmark.TASKS, "import", lambda args: pytest.fail("it was measured"))
    assert benchmark.main(["--task", "import", "--output", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path} is not a table of this script; give --output another")
    assert error.count("\n") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch counts a GPU's memory alone")
def test_a_gpus_peak_memory_is_that_of_the_call():
    device = torch.device("cuda")
    calls = {
        side: partial(torch.ones, mib << 20, dtype=torch.uint8, device=device)
        for side, mib in (("ours", 64), ("peer", 128))
    }
    (row,) = contest._gpu_peaks(calls, [("ours", "peer")], device, setting="s")
    assert row["ours_value"] == pytest.approx(64, abs=4)
    assert row["ratio_median"] == pytest.approx(2, abs=0.2)


def test_whole_scripts_are_timed(tmp_path):
    """Ours first in one round and last in the next; a script that fails is named with its log."""
    note = tmp_path / "note"
    code = "import sys; open({0!r}, 'a').write({1!r}); sys.exit({2})"
    commands = {
        side: [sys.executable, "-c", code.format(str(note), side[0], 0)]
        for side in ("ours", "peer")
    }
    (row,) = contest.epochs("net", commands, PLAIN, 2, tmp_path)
    assert note.read_text() == "oppo"
    assert (row["ours"], row["peer"], row["rounds"]) == ("ours", "peer", 2)
    commands["peer"][-1] = code.format(str(note), "p", 3)
    with pytest.raises(ValueError, match=r"peer: exit code 3, see .*net-peer-0\.log"):
        contest.epochs("net", commands, PLAIN, 1, tmp_path)


def test_a_start_ends_with_its_file(tmp_path):
    """It would go on for a minute; one that ends without the file has failed."""
    start_s = time.perf_counter()
    log, path = tmp_path / "log", tmp_path / "last.pt"
    code = f"import pathlib, time; pathlib.Path({str(path)!r}).touch(); time.sleep(60)"
    contest._wall_s("ours", [sys.executable, "-c", code], log, until=path)
    assert time.perf_counter() - start_s < 30
    path.unlink()
    with pytest.raises(ValueError, match="ours: exit code 0, see "):
        contest._wall_s("ours", [sys.executable, "-c", ""], log, until=path)


def test_an_interrupt_ends_the_script_too(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def begin(*args, **options):
        started.append(popen(*args, **options))
        return started[0]

    def interrupt(time_s):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(contest.subprocess, "Popen", begin)
        patched.setattr(contest.time, "sleep", interrupt)
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        with pytest.raises(KeyboardInterrupt):
            contest._wall_s("ours", command, tmp_path / "log")
    assert started[0].wait(timeout=30) == -signal.SIGKILL


def test_shards_are_read_beside_their_folders(folders, tmp_path):
    (row,) = contest.shards_speed(folders, tmp_path, PLAIN, rounds=2, steps=9, workers=0)
    assert (row["ours"], row["peer"], row["unit"]) == ("shards", "folders", "images/s")
    assert row["setting"].startswith("48 images")
    assert row["ratio_min"] > 0


@pytest.mark.parametrize("preset", ["imagenet", "quick"])
def test_our_epoch_is_a_command_of_train(folders, tmp_path, preset):
    """The flags that benchmark.py gives to scripts/train.py are the recipe's, at full width."""
    args = ["--task", "epoch", "--recipe", preset, "--data-dir", str(folders)]
    args = benchmark.parse([*args, "--batch-size", "8", "--train-crop-px", "32"])
    chosen = dataclasses.replace(
        RECIPES[preset].tested_at(32), epochs=1, warmup_epochs=0.0, batch_size=8, width=1.0,
        train_crop_px=32,
    )  # fmt: skip
    assert chosen == dataclasses.replace(
        benchmark.chosen_recipe(args).tested_at(32), epochs=1, warmup_epochs=0.0
    )
    output = ("--output-dir", tmp_path / "run")
    command = benchmark.our_command("resnet18", folders, chosen, preset, *output)
    subprocess.run(command, check=True, capture_output=True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["recipe"] == dataclasses.asdict(chosen)
    assert config["backbone"] == "resnet18"


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


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--task", "loop"], "loop needs --data-dir"),
        ([], "input needs --data-dir"),
        (["--task", "networks", "import"], "networks has a table of its own; run it alone"),
        (["--task", "speed"], "invalid choice: 'speed'"),
        (["--task", "import", "--files", "7", "7"], "--files needs two different counts"),
        (["--task", "import", "--files", "7", "8", "7"], "--files needs two different counts"),
        (["--task", "import", "--timm-script", "nowhere.py"], "nowhere.py is not a file"),
        (["--task", "import", "--width", "0.5"], "--width is for --task networks"),
        (["--task", "import", "--workers", "-1"], "--workers: '-1' must be a whole number"),
        (["--task", "import", "--keep-freed-memory"], "is for --task inference step"),
    ],
)
def test_wrong_usage_is_told(capsys, command, message):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--batch-size", "49", "batch_size=49 is more than the 48 training images"),
        ("--backbones", "cspdarknet91", "'cspdarknet91' is not one of cspdarknet53, darknet53"),
        ("--steps", "0", "--steps: '0' must be a whole number"),
        ("--threads", "0", "--threads: '0' must be a whole number"),
        ("--data-dir", "nowhere", "nowhere"),
    ],
)
def test_script_refuses_in_one_line(folders, capsys, option, value, message):
    assert run("benchmark.py", "--task", "loop", "--data-dir", folders, *SMALL, option, value) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
