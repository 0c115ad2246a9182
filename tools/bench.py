"""Measure speed and memory on this machine, beside the paper's numbers (Table 5) and the hardware's floor.

    python -m tools.bench                          any machine; a CPU takes vit_tiny and small batches
    python -m tools.bench --backbone dinov2_vits14 --hub-repo ~/dinov2       hub code; random weights will do

Prints Markdown. What is compared runs in turn; a number is the median over the turns.
"""

import copy
import functools
import statistics
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

import train_cls
import train_seg
from common import cli
from common.backbone import load_backbone
from common.checkpoint import environment, make_directory, write_json
from common.demo import draw_scene
from common.distributed import Meter, start_processes
from common.loader import Loader
from data import COCO_CLASSES, COCO_TABLE, PROTOCOLS, file_split, mask_split, resolve_dataset
from grpo_rm import ClassificationHead, Policy, SegmentationHead, grpo_rm_loss, make_loss, make_optimizer, training_step
from tools.report import METHODS, PAPER, print_table

LOSS_SHAPES = [(131072, 21), (65536, 171), (1024, 1000)]  # (N, G): pixels of VOC and of COCO-stuff, a batch of ImageNet
JPEG_FILES = 256
# Classes, training images, batch size on a CPU, GRPO-RM's floor: seconds an epoch on one H200 at 40 % of its bf16 rate.
SETTINGS = {
    "tiny_imagenet": (200, 100_000, 64, 1.4),
    "imagenet": (1000, 1_281_167, 16, 199),
    "voc2012": (21, 1464, 4, 1.2),
    "coco_stuff": (171, 118_287, 2, 102),
}


def medians(runs, repeats):
    """{name: median seconds} of {name: function}, which take `repeats` turns. Timer warms up with two runs of the same
    function each time: what a run finds in cache and allocator depends on the one before it."""
    threads = torch.get_num_threads()
    timers = {name: Timer("run()", globals={"run": run}, num_threads=threads) for name, run in runs.items()}
    turns = [{name: timer.timeit(1).median for name, timer in timers.items()} for _ in range(repeats)]
    return {name: statistics.median(turn[name] for turn in turns) for name in runs}


def measure_loss(shape, args, device):
    """Forward and backward pass of the loss, eager and compiled."""
    old = torch.randn(shape, device=device)
    logits = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    targets = torch.randint(shape[1], shape[:1], device=device)
    runs = {}
    for name, loss in {"eager": grpo_rm_loss, "compiled": torch.compile(grpo_rm_loss, dynamic=False)}.items():
        runs[name] = lambda loss=loss: torch.autograd.grad(loss(logits, old, targets, ratio_floor=1.0)[0], logits)
    return {"(N, G)": shape} | {f"{name} ms": 1e3 * x for name, x in medians(runs, args.repeats).items()}


def measure_steps(dataset, args, device, images_per_s):
    """A row for each method, whose steps come in turn. images_per_s: of a worker, where the dataset is streamed."""
    outputs, train_images, cpu_batch, floor = SETTINGS[dataset]
    stage, make_head, map_shape = train_cls, ClassificationHead, ()
    if dataset in PROTOCOLS["segmentation"]:
        stage, make_head, map_shape = train_seg, SegmentationHead, (128, 128)
    options = stage.parse_args(["--dataset", dataset, "--lr", "1e-6"])
    hidden_dim = resolve_dataset(options, "classification", "segmentation").hidden_dim
    options.compile = args.compile
    B, side = options.batch_size if device.type == "cuda" else cpu_batch, options.image_size
    images = torch.randn(B, 3, side, side, device=device)
    targets = torch.randint(outputs, (B, *map_shape), device=device)
    backbone = load_backbone(args.backbone, hub_repo=args.hub_repo, weights=args.weights)
    head = make_head(backbone.embed_dim, outputs, hidden_dim)
    torch._dynamo.reset()  # it keeps few shapes of a function
    runs = {}
    for method in ("finetune", "grpo_rm"):
        options.method = method
        policy = copy.deepcopy(Policy(backbone, head, args.amp)).to(device)
        policy.encoder.compile(dynamic=False, disable=not args.compile)
        old_policy = None
        if method == "grpo_rm":
            old_policy = copy.deepcopy(policy)
            old_policy.encoder.compile(dynamic=False, disable=not args.compile)
        parts = policy, old_policy, policy.encoder, make_loss(options), make_optimizer(policy, options)
        runs[method] = functools.partial(training_step, *parts, images, targets, Meter(), options)
    rows = []
    for method, seconds in medians(runs, args.repeats).items():
        row = {"setting": f"{dataset}, {method}, {B} x {side}^2", "step ms": 1e3 * seconds}
        row |= {"epoch s": train_images / B * seconds, "paper: s": PAPER[dataset, "seconds"][METHODS[method]]}
        row["floor: s"] = floor if method == "grpo_rm" else floor * 3 / 4  # one forward pass less
        if images_per_s:
            row[f"fed by {options.workers} workers"] = options.workers * images_per_s * seconds / B
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            runs[method]()
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row | {"paper: GB": PAPER[dataset, "GB"][METHODS[method]]})
    return rows


def measure_loaders(args, world):
    """Rows for ImageNet's and COCO-stuff's loader, and a peer: torchvision's ImageFolder with ImageNet's transforms.
    Images/s of one worker, JPEG files of 500 x 375 pixels; the workers that feed one H200 at GRPO-RM's floor."""
    runs = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "scenes").mkdir()
        for i in range(JPEG_FILES):
            pixels, mask = draw_scene(i, seed=0, side=500)
            file = Path(directory, "scenes", f"{i}.jpg")
            Image.fromarray(pixels[:375].numpy()).save(file, quality=90)
            Image.fromarray(mask[:375]).save(file.with_suffix(".mask"), "PNG")
        crop = v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC)
        peer = ImageFolder(directory, v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]))
        batches = DataLoader(peer, 64, shuffle=True, num_workers=1, persistent_workers=True)
        runs["imagenet, torchvision"] = functools.partial(list, batches)
        pairs = [(file, Path(file).with_suffix(".mask")) for file, _ in peer.samples]
        splits = {
            "imagenet": (train_cls, file_split(peer.classes, peer.samples)),
            "coco_stuff": (train_seg, mask_split(COCO_CLASSES, pairs, COCO_TABLE)),
        }
        for dataset, (stage, split) in splits.items():
            options = stage.parse_args(["--dataset", dataset, "--workers", "1"])
            resolve_dataset(options, "classification", "segmentation")
            loader = Loader(split, options, world, augment=True)
            loader.resident = None  # streamed, as the whole set is
            runs[dataset] = lambda loader=loader: list(loader.decoded(torch.arange(JPEG_FILES).split(64), key=(0, 0)))
        rows = []
        for name, seconds in medians(runs, args.repeats).items():
            _, train_images, _, floor = SETTINGS[name.partition(",")[0]]
            rate = JPEG_FILES / seconds
            rows.append({"loader": name, "images/s": rate, "workers": train_images / floor / rate})
    return rows


@cli.stage
def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    cli.add_model_arguments(parser)
    add = parser.add_argument_group("benchmark").add_argument
    add("--repeats", type=cli.whole(1), default=7, help="turns that the medians are taken over")
    add("--threads", type=cli.whole(1), help="CPU threads of torch; default: its own choice")
    add("--compile", action="store_true", help="compile the steps; the loss is measured both ways in any case")
    add("--output", metavar="FILE.json", help="all measurements")
    args = parser.parse_args(argv)
    make_directory(Path(args.output or ".").parent, "--output")
    world = start_processes(args.device)
    args.backbone = args.backbone or ("dinov2_vits14" if world.device.type == "cuda" else "vit_tiny")
    cli.resolve_model_arguments(args, world)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")  # as in training
    torch._dynamo.config.suppress_errors = True  # without a compiler: eager, with a warning
    machine = environment(world) | {"threads": torch.get_num_threads(), "backbone": args.backbone, "amp": args.amp}
    print_table("Machine", [machine])
    losses = [measure_loss(shape, args, world.device) for shape in LOSS_SHAPES]
    print_table("Loss, forward and backward", losses)
    loaders = measure_loaders(args, world)
    print_table("Loader, a worker", loaders)
    rates = {row["loader"]: row["images/s"] for row in loaders}
    steps = []
    for dataset in SETTINGS:  # where the memory of a GPU does not suffice, the tables before it are printed
        rows = measure_steps(dataset, args, world.device, rates.get(dataset))
        print_table(f"Training step, {dataset}", rows)
        steps += rows
    if args.output:
        write_json(Path(args.output), {"machine": machine, "loss": losses, "loaders": loaders, "steps": steps})


if __name__ == "__main__":
    main()
