"""Measure speed and memory on this machine, beside the paper's numbers (Table 5) and the hardware's floor.

    python -m tools.bench                          any machine; a CPU takes vit_tiny and small batches
    python -m tools.bench --backbone dinov2_vits14 --hub-repo ~/dinov2       hub code; random weights will do

Prints Markdown. What is compared runs in turn, each right after a run of itself; a ratio is taken within a turn, and a
number is the median over the turns (least to largest). Other work on the machine spoils the numbers of a CPU.
"""

import copy
import functools
import timeit
from collections import namedtuple
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

import train_cls
from common import cli
from common.backbone import load_backbone
from common.checkpoint import environment, make_directory, write_json
from common.distributed import Meter, start_processes
from common.loader import Loader
from data import PROTOCOLS, Split, resolve_dataset
from grpo_rm import ClassificationHead, Policy, SegmentationHead, grpo_rm_loss, make_loss, make_optimizer, training_step

LOSS_SHAPES = [(131072, 21), (65536, 171), (1024, 1000)]  # (N, G): pixels of VOC and of COCO-stuff, a batch of ImageNet
# Table 5 (4 A100s or 2 H200s): seconds of an epoch, GB (fine-tuning, GRPO-RM), forward multiply-accumulates of a batch.
# floor_s: the arithmetic of an epoch on one H200 at 40 % of its bf16 rate. cpu: batch size on a CPU.
Row = namedtuple("Row", "setting image_size batch_size outputs hidden train_images paper_s paper_gb macs floor_s cpu")
SETTINGS = [
    Row("tiny_imagenet", 70, 1024, 200, 256, 100_000, (9.3, 10.37), (13.26, 15.12), 5.72e11, (1.05, 1.4), 64),
    Row("imagenet", 224, 1024, 1000, 256, 1_281_167, (175.95, 238.2), (95.4, 107), 5.66e12, (149, 199), 16),
    Row("voc2012", 448, 256, 21, 64, 1464, (151.39, 174.29), (217.72, 220.66), 2.90e12, (0.9, 1.2), 4),
    Row("coco_stuff", 448, 256, 171, 256, 118_287, (1549.8, 1669.8), (223.46, 232.04), 3.39e12, (76, 102), 2),
]


def take_turns(runs, repeats, device):
    """{name: seconds of each turn (repeats,)} of {name: function}, after one turn to warm up. A run comes twice and the
    second is timed: what the first finds in cache and allocator depends on the one before it."""
    seconds = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            run()
            if device.type != "cuda":
                seconds[name].append(timeit.timeit(run, number=1))
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1000)
    return {name: torch.tensor(values[1:], dtype=torch.float64) for name, values in seconds.items()}


def spread(values):
    return {"median": values.quantile(0.5).item(), "min": values.min().item(), "max": values.max().item()}


def bytes_kept(run, *apart):
    """The most bytes that autograd holds at once during `run` for its backward passes, without the tensors `apart`."""
    alive, apart, peak = WeakIdKeyDictionary(), {tensor.untyped_storage().data_ptr() for tensor in apart}, 0

    def keep(tensor):
        nonlocal peak
        tensor, storage = tensor.detach(), tensor.untyped_storage()  # an alias, which lives while autograd holds it
        alive[tensor] = storage.data_ptr(), storage.nbytes()
        peak = max(peak, sum(size for pointer, size in set(alive.values()) if pointer not in apart))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return peak


def measure_loss(shape, args, world):
    """Forward and backward of the loss, eager and compiled, under the uniformity rewards of Eqs. (4) and (5)."""
    old = torch.randn(shape, device=world.device)
    logits = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    targets = torch.randint(shape[1], shape[:1], device=world.device)
    compiled = torch.compile(grpo_rm_loss, dynamic=False, backend="eager" if args.quick else "inductor")

    def run(function, kind="eq4"):
        loss, _ = function(logits, old, targets, uniformity=kind, ratio_floor=1.0)
        return torch.autograd.grad(loss, logits)

    runs = {"eager": lambda: run(grpo_rm_loss), "compiled": lambda: run(compiled), "eq5": lambda: run(compiled, "eq5")}
    seconds = take_turns(runs, args.repeats, world.device)
    kept = {name: bytes_kept(run, logits, old) / logits.nbytes for name, run in runs.items()}
    return {
        "(N, G)": shape, "eager ms": spread(1e3 * seconds["eager"]), "compiled ms": spread(1e3 * seconds["compiled"]),
        "speed-up": spread(seconds["eager"] / seconds["compiled"]), "eager keeps": kept["eager"],
        "compiled keeps": kept["compiled"], "Eq. (5) / Eq. (4)": spread(seconds["eq5"] / seconds["compiled"]),
    }  # fmt: skip


def measure_steps(row, args, world):
    """Training steps of both methods in turn, on images of noise."""
    cuda, segmentation = world.device.type == "cuda", row.setting in PROTOCOLS["segmentation"]
    B, side = row.batch_size if cuda else row.cpu, row.image_size
    images = torch.randn(B, 3, side, side, device=world.device)
    targets = torch.randint(row.outputs, (B, 128, 128) if segmentation else (B,), device=world.device)
    backbone = load_backbone(args.backbone, hub_repo=args.hub_repo, weights=args.weights)
    head = (SegmentationHead if segmentation else ClassificationHead)(backbone.embed_dim, row.outputs, row.hidden)
    fresh = Policy(backbone, head, args.amp).to(world.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fresh(images[:1])
    flops = counter.get_flop_counts()["Global"].items()  # the paper's leave attention out
    macs = row.batch_size * sum(count for name, count in flops if "attention" not in str(name)) / 2

    torch._dynamo.reset()  # it keeps few shapes of a function
    steps, lines = {}, []
    for method in ("finetune", "grpo_rm"):
        options = train_cls.parse_args(["--method", method])
        options.compile, options.lr, options.background_penalty = args.compile, 1e-6, 0.5 if segmentation else 0.0
        policy, old_policy = copy.deepcopy(fresh), copy.deepcopy(fresh).requires_grad_(args.compile)  # as in train
        for network in (policy, old_policy) if args.compile else ():
            network.encoder.compile(dynamic=False)
        parts = policy, old_policy if method == "grpo_rm" else None, policy.encoder, make_loss(options)
        optimizer = make_optimizer(policy, options)
        steps[method] = functools.partial(training_step, *parts, optimizer, meter=Meter(), args=options)
    seconds = {method: functools.partial(step, images, targets) for method, step in steps.items()}
    seconds = take_turns(seconds, args.repeats, world.device)
    for i, (method, step) in enumerate(steps.items()):
        less, whole = (bytes_kept(functools.partial(step, images[:n], targets[:n])) for n in (B if cuda else B - 1, B))
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step(images, targets)
        lines.append({
            "setting": f"{row.setting}, {method}, {B} x {side}^2", "step ms": spread(1e3 * seconds[method]),
            "/ fine-tuning": spread(seconds[method] / seconds["finetune"]),
            "epoch s": row.train_images / B * seconds[method].quantile(0.5).item(), "paper: s": row.paper_s[i],
            "floor: s": row.floor_s[i], "kept GB": (whole + (row.batch_size - B) * (whole - less)) / 1e9,
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else "-", "paper: GB": row.paper_gb[i],
            "forward MACs": macs, "paper: FLOPs": row.macs,
        })  # fmt: skip
    return {"setting": row.setting, "grpo_rm_to_finetune": lines[1]["/ fine-tuning"], "methods": lines}


def table(rows):
    """Print dicts with the same keys as Markdown."""

    def show(value):
        if isinstance(value, dict):
            return "{:.3g} ({:.3g} to {:.3g})".format(*value.values())
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    rows = [list(rows[0]), ["---"] * len(rows[0]), *([show(value) for value in row.values()] for row in rows)]
    print("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n", flush=True)


@cli.stage
def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--repeats", type=cli.whole(1), default=9, help="turns that the medians are taken over")
    add("--threads", type=cli.whole(1), help="CPU threads of torch; default: its own choice")
    add("--compile", action="store_true", help="compile the steps; the loss is measured both ways in any case")
    add("--quick", action="store_true", help="a try-out in seconds: tiny sizes; its numbers mean nothing")
    add("--output", metavar="FILE.json", help="all measurements")
    args = parser.parse_args(argv)
    make_directory(Path(args.output or ".").parent, "--output")
    world = start_processes(args.device)
    args.dataset = "tiny_imagenet"
    args.backbone = args.backbone or ("dinov2_vits14" if world.device.type == "cuda" else "vit_tiny")
    cli.resolve_model_arguments(args, world)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")  # as in training
    torch._dynamo.config.suppress_errors = True  # without a compiler: eager, with a warning
    machine = environment(world) | {"threads": torch.get_num_threads(), "backbone": args.backbone, "amp": args.amp}
    print("# " + ", ".join(f"{name} {value}" for name, value in machine.items()) + "\n")
    print("## Loss, forward and backward\n\nKept for the backward pass: beside the inputs, in tensors of their size.\n")
    table(losses := [measure_loss(shape, args, world) for shape in ([(64, 21)] if args.quick else LOSS_SHAPES)])
    print("## Training step\n\nKept: for the backward pass of the paper's batch. MACs: without attention.\n")
    steps = []
    for row in [row._replace(image_size=28, outputs=5, cpu=2) for row in SETTINGS] if args.quick else SETTINGS:
        try:
            steps.append(measure_steps(row, args, world))
        except torch.OutOfMemoryError:
            print(f"{row.setting}: left out, {row.batch_size} images do not fit into this GPU")
    if steps:
        table([line for step in steps for line in step["methods"]])
    print("## Loader: crop, flip and resize of images of Tiny-ImageNet's size, decoded before\n")
    picture, count = Image.effect_noise((64, 64), 50).convert("RGB"), 64 if args.quick else 4096
    options = train_cls.parse_args(["--dataset", "tiny_imagenet", "--batch-size", "64", "--image-size", "70"])
    resolve_dataset(options, "classification")
    loader = Loader(Split(["noise"], count, lambda i: (picture, 0)), options, world, augment=True)
    seconds = take_turns({"epoch": lambda: list(loader.epoch(0))}, args.repeats, world.device)["epoch"]
    table([rates := {"images/s": spread(count / seconds)}])
    if args.output:
        write_json(Path(args.output), {"machine": machine, "loss": losses, "steps": steps, "loader": rates})


if __name__ == "__main__":
    main()
