"""Interleaved timing on a simulated clock, the baselines against ours, and the script."""

import copy
import dataclasses
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import needs_onednn, run
from PIL import Image
from torch import nn
from torch._inductor.utils import run_and_get_code
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

import backbones
from utils import baselines, benchmark
from utils.benchmark import SHARED, Case
from utils.data.folders import Batch, Preprocess
from utils.measure import count_macs, count_parameters, forward, peak_memory, time_interleaved
from utils.recipe import RECIPES
from utils.training.loop import Trainer

FLOAT32 = {"precision": "float32", "channels_last": False}
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux")


@pytest.fixture
def quick(monkeypatch):
    """One call a round, one process for a peak of memory, and four images to read."""
    defaults = {"round_s": 0.0, "clock": time.perf_counter}
    monkeypatch.setattr(benchmark.measure.time_interleaved, "__kwdefaults__", defaults)
    monkeypatch.setattr(benchmark, "PEAK_ROUNDS", 1)
    monkeypatch.setattr(benchmark.draw_jpegs, "__defaults__", (4,))


def test_rounds_are_interleaved_and_calls_repeated():
    """30 calls of 1 ms, or one of 50, 60, 70, ... ms, after an untimed one."""
    now_ms, made = 0, []

    def call(name):
        nonlocal now_ms
        made.append(name)
        now_ms += 1 if name == "a" else 40 + 10 * made.count("b")

    calls = {name: lambda name=name: call(name) for name in "ab"}
    found = time_interleaved(calls, rounds=3, round_s=0.03, clock=lambda: now_ms / 1000)
    assert found["a"] == pytest.approx([0.001] * 3)
    assert found["b"] == pytest.approx([0.08, 0.1, 0.12])  # the 4th, 6th and 8th call of b
    assert "".join(made) == "aabb" + "a" * 31 + "bb" + "bb" + "a" * 31 + "a" * 31 + "bb"


@needs_onednn
def test_a_compiled_baseline_has_frozen_weights():
    """The graph, which `forward` compiles, calls oneDNN's convolution with packed weights."""
    torch.compiler.reset()
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    images = torch.randn(1, 3, 32, 32)
    call, (code,) = run_and_get_code(forward, net, images, compile=True)
    assert "mkldnn._convolution_pointwise" in code
    torch.testing.assert_close(call(), net(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_shared_architectures_are_the_same(name):
    """As many parameters as timm's and torchvision's, and as many multiply-accumulates."""
    case = Case("inference", name, 1, 64, device="meta")
    with torch.device("meta"):
        ours = backbones.create(name, **SHARED[name][1])
        nets = [benchmark.timm_network(case, features_only=True)]
        if name.startswith("resnet"):
            nets.append(create_feature_extractor(models.get_model(name), ["layer4"]))
    for net in nets:
        assert count_parameters(net) == count_parameters(ours)
        assert count_macs(net, 64, 96) == count_macs(ours, 64, 96)


@pytest.mark.parametrize(
    ("make_step", "options", "tolerance"),
    [
        (partial(baselines.torchvision_step, ema=True), FLOAT32, 1e-5),
        (partial(baselines.timm_step, optimizer_name="momentum"), {}, 0.01),  # bfloat16
    ],
    ids=["torchvision", "timm"],
)
def test_the_steps_of_baselines_are_ours(make_step, options, tolerance):
    """The second and third step see updated weights, momentum and decay."""
    plain = {"warmup_epochs": 0.0, "cutmix_alpha": 0.0, "mixup_alpha": 0.0, "batch_size": 8}
    plain |= {"weight_decay": 1.0, "lr_per_1024": 8.0}
    recipe = dataclasses.replace(RECIPES["imagenet"], **plain, **options)
    torch.manual_seed(0)
    head = nn.Linear(16, 10, bias=False)  # torchvision would decay the bias
    layers = nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), *layers)
    step, _ = make_step(copy.deepcopy(model), recipe)
    trainer = Trainer(model, recipe, steps_per_epoch=10**6, num_classes=10)
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(pixels, torch.randint(10, (8,)), [])
    images, labels = Preprocess(torch.device("cpu"), recipe)(batch)
    for _ in range(3):
        ours = trainer.train_step(batch).item()
        assert step(images, labels) == pytest.approx(ours, rel=tolerance)


def test_torchvisions_preset_normalises_as_ours(tmp_path):
    benchmark.draw_jpegs(tmp_path / "images", 8)
    recipe = dataclasses.replace(RECIPES["imagenet"], batch_size=4, train_crop_px=32)
    loader = baselines.torchvision_loader(tmp_path, recipe)
    assert [images.shape for images, _ in loader] == [(4, 3, 32, 32)] * 2
    to_input = transforms.Compose(loader.dataset.transform.transforms[3:6])
    image = to_input(Image.new("RGB", (32, 32), (200, 30, 90)))
    pixels = torch.tensor([200, 30, 90], dtype=torch.uint8)[None, :, None, None]
    batch = Batch(pixels.expand(1, 3, 32, 32), torch.zeros(1, dtype=torch.long), [])
    ours, _ = Preprocess(torch.device("cpu"), recipe)(batch)
    torch.testing.assert_close(image[None], ours, rtol=0, atol=1e-5)


SMALL = ("--batch-size", 2, "--image-px", 32, "--rounds", 2, "--threads", 1)


def test_script_compares_implementations(tmp_path, capsys, quick):
    path = tmp_path / "new" / "benchmark.csv"
    assert run("benchmark.py", "--backbones", "resnet18", "--output", path, *SMALL) == 0
    table = pd.read_csv(path)
    assert not table.isna().any(axis=None)
    found = table[table["round"] == 1].groupby("task").implementation.apply(list)
    assert found["input"] == ["torchvision float32", "ours float32"]
    assert [name.split()[0] for name in found["step"]] == ["torchvision", "timm", "ours"]
    assert found["inference"][0] == "timm float32"
    exported = {"ours ONNX Runtime float32", "timm ONNX Runtime float32"}
    assert exported | {"torchvision float32"} < set(found["inference"])
    assert set(table[table.task == "input"].threads) == {1}
    assert "timm ONNX Runtime float32" in capsys.readouterr().out
    assert len(benchmark.speed_table(benchmark.read_benchmark(path))) == 3


def test_eight_bits_take_any_batch_size():
    case = benchmark.Case("inference", "resnet18", 17, 32, implementation="ours ONNX Runtime int8")
    maps = benchmark.inference_call(case)()
    assert [value.shape[0] for value in maps.values()] == [17] * 5


@needs_linux
def test_peak_memory_is_that_of_the_call():
    ballast = np.ones(25 << 20)  # this process's own does not count
    assert peak_memory(partial, np.ones, 8 << 20, calls=2) / 2**20 == pytest.approx(64, abs=4)
    assert len(ballast)


def record(values, **columns):
    """Rows of a run as the script writes them: implementations with the seconds of their rounds."""
    facts = dict.fromkeys([*benchmark.RUN, "dtype"], "x")
    facts |= {"task": "inference", "unit": "ms/image", **columns}
    rows = [
        {**facts, "implementation": name, "round": k, "value": value}
        for name, of_name in values.items()
        for k, value in enumerate(of_name)
    ]
    return pd.DataFrame(rows)


def test_ratios_are_taken_within_rounds():
    """The slow round of the reference does not meet the fast one of ours."""
    values = {"timm": [30.0, 20.0, 80.0], "ours": [10.0, 20.0, 40.0], "ONNX": [10.0, 10.0, 40.0]}
    table = pd.concat([record(values), record(values, task="step")])
    found = benchmark.ratios(table).set_index(["task", "implementation"])
    assert found.value.tolist() == [30, 20, 10] * 2
    columns = ["ratio_median", "ratio_min", "ratio_max"]
    assert found.loc[("inference", "ours"), columns].tolist() == [2, 1, 3]
    assert found.loc[("inference", "ONNX"), columns].tolist() == [2, 2, 3]
    table = pd.concat([record(values), record({"ours ONNX int8": [1.0] * 3}, dtype="int8")])
    (row,) = benchmark.speed_table(table).to_dict("records")
    ours, baseline = (row[f"{who}, times the reference"] for who in ("ours", "fastest baseline"))
    assert ours == "ours: 2.00 (1.00 to 3.00), 50.0 images/s"
    assert baseline == "ONNX: 2.00 (2.00 to 3.00), 100.0 images/s"
    other = record(values, hardware="another machine", network="y")
    assert benchmark.speed_table(pd.concat([table, other])).network.tolist() == ["y"]


def test_runtimes_are_compared_with_timms():
    """Of timm's two memory formats the faster one."""
    values = {"timm float32": [8.0, 8.0], "ours float32": [4.0, 4.0]}
    values |= {"timm channels_last float32": [2.0, 2.0], "ours compiled bfloat16": [1.0, 1.0]}
    values |= {"timm channels_last compiled bfloat16": [2.0, 2.0]}
    found = benchmark.runtime_table(record(values)).set_index("runtime")["x: ours, timm"]
    expected = {"eager float32": "2.00, 4.00", "torch.compile bfloat16": "8.00, 4.00"}
    assert found.to_dict() == expected


def test_rows_of_the_same_run_are_replaced(tmp_path):
    path = tmp_path / "benchmark.csv"
    rows = [record({"timm": [1.0, 2.0], "ours": [3.0, 4.0]}, network=name) for name in "xy"]
    benchmark.save(path, pd.concat(rows).to_dict("records"))
    benchmark.save(path, record({"ours": [5.0]}, network="x").to_dict("records"))
    table = benchmark.read_benchmark(path)
    assert table.network.tolist() == ["y"] * 4 + ["x"]
    assert table.value.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"\xff\xfe\x00"])
def test_another_table_is_an_error_before_the_measuring(tmp_path, capsys, content):
    path = tmp_path / "another.csv"
    path.write_bytes(content)
    assert run("benchmark.py", "--output", path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path} is not a table of scripts/benchmark.py")
