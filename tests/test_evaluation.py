"""Evaluation against loops."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from backbones import create_classifier
from utils.data.folders import Batch, Preprocess
from utils.data.transforms import CorruptImageError
from utils.recipe import RECIPES
from utils.training.evaluation import autocast_dtype, evaluate, over_chance

CPU = torch.device("cpu")
PREPROCESS = Preprocess(CPU, RECIPES["small"])


def test_autocast_is_on_where_the_recipe_says_and_the_device_can():
    assert autocast_dtype(CPU, "float32") is None
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert autocast_dtype(CPU, "bf16") == (torch.bfloat16 if supported else None)
    assert autocast_dtype(CPU, "fp16") is None
    assert autocast_dtype(torch.device("cuda"), "fp16") is torch.float16


class Fixed(nn.Module):
    """Gives the logits that the first pixel of each image numbers."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, images):
        return self.logits[(images[:, 0, 0, 0] * 58.395 + 123.675).round().long()]


@pytest.mark.parametrize("num_classes", [3, 8])
def test_evaluate_against_a_loop(num_classes):
    logits = torch.randn(40, num_classes, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, num_classes, (40,), generator=torch.Generator().manual_seed(1))
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 3, 2, 2)
    batches = [Batch(images[i : i + 16], labels[i : i + 16], []) for i in range(0, 40, 16)]
    found = evaluate({"a": Fixed(logits)}, batches, PREPROCESS, num_classes)["a"]
    top1 = top5 = loss = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(num_classes), key=lambda c: -row[c])
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        loss += math.log(sum(math.exp(x) for x in row)) - row[label]
    assert found["images"] == 40
    assert found["top1_pct"] == pytest.approx(100 * top1 / 40)
    assert found["top5_pct"] == pytest.approx(100 * top5 / 40)
    assert found["loss"] == pytest.approx(loss / 40, rel=1e-5)
    for label, each in enumerate(found["classes"]):
        own = logits[labels == label]
        assert each["images"] == len(own)
        assert each["top1_pct"] == pytest.approx(100 * (own.argmax(1) == label).sum() / len(own))
    columns = [2, 0]  # of images of two classes alone
    pair = (labels == 2) | (labels == 0)
    picked = Batch(images[pair], (labels[pair] == 0).long(), [])
    found = evaluate({"a": Fixed(logits)}, [picked], PREPROCESS, 2, None, columns)["a"]
    right = logits[pair][:, columns].argmax(1) == picked.labels
    assert found["top1_pct"] == pytest.approx(100 * right.float().mean())


def test_evaluate_counts_readable_images_only():
    logits = torch.eye(3)
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 3, 2, 2)
    unreadable = Batch(torch.empty(0, 3, 0, 0), torch.empty(0).long(), [CorruptImageError("x")])
    batches = [Batch(images, torch.tensor([0, 1, 0]), []), unreadable]
    found = evaluate({"a": Fixed(logits)}, batches, PREPROCESS, 3)["a"]
    assert (found["images"], found["top1_pct"]) == (3, pytest.approx(200 / 3))
    with pytest.raises(CorruptImageError, match="no validation image is readable"):
        evaluate({"a": Fixed(logits)}, [unreadable], PREPROCESS, 3)


def test_over_chance_is_0_at_chance_and_1_without_errors():
    found = [over_chance(pct, classes) for pct, classes in ((50, 2), (75, 2), (10, 10), (100, 10))]
    assert found == pytest.approx([0, 0.5, 0, 1])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_classifiers_are_optimized_and_score_the_same(dtype):
    """On a CPU; with bfloat16 weights the loss is as near to float32's as under autocast."""
    torch.manual_seed(0)
    model = create_classifier("cspdarknet19", 3, width=0.125).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randint(256, (16, 3, 64, 64), dtype=torch.uint8)
    batches = [Batch(images, torch.arange(16) % 3, [])] * 3
    found = evaluate({"": model}, batches, PREPROCESS, 3, dtype)[""]
    inputs, labels = PREPROCESS(batches[0])
    with torch.no_grad():
        exact = cross_entropy(model(inputs), labels).item()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = cross_entropy(model(inputs).float(), labels).item()
    tolerance = 1e-4 if dtype is None else max(2e-3, 4 * abs(rounded - exact))
    assert found["loss"] == pytest.approx(exact, abs=tolerance)
    assert found["images"] == 48
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
