"""Average precision by hand, against a plain use of pycocotools, and its pitfalls."""

import importlib.util
import json
from dataclasses import replace

import coco_files
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr.evaluate import EVALUATORS, STATS, coco_metrics, per_class_table
from detr.split import Annotated, Split

EMPTY = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


def found(boxes, labels, scores):
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}


def one_class_split(boxes, crowd=None):
    """One image of 100x100 pixels with boxes of the class "thing", id 7."""
    count = len(boxes)
    image = Annotated(
        *(1, None, 100, 100, torch.tensor(boxes), torch.zeros(count, dtype=torch.int64)),
        areas=torch.full((count,), 400.0, dtype=torch.float64),
        crowd=torch.tensor(crowd or [False] * count),
    )
    return Split(None, None, [image], {7: "thing"})


def assert_same_metrics(a, b, tolerance=1e-12):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same_metrics(value, b[key], tolerance)
        else:
            assert value == (value if value is None else pytest.approx(b[key], rel=0, abs=tolerance)), key


@pytest.fixture(params=EVALUATORS)
def evaluator(request):
    return request.param


def test_perfect_detections_have_ap_1_with_an_annotation_of_id_0(tmp_path, evaluator):
    data = coco_files.content()
    assert data["annotations"][0]["id"] == 0
    split = coco_files.load(coco_files.write(tmp_path, data))
    detections = {}
    for image in split.images:
        real = ~image.crowd
        detections[image.image_id] = found(
            image.boxes[real].tolist() or torch.zeros(0, 4).tolist(),
            image.labels[real].tolist(),
            [0.9] * int(real.sum()),
        )
        detections[image.image_id]["boxes"] = detections[image.image_id]["boxes"].reshape(-1, 4)
    metrics, table = coco_metrics(split, detections, evaluator)
    one = pytest.approx(1, abs=1e-12)
    assert (metrics["AP"], metrics["AP50"], metrics["AR100"]) == (one, one, one)
    assert {name: row["AP"] for name, row in metrics["per_class"].items()} == {"ant": one, "owl": one, "zebra": one}
    assert [row["boxes"] for row in metrics["per_class"].values()] == [1, 1, 1]
    assert "(AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = 1.000" in table


def test_no_detections_at_all(tmp_path, capsys, evaluator):
    split = coco_files.load(coco_files.write(tmp_path))
    for detections in ({}, {image.image_id: EMPTY for image in split.images}):
        metrics, table = coco_metrics(split, detections, evaluator)
        assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == 0.0
        assert "maxDets=100 ] = 0.000" in table
        assert all(row["AP"] == 0.0 and row["best_f1"] == 0.0 for row in metrics["per_class"].values())
    assert capsys.readouterr().out == ""  # pycocotools is kept quiet


def test_average_precision_by_hand(evaluator):
    split = one_class_split([[0.0, 0.0, 20.0, 20.0], [50.0, 50.0, 70.0, 70.0]])
    # best first: IoU 0.72 with the first object, nothing, IoU 1 with the second
    boxes = [[0.0, 0.0, 20.0, 14.4], [80.0, 80.0, 90.0, 90.0], [50.0, 50.0, 70.0, 70.0]]
    metrics, _ = coco_metrics(split, {1: found(boxes, [0, 0, 0], [0.9, 0.8, 0.7])}, evaluator)
    # precision 1 up to recall 0.5 (51 of the 101 recall thresholds), then 2/3
    at_50 = (51 + 50 * 2 / 3) / 101
    # at IoU 0.75 and above only the third is right: precision 1/3 up to recall 0.5
    at_75 = 51 / 3 / 101
    assert metrics["AP50"] == pytest.approx(at_50)
    assert metrics["AP75"] == pytest.approx(at_75)
    assert metrics["AP"] == pytest.approx((5 * at_50 + 5 * at_75) / 10)
    assert metrics["AR1"] == pytest.approx(5 * 0.5 / 10)
    assert metrics["AR100"] == pytest.approx((5 * 1 + 5 * 0.5) / 10)
    row = metrics["per_class"]["thing"]
    assert row["AP"] == pytest.approx(metrics["AP"]) and row["AP50"] == pytest.approx(at_50)
    # all three kept: precision 2/3, recall 1
    assert row["best_f1"] == pytest.approx(0.8)
    assert row["best_f1_threshold"] == pytest.approx(0.7)
    assert (row["precision"], row["recall"]) == (pytest.approx(2 / 3), pytest.approx(1.0))
    assert metrics["APS"] == pytest.approx(metrics["AP"])  # all objects have 400 square pixels
    assert metrics["APL"] is None and metrics["ARL"] is None


@pytest.mark.parametrize("max_dets", [1, 5, 10, 150])
def test_other_numbers_of_detections_than_100(evaluator, max_dets):
    boxes = [[10.0 * i, 10.0 * j, 10.0 * i + 10, 10.0 * j + 10] for i in range(10) for j in range(10)]
    split = one_class_split(boxes + [[x0 + 2, y0 + 2, x1, y1] for x0, y0, x1, y1 in boxes[:60]])
    best = next(image.boxes.tolist() for image in split.images)[:max_dets]  # all right, best first
    scores = torch.linspace(0.9, 0.1, len(best)).tolist()
    metrics, table = coco_metrics(split, {1: found(best, [0] * len(best), scores)}, evaluator, max_dets)
    reached = (100 * max_dets // 160 + 1) / 101  # of the 101 recall thresholds
    assert metrics["AP"] == metrics["AP50"] == metrics["per_class"]["thing"]["AP"] == pytest.approx(reached)
    assert [metrics[f"AR{n}"] for n in (1, max_dets)] == [pytest.approx(n / 160) for n in (1, max_dets)]
    assert metrics.get("AR10") == (pytest.approx(10 / 160) if max_dets >= 10 else None)
    first = table.splitlines()[0]
    assert first.endswith(f"(AP) @[ IoU=0.50:0.95 | area=   all | maxDets={max_dets:>3d} ] = {reached:.3f}")


def test_crowds_are_no_misses_and_no_hits(evaluator):
    boxes = [[0.0, 0.0, 20.0, 20.0], [40.0, 40.0, 90.0, 90.0]]
    split = one_class_split(boxes, crowd=[False, True])
    inside_the_crowd = [45.0, 45.0, 60.0, 60.0]
    metrics, _ = coco_metrics(split, {1: found([boxes[0], inside_the_crowd], [0, 0], [0.5, 0.9])}, evaluator)
    assert metrics["AP"] == pytest.approx(1, abs=1e-12)


def test_equal_to_pycocotools_on_files(tmp_path):
    rng = np.random.default_rng(0)
    images, annotations, results = [], [], []
    for image_id in range(3, 23):
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 60, "height": 50})
        for _ in range(rng.integers(0, 6)):
            x, y = rng.integers(0, 30, 2)
            w, h = rng.integers(5, 20, 2)
            category = int(rng.choice([3, 17, 90]))
            box = [int(v) for v in (x, y, w, h)]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "bbox": box})
            annotations[-1] |= {"area": int(w * h), "iscrowd": 0}
            for _ in range(rng.integers(0, 4)):
                moved = [float(np.float32(v)) for v in np.array(box) + rng.normal(0, 0.5, 4).clip(-1, 1)]
                score = float(np.float32(rng.random()))
                result = {
                    "image_id": image_id,
                    "category_id": int(rng.choice([category, category, 3])),
                    "bbox": moved,
                    "score": score,
                }
                results.append(result)
    data = {"images": images, "annotations": annotations, "categories": coco_files.CATEGORIES}
    json_path, image_dir = coco_files.write(tmp_path, data)
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = COCO(str(json_path))
    reference = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()

    split = coco_files.load((json_path, image_dir))
    label_of = {category_id: label for label, category_id in enumerate(split.categories)}
    detections = {}
    for image_id in {result["image_id"] for result in results}:
        mine = [result for result in results if result["image_id"] == image_id]
        xywh = torch.tensor([result["bbox"] for result in mine], dtype=torch.float64)
        detections[image_id] = {
            "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
            "labels": torch.tensor([label_of[result["category_id"]] for result in mine]),
            "scores": torch.tensor([result["score"] for result in mine], dtype=torch.float64),
        }
    metrics, table = coco_metrics(split, detections, "pycocotools")
    assert 0.1 < metrics["AP"] < 0.9
    if importlib.util.find_spec("faster_coco_eval"):
        same, same_table = coco_metrics(split, detections, "faster-coco-eval")
        assert_same_metrics(same, metrics)
        assert same_table.splitlines()[:12] == table.splitlines()
        assert_same_metrics(coco_metrics(split, detections)[0], same)
    values = [-1 if metrics[name] is None else metrics[name] for name in STATS]
    np.testing.assert_allclose(values, reference.stats, rtol=0, atol=1e-12)


def test_a_class_without_examples(evaluator):
    split = one_class_split([[0.0, 0.0, 20.0, 20.0]])
    split = Split(None, None, split.images, {7: "thing", 9: "ghost"})
    metrics, _ = coco_metrics(
        split, {1: found([[0.0, 0.0, 20.0, 20.0], [1.0, 1.0, 5.0, 5.0]], [0, 1], [0.9, 0.8])}, evaluator
    )
    assert metrics["AP"] == pytest.approx(1, abs=1e-12)  # the mean over classes that occur
    assert metrics["per_class"]["ghost"] == {
        **{"AP": None, "AP50": None, "boxes": 0},
        **{"best_f1": None, "best_f1_threshold": None, "precision": None, "recall": None},
    }
    lines = per_class_table(metrics).splitlines()
    assert lines[1].split() == ["thing", "1", "1.000", "1.000", "1.000", "0.900"]
    assert lines[2].split() == ["ghost", "0", "-", "-", "-", "-"]


@pytest.mark.parametrize("image_id", [2**53 + 1, 20260101123456789, 2**63 + 11, -5, 0])
@pytest.mark.parametrize("category_id", [7, 2**53 + 1, 2**64, -1])
def test_ids_of_any_size(evaluator, image_id, category_id):
    """Neighbours are one number to a float64."""
    box, miss = [0.0, 0.0, 20.0, 20.0], [50.0, 50.0, 70.0, 70.0]
    images = [replace(one_class_split([box]).images[0], image_id=image_id + i) for i in (1, 0)]
    split = Split(None, None, images, {category_id: "thing", category_id + 1: "ghost"})
    detections = {image_id: found([box, miss], [0, 1], [0.9, 0.1]), image_id + 1: found([miss], [0], [0.8])}
    metrics, _ = coco_metrics(split, detections, evaluator)
    assert metrics["AP"] == pytest.approx(51 / 101)  # one of two found, the better one first
    assert metrics["per_class"]["thing"]["boxes"] == 2 and metrics["per_class"]["ghost"]["AP"] is None


def test_objects_beyond_coco_s_largest_area_count(evaluator):
    split = one_class_split([[0.0, 0.0, 20.0, 20.0]])
    huge = replace(split.images[0], areas=torch.tensor([5e11], dtype=torch.float64))
    metrics, _ = coco_metrics(Split(None, None, [huge], split.categories), {1: EMPTY}, evaluator)
    assert metrics["AP"] == 0 and metrics["APL"] == 0
