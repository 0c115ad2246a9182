"""run_all.sh: the chain of stages on a tiny budget, the commands of dry runs, and what happens when a stage fails."""

import itertools
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, read_json


def run_all(directory, *datasets, script=ROOT / "run_all.sh", **environment):
    """The chain, started in `directory`; returns the finished process."""
    surroundings = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NPROC": "1", "OMP_NUM_THREADS": "1"}
    options = {"env": os.environ | surroundings | environment, "cwd": directory, "timeout": 300}
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


# Dry runs


def planned(directory, *datasets, **environment):
    """The commands of a dry run, as words; it must leave nothing behind."""
    before = sorted(directory.rglob("*"))
    output = output_of(directory, *datasets, DRY_RUN="1", **environment)
    assert sorted(directory.rglob("*")) == before
    return [shlex.split(line) for line in output.splitlines()]


def value(command, flag):
    return command[len(command) - command[::-1].index(flag)] if flag in command else None  # the last one counts


def scripts_of(commands):
    return [next(Path(word).name for word in command if word.endswith(".py")) for command in commands]


def test_dry_run_of_the_whole_protocol(tmp_path):
    options = {"SEEDS": "0 1", "NPROC": "4", "DATA_ROOT": "my data", "LINEAR_ARGS": "--epochs 9"}
    *stages, last = planned(tmp_path, "tiny_imagenet", "voc2012", **options)
    assert last[-7:] == ["-m", "tools.report", *"runs --csv runs/tables --figures runs/figures".split()]
    assert all(command[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"] for command in stages)
    assert {value(command, "--data-root") for command in stages} == {"my data"}
    scripts = {"tiny_imagenet": ["train_cls.py", "eval_linear.py", "eval_knn.py"]}
    scripts["voc2012"] = ["train_seg.py", "eval_linear.py", "eval_linear.py"]
    for dataset, method, seed in itertools.product(scripts, ("frozen", "finetune", "grpo_rm"), "01"):
        run = f"runs/{dataset}/{method}/seed{seed}"
        mine = [c for c in stages if run in (value(c, "--output-dir"), str(Path(value(c, "--output") or "").parent))]
        assert all((value(c, "--dataset"), value(c, "--seed")) == (dataset, seed) for c in mine)
        if method != "frozen":
            assert [value(mine[0], flag) for flag in ("--method", "--epochs", "--lr")] == [method, "100", None]
            assert "--resume" in mine[0]
        assert scripts_of(mine) == scripts[dataset][method == "frozen" :]
        weights = None if method == "frozen" else f"{run}/backbone.pth"
        assert [value(c, "--weights") for c in mine[-2:]] == [weights, weights]
        assert [value(c, "--epochs") for c in mine[-2:]] == ["9", "9" if dataset == "voc2012" else None]
    assert len(stages) == 2 * 2 * (2 + 3 + 3)
    linear, multiscale = (c for c in stages if "runs/voc2012/grpo_rm/seed0/backbone.pth" in c)
    assert (value(linear, "--save-images"), value(multiscale, "--features")) == ("4", "multiscale")


def test_dry_run_of_several_learning_rates(tmp_path):
    """Every rate has directories of its own, and overrides TRAIN_ARGS; frozen features have no rate."""
    (tmp_path / "masks").mkdir()  # a folder with masks
    options = {"DATA_ROOT": str(tmp_path), "SEEDS": "3", "WEIGHTS": "w.pth", "TRAIN_ARGS": "--lr 1 --warmup-epochs 0"}
    *stages, _ = planned(tmp_path, "folder", LRS="2e-3 5e-4", **options)
    assert value(stages[0], "--output") == "runs/folder/frozen/seed3/eval_linear.json" and len(stages) == 2 + 4 * 3
    runs = [(value(c, "--output-dir"), value(c, "--lr")) for c in stages if "--output-dir" in c]
    rates = list(itertools.product(("finetune", "grpo_rm"), ("2e-3", "5e-4")))
    assert runs == [(f"runs/folder/{method}_lr{rate}/seed3", rate) for method, rate in rates]
    assert scripts_of(stages[2:5]) == ["train_seg.py", "eval_linear.py", "eval_linear.py"]
    weights = [value(c, "--weights") for c in stages[:5]]
    assert weights == ["w.pth"] * 3 + ["runs/folder/finetune_lr2e-3/seed3/backbone.pth"] * 2


@pytest.mark.parametrize(("methods", "start"), [
    ("frozen finetune grpo_rm", "runs/demo/shapes/finetune/seed0/backbone.pth"),
    ("grpo_rm", "runs/demo/shapes/grpo_rm/seed0/backbone.pth"),
])  # fmt: skip
def test_dry_run_of_the_demo(methods, start, tmp_path):
    """Segmentation starts from a copy of the first backbone that classification post-trained."""
    commands = planned(tmp_path, METHODS=methods, DATA_ROOT="elsewhere", TRAIN_ARGS="--batch-size 7")
    assert commands[-1][3] == "runs/demo" and "elsewhere" not in itertools.chain(*commands)
    assert [c for c in commands if c[0] == "cp"] == [["cp", start, "runs/demo/start.pth"]]
    scenes = [c for c in commands if value(c, "--dataset") == "shapes_seg"]
    begin = [c for c in scenes if "train_seg.py" in c[1] or "/frozen/" in value(c, "--output")]
    assert len(begin) > 1 and {value(c, "--weights") for c in begin} == {"runs/demo/start.pth"}
    assert {value(c, "--batch-size") for c in commands if value(c, "--method")} == {"7"}


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


def test_the_failed_stages_are_listed_where_there_is_nothing_to_report(tmp_path):
    done, notes = failing(tmp_path, "*train_cls.py*) exit 1 ;; *tools.report*", "exit 2")
    assert done.returncode == 1 and done.stderr.count("failed: ") == 6 and len(notes) == 7
