"""The command line: bad input in one line, the arguments that the scripts share."""

import argparse
import functools
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what is wrong, where, what to do."""


class RunError(RuntimeError):
    """A run cannot go on: its loss is not finite, or its disk is full. The message is one line."""


def first_line(error):
    """The first line of an error's message, at most 160 characters, to quote inside a message of one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def dataset_name(args):
    """The dataset as messages name it: a user's own is called by its folder."""
    return Path(args.data_root).name if args.dataset == "folder" else args.dataset


def stage(main):
    """Decorates a script's main(argv): bad input ends it with one line and exit status 2; a loss that is not finite, a
    full disk or a GPU without memory with 1, Ctrl-C with 130. Everything else is Python's own traceback."""

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            main(argv)
        except (InputError, RunError) as error:
            end(2 if isinstance(error, InputError) else 1, f"error: {error}")
        except torch.OutOfMemoryError as error:
            end(1, f"error: {first_line(error)} Train with --grad-accum 2, evaluate with a smaller --batch-size")
        except KeyboardInterrupt:
            end(130, "interrupted")
        if dist.is_initialized():
            dist.destroy_process_group()

    return wrapped


def end(status, message):
    """Print on stderr and exit. Other ranks wait, so that rank 0's message comes first; torchrun then ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    rank = f" [rank {os.environ['RANK']}]" if os.environ.get("RANK", "0") != "0" else ""
    print(f"{Path(sys.argv[0]).name}:{rank} {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():  # taking NCCL's group apart would warn, and can wait for the other ranks
        sys.stdout.flush()
        os._exit(status)
    raise SystemExit(status) from None


class ArgumentParser(argparse.ArgumentParser):
    """Shows the script's manual as it is written; errors are InputErrors."""

    def __init__(self, description):
        layout = {"usage": "%(prog)s [flags]", "formatter_class": Formatter}
        super().__init__(description=description, allow_abbrev=False, **layout)

    def error(self, message):
        raise InputError(f"{message} (--help explains all flags)")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one."""

    def _get_help_string(self, action):
        has_none = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if has_none else f"{action.help} [%(default)s]"


def number(low, high=math.inf, *, above=False, kind=float):
    """An argparse type: a finite number of `kind` in [low, high], or in (low, high] with `above`."""
    bound = f"above {low:g}" if above else f"at least {low:g}"
    if high < math.inf:
        bound += f" and at most {high:g}"

    def parse(text):
        value = kind(text)
        too_low = value <= low if above else value < low
        if too_low or value > high or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} must be a {parse.__name__} {bound}")
        return value

    parse.__name__ = "whole number" if kind is int else "number"  # argparse: invalid number value: 'x'
    return parse


whole = functools.partial(number, kind=int)


def cores_per_rank():
    """The cores that this process may use over the ranks on this machine; 1 to 32."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(32, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def add_data_arguments(parser, names):
    """Which images, and how they are prepared; `names` of datasets that the script serves, the default first."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=names[0], metavar="NAME", help=", ".join(names) + "; folder: your own images")
    add("--data-root", metavar="DIR", help="where the datasets live; default: $GRPO_RM_DATA, else ./datasets")
    add("--download", action=argparse.BooleanOptionalAction, default=True, help="download a dataset that is missing")
    add("--image-size", type=whole(1), help="side in pixels, a multiple of the patch size; default: the dataset's")
    add("--limit-train", type=whole(1), metavar="N", help="use N training images, evenly spaced")
    add("--limit-val", type=whole(1), metavar="N", help="use N validation images, evenly spaced")
    add("--workers", type=whole(0), default=cores_per_rank(), metavar="N",
        help="processes per rank that decode images; default: the cores over the ranks, at most 32")  # fmt: skip


def add_model_arguments(parser):
    """Backbone, device and precision."""
    add = parser.add_argument_group("model and machine").add_argument
    add("--backbone", help="dinov2_vits14 (the paper's), dinov2_vitb14, ..., vit_tiny, or a model of --hub-repo")
    add("--hub-repo", help="owner/repo[:ref], or a local directory: code only, random weights without --weights")
    add("--weights", help="file with the backbone's state dict; every name and shape must match")
    add("--seed", type=whole(0, 2**32 - 1), default=0,
        help="of weights, batches and augmentation, in evaluations of the linear layer; the paper has 5")  # fmt: skip
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is cuda where there is one")
    add("--amp", choices=["auto", "bf16", "off"], default="auto", help="mixed precision; auto: bf16 on a GPU that can")


def add_training_arguments(parser, *, lr, batch_size):
    """Objective, optimisation and files of a run; the paper's batch_size and, for a batch of 256, learning rate."""
    add = parser.add_argument_group("objective").add_argument
    add("--method", choices=["grpo_rm", "finetune"], default="grpo_rm", help="finetune: cross-entropy, all else equal")
    add("--clip-eps", type=number(0, 1, above=True), default=0.2, help="eps of Eq. (1); the paper's is 0.2")
    add("--uniformity", choices=["eq4", "eq5", "none"], default="eq4", help="uniformity reward; the paper's is eq4")
    add("--accuracy-weight", type=number(0), default=1.0, help="w_acc of Eq. (6); the paper's is 1")
    add("--uniformity-weight", type=number(0), default=1.0, help="w_uni of Eq. (6); the paper's is 1")
    add("--ratio-floor", type=number(0), default=1.0, help="F in rho = p / (q + F/c); the paper's 0 can blow up")
    add("--old-policy-every", type=whole(1), metavar="STEPS",
        help="steps between refreshes of the old policy; default: the paper's epoch; few are dangerous")  # fmt: skip

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=whole(1), default=100, help="the paper's is 100; 30 at least for 1,000 classes")
    add("--batch-size", type=whole(1), default=batch_size, help=f"global batch m; the paper's is {batch_size}")
    add("--grad-accum", type=whole(1), default=1, help="split each process's batch to save memory; same result")
    add("--lr", type=number(0, above=True), help=f"first learning rate; default: the paper's {lr:g} * m/256")
    add("--lr-end", type=number(0), help="last learning rate; default: a hundredth of --lr, the paper's ratio")
    add("--head-lr-factor", type=number(0, above=True), default=1.0, help="multiplies the head's rate; the paper: 1")
    add("--warmup-epochs", type=number(0), help="linear warm-up; default: 5, at most a fifth of --epochs; the paper: 0")
    add("--max-grad-norm", type=number(0, above=True), help="clip the gradient's norm; default: off, as in the paper")
    add("--hidden-dim", type=whole(1), help="width of the head; default: the paper's 256, 64 for VOC and shapes_seg")
    add("--train-fraction", type=number(0, 1, above=True), default=1.0, help="random share of the training set")
    add("--augment", choices=["default", "none"], default="default", help="default: crop and flip; segmentation: flip")

    add = parser.add_argument_group("run").add_argument
    add("--output-dir", help="default: runs/<dataset>/<method>/seed<seed>")
    add("--resume", action="store_true", help="go on from --output-dir's checkpoint, or start where there is none")
    add("--checkpoint-minutes", type=number(0), default=10.0, help="time between checkpoints")
    add("--log-every", type=whole(1), default=10, metavar="STEPS", help="steps per line of log.jsonl")
    add("--eval-every", type=whole(1), default=5, metavar="EPOCHS", help="epochs between validations")
    add("--max-steps", type=whole(1), help="stop after so many steps; the schedule stays that of --epochs")
    add("--compile", action="store_true", help="torch.compile backbones and loss: some minutes once, then faster")


def resolve_training_arguments(args, world, protocol, *, lr):
    """Fill in defaults that depend on others. protocol: data.Protocol; lr: the paper's for a batch of 256."""
    resolve_model_arguments(args, world)
    resolve_learning_rate(args, lr)
    if args.warmup_epochs is None:
        args.warmup_epochs = min(5.0, args.epochs / 5)
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}; take fewer")
    args.hidden_dim = args.hidden_dim or protocol.hidden_dim
    args.output_dir = args.output_dir or f"runs/{args.dataset}/{args.method}/seed{args.seed}"


def resolve_learning_rate(args, lr):
    """The paper's rule where nothing was given: lr * m/256, m the batch size, falling to a hundredth."""
    args.lr = args.lr or lr * args.batch_size / 256
    if args.lr_end is None:
        args.lr_end = args.lr / 100
    if args.lr_end > args.lr:
        raise InputError(f"--lr-end {args.lr_end:g} is above --lr {args.lr:g}; the rate can only fall")


def resolve_model_arguments(args, world):
    """The defaults that belong to the dataset and the device. Raises InputError for a file that is not there."""
    if args.weights and not os.path.isfile(args.weights):
        raise InputError(f"--weights {args.weights}: no such file; give a state dict, such as backbone.pth of a run")
    if args.backbone is None:
        args.backbone = "vit_tiny" if args.dataset in ("shapes", "shapes_seg") else "dinov2_vits14"
    if args.amp == "auto":
        bf16 = world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "bf16" if bf16 else "off"
    args.device = world.device.type
