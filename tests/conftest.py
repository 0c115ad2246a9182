"""Small worlds for the tests: images on disk, runs on a tiny budget, scripts as a user starts them."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import World

ROOT = Path(__file__).resolve().parent.parent
CPU = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
DATA = Path(os.environ.get("GRPO_RM_TEST_DATA", ROOT.parent / "shared" / "data"))  # real images, where they are
TINY = ["--device", "cpu", "--workers", "2", "--limit-train", "100", "--limit-val", "40"]  # of the embedded shapes


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """No test sees a data root or a torchrun of the surroundings, or leaves signal handlers behind."""
    for name in ("GRPO_RM_DATA", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_script(*command: str | Path, nproc: int = 1, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user does, under torchrun when nproc > 1."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    script, *arguments = (str(part) for part in command)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, *launch, str(ROOT / script), *arguments],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_image(path: Path, seed: int, size: tuple[int, int] = (20, 16), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A folder set: 3 classes, 6 training and 2 validation images of each, of several sizes and modes."""
    root = tmp_path / "folder"
    for split, count in (("train", 6), ("val", 2)):
        for label in range(3):
            for i in range(count):
                mode, suffix = [("RGB", "jpg"), ("L", "png"), ("P", "png")][i % 3]
                write_image(root / split / f"class{label}" / f"{i}.{suffix}", 10 * label + i, (20 + i, 16 + label), mode)
    return root


@pytest.fixture
def tiny_imagenet(tmp_path) -> Path:
    """Tiny-ImageNet's official layout with 3 classes, out of alphabetical order in wnids.txt; some images are grey."""
    home = tmp_path / "tiny-imagenet-200"
    wnids = ["n03", "n01", "n02"]
    for label, wnid in enumerate(wnids):
        for i in range(4):
            write_image(home / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * label + i, (64, 64), "L" if i == 0 else "RGB")
        (home / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
    rows = []
    for i in range(6):
        write_image(home / "val" / "images" / f"val_{i}.JPEG", 100 + i, (64, 64))
        rows.append(f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t0\t63\t63\n")
    (home / "val" / "val_annotations.txt").write_text("".join(rows))
    (home / "wnids.txt").write_text("\n".join(wnids) + "\n")
    return tmp_path


def stderr_of(capsys, main, *arguments, status: int = 2, lines: int = 1) -> str:
    """Call main, which must exit with `status` after one line on stderr, or after warnings `lines` of them; returns them."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    assert exit_.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == lines and "Traceback" not in error, error
    return error
