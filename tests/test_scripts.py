"""The scripts as a user starts them: each on a tiny budget, what each shows, and what each says to bad input."""

import contextlib
import importlib
import itertools
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
import zipfile
from pathlib import Path

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
    ("grpo_rm", "epoch 100/100  acc 98.8 %  11829 img/s"),  # its loss and ratio say little: they are in the log
    ("finetune", "epoch 100/100  loss 0.1235  acc 98.8 %  11829 img/s"),
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
    assert line == f"{begins}  val pixel_acc 94.0  val miou 70.4" and len(line) <= 100


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
        ("--weights {tmp}/text.pth", "weights file {tmp}/text.pth cannot be loaded"),
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


# run_all.sh


def run_all(directory, *datasets, script=ROOT / "run_all.sh", **environment):
    """Standard output of the chain, started in `directory`."""
    surroundings = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NPROC": "1", "OMP_NUM_THREADS": "1"}
    options = {"env": os.environ | surroundings | environment, "cwd": directory, "timeout": 300}
    done = subprocess.run(["bash", str(script), *datasets], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_chain_of_stages_and_its_continuation(tmp_path):
    """From nothing to the table, on two processes; the second call, through a link and on one process, adds the frozen
    features, makes again to the last bit what was taken away, and skips the rest."""
    environment = {"SEEDS": "0", "EPOCHS": "1", "MODEL_ARGS": " ".join(TINY), "TRAIN_ARGS": "--batch-size 50"}
    output = run_all(tmp_path, "shapes", METHODS="grpo_rm", NPROC="2", **environment)
    (row,) = [line for line in output.splitlines() if "| GRPO-RM |" in line]
    runs, run = tmp_path / "runs", tmp_path / "runs" / "shapes" / "grpo_rm" / "seed0"
    assert (runs / "tables" / "table3.csv").exists() and (runs / "figures" / "shapes_curves.png").exists()
    assert read_json(run / "config.json")["world_size"] == 2 and output.count("epoch 1/1") == 1
    before = (run / "eval_knn.json").read_bytes()
    (run / "eval_knn.json").unlink()
    (tmp_path / "link.sh").symlink_to(ROOT / "run_all.sh")
    again = run_all(tmp_path, "shapes", script=tmp_path / "link.sh", METHODS="frozen grpo_rm", **environment)
    assert again.count("exists: skipped") == 2 and again.count("eval_knn.py --dataset") == 2
    assert (run / "eval_knn.json").read_bytes() == before and row in again and "| frozen |" in again


def planned(directory, *datasets, **environment):
    """The commands of a dry run, as words; it must leave nothing behind."""
    before = sorted(directory.rglob("*"))
    output = run_all(directory, *datasets, DRY_RUN="1", **environment)
    assert sorted(directory.rglob("*")) == before
    return [shlex.split(line) for line in output.splitlines()]


def value(command, flag):
    return command[len(command) - command[::-1].index(flag)] if flag in command else None  # the last one counts


def scripts_of(commands):
    return [next(Path(word).name for word in command if word.endswith(".py")) for command in commands]


def test_dry_run_of_the_whole_protocol(tmp_path):
    options = {"ABLATIONS": "1", "FRACTIONS": "0.1 1", "SEEDS": "0 1", "NPROC": "4", "DATA_ROOT": "my data"}
    *stages, last = planned(tmp_path, "tiny_imagenet", "voc2012", **options)
    assert last[-7:] == ["-m", "tools.report", *"runs --csv runs/tables --figures runs/figures".split()]
    assert all(command[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"] for command in stages)
    assert {value(command, "--data-root") for command in stages} == {"my data"}
    flags = dict(frozen="", finetune="", grpo_rm="", grpo_rm_none="--uniformity none", grpo_rm_eq5="--uniformity eq5")
    flags |= dict.fromkeys(("finetune_fraction0.1", "grpo_rm_fraction0.1"), "--train-fraction 0.1")
    scripts = {"tiny_imagenet": ["train_cls.py", "eval_linear.py", "eval_knn.py"]}
    scripts["voc2012"] = ["train_seg.py", "eval_linear.py", "eval_linear.py"]
    runs = list(itertools.product(scripts, flags, "01"))
    for dataset, name, seed in runs:
        run = f"runs/{dataset}/{name}/seed{seed}"
        output = {run, *(f"{run}/{file}.json" for file in ("eval_linear", "eval_linear_multiscale", "eval_knn"))}
        mine = [c for c in stages if (value(c, "--output-dir") or value(c, "--output")) in output]
        weights = None if name == "frozen" else f"{run}/backbone.pth"
        assert scripts_of(mine) == scripts[dataset][name == "frozen" :]
        assert all((value(c, "--dataset"), value(c, "--seed")) == (dataset, seed) for c in mine)
        assert all(value(c, "--weights") == weights for c in mine[-2:])
        if name != "frozen":
            assert "--resume" in mine[0] and value(mine[0], "--epochs") == "100" and flags[name] in " ".join(mine[0])
            assert name.startswith(value(mine[0], "--method"))
    assert len(stages) == 3 * len(runs) - 4
    linear, multiscale = (c for c in stages if "runs/voc2012/grpo_rm/seed0/backbone.pth" in c)
    assert (value(linear, "--save-images"), value(multiscale, "--features")) == ("4", "multiscale")


def test_dry_runs_of_the_demo_and_of_several_nodes(tmp_path):
    commands = planned(tmp_path, SEG_TRAIN_ARGS="--batch-size 7 --epochs 2")
    assert commands[-1][2] == "runs/demo" and len(commands) == 2 * 2 * 8 + 1
    sizes = {(value(c, "--dataset"), value(c, "--batch-size")) for c in commands if value(c, "--method")}
    assert sizes == {("shapes", "64"), ("shapes_seg", "7")}
    torchrun = "srun torchrun --nnodes=2 --rdzv-endpoint=host:29500 --nproc_per_node=4"
    (tmp_path / "masks").mkdir()  # a folder with masks
    options = {"DATA_ROOT": str(tmp_path), "METHODS": "grpo_rm", "SEEDS": "3", "TORCHRUN": torchrun}
    train, *rest = planned(tmp_path, "folder", **options)
    assert train[:5] == torchrun.split() and scripts_of([train]) == ["train_seg.py"]
    assert len(rest) == 3 and all(command[0] == "python" for command in rest)
