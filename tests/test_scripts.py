"""The scripts as a user starts them: each on a tiny budget, and what each says to bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_script, stderr_of, write_image

import eval_knn
import eval_linear
import grpo_rm
import train_cls
from data import stage

REAL_DATA = Path(os.environ.get("GRPO_RM_TEST_DATA", ROOT / ".." / "shared" / "data"))


@pytest.mark.parametrize("script", ["train_cls.py", "eval_linear.py", "eval_knn.py", "report.py"])
def test_help_is_the_manual(script):
    done = run_script(script, "--help")
    assert done.returncode == 0
    assert (ROOT / script).read_text().split('"""')[1].splitlines()[0] in done.stdout


def test_the_readmes_reward_in_three_lines():
    """What README.md says to write below the sum of the rewards works, and changes what it says."""
    (code,) = re.findall(r"```python\n(solved = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    source = (ROOT / "grpo_rm.py").read_text()
    line = next(line for line in source.splitlines() if line.lstrip().startswith("rewards = accuracy_weight"))
    changed = source.replace(line, line + "\n" + textwrap.indent(code, "    "))
    module = types.ModuleType("changed")
    exec(compile(changed.split("# Policy\n")[0], "changed", "exec"), module.__dict__)
    old = torch.tensor([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    for logits in (old, old + 0.1):
        theirs, ours = (m.grpo_rm_loss(logits.clone().requires_grad_(), old, torch.tensor([0, 0]), fused=False) for m in (module, grpo_rm))
        assert theirs[1].keys() == ours[1].keys()
    rewards = grpo_rm.accuracy_reward(torch.tensor([0, 0]), 3)
    q, targets, G = old.softmax(1), torch.tensor([0, 0]), 3
    scope = {"torch": torch, "q": q, "targets": targets, "G": G, "rewards": rewards, "accuracy_reward": grpo_rm.accuracy_reward}
    exec(code, scope)
    assert scope["rewards"].tolist() == [[pytest.approx(2.7), 0, 0], [3, 0, 0]]  # only the solved sample's


def test_chain_of_stages_and_its_continuation(tmp_path):
    """run_all.sh from nothing to the table; a second call finds everything done and an interrupted one goes on."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{tmp_path / 'bin'}:{os.environ['PATH']}",
        "OUT": str(tmp_path / "runs"),
        "SEEDS": "0",
        "EPOCHS": "1",
        "NPROC": "1",
        "MODEL_ARGS": " ".join(TINY),
        "TRAIN_ARGS": "--batch-size 50",
    }

    def chain():
        command = ["bash", str(ROOT / "run_all.sh"), "shapes"]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    output = chain()
    for name in ("frozen", "Fine-tuning", "GRPO-RM"):
        assert f"| shapes | {name} |" in output
    assert "ratio floor 0.1" in output and "Eq. (1) to the letter is --ratio-floor 0" in output
    (tmp_path / "runs" / "shapes" / "grpo_rm" / "seed0" / "eval_knn.json").unlink()
    again = chain()
    assert again.count("exists: skipped") == 7 and again.count("eval_knn.py --dataset") == 1
    assert again[again.index("### Table 3") :] == output[output.index("### Table 3") :]
    assert (tmp_path / "runs" / "tables" / "table3.csv").exists() and (tmp_path / "runs" / "figures" / "shapes_curves.png").exists()


def test_two_processes_under_torchrun(tmp_path):
    done = run_script("train_cls.py", *TINY, "--batch-size", "50", "--epochs", "1", "--output-dir", tmp_path, nproc=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["world_size"] == 2
    assert done.stdout.count("epoch 1/1") == 1 and "Traceback" not in done.stderr


def test_folder_and_tiny_imagenet_end_to_end(image_folder, tiny_imagenet, tmp_path):
    for dataset, root, size in (("folder", image_folder, "42"), ("tiny_imagenet", tiny_imagenet, "70")):
        common = ["--dataset", dataset, "--data-root", str(root), "--backbone", "vit_tiny", "--device", "cpu", "--image-size", size]
        run = tmp_path / dataset
        train_cls.main([*common, "--batch-size", "6", "--epochs", "1", "--output-dir", str(run)])
        for module, name in ((eval_linear, "eval_linear.json"), (eval_knn, "eval_knn.json")):
            module.main([*common, "--weights", str(run / "backbone.pth")])
            assert json.loads((run / name).read_text())["val_images"] == 6


def test_real_images(tmp_path):
    """A few epochs on a cut of Tiny-ImageNet, where there is one: better than chance by far more than its spread."""
    archive = REAL_DATA / "tiny-imagenet-200.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}: put a cut of Tiny-ImageNet there, or name its directory in GRPO_RM_TEST_DATA")
    shutil.unpack_archive(archive, tmp_path)
    common = ["--dataset", "tiny_imagenet", "--data-root", str(tmp_path), "--backbone", "vit_tiny", "--device", "cpu", "--limit-val", "1000"]
    common += ["--limit-train", "2000"]
    schedule = ["--batch-size", "100", "--lr", "1e-3", "--epochs", "4", "--eval-every", "4"]
    train_cls.main([*common, *schedule, "--output-dir", str(tmp_path / "run")])
    eval_linear.main([*common, "--weights", str(tmp_path / "run" / "backbone.pth")])
    assert json.loads((tmp_path / "run" / "eval_linear.json").read_text())["top1"] > 1.2  # chance is 0.5 % +- 0.22


SHAPES = [*TINY, "--batch-size", "50", "--epochs", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "mnist"], "--dataset mnist: unknown; choose one of shapes, "),
        (["--backbone", "dinov2_vitx14"], "--backbone dinov2_vitx14: unknown"),
        (["--dataset", "cifar10", "--data-root", "{tmp}/nowhere"], "nowhere: no such directory"),
        (["--dataset", "cifar10", "--data-root", "{tmp}"], "add --download, or unpack"),
        (["--dataset", "tiny_imagenet", "--data-root", "{tmp}"], "wnids.txt is missing"),
        (["--dataset", "imagenet", "--data-root", "{tmp}"], "ILSVRC2012_img_val.tar"),
        (["--dataset", "folder", "--data-root", "{tmp}"], "train/ is missing"),
        (["--weights", "{tmp}/none.pth"], "none.pth cannot be loaded"),
        (["--image-size", "50"], "--image-size 50 is not a multiple of the patch size 14; take 42 or 56"),
        (["--batch-size", "50", "--grad-accum", "3"], "--batch-size 50 cannot be divided by 1 processes x --grad-accum 3"),
        (["--lr", "nan"], "argument --lr: 'nan' must be a number above 0"),
        (["--lr", "-1"], "argument --lr: '-1' must be a number above 0"),
        (["--lr", "inf"], "argument --lr: 'inf' must be"),
        (["--lr", "1e-3", "--lr-end", "1e-2"], "--lr-end 0.01 is above --lr 0.001"),
        (["--epochs", "0"], "argument --epochs: '0' must be a whole number at least 1"),
        (["--epochs", "2.5"], "argument --epochs: '2.5' must be a whole number"),
        (["--clip-eps", "0"], "argument --clip-eps: '0' must be a number above 0 and at most 1"),
        (["--ratio-floor", "-0.1"], "argument --ratio-floor: '-0.1' must be a number at least 0"),
        (["--train-fraction", "1.5"], "argument --train-fraction"),
        (["--accuracy-weight", "nan"], "argument --accuracy-weight"),
        (["--accuracy-weight", "0", "--uniformity", "none"], "nothing to learn"),
        (["--seed", "-1"], "argument --seed"),
        (["--seed", "18446744073709551616"], "argument --seed"),
        (["--warmup-epochs", "1"], "--warmup-epochs 1 leaves nothing of --epochs 1"),
        (["--dataset", "cifar10", "--data-root", "{tmp}/../file/x", "--download"], "cannot be created"),
        (["--device", "cuda"], "--device cuda: no CUDA device here"),
        (["--uniformity", "eq6"], "argument --uniformity: invalid choice"),
        (["--learning-rate", "1"], "unrecognized arguments: --learning-rate"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_of_training(arguments, message, tmp_path, capsys, monkeypatch):
    if "cuda" in arguments:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "data").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("{tmp}", str(tmp_path / "data")) for argument in arguments]
    error = stderr_of(capsys, train_cls.main, *SHAPES, "--output-dir", tmp_path / "run", *arguments)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_bad_arguments_of_evaluation(tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for main in (eval_linear.main, eval_knn.main):
        assert "does not fit" in stderr_of(capsys, main, *TINY, "--weights", tmp_path / "other.pth")
        assert "cannot be loaded" in stderr_of(capsys, main, *TINY, "--weights", tmp_path / "none.pth")
        assert "--image-size 43" in stderr_of(capsys, main, *TINY, "--image-size", "43")
    (tmp_path / "config.json").write_text('{"method": ')
    assert "config.json is damaged" in stderr_of(capsys, eval_knn.main, *TINY, "--weights", tmp_path / "other.pth")
    assert "argument --k" in stderr_of(capsys, eval_knn.main, *TINY, "--k", "0")


def test_an_unreadable_image_ends_every_stage(image_folder, tmp_path, capsys):
    (image_folder / "train" / "class2" / "3.jpg").write_bytes(b"broken")
    common = ["--dataset", "folder", "--data-root", image_folder, "--backbone", "vit_tiny", "--device", "cpu", "--image-size", "42"]
    evaluations = [(module.main, ["--output", tmp_path / "k.json"]) for module in (eval_knn, eval_linear)]
    for main, extra in ((train_cls.main, ["--output-dir", tmp_path / "run"]), *evaluations):
        assert "class2/3.jpg cannot be read" in stderr_of(capsys, main, *common, *extra)
    assert not (tmp_path / "run").exists() and not (tmp_path / "k.json").exists()


def test_a_finished_run_is_not_overwritten(tmp_path, capsys):
    train_cls.main([*SHAPES, "--output-dir", str(tmp_path)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert "already holds a run; add --resume" in stderr_of(capsys, train_cls.main, *SHAPES, "--output-dir", tmp_path)
    changes = {"--lr": "1e-4", "--ratio-floor": "0", "--epochs": "2", "--method": "finetune", "--batch-size": "7", "--uniformity": "eq5"}
    changes |= {"--group-weighting": "policy", "--seed": "5", "--clip-eps": "0.1", "--augment": "none", "--train-fraction": "0.5"}
    for change in changes.items():
        error = stderr_of(capsys, train_cls.main, *SHAPES, "--output-dir", tmp_path, "--resume", *change)
        assert f"--resume: {change[0]} is" in error
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("place", ["a file", "below a file"])
def test_an_output_directory_that_cannot_be_written(place, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    directory = tmp_path / "file" if place == "a file" else tmp_path / "file" / "run"
    assert f"cannot write {directory}" in stderr_of(capsys, train_cls.main, *SHAPES, "--output-dir", directory)
    assert f"cannot write {directory}" in stderr_of(capsys, eval_knn.main, *TINY, "--output", directory / "result.json")


def test_bad_input_under_torchrun_leaves_no_traceback_of_ours(tmp_path):
    write_image(tmp_path / "train" / "a" / "0.png", 0)
    done = run_script("train_cls.py", "--dataset", "folder", "--data-root", tmp_path, "--device", "cpu", "--backbone", "vit_tiny", nproc=2)
    assert done.returncode != 0
    assert "train_cls.py: [rank 0] error: " in done.stderr and 'train_cls.py", line' not in done.stderr


def test_too_little_gpu_memory_is_one_line(capsys):
    @stage
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")

    error = stderr_of(capsys, main, status=1)
    assert "Tried to allocate 2.00 GiB. --grad-accum 2" in error and "More about it" not in error
