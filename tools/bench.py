"""Measure speed and memory on this machine, beside the paper's numbers (Table 5) and the hardware's floor.

    python -m tools.bench                          any machine; a CPU takes vit_tiny and small batches
    python -m tools.bench --backbone dinov2_vits14 --hub-repo ~/dinov2       hub code; random weights will do

Prints Markdown. What is compared runs in turn, and a number is the median over the turns. Other work on the machine
spoils the numbers of a CPU.
"""

import copy
import functools
import statistics
from pathlib import Path

import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.weak import WeakIdKeyDictionary

import train_cls
import train_seg
from common import cli
from common.backbone import load_backbone
from common.checkpoint import environment, make_directory, write_json
from common.distributed import Meter, start_processes
from common.loader import Loader
from data import PROTOCOLS, Split, resolve_dataset
from grpo_rm import ClassificationHead, Policy, SegmentationHead, grpo_rm_loss, make_loss, make_optimizer, training_step
from tools.report import METHODS, PAPER, print_table

LOSS_SHAPES = [(131072, 21), (65536, 171), (1024, 1000)]  # (N, G): pixels of VOC and of COCO-stuff, a batch of ImageNet
# Of Table 5: classes, training images, batch size on a CPU, and fine-tuning's floor: seconds of an epoch's arithmetic
# on one H200 at 40 % of its bf16 rate (GRPO-RM: 4/3 of it).
SETTINGS = {
    "tiny_imagenet": (200, 100_000, 64, 1.05),
    "imagenet": (1000, 1_281_167, 16, 149),
    "voc2012": (21, 1464, 4, 0.9),
    "coco_stuff": (171, 118_287, 2, 76),
}


def medians(runs, repeats):
    """{name: median seconds} of {name: function}, which take `repeats` turns. Timer warms up with two runs of
    the same function each time: what a run finds in cache and allocator depends on the one before it."""
    seconds = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            seconds[name].append(timer.timeit(1).median)
    return {name: statistics.median(values) for name, values in seconds.items()}


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


def measure_loss(shape, args, device):
    """Forward and backward pass of the loss, eager and compiled. Kept: beside the inputs, in tensors of their size."""
    old = torch.randn(shape, device=device)
    logits = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    targets = torch.randint(shape[1], shape[:1], device=device)

    def run(function):
        loss, _ = function(logits, old, targets, ratio_floor=1.0)
        return torch.autograd.grad(loss, logits)

    compiled = torch.compile(grpo_rm_loss, dynamic=False, backend="eager" if args.quick else "inductor")
    runs = {"eager": lambda: run(grpo_rm_loss), "compiled": lambda: run(compiled)}
    row = {"(N, G)": shape}
    row |= {f"{name} ms": 1e3 * seconds for name, seconds in medians(runs, args.repeats).items()}
    return row | {f"{name} keeps": bytes_kept(run, logits, old) / logits.nbytes for name, run in runs.items()}


def measure_steps(dataset, args, device):
    """A row for each method, whose training steps on images of noise come in turn. Kept: for the backward pass of the
    paper's batch, from that of one image and of B."""
    outputs, train_images, cpu_batch, floor = SETTINGS[dataset]
    stage, make_head, map_shape = train_cls, ClassificationHead, ()
    if dataset in PROTOCOLS["segmentation"]:
        stage, make_head, map_shape = train_seg, SegmentationHead, (128, 128)
    options = stage.parse_args(["--dataset", dataset, "--lr", "1e-6"])
    hidden_dim = resolve_dataset(options, "classification", "segmentation").hidden_dim
    options.compile = args.compile
    B, side = options.batch_size if device.type == "cuda" else cpu_batch, options.image_size
    if args.quick:
        B, side, outputs = 2, 28, 5
    images = torch.randn(B, 3, side, side, device=device)
    targets = torch.randint(outputs, (B, *map_shape), device=device)
    backbone = load_backbone(args.backbone, hub_repo=args.hub_repo, weights=args.weights)
    head = make_head(backbone.embed_dim, outputs, hidden_dim)
    torch._dynamo.reset()  # it keeps few shapes of a function
    steps = {}
    for method in ("finetune", "grpo_rm"):
        options.method = method
        policy = copy.deepcopy(Policy(backbone, head, args.amp)).to(device)
        old_policy = None
        if method == "grpo_rm":
            old_policy = copy.deepcopy(policy).requires_grad_(args.compile)  # as in train
            old_policy.encoder.compile(dynamic=False, disable=not args.compile)
        policy.encoder.compile(dynamic=False, disable=not args.compile)
        parts = policy, old_policy, policy.encoder, make_loss(options)
        optimizer = make_optimizer(policy, options)
        steps[method] = functools.partial(training_step, *parts, optimizer, meter=Meter(), args=options)
    runs = {method: functools.partial(step, images, targets) for method, step in steps.items()}
    rows = []
    for method, seconds in medians(runs, args.repeats).items():
        row = {"setting": f"{dataset}, {method}, {B} x {side}^2", "step ms": 1e3 * seconds}
        row |= {"epoch s": train_images / B * seconds, "paper: s": PAPER[dataset, "seconds"][METHODS[method]]}
        row["floor: s"] = floor if method == "finetune" else floor * 4 / 3
        one = bytes_kept(functools.partial(steps[method], images[:1], targets[:1]))
        row["kept GB"] = (one + (bytes_kept(runs[method]) - one) / (B - 1) * (options.batch_size - 1)) / 1e9
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            runs[method]()
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row | {"paper: GB": PAPER[dataset, "GB"][METHODS[method]]})
    return rows


def measure_loader(args, world):
    """Crop, flip and resize of images of Tiny-ImageNet's size that were decoded before."""
    picture, count = Image.effect_noise((64, 64), 50).convert("RGB"), 1024
    options = train_cls.parse_args(["--dataset", "tiny_imagenet", "--batch-size", "64", "--image-size", "70"])
    resolve_dataset(options, "classification")
    loader = Loader(Split(["noise"], count, lambda i: (picture, 0)), options, world, augment=True)
    return {"images/s": count / medians({"epoch": lambda: list(loader.epoch(0))}, args.repeats)["epoch"]}


@cli.stage
def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--repeats", type=cli.whole(1), default=7, help="turns that the medians are taken over")
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
    print_table("Machine", [machine])
    losses = [measure_loss(shape, args, world.device) for shape in ([(64, 21)] if args.quick else LOSS_SHAPES)]
    print_table("Loss, forward and backward", losses)
    loader = measure_loader(args, world)
    print_table("Loader", [loader])
    steps = []
    for dataset in SETTINGS:  # where the memory of a GPU does not suffice, the tables before it are printed
        rows = measure_steps(dataset, args, world.device)
        print_table(f"Training step, {dataset}", rows)
        steps += rows
    if args.output:
        write_json(Path(args.output), {"machine": machine, "loss": losses, "loader": loader, "steps": steps})


if __name__ == "__main__":
    main()
