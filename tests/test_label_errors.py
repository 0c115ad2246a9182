"""tools/label_errors.py: the list is sorted, names its images, and finds the labels that a run replaced."""

import csv
import re

import numpy as np
import pytest
import torch
from conftest import TINY, stderr_of
from PIL import Image

import data
import train_cls
import train_seg
from grpo_rm import load_policy
from tools import label_errors

TRAIN = [*TINY, "--label-noise", "0.4", "--batch-size", "20", "--lr", "1e-3", "--epochs", "2", "--output-dir"]


def table(directory):
    with open(directory / "label_errors.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_least_probable_labels_come_first(tmp_path, capsys):
    run = tmp_path / "run"
    train_cls.main([*TRAIN, str(run)])
    label_errors.main([str(run), "--device", "cpu", "--top", "12", "--output", str(tmp_path / "out")])
    rows = table(tmp_path / "out")
    assert sorted(int(row["file"]) for row in rows) == list(range(100))
    probabilities = [float(row["label_probability"]) for row in rows]
    assert probabilities == sorted(probabilities) and probabilities[0] < probabilities[-1]
    with Image.open(tmp_path / "out" / "label_errors.png") as sheet:
        assert sheet.size == (1920, round(2 * 2.1 * 120))  # two lines of pictures

    policy, transform, classes = load_policy(run)
    full = data.load_splits("shapes", None, "classification", download=False)[0]
    split = data.limit(full, 100)
    shifts = data.label_shifts(5000, 10, 0.4, seed=0)[np.linspace(0, 4999, 100).round().astype(int)]
    for row in (rows[0], rows[50], rows[99]):
        image, true_label = split.read(index := int(row["file"]))
        with torch.no_grad():
            p = policy(transform(image)[None]).softmax(1)[0]
        label = (true_label + shifts[index]) % 10
        assert (row["label"], row["prediction"]) == (classes[label], classes[p.argmax()])
        expected = [p[label].item(), p.max().item()]
        assert np.allclose([float(row["label_probability"]), float(row["prediction_probability"])], expected, atol=1e-3)

    replaced = np.array([shifts[int(row["file"])] != 0 for row in rows])
    doubts = np.array([-float(row["label_probability"]) for row in rows])
    pairs = doubts[replaced][:, None] - doubts[~replaced]
    auroc = ((pairs > 0) + 0.5 * (pairs == 0)).mean()
    shown = capsys.readouterr().out
    count = replaced.sum()
    found = 100 * replaced[:count].mean()
    assert f"{count} labels were replaced" in shown
    assert float(re.search(r"AUROC ([0-9.]+)", shown)[1]) == pytest.approx(auroc, abs=2e-3)
    assert f"among the first {count} of the list {found:.1f} %" in shown


def test_own_images_are_named_and_a_run_of_segmentation_is_refused(image_folder, tmp_path, capsys):
    flags = ["--device", "cpu", "--backbone", "vit_tiny", "--epochs", "1", "--output-dir"]
    own = ["--dataset", "folder", "--data-root", str(image_folder), "--image-size", "28", "--batch-size", "9"]
    train_cls.main([*own, *flags, str(tmp_path / "own")])
    label_errors.main([str(tmp_path / "own"), "--device", "cpu"])
    files = {row["file"] for row in table(tmp_path / "own" / "label_errors")}
    assert files == {str(file) for file in image_folder.glob("train/*/*")} and len(files) == 18
    assert "replaced" not in capsys.readouterr().out
    scenes = [*TINY, "--dataset", "shapes_seg", "--image-size", "28", "--map-size", "14", "--limit-train", "8"]
    train_seg.main([*scenes, "--batch-size", "8", "--epochs", "1", "--output-dir", str(tmp_path / "scenes")])
    capsys.readouterr()
    assert "is a run of segmentation" in stderr_of(capsys, label_errors.main, tmp_path / "scenes")
