"""What happens when things break: stops, signals, kills, two runs in one place, other settings, full disks."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, TORCHRUN, TWO, children, in_processes, read_log, start, stderr_of, write_image
from torch.distributed.elastic.utils.distributed import get_free_port

import train_cls
import train_seg
from common.cli import InputError
from common.distributed import in_turn

RUN = [*TINY, "--batch-size", "20", "--epochs", "4", "--log-every", "2"]  # 5 steps an epoch
RUN += ["--lr", "1e-3", "--warmup-epochs", "3"]  # so long that no accuracy near chance is warned of
MAPS = [*RUN, "--dataset", "shapes_seg", "--limit-train", "40", "--limit-val", "4", "--batch-size", "8"]
MAPS += ["--image-size", "28", "--map-size", "14"]
LONG = [*RUN, "--epochs", "12", "--output-dir"]  # of two processes that are stopped on the way


def step_of(directory):
    """The step of the checkpoint."""
    return torch.load(directory / "checkpoint.pt", weights_only=True)["step"]


def assert_same_runs(one, other):
    """The same exported weights to the last bit, and the same log."""
    for name in ("backbone.pth", "head.pth"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), f"{name} differs"
    assert read_log(one) == read_log(other), "log.jsonl differs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    train_cls.main([*RUN, "--output-dir", str(directory)])
    return directory


@pytest.mark.parametrize(("script", "flags"), [
    (train_cls, RUN),
    (train_cls, [*RUN, "--old-policy-every", "7"]),
    (train_cls, [*RUN, "--method", "finetune"]),
    (train_cls, [*RUN, "--train-fraction", "0.7", "--batch-size", "14", "--grad-accum", "2"]),
    (train_seg, MAPS),
], ids=["epochs", "refresh every 7 steps", "finetune", "fraction", "segmentation"])  # fmt: skip
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(script, flags, tmp_path):
    for stop in ("2", "5", "5", "14", None):  # at a line of the log, an epoch's end, twice the same, in a later epoch
        extra = ["--max-steps", stop] if stop else []
        script.main([*flags, "--output-dir", str(tmp_path / "parts"), "--resume", *extra])
    script.main([*flags, "--output-dir", str(tmp_path / "whole")])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("saved", [True, False])
def test_lines_after_the_checkpoint_come_only_once(saved, whole, tmp_path, capsys):
    """As where a process is killed between two checkpoints, or before its first."""
    if saved:
        train_cls.main([*RUN, "--max-steps", "10", "--output-dir", str(tmp_path)])
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write(json.dumps({"event": "step", "epoch": 2, "step": 12, "loss": 9.0}) + '\n{"event": "st')
    assert "already holds a run; add --resume" in stderr_of(capsys, train_cls.main, *RUN, "--output-dir", tmp_path)
    train_cls.main([*RUN, "--resume", "--output-dir", str(tmp_path)])
    assert_same_runs(whole, tmp_path)


@pytest.mark.parametrize(("minutes", "expected"), [("0", [0, 0, 2, 2, 4, 5, 6, 6]), ("10", [0] * 8)])
def test_checkpoints_come_by_the_clock(minutes, expected, tmp_path, before_steps):
    """At lines of the log."""
    found = []  # before each step
    before_steps(lambda *_: found.append(step_of(tmp_path) if (tmp_path / "checkpoint.pt").exists() else 0))
    train_cls.main([*RUN, "--max-steps", "8", "--checkpoint-minutes", minutes, "--output-dir", str(tmp_path)])
    assert found == expected and step_of(tmp_path) == 8


def test_a_finished_run_is_left_as_it_is(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    flags = [*RUN, "--resume", "--output-dir", str(tmp_path / "run")]
    train_cls.main(flags)  # nothing is left to do
    assert_same_runs(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()  # the largest file
    assert "no checkpoint.pt; choose another" in stderr_of(capsys, train_cls.main, *flags)
    assert_same_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("flags", ["--lr 1e-4", "--method finetune", "--epochs 5", "--seed 5", "--train-fraction 0.5"])
def test_resume_refuses_other_settings(flags, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    error = stderr_of(capsys, train_cls.main, *RUN, *flags.split(), "--resume", "--output-dir", tmp_path / "run")
    assert "--resume" in error and flags.split()[0][2:] in error.replace("_", "-")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_resume_takes_other_settings_that_change_no_result(whole, tmp_path):
    train_cls.main([*RUN, "--max-steps", "10", "--output-dir", str(tmp_path)])
    flags = ["--workers", "1", "--checkpoint-minutes", "0", "--grad-accum", "2", "--eval-every", "4"]
    train_cls.main([*RUN, *flags, "--resume", "--output-dir", str(tmp_path)])
    assert read_log(tmp_path)[-1]["loss"] == pytest.approx(read_log(whole)[-1]["loss"], abs=1e-4)


def test_resume_refuses_other_images_and_other_classes(image_folder, tmp_path, capsys):
    flags = ["--dataset", "folder", "--data-root", image_folder, "--image-size", "42", "--backbone", "vit_tiny"]
    flags += ["--device", "cpu", "--batch-size", "6", "--epochs", "2", "--output-dir", tmp_path / "run"]
    train_cls.main([*map(str, flags), "--max-steps", "1"])
    write_image(image_folder / "train" / "class0" / "more.png", 0)
    assert "is 19, but 18" in stderr_of(capsys, train_cls.main, *flags, "--resume")
    for part in ("train", "val"):
        (image_folder / part / "class2").rename(image_folder / part / "klass2")
    assert "classes is ['class0', 'class1', 'klass2'], but" in stderr_of(capsys, train_cls.main, *flags, "--resume")


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, capsys):
    train_cls.main([*RUN, "--max-steps", "6", "--output-dir", str(tmp_path)])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    flags = [*RUN, "--resume", "--checkpoint-minutes", "0", "--output-dir", tmp_path]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # no file may be larger: as on a full disk, a write fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        error = stderr_of(capsys, train_cls.main, *flags, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path}/checkpoint.pt cannot be written ([Errno 27] File too large)" in error
    assert not list(tmp_path.glob(".*"))  # nothing half-written
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_damaged_checkpoint_is_one_line(tmp_path, capsys):
    train_cls.main([*RUN, "--max-steps", "2", "--output-dir", str(tmp_path)])
    assert "--max-steps: ended at step 2 of 20" in capsys.readouterr().out
    train_cls.main([*RUN, "--max-steps", "1", "--output-dir", str(tmp_path), "--resume"])
    assert "--max-steps: ended at step 2 of 20" in capsys.readouterr().out
    checkpoint = tmp_path / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    log = (tmp_path / "log.jsonl").read_bytes()
    error = stderr_of(capsys, train_cls.main, *RUN, "--resume", "--output-dir", tmp_path)
    assert f"{checkpoint} cannot be loaded" in error and "delete it and backbone.pth" in error
    assert (tmp_path / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize(("number", "step", "saved"), [
    (signal.SIGTERM, 7, 8), (signal.SIGHUP, 10, 10), (signal.SIGINT, 1, 2), (signal.SIGTERM, 20, 20),
], ids=["SIGTERM in an epoch", "SIGHUP at its last step", "SIGINT at the first", "SIGTERM at the end"])  # fmt: skip
def test_a_run_that_a_signal_stops_goes_on_exactly(number, step, saved, whole, tmp_path, capsys, before_steps):
    """It is saved at the next line of the log."""
    signal.signal(number, signal.SIG_DFL)  # also where the tests run under nohup
    before_steps(lambda at, *_: os.kill(os.getpid(), number) if at == step else None)
    message = stderr_of(capsys, train_cls.main, *RUN, "--output-dir", tmp_path, status=128 + number)
    assert f"{number.name}: saved at step {saved}" in message and step_of(tmp_path) == saved
    assert not (tmp_path / "backbone.pth").exists()
    train_cls.main([*RUN, "--output-dir", str(tmp_path), "--resume"])
    assert_same_runs(whole, tmp_path)


def wait_for_log(directory, process, lines=3, seconds=120):
    end = time.monotonic() + seconds
    while not (directory / "log.jsonl").exists() or (directory / "log.jsonl").read_text().count("\n") < lines:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def train_whole(world, directory):
    train_cls.main.__wrapped__([*LONG, directory])


def two_nodes(world, directory, fails):
    os.environ |= {"GROUP_RANK": str(world.rank), "GROUP_WORLD_SIZE": "2"}
    with contextlib.suppress(InputError), in_turn(world._replace(local_rank=0), "data"):
        if world.rank == 1:
            time.sleep(1)  # a long download
            assert not Path(directory, "left").exists()
            if fails:
                raise InputError("no room")
    Path(directory, "left").touch()


@pytest.mark.parametrize("fails", [False, True])
def test_no_node_goes_on_before_the_others(fails, tmp_path):
    """Else it would wait in a collective, whose time is limited. An error on one node lets the other go."""
    in_processes(two_nodes, 2, str(tmp_path), fails)
    assert (tmp_path / "left").exists()


def test_processes_that_are_stopped_and_killed(tmp_path, capsys):
    """While two processes train, a third is refused. SIGUSR1 to one rank, as Slurm can send it; then SIGTERM to
    torchrun, which passes it on: both ranks stop at one step. Then two nodes on one machine, each with its torchrun: a
    worker is killed, and both start theirs again from the checkpoint. The run ends as an uninterrupted one does."""
    stopped, lines = tmp_path / "stopped", 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        process = start("train_cls.py", *LONG, stopped, "--resume", launch=TWO)
        wait_for_log(stopped, process, lines + 3)
        rank = children(process.pid)[-1]
        if number == signal.SIGUSR1:
            os.kill(rank, signal.SIGSTOP)  # so that the run does not end meanwhile
            try:
                error = stderr_of(capsys, train_cls.main, *LONG, stopped, "--resume")
            finally:
                os.kill(rank, signal.SIGCONT)
            assert f"--output-dir {stopped}: another process trains there" in error
        os.kill(rank if number == signal.SIGUSR1 else process.pid, number)
        errors = process.communicate(timeout=120)[1]
        (step,) = re.findall(rf"{number.name}: saved at step (\d+)", errors)
        assert step_of(stopped) == int(step) and process.returncode != 0
        assert 'train_cls.py", line' not in errors and not (stopped / "backbone.pth").exists(), errors
        lines = len(read_log(stopped))

    launch = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv-id=test"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{get_free_port()}", "--local-addr=127.0.0.1"]
    flags = [*LONG, stopped, "--checkpoint-minutes", "0", "--resume"]
    agents = [start("train_cls.py", *flags, launch=launch, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1") for _ in range(2)]
    try:
        wait_for_log(stopped, agents[0], lines + 3)
        os.kill(children(agents[1].pid)[-1], signal.SIGKILL)
        errors = [agent.communicate(timeout=120)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert any("exitcode: -9" in error for error in errors), errors  # the kill was in time
    in_processes(train_whole, 2, str(tmp_path / "whole"))
    assert_same_runs(tmp_path / "whole", stopped)
