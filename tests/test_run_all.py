"""run_all.sh: the chain of stages on a tiny budget, the commands of dry runs, and what happens when a stage fails."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, read_json


def run_all(directory, *datasets, script=ROOT / "run_all.sh", **environment):
    """The chain, started in `directory`; returns the finished process."""
    surroundings = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NPROC": "1", "OMP_NUM_THREADS": "1"}
    options = {"env": os.environ | surroundings | environment, "cwd": directory, "timeout": 300}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    return subprocess.run(["bash", str(script), *datasets], capture_output=True, text=True, **options)


def output_of(*arguments, **options):
    """What a chain prints, which must succeed."""
    done = run_all(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chain_of_stages_and_its_continuation(tmp_path):
    """From nothing to the table, on two processes; the second call, through a link and on one process, adds the frozen
    features, makes again to the last bit what was taken away, and skips the rest."""
    environment = {"SEEDS": "0", "EPOCHS": "1", "MODEL_ARGS": " ".join(TINY), "TRAIN_ARGS": "--batch-size 50"}
    output = output_of(tmp_path, "shapes", METHODS="grpo_rm", NPROC="2", **environment)
    (row,) = [line for line in output.splitlines() if "| GRPO-RM |" in line]
    runs, run = tmp_path / "runs", tmp_path / "runs" / "shapes" / "grpo_rm" / "seed0"
    assert (runs / "tables" / "table3.csv").exists() and (runs / "figures" / "shapes_curves.png").exists()
    assert read_json(run / "config.json")["world_size"] == 2 and output.count("epoch 1/1") == 1
    before = (run / "eval_knn.json").read_bytes()
    (run / "eval_knn.json").unlink()
    (tmp_path / "link.sh").symlink_to(ROOT / "run_all.sh")
    again = output_of(tmp_path, "shapes", script=tmp_path / "link.sh", METHODS="frozen grpo_rm", **environment)
    assert again.count("exists: skipped") == 2 and again.count("eval_knn.py --dataset") == 2
    assert (run / "eval_knn.json").read_bytes() == before and row in again and "| frozen |" in again


def test_help_is_the_header():
    text = output_of(ROOT, "--help", PATH="/usr/bin:/bin")  # without Python
    assert text == output_of(ROOT, "-h") and text.startswith("The chain of stages: ") and "set -e" not in text
    assert all(f" {name}  " in text for name in ("SEEDS", "METHODS", "EPOCHS", "LRS", "NPROC", "DATA_ROOT", "OUT"))


def planned(directory, *datasets, **environment):
    """The commands of a dry run, without the directory of the scripts; it must leave nothing behind."""
    before = sorted(directory.rglob("*"))
    output = output_of(directory, *datasets, DRY_RUN="1", **environment)
    assert sorted(directory.rglob("*")) == before
    return [line.strip().replace(f"{ROOT}/", "") for line in output.splitlines()]


def test_the_commands_of_the_protocol(tmp_path):
    options = {"SEEDS": "3", "METHODS": "frozen grpo_rm", "NPROC": "4", "DATA_ROOT": "my data", "LINEAR_ARGS": "--lr 1"}
    data = r"--dataset tiny_imagenet --seed 3 --data-root my\ data"
    frozen, run = "runs/tiny_imagenet/frozen/seed3", "runs/tiny_imagenet/grpo_rm/seed3"
    weights = f"--weights {run}/backbone.pth"
    classification = [
        f"eval_linear.py {data} --lr 1 --output {frozen}/eval_linear.json",
        f"eval_knn.py {data} --output {frozen}/eval_knn.json",
        f"train_cls.py {data} --method grpo_rm --epochs 100 --output-dir {run} --resume",
        f"eval_linear.py {data} {weights} --lr 1 --output {run}/eval_linear.json",
        f"eval_knn.py {data} {weights} --output {run}/eval_knn.json",
    ]
    data = r"--dataset voc2012 --seed 3 --data-root my\ data"
    frozen, run = "runs/voc2012/frozen/seed3", "runs/voc2012/grpo_rm/seed3"
    weights, multiscale = f"--weights {run}/backbone.pth", "--features multiscale"
    segmentation = [
        f"eval_linear.py {data} --lr 1 --save-images 4 --output {frozen}/eval_linear.json",
        f"eval_linear.py {data} --lr 1 {multiscale} --output {frozen}/eval_linear_multiscale.json",
        f"train_seg.py {data} --method grpo_rm --epochs 100 --output-dir {run} --resume",
        f"eval_linear.py {data} {weights} --lr 1 --save-images 4 --output {run}/eval_linear.json",
        f"eval_linear.py {data} {weights} --lr 1 {multiscale} --output {run}/eval_linear_multiscale.json",
    ]
    *stages, report = planned(tmp_path, "tiny_imagenet", "voc2012", **options)
    launch = "torchrun --standalone --nproc_per_node=4 "
    assert stages == [launch + command for command in classification + segmentation]
    assert report == "python -m tools.report runs --csv runs/tables --figures runs/figures"
    assert len(planned(tmp_path, "tiny_imagenet", "voc2012")) == 2 * 5 * (2 + 3 + 3) + 1  # five seeds, three methods


def test_the_commands_of_several_learning_rates(tmp_path):
    """Every rate has directories of its own, and overrides TRAIN_ARGS; frozen features have no rate."""
    (tmp_path / "masks").mkdir()  # a folder with masks
    options = {"DATA_ROOT": str(tmp_path), "SEEDS": "3", "WEIGHTS": "w.pth", "TRAIN_ARGS": "--lr 1"}
    *stages, _ = planned(tmp_path, "folder", LRS="2e-3 5e-4", **options)
    data = f"--dataset folder --seed 3 --data-root {tmp_path}"
    trained = [
        f"python train_seg.py {data} --weights w.pth --method {method} --epochs 100 --lr 1 --lr {rate} "
        f"--output-dir runs/folder/{method}_lr{rate}/seed3 --resume"
        for method, rate in itertools.product(("finetune", "grpo_rm"), ("2e-3", "5e-4"))
    ]
    assert stages[2::3] == trained and len(stages) == 2 + 4 * 3
    assert all(f"{data} --weights w.pth" in stage and "/folder/frozen/seed3/" in stage for stage in stages[:2])
    assert all(" --weights runs/folder/finetune_lr2e-3/seed3/backbone.pth " in stage for stage in stages[3:5])


@pytest.mark.parametrize(("methods", "trained"), [("frozen finetune grpo_rm", "finetune"), ("grpo_rm", "grpo_rm")])
def test_the_demo_segments_from_the_first_backbone_that_classification_trained(methods, trained, tmp_path):
    commands = planned(tmp_path, METHODS=methods, DATA_ROOT="elsewhere")
    copy = commands.index(f"cp runs/demo/shapes/{trained}/seed0/backbone.pth runs/demo/start.pth")
    scenes = commands[copy + 1 : -1]
    assert all("--dataset shapes " in command for command in commands[:copy])
    assert all("--dataset shapes_seg " in command for command in scenes)
    first = [command for command in scenes if "train_seg.py" in command or "/frozen/" in command]
    assert len(first) > 1 and all("--weights runs/demo/start.pth" in command for command in first)
    assert commands[-1].startswith("python -m tools.report runs/demo ") and "elsewhere" not in "".join(commands)


# Stages that fail


def failing(directory, pattern, reaction):
    """A chain of three seeds on a `python` that notes its arguments in a file, and does `reaction` where they match
    `pattern`. Returns the finished chain and the notes."""
    script = f'#!/bin/sh\necho "$*" >>notes\ncase "$*" in {pattern}) {reaction} ;; esac\n'
    (directory / "python").write_text(script)
    (directory / "python").chmod(0o755)
    environment = {"PATH": f"{directory}:{os.environ['PATH']}", "SEEDS": "0 1 2", "METHODS": "finetune grpo_rm"}
    done = run_all(directory, "shapes", **environment)
    return done, (directory / "notes").read_text().splitlines()


def test_a_failed_stage_ends_its_seed_and_the_others_follow(tmp_path):
    done, notes = failing(tmp_path, "*finetune/seed1?--resume|*eval_linear.py*grpo_rm/seed2*", "exit 1")
    lines = ["failed: runs/shapes/finetune/seed1/backbone.pth", "failed: runs/shapes/grpo_rm/seed2/eval_linear.json"]
    assert done.returncode == 1 and done.stderr.splitlines() == lines
    assert len(notes) == 6 * 3 - 2 - 1 + 1 and "tools.report" in notes[-1]
    assert not [note for note in notes if "eval" in note and "finetune/seed1" in note]
    assert [note for note in notes if "eval_knn" in note and "grpo_rm/seed1" in note]


@pytest.mark.parametrize(("reaction", "status"), [("exit 2", 2), ("exit 143", 143), ("kill -INT $PPID; exit 1", 130)])
def test_bad_input_and_signals_end_the_chain(reaction, status, tmp_path):
    done, notes = failing(tmp_path, "*finetune/seed1?--resume", reaction)
    assert done.returncode == status and "failed" not in done.stderr
    assert len(notes) == 4 and "--seed 1" in notes[-1]
