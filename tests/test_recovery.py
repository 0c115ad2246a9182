"""What happens when things break: signals, kills, lost processes, bad numbers, bad files, full disks."""

import functools
import hashlib
import http.server
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import CLASSIFICATION, CPU, ROOT, TINY, free_port, run_script, stderr_of, write_image
from soak_resume import children, log_without_speed, soak

import data
import grpo_rm
import train_cls
from checkpoint import Run, read_log, write_atomically
from data import Diverged, InputError, TrainLoader, draw_shapes_split, load_splits
from grpo_rm import ClassificationHead, Policy, VitTiny, init_world, train

RUN = [*TINY, "--batch-size", "20", "--lr", "1e-3", "--epochs", "4", "--log-every", "4"]  # 5 steps an epoch


def at_step(monkeypatch, step: int, action) -> None:
    """Let `action` happen while the `step`-th training step is computed."""
    original, count = grpo_rm.training_step, iter(range(1, 10**9))

    def spy(*arguments):
        if next(count) == step:
            action()
        return original(*arguments)

    monkeypatch.setattr(grpo_rm, "training_step", spy)


def same_weights(one, other) -> bool:
    states = [torch.load(directory / "backbone.pth", weights_only=True) for directory in (one, other)]
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    train_cls.main([*RUN, "--output-dir", str(directory)])
    return directory


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 143, 7), (signal.SIGUSR1, 143, 10), (signal.SIGINT, 130, 1)],
    ids=["SIGTERM within an epoch", "SIGUSR1 at its last step", "Ctrl-C at the first"],
)
def test_a_signal_saves_within_one_step_and_the_run_goes_on_exactly(number, status, step, whole, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        message = stderr_of(capsys, train_cls.main, *RUN, "--output-dir", tmp_path, status=status)
    assert f"{number.name}: saved at step {step}" in message and signal.getsignal(number) is before
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == step
    assert not (tmp_path / "backbone.pth").exists()
    train_cls.main([*RUN, "--output-dir", str(tmp_path), "--resume"])
    assert same_weights(whole, tmp_path) and log_without_speed(whole) == log_without_speed(tmp_path)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_deterministic_runs_and_their_continuation_are_equal_to_the_bit(device, tmp_path, monkeypatch):
    """Twice in peace and once with a stop within an epoch; on a GPU in bf16. Position embeddings stay as they were."""
    flags = [*RUN, "--device", device, "--deterministic"]
    try:
        for name in ("one", "two"):
            train_cls.main([*flags, "--output-dir", str(tmp_path / name)])
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            at_step(patch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
            train_cls.main([*flags, "--output-dir", str(tmp_path / "stopped")])
        train_cls.main([*flags, "--output-dir", str(tmp_path / "stopped"), "--resume"])
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("two", "stopped"):
        assert same_weights(tmp_path / "one", tmp_path / name)
        assert log_without_speed(tmp_path / "one") == log_without_speed(tmp_path / name)
    torch.manual_seed(0)
    start, end = VitTiny().state_dict(), torch.load(tmp_path / "one" / "backbone.pth", weights_only=True)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert "vit.encoder.pos_embedding" not in changed and "vit.class_token" in changed


def two_processes(*flags) -> subprocess.Popen:
    """train_cls.py under torchrun, left running."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train_cls.py")]
    return subprocess.Popen([*launch, *map(str, flags)], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)


def test_a_process_that_hangs_does_not_keep_the_others_waiting(tmp_path):
    """One of two workers is frozen: the other gives up after --timeout-minutes, in one line."""
    process = two_processes(*RUN, "--epochs", "1000", "--timeout-minutes", "0.1", "--output-dir", tmp_path)
    wait_for(lambda: len(read_log(tmp_path / "log.jsonl")) > 3, process)
    frozen = children(process.pid)[-1]
    os.kill(frozen, signal.SIGSTOP)
    started = time.monotonic()
    try:
        errors = process.communicate(timeout=120)[1]
    finally:
        os.kill(frozen, signal.SIGKILL) if process.poll() is None else None
        process.kill()
    assert process.returncode != 0 and time.monotonic() - started < 90  # torchrun itself waits 30 s for the frozen one
    assert "another process ended or hangs" in errors and 'train_cls.py", line' not in errors, errors


@pytest.mark.parametrize("mode", ["resident", "stream"])
def test_sigterm_to_torchrun_saves_on_all_ranks_and_resumes_exactly(mode, tmp_path):
    """The real thing: a signal to the launcher, which passes it on to the process groups of the workers, and so to all that is
    in them; then the same command again."""
    flags = [*RUN, "--epochs", "40", "--input", mode]
    process = two_processes(*flags, "--output-dir", tmp_path / "stopped", "--resume")
    wait_for(lambda: len(read_log(tmp_path / "stopped" / "log.jsonl")) > 3, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert errors.count("SIGTERM: saved at step") == 2, errors  # one line a rank
    assert 'train_cls.py", line' not in errors and "DataLoader worker" not in errors and process.returncode == 1, errors
    steps = re.findall(r"saved at step (\d+)", errors)
    assert steps[0] == steps[1] == str(torch.load(tmp_path / "stopped" / "checkpoint.pt", weights_only=True)["step"])
    for name, extra in (("stopped", ["--resume"]), ("whole", [])):
        assert run_script("train_cls.py", *flags, "--output-dir", tmp_path / name, *extra, nproc=2).returncode == 0
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert log_without_speed(tmp_path / "whole") == log_without_speed(tmp_path / "stopped")


def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path):
    """SIGUSR1, as Slurm can send it to a single process."""
    process = two_processes(*RUN, "--epochs", "40", "--output-dir", tmp_path)
    wait_for(lambda: len(read_log(tmp_path / "log.jsonl")) > 3, process)
    os.kill(children(process.pid)[-1], signal.SIGUSR1)
    errors = process.communicate(timeout=60)[1]
    steps = re.findall(r"\[rank \d\] SIGUSR1: saved at step (\d+)", errors)
    assert len(steps) == 2 and steps[0] == steps[1], errors
    assert "exitcode  : 143" in errors and process.returncode == 1, errors  # torchrun's own is 1


def test_the_slurm_job_of_the_readme_saves_and_is_queued_again(tmp_path):
    """The script as printed, on one node of two processes, with stand-ins for srun and scontrol."""
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    port, flags = free_port(), " ".join([*RUN, "--epochs 40", "--output-dir", str(tmp_path / "run")])
    for old, new in (("--nnodes=2", "--nnodes=1"), ("=4 ", "=2 "), (":29500", f":{port}"), ("--dataset tiny_imagenet", flags), ("train_cls.py", str(ROOT / "train_cls.py"))):
        assert old in script, old
        script = script.replace(old, new)
    commands = {
        "srun": 'exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" > {tmp_path}/queued',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job").write_text(script)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(["bash", str(tmp_path / "job")], env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(read_log(tmp_path / "run" / "log.jsonl")) > 3, job)
    job.send_signal(signal.SIGTERM)
    errors = job.communicate(timeout=60)[1]
    assert (tmp_path / "queued").read_text().split() == ["requeue", "7"] and "SIGTERM: saved at step" in errors
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] > 0


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize(("script", "kills", "nproc"), [("train_cls.py", 4, 1), ("train_cls.py", 2, 2), ("train_seg.py", 3, 1)])
def test_soak(script, kills, nproc, tmp_path):
    """The short form of soak_resume.py."""
    soak(kills, nproc, seed=nproc, root=tmp_path, script=script)


def test_two_nodes_survive_the_death_of_a_worker(tmp_path):
    """Two torchrun agents on loopback; one worker is killed, both agents restart theirs from the newest checkpoint."""
    flags = [*RUN, "--epochs", "30", "--checkpoint-minutes", "0"]
    port = free_port()

    def agent() -> subprocess.Popen:
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
        launch += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", "--local-addr=127.0.0.1"]
        command = [sys.executable, *launch, str(ROOT / "train_cls.py"), *flags, "--output-dir", str(tmp_path / "nodes"), "--resume"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as README.md says
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    agents = [agent(), agent()]
    wait_for(lambda: len(read_log(tmp_path / "nodes" / "log.jsonl")) > 3, agents[0])
    os.kill(children(agents[1].pid)[-1], signal.SIGKILL)
    try:
        errors = [process.communicate(timeout=200)[1] for process in agents]
    finally:
        for process in agents:
            process.terminate()
    assert [process.returncode for process in agents] == [0, 0], errors
    assert any("resuming" in error for error in errors)
    assert run_script("train_cls.py", *flags, "--output-dir", tmp_path / "whole", nproc=2).returncode == 0
    assert same_weights(tmp_path / "whole", tmp_path / "nodes")
    assert log_without_speed(tmp_path / "whole") == log_without_speed(tmp_path / "nodes")


def poisoned(rank: int, port: int, directory: str, kind: str) -> None:
    """Rank 1's seventh loss (or its gradient) is not finite: both ranks must stop, with the weights of step 6."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu")
    args = train_cls.parse_args([*RUN, "--method", "finetune", "--output-dir", directory, "--log-every", "4"])
    grpo_rm.resolve_training_arguments(args, world, **train_cls.PAPER)
    torch.manual_seed(0)
    policy = Policy(VitTiny().eval(), ClassificationHead(96, 10))
    loader = TrainLoader(draw_shapes_split(100, seed=0), CLASSIFICATION["shapes"], 42, 20, world, 1, seed=0, augment=True)
    original, calls, seen = grpo_rm.training_step, iter(range(1, 10**9)), {}
    loss_function = grpo_rm.cross_entropy_loss

    def poison(logits, targets, **options):
        loss, stats = loss_function(logits, targets, **options)
        if seen["step"] == 7 and rank == 1:
            if kind == "loss":
                loss = loss * math.nan
                stats["loss"] = loss.detach()
            else:
                loss = loss + (0 * logits).sum().abs().sqrt()  # adds 0, with a slope of infinity times 0
        return loss, stats

    def spy(*arguments):
        seen["step"] = next(calls)
        if seen["step"] == 7:
            seen["before"] = [parameter.detach().clone() for parameter in policy.parameters()]
        return original(*arguments)

    grpo_rm.training_step, grpo_rm.cross_entropy_loss = spy, poison
    with pytest.raises(Diverged) as error:
        train(policy, loader, dict, args, world)
    expected = "the loss is not finite at step 7 on rank 1" if kind == "loss" else "the gradient is not finite at step 7 on rank 1"
    assert expected in str(error.value), str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(seen["before"], policy.parameters(), strict=True))
    assert torch.load(f"{directory}/checkpoint.pt", weights_only=True)["step"] == 5
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_update(kind, tmp_path):
    torch.multiprocessing.spawn(poisoned, (free_port(), str(tmp_path), kind), nprocs=2)


def test_fp16_overflow_skips_a_step_and_is_no_error(tmp_path, monkeypatch):
    policies, scales = [], []
    original, scaler_class = grpo_rm.training_step, torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler_class(*a, init_scale=2.0**120, **k))  # overflows for sure

    def spy(model, old_policy, optimizer, scaler, *rest):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        sums = original(model, old_policy, optimizer, scaler, *rest)
        policies.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
        scales.append(scaler.get_scale())
        return sums

    monkeypatch.setattr(grpo_rm, "training_step", spy)
    train_cls.main([*RUN, "--amp", "fp16", "--epochs", "1", "--output-dir", str(tmp_path)])
    assert policies[0] and scales[0] == 2.0**119  # skipped, and the scale halved
    assert (tmp_path / "backbone.pth").exists()


def test_fp16_gradients_that_are_never_finite_stop_the_run(tmp_path, capsys, monkeypatch):
    original = grpo_rm.cross_entropy_loss

    def poisoned(logits, targets, **options):
        loss, stats = original(logits, targets, **options)
        return loss + (0 * logits).sum().abs().sqrt(), stats  # adds 0, with a slope of infinity times 0

    monkeypatch.setattr(grpo_rm, "cross_entropy_loss", poisoned)
    flags = ["--method", "finetune", "--amp", "fp16", "--output-dir", tmp_path]
    assert "not finite however small the loss is scaled" in stderr_of(capsys, train_cls.main, *RUN, *flags, status=1)


@pytest.fixture
def damaged_folder(tmp_path):
    """200 training images of two classes, one of them unreadable."""
    for i in range(200):
        write_image(tmp_path / "images" / "train" / f"class{i % 2}" / f"{i:03}.png", i)
    write_image(tmp_path / "images" / "val" / "class0" / "0.png", 0)
    (tmp_path / "images" / "train" / "class1" / "101.png").write_bytes(b"no image")
    return tmp_path / "images"


@pytest.mark.parametrize("stream", [False, True])
def test_skip_unreadable(damaged_folder, stream, tmp_path, capsys, monkeypatch):
    if stream:
        monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    command = ["--dataset", "folder", "--data-root", damaged_folder, "--backbone", "vit_tiny", "--image-size", "28", "--device", "cpu"]
    command += ["--batch-size", "50", "--epochs", "2", "--workers", "1", "--output-dir", tmp_path / "run"]
    assert "class1/101.png cannot be read" in stderr_of(capsys, train_cls.main, *command)
    for file in (tmp_path / "run").glob("*") if stream else ():
        file.unlink()
    train_cls.main([str(part) for part in [*command, "--skip-unreadable"]])
    (event,) = [event for event in read_log(tmp_path / "run" / "log.jsonl") if event["event"] == "unreadable"]
    assert "class1/101.png cannot be read" in event["reason"] and event["count"] == 1
    split, _ = load_splits("folder", str(damaged_folder))
    loader = TrainLoader(split, CLASSIFICATION["folder"], 28, 50, CPU, 1, seed=0, augment=False, skip_unreadable=True)
    batches = list(loader.epoch(0))
    assert sum(len(images) for images, _ in batches) == 200
    bad = split.targets.tolist().index(1) + 50  # the sorted place of 101.png: its stand-in is the next of its class
    order = torch.randperm(200, generator=data.random_generator(data.ORDER, 0, 0)).tolist()
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images[order.index(bad)], images[order.index(bad + 1)])
    for i in (111, 121):  # three of 200 are more than 1 %
        (damaged_folder / "train" / "class1" / f"{i}.png").write_bytes(b"no image")
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        train_cls.main([str(part) for part in [*command, "--skip-unreadable"]])
    assert exit_.value.code == 2 and "3 of 200 images cannot be read, more than 1 %" in capsys.readouterr().err


def test_one_percent_of_unreadable_images_is_counted_over_all_processes(damaged_folder, tmp_path):
    """Four of 200 files, of which each of two streaming processes meets two: each alone has no more than 1 %."""
    split, _ = load_splits("folder", str(damaged_folder))
    names = [split.files[i] for i in torch.randperm(200, generator=data.random_generator(data.ORDER, 0, 0))]
    halves = names[:100], names[100:]
    for half in halves:  # one is damaged already
        for name in [name for name in half if "101.png" not in str(name)][: 2 - any("101.png" in str(name) for name in half)]:
            Path(name).write_bytes(b"no image")
    command = ["--dataset", "folder", "--data-root", damaged_folder, "--backbone", "vit_tiny", "--image-size", "28", "--device", "cpu"]
    command += ["--input", "stream", "--skip-unreadable", "--augment", "none", "--batch-size", "200", "--epochs", "1", "--workers", "1"]
    done = run_script("train_cls.py", *command, "--output-dir", tmp_path / "run", nproc=2)
    assert done.returncode != 0 and done.stderr.count("4 of 200 images cannot be read, more than 1 %") == 2, done.stderr


def test_an_image_that_one_rank_cannot_read_ends_all_without_a_traceback(damaged_folder, tmp_path):
    command = ["--dataset", "imagenet", "--data-root", damaged_folder, "--backbone", "vit_tiny", "--image-size", "28", "--device", "cpu"]
    done = run_script("train_cls.py", *command, "--batch-size", "50", "--workers", "1", "--output-dir", tmp_path / "run", nproc=2)
    assert done.returncode != 0 and "class1/101.png cannot be read" in done.stderr
    assert 'train_cls.py", line' not in done.stderr, done.stderr


def test_a_full_disk_leaves_the_previous_checkpoint(whole, tmp_path):
    """No file may grow beyond 1 MiB: the checkpoint does not fit, and the one before it stays."""
    train_cls.main([*RUN, "--max-steps", "5", "--output-dir", str(tmp_path)])
    before = (tmp_path / "checkpoint.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_cls.py"), *RUN, "--output-dir", str(tmp_path), "--resume"],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and not list(tmp_path.glob(".*"))
    train_cls.main([*RUN, "--output-dir", str(tmp_path), "--resume"])
    assert same_weights(whole, tmp_path)


@pytest.mark.parametrize(("minutes", "file"), [("10", "log.jsonl"), ("0", "checkpoint.pt")])
def test_an_output_directory_that_vanishes(minutes, file, tmp_path, capsys, monkeypatch):
    """It is not made anew, without what was in it."""
    at_step(monkeypatch, 3, lambda: shutil.rmtree(tmp_path / "run"))
    flags = [*RUN, "--checkpoint-minutes", minutes, "--output-dir", tmp_path / "run"]
    assert file in stderr_of(capsys, train_cls.main, *flags) and not (tmp_path / "run").exists()


def test_an_output_directory_that_nobody_can_write(capsys):
    assert "cannot write" in stderr_of(capsys, train_cls.main, *RUN, "--output-dir", "/proc/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output_directory(tmp_path, capsys, monkeypatch):
    (tmp_path / "before").mkdir(mode=0o500)
    assert "cannot write" in stderr_of(capsys, train_cls.main, *RUN, "--output-dir", tmp_path / "before")
    at_step(monkeypatch, 3, lambda: (tmp_path / "during").chmod(0o500))
    assert "cannot write" in stderr_of(capsys, train_cls.main, *RUN, "--output-dir", tmp_path / "during")


def test_files_are_on_the_disk_before_they_take_their_place(tmp_path, monkeypatch):
    """The file itself is synced before its new name is there, the directory afterwards."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.readlink(f"/proc/self/fd/{descriptor}")) or fsync(descriptor))
    monkeypatch.setattr(os, "replace", lambda old, new: calls.append(("replace", str(new))) or replace(old, new))
    write_atomically(tmp_path / "a", lambda file: file.write_text("text"))
    temporary, replaced, directory = calls
    assert Path(temporary).parent == tmp_path and replaced == ("replace", str(tmp_path / "a")) and directory == str(tmp_path)


def test_what_a_killed_process_was_writing_is_removed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / ".checkpoint.pt.1234.tmp").write_bytes(b"half")
    train_cls.main([*RUN, "--output-dir", str(tmp_path / "run"), "--resume"])
    assert not list((tmp_path / "run").glob(".*"))


def test_a_finished_run_without_its_checkpoints_is_not_overwritten(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    for file in (tmp_path / "run").glob("checkpoint*.pt"):
        file.unlink()
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    for extra in ([], ["--resume"]):
        assert "finished run" in stderr_of(capsys, train_cls.main, *RUN, *extra, "--output-dir", tmp_path / "run")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()} == before


def test_a_run_without_a_checkpoint_yet_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text("")
    assert "already holds a run; add --resume" in stderr_of(capsys, train_cls.main, *RUN, "--output-dir", tmp_path)


def test_a_damaged_log_is_kept(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:2], b"\xff" + lines[2][:9] + b"\n", *lines[3:]]))
    before = log.read_bytes()
    train_cls.main([*RUN, "--output-dir", str(tmp_path / "run"), "--resume"])
    assert f"log.jsonl is damaged after line 2 of {len(lines)}; all of it is kept in log.damaged" in capsys.readouterr().err
    assert (tmp_path / "run" / "log.damaged").read_bytes() == before and log.read_bytes() == b"".join(lines[:2])


def test_resume_refuses_other_images(image_folder, tmp_path, capsys):
    flags = ["--dataset", "folder", "--data-root", str(image_folder), "--image-size", "42", "--device", "cpu", "--backbone", "vit_tiny"]
    flags += ["--batch-size", "6", "--epochs", "2", "--output-dir", str(tmp_path / "run")]
    train_cls.main([*flags, "--max-steps", "1"])
    write_image(image_folder / "train" / "class0" / "more.png", 0)
    assert "--resume: the training images or the classes are not those of the run" in stderr_of(capsys, train_cls.main, *flags, "--resume")
    (image_folder / "train" / "class0" / "more.png").unlink()
    for part in ("train", "val"):
        (image_folder / part / "class2").rename(image_folder / part / "klass2")
    assert "--resume: the training images or the classes are not those of the run" in stderr_of(capsys, train_cls.main, *flags, "--resume")
    for part in ("train", "val"):
        (image_folder / part / "klass2").rename(image_folder / part / "class2")
    train_cls.main([*flags, "--resume"])


def test_a_checkpoint_of_something_else_is_one_line(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if k != "ranks"}, tmp_path / "run" / "checkpoint.pt")
    assert "is not of this network" in stderr_of(capsys, train_cls.main, *RUN, "--resume", "--output-dir", tmp_path / "run")


@pytest.mark.parametrize("steps", [1, 7, 10])
def test_max_steps_ends_a_run_there(steps, tmp_path, monkeypatch):
    """In the first epoch, within one, and at the end of one: no later epoch is begun or saved."""
    saved = []
    save = Run.save
    monkeypatch.setattr(Run, "save", lambda run, step: saved.append(step) or save(run, step))
    train_cls.main([*RUN, "--epochs", "50", "--eval-every", "50", "--max-steps", str(steps), "--output-dir", str(tmp_path)])
    assert saved == sorted({*range(5, steps, 5), steps})
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == steps


def test_a_stop_at_the_very_last_step_leaves_the_end_to_the_next_start(tmp_path, monkeypatch):
    """An epoch shorter than --log-every: its line and the last validation are still to come."""
    flags = [*RUN, "--epochs", "1", "--log-every", "100"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train_cls.main([*flags, "--output-dir", str(tmp_path)])
    train_cls.main([*flags, "--resume", "--output-dir", str(tmp_path)])
    assert [event["event"] for event in read_log(tmp_path / "log.jsonl")] == ["step", "epoch"]
    assert "val_accuracy" in read_log(tmp_path / "log.jsonl")[-1]


def test_sigterm_during_validation_loses_nothing(whole, tmp_path, monkeypatch):
    """What a node kills during a long validation goes on from the epoch's end."""

    def end(*rest):
        raise SystemExit("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(train_cls, "head_accuracy", end)
        train_cls.main([*RUN, "--output-dir", str(tmp_path)])
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 20
    train_cls.main([*RUN, "--output-dir", str(tmp_path), "--resume"])
    assert same_weights(whole, tmp_path) and log_without_speed(whole) == log_without_speed(tmp_path)


def test_fewer_processes_take_over_what_all_had_measured(tmp_path, monkeypatch):
    """An epoch's last steps are in the checkpoint before its validation, in parts of each process."""
    one, other = tmp_path / "one", tmp_path / "other"
    train_cls.main([*RUN, "--epochs", "3", "--output-dir", str(one)])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="killed"):
        patch.setattr(train_cls, "head_accuracy", lambda *_: sys.exit("killed"))
        train_cls.main([*RUN, "--epochs", "3", "--output-dir", str(other)])
    state = torch.load(other / "checkpoint.pt", weights_only=True)
    (alone,) = state["ranks"]
    parts = [{k: v if k == "max_ratio" else share * v for k, v in alone["window"].items()} for share in (0.25, 0.75)]
    torch.save(state | {"ranks": [alone | {"window": part} for part in parts]}, other / "checkpoint.pt")
    train_cls.main([*RUN, "--epochs", "3", "--output-dir", str(other), "--resume"])
    assert same_weights(one, other) and log_without_speed(one) == log_without_speed(other)


def test_an_archive_is_checked_first_and_cannot_write_outside(tmp_path):
    served, root = tmp_path / "served", tmp_path / "a" / "b"
    served.mkdir()
    root.mkdir(parents=True)
    with zipfile.ZipFile(served / "evil.zip", "w") as file:
        file.writestr("../outside.txt", "written outside")
        file.writestr("inside.txt", "fine")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/evil.zip"
        with pytest.raises(InputError, match=r"fetch it by hand"):
            data._download_zip(url, root, "0" * 32)
        assert not (root / "inside.txt").exists()
        data._download_zip(url, root, hashlib.md5((served / "evil.zip").read_bytes()).hexdigest())
        server.shutdown()
    assert (root / "inside.txt").exists() and not list((tmp_path / "a").glob("*.txt"))


def test_nothing_is_unpickled_freely_or_evaluated():
    """Every torch.load asks for weights_only=True, and no file's text is ever run."""
    for file in ROOT.glob("*.py"):
        source = file.read_text()
        loads = re.findall(r"torch\.load\((?!.*weights_only=True).*", source)
        assert not loads and not re.search(r"(?<![.\w])(eval|exec|pickle\.loads?)\(", source), file


def test_log_lines_are_valid_json_after_everything(whole):
    for line in (whole / "log.jsonl").read_text().splitlines():
        assert {"event", "epoch", "step"} <= json.loads(line).keys()


def test_global_batch_of_an_empty_rank_is_harmless(whole):
    """3 samples on 4 ranks: the last rank's only target is ignored."""
    world = grpo_rm.World(3, 3, 4, torch.device("cpu"))
    ((images, targets),) = TrainLoader(draw_shapes_split(3, seed=0), CLASSIFICATION["shapes"], 42, 20, world, 1, seed=0, augment=True).epoch(0)
    assert len(images) == 1 and targets.tolist() == [data.IGNORE]
