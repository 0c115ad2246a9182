"""The report on hand-made runs, against statistics worked out here; and the commands of run_all.sh."""

import csv
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, stderr_of
from PIL import Image

import report
import train_cls
from checkpoint import read_log
from data import InputError, palette, palette_image

SEGMENTATION = {"map_size": 128, "background_penalty": 0.5}


def write(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def fake_run(root: Path, dataset: str, method: str, seed: int, sr=None, knn=None, *, epochs=(), name=None, **config) -> Path:
    """A run directory with a config (but for frozen features) and a log, and the results that are given; sr and knn are
    top-1, or (pixel accuracy, IoU, mIoU) of linear and of multi-scale features. epochs: their events' values."""
    directory = root / dataset / (name or method) / f"seed{seed}"
    base = {"dataset": dataset, "method": method, "seed": seed}
    if method != "frozen":
        settings = {"lr": 1e-3, "epochs": 3, "weights": None, "uniformity": "eq4", "train_fraction": 1.0, "ratio_floor": 0.1}
        hardware = {"device_name": "H200", "world_size": 1, "output_dir": str(directory)}
        write(directory / "config.json", base | settings | hardware | config)
        lines = [json.dumps({"event": "epoch", "epoch": i, "step": i + 1} | values) + "\n" for i, values in enumerate(epochs)]
        (directory / "log.jsonl").write_text("".join(lines))
    segmentation = isinstance(sr or knn, tuple) or "map_size" in config
    files = ("eval_linear", "eval_linear_multiscale" if segmentation else "eval_knn")
    for file, values, features in zip(files, (sr, knn), ("linear", "multiscale"), strict=True):
        if values is not None:
            scores = dict(zip(("pixel_acc", "iou", "miou"), values, strict=True)) if segmentation else {"top1": values}
            extra = {"features": features, "resolution": "native", "per_class_iou": {"a": seed}, "save_images": 4 * (seed == 0)}
            write(directory / f"{file}.json", base | scores | {"frozen": method == "frozen", "weights": None} | (extra if segmentation else {}))
    return directory


def tables(root: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each table, by its name and by column."""
    groups = report.group_runs(report.find_runs(root), root)
    return {table.name: [dict(zip(table.header, row, strict=True)) for row in table.rows] for table in report.make_tables(groups)}


def row_of(rows: list[dict[str, str]], **cells: str) -> dict[str, str]:
    """The only row with these cells."""
    (row,) = [row for row in rows if all(row[key] == value for key, value in cells.items())]
    return row


def mean_and_deviation(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.2f} ± {math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)):.2f}"


def paired_t(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """t and its two-sided p by the closed forms of Student's distribution with 1, 2 and 4 degrees of freedom."""
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    n, mean = len(d), sum(d) / len(d)
    t = mean / math.sqrt(sum((x - mean) ** 2 for x in d) / (n - 1) / n)
    u = abs(t) / math.sqrt(n - 1 + t * t)  # the sine of atan(t / sqrt(n - 1))
    return t, 1 - {2: 2 / math.pi * math.asin(u), 3: u, 5: u * (1 + (1 - u * u) / 2)}[n]


def test_the_papers_numbers_agree_with_its_text():
    """Its averages over datasets, and IoU = acc / (2 - acc) of the frozen features, hold for the numbers as typed here."""
    sets = ["cifar10", "cifar100", "stl10", "tiny_imagenet", "imagenet"]
    for column, average in (("SR", 3.754), ("k-NN", 3.29)):
        gains = [report.PAPER_SCORES[f"{s} grpo_rm"][column][0] - report.PAPER_SCORES[f"{s} finetune"][column][0] for s in sets]
        assert sum(gains) / 5 == pytest.approx(average, abs=0.005)
    for dataset in ("voc2012", "ade20k", "coco_stuff"):
        for features in ("linear", "multiscale"):
            printed = report.PAPER_SCORES[f"{dataset} {features} frozen"]
            accuracy = printed["pixel-acc"][0] / 100
            assert 100 * accuracy / (2 - accuracy) == pytest.approx(printed["IoU"][0], abs=0.02)
    sets = ["stl10", "tiny_imagenet", "imagenet", "voc2012"]
    gains = [report.PAPER_ABLATION[f"{s} grpo_rm"]["score"][0] - report.PAPER_ABLATION[f"{s} grpo_rm none"]["score"][0] for s in sets]
    assert sum(gains) / 4 == pytest.approx(3.88, abs=0.01)
    times = [report.PAPER_ABLATION[f"{s} grpo_rm"]["time"][0] / report.PAPER_ABLATION[f"{s} grpo_rm none"]["time"][0] for s in sets]
    assert sum(times) / 4 == pytest.approx(1.0616, abs=0.01)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_means_deviations_and_p_values(n, tmp_path):
    ours = {"SR": [66.25, 65.5, 67.125, 64.0, 66.0][:n], "k-NN": [66.0, 68.5, 65.25, 63.0, 70.0][:n]}
    theirs = {"SR": [60.0, 61.5, 60.75, 62.0, 58.5][:n], "k-NN": [66.5, 67.25, 66.0, 64.5, 66.25][:n]}
    for seed in range(n):
        fake_run(tmp_path, "tiny_imagenet", "grpo_rm", seed, ours["SR"][seed], ours["k-NN"][seed])
        fake_run(tmp_path, "tiny_imagenet", "finetune", seed, theirs["SR"][seed], theirs["k-NN"][seed])
    fake_run(tmp_path, "tiny_imagenet", "finetune", 7, 10.0)  # no GRPO-RM has this seed
    found = tables(tmp_path)
    row = row_of(found["table3"], dataset="Tiny-ImageNet", method="GRPO-RM")
    assert row["seeds"] == ", ".join(map(str, range(n)))
    assert row["SR"] == mean_and_deviation(ours["SR"]) and row["k-NN"] == mean_and_deviation(ours["k-NN"])
    assert row["SR paper"] == "65.96 ± 0.40" and row["SR diff"] == f"{sum(ours['SR']) / n - 65.96:+.2f}"
    baseline = row_of(found["table3"], method="Fine-tuning")
    assert baseline["SR"] == mean_and_deviation([*theirs["SR"], 10.0])
    assert baseline["k-NN"] == f"{mean_and_deviation(theirs['k-NN'])} (n = {n})"  # one seed has not been judged by it
    for column, paper in (("SR", "+7.29"), ("k-NN", "+7.77")):
        test = row_of(found["table3_tests"], method="GRPO-RM", score=column)
        t, p = paired_t(ours[column], theirs[column])
        assert (test["seeds"], test["paper"], test["t"], test["p"]) == (str(n), paper, f"{t:.2f}", f"{p:.4f}")
        gains = [a - b for a, b in zip(ours[column], theirs[column], strict=True)]
        assert test["GRPO-RM - fine-tuning"] == mean_and_deviation(gains)


def test_no_p_value_without_variation(tmp_path):
    fake_run(tmp_path, "cifar10", "grpo_rm", 0, 60.0, 50.0)
    fake_run(tmp_path, "cifar10", "finetune", 0, 58.5, 50.0)
    assert row_of(tables(tmp_path)["table3_tests"], score="SR") | {"p": "-", "t": "-"} == row_of(tables(tmp_path)["table3_tests"], score="SR")
    fake_run(tmp_path, "cifar10", "grpo_rm", 1, 61.0, 70.0)
    fake_run(tmp_path, "cifar10", "finetune", 1, 59.5, 50.0)
    test = row_of(tables(tmp_path)["table3_tests"], score="SR")
    assert (test["GRPO-RM - fine-tuning"], test["t"], test["p"]) == ("1.50 ± 0.00", "-", "-")


def test_missing_runs_are_dashes(tmp_path):
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 0, 60.0)
    fake_run(tmp_path, "shapes", "finetune", 0, 90.0, 91.0)
    found = tables(tmp_path)
    assert found.keys() == {"table3"}
    assert [(row["dataset"], row["method"]) for row in found["table3"]] == [
        ("Tiny-ImageNet", "frozen"),
        ("Tiny-ImageNet", "Fine-tuning"),
        ("Tiny-ImageNet", "GRPO-RM"),
        ("shapes", "Fine-tuning"),
    ]
    assert list(found["table3"][1].values())[2:] == ["-", "-", "58.67 ± 0.61", "-", "-", "58.59 ± 1.25", "-"]
    assert list(found["table3"][2].values())[2:] == ["0", "60.00", "65.96 ± 0.40", "-5.96", "-", "66.36 ± 0.32", "-"]
    assert list(found["table3"][3].values())[2:] == ["0", "90.00", "-", "-", "91.00", "-", "-"]  # the paper has no such dataset


def test_settings_are_never_mixed(tmp_path):
    fake_run(tmp_path, "shapes", "grpo_rm", 0, 50.0)
    fake_run(tmp_path, "shapes", "grpo_rm", 1, 60.0, lr=4e-3)
    fake_run(tmp_path / "again", "shapes", "grpo_rm", 0, 70.0)
    fake_run(tmp_path, "shapes", "grpo_rm", 2, 80.0, weights="pretrained.pth")
    fake_run(tmp_path, "shapes", "finetune", 1, 40.0)  # comparable with the first alone, whose seed it does not have
    fake_run(tmp_path, "shapes", "finetune", 2, 42.0, lr=4e-3)
    rows = [row for row in tables(tmp_path)["table3"] if row["method"].startswith("GRPO-RM")]
    assert sorted(row["SR"] for row in rows) == ["50.00", "60.00", "70.00", "80.00"]
    assert "lr 0.004" in row_of(rows, SR="60.00")["method"] and "weights pretrained.pth" in row_of(rows, SR="80.00")["method"]
    assert row_of(rows, SR="70.00")["method"].endswith("in again/shapes/grpo_rm")
    assert "table3_tests" not in tables(tmp_path)


def test_the_hub_is_a_setting_where_the_weights_come_from_it(tmp_path):
    for name, weights, expected in (("hub", None, ["50.00", "60.00"]), ("file", "pretrained.pth", ["55.00 ± 7.07"])):
        for seed, repo in enumerate(("facebookresearch/dinov2:a", "me/other")):
            fake_run(tmp_path / name, "shapes", "grpo_rm", seed, 50.0 + 10 * seed, hub_repo=repo, weights=weights)
        assert sorted(row["SR"] for row in tables(tmp_path / name)["table3"]) == expected


def test_another_evaluation_is_another_setting(tmp_path):
    for seed, epochs in ((0, 50), (1, 10)):
        path = fake_run(tmp_path, "shapes", "frozen", seed, 50.0 + seed) / "eval_linear.json"
        write(path, json.loads(path.read_text()) | {"epochs": epochs})
    assert {row["method"] for row in tables(tmp_path)["table3"]} == {f"frozen, epochs {epochs} in eval_linear" for epochs in (50, 10)}


def test_what_does_not_touch_the_scores_is_averaged_over(tmp_path):
    fake_run(tmp_path, "shapes", "grpo_rm", 0, 50.0, 40.0, world_size=1, git_commit="a")
    fake_run(tmp_path, "shapes", "grpo_rm", 1, 60.0, world_size=8, git_commit="b")
    row = row_of(tables(tmp_path)["table3"])
    assert (row["method"], row["seeds"], row["SR"], row["k-NN"]) == ("GRPO-RM", "0, 1", "55.00 ± 7.07", "40.00 (n = 1)")
    assert "- the runs differ in git_commit: a, b" in report.remarks(report.find_runs(tmp_path), tmp_path)


def test_fine_tuning_is_compared_whatever_the_objective(tmp_path):
    """The ratio floor is no setting of fine-tuning: one baseline serves all, though not one with another learning rate."""
    for seed in range(2):
        fake_run(tmp_path, "shapes", "finetune", seed, 50.0 + seed, ratio_floor=0.1)
        fake_run(tmp_path, "shapes", "grpo_rm", seed, 52.0 + 2 * seed, name="a", ratio_floor=0)
        fake_run(tmp_path, "shapes", "grpo_rm", seed, 51.0 + 3 * seed, name="b", ratio_floor=1)
        fake_run(tmp_path, "shapes", "grpo_rm", seed, 51.0 + 3 * seed, name="c", ratio_floor=1, lr=4e-3)
    found = tables(tmp_path)
    gains = {row["method"]: row["GRPO-RM - fine-tuning"] for row in found["table3_tests"]}
    assert gains == {"GRPO-RM, lr 0.001, ratio_floor 0": "2.50 ± 0.71", "GRPO-RM, lr 0.001, ratio_floor 1": "2.00 ± 1.41"}
    assert found["table3"][0]["method"] == "Fine-tuning, lr 0.001"


def test_two_datasets_named_folder_are_two(tmp_path):
    fake_run(tmp_path, "folder", "grpo_rm", 0, 50.0, data_root="cats")
    fake_run(tmp_path, "folder", "grpo_rm", 1, 60.0, data_root="dogs")
    fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0, data_root="cats")
    fake_run(tmp_path, "cifar10", "grpo_rm", 1, 60.0, data_root="elsewhere")
    assert [row["SR"] for row in tables(tmp_path)["table3"] if row["SR"] != "-"] == ["55.00 ± 7.07", "50.00", "60.00"]


def test_segmentation_and_ten_percent_rows(tmp_path):
    for dataset in ("voc2012", "coco_stuff"):
        for seed in range(3):
            for name, method, fraction, gain in (
                ("grpo_rm", "grpo_rm", 1.0, 2),
                ("grpo_rm_fraction0.1", "grpo_rm", 0.1, 1),
                ("finetune", "finetune", 1.0, 0.5 * seed),
                ("finetune_fraction0.1", "finetune", 0.1, 0),
            ):
                linear = (90.0 + gain, 80.0 + gain, 70.0 + gain + seed)
                more = tuple(value + 1 for value in linear)
                fake_run(tmp_path, dataset, method, seed, linear, more, name=name, train_fraction=fraction, **SEGMENTATION)
    fake_run(tmp_path, "voc2012", "frozen", 0, (89.0, 79.0, 69.0), (90.0, 80.0, 70.0))
    found = tables(tmp_path)
    assert found.keys() == {"table2", "table2_tests", "table4", "table4_tests"}
    methods = ["frozen", "Fine-tuning (10%)", "Fine-tuning", "GRPO-RM (10%)", "GRPO-RM"]
    for table in ("table2", "table4"):
        assert [(row["features"], row["method"]) for row in found[table]] == [(f, m) for f in ("linear", "multiscale") for m in methods]
    row = row_of(found["table2"], features="linear", method="GRPO-RM (10%)")
    expected = ["0, 1, 2", "91.00 ± 0.00", "93.67 ± 0.02", "-2.67", "81.00 ± 0.00", "88.57 ± 0.03", "-7.57", "72.00 ± 1.00", "70.38 ± 0.08", "+1.62"]
    assert list(row.values())[3:] == expected
    assert row_of(found["table4"], features="multiscale", method="frozen")["mIoU paper"] == "31.75"
    assert row_of(found["table4"], features="multiscale", method="frozen")["mIoU"] == "-"
    assert row_of(found["table4"], features="multiscale", method="GRPO-RM")["IoU"] == "83.00 ± 0.00"
    test = row_of(found["table2_tests"], method="GRPO-RM", score="linear mIoU")
    t, p = paired_t([2, 2, 2], [0, 0.5, 1])
    assert (test["seeds"], test["paper"], test["t"], test["p"]) == ("3", "+0.66", f"{t:.2f}", f"{p:.4f}")
    test = row_of(found["table2_tests"], method="GRPO-RM (10%)", score="linear mIoU")
    assert (test["GRPO-RM - fine-tuning"], test["paper"]) == ("1.00 ± 0.00", "+0.76")


def test_native_and_map_resolution_are_not_averaged(tmp_path):
    for seed, resolution in ((0, "native"), (1, "map")):
        path = fake_run(tmp_path, "shapes_seg", "finetune", seed, (90.0, 80.0, 70.0), **SEGMENTATION) / "eval_linear.json"
        write(path, json.loads(path.read_text()) | {"resolution": resolution})
    labels = [row["method"] for row in tables(tmp_path)["table2"] if row["features"] == "linear"]
    assert labels == ["Fine-tuning, resolution map in eval_linear", "Fine-tuning, resolution native in eval_linear"]


def test_costs(tmp_path):
    def epochs(*seconds):
        return [{"seconds": s, "peak_memory_gb": 2.0 + i} for i, s in enumerate(seconds)]

    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 0, 60.0, epochs=epochs(100, 2, 3, 10), world_size=4, forward_macs=6e8, batch_size=1024)
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 1, 60.0, epochs=epochs(100, 5, 4, 6), world_size=4)
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 2, 60.0, epochs=epochs(100, 50, 50), world_size=1)  # other hardware
    fake_run(tmp_path, "tiny_imagenet", "finetune", 0, 60.0, epochs=[{"seconds": s, "peak_memory_gb": None} for s in (9, 1)])
    found = tables(tmp_path)
    assert [row["hardware"] for row in found["table5"]] == ["1 x H200", "1 x H200", "4 x H200"]
    row = row_of(found["table5"], hardware="4 x H200")
    assert row["seeds"] == "0, 1"
    assert [row[f"time (s){part}"] for part in ("", " paper", " diff")] == ["4.00", "10.37", "-6.37"]  # of 3 and 5
    assert [row[f"memory (GB){part}"] for part in ("", " paper", " diff")] == ["16.00", "15.12", "+0.88"]  # 4 processes of 4 GB
    assert [row[f"FLOPs{part}"] for part in ("", " paper", " diff")] == ["1.23e12", "7.15e11", "+5.14e11"]  # two passes
    row = row_of(found["table5"], method="Fine-tuning")
    assert (row["time (s)"], row["memory (GB)"], row["memory (GB) diff"]) == ("1.00", "-", "-")
    assert row_of(found["table3"], method="GRPO-RM")["seeds"] == "0, 1, 2"  # scores do not depend on hardware


def test_no_cost_table_without_a_second_epoch(tmp_path):
    fake_run(tmp_path, "shapes", "grpo_rm", 0, 60.0, epochs=[{"seconds": 1.0}])
    assert "table5" not in tables(tmp_path)


def test_ablation(tmp_path):
    epochs = [{"seconds": 1.0}, {"seconds": 2.0}]
    for seed in range(2):
        for uniformity, sr in (("none", 60.0), ("eq5", 61.0), ("eq4", 62.0)):
            name = f"grpo_rm_{uniformity}"
            fake_run(tmp_path, "tiny_imagenet", "grpo_rm", seed, sr + seed, name=name, uniformity=uniformity, epochs=epochs)
        fake_run(tmp_path, "voc2012", "grpo_rm", seed, (90.0, 80.0, 70.0), name="eq5", uniformity="eq5", epochs=epochs, **SEGMENTATION)
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 90.0)  # without ablation: not in the table
    found = tables(tmp_path)
    assert [row["dataset"] for row in found["table6"]] == ["Tiny-ImageNet"] * 3 + ["Pascal VOC 2012"] * 3
    rewards = ["set to 0", "Eq. (5)", "Eq. (4) (GRPO-RM)"]
    assert [row["uniformity reward"] for row in found["table6"]] == 2 * rewards
    assert [row["SR or pixel-acc"] for row in found["table6"]] == [*(f"{x}.50 ± 0.71" for x in (60, 61, 62)), "-", "90.00 ± 0.00", "-"]
    assert [row["SR or pixel-acc diff"] for row in found["table6"]] == ["-1.66", "+1.18", "-3.46", "-", "-", "-"]
    assert [row["time (s) diff"] for row in found["table6"]] == ["-7.40", "-16.57", "-8.37", "-", "-9418.00", "-"]
    assert row_of(found["table3"], dataset="Tiny-ImageNet", method="GRPO-RM")["SR"] == "62.50 ± 0.71"  # Eq. (4) alone
    assert "table2" not in found


def test_csv_equals_markdown(tmp_path, capsys):
    for seed in range(2):
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 50.0 + seed, 40.0, epochs=[{"seconds": 1.0}, {"seconds": 1.5}])
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 51.0, 40.0, name="none", uniformity="none")
        fake_run(tmp_path, "cifar10", "finetune", seed, 49.0, 41.0 + seed)
        fake_run(tmp_path, "shapes_seg", "grpo_rm", seed, (90.0, 80.0, 70.0), **SEGMENTATION)
    report.main([str(tmp_path), "--csv", str(tmp_path / "csv")])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    stored = []
    for name in ("table2", "table3", "table3_tests", "table5", "table6"):
        with open(tmp_path / "csv" / f"{name}.csv", newline="") as file:
            stored += list(csv.reader(file))
    assert [[cell.strip() for cell in line.strip("|").split(" | ")] for line in printed] == stored
    assert len(list((tmp_path / "csv").iterdir())) == 5


def test_the_papers_columns_stand_where_the_paper_has_something(tmp_path):
    fake_run(tmp_path / "own", "shapes", "grpo_rm", 0, 50.0, 40.0)
    (row,) = tables(tmp_path / "own")["table3"]
    assert row == {"dataset": "shapes", "method": "GRPO-RM", "seeds": "0", "SR": "50.00", "k-NN": "40.00"}
    fake_run(tmp_path / "both", "shapes", "grpo_rm", 0, 50.0, 40.0)
    fake_run(tmp_path / "both", "cifar10", "grpo_rm", 0, 50.0, 40.0)
    rows = tables(tmp_path / "both")["table3"]
    assert row_of(rows, dataset="shapes")["SR paper"] == "-"
    assert row_of(rows, dataset="CIFAR-10", method="GRPO-RM")["SR paper"] == "95.78 ± 0.26"


def test_runs_in_progress_and_cut_off_logs(tmp_path, capsys):
    fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0, 40.0, epochs=[{"loss": 1.0}])
    going = fake_run(tmp_path, "cifar10", "grpo_rm", 1, epochs=[{"loss": 1.0}, {"loss": 0.5}])
    with open(going / "log.jsonl", "a") as file:
        file.write('{"event": "epoch", "epo')
    fake_run(tmp_path, "shapes", "finetune", 0, epochs=[{"loss": 1.0}])
    report.main([str(tmp_path), "--figures", str(tmp_path / "figures")])
    lines = capsys.readouterr().out.splitlines()
    assert "- cifar10/grpo_rm/seed1 is not finished: epoch 2 of 3, no eval_linear.json and no eval_knn.json" in lines
    assert "- cifar10/grpo_rm/seed1/log.jsonl ends in half a line, which is left out" in lines
    assert sum(line.startswith("- ") for line in lines) == 3
    assert any(line.startswith("| CIFAR-10 | GRPO-RM | 0 | 50.00 |") for line in lines)
    assert "| shapes | Fine-tuning | - | - | - | - | - | - | - |" in lines


def test_bad_directories(tmp_path, capsys):
    assert "no such directory" in stderr_of(capsys, report.main, tmp_path / "nowhere")
    assert "holds no run" in stderr_of(capsys, report.main, tmp_path)
    fake_run(tmp_path / "good", "cifar10", "grpo_rm", 0, 50.0, epochs=[{"loss": 1.0}])
    (tmp_path / "file").write_text("")
    for flag in ("--figures", "--csv"):
        assert f"{flag} {tmp_path / 'file'} cannot be written" in stderr_of(capsys, report.main, tmp_path / "good", flag, tmp_path / "file")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("eval_linear.json", '{"top1": 5', "eval_linear.json cannot be read"),
        ("eval_linear.json", "[1]", "eval_linear.json holds no JSON object"),
        ("eval_linear.json", '{"dataset": "cifar10", "method": "grpo_rm", "seed": 0}', 'eval_linear.json holds no number "top1"'),
        ("eval_linear.json", '{"dataset": "cifar10", "method": "grpo_rm", "seed": 0, "top1": null}', 'holds no number "top1"'),
        ("eval_knn.json", '{"dataset": "stl10", "method": "grpo_rm", "seed": 0, "top1": 5}', "mixes runs: dataset is cifar10 in config.json"),
        ("eval_knn.json", '{"method": "grpo_rm", "seed": 0, "top1": 5}', 'eval_knn.json says no "dataset"'),
        ("config.json", "\x00\xff", "config.json cannot be read"),
        ("log.jsonl", '{"event": "epoch", "ep\n{"event": "epoch", "epoch": 1}\n{"event": "epoch"}\n', "log.jsonl: line 1 is damaged"),
        ("log.jsonl", "[1, 2]\n", "log.jsonl: line 2 is damaged"),
    ],
)
def test_damaged_files(file, content, message, tmp_path, capsys):
    directory = fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0)
    (directory / file).write_bytes(content.encode("latin-1"))
    assert message in stderr_of(capsys, report.main, tmp_path)


def test_a_log_without_its_config(tmp_path, capsys):
    directory = fake_run(tmp_path, "cifar10", "grpo_rm", 0)
    (directory / "config.json").unlink()
    assert "has no config.json beside it" in stderr_of(capsys, report.main, tmp_path)


def test_results_without_their_config_are_not_averaged_with_others(tmp_path):
    fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0)
    shutil.copytree(fake_run(tmp_path, "cifar10", "grpo_rm", 1, 60.0), tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "config.json").unlink()
    rows = [row for row in tables(tmp_path)["table3"] if row["method"].startswith("GRPO-RM")]
    assert sorted(row["SR"] for row in rows) == ["55.00 ± 7.07", "60.00"]


def test_figures(tmp_path, monkeypatch):
    """A real run and hand-made ones; each picture is there, and each of its panels holds what it should."""
    panels, save_figure = {}, report.save_figure

    def look(figure, title, path):
        panels[path.stem] = [(axis.get_title(), len(axis.lines), len(axis.patches)) for axis in figure.axes]
        return save_figure(figure, title, path)

    monkeypatch.setattr(report, "save_figure", look)
    out = tmp_path / "runs" / "shapes" / "grpo_rm" / "seed0"
    train_cls.main([*TINY, "--batch-size", "50", "--epochs", "2", "--eval-every", "1", "--output-dir", str(out)])
    events = [event for event in read_log(out / "log.jsonl") if event["event"] == "epoch"]
    assert all(event["seconds"] > 0 and event["peak_memory_gb"] is None for event in events)
    images = 100 / events[1]["seconds"]
    assert events[1]["images_per_s"] == pytest.approx(images)
    for seed in range(2):
        epochs = [{"loss": 1 / (i + 1), "val_pixel_acc": 50.0 + i, "val_miou": None if i else 30.0, "clip_fraction": 0.1} for i in range(4 - seed)]
        for method, uniformity in (("grpo_rm", "eq4"), ("grpo_rm", "eq5"), ("finetune", "eq4")):
            scores = (90.0 + seed, 80.0, 70.0)
            name = f"{method}_{uniformity}"
            fake_run(tmp_path / "runs", "voc2012", method, seed, scores, name=name, epochs=epochs, uniformity=uniformity, **SEGMENTATION)
    root = tmp_path / "runs"
    written = report.draw_figures(report.group_runs(report.find_runs(root), root), tmp_path / "figures")
    names = ["voc2012_curves", "voc2012_policy", "shapes_curves", "shapes_policy", "ablation"]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    assert all(Image.open(path).width > 400 for path in written)
    two, methods = 2 + 1, 2  # two seeds are two thin lines and their mean
    assert panels["voc2012_curves"] == [
        ("cross-entropy of fine-tuning", two, 0),
        ("loss of GRPO-RM", two, 0),
        ("validation pixel accuracy (%)", methods * two, 0),
        ("validation mIoU (%)", methods * two, 0),
    ]
    assert panels["shapes_curves"] == [("loss of GRPO-RM", 1, 0), ("validation accuracy (%)", 1, 0)]
    assert [lines for _, lines, _ in panels["shapes_policy"]] == [1, 1, 1]
    ((_, _, bars),) = panels["ablation"]
    assert bars == 2


def test_long_names_fit_into_the_legend(tmp_path, monkeypatch):
    widths = []

    def measure(figure, title, path):
        figure.draw_without_rendering()
        (legend,) = figure.legends
        widths.append(legend.get_window_extent().width / figure.bbox.width)

    monkeypatch.setattr(report, "save_figure", measure)
    for i, floor in enumerate((0.0, 0.1, 1.0)):
        config = {"ratio_floor": floor, "group_weighting": "uniform" if i else "policy", "lr": 10.0**-i}
        fake_run(tmp_path, "cifar10", "grpo_rm", 0, name=f"run{i}", epochs=[{"kl": 0.1, "clip_fraction": 0.5, "max_ratio": 2.0}] * 3, **config)
    report.draw_figures(report.group_runs(report.find_runs(tmp_path), tmp_path), tmp_path / "figures")
    assert len(widths) == 1 and 0.3 < widths[0] < 1


def test_a_run_that_blew_up_does_not_flatten_the_others(tmp_path, monkeypatch):
    scales = {}
    monkeypatch.setattr(report, "save_figure", lambda figure, title, path: scales.update({a.get_title(): a.get_yscale() for a in figure.axes}))
    fake_run(tmp_path, "cifar10", "grpo_rm", 0, epochs=[{"loss": -0.02, "kl": 0.1}, {"loss": -0.03, "kl": 0.2}])
    fake_run(tmp_path, "cifar10", "grpo_rm", 0, name="blown_up", epochs=[{"loss": -0.02, "kl": 0.1}, {"loss": 2e4, "kl": 0.4}], ratio_floor=0.0)
    report.draw_figures(report.group_runs(report.find_runs(tmp_path), tmp_path), tmp_path / "figures")
    assert scales == {"loss of GRPO-RM": "symlog", "KL(old policy || policy), nats": "linear"}


# ------------------------------------------------------------------------------------------------------------------
# run_all.sh, as it would run


def commands_of(tmp_path: Path, *datasets: str, **environment: str) -> list[list[str]]:
    """The commands that run_all.sh prints in a dry run, as words; it must leave nothing behind."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin" / "python"
    if not python.exists():
        python.symlink_to(sys.executable)
    before = sorted(tmp_path.rglob("*"))
    surroundings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DRY_RUN": "1", "NPROC": "1"}
    command = ["bash", str(ROOT / "run_all.sh"), *datasets]
    done = subprocess.run(command, env=surroundings | environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    return [shlex.split(line, comments=True) for line in done.stdout.splitlines()]


def script_of(command: list[str]) -> str:
    return next(Path(word).name for word in command if word.endswith(".py"))


def value(command: list[str], flag: str) -> str | None:
    return command[len(command) - command[::-1].index(flag)] if flag in command else None  # the last one counts


def test_dry_run_of_the_whole_protocol(tmp_path):
    commands = commands_of(tmp_path, "tiny_imagenet", "voc2012", ABLATIONS="1", FRACTIONS="0.1 1", SEEDS="0 1", NPROC="4", DATA_ROOT="my data")
    # frozen; fine-tuning and GRPO-RM, each on 10 % and on all; two other rewards; two seeds of each
    trained = ["finetune_fraction0.1", "finetune", "grpo_rm_fraction0.1", "grpo_rm", "grpo_rm_none", "grpo_rm_eq5"]
    assert [script_of(command) for command in commands].count("train_cls.py") == 2 * len(trained)
    assert [script_of(command) for command in commands].count("train_seg.py") == 2 * len(trained)
    assert len(commands) == 2 * (2 * len(trained) + 2 * 2 * (1 + len(trained))) + 1
    *stages, last = commands
    assert last[1:] == [str(ROOT / "report.py"), "runs", "--csv", "runs/tables", "--figures", "runs/figures"]
    for command in stages:
        assert command[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"] and value(command, "--data-root") == "my data"
    for dataset, train, evaluations in (
        ("tiny_imagenet", "train_cls.py", ["eval_linear.py", "eval_knn.py"]),
        ("voc2012", "train_seg.py", ["eval_linear.py", "eval_linear.py"]),
    ):
        for name in ["frozen", *trained]:
            for seed in ("0", "1"):
                run = f"runs/{dataset}/{name}/seed{seed}"
                mine = [c for c in stages if run in (value(c, "--output-dir") or value(c, "--output"), str(Path(value(c, "--output") or "").parent))]
                assert [script_of(c) for c in mine] == [train] * (name != "frozen") + evaluations
                assert all((value(c, "--dataset"), value(c, "--seed")) == (dataset, seed) for c in mine)
                assert all("--train-fraction" not in c and "--uniformity" not in c for c in mine[-2:])  # judged on all images
                if name == "frozen":
                    assert all("--frozen" in c and "--weights" not in c for c in mine)
                    continue
                post, *judged = mine
                assert "--resume" in post and value(post, "--method") == name.split("_f")[0].removesuffix("_none").removesuffix("_eq5")
                assert value(post, "--epochs") == "100"
                assert value(post, "--train-fraction") == ("0.1" if "fraction" in name else None)
                assert value(post, "--uniformity") == {"grpo_rm_none": "none", "grpo_rm_eq5": "eq5"}.get(name)
                assert all(value(c, "--weights") == f"{run}/backbone.pth" for c in judged)
    linear, multiscale = (c for c in stages if "runs/voc2012/grpo_rm/seed0/backbone.pth" in c)
    assert (value(linear, "--features"), value(linear, "--save-images")) == ("linear", "4")
    assert (value(multiscale, "--features"), value(multiscale, "--save-images")) == ("multiscale", None)
    assert value(multiscale, "--output") == "runs/voc2012/grpo_rm/seed0/eval_linear_multiscale.json"
    assert sum("--save-images" in c for c in stages) == 1 + len(trained)  # the first seed's


def test_dry_run_defaults(tmp_path):
    commands = commands_of(tmp_path, "cifar10")
    assert len(commands) == 5 * (2 + 3 + 3) + 1 and all(command[0] == "python" for command in commands)
    assert {value(command, "--seed") for command in commands[:-1]} == set("01234")


def test_dry_run_of_the_demo(tmp_path):
    commands = commands_of(tmp_path, SEG_TRAIN_ARGS="--batch-size 7 --epochs 2", SEG_EVAL_ARGS="--epochs 3")
    assert commands[-1][2] == "runs/demo" and len(commands) == 2 * 2 * 8 + 1
    shapes = [command for command in commands if value(command, "--dataset") == "shapes"]
    assert {value(command, "--batch-size") for command in shapes if script_of(command) == "train_cls.py"} == {"64"}
    masks = [command for command in commands if value(command, "--dataset") == "shapes_seg"]
    assert {(value(c, "--batch-size"), value(c, "--epochs")) for c in masks if script_of(c) == "train_seg.py"} == {("7", "2")}
    assert {value(c, "--epochs") for c in masks if script_of(c) == "eval_linear.py"} == {"3"}


def test_dry_run_over_several_nodes(tmp_path):
    torchrun = "srun torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=host:29500 --nproc_per_node=4"
    for command in commands_of(tmp_path, "voc2012", SEEDS="3", TORCHRUN=torchrun, NPROC="4")[:-1]:
        start = torchrun.split() if script_of(command) == "train_seg.py" else ["torchrun", "--standalone", "--nproc_per_node=4"]
        assert command[: len(start)] == start


def test_dry_run_leaves_out_what_is_done(tmp_path):
    write(tmp_path / "runs" / "cifar10" / "grpo_rm" / "seed0" / "eval_knn.json", {})
    commands = commands_of(tmp_path, "cifar10", SEEDS="0", METHODS="grpo_rm")
    assert [script_of(command) for command in commands if command] == ["train_cls.py", "eval_linear.py", "report.py"]


def test_dry_run_knows_a_folder_of_masks(tmp_path):
    assert script_of(commands_of(tmp_path, "folder", METHODS="grpo_rm", DATA_ROOT=str(tmp_path))[0]) == "train_cls.py"
    (tmp_path / "masks").mkdir()
    assert script_of(commands_of(tmp_path, "folder", METHODS="grpo_rm", DATA_ROOT=str(tmp_path))[0]) == "train_seg.py"


def test_scenes_stand_side_by_side(tmp_path):
    """Figure 2 from what eval_linear.py --save-images leaves: every method's prediction of the same scenes, looked up by colour."""
    predictions = {"frozen": 1, "finetune": 2, "grpo_rm": 3}
    for method, label in predictions.items():
        run = fake_run(tmp_path, "shapes_seg", method, 0, (90.0, 80.0, 70.0), **SEGMENTATION)
        result = json.loads((run / "eval_linear.json").read_text()) | {"per_class_iou": {"background": 1.0, "a": 1.0, "b": None, "c": 2.0}}
        write(run / "eval_linear.json", result)
        (run / "eval_linear_images").mkdir()
        for index in ("000000", "000007", *(["000009"] if method == "frozen" else [])):
            Image.new("RGB", (20, 10), "white").save(run / "eval_linear_images" / f"{index}_image.png")
            for kind, value in (("truth", 0), ("prediction", label)):
                palette_image(np.full((10, 20), value, np.uint8)).save(run / "eval_linear_images" / f"{index}_{kind}.png")
    written = report.draw_figures(report.group_runs(report.find_runs(tmp_path), tmp_path), tmp_path / "figures")
    picture = np.asarray(Image.open(tmp_path / "figures" / "shapes_seg_scenes.png").convert("RGB"))
    assert tmp_path / "figures" / "shapes_seg_scenes.png" in written
    assert picture.shape[1] == 8 + 5 * 408  # five cells of 400 x 200
    for row in (100, 100 + picture.shape[0] // 2):  # the two scenes that all have
        colours = [picture[row, 8 + 408 * cell + 200].tolist() for cell in range(5)]
        assert colours == [[255, 255, 255], *(palette()[i].tolist() for i in (0, 1, 2, 3))]
    (run / "eval_linear_images" / "000007_prediction.png").write_bytes(b"broken")
    assert "scored at the resolution of the ground truth" in "\n".join(report.settings_notes(report.group_runs(report.find_runs(tmp_path), tmp_path)))
    with pytest.raises(InputError, match="scene 000007 cannot be read"):
        report.draw_figures(report.group_runs(report.find_runs(tmp_path), tmp_path), tmp_path / "figures")
    palette_image(np.full((10, 20), 1, np.uint8)).save(run / "eval_linear_images" / "000007_truth.png")  # another scene of that number
    (tmp_path / "figures" / "shapes_seg_scenes.png").unlink()
    report.draw_figures(report.group_runs(report.find_runs(tmp_path), tmp_path), tmp_path / "figures")
    assert np.asarray(Image.open(tmp_path / "figures" / "shapes_seg_scenes.png")).shape[0] == picture.shape[0] // 2
    (run / "eval_linear.json").unlink()  # its evaluation is still running
    report.draw_figures(report.group_runs(report.find_runs(tmp_path), tmp_path), tmp_path / "figures")
    assert np.asarray(Image.open(tmp_path / "figures" / "shapes_seg_scenes.png")).shape[1] == 8 + 4 * 408
