"""A run's folder: its config, its tables and its checkpoints.

- `config.json`: recipe, backbone, seed, classes, command, versions, commit, hardware
- `metrics.csv`: one row per epoch; the same on every run of the same seed
- `speed.csv`: one row per epoch; depends on the machine
- `last.pt`: weights, EMA weights, optimizer, step and the rows so far
- `best.pt`: the checkpoint with the best EMA accuracy; `epoch_0010.pt` if asked for
- `curves.png`: drawn by `utils.plotting` when the run ends
"""

import argparse
import contextlib
import dataclasses
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from backbones import create_classifier
from backbones.pretrained import Preprocessing
from utils import distributed
from utils.cli import DataError, backbone_option, first_line, summarize, unicode_hint, warn
from utils.data.imagenet import CLASSES, read_class_names
from utils.recipe import Recipe
from utils.records import PARTIAL, lock, write_atomic, write_json, write_table

# Entries of a config that may differ between two starts of one run: they do not change its result.
# Of the files that "weights" and "init_from" name, the digests decide.
PROVENANCE = ("command", "versions", "commit", "hardware", "workers", "data_dir", "compile")
PROVENANCE += ("weights", "init_from")
CAUSES = ("recipe", "weights_sha256", "init_from_sha256", "val_share")  # others follow from these
DIVERGED = "diverged.json"  # the images of the step whose loss was not finite


@contextlib.contextmanager
def open_run(run_dir: Path, config: dict[str, Any]) -> Iterator[dict[str, Any] | None]:
    """Locks a run's folder and yields the checkpoint to resume from, if there is one.

    Raises:
        DataError: another process is training there, or the folder holds another run or other
            files. The message names the first entry that differs; nothing has changed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with lock(run_dir, wait=False):
        path, last = run_dir / "config.json", run_dir / "last.pt"
        if last.exists():
            checkpoint = load_checkpoint(last)
            validate_same_run(run_dir, checkpoint["config"], config)
            write_json(path, checkpoint["config"])  # restored if it is missing
            yield checkpoint
            return
        # Without a checkpoint there is nothing to keep of an earlier start.
        ours = (path.name, last.name, DIVERGED)
        names = sorted(entry.name for entry in run_dir.iterdir() if entry.name[0] != ".")
        if others := [name for name in names if name.removesuffix(PARTIAL) not in ours]:
            raise DataError(
                f"{run_dir}: holds {summarize(others)} and no run; choose another --output-dir"
            )
        write_json(path, config)
        yield None


def validate_same_run(run_dir: Path, found: dict[str, Any], config: dict[str, Any]) -> None:
    """DataError that names the first entry in which a run's config differs from `config`."""
    olds, news = _flatten(found), _flatten(config)
    for name in sorted({**olds, **news}, key=lambda name: (not name.startswith(CAUSES), name)):
        old, new = olds.get(name), news.get(name)
        if old != new and name.split(".")[0] not in PROVENANCE:
            values = f"{name.removeprefix('recipe.')}={repr(old)[:200]}, not {repr(new)[:200]}"
            raise DataError(
                f"{run_dir}: holds a run with {values}{unicode_hint(map(str, (old, new)))}; repeat "
                "its command, or choose another folder"
            )


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested dicts and lists by their names, such as recipe.mean[0]."""
    if isinstance(value, dict):
        parts = {f"{name}.{key}".lstrip("."): each for key, each in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"{name}[{index}]": each for index, each in enumerate(value)}
    else:
        return {name: value}
    return {key: leaf for part in parts for key, leaf in _flatten(parts[part], part).items()}


def save_checkpoint(run_dir: Path, checkpoint: dict[str, Any], keep_every: int = 0) -> None:
    """Writes last.pt, the tables of its rows, and the checkpoints to keep, each atomically.

    Args:
        keep_every: also keep the checkpoint of every so many epochs; 0 for none.

    Raises:
        OSError: the disk is full, or the folder is not writable.
    """
    buffer = io.BytesIO()  # torch.save to a file hides the reason when the disk is full
    torch.save(checkpoint, buffer)
    write_atomic(run_dir / "last.pt", lambda path: path.write_bytes(buffer.getbuffer()))
    finish_save(run_dir, checkpoint, keep_every)


def finish_save(run_dir: Path, checkpoint: dict[str, Any], keep_every: int) -> None:
    """The files that follow from last.pt; a resumed run writes them again after a kill."""
    rows = checkpoint["metrics"]
    if not rows:
        return
    for name in ("metrics", "speed"):
        write_table(run_dir / f"{name}.csv", checkpoint[name])
    if checkpoint["step"] != rows[-1]["step"]:  # in the middle of an epoch
        return
    names = []
    tops = [row.get("ema_val_top1_pct", -1) for row in rows]  # not every epoch is evaluated
    if tops[-1] == max(0, *tops):
        names.append("best.pt")
    if keep_every and rows[-1]["epoch"] % keep_every == 0:
        names.append(f"epoch_{rows[-1]['epoch']:04d}.pt")
    for name in names:
        write_atomic(run_dir / name, lambda path: _link(run_dir / "last.pt", path))


def _link(source: Path, path: Path) -> None:
    """A hard link to a file that is never changed, or a copy where there are no hard links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint of `save_checkpoint` to the CPU. No code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: the file is damaged, or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch does not compare checksums
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} in it")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # PyTorch raises many types for files that are no checkpoints
        raise DataError(f"{path}: not a checkpoint, or damaged ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"config", "model", "ema"}:
        raise DataError(f"{path}: not a checkpoint of scripts/train.py")
    return checkpoint


@dataclass(frozen=True)
class Trained:
    """A classifier with trained weights, made from a checkpoint or from other weights.

    Attributes:
        raw, ema: the classifier with its last and with its EMA weights, on a device and in the
            memory format of the recipe, in eval mode. One and the same without EMA weights.
        backbone, options: its arguments of `backbones.create`.
        classes: names of the class folders, in the order of the logits.
        recipe: how it was trained, or at least how images are prepared for it.
        val_files: the digest of the validation images of its run, if it is known.
    """

    raw: nn.Module
    ema: nn.Module
    backbone: str
    options: dict[str, Any]
    classes: list[str]
    recipe: Recipe
    device: torch.device
    val_files: str | None = None

    def warn_of_other_images(self, data_dir: str | Path, digest: str) -> None:
        """Warns if images that were held out are not those that its run held out."""
        if self.val_files not in (None, digest):
            warn(f"{data_dir}: the run held out other images; some of these may be trained on")


def load_trained(path: str | Path, device: torch.device | None = None) -> Trained:
    """The classifier of a checkpoint, such as a run's last.pt.

    Args:
        device: defaults to a GPU if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: not a checkpoint, or its weights do not fit its config, or are not finite.
    """
    checkpoint = load_checkpoint(path)
    try:
        config = {key: checkpoint["config"][key] for key in ("backbone", "options", "classes")}
        recipe = Recipe(**checkpoint["config"]["recipe"])
        model = create_classifier(config["backbone"], len(config["classes"]), **config["options"])
        model.backbone.preprocessing = Preprocessing.from_recipe(dataclasses.asdict(recipe))
        ema = AveragedModel(model, use_buffers=True)
        model.load_state_dict(checkpoint["model"])
        ema.load_state_dict(checkpoint["ema"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = first_line(error)
        raise DataError(f"{path}: its weights do not fit its own config ({reason})") from error
    if not all(tensor.isfinite().all() for tensor in ema.state_dict().values()):
        raise DataError(f"{path}: its weights are not all finite; use an earlier checkpoint")
    device = device or distributed.pick_device()
    raw, ema = _prepare(recipe, device, model, ema.module)
    val_files = checkpoint["config"].get("val_files")
    return Trained(raw, ema, recipe=recipe, device=device, val_files=val_files, **config)


def recipe_of_weights(images: Preprocessing | None) -> Recipe:
    """How images are prepared for weights; unless known, resized to 256 pixels, cropped to 224."""
    recipe = Recipe(precision="float32", eval_resize_px=256, eval_crop_px=224)
    return dataclasses.replace(recipe, **images.as_recipe()) if images else recipe


def load_published(
    backbone: str,
    weights: str,
    options: dict[str, Any],
    class_names: str | Path | None = None,
    device: torch.device | None = None,
) -> Trained:
    """The classifier of any weights with a head, and their preprocessing; see `recipe_of_weights`.

    Args:
        backbone, weights, options: as of `backbones.create_classifier`.
        class_names: a file of `utils.data.imagenet.read_class_names` with the classes in the order
            of the logits, for weights that do not record theirs. Defaults to ImageNet's for 1,000
            logits.

    Raises:
        ValueError: from `backbones.create_classifier`, or a wrong number of class names.
    """
    model = create_classifier(backbone, weights=weights, **options)
    report = model.backbone.weights_report
    names = list(report.class_names or read_class_names(class_names or CLASSES))
    is_known = report.class_names or class_names
    if not is_known and (report.format == "Darknet" or len(names) != report.classes):
        reason = f"{report.classes} classes, not those of ImageNet in the order of their wnids"
        raise ValueError(f"{weights}: has {reason}; give --class-names")
    if len(names) != report.classes:
        source = weights if report.class_names else class_names
        raise DataError(f"{source}: {len(names)} class names, but a head for {report.classes}")
    recipe = recipe_of_weights(model.backbone.preprocessing)
    device = device or distributed.pick_device()
    (model,) = _prepare(recipe, device, model)
    return Trained(model, model, backbone, model.backbone.options, names, recipe, device)


def _prepare(recipe: Recipe, device: torch.device, *models: nn.Module) -> list[nn.Module]:
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return [model.to(device, memory_format=memory_format).eval() for model in models]


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of scripts that use a trained classifier: which one, and where it runs."""
    source = parser.add_mutually_exclusive_group(required=True)
    add = parser.add_argument
    source.add_argument("--checkpoint", type=Path, help="last.pt of a run of scripts/train.py")
    source.add_argument("--backbone", help="a name of backbones.list_models(), with --weights")
    add("--weights", help="weights of --backbone: a file, or a name of backbones.list_weights()")
    add("--option", action="append", default=[], type=backbone_option, metavar="KEY=VALUE",
        help="an option of --backbone, such as act=mish; repeatable")  # fmt: skip
    add("--class-names", metavar="PATH", help="a line per class: a name, or a wnid and its words, "
        "such as LOC_synset_mapping.txt (default: ImageNet's)")  # fmt: skip


def open_network(args: argparse.Namespace, device: torch.device | None = None) -> Trained:
    """The classifier of the options of `add_network_arguments`."""
    if args.checkpoint:
        if args.weights or args.option:
            raise ValueError("--weights and --option are for --backbone; a checkpoint has its own")
        return load_trained(args.checkpoint, device)
    if not args.weights:
        raise ValueError(f"--backbone {args.backbone} needs --weights: a file or a published name")
    return load_published(args.backbone, args.weights, dict(args.option), args.class_names, device)
