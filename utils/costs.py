"""What networks cost on this machine: latency, throughput, a training step, peak memory."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from utils.data.folders import Batch
from utils.measure import count_macs, count_parameters, peak_memory, seconds_per_call
from utils.recipe import Recipe
from utils.training.evaluation import autocast
from utils.training.loop import Trainer

NUM_CLASSES = 10
PEAK_ROUNDS = 3

UNITS = {"latency": "ms", "inference": "ms/image", "training": "ms/image"}  # of each kind of call


def prepare(make: Callable[[], nn.Module], recipe: Recipe, kind: str) -> Callable[[], object]:
    """A call to be measured, on random pixels of `recipe.train_crop_px`.

    Args:
        make: makes the classifier, of `NUM_CLASSES` classes.
        recipe: gives batch size, crop, precision and memory format.
        kind: "latency" and "inference" are forward passes of one image and of a batch, "training"
            is a whole step of `utils.training.loop`: forward, backward, update, averaged weights.
    """
    torch.manual_seed(0)
    trainer = Trainer(make(), recipe, steps_per_epoch=1000, num_classes=NUM_CLASSES)
    count, side = recipe.batch_size, recipe.train_crop_px
    pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8)
    batch = Batch(pixels, torch.zeros(count, dtype=torch.long), [])
    if kind == "training":
        trainer.model.train()
        return lambda: trainer.train_step(batch).item()
    net = trainer.model.eval()
    images, _ = trainer.eval_preprocess(batch)
    images = images[:1] if kind == "latency" else images

    def infer() -> float:
        with torch.inference_mode(), autocast(trainer.device, trainer.dtype):
            return net(images)[0, 0].item()

    return infer


def measure_networks(
    networks: Mapping[str, Callable[[], nn.Module]], recipe: Recipe, rounds: int
) -> list[dict[str, Any]]:
    """Times by turns, peaks of memory, parameters and GMACs.

    Args:
        networks: what makes each of them; a function of a module with its arguments.
        recipe: see `prepare`.
        rounds: turns of each network.

    Returns:
        A row per network, quantity and round, with `network`, `quantity`, `unit`, `round` and
        `value`; parameters and multiply-accumulates have one row, of round 0. Peaks are of what a
        call needs beyond weights, averaged weights and images.
    """
    rows = []

    def add(network: str, quantity: str, unit: str, values: list[float]) -> None:
        facts = {"network": network, "quantity": quantity, "unit": unit}
        rows.extend({**facts, "round": k, "value": round(v, 4)} for k, v in enumerate(values))

    for name, make in networks.items():
        net, side = make(), recipe.train_crop_px
        add(name, "parameters", "million", [count_parameters(net) / 1e6])
        add(name, "multiply-accumulates", "GMACs", [count_macs(net, side, side) / 1e9])
    for kind, unit in UNITS.items():
        images = 1 if kind == "latency" else recipe.batch_size
        calls = {name: prepare(make, recipe, kind) for name, make in networks.items()}
        for name, times_s in seconds_per_call(calls, rounds).items():
            add(name, kind, unit, [time_s * 1e3 / images for time_s in times_s])
    for kind in ("inference", "training"):
        for name, make in networks.items():
            peaks = [peak_memory(prepare, make, recipe, kind) for _ in range(PEAK_ROUNDS)]
            add(name, f"{kind} peak", "MiB", [peak / 2**20 for peak in peaks])
    return rows
