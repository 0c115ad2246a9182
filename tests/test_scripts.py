"""The scripts as a user starts them: each on a tiny budget, what each shows, and what each says to bad input."""

import contextlib
import importlib
import itertools
import os
import pty
import re
import termios
import zipfile

import pytest
import torch
from conftest import CPU, DATA, ROOT, TINY, TWO, read_json, start, stderr_of, write_image
from soak_resume import read_log

import data
import eval_knn
import eval_linear
import train_cls
import train_seg
from common import cli
from common.checkpoint import Run

SHAPES = [*TINY, "--batch-size", "50", "--epochs", "1"]


@pytest.mark.parametrize("script", ["train_cls", "train_seg", "eval_linear", "eval_knn", "tools.report", "tools.bench"])
def test_help_is_the_manual(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0 and module.__doc__.strip() in capsys.readouterr().out


def test_the_progress_bar_counts_the_steps_of_the_whole_run(tmp_path):
    """As a terminal of 100 columns shows it."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    flags = [*TINY, "--batch-size", "20", "--epochs", "3", "--output-dir", tmp_path]  # 5 steps an epoch
    process, shown = start("train_cls.py", *flags, stderr=slave, TQDM_MININTERVAL="0"), b""
    os.close(slave)
    with contextlib.suppress(OSError):  # the other end is closed
        while True:
            shown += os.read(master, 4096)
    assert process.wait() == 0
    bars = re.findall(r"epoch (\d)/3: +(\d+)%\|.*?\| (\d+)/15 \[", shown.decode())
    steps = [int(step) for _, _, step in bars]
    assert steps == sorted(steps) and {1, 5, 6, 10, 15} <= set(steps), shown
    for epoch, percent, step in bars:
        assert int(epoch) == (int(step) - 1) // 5 + 1 and int(percent) == round(int(step) * 100 / 15)
    assert all(len(bar) <= 100 for bar in re.split(r"[\r\n]", shown.decode()) if "/15 [" in bar)


@pytest.mark.parametrize(("method", "begins"), [
    ("grpo_rm", "epoch 100/100  acc 98.8 %"),  # its loss and ratio say little: they are in the log
    ("finetune", "epoch 100/100  loss 0.1235  acc 98.8 %"),
])  # fmt: skip
def test_epoch_lines_fit_100_columns(method, begins, tmp_path, capsys):
    args = train_seg.parse_args(["--device", "cpu", "--method", method, "--output-dir", str(tmp_path)])
    protocol = data.resolve_dataset(args, "segmentation")
    cli.resolve_training_arguments(args, CPU, protocol, lr=train_seg.PAPER_LR)
    args.classes = [f"class {i}" for i in range(171)]
    run = Run(args, CPU, 463)
    run.meter.add(463 * 256, {"loss": 0.12345, "accuracy": 0.98765, "max_ratio": 9.0, "grad_norm": 1.0, "finite": 1.0})
    run.meter.add(1, {"images": 118287})
    run.window_started -= 10  # seconds
    run.log_steps(46300, 1e-7)
    capsys.readouterr()
    run.log_epoch(46300, 1e-7, {"val_pixel_acc": 93.98, "val_miou": 70.44})
    (line,) = capsys.readouterr().out.splitlines()
    rate = re.search(r"  \d+ img/s", line)[0]
    assert line == f"{begins}{rate}  val pixel_acc 94.0  val miou 70.4" and len(line) <= 100


@pytest.mark.parametrize(("module", "flags", "message"), [
    *((train_cls, flags, message) for flags, message in (
        ("--dataset mnist", "--dataset mnist: unknown; choose one of shapes, "),
        ("--dataset voc2012", "--dataset voc2012 is for segmentation"),
        ("--dataset cifar10 --no-download --data-root {tmp}", "leave out --no-download, or "),
        ("--backbone dinov2_vitx14", "--backbone dinov2_vitx14: unknown"),
        ("--hub-repo {tmp} --backbone my_model", "--backbone my_model from {tmp} cannot be loaded"),
        ("--image-size 50", "patch size 14; take 42 or 56"), ("--epoch 1", "unrecognized arguments: --epoch"),
        ("--lr nan", "--lr: 'nan' must be a number above 0"), ("--lr -1", "--lr: '-1' must be a number above 0"),
        ("--lr 1e-3 --lr-end 1e-2", "--lr-end 0.01 is above --lr 0.001"),
        ("--epochs 0", "--epochs: '0' must be a whole number at least 1"),
        ("--epochs 2.5", "--epochs: invalid whole number value: '2.5'"),
        ("--clip-eps 0", "argument --clip-eps: '0' must be a number above 0 and at most 1"),
        ("--ratio-floor -0.1", "argument --ratio-floor: '-0.1' must be a number at least 0"),
        ("--label-noise 1.5", "argument --label-noise: '1.5' must be a number at least 0 and at most 1"),
        ("--train-fraction 1.5", "argument --train-fraction"), ("--seed 18446744073709551616", "argument --seed"),
        ("--epochs 1 --warmup-epochs 1", "--warmup-epochs 1 leaves nothing of --epochs 1"),
        ("--device cuda", "--device cuda: no CUDA device here"), ("--uniformity eq6", "invalid choice: 'eq6'"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
        *((f"--output-dir {path}", f"--output-dir: {path} cannot be written")
          for path in ("{tmp}/text.pth", "{tmp}/text.pth/run", "/proc/run")),
    )),
    (train_seg, "--dataset cifar10", "--dataset cifar10 is for classification"),
    (train_seg, "--map-size 0", "argument --map-size: '0' must be a whole number at least 1"),
    (eval_knn, "--dataset shapes_seg", "--dataset shapes_seg is for segmentation"),
    (eval_knn, "--k 0", "argument --k: '0' must be a whole number at least 1"),
    (eval_knn, "--k 101", "--k 101 is more than the 100 training images"),
    (eval_linear, "--features multiscale", "are for segmentation, not for shapes"),
    (eval_linear, "--save-images 2", "are for segmentation, not for shapes"),
    (eval_linear, "--lr 1e-6 --lr-end 1e-5", "--lr-end 1e-05 is above --lr 1e-06"),
    *((module, flags, message) for module in (eval_linear, eval_knn) for flags, message in (
        ("--weights {tmp}/other.pth", "/other.pth does not fit (Error(s) in loading state_dict for VitTiny: "),
        ("--weights {tmp}/text.pth", "{tmp}/text.pth cannot be loaded"),
        ("--image-size 43", "--image-size 43 is no multiple of patch size 14"),
        ("--output {tmp}/text.pth/result.json", "--output: {tmp}/text.pth cannot be written"),
    )),
], ids=lambda value: getattr(value, "__name__", None))  # fmt: skip
def test_bad_arguments_are_one_line(module, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("text")
    output = "--output-dir" if module in (train_cls, train_seg) else "--output"
    flags = flags.format(tmp=tmp_path).split()
    error = stderr_of(capsys, module.main, *TINY, output, tmp_path / "result", *flags)
    assert message.format(tmp=tmp_path) in error
    assert {path.name for path in tmp_path.iterdir()} == {"other.pth", "text.pth"}


def test_an_unreadable_image_ends_every_stage(image_folder, tmp_path, capsys):
    (image_folder / "train" / "class2" / "3.jpg").write_bytes(b"broken")
    flags = ["--dataset", "folder", "--data-root", image_folder, "--backbone", "vit_tiny", "--image-size", "42"]
    for main, output in ((train_cls.main, "--output-dir"), (eval_knn.main, "--output"), (eval_linear.main, "--output")):
        error = stderr_of(capsys, main, *flags, "--device", "cpu", output, tmp_path / "new" / "result")
        assert "class2/3.jpg cannot be read" in error
    assert not (tmp_path / "new" / "result").exists()


@pytest.mark.parametrize("flags", ["--lr nan", "--dataset folder --data-root {tmp}"])
def test_what_all_ranks_find_is_said_once_and_without_a_traceback(flags, tmp_path):
    write_image(tmp_path / "train" / "only" / "0.png", 0)
    (tmp_path / "val").mkdir()
    process = start("train_cls.py", *SHAPES, *flags.format(tmp=tmp_path).split(), launch=TWO)
    error = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and error.count("train_cls.py: error: ") == 1, error
    assert not re.search(rf'\[rank 1\] error|File "{re.escape(str(ROOT))}/\w+\.py', error), error


def test_too_little_gpu_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def train(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")

    monkeypatch.setattr(train_cls, "train", train)
    error = stderr_of(capsys, train_cls.main, *SHAPES, "--output-dir", tmp_path, status=1)
    assert "Tried to allocate 2.00 GiB. " in error and "--grad-accum 2" in error and "More about it" not in error


def test_folder_and_tiny_imagenet(image_folder, tiny_imagenet, tmp_path):
    """The evaluations know the run: its backbone, seed and image size are found beside the weights."""
    for dataset, root, size, count in (("folder", image_folder, 42, 18), ("tiny_imagenet", tiny_imagenet, 56, 12)):
        flags, run = ["--dataset", dataset, "--data-root", str(root), "--device", "cpu"], tmp_path / dataset
        more = f"--backbone vit_tiny --image-size {size} --seed 3 --batch-size 6 --epochs 1".split()
        train_cls.main([*flags, *more, "--output-dir", str(run)])
        expected = {"dataset": dataset, "method": "grpo_rm", "seed": 3, "backbone": "vit_tiny", "image_size": size}
        expected |= {"train_images": count, "val_images": 6, "weights": str(run / "backbone.pth")}
        for module, name in ((eval_linear, "eval_linear.json"), (eval_knn, "eval_knn.json")):
            module.main([*flags, "--weights", str(run / "backbone.pth")])
            scores = read_json(run / name)
            assert {key: scores[key] for key in expected} == expected
            assert scores["top1"] in [round(100 * hits / 6, 4) for hits in range(7)]


@pytest.mark.parametrize("method", ["grpo_rm", "finetune"])
def test_a_folder_with_masks(method, mask_folder, tmp_path):
    flags = ["--dataset", "folder", "--data-root", str(mask_folder), "--backbone", "vit_tiny", "--device", "cpu"]
    flags, run = [*flags, "--map-size", "8", "--epochs", "2"], tmp_path / "run"
    size = ["--image-size", "28", "--batch-size", "4"]
    train_seg.main([*flags, *size, "--method", method, "--output-dir", str(run)])
    config = read_json(run / "config.json")
    assert (config["task"], config["background_penalty"], config["hidden_dim"]) == ("segmentation", 0.5, 256)
    for features, name in (("linear", "eval_linear.json"), ("multiscale", "eval_linear_multiscale.json")):
        eval_linear.main([*flags, "--weights", str(run / "backbone.pth"), "--features", features])
        scores = read_json(run / name)
        assert [scores[key] for key in ("method", "features", "image_size", "val_images")] == [method, features, 28, 4]


@pytest.mark.parametrize(("archive", "script", "flags"), [
    ("cifar10-folders.zip", train_cls, "--dataset folder --data-root cifar10 --image-size 28"),
    ("tiny-imagenet-200.zip", train_cls, "--dataset tiny_imagenet --data-root . --image-size 42"),
    ("camvid-folders.zip", train_seg, "--dataset folder --data-root camvid --image-size 56 --map-size 28"),
])  # fmt: skip
def test_real_images(archive, script, flags, tmp_path, monkeypatch):
    """Cross-entropy learns something of a few of them."""
    if not (DATA / archive).is_file():
        pytest.skip(f"no {DATA / archive}; GRPO_RM_TEST_DATA names the directory of such archives")
    with zipfile.ZipFile(DATA / archive) as file:
        for folder, names in itertools.groupby(sorted(file.namelist()), os.path.dirname):
            file.extractall(tmp_path, list(names)[: 3 if "train/n" in folder else None])
    monkeypatch.chdir(tmp_path)
    flags = [*flags.split(), "--backbone", "vit_tiny", "--device", "cpu", "--limit-train", "400", "--limit-val", "50"]
    flags += ["--method", "finetune", "--batch-size", "50", "--lr", "1e-3", "--epochs", "4", "--output-dir", "run"]
    script.main(flags)
    losses = [event["loss"] for event in read_log("run") if event["event"] == "epoch"]
    assert losses[0] - losses[-1] > 0.1, losses
