"""The report on hand-made runs, against statistics worked out here."""

import csv
import json
import math
import statistics

import numpy as np
import pytest
from conftest import TINY, stderr_of

import train_cls
from common.images import palette, palette_image
from tools import figures, report

CONFIG = {"lr": 1e-3, "lr_end": 1e-5, "epochs": 3, "ratio_floor": 0.1, "classes": ["a", "b"], "uniformity": "eq4"}
CONFIG |= {"world_size": 1, "device_name": "H200", "grad_accum": 1, "compile": False}
EPOCH = {"event": "epoch", "loss": 1.0, "accuracy": 0.5, "seconds": 1.0, "peak_memory_gb": None}


def fake_run(root, dataset, method, seed, linear=None, other=None, *, name=None, epochs=({},) * 3, **config):
    """A run's directory as the scripts leave it. linear, other: top-1 of softmax regression and k-NN, or (pixel
    accuracy, IoU, mIoU) of linear and multi-scale features. epochs: values of the log's lines."""
    directory = root / dataset / (name or method) / f"seed{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    task = "segmentation" if isinstance(linear, tuple) else "classification"
    base = {"dataset": dataset, "data_root": "data", "task": task, "method": method, "seed": seed, "weights": None}
    base |= {key: config[key] for key in ("data_root", "task") if key in config}
    result = base | {"per_class_iou": {"background": 1.0, "a": seed, "b": None, "c": 2.0}, "confusion": [[seed]]}
    result |= config.pop("result", {})
    if method != "frozen":
        (directory / "config.json").write_text(json.dumps(base | CONFIG | config))
        events = [EPOCH | {"epoch": i} | values for i, values in enumerate(epochs)]
        (directory / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        result["weights"] = str(directory / "backbone.pth")
    second = "eval_linear_multiscale" if task == "segmentation" else "eval_knn"
    for file, scores in (("eval_linear", linear), (second, other)):
        if isinstance(scores, tuple):
            scores = dict(zip(("pixel_acc", "iou", "miou"), scores, strict=True))
        elif scores is not None:
            scores = {"top1": scores}
        if scores:
            (directory / f"{file}.json").write_text(json.dumps(result | scores))
    return directory


def tables(root):
    """{"Table 3": its rows as lists of cells}."""
    found = report.make_tables(report.load_groups(root))
    return {title.split(":")[0]: [list(row.values()) for row in rows] for title, rows in found.items()}


def methods(root, table="Table 3"):
    return [" ".join(row[1:3]) for row in tables(root)[table]]


def mean_and_deviation(values):
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def paired_t(ours, theirs):
    """t and its two-sided p for three pairs, by the closed form of Student's distribution with 2 degrees of freedom."""
    d = [a - b for a, b in zip(ours, theirs, strict=True)]
    t = statistics.mean(d) / statistics.stdev(d) * math.sqrt(3)
    return [f"{t:.2f}", f"{1 - abs(t) / math.sqrt(2 + t * t):.4f}"]


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws the figures of the runs below tmp_path: {name: figure}, as it was written."""

    def save(figure, title, legend, columns, path, save=figures.save):
        save(figure, title, legend, columns, path)
        assert path.with_name(f"{path.name}.png").exists() and path.with_name(f"{path.name}.pdf").exists()
        found[path.name] = figure

    def call():
        report.main([str(tmp_path), "--figures", str(tmp_path / "figures")])
        return found

    found = {}
    monkeypatch.setattr(figures, "save", save)
    return call


def test_means_deviations_and_p_values(tmp_path):
    ours = {"SR": [66.25, 65.5, 67.125], "k-NN": [66.0, 68.5, 65.25]}
    theirs = {"SR": [60.0, 61.5, 60.75], "k-NN": [66.5, 67.25, 66.0]}
    for method, scores in (("grpo_rm", ours), ("finetune", theirs)):
        for seed, pair in enumerate(zip(scores["SR"], scores["k-NN"], strict=True)):
            fake_run(tmp_path, "tiny_imagenet", method, seed, *pair)
            fake_run(tmp_path, "cifar10", method, seed, 60.1 + seed + (method == "grpo_rm"))
            if seed < 2:  # too few for a test
                fake_run(tmp_path, "shapes", method, seed, 60.0 + seed)
    fake_run(tmp_path, "tiny_imagenet", "finetune", 7, 10.0)  # no GRPO-RM has this seed
    found = tables(tmp_path)
    baseline, row = found["Table 3"][2:4]
    assert row[2:6] == ["0, 1, 2", mean_and_deviation(ours["SR"]), "65.96 ± 0.40", "+0.33"]
    assert baseline[3] == mean_and_deviation([*theirs["SR"], 10.0])
    assert baseline[6] == f"{mean_and_deviation(theirs['k-NN'])} (n = 3)"  # seed 7 has not been evaluated
    constant, *tests = (row[1:] for row in found["Table 3 tests"])
    assert constant == ["GRPO-RM - Fine-tuning", "SR", "0, 1, 2", "1.00 ± 0.00"]  # no test without variation
    for test, column in zip(tests, ("SR", "k-NN"), strict=True):
        gains = mean_and_deviation([a - b for a, b in zip(ours[column], theirs[column], strict=True)])
        assert test[1:] == [column, "0, 1, 2", gains, *paired_t(ours[column], theirs[column])]


def test_one_run_is_no_mean_and_what_was_not_run_is_not_shown(tmp_path):
    fake_run(tmp_path / "own", "shapes", "finetune", 0, 90.0, 91.0)
    own = [["shapes", "Fine-tuning", "0", "90.00 (n = 1)", "91.00 (n = 1)"]]  # the paper has no such row
    assert tables(tmp_path / "own")["Table 3"] == own
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 0, 60.0)
    fake_run(tmp_path, "voc2012", "grpo_rm", 0, None, task="segmentation")  # not evaluated
    found = tables(tmp_path)
    assert found.keys() == {"Table 3", "Table 5"}
    assert found["Table 3"] == [["Tiny-ImageNet", "GRPO-RM", "0", "60.00 (n = 1)", "65.96 ± 0.40", "-5.96"], *own]


def test_settings_are_never_mixed_and_name_their_rows(tmp_path):
    for seed, lr in ((0, 2e-3), (1, 2e-3), (0, 5e-4)):
        more = {"name": f"grpo_rm_lr{lr}", "lr": lr, "lr_end": lr / 100}
        fake_run(tmp_path, "shapes", "grpo_rm", seed, 50.0, ratio_floor=3.0, **more)
    assert methods(tmp_path) == ["GRPO-RM, lr 0.0005 0", "GRPO-RM, lr 0.002 0, 1"]
    fake_run(tmp_path, "shapes", "grpo_rm", 2, 50.0, name="floor", ratio_floor=1.0, lr=2e-3, lr_end=2e-5)
    names = ["lr 0.0005, ratio_floor 3 0", "lr 0.002, ratio_floor 1 2", "lr 0.002, ratio_floor 3 0, 1"]
    assert methods(tmp_path) == [f"GRPO-RM, {name}" for name in names]
    fake_run(tmp_path, "shapes", "grpo_rm", 0, 50.0, name="wide", ratio_floor=1.0, lr=2e-3, hidden_dim=9)
    fake_run(tmp_path, "shapes", "grpo_rm", 0, 50.0, name="wider", ratio_floor=1.0, lr=2e-3, hidden_dim=10)  # 3 differ
    places = ["floor 2", "grpo_rm_lr0.0005 0", "grpo_rm_lr0.002 0, 1", "wide 0", "wider 0"]
    assert methods(tmp_path) == [f"GRPO-RM, in shapes/{place}" for place in places]


def test_only_equal_settings_are_compared(tmp_path):
    for seed in range(3):
        fake_run(tmp_path, "cats", "grpo_rm", seed, 50.0, label_noise=0.4)
        for noise in (0.0, 0.4):
            fake_run(tmp_path, "cats", "finetune", seed, 50.0 + noise, name=f"noise{noise}", label_noise=noise)
    rows = [*(f"Fine-tuning, label_noise {noise} 0, 1, 2" for noise in (0, 0.4)), "GRPO-RM 0, 1, 2"]
    assert methods(tmp_path) == rows
    ((_, pair, *_),) = tables(tmp_path)["Table 3 tests"]
    assert pair == "GRPO-RM - Fine-tuning, label_noise 0.4"


@pytest.mark.parametrize(("dataset", "method", "one", "other", "mixed"), [
    ("shapes", "grpo_rm", {"hub_repo": "a"}, {"hub_repo": "b"}, False),  # the weights come with it
    ("folder", "grpo_rm", {"data_root": "a/cats"}, {"data_root": "b/cats"}, False),
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
    scores = ["55.00 ± 7.07"] if mixed else ["50.00 (n = 1)", "60.00 (n = 1)"]
    assert sorted(row[3] for row in tables(tmp_path)["Table 3"]) == scores


def test_own_data_are_called_by_their_folder(tmp_path, capsys, draw):
    epochs = [{"val_accuracy": 50.0, "val_miou": 40.0}] * 3
    for folder in ("cats", "dogs", "cifar10"):  # the last one is not the paper's set
        more = {"name": folder, "epochs": epochs, "data_root": f"/data/{folder}"}
        fake_run(tmp_path, "folder", "grpo_rm", 0, 50.0, **more)
    more |= {"name": "scenes", "data_root": "/data/scenes"}
    fake_run(tmp_path, "folder", "grpo_rm", 0, (90.0, 80.0, 70.0), **more)
    found = tables(tmp_path)
    assert [row[0] for row in found["Table 3"]] == ["cats", "cifar10", "dogs"]
    assert found["Table 3"][1] == ["cifar10", "GRPO-RM", "0", "50.00 (n = 1)"]
    assert found["Table 2"] == [["scenes", "GRPO-RM", "linear", "0", *(f"{n}.00 (n = 1)" for n in (90, 80, 70))]]
    drawn = {name.removesuffix("_curves"): figure for name, figure in draw().items() if name.endswith("_curves")}
    assert drawn.keys() == {"cats", "dogs", "cifar10", "scenes"}
    assert drawn["dogs"].get_suptitle() == "dogs" and "dogs: epochs 3, lr 0.001" in capsys.readouterr().out


def test_segmentation_and_ten_percent_rows(tmp_path):
    for dataset, seed in [(dataset, seed) for dataset in ("voc2012", "coco_stuff") for seed in range(3)]:
        gains = {("grpo_rm", 1): 2, ("grpo_rm", 0.1): 1, ("finetune", 1): seed / 2, ("finetune", 0.1): 0}
        for (method, fraction), gain in gains.items():
            linear = (90.0 + gain, 80.0 + gain, 70.0 + gain + seed)
            more = {"name": f"{method}_{fraction}", "train_fraction": fraction}
            fake_run(tmp_path, dataset, method, seed, linear, tuple(value + 1 for value in linear), **more)
    fake_run(tmp_path, "voc2012", "frozen", 0, (89.0, 79.0, 69.0))
    found = tables(tmp_path)
    assert found.keys() == {"Table 2", "Table 2 tests", "Table 4", "Table 4 tests", "Table 5"}
    rows = ["Fine-tuning (10%)", "Fine-tuning", "GRPO-RM (10%)", "GRPO-RM"]
    rows = [[method, features] for features in ("linear", "multiscale") for method in rows]
    assert [row[1:3] for row in found["Table 4"]] == rows
    assert [row[1:3] for row in found["Table 2"]] == [["frozen", "linear"], *rows]
    cells = "0, 1, 2|91.00 ± 0.00|93.67 ± 0.02|-2.67|81.00 ± 0.00|88.57 ± 0.03|-7.57|72.00 ± 1.00|70.38 ± 0.08|+1.62"
    assert "|".join(found["Table 2"][3][3:]) == cells
    tenth, whole = (row[1:] for row in found["Table 2 tests"] if row[2] == "linear mIoU")
    assert tenth == ["GRPO-RM (10%) - Fine-tuning (10%)", "linear mIoU", "0, 1, 2", "1.00 ± 0.00"]
    assert whole[0] == "GRPO-RM - Fine-tuning" and whole[4:] == paired_t([2, 2, 2], [0, 0.5, 1])


def test_costs_and_ablation(tmp_path):
    for seed, seconds, config in (  # what is compiled is not comparable, and one epoch is no measurement
        (0, [100, 2, 3, 10], {"world_size": 4}), (1, [100, 5, 4, 6], {"world_size": 4}),
        (2, [100, 50, 50], {"compile": True}), (3, [9], {}),
    ):  # fmt: skip
        epochs = [{"seconds": s, "peak_memory_gb": 2.0 + i} for i, s in enumerate(seconds)]
        fake_run(tmp_path, "tiny_imagenet", "grpo_rm", seed, 60.0, epochs=epochs, **config)
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 90.0)  # without ablation: not in Table 6
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 0, 61.0, name="eq5", uniformity="eq5")
    fake_run(tmp_path, "tiny_imagenet", "grpo_rm", 0, 62.0, name="none", uniformity="none")
    found = tables(tmp_path)
    assert [" ".join(row[2:]) for row in found["Table 5"] if row[0] == "Tiny-ImageNet"] == [
        "4 x H200, grad_accum 1, compile False 0, 1 4.00 ± 1.41 10.37 -6.37 20.00 ± 0.00 15.12 +4.88",
        "1 x H200, grad_accum 1, compile True 2 50.00 (n = 1) 10.37 +39.63 4.00 (n = 1) 15.12 -11.12",
    ]
    assert found["Table 3"][1][:3] == ["Tiny-ImageNet", "GRPO-RM", "0, 1, 2, 3"]  # scores do not depend on hardware
    assert len(found["Table 3"]) == 2  # Eq. (4) alone
    assert [row[1] for row in found["Table 6"]] == ["GRPO-RM"] * 3 + report.ABLATIONS
    assert found["Table 6"][0][3:7] == ["0, 1", "60.00 ± 0.00", "65.96", "-5.96"]
    assert found["Table 6"][4][4:] == ["61.00 (n = 1)", "60.32", "+0.68", "1.00 (n = 1)", "18.57", "-17.57"]


def test_what_is_printed_and_stored(tmp_path, capsys):
    for seed in range(3):
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, 50.0 + seed, 40.0, backbone="vit_tiny", limit_train=None)
        fake_run(tmp_path, "cifar10", "finetune", seed, 49.0, 41.0 + seed)
        fake_run(tmp_path, "shapes_seg", "grpo_rm", seed, (90.0, 80.0, 70.0), lr=0.1 * (seed + 1))
    going = fake_run(tmp_path, "cifar10", "grpo_rm", 3, epochs=[{}] * 2)
    with open(going / "log.jsonl", "a") as file:
        file.write('{"event": "epoch", "epo')  # it is writing
    report.main([str(tmp_path), "--csv", str(tmp_path / "csv")])
    lines, stored = capsys.readouterr().out.splitlines(), []
    files = sorted((tmp_path / "csv").iterdir())
    assert [file.stem for file in files] == ["table2", "table3", "table3_tests", "table5"]
    for file in files:
        stored += csv.reader(file.read_text().splitlines())
    assert [line[2:-2].split(" | ") for line in lines if line.startswith("| ") and "---" not in line] == stored
    assert "CIFAR-10: backbone vit_tiny, epochs 3, lr 0.001, ratio_floor 0.1." in lines
    assert "shapes_seg: epochs 3, ratio_floor 0.1." in lines  # its runs do not share their learning rate
    unfinished = "- cifar10/grpo_rm/seed3 is not finished: epoch 2 of 3, no eval_knn.json, no eval_linear.json"
    assert [line for line in lines if line.startswith("- ")] == [unfinished]  # nobody asked for multi-scale features


def test_bad_directories(tmp_path, capsys):
    for directory in (tmp_path / "nowhere", tmp_path):
        assert f"{directory}: no run there" in stderr_of(capsys, report.main, directory)
    run = fake_run(tmp_path, "cifar10", "grpo_rm", 0, 50.0)
    for flag in ("--figures", "--csv"):
        message = f"{flag}: {run / 'config.json'} cannot be written"
        assert message in stderr_of(capsys, report.main, tmp_path, flag, run / "config.json")
    other = fake_run(tmp_path / "other", "cifar100", "grpo_rm", 0, 50.0)
    (run / "eval_linear.json").write_text((other / "eval_linear.json").read_text())
    assert f"{run} holds files of different runs" in stderr_of(capsys, report.main, tmp_path)


def test_curves_of_a_real_run(tmp_path, draw):
    """The log has what figures and Table 5 look for, and the one validation is marked at a whole epoch."""
    train_cls.main([*TINY, "--batch-size", "50", "--epochs", "3", "--output-dir", str(tmp_path / "seed0")])
    ((_, *names, seconds),) = tables(tmp_path)["Table 5"]
    assert names == ["GRPO-RM", "1 x cpu, grad_accum 1, compile False", "0"] and seconds.endswith(" (n = 1)")
    drawn = draw()
    validation, training = drawn["shapes_curves"].axes
    labels = [axis.get_ylabel() for axis in (validation, training, *drawn["shapes_policy"].axes)]
    assert labels == [*("validation accuracy (%)", "training accuracy (%)"), *figures.PANELS["policy"]]
    for axis, epochs in ((training, [1, 2, 3]), (validation, [3])):
        assert list(axis.lines[-1].get_xdata()) == epochs and axis.get_xlabel() == "epoch"
        assert all(tick == int(tick) for tick in axis.get_xticks())


def test_curves_of_several_seeds_and_settings(tmp_path, draw):
    for seed in range(2):
        epochs = [{"loss": i + seed, "accuracy": (i + seed) / 10, "max_ratio": 2} for i in range(4 - seed)]
        fake_run(tmp_path, "cifar10", "grpo_rm", seed, epochs=epochs, label_noise=0.4)
        fake_run(tmp_path, "cifar10", "finetune", seed, epochs=epochs, label_noise=0.4)
        fake_run(tmp_path, "cifar10", "finetune", seed, epochs=epochs, label_noise=0.4, name="lr", lr=0.1)
    drawn = draw()
    assert drawn["cifar10_curves"].get_suptitle() == "CIFAR-10, label_noise 0.4"
    (accuracy,), losses = drawn["cifar10_curves"].axes, drawn["cifar10_losses"].axes
    names = ["Fine-tuning, lr 0.001 (n = 2)", "Fine-tuning, lr 0.1 (n = 2)", "GRPO-RM (n = 2)"]
    assert [text.get_text() for text in drawn["cifar10_curves"].legends[0].texts] == names
    assert [axis.get_ylabel() for axis in losses] == list(figures.PANELS["losses"])
    assert [len(axis.lines) for axis in (accuracy, *losses)] == [9, 6, 3]  # two seeds and their mean, of each group
    one, two, grpo = accuracy.lines[2::3]
    assert (list(grpo.get_xdata()), list(grpo.get_ydata())) == ([1, 2, 3], [5, 15, 25])  # where both seeds are
    assert one.get_color() == two.get_color() == losses[0].lines[0].get_color() == figures.COLOURS["finetune"]
    assert grpo.get_color() == losses[1].lines[0].get_color() == figures.COLOURS["grpo_rm"]
    assert one.get_linestyle() != two.get_linestyle() and one.get_marker() != two.get_marker()


def test_images_stand_side_by_side(tmp_path, draw):
    def save(folder, index, kind, label):
        image = palette_image(np.full((10, 20), label, np.uint8))
        (image.convert("RGB") if kind == "image" else image).save(folder / f"{index}_{kind}.png")

    for label, method in enumerate(["frozen", "finetune", "grpo_rm"], 1):
        run = fake_run(tmp_path, "shapes_seg", method, 0, (90.0, 80.0, 70.0))
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
