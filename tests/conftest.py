"""Small worlds for the tests: images on disk, scripts as a user starts them, several processes."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

import data
import grpo_rm
from common import cli, distributed

ROOT = Path(__file__).resolve().parent.parent
CPU = distributed.World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
DATA = Path(os.environ.get("GRPO_RM_TEST_DATA", ROOT.parent / "shared" / "data"))  # real images, where they are
TINY = ["--device", "cpu", "--workers", "2", "--limit-train", "100", "--limit-val", "40"]  # of the embedded shapes
TORCHRUN = ["-m", "torch.distributed.run"]
TWO = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
assert_same_bits = functools.partial(torch.testing.assert_close, rtol=0, atol=0)  # of nested lists of tensors
MEASURED = ("images_per_s", "seconds", "peak_memory_gb")  # in log.jsonl: they differ from run to run


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No test sees a data root or a torchrun of the surroundings, or leaves signal handlers behind."""
    for name in ("GRPO_RM_DATA", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    numbers = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def before_steps(monkeypatch):
    """before_steps(look) has look(number, policy, old_policy, optimizer) called before every training step."""
    original, numbers = grpo_rm.training_step, itertools.count(1)

    def install(look):
        def spy(policy, old_policy, encoder, loss_function, optimizer, *rest):
            look(next(numbers), policy, old_policy, optimizer)
            original(policy, old_policy, encoder, loss_function, optimizer, *rest)

        monkeypatch.setattr(grpo_rm, "training_step", spy)

    return install


def start(script, *arguments, launch=(), stderr=subprocess.PIPE, **environment):
    """A script of the repository as a user starts it, left running; `launch` is TWO or another torchrun."""
    command = [sys.executable, *launch, ROOT / script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen([*map(str, command)], env=environment, stderr=stderr, text=True)


def children(pid):
    """The processes that `pid` started."""
    return [int(part) for file in Path(f"/proc/{pid}/task").glob("*/children") for part in file.read_text().split()]


def in_processes(function, size, *arguments):
    """Call function(world, *arguments) on `size` processes of one thread each, which start with torch imported. For the
    main.__wrapped__ of a script, which leaves errors and the process group alone, they are as torchrun's."""
    torch.multiprocessing.set_forkserver_preload(["torchvision"])
    options = {"nprocs": size, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(one_of_several, (function, size, get_free_port(), arguments), **options)


def one_of_several(rank, function, size, port, arguments):
    torch.set_num_threads(1)
    if size > 1:
        os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    world = distributed.start_processes("cpu")
    distributed.start_processes = lambda device: world  # a script joins in
    function(world, *arguments)
    if size > 1:
        torch.distributed.destroy_process_group()


def parse(script, *flags, world=CPU):
    """The arguments of a training script, as its main resolves them."""
    args = script.parse_args(["--device", "cpu", *flags])
    protocol = data.resolve_dataset(args, "classification", "segmentation")
    cli.resolve_training_arguments(args, world, protocol, lr=script.PAPER_LR)
    return args


def stderr_of(capsys, main, *arguments, status=2):
    """Call main, which must exit with `status` after one line on stderr; returns it."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    return error


def read_json(path):
    return json.loads(Path(path).read_text())


def read_log(directory):
    """The lines of log.jsonl without what differs from run to run; each must be valid JSON."""
    lines = (Path(directory) / "log.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [{name: value for name, value in event.items() if name not in MEASURED} for event in events]


def write_image(path, seed, size=(20, 16), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_mask(path, labels, mode="L"):
    """Labels as a grey image, as the indices of a palette ("P"), or in another mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    if mode == "P":
        image.putpalette(bytes(255 - i % 256 for i in range(768)))  # it now is one of mode P
    image.convert(mode).save(path)


def write_pair(images, masks, name, labels, mode="L", suffix="jpg", image_mode="RGB"):
    write_image(images / f"{name}.{suffix}", len(labels), labels.shape[::-1], image_mode)
    write_mask(masks / f"{name}.png", labels, mode)


@pytest.fixture
def image_folder(tmp_path):
    """A folder set: 3 classes, 6 training and 2 validation images of each, of several sizes and modes."""
    root = tmp_path / "folder"
    for split, count in (("train", 6), ("val", 2)):
        for label, i in np.ndindex(3, count):
            mode, suffix = [("RGB", "jpg"), ("L", "png"), ("P", "png")][i % 3]
            file = root / split / f"class{label}" / f"{i}.{suffix}"
            write_image(file, 10 * label + i, (20 + i, 16 + label), mode)
    return root


@pytest.fixture
def mask_folder(tmp_path):
    """A folder set of 3 classes with masks: 6 training and 4 validation images of several sizes."""
    root = tmp_path / "scenes"
    for part, i in [*(("train", i) for i in range(6)), *(("val", i) for i in range(4))]:
        mask = np.arange(3, dtype=np.uint8).repeat((20, 20, 20 + i))[None].repeat(40, 0)
        mask[:2] = 255  # void
        write_pair(root / "images" / part, root / "masks" / part, f"{i}", mask, "LP"[i % 2], "jpg" if i else "png")
    (root / "classes.txt").write_text("sky\nroad\n\ncar\n")
    return root


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Tiny-ImageNet's official layout with 3 classes, out of alphabetical order in wnids.txt; some images are grey."""
    home, wnids, rows = tmp_path / "tiny-imagenet-200", ["n03", "n01", "n02"], ""
    for label, wnid in enumerate(wnids):
        for i in range(4):
            file = home / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            write_image(file, 10 * label + i, (64, 64), "RGB" if i else "L")
        (home / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    for i in range(6):
        write_image(home / "val" / "images" / f"val_{i}.JPEG", 100 + i, (64, 64))
        rows += f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t0\t63\t63\n"
    (home / "val" / "val_annotations.txt").write_text(rows)
    (home / "wnids.txt").write_text("\n".join(wnids) + "\n")
    return tmp_path
