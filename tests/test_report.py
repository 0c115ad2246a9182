"""The report on hand-made runs, against statistics worked out here."""

import csv
import json
import math
import operator
import statistics

import numpy as np
import pytest
from conftest import TINY, stderr_of
from PIL import Image

import train_cls
from common.palette import palette
from tools import report

SEGMENTATION = {"map_size": 128, "background_penalty": 0.5}


def fake_run(root, dataset, method, seed, sr=None, knn=None, *, epochs=(), name=None, result=None, **config):
    """A run's directory: config, log (not of frozen features), results. sr, knn: top-1, or (pixel accuracy, IoU, mIoU)
    of linear and multi-scale features; epochs: the values of the log's lines; result: more keys of the results."""
    directory = root / dataset / (name or method) / f"seed{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    masks = isinstance(sr or knn, tuple) or "map_size" in config
    base = {"dataset": dataset, "task": "segmentation" if masks else "classification", "method": method, "seed": seed}
    if method != "frozen":
        settings = {"lr": 1e-3, "epochs": 3, "ratio_floor": 0.1, "classes": ["a", "b"], "world_size": 1}
        (directory / "config.json").write_text(json.dumps(base | settings | {"device_name": "H200"} | config))
        lines = [json.dumps({"event": "epoch", "epoch": i} | values) + "\n" for i, values in enumerate(epochs)]
        (directory / "log.jsonl").write_text("".join(lines))
    base |= {"weights": None if method == "frozen" else str(directory / "backbone.pth"), "per_class_iou": {"a": seed}}
    for file, scores in (("eval_linear", sr), ("eval_linear_multiscale" if masks else "eval_knn", knn)):
        if scores is not None:
            found = dict(zip(("pixel_acc", "iou", "miou"), scores, strict=True)) if masks else {"top1": scores}
            (directory / f"{file}.json").write_text(json.dumps(base | found | (result or {})))
    return directory


def tables(root):
    """{"Table 3": its rows, lists of cells}."""
    return {table.title.split(":")[0]: table.rows for table in report.make_tables(report.load_groups(root))}


def mean_and_deviation(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def paired_t(ours, theirs):
    """t and its two-sided p for three pairs, by the closed form of Student's distribution with 2 degrees of freedom."""
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    t = statistics.mean(d) / statistics.stdev(d) * math.sqrt(3)
    return f"{t:.2f}", f"{1 - abs(t) / math.sqrt(2 + t * t):.4f}"


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws the figures of the runs below tmp_path: {name: figure}, as it was written."""

    def save(figure, title, path, handles, save=report.save_figure):
        save(figure, title, path, handles)
        found[path.stem] = figure if path.exists() else None

    found = {}
    monkeypatch.setattr(report, "save_figure", save)
    return lambda: report.draw_figures(report.load_groups(tmp_path), tmp_path) or found


def test_the_papers_numbers_agree_with_its_text():
    """Its averages over datasets, and IoU = acc / (2 - acc) of the frozen features, hold for what is typed here."""

    def mean(column, other, function):
        rows = [rows for key, rows in report.PAPER.items() if key.endswith(column) and other in rows]
        return pytest.approx(statistics.mean(function(row["grpo_rm"][0], row[other][0]) for row in rows), abs=0.01)

    assert mean(" SR", "finetune", operator.sub) == 3.754
    assert mean(" k-NN", "finetune", operator.sub) == 3.29
    assert mean(" score", "grpo_rm none", operator.sub) == 3.88
    assert mean(" seconds", "grpo_rm none", operator.truediv) == 1.0616
    for key in [key for key in report.PAPER if key.endswith("pixel-acc")]:
        accuracy, iou = (report.PAPER[key.replace("pixel-acc", name)]["frozen"][0] for name in ("pixel-acc", "IoU"))
        assert 100 * accuracy / (200 - accuracy) == pytest.approx(iou, abs=0.02)
    assert report.PAPER["voc2012 GB"] == {"finetune": (217.72,), "grpo_rm": (220.66,)}
    assert report.PAPER["voc2012 multiscale mIoU"]["finetune 10%"] == (70.98, 0.04)


def test_means_deviations_and_p_values(tmp_path):
    ours = {"SR": [66.25, 65.5, 67.125], "k-NN": [66.0, 68.5, 65.25]}
    theirs = {"SR": [60.0, 61.5, 60.75], "k-NN": [66.5, 67.25, 66.0]}
    for method, scores in (("grpo_rm", ours), ("finetune", theirs)):
        for seed, pair in enumerate(zip(scores["SR"], scores["k-NN"], strict=True)):
            fake_run(tmp_path, "tiny_imagenet", method, seed, *pair)
            fake_run(tmp_path, "cifar10", method, seed, 60.1 + seed + (method == "grpo_rm"))
    fake_run(tmp_path, "tiny_imagenet", "finetune", 7, 10.0)  # no GRPO-RM has this seed
    found = tables(tmp_path)
    baseline, row = found["Table 3"][4:]
    assert row[2:6] == ["0, 1, 2", mean_and_deviation(ours["SR"]), "65.96 ± 0.40", "+0.33"]
    assert baseline[3] == mean_and_deviation([*theirs["SR"], 10.0])
    assert baseline[6] == f"{mean_and_deviation(theirs['k-NN'])} (n = 3)"  # seed 7 has not been evaluated
    constant, *tests = (row[2:] for row in found["Table 3 tests"])
    assert constant == ["SR", "3", "1.00 ± 0.00", "+1.23", "-", "-"]  # there is no test without variation
    for test, (column, paper) in zip(tests, (("SR", "+7.29"), ("k-NN", "+7.77")), strict=True):
        gains = mean_and_deviation([a - b for a, b in zip(ours[column], theirs[column], strict=True)])
        assert test == [column, "3", gains, paper, *paired_t(ours[column], theirs[column])]


def test_missing_runs_are_dashes(tmp_path):
    run = fake_run(tmp_path / "own", "shapes", "finetune", 0, 90.0, 91.0)
    own = [["shapes", "Fine-tuning", "0", "90.00", "91.00"]]  # not in the paper: its columns are left out
    assert tables(run) == tables(tmp_path / "own") == {"Table 3": own}
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 0, 60.0)
    assert [" ".join(row) for row in tables(tmp_path)["Table 3"]] == [
        "Tiny-ImageNet frozen - - 29.24 - - 21.10 -",
        "Tiny-ImageNet Fine-tuning - - 58.67 ± 0.61 - - 58.59 ± 1.25 -",
        "Tiny-ImageNet GRPO-RM 0 60.00 65.96 ± 0.40 -5.96 - 66.36 ± 0.32 -",
        "shapes Fine-tuning 0 90.00 - - 91.00 - -",
    ]


def test_settings_are_never_mixed(tmp_path):
    for seed, name, config in (  # of "classes" there are two settings in one directory
        (0, "grpo_rm", {}), (1, "lr4", {"lr": 4e-3}), (2, "lr4", {"lr": 4e-3}), (0, "floor", {"ratio_floor": 0}),
        (0, "again", {}), (4, "classes", {"classes": ["b", "a"]}), (5, "classes", {"classes": ["b", "c"]}),
    ):  # fmt: skip
        fake_run(tmp_path, "shapes", "grpo_rm", seed, 50.0 + seed, name=name, **config)
        fake_run(tmp_path, "shapes", "finetune", seed, 40.0)
    found, start = tables(tmp_path), "GRPO-RM, in shapes/"
    rows = ["Fine-tuning 0, 1, 2, 4, 5", "again 0", "classes/seed4 4", "classes/seed5 5", "floor 0", "grpo_rm 0"]
    assert [" ".join(row[1:3]).removeprefix(start) for row in found["Table 3"]] == [*rows, "lr4 1, 2"]
    compared = [row[1].removeprefix(start) for row in found["Table 3 tests"]]
    assert compared == ["again", "floor", "grpo_rm"]  # with fine-tuning, whatever the objective, but at the same lr


@pytest.mark.parametrize(("dataset", "method", "one", "other", "mixed"), [
    ("shapes", "grpo_rm", {"hub_repo": "a"}, {"hub_repo": "b"}, False),  # the weights come with it
    ("shapes", "grpo_rm", {"hub_repo": "a", "weights": "x"}, {"hub_repo": "b", "weights": "x"}, True),
    ("folder", "grpo_rm", {"data_root": "cats"}, {"data_root": "dogs"}, False),
    ("shapes", "grpo_rm", {"data_root": "cats"}, {"data_root": "dogs"}, True),
    ("shapes", "grpo_rm", {"max_steps": 10}, {"max_steps": None}, False),
    ("shapes", "finetune", {"ratio_floor": 0}, {"ratio_floor": 1}, True),
    ("shapes", "grpo_rm", {"result": {"epochs": 50}}, {"result": {"epochs": 10}}, False),  # of the linear layer
    ("shapes", "grpo_rm", {"world_size": 1, "git_commit": "a"}, {"world_size": 8, "git_commit": "b"}, True),
    ("shapes", "frozen", {"result": {"weights": "x"}}, {}, False),
])  # fmt: skip
def test_what_is_a_setting(dataset, method, one, other, mixed, tmp_path):
    fake_run(tmp_path, dataset, method, 0, 50.0, **one)
    fake_run(tmp_path, dataset, method, 1, 60.0, **other)
    assert [row[3] for row in tables(tmp_path)["Table 3"]] == (["55.00 ± 7.07"] if mixed else ["50.00", "60.00"])


def test_segmentation_and_ten_percent_rows(tmp_path):
    for dataset, seed in [(dataset, seed) for dataset in ("voc2012", "coco_stuff") for seed in range(3)]:
        variants = ("grpo_rm", 1, 2), ("grpo_rm", 0.1, 1), ("finetune", 1, seed / 2), ("finetune", 0.1, 0)
        for method, fraction, gain in variants:
            linear = (90.0 + gain, 80.0 + gain, 70.0 + gain + seed)
            more = {"name": f"{method}_{fraction}", "train_fraction": fraction}
            fake_run(tmp_path, dataset, method, seed, linear, tuple(value + 1 for value in linear), **more)
    fake_run(tmp_path, "voc2012", "frozen", 0, (89.0, 79.0, 69.0), (90.0, 80.0, 70.0))
    found = tables(tmp_path)
    assert found.keys() == {"Table 2", "Table 2 tests", "Table 4", "Table 4 tests"}
    methods = ["frozen", "Fine-tuning (10%)", "Fine-tuning", "GRPO-RM (10%)", "GRPO-RM"]
    rows = [[features, method] for features in ("linear", "multiscale") for method in methods]
    assert [row[1:3] for row in found["Table 2"]] == [row[1:3] for row in found["Table 4"]] == rows
    cells = "0, 1, 2|91.00 ± 0.00|93.67 ± 0.02|-2.67|81.00 ± 0.00|88.57 ± 0.03|-7.57|72.00 ± 1.00|70.38 ± 0.08|+1.62"
    assert "|".join(found["Table 2"][3][3:]) == cells
    assert found["Table 4"][5][-3:] == ["-", "31.75", "-"] and found["Table 4"][9][7] == "83.00 ± 0.00"
    tenth, _, whole, _ = (row[1:] for row in found["Table 2 tests"] if "mIoU" in row[2])
    assert tenth[:5] == ["GRPO-RM (10%)", "linear mIoU", "3", "1.00 ± 0.00", "+0.76"]
    assert whole[4:] == ["+0.66", *paired_t([2, 2, 2], [0, 0.5, 1])]


def test_costs(tmp_path):
    for method, seed, seconds, config in (  # what is compiled is not comparable, and one epoch is no measurement
        ("grpo_rm", 0, [100, 2, 3, 10], {"world_size": 4}), ("grpo_rm", 1, [100, 5, 4, 6], {"world_size": 4}),
        ("grpo_rm", 2, [100, 50, 50], {"compile": True}), ("finetune", 0, [9], {}),
    ):  # fmt: skip
        epochs = [{"seconds": s, "peak_memory_gb": 2.0 + i} for i, s in enumerate(seconds)]
        fake_run(tmp_path, "tiny_imagenet", method, seed, 60.0, epochs=epochs, **config)
    fake_run(tmp_path, "shapes", "finetune", 0, epochs=[{"seconds": s, "peak_memory_gb": None} for s in (9, 1)])
    found = tables(tmp_path)
    assert [" ".join(row[1:]) for row in found["Table 5"]] == [
        "Fine-tuning - - - 9.30 - - 13.26 -",
        "GRPO-RM 1 x H200, --compile 2 50.00 10.37 +39.63 3.50 15.12 -11.62",
        "GRPO-RM 4 x H200 0, 1 4.00 ± 1.41 10.37 -6.37 16.00 ± 0.00 15.12 +0.88",
        "Fine-tuning 1 x H200 0 1.00 - - - - -",
    ]
    assert found["Table 3"][2][:3] == ["Tiny-ImageNet", "GRPO-RM", "0, 1, 2"]  # scores do not depend on hardware


def test_ablation(tmp_path):
    for seed, more in ((seed, {"epochs": [{"seconds": 1.0}, {"seconds": 2.0}]}) for seed in range(2)):
        for reward, sr in (("none", 60.0), ("eq5", 61.0), ("eq4", 62.0)):
            more |= {"uniformity": reward, "world_size": 1 + seed * (reward == "eq5")}  # times on two kinds of hardware
            fake_run(tmp_path, "tiny_imagenet", "grpo_rm", seed, sr + seed, name=reward, **more)
        fake_run(tmp_path, "voc2012", "grpo_rm", seed, (90.0, 80.0, 70.0), **more | {"uniformity": "eq5"})
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 90.0)  # without ablation: not in the table
    found = tables(tmp_path)
    assert [" ".join(row[i] for i in (0, 1, 4, 6, 9)) for row in found["Table 6"]] == [
        "Tiny-ImageNet GRPO-RM 62.50 ± 0.71 -3.46 -8.37",
        "Tiny-ImageNet GRPO-RM, no uniformity reward 60.50 ± 0.71 -1.66 -7.40",
        "Tiny-ImageNet GRPO-RM, Eq. (5) 61.50 ± 0.71 +1.18 -",
        "Pascal VOC 2012 GRPO-RM - - -",
        "Pascal VOC 2012 GRPO-RM, no uniformity reward - - -",
        "Pascal VOC 2012 GRPO-RM, Eq. (5) 90.00 ± 0.00 - -9418.00",
    ]
    assert found["Table 3"][5][:4] == ["Tiny-ImageNet", "GRPO-RM", "0, 1", "62.50 ± 0.71"]  # Eq. (4) alone


def test_what_is_printed_and_stored(tmp_path, capsys):
    for seed in range(2):
        more = {"epochs": [{"seconds": 1.0}] * 2, "backbone": "vit_tiny", "limit_train": None}
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 50.0 + seed, 40.0, **more)
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 51.0, 40.0, name="none", uniformity="none")
        fake_run(tmp_path, "cifar10", "finetune", seed, 49.0, 41.0 + seed)
        fake_run(tmp_path, "shapes_seg", "grpo_rm", seed, (90.0, 80.0, 70.0), **SEGMENTATION, lr=0.1 * (seed + 1))
    going = fake_run(tmp_path, "cifar10", "grpo_rm", 2, epochs=[{"loss": 1.0}, {"loss": 0.5}])
    with open(going / "log.jsonl", "a") as file:
        file.write('{"event": "epoch", "epo')  # it is writing
    report.main([str(tmp_path), "--csv", str(tmp_path / "csv")])
    lines, stored = capsys.readouterr().out.splitlines(), []
    files = sorted((tmp_path / "csv").iterdir())
    assert [file.stem for file in files] == ["table2", "table3", "table3_tests", "table5", "table6"]
    for file in files:
        stored += csv.reader(file.read_text().splitlines())
    assert [line[2:-2].split(" | ") for line in lines if line.startswith("| ") and "---" not in line] == stored
    assert "CIFAR-10: backbone vit_tiny, epochs 3, lr 0.001, ratio_floor 0.1." in lines
    assert "shapes_seg: epochs 3, ratio_floor 0.1." in lines  # its runs do not share their learning rate
    assert [line for line in lines if line.startswith("- ")] == [
        "- cifar10/grpo_rm/seed2 is not finished: epoch 2 of 3, no eval_knn.json and no eval_linear.json",
        *(f"- shapes_seg/grpo_rm/seed{i} is not finished: no eval_linear_multiscale.json" for i in range(2)),
    ]


def test_bad_directories(tmp_path, capsys):
    for directory in (tmp_path / "nowhere", tmp_path):
        assert f"{directory}: no run there" in stderr_of(capsys, report.main, directory)
    file = fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0) / "config.json"
    for flag in ("--figures", "--csv"):
        assert f"{flag}: {file} cannot be written" in stderr_of(capsys, report.main, tmp_path, flag, file)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("eval_linear.json", '{"top1": 5', "eval_linear.json cannot be used"),
    ("eval_linear.json", '{"dataset": "a", "task": "classification", "method": "b", "seed": 0}', "'top1'"),
    ("eval_knn.json", '{"dataset": "a", "task": "classification", "method": "b", "seed": 0, "top1": 5}', "several"),
    ("config.json", "[1]", "config.json cannot be used"),
    ("log.jsonl", '{"event": "epoch", "ep\n{"event": "epoch", "epoch": 1}\n', "log.jsonl cannot be used"),
])  # fmt: skip
def test_damaged_files(name, content, message, tmp_path, capsys):
    directory = fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0)
    (directory / name).write_text(content)
    error = stderr_of(capsys, report.main, tmp_path)
    assert message in error and str(directory) in error


def test_curves_of_a_real_run(tmp_path, draw):
    """The log has what figures and Table 5 look for, and the one validation is marked at a whole epoch."""
    train_cls.main([*TINY, "--batch-size", "50", "--epochs", "3", "--output-dir", str(tmp_path / "seed0")])
    ((_, *names, seconds, memory),) = tables(tmp_path)["Table 5"]
    assert names == ["GRPO-RM", "1 x cpu", "0"] and float(seconds) >= 0 and memory == "-"
    (loss, validation), policy = (draw()[f"shapes_{name}"].axes for name in ("curves", "policy"))
    assert (loss.get_title(), validation.get_title()) == ("loss of GRPO-RM", "validation accuracy (%)")
    assert policy[-1].get_title() == "largest ratio p/(q + F/c) in the epoch"
    for axis, epochs in ((loss, [1, 2, 3]), (validation, [3])):
        assert list(axis.lines[-1].get_xdata()) == epochs
        assert [tick for tick in axis.get_xticks() if 0.5 < tick < 3.5] == [1, 2, 3]


def test_curves_of_several_seeds(tmp_path, draw):
    for seed in range(2):
        epochs = [{"loss": i + seed, "val_miou": None if i else 3.0, "max_ratio": 2} for i in range(4 - seed)]
        for method, uniformity in (("grpo_rm", "eq4"), ("grpo_rm", "eq5"), ("finetune", "eq4")):
            more = SEGMENTATION | {"name": f"{method}_{uniformity}", "uniformity": uniformity, "ratio_floor": 0.0}
            fake_run(tmp_path, "voc2012", method, seed, epochs=epochs, **more)
    curves, policy = (draw()[f"voc2012_{name}"].axes for name in ("curves", "policy"))
    assert curves[0].get_title() == "cross-entropy of fine-tuning"
    assert policy[0].get_title() == "largest ratio p/q in the epoch"
    assert [len(axis.lines) for axis in curves] == [3, 3, 6]  # two seeds and their mean, of one method or two
    mean = curves[0].lines[-1]
    assert (list(mean.get_xdata()), list(mean.get_ydata())) == ([1, 2, 3], [0.5, 1.5, 2.5])  # where both seeds are


def test_long_names_one_epoch_and_a_run_that_blew_up(tmp_path, draw):
    for i, loss in enumerate([-0.01, -0.02, -0.03, 2e4]):
        more = {"name": f"grpo_rm_with_a_long_name_{i}", "epochs": [{"loss": loss, "val_accuracy": 50.0}]}
        fake_run(tmp_path, "cifar10", "grpo_rm", 0, lr=10.0**-i, **more)
    figure = draw()["cifar10_curves"]
    (legend,), (loss, validation) = figure.legends, figure.axes
    assert len({line.get_color() for line in loss.lines}) == len(legend.texts) == 4
    assert legend.get_window_extent().width < figure.bbox.width
    assert loss.get_window_extent().height > 2 * figure.dpi  # inches: not squeezed by the legend
    assert [tick for tick in loss.get_xticks() if 0.5 < tick < 1.5] == [1]
    assert (loss.get_yscale(), validation.get_yscale()) == ("symlog", "linear")


def test_images_stand_side_by_side(tmp_path, draw):
    def save(folder, index, kind, label):
        image = Image.fromarray(np.full((10, 20), label, np.uint8))
        image.putpalette(palette().tobytes())
        (image.convert("RGB") if kind == "image" else image).save(folder / f"{index}_{kind}.png")

    result = {"per_class_iou": {"background": 1.0, "a": 1.0, "b": None, "c": 2.0}}
    for label, method in enumerate(["frozen", "finetune", "grpo_rm"], 1):
        run = fake_run(tmp_path, "shapes_seg", method, 0, (90.0, 80.0, 70.0), result=result)
        (images := run / "eval_linear_images").mkdir()
        for index, truth in [("000009", 0), ("000000", 0), ("000007", 255)][method != "frozen" :]:
            for kind, value in (("image", 4), ("truth", truth), ("prediction", label)):
                save(images, index, kind, value)
    figure = draw()["shapes_seg_scenes"]
    expected = palette()[[4, 0, 1, 2, 3, 4, 255, 1, 2, 3]].tolist()
    assert [axis.images[0].get_array()[5, 5].tolist() for axis in figure.axes] == expected
    assert [axis.get_title() for axis in figure.axes[1:5]] == ["ground truth", "frozen", "Fine-tuning", "GRPO-RM"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["background", "a", "b", "c", "void"]
    save(images, "000007", "truth", 1)  # another image of that number
    assert len(draw()["shapes_seg_scenes"].axes) == 5
    (run / "eval_linear.json").unlink()  # its evaluation is still running
    assert len(draw()["shapes_seg_scenes"].axes) == 2 * 4
