"""The scripts as a user starts them: each on a tiny budget, what each shows, and what each says to bad input."""

import importlib
import itertools
import os
import re
import zipfile

import pytest
import torch
from conftest import DATA, ROOT, TINY, TWO, read_log, start, stderr_of, write_image

import eval_knn
import eval_linear
import train_cls
import train_seg

SHAPES = [*TINY, "--batch-size", "50", "--epochs", "1"]


@pytest.mark.parametrize("script", ["train_cls", "train_seg", "eval_linear", "eval_knn", "tools.report", "tools.bench"])
def test_help_is_the_manual(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as exit_:
        module.main(["--help"])
    assert exit_.value.code == 0 and module.__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize(("module", "flags", "message"), [
    *((train_cls, flags, message) for flags, message in (
        ("--dataset mnist", "--dataset mnist: unknown; choose one of shapes, "),
        ("--dataset voc2012", "--dataset voc2012 is for segmentation"),
        ("--dataset cifar10 --no-download --data-root {tmp}", "leave out --no-download, or "),
        ("--backbone dinov2_vitx14", "--backbone dinov2_vitx14: unknown"),
        ("--weights none.pth", "--weights none.pth: no such file"),
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
        ("--output-dir {tmp}/text.pth", "--output-dir: {tmp}/text.pth cannot be written"),
        ("--output-dir /proc/run", "--output-dir: /proc/run cannot be written"),
    )),
    (train_seg, "--dataset cifar10", "--dataset cifar10 is for classification"),
    (eval_knn, "--dataset shapes_seg", "--dataset shapes_seg is for segmentation"),
    (eval_knn, "--k 101", "--k 101 is more than the 100 training images"),
    (eval_linear, "--features multiscale", "are for segmentation, not for shapes"),
    (eval_linear, "--weights {tmp}/other.pth --output {tmp}/other.json", "the layer would replace --weights"),
    (eval_linear, "--save-images 2", "are for segmentation, not for shapes"),
    *((module, flags, message) for module in (eval_linear, eval_knn) for flags, message in (
        ("--weights {tmp}/other.pth", "/other.pth does not fit (Error(s) in loading state_dict for VitTiny: "),
        ("--weights none.pth", "none.pth: no such file"), ("--image-size 43", "43 is no multiple of patch size 14"),
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


def test_what_all_ranks_find_is_said_once_and_without_a_traceback(tmp_path):
    write_image(tmp_path / "train" / "only" / "0.png", 0)
    (tmp_path / "val").mkdir()
    process = start("train_cls.py", *SHAPES, "--dataset", "folder", "--data-root", tmp_path, launch=TWO)
    error = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and error.count("train_cls.py: error: ") == 1, error
    assert not re.search(rf'\[rank 1\] error|File "{re.escape(str(ROOT))}/\w+\.py', error), error


def test_too_little_gpu_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def train(*rest):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")

    monkeypatch.setattr(train_cls, "train", train)
    error = stderr_of(capsys, train_cls.main, *SHAPES, "--output-dir", tmp_path, status=1)
    assert "Tried to allocate 2.00 GiB. " in error and "--grad-accum 2" in error and "More about it" not in error


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
