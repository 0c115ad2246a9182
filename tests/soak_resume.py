"""Kill a training run again and again at random moments, resume it each time, and compare with a run left in peace.

    python tests/soak_resume.py                     20 kills of one process
    python tests/soak_resume.py --script train_seg.py            the same for segmentation
    python tests/soak_resume.py --kills 5 --nproc 2 under torchrun: one of the two processes is killed, torchrun ends the other

The killed run saves after every step, so that it gets on; it must end with the same weights to the last bit and the same
log, no line doubled or lost. Exit status 0 if it does. The moments are drawn from --seed and printed.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


FLAGS = {
    "train_cls.py": "--limit-train 100 --limit-val 20 --batch-size 20",
    "train_seg.py": "--limit-train 40 --limit-val 8 --batch-size 8 --image-size 28 --map-size 14",
}


def command(script: str, directory: Path, nproc: int, *extra: str) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    flags = f"{FLAGS[script]} --epochs 12 --log-every 4 --eval-every 6 --device cpu --workers 1"  # 60 steps
    return [sys.executable, *launch, str(ROOT / script), *flags.split(), "--output-dir", str(directory), *extra]


def children(pid: int) -> list[int]:
    """The processes that `pid` started."""
    return [int(part) for file in Path(f"/proc/{pid}/task").glob("*/children") for part in file.read_text().split()]


def log_without_speed(directory: Path) -> list[dict]:
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("images_per_s", "seconds", "peak_memory_gb")} for line in lines]


def run_and_kill(again: list[str], directory: Path, kills: int, chance: random.Random, environment: dict) -> int:
    """Start a run until it ends in peace, and kill it at most `kills` times; returns how often it died of that."""
    killed = 0
    while True:
        config = directory / "config.json"  # written when training starts: before that there is little to break
        config.unlink(missing_ok=True)
        process = subprocess.Popen(again, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not config.exists():
            time.sleep(0.02)
        wait = chance.uniform(0.0, 1.2)
        if killed < kills:
            time.sleep(wait)
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(children(process.pid) or [process.pid]) if "torch.distributed.run" in again else process.pid, signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:  # it was there first
            return killed
        assert killed < kills and not re.search(rf'File "{re.escape(str(ROOT))}/\w+\.py', errors), errors  # no traceback of ours
        killed += 1
        print(f"kill {killed}: {wait:.2f} s into training", flush=True)


def soak(kills: int, nproc: int, seed: int, root: Path, script: str = "train_cls.py") -> None:
    """Kill `kills` times, over as many runs as that takes. Raises AssertionError where one differs from the run left in peace."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    chance, killed, runs = random.Random(seed), 0, 0
    subprocess.run(command(script, root / "whole", nproc), env=environment, check=True, capture_output=True)
    while killed < kills:
        runs += 1
        directory = root / f"killed{runs}"
        again = command(script, directory, nproc, "--resume", "--checkpoint-minutes", "0")
        killed += run_and_kill(again, directory, kills - killed, chance, environment)
        for name in ("backbone.pth", "head.pth"):
            whole, resumed = (torch.load(run / name, weights_only=True) for run in (root / "whole", directory))
            assert all(torch.equal(whole[key], resumed[key]) for key in whole), f"{name} differs"
        assert log_without_speed(root / "whole") == log_without_speed(directory), "log.jsonl differs"
    print(f"{killed} kills in {runs} runs: the same weights to the last bit and the same log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=FLAGS, default="train_cls.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        soak(args.kills, args.nproc, args.seed, Path(root), args.script)


if __name__ == "__main__":
    main()
