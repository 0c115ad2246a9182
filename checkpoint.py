"""A run on disk: config.json, log.jsonl, checkpoints and exported weights, each whole or absent at any moment."""

import argparse
import contextlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from data import Diverged, InputError, Stopped, first_line

# What may differ between runs that are otherwise the same: it does not change the mathematics. A run may be resumed with
# other values of these, and report.py averages over them.
NEUTRAL = set(
    "data_root download device workers output_dir resume checkpoint_minutes eval_every log_every max_steps hub_repo weights "
    "grad_accum compile timeout_minutes skip_unreadable input decoded_cache recompute_activations head_chunk cache_features "
    "save_images output git_commit torch_version device_name world_size forward_macs".split()
)


def neutral(settings: dict) -> set[str]:
    """NEUTRAL, but for the directory of a `folder` set: it is what names the data."""
    return NEUTRAL - {"data_root"} if settings.get("dataset") == "folder" else NEUTRAL


def check_writable(path: Path) -> None:
    """InputError unless a file can be put at `path`, whose directory may not be there yet."""
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a directory; name a file")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"cannot write {path}: {parent} is no directory that can be written to; choose another")


def make_directory(path: Path) -> None:
    """Make a directory and those above it, where they are missing. Raises InputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path} ({first_line(error)}); choose another directory") from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in its place: a reader sees the old file or the
    whole new one, whenever the process dies. Raises InputError where the directory cannot be written or is not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)  # the new name too survives a crash of the machine
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise InputError(f"cannot write {path} ({first_line(error)}); free some space or choose another directory") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(values: dict) -> str:
    """One line of valid JSON; numbers that JSON has no name for (nan, inf) become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False)


def write_json(path: Path, values: dict) -> None:
    """Write `values` to `path`, indented, atomically; its directory is made where it is missing."""
    text = json.dumps(json.loads(to_json(values)), indent=2) + "\n"
    make_directory(path.parent)
    write_atomically(path, lambda file: file.write_text(text))


def read_log(path: Path) -> list[dict]:
    """The events in a log.jsonl, up to a line that a dying process left half-written; [] where there is none."""
    events = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def load_state_dict_file(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict stored in `path`, on the CPU. Nothing but tensors and plain containers is ever unpickled. Raises
    InputError when the file is missing, damaged, or holds anything else."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of odd pickles before it refuses them
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise almost anything
        reason = "not a file of plain tensors" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise InputError(f"weights file {path} cannot be loaded ({reason}); give a state dict saved with torch.save") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"weights file {path} does not hold a state dict (name -> tensor); give backbone.pth of a run")
    return state


def load_strictly(module: nn.Module, path: str | Path) -> None:
    """Load the state dict in `path` into `module`; every name and shape must match and every number be finite, else InputError
    names the first that does not fit."""
    state, expected = load_state_dict_file(path), module.state_dict()
    complaints = (
        [f"{name} is missing" for name in expected.keys() - state.keys()]
        + [f"{name} is not part of this backbone" for name in state.keys() - expected.keys()]
        + [
            f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ]
        + [f"{name} has numbers that are not finite" for name, tensor in state.items() if not tensor.isfinite().all()]
    )
    if complaints:
        more = f" and {len(complaints) - 1} more" if len(complaints) > 1 else ""
        raise InputError(f"weights file {path} does not fit: {min(complaints)}{more}; check --backbone and --weights")
    module.load_state_dict(state, strict=True)


def config_beside(weights: str | None) -> dict:
    """The config.json of the run that wrote the file `weights`; {} where there is none."""
    path = Path(weights).parent / "config.json" if weights else None
    if path is None or not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}); restore or remove it") from error
    return config if isinstance(config, dict) and "method" in config else {}  # others' weights have a config.json too


def result_path(args: argparse.Namespace, name: str) -> Path:
    """Where an evaluation's result goes: args.output, else the file `name` beside the weights of a run on the same
    dataset, or in the directory of the frozen baseline. Raises InputError where it cannot be written."""
    config = {} if args.frozen else config_beside(args.weights)
    beside = config.get("dataset") == args.dataset and (args.dataset != "folder" or config.get("data_root") == args.data_root)
    directory = Path(args.weights).parent if beside else Path(f"runs/{args.dataset}/frozen/seed{args.seed or 0}")
    path = Path(args.output) if args.output else directory / name
    if not args.output and config and not beside:
        raise InputError(f"--weights {args.weights} come from a run on another dataset; name the result's file with --output")
    check_writable(path)
    return path


def environment(world) -> dict:
    """What config.json says beside the arguments: source, versions and hardware."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a git checkout
        commit = None
    cuda = world.device.type == "cuda"
    return {
        "git_commit": commit,
        "torch_version": torch.__version__,
        "device_name": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "world_size": world.size,
    }


def random_state() -> list[torch.Tensor]:
    """The state of torch's generators: the CPU's and, where one is used, this process's GPU's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])


def set_random_state(states: list[torch.Tensor]) -> None:
    """The opposite of `random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1])


class Meter:
    """Sums over the samples of several steps. They stay on the device, so that no step waits for the host."""

    def __init__(self):
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, sums: dict[str, torch.Tensor]) -> None:
        """Add the sums of one step; "max_ratio" is a maximum instead."""
        for name, value in sums.items():
            if name in self.sums:
                value = torch.maximum(self.sums[name], value) if name == "max_ratio" else self.sums[name] + value
            self.sums[name] = value

    def read(self) -> dict[str, float]:
        """The sums over all ranks, as numbers; the meter starts anew."""
        names = [name for name in self.sums if name != "max_ratio"]
        sums, peak = torch.stack([self.sums[name] for name in names]), self.sums.get("max_ratio")
        if dist.is_initialized():
            dist.all_reduce(sums)
            if peak is not None:
                dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        self.sums = {}
        return dict(zip(names, sums.tolist(), strict=True)) | ({} if peak is None else {"max_ratio": peak.item()})


def means(sums: dict[str, float]) -> dict[str, float]:
    """Sums over samples -> means; "max_ratio" stays what it is."""
    samples = max(sums["samples"], 1)
    return {k: v if k == "max_ratio" else v / samples for k, v in sums.items() if k not in ("samples", "images", "seconds")}


class Run:
    """One run's directory: what was asked (config.json), what happened (log.jsonl), where it stands (checkpoint.pt).

    Rank 0 writes; all ranks call every method at the same step. `parts` are the objects whose state dicts make up a
    checkpoint (None: absent). checkpoint_previous.pt is the checkpoint before the newest; it is used, with a warning,
    when the newest does not load. `loader` tells the steps in an epoch and which files could not be read. Inside `with run:` SIGTERM, SIGUSR1 and Ctrl-C save the run after the step in progress,
    on all ranks, and raise Stopped.
    """

    def __init__(self, args: argparse.Namespace, world, loader, **parts):
        self.args, self.world, self.steps_per_epoch, self.parts = args, world, len(loader), parts
        self.samples, self.unreadable_logged = loader.samples, set()
        self.data = {"images": loader.samples.count, "classes": list(loader.classes)}
        self.directory = Path(args.output_dir)
        self.newest, self.previous = (self.directory / name for name in ("checkpoint.pt", "checkpoint_previous.pt"))
        self.window, self.epoch_sums, self.lr = Meter(), {}, args.lr  # since the last log line; since the epoch began
        self.first_bad: dict[str, torch.Tensor] = {}  # the first step at which a number was not finite, 0 if none
        self.window_started = self.saved = time.monotonic()
        self.warned, self.signal, self.log_lines = False, 0, 0
        # The ranks agree over the CPU: no step waits for a GPU.
        timeout = timedelta(minutes=args.timeout_minutes)
        self.control = dist.new_group(backend="gloo", timeout=timeout) if dist.is_initialized() else None
        self.bar = tqdm(total=self.steps_per_epoch, leave=False, disable=None if world.rank == 0 else True)

    def __enter__(self) -> "Run":
        def remember(number: int, frame) -> None:
            self.signal = number

        self.handlers = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.bar.close()

    def start(self, **facts) -> int:
        """Restore the parts from the checkpoint, where args.resume asks for it and there is one; write config.json, with the
        `facts`; drop the log's lines from after that checkpoint, which will come again. Returns the step to go on from. Raises InputError."""
        saved = self.newest.exists() or self.previous.exists()
        if not saved and (self.directory / "backbone.pth").exists():
            raise InputError(f"--output-dir {self.directory} holds a finished run without its checkpoints; choose another")
        if (saved or (self.directory / "log.jsonl").exists()) and not self.args.resume:
            raise InputError(f"--output-dir {self.directory} already holds a run; add --resume to go on with it, or choose another")
        check_writable(self.newest)
        state = self._newest_state() if self.args.resume else None
        step = self._restore(state) if state else 0
        if self.control:
            steps = torch.tensor([step, -step])
            dist.all_reduce(steps, op=dist.ReduceOp.MAX, group=self.control)
            if steps.sum() != 0:
                raise InputError(f"--resume: the processes find different checkpoints in {self.directory}; all nodes must see one directory")
        if self.world.rank == 0:
            for left_over in self.directory.glob(".*.tmp"):  # of a process that was killed while it wrote
                left_over.unlink()
            write_json(self.directory / "config.json", vars(self.args) | environment(self.world) | facts)
            log = self.directory / "log.jsonl"
            kept = read_log(log)[: self.log_lines]
            if len(kept) < self.log_lines and log.exists():
                os.replace(log, log.with_suffix(".damaged"))
                self.say(f"warning: {log} is damaged after line {len(kept)} of {self.log_lines}; all of it is kept in {log.stem}.damaged")
            self.unreadable_logged = {event["reason"] for event in kept if event["event"] == "unreadable"}
            text = "".join(to_json(event) + "\n" for event in kept)
            write_atomically(log, lambda file: file.write_text(text))
        return step

    def _newest_state(self) -> dict | None:
        broken = None
        for path in (self.newest, self.previous):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                before = {name: state["args"].get(name) for name in vars(self.args)}
            except FileNotFoundError:
                continue
            except Exception as error:  # a damaged file makes torch.load raise almost anything
                broken = broken or path
                self.say(f"warning: {path} does not load ({first_line(error)}); looking for the one before it")
                continue
            for name, value in vars(self.args).items():
                if name not in neutral(vars(self.args)) and value != before[name]:
                    flag = "--" + name.replace("_", "-")
                    raise InputError(f"--resume: {flag} is {value}, but {before[name]} in {self.directory}; give the same or another --output-dir")
            if state.get("data") != self.data:
                raise InputError(f"--resume: the training images or the classes are not those of the run in {self.directory}; restore them, or take another --output-dir")
            return state
        if broken:
            raise InputError(f"--resume: {broken} does not load and there is no other; remove it to start from the beginning")
        return None

    def _restore(self, state: dict) -> int:
        try:
            for name, part in self.parts.items():
                if part is not None:
                    part.load_state_dict(state[name])
            step, ranks = state["step"], state["ranks"]
            self.epoch_sums, self.lr, self.log_lines = state["epoch_sums"], state["lr"], state["log_lines"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"the checkpoint in {self.directory} is not of this network ({first_line(error)})"
            raise InputError(f"--resume: {reason}; have the classes or the backbone changed?") from error
        if len(ranks) == self.world.size:
            mine = [ranks[self.world.rank]["window"]]
            set_random_state(ranks[self.world.rank]["random"])
        else:
            self.say(f"warning: the run had {len(ranks)} processes, not {self.world.size}: it will not go on to the last bit")
            mine = [rank["window"] for rank in ranks]  # the first process takes over what all of them had measured
            if self.world.rank:
                mine = [{name: torch.zeros_like(value) for name, value in ranks[0]["window"].items()}]
        for window in mine:
            self.window.add({name: value.to(self.world.device) for name, value in window.items()})
        self.window_started = time.monotonic() - ranks[0]["seconds"]
        self.say(f"resuming {self.directory} at step {step}")
        return step

    def open_epoch(self, step: int) -> int:
        """The epoch to go on with after `step`: the one that `step` ended, if its end has not been seen to."""
        return (step - 1 if self.epoch_sums or self.window.sums else step) // self.steps_per_epoch

    def record(self, step: int, lr: float, sums: dict[str, torch.Tensor]) -> None:
        """Take in what the step that ended measured; every args.log_every steps write a log line; when a signal came or
        args.checkpoint_minutes have passed, save. Raises Diverged and Stopped."""
        self.lr = lr
        self.window.add(sums)
        for name in ("loss",) if self.args.amp == "fp16" else ("loss", "grad_norm"):  # fp16's scaler skips steps that overflow
            before = self.first_bad.get(name, torch.zeros_like(sums[name]))
            self.first_bad[name] = torch.where(sums[name].isfinite() | (before > 0), before, step)
        epoch, steps = divmod(step - 1, self.steps_per_epoch)
        self.bar.desc, self.bar.n = f"epoch {epoch + 1}/{self.args.epochs}", steps
        self.bar.update()
        if step % self.args.log_every == 0:
            self.flush(step)
        if self._wish():
            self.save(step)

    def _wish(self) -> int:
        """What some rank wants: the number of the signal it got, 1 for a checkpoint that is due, or 0."""
        overdue = self.world.rank == 0 and time.monotonic() - self.saved > 60 * self.args.checkpoint_minutes
        wish = torch.tensor(self.signal or int(overdue))
        if self.control:
            dist.all_reduce(wish, op=dist.ReduceOp.MAX, group=self.control)
        return int(wish)

    def flush(self, step: int) -> None:
        """Write the log line of the steps since the last one. Reading their sums waits for the device."""
        if not self.window.sums:
            return
        self._check_finite()
        self._log_unreadable(step)
        sums = self.window.read()
        sums["seconds"] = time.monotonic() - self.window_started
        self.epoch_sums = {
            k: max(self.epoch_sums.get(k, 0.0), v) if k == "max_ratio" else self.epoch_sums.get(k, 0.0) + v for k, v in sums.items()
        }
        values = means(sums)
        self.log("step", step, values | {"lr": self.lr, "images_per_s": sums["images"] / sums["seconds"]})
        self.window_started = time.monotonic()
        self.bar.set_postfix_str(f"loss {values['loss']:.4g}", refresh=False)
        if values.get("max_ratio", 0) > 1e4 and not self.warned:
            self.warned = True
            self.say(
                f"warning: the ratio p/q reached {values['max_ratio']:.1e} by step {step}: samples whose prediction flips "
                "swamp the update; try --ratio-floor 0.1 or 1, --group-weighting policy, or a lower --lr"
            )

    def _check_finite(self) -> None:
        """Raise Diverged, on all ranks, when a loss or a gradient was not finite. training_step has changed no weight
        since then."""
        bad = {name: int(step) for name, step in self.first_bad.items()}
        bad["here"] = bool(getattr(self.parts.get("optimizer"), "bad_here", self.world.size == 1))
        found = [bad]
        if self.control:
            found = [None] * self.world.size
            dist.all_gather_object(found, bad, group=self.control)
        hint = "no weight was changed by it, the last checkpoint is good; try a lower --lr, --warmup-epochs or --max-grad-norm"
        for name, what in (("loss", "the loss"), ("grad_norm", "the gradient")):
            places = [(steps[name], rank) for rank, steps in enumerate(found) if steps.get(name)]
            if places:
                step, rank = min(places)
                if name == "grad_norm":  # the sum over the ranks, which all of them have
                    rank = next((rank for rank, steps in enumerate(found) if steps["here"]), "all, summed")
                raise Diverged(f"{what} is not finite at step {step} on rank {rank}; {hint}")
        if self.args.amp == "fp16" and self.parts["scaler"].get_scale() < 1:
            raise Diverged(f"the gradient is not finite however small the loss is scaled (--amp fp16); {hint}, or --amp bf16")

    def _log_unreadable(self, step: int) -> None:
        """Write a line for every file that some rank could not read and that has no line yet. Raises InputError, on all
        ranks, when they are too many."""
        reasons = self.unreadable_logged | set(self.samples.unreadable.values())
        if self.control:
            found: list = [None] * self.world.size
            dist.all_gather_object(found, reasons, group=self.control)
            reasons = set().union(*found)
        for reason in sorted(reasons - self.unreadable_logged):
            self.unreadable_logged.add(reason)
            self.log("unreadable", step, {"reason": reason, "count": len(self.unreadable_logged)})
            self.say(f"warning: {reason}; the next sample stands in for it ({len(self.unreadable_logged)} so far)")
        self.samples.check_share(reasons)

    def end_epoch(self, step: int, validate: Callable[[], dict[str, float]] | None) -> None:
        """Write the epoch's log line, with what `validate` measures, the seconds of training and this process's peak memory
        in GB (None on the CPU), and print its summary."""
        self.flush(step)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.world.device.type == "cuda" else None
        metrics = validate() if validate else {}
        values, rate = means(self.epoch_sums) | metrics, self.epoch_sums["images"] / self.epoch_sums["seconds"]
        cost = {"images_per_s": rate, "seconds": self.epoch_sums["seconds"], "peak_memory_gb": peak}
        self.log("epoch", step, values | {"lr": self.lr} | cost)
        self.epoch_sums, self.window_started = {}, time.monotonic()
        parts = [f"epoch {step // self.steps_per_epoch}/{self.args.epochs}", f"loss {values['loss']:.4f}"]
        parts += [f"accuracy {100 * values['accuracy']:.2f} %"]
        if "max_ratio" in values:
            parts += [f"clipped {100 * values['clip_fraction']:.1f} %", f"max ratio {values['max_ratio']:.3g}", f"KL {values['kl']:.3g}"]
        parts += [f"lr {self.lr:.2e}", f"{rate:.0f} images/s"] + [f"{name} {value:.2f} %" for name, value in metrics.items()]
        self.say("  ".join(parts), file=sys.stdout)

    def save(self, step: int) -> None:
        """Store the state after `step` as the newest checkpoint; the newest so far becomes the previous one. Raises
        Stopped afterwards when a signal asks for the end, and InputError where the checkpoint cannot be written."""
        self._check_finite()
        window = {name: value.cpu() for name, value in self.window.sums.items()}
        mine = {"random": random_state(), "window": window, "seconds": time.monotonic() - self.window_started}
        ranks = [mine]
        if self.control:
            ranks = [None] * self.world.size
            dist.all_gather_object(ranks, mine, group=self.control)
        self.saved = time.monotonic()
        if self.world.rank == 0:
            state = {name: part.state_dict() if part is not None else None for name, part in self.parts.items()}
            state |= {"step": step, "lr": self.lr, "epoch_sums": self.epoch_sums, "log_lines": self.log_lines}
            state |= {"ranks": ranks, "args": vars(self.args), "data": self.data}

            def write(file: Path) -> None:
                torch.save(state, file)
                if self.newest.exists():
                    os.replace(self.newest, self.previous)

            write_atomically(self.newest, write)
        self.window_started += time.monotonic() - self.saved  # training time does not hold it
        wish = self._wish()
        if wish > 1:
            name = signal.Signals(wish).name
            raise Stopped(f"{name}: saved at step {step} in {self.directory}; --resume goes on from there", signal_number=wish)

    def export(self, name: str, module: nn.Module) -> None:
        """Write the state dict of `module`, on the CPU, to the file `name`."""
        if self.world.rank == 0:
            state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
            write_atomically(self.directory / name, lambda file: torch.save(state, file))

    def say(self, text: str, file=None) -> None:
        """Print a line on rank 0, on stderr unless told otherwise, without breaking the progress bar."""
        if self.world.rank == 0:
            tqdm.write(text, file=file or sys.stderr)

    def log(self, event: str, step: int, values: dict) -> None:
        """Append a line to log.jsonl, on rank 0."""
        if self.world.rank != 0:
            return
        line = {"event": event, "epoch": max(0, step - 1) // self.steps_per_epoch, "step": step} | values
        self.log_lines += 1
        try:
            with open(self.directory / "log.jsonl", "a") as file:
                file.write(to_json(line) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.directory / 'log.jsonl'} ({first_line(error)}); free some space or restore it") from error
