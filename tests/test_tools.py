"""tools/predict.py, tools/label_errors.py and grpo_rm.load_policy, on tiny runs of both tasks."""

import argparse
import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, read_json, read_log, stderr_of, write_image
from PIL import Image

import data
import train_cls
import train_seg
from common.images import palette, read_image
from common.loader import Loader
from grpo_rm import load_policy
from tools import label_errors, predict

TRAIN = "--device cpu --workers 1 --image-size 28 --limit-train 40 --limit-val 40 --epochs 1 --batch-size 10".split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of a run of each task; classification has wrong labels."""
    root = tmp_path_factory.mktemp("runs")
    train_cls.main([*TRAIN, "--lr", "1e-3", "--label-noise", "0.4", "--output-dir", str(root / "cls")])
    train_seg.main([*TRAIN, "--map-size", "12", "--output-dir", str(root / "seg")])
    return root


@pytest.fixture
def photos(tmp_path):
    """Two images of different sizes and modes, and another file."""
    folder = tmp_path / "photos"
    write_image(folder / "a.jpg", 1, (50, 40))
    write_image(folder / "b, c.png", 2, (30, 60), "P")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize(("name", "score"), [("cls", "val_accuracy"), ("seg", "val_pixel_acc")])
def test_a_loaded_policy_scores_as_in_training(name, score, runs):
    """Its inputs are the loader's to the last bit, and its accuracy is what the run logged at its end."""
    args = argparse.Namespace(**read_json(runs / name / "config.json"))
    policy, transform, classes = load_policy(runs / name)
    val = data.load_data(args, CPU)[1]
    ((images, targets),) = Loader(val, args, CPU).fetch([torch.arange(len(val))])
    inputs = torch.stack([transform(val.read(i)[0]) for i in range(len(val))])
    assert torch.equal(inputs, images) and classes == val.classes
    with torch.no_grad():
        predictions = policy(inputs).argmax(1)
    accuracy = 100 * (predictions == targets)[targets >= 0].double().mean().item()
    assert accuracy == pytest.approx(read_log(runs / name)[-1][score], abs=1e-4) and len(predictions.unique()) > 3


def test_classification_names_the_most_probable_class(runs, photos, capsys):
    predict.main([str(runs / "cls"), str(photos), str(photos / "a.jpg"), "--device", "cpu"])
    policy, transform, classes = load_policy(runs / "cls")
    with open(runs / "cls" / "predictions" / "predictions.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "class", "probability"]
    assert [row[0] for row in rows] == [str(photos / name) for name in ("a.jpg", "b, c.png", "a.jpg")]
    printed = capsys.readouterr().out.splitlines()
    for row, line in zip(rows, printed, strict=True):
        with torch.no_grad():
            probabilities = policy(transform(read_image(row[0]))[None]).softmax(1)[0]
        assert row[1] == classes[probabilities.argmax()] and row[2] == f"{probabilities.max():.4f}"
        assert line == "  ".join(row)


def test_segmentation_draws_maps_at_the_size_of_the_image(runs, photos, tmp_path):
    output = tmp_path / "maps"
    predict.main([str(runs / "seg"), str(photos), "--output", str(output), "--device", "cpu"])
    policy, transform, _ = load_policy(runs / "seg")
    assert sorted(path.name for path in output.glob("*.png")) == ["a.png", "b, c.png"]
    for file in photos.glob("*.[jp]*"):
        image = read_image(file)
        with torch.no_grad():
            logits = policy(transform(image)[None])
        expected = F.interpolate(logits, size=image.shape[:2], mode="bilinear").argmax(1)[0]
        picture, overlay = (Image.open(output / f"{file.stem}{end}") for end in (".png", "_overlay.jpg"))
        assert picture.mode == "P" and np.array_equal(picture, expected)
        assert picture.getpalette()[:33] == palette()[:11].flatten().tolist()
        blend = (np.asarray(image, float) + palette()[expected]) / 2
        mean = np.asarray(overlay).mean((0, 1))  # JPEG changes the pixels of noise, not their mean
        assert overlay.size == image.shape[1::-1] and mean == pytest.approx(blend.mean((0, 1)), abs=2)


def test_what_cannot_be_predicted_is_one_line(runs, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    write_image(photos / "more" / "a.png", 4)
    for what, images in ((tmp_path / "empty", [tmp_path / "empty"]), ("none.jpg", [photos / "a.jpg", "none.jpg"])):
        assert f"{what}: no image there" in stderr_of(capsys, predict.main, runs / "cls", *images)
    assert "config.json" in stderr_of(capsys, predict.main, tmp_path, photos)  # no run
    assert "2 images would become a.png" in stderr_of(capsys, predict.main, runs / "seg", photos, photos / "more")
    assert "holds some of the images" in stderr_of(capsys, predict.main, runs / "seg", photos, "--output", photos)
    (photos / "b, c.png").write_text("damaged")
    for name, kept in (("seg", "a.png"), ("cls", "predictions.csv")):
        arguments = [runs / name, photos, "--output", tmp_path / name, "--device", "cpu"]
        assert "b, c.png cannot be read" in stderr_of(capsys, predict.main, *arguments)
        assert (tmp_path / name / kept).stat().st_size > 30  # what came before it stays


def label_table(directory):
    with open(directory / "label_errors.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_least_probable_labels_come_first(runs, tmp_path):
    label_errors.main([str(runs / "cls"), "--device", "cpu", "--top", "12", "--output", str(tmp_path)])
    rows = label_table(tmp_path)
    chosen = np.linspace(0, 4999, 40).round().astype(int)  # by --limit-train
    assert sorted(int(row["file"]) for row in rows) == chosen.tolist()
    probabilities = [float(row["label_probability"]) for row in rows]
    assert probabilities == sorted(probabilities) and probabilities[0] < probabilities[-1]
    with Image.open(tmp_path / "label_errors.png") as sheet:
        assert sheet.size == (1920, round(2 * 2.1 * 120))  # two lines of pictures

    policy, transform, classes = load_policy(runs / "cls")
    split = data.load_splits("shapes", None, "classification", download=False)[0]
    shifts = data.label_shifts(5000, 10, 0.4, seed=0)
    for row in (rows[0], rows[20], rows[39]):
        image, true_label = split.read(index := int(row["file"]))
        with torch.no_grad():
            p = policy(transform(image)[None]).softmax(1)[0]
        label = (true_label + shifts[index]) % 10
        assert (row["label"], row["prediction"]) == (classes[label], classes[p.argmax()])
        expected = [p[label].item(), p.max().item()]
        assert np.allclose([float(row["label_probability"]), float(row["prediction_probability"])], expected, atol=1e-3)


def test_replaced_labels_that_were_found_are_counted(capsys, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "docs" / "study")
    predictions, labels, truth = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3], [1, 1, 2, 0]])
    importlib.import_module("replaced").print_found(torch.tensor([0.9, 0.8, 0.3, 0.1]), predictions, labels, truth)
    found, repeated = capsys.readouterr().out.splitlines()
    assert found == "2 labels were replaced: AUROC 0.500, among the first 2 of the list 50.0 %"
    assert repeated == "the policy predicts 50.0 % of the replaced labels and 100.0 % of the others"


def test_own_images_are_named_and_a_run_of_segmentation_is_refused(runs, image_folder, tmp_path, capsys):
    own = [*TRAIN, "--dataset", "folder", "--data-root", str(image_folder), "--backbone", "vit_tiny"]
    train_cls.main([*own, "--limit-train", "12", "--output-dir", str(tmp_path / "own")])
    label_errors.main([str(tmp_path / "own"), "--device", "cpu"])
    rows = label_table(tmp_path / "own" / "label_errors")
    assert len({Path(row["file"]) for row in rows}.intersection(image_folder.glob("train/*/*"))) == 12
    assert all(Path(row["file"]).parent.name == row["label"] for row in rows)
    for part in ("train", "val"):
        (image_folder / part / "class0").rename(image_folder / part / "zebra")
    assert "has other class folders" in stderr_of(capsys, label_errors.main, tmp_path / "own")
    assert "is a run of segmentation" in stderr_of(capsys, label_errors.main, runs / "seg")
