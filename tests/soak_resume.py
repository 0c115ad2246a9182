"""Kill a training run again and again at random moments, resume it each time, and compare with a run left in peace.

    python tests/soak_resume.py                     20 kills of one process
    python tests/soak_resume.py --kills 5 --nproc 2 under torchrun: one of the two processes is killed, torchrun ends the other

The killed run saves after every step, so that it gets on; it must end with the same weights to the last bit and the same
log, no line doubled or lost. Exit status 0 if it does. The moments are drawn from --seed and printed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def command(directory: Path, nproc: int, *extra: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    flags = "--limit-train 100 --limit-val 20 --batch-size 20 --epochs 12 --log-every 4 --eval-every 6 --device cpu --workers 1"
    return [sys.executable, *launch, str(ROOT / "train_cls.py"), *flags.split(), "--output-dir", str(directory), *extra]


def children(pid: int) -> list[int]:
    """The processes that `pid` started."""
    return [int(part) for file in Path(f"/proc/{pid}/task").glob("*/children") for part in file.read_text().split()]


def log_without_speed(directory: Path) -> list[dict]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "seconds", "peak_memory_gb")} for line in lines]


def soak(kills: int, nproc: int, seed: int, root: Path) -> None:
    """Raises AssertionError where the two runs differ."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    chance = random.Random(seed)
    subprocess.run(command(root / "whole", nproc), env=environment, check=True, capture_output=True)
    killed = 0
    while True:
        again = command(root / "killed", nproc, "--resume", "--checkpoint-minutes", "0")
        process = subprocess.Popen(again, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started, config = time.monotonic(), root / "killed" / "config.json"
        config.unlink(missing_ok=True)
        wait = chance.uniform(0.0, 1.2)
        while process.poll() is None and killed < kills:
            if config.exists():  # written when training starts: before that there is little to break
                time.sleep(wait)
                victim = chance.choice(children(process.pid) or [process.pid]) if nproc > 1 else process.pid
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    break
                killed += 1
                print(f"kill {killed}: {wait:.2f} s into training, {time.monotonic() - started:.1f} s after the start", flush=True)
                break
            time.sleep(0.02)
        _, errors = process.communicate()
        if process.returncode == 0:
            break
        assert killed and "Error: " not in errors.replace("ChildFailedError: ", ""), errors
    assert killed >= min(kills, 1), "the run ended before it could be killed"
    for name in ("backbone.pth", "head.pth"):
        whole, resumed = (torch.load(root / run / name, weights_only=True) for run in ("whole", "killed"))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), f"{name} differs"
    assert log_without_speed(root / "whole") == log_without_speed(root / "killed"), "log.jsonl differs"
    print(f"after {killed} kills: the same weights to the last bit and the same log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        soak(args.kills, args.nproc, args.seed, Path(root))


if __name__ == "__main__":
    main()
