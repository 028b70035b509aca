"""The drawn sample: the layout of the Kaggle download, the same bytes, and no shortcut by colour.

What the files must be is written out here after the download, never taken from `utils.data.sample`.
"""

import hashlib
import itertools
import multiprocessing
import os
import re
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data import sample
from utils.data.imagenet import check_layout, sort_val
from utils.records import LOCK_NAME, lock

PER_CLASS = {"train": 20, "val": 10}
TINY = {"train_per_class": 2, "val_per_class": 1}
FEW = {"train_images": 4, "val_images": 2}
WNIDS = [f"n9{number:07d}" for number in range(1, 11)]
DATA = Path("ILSVRC/Data/CLS-LOC")
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A draw with all kinds of images; read only."""
    root = tmp_path_factory.mktemp("sample") / "new" / "folder"
    assert sample.draw(root, seed=3, train_per_class=20, val_per_class=10) == root / DATA
    return root


def files(root):
    """Relative path -> bytes of each file below a folder, without the lock's."""
    found = (path for path in root.rglob("*") if path.is_file() and path.name != LOCK_NAME)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(found)}


def snapshot(path):
    """Everything below a path, or the path itself, with inode, time of change and bytes."""
    return {
        each: (each.lstat().st_ino, each.lstat().st_mtime_ns, each.is_file() and each.read_bytes())
        for each in [path, *path.rglob("*")]
    }


def test_the_layout_is_kaggles(drawn):
    """Class folders in train/, a flat val/, two solution files, the names, our marker: no more."""
    train = {f"{DATA}/train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(20)}
    val = {f"{DATA}/val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 101)}
    tables = {"LOC_train_solution.csv", "LOC_val_solution.csv", "LOC_synset_mapping.txt"}
    assert files(drawn).keys() == train | val | tables | {"sample.json"}
    lines = (drawn / "LOC_synset_mapping.txt").read_text().splitlines()
    wnids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert list(wnids) == WNIDS
    assert len({*names}) == 10


@pytest.mark.parametrize("split", ["train", "val"])
def test_solutions_name_each_image_once_with_a_box_inside_it(drawn, split):
    """Ids against files and classes, boxes against image sizes; three colour modes, one CMYK."""
    header, *lines, end = (drawn / f"LOC_{split}_solution.csv").read_text().split("\n")
    assert (header, end) == ("ImageId,PredictionString", "")
    seen, wnids, modes = set(), [], []
    for line in lines:
        match = re.fullmatch(r"(\w+),(n\d{8}) (\d+) (\d+) (\d+) (\d+) ", line)
        assert match, f"unlike Kaggle's: {line!r}"
        wnids.append(match[2])
        folder = drawn / DATA / split / (match[2] if split == "train" else "")  # val/ is flat
        seen.add(folder / f"{match[1]}.JPEG")
        x1, y1, x2, y2 = map(int, match.groups()[2:])
        with Image.open(folder / f"{match[1]}.JPEG") as image:
            image.load()
            assert image.format == "JPEG"
            modes.append(image.mode)
        assert 0 <= x1 < x2 <= image.width
        assert 0 <= y1 < y2 <= image.height
        assert 72 <= min(image.size) <= 128
    assert seen == set((drawn / DATA / split).rglob("*.JPEG"))
    assert len(seen) == len(lines) == 10 * PER_CLASS[split]
    blocks = {tuple(wnids[start : start + 10]) for start in range(0, len(wnids), 10)}
    assert all(set(block) == set(WNIDS) for block in blocks)
    assert len(blocks) > 6  # the number of an image does not tell its class
    assert modes.count("CMYK") == 1
    assert 0 < modes.count("L") <= 0.1 * len(modes)


def test_colour_does_not_tell_the_class():
    """Nearest class mean on the mean colour, learnt on half, stays near the chance of 10 %."""
    images = [
        sample.render(np.random.default_rng((9, label, i)), label)[0]
        for label, i in itertools.product(range(10), range(40))
    ]
    means = np.array([np.asarray(image).mean(axis=(0, 1)) for image in images]).reshape(10, 40, 3)
    learnt = means[:, :20].mean(axis=1)
    distances = np.linalg.norm(means[:, 20:, None] - learnt, axis=3)
    accuracy = (distances.argmin(axis=2) == np.arange(10)[:, None]).mean()
    assert accuracy < 0.19  # four standard deviations of 200 guesses above 0.1


def test_boxes_are_those_of_the_objects(monkeypatch):
    """White objects on black ground, nothing else drawn: the boxes hold all that is white, and each
    one's sides touch it."""
    shades = iter(())
    monkeypatch.setattr(sample, "_texture", lambda _, px, *__: Image.new("RGB", px, next(shades)))
    monkeypatch.setattr(sample, "_scatter", lambda *_: None)
    monkeypatch.setattr(sample, "_photograph", lambda _, canvas, *__: canvas.reduce(2))
    counts, labels = set(), set()
    for seed in range(60):
        for draw in (sample.render, sample.render_scene):
            shades = itertools.chain(["black"], itertools.repeat("white"))
            rng = np.random.default_rng(seed)
            image, found = draw(rng, seed % 10) if draw is sample.render else draw(rng)
            objects = [(seed % 10, found)] if draw is sample.render else found
            light = np.asarray(image.convert("L"))
            inside = np.zeros_like(light)
            for label, (x1, y1, x2, y2) in objects:
                assert 0 <= x1 < x2 <= image.width
                assert 0 <= y1 < y2 <= image.height
                inside[y1:y2, x1:x2] = 1
                part = light[y1:y2, x1:x2] > 0
                assert all(side.any() for side in (part[0], part[-1], part[:, 0], part[:, -1]))
                labels.add(label)
            assert not (light > 127)[inside == 0].any()  # shadows are darker
            counts.add(len(objects))
    assert counts == {1, 2, 3, 4}
    assert len(labels) == 10


def test_the_bytes_are_those_of_the_first_release(tmp_path):
    """Records and notebooks hold results on them."""
    sample.draw(tmp_path / "images", **TINY)
    sample.draw_scenes(tmp_path / "scenes", **FEW)
    for name, sha256 in (
        ("images", "2e89a818949f7eb1ad4a9b257a4d132b12514ade2f01ece3a950eb69a7f28ab9"),
        ("scenes", "413afa9ddb238cef183213a61c040ef1102c7cfb63d8708147a4b53a9cb1f73e"),
    ):
        found = files(tmp_path / name)
        content = b"".join(path.encode() + b"\0" + data for path, data in found.items())
        assert hashlib.sha256(content).hexdigest() == sha256


def test_a_small_draw_begins_a_larger_one(drawn, scenes, tmp_path):
    sample.draw(tmp_path / "small", seed=3, **TINY)
    sample.draw_scenes(tmp_path / "few", seed=1, **FEW)
    for small, large, count in (("small", drawn, 30), ("few", scenes, 6)):
        found = files(tmp_path / small).items()
        images = {path: x for path, x in found if path.lower().endswith(("jpeg", "jpg"))}
        assert len(images) == count
        assert images.items() <= files(large).items()


def test_a_second_draw_changes_nothing_even_after_sorting(tmp_path):
    """Inodes, times and bytes; sorted images must not come back flat."""
    data = sample.draw(tmp_path, **TINY)
    sort_val(tmp_path / "LOC_val_solution.csv", data / "val")
    assert check_layout(data) == WNIDS
    before = snapshot(tmp_path)
    assert sample.draw(str(tmp_path), **TINY) == data
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("draw", "counts", "images_before"),
    [(sample.draw, TINY, 13), (sample.draw_scenes, FEW, 5)],
)
def test_a_killed_draw_is_finished_by_one_that_waited(
    tmp_path, monkeypatch, draw, counts, images_before
):
    """It ends in the bytes of an undisturbed one; until then nobody else writes."""
    save, saved = sample._save, itertools.count()

    def die(rng, image, path, **options):
        """Writes half an image and dies."""
        save(rng, image, path, **options)
        if next(saved) == images_before:
            path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    complete, killed = tmp_path / "complete", tmp_path / "killed"
    draw(complete, **counts)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "_save", die)
        process = fork.Process(target=draw, args=(killed,), kwargs=counts)
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="other settings"):
        draw(killed, seed=1, **counts)
    half = files(killed)
    with lock(killed):
        second = fork.Process(target=draw, args=(killed,), kwargs=counts)
        second.start()
        second.join(0.3)
        assert files(killed) == half != files(complete)
    second.join()
    assert files(killed) == files(complete)


@pytest.mark.parametrize("name", ["thesis.tex", "sample.json", None])
def test_other_files_are_kept(tmp_path, capsys, name):
    """One line with the path, and nothing changed: a folder, another sample, or a file (None)."""
    root = tmp_path / "taken"
    if name:
        (root / "ILSVRC").mkdir(parents=True)
    (root / name if name else root).write_text("{}")
    before = snapshot(root)
    for draw in (sample.draw, sample.draw_scenes):
        with pytest.raises(ValueError, match=re.escape(str(root))) as error:
            draw(root)
        assert "\n" not in str(error.value)
    assert sample.main([str(root)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(rf"error: {re.escape(str(root))}.*\n", captured.err)
    assert snapshot(root) == before


def test_the_command_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "draw", partial(sample.draw, **TINY))
    assert sample.main([str(tmp_path / "new"), "--seed", "4"]) == 0
    assert str(tmp_path / "new" / DATA) in capsys.readouterr().out
    assert len([*tmp_path.rglob("*.JPEG")]) == 30
