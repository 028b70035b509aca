"""The drawn sample: the shape of the Kaggle download, the same bytes, and no shortcut by colour.

What the files must be is written out here after the download, never taken from `utils.data.sample`.
"""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.data import sample
from utils.data.imagenet import check_layout, sort_val

ROOT = Path(__file__).resolve().parents[1]
PER_CLASS = {"train": 20, "val": 10}
COUNTS = {"train_per_class": 20, "val_per_class": 10}
TINY = {"train_per_class": 2, "val_per_class": 1}
WNIDS = [f"n9{number:07d}" for number in range(1, 11)]
DATA = Path("ILSVRC/Data/CLS-LOC")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A draw with all kinds of images; read only."""
    root = tmp_path_factory.mktemp("sample") / "new" / "folder"
    assert sample.draw(root, seed=3, **COUNTS) == root / DATA
    return root


def files(root):
    """Relative path -> hash of each file below a folder."""
    found = (path for path in root.rglob("*") if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def snapshot(path):
    """Everything below a path, or the path itself, with inode, time of change and bytes."""
    return {
        each: (each.lstat().st_ino, each.lstat().st_mtime_ns, each.is_file() and each.read_bytes())
        for each in [path, *path.rglob("*")]
    }


def boxes(root, split):
    """Image id -> (wnid, box) from a solution file, each line checked to be as in Kaggle's."""
    header, *lines, end = (root / f"LOC_{split}_solution.csv").read_text().split("\n")
    assert (header, end) == ("ImageId,PredictionString", "")
    rows = {}
    for line in lines:
        match = re.fullmatch(r"(\w+),(n\d{8}) (\d+) (\d+) (\d+) (\d+) ", line)
        assert match, f"unlike Kaggle's: {line!r}"
        assert match[1] not in rows, f"{match[1]} stands there twice"
        rows[match[1]] = match[2], tuple(map(int, match.groups()[2:]))
    return rows


def path_of(root, split, image_id, wnid):
    """Where the Kaggle download keeps an image: val/ is flat."""
    folder = root / DATA / split
    return (folder / wnid if split == "train" else folder) / f"{image_id}.JPEG"


# ---- layout ------------------------------------------------------------------------------------


def test_the_layout_is_kaggles(drawn):
    """Class folders in train/, a flat val/, two solution files, the names, our marker: no more."""
    train = {f"{DATA}/train/{wnid}/{wnid}_{i}.JPEG" for wnid in WNIDS for i in range(20)}
    val = {f"{DATA}/val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 101)}
    tables = {"LOC_train_solution.csv", "LOC_val_solution.csv", "LOC_synset_mapping.txt"}
    assert files(drawn).keys() == train | val | tables | {"sample.json", ".lock"}


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_solution_file_names_each_image_once_with_a_box_inside_it(drawn, split):
    """Ids against files, ids against classes, boxes against image sizes."""
    rows = boxes(drawn, split)
    paths = {path_of(drawn, split, image, wnid): box for image, (wnid, box) in rows.items()}
    assert set(paths) == set((drawn / DATA / split).rglob("*.JPEG"))
    for path, (x1, y1, x2, y2) in paths.items():
        with Image.open(path) as image:
            width_px, height_px = image.size
        assert 0 <= x1 < x2 <= width_px, path
        assert 0 <= y1 < y2 <= height_px, path
        assert 72 <= min(width_px, height_px) <= 128, path
    wnids = [wnid for wnid, _ in rows.values()]
    assert {wnid: wnids.count(wnid) for wnid in wnids} == dict.fromkeys(WNIDS, PER_CLASS[split])


def test_val_is_mixed(drawn):
    """The number of an image must not tell its class, as it does not in ImageNet."""
    wnids = [wnid for wnid, _ in boxes(drawn, "val").values()]
    blocks = [tuple(wnids[start : start + 10]) for start in range(0, 100, 10)]
    assert all(set(block) == set(WNIDS) for block in blocks)
    assert len(set(blocks)) > 6


def test_the_synset_mapping_names_each_class(drawn):
    """Lines of "<wnid> <names>", in order, every name different."""
    lines = (drawn / "LOC_synset_mapping.txt").read_text().splitlines()
    wnids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert list(wnids) == WNIDS
    assert len({*names}) == 10
    assert all(name.strip() for name in names)


def test_images_come_in_all_colour_modes(drawn):
    """Mostly RGB, a few grayscale, one CMYK in each split; all of them decode."""
    for split, count in (("train", 200), ("val", 100)):
        modes = []
        for path in (drawn / DATA / split).rglob("*.JPEG"):
            with Image.open(path) as image:
                image.load()
                assert image.format == "JPEG"
                modes.append(image.mode)
        assert set(modes) == {"RGB", "L", "CMYK"}
        assert modes.count("CMYK") == 1
        assert modes.count("L") <= 0.1 * count


# ---- what is in the images ---------------------------------------------------------------------


def test_colour_does_not_tell_the_class():
    """Nearest class mean on the mean colour, learnt on half, stays near the chance of 10 %."""
    means = np.array(
        [
            [
                np.asarray(sample.render(np.random.default_rng((9, label, i)), label)[0])
                .mean(axis=(0, 1))
                .tolist()
                for i in range(40)
            ]
            for label in range(10)
        ]
    )
    learnt = means[:, :20].mean(axis=1)
    distances = np.linalg.norm(means[:, 20:, None] - learnt, axis=3)
    accuracy = (distances.argmin(axis=2) == np.arange(10)[:, None]).mean()
    assert accuracy < 0.19  # four standard deviations of 200 guesses above 0.1


def test_the_box_is_that_of_the_object(monkeypatch):
    """A white object on black ground, nothing else drawn: the box holds it and fits it."""
    shades = []

    def flat(_rng, size_px, *_colours):
        """Black for the ground, which is asked for first, then white for the object."""
        shades.append("white" if shades else "black")
        return Image.new("RGB", size_px, shades[-1])

    monkeypatch.setattr(sample, "_texture", flat)
    monkeypatch.setattr(sample, "_scatter", lambda *_: None)
    monkeypatch.setattr(sample, "_cover", lambda *_: None)
    for seed in range(60):
        shades.clear()
        image, box = sample.render(np.random.default_rng(seed), seed % 10)
        ys, xs = np.nonzero(np.asarray(image.convert("L")) > 100)
        # Edges and blurred tips are gray, so the bright part may end a little before the box.
        x1, y1, x2, y2 = box
        shortfall = np.array([xs.min() - x1, ys.min() - y1, x2 - xs.max() - 1, y2 - ys.max() - 1])
        assert shortfall.min() >= -1, (seed, box)
        assert shortfall.max() <= 5, (seed, box)


# ---- the same bytes ----------------------------------------------------------------------------


def test_same_seed_same_bytes(drawn, tmp_path):
    """Also under another working directory and whatever was drawn before."""
    sample.draw(tmp_path, seed=3, **COUNTS)
    assert files(tmp_path) == files(drawn)


def test_another_seed_draws_other_images(tmp_path):
    """Every image differs; the file names are the same."""
    one, other = tmp_path / "one", tmp_path / "other"
    sample.draw(one, seed=0, **TINY)
    sample.draw(other, seed=1, **TINY)
    names = {path.name for path in one.rglob("*.JPEG")}
    assert names == {path.name for path in other.rglob("*.JPEG")}
    images = [{h for p, h in files(root).items() if p.endswith("JPEG")} for root in (one, other)]
    assert [len(hashes) for hashes in images] == [30, 30]
    assert not images[0] & images[1]


def test_a_small_draw_begins_a_larger_one(drawn, tmp_path):
    """Images, numbers and the order of the solution files."""
    sample.draw(tmp_path, seed=3, **TINY)
    small, large = files(tmp_path), files(drawn)
    images = {path for path in small if path.endswith("JPEG")}
    assert len(images) == 30
    assert {path: small[path] for path in images} == {path: large.get(path) for path in images}
    for split in ("train", "val"):
        name = f"LOC_{split}_solution.csv"
        assert (drawn / name).read_text().startswith((tmp_path / name).read_text())


# ---- drawing again -----------------------------------------------------------------------------


def test_a_second_draw_changes_nothing_even_after_sorting(tmp_path):
    """Inodes, times and bytes; sorted images must not come back flat."""
    data = sample.draw(tmp_path, **TINY)
    before = snapshot(tmp_path)
    assert sample.draw(tmp_path, **TINY) == data
    assert snapshot(tmp_path) == before

    sort_val(tmp_path / "LOC_val_solution.csv", data / "val")
    assert check_layout(data) == WNIDS
    before = snapshot(tmp_path)
    assert sample.draw(str(tmp_path), **TINY) == data
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("images_before", [0, 13, 29])
def test_an_unfinished_draw_is_finished(tmp_path, monkeypatch, images_before):
    """Stopped while writing an image: the next call ends in the bytes of an undisturbed one."""
    save, count = sample._save, iter(range(100))

    def stop(rng, image, path, **options):
        """Writes half an image and stops, as a kill does."""
        save(rng, image, path, **options)
        if next(count) == images_before:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    sample.draw(whole, **TINY)
    monkeypatch.setattr(sample, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        sample.draw(stopped, **TINY)
    monkeypatch.undo()
    assert files(stopped) != files(whole)
    with pytest.raises(ValueError, match="other settings"):
        sample.draw(stopped, seed=1, **TINY)
    sample.draw(stopped, **TINY)
    assert files(stopped) == files(whole)


# ---- refusals ----------------------------------------------------------------------------------


def occupy(path, how):
    """Puts into the way what `draw` must not touch."""
    if how == "is a file":
        path.write_text("mine")
    elif how == "another sample":
        sample.draw(path, seed=5, **TINY)
    elif how == "another size":
        sample.draw(path, train_per_class=1, val_per_class=1)
    else:
        (path / "ILSVRC").mkdir(parents=True)
        (path / {"foreign": "thesis.tex", "foreign marker": "sample.json"}[how]).write_text("{}")


WAYS = ["foreign", "foreign marker", "is a file", "another sample", "another size"]


@pytest.mark.parametrize("how", WAYS)
def test_what_is_not_ours_is_refused_and_kept(tmp_path, how):
    """One line with the path, and nothing changed."""
    root = tmp_path / "taken"
    occupy(root, how)
    before = snapshot(root)
    with pytest.raises(ValueError, match=re.escape(str(root))) as error:
        sample.draw(root, **TINY)
    assert "\n" not in str(error.value)
    assert snapshot(root) == before


@pytest.mark.parametrize("bad", [{"seed": -1}, {"train_per_class": 0}, {"val_per_class": -3}])
def test_numbers_out_of_range_are_refused(tmp_path, bad):
    """Before anything is made."""
    with pytest.raises(ValueError, match="images per class 1 or more"):
        sample.draw(tmp_path / "new", **TINY | bad)
    assert not (tmp_path / "new").exists()


# ---- the command line --------------------------------------------------------------------------


def test_the_command_draws(tmp_path, monkeypatch, capsys):
    """0, the folder on stdout; the seed is passed on."""
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args, **named: draw(*args, **named, **TINY))
    assert sample.main([str(tmp_path / "a"), "--seed", "4"]) == 0
    assert str(tmp_path / "a" / DATA) in capsys.readouterr().out
    draw(tmp_path / "b", seed=4, **TINY)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("how", ["foreign", "below a file"])
def test_the_command_refuses_with_one_line(tmp_path, how):
    """2, nothing on stdout, one line with the path on stderr, nothing changed."""
    taken = tmp_path / "taken"
    occupy(taken, "is a file" if how == "below a file" else how)
    root = taken / "new" if how == "below a file" else taken
    before = snapshot(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "utils.data.sample", str(root)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"error: .*{re.escape(str(root))}.*\n", done.stderr)
    assert snapshot(tmp_path) == before
