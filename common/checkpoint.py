"""A run on disk: config.json (what was asked), log.jsonl (what happened), checkpoint.pt (where it stands), weights."""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.cli import InputError, RunError, dataset_name, first_line
from common.distributed import Meter, in_turn, merge

# A resumed run may have other values of these, and reports average over them: where training started from (hub_repo,
# weights) the checkpoint has fixed; the others do not change what is learned or measured.
MAY_DIFFER_ON_RESUME = {
    *("data_root", "download", "workers", "hub_repo", "weights", "device", "grad_accum", "compile"),
    *("output_dir", "resume", "checkpoint_minutes", "eval_every", "log_every", "max_steps", "save_images", "output"),
    *("git_commit", "torch_version", "device_name", "world_size"),
}


def write_atomically(path, write):
    """Let `write(file)` fill a file that then takes the name `path`: a reader sees the old file or the whole new one,
    whenever the process dies. Raises RunError where it cannot be written, as on a full disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError where a write fails
        temporary.unlink(missing_ok=True)
        reason = first_line(error.__context__ or error)
        raise RunError(f"{path} cannot be written ({reason}); make room and start again") from error


def write_json(path, values):
    """Write `values` as JSON with a key on every line, atomically."""
    lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in values.items()]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def make_directory(path, flag):
    """Make the directory `path`, named by `flag`, where it is missing. Raises InputError where it cannot be written."""
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    if not (path.is_dir() and os.access(path, os.W_OK)):
        raise InputError(f"{flag}: {path} cannot be written; choose another directory")


def load_tensors(path, remedy):
    """What torch.save wrote to `path`, on the CPU; plain tensors and containers only. Raises InputError."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of odd pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        reason = "not a file of plain tensors" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise InputError(f"{path} cannot be loaded ({reason}); {remedy}") from error


def read_config(directory):
    """The config.json of the run in `directory`. Raises InputError where there is none."""
    path = Path(directory) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); give the directory of a run") from error


def environment(world):
    """What config.json says beside the arguments: source, versions, hardware."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--exclude=*"]
    commit = ""
    with contextlib.suppress(OSError):  # there is no git
        commit = subprocess.run([*describe, "--dirty=+modified"], capture_output=True, text=True).stdout.strip()
    return {
        "git_commit": commit or "unknown",
        "torch_version": torch.__version__,
        "device_name": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "world_size": world.size,
    }


class Run:
    """A run's directory. Rank 0 writes; all ranks call every method at the same steps. `parts`: modules and optimizer,
    whose state makes up a checkpoint, or None. With args.resume they are restored, and log lines from after the
    checkpoint are dropped: they come again. SIGTERM, SIGUSR1, SIGHUP and Ctrl-C, to any rank, save the run at the next
    log line and end it."""

    def __init__(self, args, world, steps_per_epoch, **parts):
        self.args, self.world, self.steps_per_epoch = args, world, steps_per_epoch
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.total_steps = args.epochs * steps_per_epoch
        self.last_step = min(self.total_steps, args.max_steps or self.total_steps)
        self.directory, self.meter, self.warned = Path(args.output_dir), Meter(), set()
        self.settings = {name: value for name, value in vars(args).items() if name not in MAY_DIFFER_ON_RESUME}
        self.step = 0  # where training starts
        self.epoch = {}  # what the meter gave since the epoch began
        self.signal = 0  # the number of the signal that this process got
        self.stop = 0  # that of any process
        with in_turn(world, "output directory"):
            state = [self.open() if world.rank == 0 else None]
        if dist.is_initialized():
            dist.broadcast_object_list(state)
        if state[0]:
            for name, part in self.parts.items():
                part.load_state_dict(state[0][name])
            self.step, self.epoch = state[0]["step"], state[0]["epoch"]
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            numbers.append(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self.on_signal)
        self.announce()
        bar = {"unit": "step", "leave": False, "disable": None if world.rank == 0 else True}
        self.bar = tqdm(total=self.total_steps, initial=self.step, **bar)
        self.window_started = time.monotonic()
        self.saved = time.monotonic()

    def open(self):
        """On rank 0: lock the directory while this process lives, write config.json, cut the log. -> checkpoint"""
        checkpoint, log = self.directory / "checkpoint.pt", self.directory / "log.jsonl"
        make_directory(self.directory, "--output-dir")
        self.log_file = open(log, "ab+")
        self.lock()
        if not self.args.resume and (log.stat().st_size or checkpoint.exists()):
            raise InputError(f"--output-dir {self.directory} already holds a run; add --resume, or choose another")
        state = None
        if checkpoint.exists():
            state = load_tensors(checkpoint, "delete it and backbone.pth, and --resume starts from the beginning")
            self.check_settings(state["settings"])
        elif (self.directory / "backbone.pth").exists():
            raise InputError(f"--output-dir {self.directory} has backbone.pth but no checkpoint.pt; choose another")
        self.cut_log(state["step"] if state else 0)
        write_json(self.directory / "config.json", vars(self.args) | environment(self.world))
        return state

    def lock(self):
        import fcntl  # POSIX alone has it; without training nothing here needs it

        try:
            fcntl.lockf(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"--output-dir {self.directory}: another process trains there; choose another") from error
        except OSError:
            self.warn("lock", f"{self.directory} cannot be locked on this file system: start no second run there")

    def check_settings(self, before):
        """Raises InputError where a setting that changes the mathematics is not that of the checkpoint."""
        for name, value in self.settings.items():
            if before.get(name) != value:
                what = f"--resume: {name} is {str(value)[:80]}, but {str(before.get(name))[:80]} in {self.directory}"
                raise InputError(f"{what}; give the same, or another --output-dir")

    def cut_log(self, step):
        """Keep the whole lines of log.jsonl up to `step`."""
        end = 0
        self.log_file.seek(0)
        for line in self.log_file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
            end += len(line)
        self.log_file.truncate(end)

    def announce(self):
        """The first lines of a run: what it does, and where it departs from the paper."""
        args, steps, floor = self.args, self.steps_per_epoch, f"{self.args.ratio_floor:g}"
        self.say(
            f"{args.method} of {args.backbone} on {dataset_name(args)}: {args.epochs} epochs of {steps} steps on "
            f"{self.world.size} x {args.device}, amp {args.amp}, lr {args.lr:g} to {args.lr_end:g}",
            sys.stdout,
        )
        if args.warmup_epochs:
            self.say(f"warm-up {args.warmup_epochs:g} epochs; as in the paper: --warmup-epochs 0", sys.stdout)
        if args.method == "grpo_rm" and args.ratio_floor:
            self.say(f"ratio floor {floor}: rho = p / (q + {floor}/c); as in the paper: --ratio-floor 0", sys.stdout)
        if args.method == "grpo_rm" and (args.old_policy_every or steps) == 1:
            self.warn("refresh", "the old policy is refreshed before every step: p is always q, and nothing stops a "
                      "sample that moves far; take a smaller --batch-size or a larger --old-policy-every")  # fmt: skip
        what = f"resuming at step {self.step}" if self.step else "writing"
        self.say(f"{what} -> {self.directory}", sys.stdout)

    def on_signal(self, number, frame):
        self.signal = number
        if self.world.rank == 0:
            os.write(2, b"saving at the next log line\n")  # print is not for signal handlers

    def after_step(self, step, lr, validate):
        """What is due after a step: a line of the log, validation at an epoch's end, a checkpoint."""
        epoch_ends, last = step % self.steps_per_epoch == 0, step == self.last_step
        self.bar.set_description_str(f"epoch {self.epoch_of(step) + 1}/{self.args.epochs}", refresh=False)
        self.bar.update()
        if not (step % self.args.log_every == 0 or epoch_ends or last):
            return
        self.log_steps(step, lr)
        if epoch_ends:
            due = (self.epoch_of(step) + 1) % self.args.eval_every == 0 or step == self.total_steps
            self.log_epoch(step, lr, validate() if due else {})
        self.save_if_due(step, last)

    def epoch_of(self, step):
        return (step - 1) // self.steps_per_epoch

    def log_steps(self, step, lr):
        """The line of the steps since the last one. Raises RunError, on all ranks."""
        self.meter.add(1, {"signal": self.signal})
        reading = self.meter.read(self.world)
        self.stop = int(reading.pop("signal")[0])
        finite, steps = reading.pop("finite").tolist()
        if finite < steps:  # from the first on none is finite
            first = step - round((steps - finite) / self.world.size) + 1
            raise RunError(f"the loss or the gradient is not finite at step {first}, nothing is saved after it; try a "
                           "lower --lr or --max-grad-norm 1, in another --output-dir")  # fmt: skip
        reading["seconds"] = torch.tensor([time.monotonic() - self.window_started, 0], dtype=torch.float64)
        self.epoch = merge(self.epoch, reading)
        values = self.log("step", step, lr, reading)
        self.bar.set_postfix_str(f"acc {100 * values['accuracy']:.1f} %", refresh=False)
        if values.get("max_ratio", 0) > 1e4:
            self.warn("ratio", f"the ratio p/q reached {values['max_ratio']:.1e} by step {step}: samples whose "
                      "prediction flips swamp the update; try --ratio-floor 1, or a lower --lr")  # fmt: skip

    def log_epoch(self, step, lr, metrics):
        """The epoch's line: means, seconds of training, this process's peak memory, and what validation measured."""
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.world.device.type == "cuda" else None
        cost = {"seconds": self.epoch["seconds"][0].item(), "peak_memory_gb": peak}
        values, epoch = self.log("epoch", step, lr, self.epoch, **cost, **metrics), self.epoch_of(step) + 1
        accuracy, chance = 100 * values["accuracy"], 100 / len(self.args.classes)
        shown = [f"epoch {epoch}/{self.args.epochs}"]
        if self.args.method == "finetune":  # GRPO-RM's says little about progress
            shown.append(f"loss {values['loss']:.4f}")
        shown += [f"acc {accuracy:.1f} %", f"{values['images_per_s']:.0f} img/s"]
        shown += [f"{name.replace('val_', 'val ')} {value:.1f}" for name, value in metrics.items()]
        self.say("  ".join(shown), sys.stdout)
        if epoch >= self.args.warmup_epochs + 2 and accuracy < min(2 * chance, 60):  # with two classes chance is 50
            self.warn("chance", f"after epoch {epoch} the policy is right on {accuracy:.1f} % of the samples (chance: "
                      f"{chance:.1f} %); if this lasts, try more --warmup-epochs or a lower --lr")  # fmt: skip
        self.epoch = {}

    def log(self, event, step, lr, reading, **more):
        """Append a line with the means of a meter's reading; returns them."""
        images, seconds = (reading.pop(name)[0].item() for name in ("images", "seconds"))
        values = {name: (total / weight.clamp(min=1)).item() for name, (total, weight) in reading.items()}
        values |= {"lr": lr, "images_per_s": images / seconds}
        if self.world.rank == 0:
            line = {"event": event, "epoch": self.epoch_of(step), "step": step} | values | more
            try:
                self.log_file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
                self.log_file.flush()
            except OSError as error:
                raise RunError(f"{self.log_file.name} cannot be written ({error}); make room and --resume") from error
        return values

    def save_if_due(self, step, last):
        """Write checkpoint.pt by the clock, at the end, and when a signal came; then the signal ends the run."""
        due = time.monotonic() - self.saved > 60 * self.args.checkpoint_minutes
        if self.world.rank == 0 and (due or last or self.stop):
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"step": step, "epoch": self.epoch, "settings": self.settings}
            write_atomically(self.directory / "checkpoint.pt", lambda file: torch.save(state, file))
            self.saved = time.monotonic()
        if self.stop:
            name = signal.Signals(self.stop).name
            self.say(f"{name}: saved at step {step} in {self.directory}; --resume goes on from there")
            if dist.is_initialized():
                dist.barrier()  # until it is written
                dist.destroy_process_group()
            raise SystemExit(128 + self.stop)
        self.window_started = time.monotonic()

    def finish(self, policy):
        """Write head.pth and backbone.pth, last: where it is, the run is whole, or was ended by --max-steps."""
        self.bar.close()
        if self.world.rank == 0:
            for name, module in (("head.pth", policy.head), ("backbone.pth", policy.encoder.backbone)):
                state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
                write_atomically(self.directory / name, lambda file, state=state: torch.save(state, file))
        step = max(self.step, self.last_step)
        if step < self.total_steps:
            self.say(f"--max-steps: ended at step {step} of {self.total_steps}; backbone.pth is that of no "
                     "whole run, --resume without --max-steps goes on", sys.stdout)  # fmt: skip

    def say(self, text, file=None):
        """Print a line on rank 0 without breaking the progress bar."""
        if self.world.rank == 0:
            tqdm.write(text, file=file or sys.stderr)

    def warn(self, kind, text):
        """Each kind of warning is said once."""
        if kind not in self.warned:
            self.say(f"warning: {text}")
        self.warned.add(kind)
