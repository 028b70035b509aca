"""Boxes read from COCO's format, against faster-coco-eval's reader and by hand."""

import itertools

import pytest
import torch
from faster_coco_eval import COCO
from helpers import write_coco
from PIL import Image

from utils.cli import DataError
from utils.data import sample
from utils.data.boxes import open_boxes
from utils.data.folders import Key
from utils.data.transforms import CorruptImageError

BOX = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 6, 10, 12.5]}
IMAGE = {"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}


def test_boxes_are_read_as_they_are_written(scenes):
    data = open_boxes(scenes)
    assert data.classes == [words.split(",")[0] for words in sample.CLASSES]
    coco = COCO(str(scenes / "annotations" / "instances_val.json"))
    assert len(data.val) == len(coco.getImgIds()) == 8
    for index in range(len(data.val)):
        image, target = data.val[Key(0, index)]
        assert (image.shape, image.dtype) == ((3, 128, 128), torch.uint8)
        written = coco.loadAnns(coco.getAnnIds(imgIds=index + 1))
        boxes = torch.tensor([entry["bbox"] for entry in written])
        boxes[:, 2:] += boxes[:, :2]
        assert torch.equal(target["boxes"], boxes.float())
        assert target["labels"].tolist() == [entry["category_id"] for entry in written]


def test_mirrored_images_have_mirrored_boxes(scenes):
    """Half of the training images, others in each epoch, the same for the same seed."""
    data, plain = open_boxes(scenes, seed=3).train, open_boxes(scenes, seed=3).train
    plain.flip, mirrored = False, []
    for epoch, index in itertools.product(range(4), range(len(data))):
        (image, target), (upright, expected) = data[Key(epoch, index)], plain[Key(epoch, index)]
        mirrored.append(not torch.equal(image, upright))
        boxes = expected["boxes"]
        if mirrored[-1]:
            assert torch.equal(image, upright.flip(2))
            boxes = torch.stack([128 - boxes[:, 2], boxes[:, 1], 128 - boxes[:, 0], boxes[:, 3]], 1)
        assert torch.equal(target["boxes"], boxes)
    assert 30 < sum(mirrored) < 66
    assert mirrored[:24] != mirrored[24:48]


def test_boxes_are_clipped_and_those_without_area_and_crowds_left_out(tmp_path, capsys):
    """The last has an area in float32, and none once it is mirrored."""
    boxes = [[5, 6, 10, 12.5], [30, -5, 20, 10], [5, 5, 0, 9], [50, 5, 9, 9], [1, 1, 5, 5]]
    boxes += [[30, 20, 10.5, 10], [1e300, 1, 1, 1], [1e-9, 5, 1e-9, 5]]
    entries = [
        {"id": k, "image_id": 7, "category_id": (3, 9)[k % 2], "bbox": box, "iscrowd": int(k == 4)}
        for k, box in enumerate(boxes)
    ]
    data = open_boxes(write_coco(tmp_path, annotations=entries))
    assert data.classes == ["ant", "cat"]  # in the order of ids
    (target,) = data.train.targets
    assert target["boxes"].tolist() == [[5, 6, 15, 18.5], [30, 0, 40, 5], [30, 20, 40, 30]]
    assert target["labels"].tolist() == [1, 2, 2]
    (line,) = capsys.readouterr().err.splitlines()
    assert "instances_train.json: 5 of 7 boxes reach beyond their image or have no area" in line


def test_boxes_are_of_the_upright_image_of_the_size_in_the_annotations(tmp_path):
    """Otherwise they would train at other places, such as x = -420 in a mirrored image."""
    root = write_coco(tmp_path, images=[IMAGE | {"width": 30, "height": 40}])
    with pytest.raises(
        DataError, match=r"a\.jpg: 40 x 30 pixels upright, but its boxes are for 30 x 40"
    ):
        open_boxes(root).train[Key(0, 0)]
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 30)).save(root / "train" / "a.jpg", exif=exif)
    train = open_boxes(root).train
    train.flip = False
    image, target = train[Key(0, 0)]
    assert image.shape == (3, 40, 30)
    assert target["boxes"].tolist() == [[5, 6, 15, 18.5]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": [BOX | {"bbox": [1, 2, 3]}]}, r"not enough values .* 'bbox': \[1, 2, 3\]"),
        ({"annotations": [BOX | {"bbox": [1, 2, 3, float("nan")]}]}, "bbox must be finite in"),
        ({"annotations": []}, "no image has a box"),
        ({"annotations": [BOX | {"image_id": 8}]}, "unknown or missing 8 in .*'image_id': 8"),
        ({"images": [1]}, "in 1$"),
        ({"images": [{"id": 7, "width": 40, "height": 30}]}, "missing 'file_name' in {'id': 7"),
        ({"images": [IMAGE, IMAGE]}, "images and categories with different ids"),
        ({"categories": [{"id": 3, "name": "dog"}]}, "classes of train .* are not those of val"),
    ],
)
def test_bad_annotations_are_one_line_that_names_the_entry(tmp_path, changes, words):
    root = write_coco(tmp_path, **changes)
    with pytest.raises(DataError, match=words) as caught:
        open_boxes(root)
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_folders_and_broken_files_are_named(folders, tmp_path):
    with pytest.raises(DataError, match=r"0 files annotations/instances_train\*.json, needs one"):
        open_boxes(folders)
    root = write_coco(tmp_path)
    (root / "train" / "a.jpg").unlink()
    with pytest.raises(CorruptImageError, match=r"train/a.jpg"):
        open_boxes(root).train[Key(0, 0)]
    for text in ("{", "[]", "\xff"):
        (root / "annotations" / "instances_val.json").write_text(text)
        with pytest.raises(DataError, match=r"instances_val\.json: not valid in COCO's format"):
            open_boxes(root)
