"""Datasets: layouts, labels, boxes in numbers, augmentation that moves boxes with their pixels, order of samples."""

import json
import math
from collections import Counter

import coco_files
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from detr import transforms
from detr.data import DetectionDataset, TrainingStream, collate, in_groups, make_loader
from detr.errors import DataError
from detr.formats import open_dataset
from detr.presets import preset
from detr.run import Run
from detr.splits import dataset_of, load_split
from detr.synth import write_dataset
from detr.transforms import MEAN, STD, RandomWindow, Transform, evaluation_transform, training_transform

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    root = tmp_path_factory.mktemp("synthetic")
    write_dataset(root, 10, 1, 64, 0)
    return load_split(root, "train")


@pytest.mark.parametrize(
    ("json_name", "folder"),
    [
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/instances_val.json", "images/val"),
        ("annotations/instances_val.json", "val"),
        ("instances_val.json", "val"),
    ],
)
def test_layouts(tmp_path, json_name, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / json_name).parent.mkdir(exist_ok=True)
    data = coco_files.content()
    files = coco_files.write(tmp_path / "flat", data, "val")
    files[0].rename(tmp_path / json_name)
    (tmp_path / folder).rmdir()
    files[1].rename(tmp_path / folder)
    dataset = open_dataset(tmp_path)
    assert (dataset.title, dataset.splits) == ("COCO", ["val"])
    split = load_split(dataset, "val")
    assert (split.source, split.image_dir) == (tmp_path / json_name, tmp_path / folder)


def test_names_given_by_the_user_win(tmp_path):
    coco_files.write(tmp_path)
    other = coco_files.content()
    other["images"] = other["images"][:1]
    other["annotations"] = [a for a in other["annotations"] if a["image_id"] == 5]
    json_path, folder = coco_files.write(tmp_path / "other", other)
    named = dataset_of({"data": tmp_path, "train_json": json_path, "train_images": "other/train"})
    split = load_split(named)
    assert (split.source, split.image_dir, len(split.images)) == (json_path, folder, 1)
    split = load_split(dataset_of({"data": tmp_path, "train_images": tmp_path / "train"}))
    assert (split.source, len(split.images)) == (tmp_path / "instances_train.json", 3)
    for split in ("train", "val"):  # whatever else is there
        with pytest.raises(DataError, match=rf"no COCO json of the split '{split}': looked for nothing\.json$"):
            dataset_of({"data": tmp_path, f"{split}_json": "nothing.json"})
    # of an unusual split the images alone
    coco_files.write(tmp_path, other, "mini")
    folder = (tmp_path / "mini").rename(tmp_path / "pictures")
    split = load_split(dataset_of({"data": tmp_path}, {"mini": (None, folder)}), "mini")
    assert (split.source, split.image_dir) == (tmp_path / "instances_mini.json", folder)


def test_a_split_called_valid_is_that_of_the_validation(tmp_path):
    coco_files.write(tmp_path)
    coco_files.write(tmp_path, split="valid")
    dataset = open_dataset(tmp_path)
    assert dataset.splits == ["train", "val"]
    assert load_split(dataset, "val").source == tmp_path / "instances_valid.json"


def test_labels_follow_the_ids_and_boxes_the_json(tmp_path):
    split = coco_files.load(coco_files.write(tmp_path))
    assert split.categories == {3: "ant", 17: "owl", 90: "zebra"}
    assert list(split.categories) == [3, 17, 90]
    first, second, third = split.images
    assert [image.image_id for image in split.images] == [5, 2, 9]
    assert first.boxes.tolist() == [[4, 6, 14, 18], [20.5, 10, 40, 30], [1, 1, 31, 21]]
    assert first.labels.tolist() == [2, 1, 0]
    assert first.areas.tolist() == [100, 390, 600]  # of the json, or of the box
    assert first.crowd.tolist() == [False, False, True]
    assert (second.path, second.width, second.height) == (tmp_path / "train/sub/b.png", 20, 50)
    assert second.boxes.tolist() == [[0, 0, 20, 50]] and second.labels.tolist() == [0]
    assert third.boxes.shape == (0, 4) and third.labels.dtype == torch.int64


def test_boxes_that_stick_out_by_rounding_are_clipped(tmp_path):
    data = coco_files.content()
    data["annotations"] = [{"id": 1, "image_id": 5, "category_id": 3, "bbox": [-0.75, 2, 41.5, 29]}]
    split = coco_files.load(coco_files.write(tmp_path, data))
    assert split.images[0].boxes.tolist() == [[0, 2, 40, 30]]


def test_the_labels_of_another_set_of_categories(tmp_path):
    files = coco_files.write(tmp_path)
    known = {3: "ant", 4: "bee", 17: "owl", 90: "zebra"}
    assert coco_files.load(files, known).images[0].labels.tolist() == [3, 2, 0]
    for categories, message in (
        ({3: "ant", 17: "owl"}, "category 90: name: expected no such category, got 'zebra'"),
        (known | {17: "elk"}, "category 17: name: expected 'elk', got 'owl'"),
    ):
        with pytest.raises(DataError, match=f"instances_train.json: {message}"):
            coco_files.load(files, categories)


def test_item_in_numbers(tmp_path):
    split = coco_files.load(coco_files.write(tmp_path))
    image, target = DetectionDataset(split, evaluation_transform())[0]
    stored = np.asarray(Image.open(tmp_path / "train/a.png")).transpose(2, 0, 1) / 255
    expected = (stored - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    assert image.dtype == torch.float32 and type(image) is torch.Tensor
    np.testing.assert_allclose(image, expected, atol=1e-6)
    expected = [[9 / 40, 12 / 30, 10 / 40, 12 / 30], [30.25 / 40, 20 / 30, 19.5 / 40, 20 / 30]]
    assert type(target["boxes"]) is torch.Tensor
    torch.testing.assert_close(target["boxes"], torch.tensor(expected))
    assert target["labels"].tolist() == [2, 1]  # the crowd is no target
    assert target["image_id"] == 5 and target["orig_size"].tolist() == [30, 40]


def test_resized_and_kept_in_memory(tmp_path, monkeypatch):
    split = coco_files.load(coco_files.write(tmp_path))
    dataset = DetectionDataset(split, evaluation_transform(), (15, 30))
    shapes = [tuple(image.shape) for image, _ in dataset]
    # 40x30 by a half; 20x50 would be 15x37.5 but for the longest side; 16x16
    assert shapes == [(3, 15, 20), (3, 30, 12), (3, 15, 15)]
    monkeypatch.setattr("detr.data.CACHE_BYTES", 3 * (300 + 360 + 225) - 1)
    uncached = DetectionDataset(split, evaluation_transform(), (15, 30))
    assert dataset.cache is not None and uncached.cache is None
    for (image, target), (same, same_target) in zip(dataset, uncached, strict=True):
        torch.testing.assert_close(image, same, rtol=0, atol=0)
        torch.testing.assert_close(target, same_target, rtol=0, atol=0)
    torch.testing.assert_close(dataset[1][1]["boxes"], torch.tensor([[0.5, 0.5, 1.0, 1.0]]))
    assert dataset[1][1]["orig_size"].tolist() == [50, 20]


def test_a_damaged_image_is_named_when_it_is_wanted(tmp_path):
    split = coco_files.load(coco_files.write(tmp_path))
    path = split.images[2].path
    path.write_bytes(path.read_bytes()[:-200])
    message = f"instances_train.json: image 9: {path}: not a readable image"
    for resize_to in ((16, 32), None):  # kept in memory, and not
        dataset = DetectionDataset(split, evaluation_transform(), resize_to)
        assert dataset[0][1]["image_id"] == 5
        with pytest.raises(DataError, match=message):
            dataset[2]


def test_flip_moves_boxes_with_pixels(tmp_path):
    split = coco_files.load(coco_files.write(tmp_path))
    plain, target = DetectionDataset(split, evaluation_transform())[0]
    dataset = DetectionDataset(split, training_transform(preset("tiny", augment="tiny")))
    flips = 0
    for seed in range(16):
        torch.manual_seed(seed)
        image, moved = dataset[0]
        flipped = not torch.equal(image, plain)
        flips += flipped
        expected = target["boxes"].clone()
        if flipped:
            expected[:, 0] = 1 - expected[:, 0]
        torch.testing.assert_close(image, plain.flip(2) if flipped else plain, rtol=0, atol=0)
        torch.testing.assert_close(moved["boxes"], expected)
        assert moved["labels"].tolist() == [2, 1]
    assert 3 <= flips <= 13


def test_multi_scale_and_crop_keep_boxes_on_their_objects():
    config = preset("deformable_detr_r50", image_size=160, max_size=220)
    transform = training_transform(config)
    image = torch.zeros(3, 90, 200, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 10.0, 50.0, 40.0], [140.0, 30.0, 190.0, 85.0]])
    for channel, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        image[channel, y0:y1, x0:x1] = 255
    seen, widths = set(), set()
    for seed in range(60):
        torch.manual_seed(seed)
        out, moved, labels = transform(image, boxes, torch.tensor([0, 1]))
        height, width = out.shape[1:]
        widths.add((height, width))
        assert min(height, width) <= 160 and max(height, width) <= 220
        pixels = out * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        for box, label in zip(moved.tolist(), labels.tolist(), strict=True):
            inside = pixels[label] > 0.5
            rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
            extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert max(abs(float(a) - b) for a, b in zip(extent, box, strict=True)) < 1.5
        seen.add(tuple(labels.tolist()))
    assert {(0, 1), (0,), (1,)} <= seen  # crops lose objects together with their labels
    assert len(widths) > 15


def test_a_window_keeps_boxes_on_their_objects():
    window = RandomWindow()
    image = torch.zeros(3, 90, 200, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 10.0, 50.0, 40.0], [140.0, 30.0, 190.0, 85.0]])
    for channel, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
        image[channel, y0:y1, x0:x1] = 255
    seen, sides = set(), []
    for seed in range(80):
        torch.manual_seed(seed)
        given = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(90, 200))
        found = window({"image": tv_tensors.Image(image), "boxes": given, "labels": torch.tensor([0, 1])})
        assert found["image"].shape == image.shape
        for box, label in zip(found["boxes"].tolist(), found["labels"].tolist(), strict=True):
            inside = found["image"][label] > 127
            rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
            extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            assert max(abs(float(a) - b) for a, b in zip(extent, box, strict=True)) < 2
            if label == 0 and box[0] > 1 and box[1] > 1 and box[2] < 199 and box[3] < 89:
                sides.append(((box[2] - box[0]) / 30, (box[3] - box[1]) / 30))
        seen.add(tuple(found["labels"].tolist()))
    assert {(0, 1), (0,), (1,)} <= seen  # less than a third of an object is none
    # windows of 1.4 to 0.6 times the image make objects of 0.7 to 1.7, each side up to 1.2 times more or less; the
    # largest are seldom whole
    across, down = np.array(sides).T
    for side in (across, down):
        assert 0.59 < side.min() < 0.75 and 1.25 < side.max() < 2.01
    assert 0.6 < (across / down).min() < 0.8 and 1.25 < (across / down).max() < 1.5


@pytest.mark.parametrize(
    ("box", "stays"),
    [([0.0, 0.0, 40.0, 60.0], False), ([0.0, 0.0, 92.9, 60.0], False), ([0.0, 0.0, 95.0, 60.0], True),
     ([0.0, 0.0, 120.0, 60.0], True), ([60.0, 0.0, 90.0, 60.0], True)],
)  # fmt: skip
def test_a_box_stays_if_enough_of_it_is_seen(box, stays, monkeypatch):
    # the window is the right two thirds: of 40 columns none is seen, of 92.9 29 %, of 95 30.5 %, of 120 45 %
    draws = iter([math.log(2 / 3), 0.0, 0.0, 66.0])
    monkeypatch.setattr(RandomWindow, "_draw", staticmethod(lambda low, high: next(draws)))
    given = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=(90, 200))
    found = RandomWindow()(
        {"image": tv_tensors.Image(torch.zeros(3, 90, 200)), "boxes": given, "labels": torch.tensor([3])}
    )
    assert found["labels"].tolist() == [3] * stays and found["boxes"].shape == (int(stays), 4)
    if stays:
        assert found["boxes"][0].tolist() == pytest.approx(
            [max(0.0, box[0] - 66) * 200 / 133, 0, (box[2] - 66) * 200 / 133, 90], abs=1e-3
        )


@pytest.mark.parametrize("changes", [{}, {"augment": "tiny"}, {"augment": "official"}])
def test_augmenting_an_image_without_objects(changes):
    transform = training_transform(preset("tiny", image_size=64, max_size=100, **changes))
    for seed in range(8):
        torch.manual_seed(seed)
        _, boxes, labels = transform(
            torch.zeros(3, 50, 70, dtype=torch.uint8), torch.zeros(0, 4), torch.zeros(0).long()
        )
        assert boxes.shape == (0, 4) and labels.shape == (0,)


def image_ids(stream, samples):
    return [stream[n][1]["image_id"] for n in samples]


def test_stream_visits_every_image_once_an_epoch(synthetic):
    stream = TrainingStream(DetectionDataset(synthetic, evaluation_transform(), (32, 32)), seed=1)
    epochs = [image_ids(stream, range(10 * e, 10 * e + 10)) for e in range(3)]
    assert all(sorted(epoch) == list(range(1, 11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other = TrainingStream(stream.dataset, seed=2)
    assert image_ids(other, range(10)) != epochs[0]


def test_the_first_passes_have_a_transform_of_their_own(synthetic):
    dataset = DetectionDataset(synthetic, lambda image, boxes, labels: (image + 1, boxes, labels), (32, 32))
    early = (lambda image, boxes, labels: (image - image, boxes, labels), 2)
    stream = TrainingStream(dataset, seed=1, early=early)
    for n in (0, 19, 20, 35, 7):
        image, target = stream[n]
        plain, _ = dataset.item(target["image_id"] - 1, lambda *sample: sample)
        assert torch.equal(image, plain + 1 if n >= 20 else torch.zeros_like(plain))
    # that of the preset: as they are, with flips, eight times
    transform, passes = transforms.early(preset("tiny"))
    assert passes == 8 and transforms.early(preset("tiny", augment="tiny")) == (None, 0)
    image = torch.arange(12, dtype=torch.uint8).reshape(1, 3, 4).expand(3, -1, -1)
    expected = evaluation_transform()(image, torch.zeros(0, 4), torch.zeros(0).long())[0]
    for seed in range(20):
        torch.manual_seed(seed)
        found = transform(image, torch.zeros(0, 4), torch.zeros(0).long())[0]
        assert torch.equal(found, expected) or torch.equal(found, expected.flip(2))


def test_half_of_the_images_are_seen_through_a_window(synthetic):
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    nothing = torch.zeros(0, 4), torch.zeros(0).long()
    plain = evaluation_transform()(image, *nothing)[0]
    transform, kinds = training_transform(preset("tiny")), Counter()
    for seed in range(800):
        torch.manual_seed(seed)
        found = transform(image, *nothing)[0]
        known = {"as it is": plain, "flip": plain.flip(2)}
        kinds[next((name for name, image in known.items() if torch.equal(found, image)), "window")] += 1
    assert abs(kinds["window"] - 400) < 45 and min(kinds["flip"], kinds["as it is"]) > 160


@pytest.mark.parametrize("groups", [True, False])
def test_a_trainer_asks_for_early_passes_and_groups(synthetic, groups):
    config = preset("tiny", image_size=32, max_size=64, batch_size=4, steps=80, shape_groups=groups)
    run = Run(config, synthetic, CPU)
    images = len(run.dataset)
    marks = []
    run.dataset.transform = lambda *sample: (marks.append(1), evaluation_transform()(*sample))[1]
    # as if every second one were tall
    run.dataset.sizes = lambda indices: [(40, 30) if i % 2 else (30, 40) for i in indices]
    of_one_shape = 0
    for step, [(_, _, targets)] in enumerate(run.batches()):
        assert len(marks) == max(0, 4 * (step + 1) - 8 * images)
        of_one_shape += len({target["image_id"] % 2 for target in targets}) == 1
    # by chance it is about one batch in ten; those that two epochs share are mixed
    assert step == 79 and (of_one_shape > 40 if groups else of_one_shape < 20)


def test_groups_of_one_shape():
    class Sizes:
        shapes = tuple((30, 20) if i % 3 == 0 else (20, 30) for i in range(50))

        def __len__(self):
            return 50

        def sizes(self, indices):
            return [self.shapes[i] for i in indices]

        def __getitem__(self, index):
            return index, {}

    dataset = Sizes()
    stream = TrainingStream(dataset, 3, group=8)
    order = [stream[n][0] for n in range(400)]
    assert all(sorted(order[e : e + 50]) == list(range(50)) for e in range(0, 400, 50))
    batches = [order[b : b + 8] for b in range(0, 400, 8)]
    mixed = [len({dataset.shapes[i] for i in batch}) > 1 for batch in batches]
    # a batch that two epochs share, and at the end of each what fills none: 14 or fewer of 50 images
    assert sum(mixed) <= 2 * 8
    tall = [dataset.shapes[batch[0]] == (30, 20) for batch, m in zip(batches, mixed, strict=True) if not m]
    assert 8 <= sum(tall) < len(tall) and tall != sorted(tall) and order[:50] != order[50:100]
    # the groups are in random order, and all are full
    tall, orders = np.arange(64) < 32, set()
    for seed in range(8):
        found = tall[in_groups(np.arange(64), tall, 8, torch.Generator().manual_seed(seed))].reshape(8, 8)
        assert (found == found[:, :1]).all()
        orders.add(tuple(found[:, 0].tolist()))
    assert len(orders) > 4
    # whatever the number of processes, and from any start
    two = [TrainingStream(dataset, 3, batch=4, rank=rank, world=2, group=8) for rank in range(2)]
    assert [two[b % 2][b // 2 * 4 + i][0] for b in range(100) for i in range(4)] == order
    assert TrainingStream(dataset, 3, group=8)[333][0] == order[333]


def test_a_sample_depends_on_its_number_and_the_seed_only(synthetic):
    config = preset("deformable_detr_r50", image_size=64, max_size=80)
    stream = TrainingStream(DetectionDataset(synthetic, training_transform(config)), seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    samples = [stream[n] for n in range(25)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = TrainingStream(stream.dataset, seed=1)
    for n in (24, 3, 17, 3):
        for a, b in zip(samples[n], again[n], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    # the same image in another epoch is augmented in another way
    assert len({tuple(image.shape) for image, target in samples if target["image_id"] == 1}) > 1


def test_workers_and_starting_point_do_not_change_the_batches(synthetic):
    config = preset("tiny", image_size=32, max_size=32)
    stream = TrainingStream(DetectionDataset(synthetic, training_transform(config), (32, 32)), seed=1)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    batches = [range(b, b + 4) for b in range(0, 24, 4)]
    whole = list(make_loader(stream, batches, CPU, 0))
    for workers in (0, 2):
        rest = list(make_loader(stream, batches[2:], CPU, workers))
        torch.testing.assert_close(rest, whole[2:], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_collate_pads_at_the_right_and_bottom():
    images = [torch.full((3, 2, 5), 1.0), torch.full((3, 4, 3), 2.0)]
    batch, mask, targets = collate([(image, {"image_id": i}) for i, image in enumerate(images)])
    assert batch.shape == (2, 3, 4, 5) and mask.shape == (2, 4, 5) and mask.dtype == torch.bool
    assert (~mask).sum((1, 2)).tolist() == [10, 12]
    assert not mask[0, :2].any() and not mask[1, :, :3].any()
    assert (batch[0, :, :2] == 1).all() and (batch[1, :, :, :3] == 2).all()
    assert (batch * mask[:, None] == 0).all()
    assert [target["image_id"] for target in targets] == [0, 1]


def test_transform_leaves_its_inputs_alone():
    image, boxes = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8), torch.tensor([[1.0, 2.0, 5.0, 6.0]])
    copies = image.clone(), boxes.clone()
    training = training_transform(preset("tiny"))
    for transform in (Transform(), training, training, training):
        transform(image, boxes, torch.tensor([0]))
    assert torch.equal(image, copies[0]) and torch.equal(boxes, copies[1])


def test_a_json_with_text_beyond_ascii(tmp_path):
    data = json.loads(json.dumps(coco_files.content()).replace("zebra", "zèbre"))
    assert coco_files.load(coco_files.write(tmp_path, data)).class_names == ["ant", "owl", "zèbre"]
