"""Kill a training run again and again at random moments, resume it each time, and compare it with an uninterrupted run.

    python tests/soak_resume.py                           20 kills of one process
    python tests/soak_resume.py --script train_seg.py     the same for segmentation
    python tests/soak_resume.py --kills 5 --nproc 2       torchrun: one of two processes is killed, torchrun ends both

The killed run saves at every line of its log, so that it gets on. It must end with the same bytes of the exported
weights and the same log, no line doubled or lost; then the exit status is 0. The moments are drawn from --seed.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("images_per_s", "seconds", "peak_memory_gb")  # differ from run to run
FLAGS = {
    "train_cls.py": "--limit-train 100 --limit-val 20 --batch-size 20",
    "train_seg.py": "--limit-train 40 --limit-val 8 --batch-size 8 --image-size 28 --map-size 14",
}


def command(script, directory, nproc, *extra):
    """The command of a run of 60 steps."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    flags = f"{FLAGS[script]} --epochs 12 --log-every 2 --eval-every 6 --device cpu --workers 1"
    return [sys.executable, *launch, str(ROOT / script), *flags.split(), "--output-dir", str(directory), *extra]


def children(pid):
    """The processes that `pid` started."""
    return [int(part) for file in Path(f"/proc/{pid}/task").glob("*/children") for part in file.read_text().split()]


def read_log(directory):
    """The lines of log.jsonl without what differs from run to run; each must be valid JSON."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (Path(directory) / "log.jsonl").read_text().splitlines()
    events = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{name: value for name, value in event.items() if name not in MEASURED} for event in events]


def assert_same_runs(one, other):
    """The same exported weights to the last bit, and the same log."""
    for name in ("backbone.pth", "head.pth"):
        assert (Path(one) / name).read_bytes() == (Path(other) / name).read_bytes(), f"{name} differs"
    assert read_log(one) == read_log(other), "log.jsonl differs"


def run_and_kill(again, directory, nproc, kills, chance):
    """Start a run until it ends by itself, and kill it at most `kills` times; returns how often."""
    killed = 0
    while True:
        config = directory / "config.json"  # written when training starts: before that there is little to break
        config.unlink(missing_ok=True)
        process = subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not config.exists():
            time.sleep(0.02)
        wait = chance.uniform(0.0, 1.2)
        if killed < kills:
            time.sleep(wait)
            workers = children(process.pid) if nproc > 1 else []
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(workers or [process.pid]), signal.SIGKILL)
        _, errors = process.communicate()
        if process.returncode == 0:  # it ended first
            return killed
        assert killed < kills and (nproc > 1 or process.returncode == -signal.SIGKILL), errors
        killed += 1
        print(f"kill {killed}: {wait:.2f} s into training", flush=True)


def soak(kills, nproc, seed, root, script="train_cls.py"):
    """Kill `kills` times, over as many runs as that takes. Raises AssertionError where one ends with other results."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chance, killed, runs = random.Random(seed), 0, 0
    subprocess.run(command(script, root / "whole", nproc), check=True, capture_output=True)
    while killed < kills:
        runs += 1
        again = command(script, root / f"killed{runs}", nproc, "--resume", "--checkpoint-minutes", "0")
        killed += run_and_kill(again, root / f"killed{runs}", nproc, kills - killed, chance)
        assert_same_runs(root / "whole", root / f"killed{runs}")
    print(f"{killed} kills in {runs} runs: the same weights to the last bit and the same log")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=FLAGS, default="train_cls.py")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        soak(args.kills, args.nproc, args.seed, Path(scratch), args.script)
