"""Measure speed and memory on this machine, beside the paper's numbers (Tables 5 and 6) and the hardware's floor.

    python bench.py                                                            any machine; a CPU takes vit_tiny and small batches
    python bench.py --output bench.json                                        the report, and all measurements as JSON
    python bench.py --hub-repo ~/dinov2 --backbone dinov2_vits14 --compile     hub code without a network: random weights will do
    python bench.py --quick                                                    a try-out in seconds; its numbers mean nothing

Prints Markdown: the loss in its plain, fused and compiled form; a training step of fine-tuning and of GRPO-RM at the
four settings of Table 5; the loader against the step that it feeds. What is compared runs in turn, a ratio is taken within
each turn, and a number is the median over the turns with the least and the largest behind it. GPUs are timed with events.
Other work on the machine spoils the numbers of a CPU above all: its threads wait for each other at every operation.
"""

import copy
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train_cls
from checkpoint import check_writable, environment, write_json
from data import PROTOCOLS, ArgumentParser, InputError, Split, TrainLoader, first_line, number, read_image, stage
from grpo_rm import (
    ClassificationHead,
    Policy,
    SegmentationHead,
    World,
    add_model_arguments,
    compiled_loss,
    grpo_rm_loss,
    init_world,
    load_backbone,
    prepare,
    resolve_model_arguments,
    training_step,
)

LOSS_SHAPES = [(131072, 21), (65536, 171), (1024, 1000)]  # (N, G): pixels of VOC and of COCO-stuff, a batch of ImageNet


@dataclass(frozen=True)
class Setting:
    """A row of Table 5. Seconds are those of an epoch on the paper's two H200s; `floor_s` is one H200 at 40 % of its bf16 rate
    doing GRPO-RM's arithmetic."""

    name: str
    image_size: int
    batch_size: int
    num_outputs: int
    hidden_dim: int
    train_images: int
    paper_s: dict[str, float]
    paper_gb: dict[str, float]
    floor_s: float
    cpu_batch_size: int
    segmentation: bool = False


SETTINGS = [
    Setting("tiny_imagenet", 70, 1024, 200, 256, 100_000, {"finetune": 9.30, "grpo_rm": 10.37}, {"finetune": 13.26, "grpo_rm": 15.12}, 1.4, 64),
    Setting("imagenet", 224, 1024, 1000, 256, 1_281_167, {"finetune": 175.95, "grpo_rm": 238.20}, {"finetune": 95.40, "grpo_rm": 107.00}, 199, 16),
    Setting("voc2012", 448, 256, 21, 64, 1464, {"finetune": 151.39, "grpo_rm": 174.29}, {"finetune": 217.72, "grpo_rm": 220.66}, 1.2, 4, True),
    Setting("coco_stuff", 448, 256, 171, 256, 118_287, {"finetune": 1549.8, "grpo_rm": 1669.8}, {"finetune": 223.46, "grpo_rm": 232.04}, 102, 2, True),
]
MAP_SIZE = 128


def parse_args(argv: list[str] | None):
    parser = ArgumentParser(__doc__)
    add_model_arguments(parser)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--repeats", type=number(1, kind=int), default=9, help="turns that the medians are taken over")
    group.add_argument("--threads", type=number(1, kind=int), help="CPU threads of torch; default: its own choice")
    group.add_argument("--compile", action="store_true", help="train with torch.compile; the loss is always measured with it too, where it works")
    group.add_argument("--quick", action="store_true", help="tiny sizes, no compilation")
    group.add_argument("--output", metavar="FILE.json", help="all measurements")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------------
# Measuring


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """The time that one call of `run` takes on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def take_turns(runs: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run in each of `repeats` turns, after one turn to warm up. A run comes twice and the second is timed: what
    the first finds in the cache, and in the allocator, depends on the one before it."""
    seconds = {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            run()
            taken = seconds_of(run, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    """The spread of the ratio within a turn."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def matmul_rate(world: World, amp: str, repeats: int, side: int) -> float:
    """FLOP/s of a product of two square matrices in the precision that the networks run in."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    a, b = (torch.randn(side, side, device=world.device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / min(take_turns({"matmul": lambda: a @ b}, repeats, world.device)["matmul"])


# ------------------------------------------------------------------------------------------------------------------
# What is measured


def measure_loss(shape: tuple[int, int], repeats: int, world: World, *, compiled: bool) -> dict:
    """Forward and backward of the loss, every form and uniformity reward in turn."""
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=generator)
    logits = (old + 0.3 * torch.randn(shape, generator=generator)).to(world.device).requires_grad_()
    old, targets = old.to(world.device), torch.randint(shape[1], shape[:1], generator=generator).to(world.device)

    def run(loss_function=grpo_rm_loss, **options) -> None:
        loss, _ = loss_function(logits, old, targets, ignore_index=-100, **options)
        (logits.grad,) = torch.autograd.grad(loss, logits)

    runs = {"plain": lambda: run(fused=False), "fused": run, "fused_eq5": lambda: run(uniformity="eq5")}
    loss_function = compiled_loss(shape[0])
    try:
        if compiled:
            run(loss_function)
            runs["compiled"] = lambda: run(loss_function)
    except Exception as error:  # no compiler, or one that cannot: it may raise anything
        print(f"{shape}: compiled form left out ({first_line(error)})", file=sys.stderr)
    seconds = take_turns(runs, repeats, world.device)
    speed_up = {f"{name}_speed_up": ratio(seconds["plain"], seconds[name]) for name in seconds if name in ("fused", "compiled")}
    times = {f"{name}_s": spread(values) for name, values in seconds.items()}
    return {"shape": list(shape)} | times | speed_up | {"eq5_to_eq4": ratio(seconds["fused_eq5"], seconds["fused"])}


def kept_per_image(step: Callable[[int], None], images: int) -> float:
    """Bytes that a step on so many images keeps of one for its backward pass: what half of them adds, without weights."""

    def kept(count: int) -> int:
        tensors: dict[int, torch.Tensor] = {}  # by the memory that they lie in

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step(count)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    return (kept(images) - kept(images // 2)) / (images - images // 2)


def measure_steps(setting: Setting, args, world: World) -> dict:
    """Training steps of both methods in turn, on images of noise."""
    image_size, batch_size = setting.image_size, setting.batch_size if world.device.type == "cuda" else setting.cpu_batch_size
    if args.quick:
        image_size, batch_size = 28, 4
    images = torch.randn(batch_size, 3, image_size, image_size, device=world.device)
    size = (batch_size, MAP_SIZE, MAP_SIZE) if setting.segmentation else (batch_size,)
    targets = torch.randint(setting.num_outputs, size, device=world.device)
    backbone = load_backbone(args.backbone, hub_repo=args.hub_repo, weights=args.weights)
    head = (setting.hidden_dim, MAP_SIZE) if setting.segmentation else (setting.hidden_dim,)
    head_class = SegmentationHead if setting.segmentation else ClassificationHead
    fresh_policy = Policy(backbone, head_class(backbone.embed_dim, setting.num_outputs, *head))

    steps, flops, kept, peaks = {}, {}, {}, {}
    for method in ("finetune", "grpo_rm"):
        options = train_cls.parse_args(["--method", method])
        options.amp, options.background_penalty = args.amp, 0.5 if setting.segmentation else 0.0
        options.compile, options.lr = args.compile, 1e-6
        before = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
        policy = copy.deepcopy(fresh_policy).to(world.device)
        old_policy, model, optimizer, scaler = prepare(policy, options, world)

        def step(count=batch_size, model=model, old_policy=old_policy, optimizer=optimizer, scaler=scaler, options=options) -> None:
            training_step(model, old_policy, optimizer, scaler, images[:count], targets[:count], options, world)

        with torch.compiler.set_stance("force_eager"):
            with FlopCounterMode(display=False) as counter:
                step()
            kept[method] = kept_per_image(step, min(16, batch_size))
        flops[method], steps[method] = counter.get_total_flops(), step
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[method] = (torch.cuda.max_memory_allocated() - before) / 1e9
    seconds = take_turns(steps, args.repeats, world.device)
    result = {"setting": setting.name, "image_size": image_size, "batch_size": batch_size, "methods": {}}
    for method, values in seconds.items():
        median = statistics.median(values)
        result["methods"][method] = {
            "step_s": spread(values),
            "images_per_s": batch_size / median,
            "epoch_s": setting.train_images * median / batch_size,
            "matmul_share": flops[method] / median / args.matmul_rate,
            "kept_gb": kept[method] * setting.batch_size / 1e9,
            "peak_gb": peaks.get(method),
            "paper_epoch_s": setting.paper_s[method],
            "paper_gb": setting.paper_gb[method],
            "floor_epoch_s": setting.floor_s * (0.75 if method == "finetune" else 1.0),
        }
    return result | {"grpo_rm_to_finetune": ratio(seconds["grpo_rm"], seconds["finetune"])}


def measure_loader(count: int, batch_size: int, args, world: World) -> dict:
    """Images a second from JPEG files of Tiny-ImageNet's size: while they are decoded, and in the epochs after that."""
    with tempfile.TemporaryDirectory() as directory:
        noise = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
        files = [str(Path(directory) / f"{i}.jpg") for i in range(count)]
        for file in files:
            Image.fromarray(noise).save(file)
        split = Split(["noise"], torch.zeros(count, dtype=torch.int64), lambda i: read_image(files[i]))
        start = time.perf_counter()
        loader = TrainLoader(split, PROTOCOLS["classification"]["tiny_imagenet"], 70, batch_size, world, args.workers, seed=0, augment=True)
        decoding = time.perf_counter() - start
        epochs = take_turns({"epoch": lambda: [images.sum() for images, _ in loader.epoch(0)]}, args.repeats, world.device)["epoch"]
    return {"decoded_images_per_s": count / decoding, "images_per_s": spread([count / seconds for seconds in epochs])}


# ------------------------------------------------------------------------------------------------------------------
# The report


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows]) + "\n"


def show(values: dict[str, float], digits: int = 2, factor: float = 1.0) -> str:
    median, low, high = (f"{factor * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def loss_row(result: dict) -> list[str]:
    shape = "({}, {})".format(*result["shape"])
    times = [show(result[name], 2, 1000) if name in result else "-" for name in ("plain_s", "fused_s", "compiled_s")]
    ratios = [show(result[name]) if name in result else "-" for name in ("fused_speed_up", "compiled_speed_up", "eq5_to_eq4")]
    return [shape, *times, *ratios]


def step_rows(result: dict) -> list[list[str]]:
    rows = []
    for method, values in result["methods"].items():
        memory = "-" if values["peak_gb"] is None else f"{values['peak_gb']:.1f}"
        relative = show(result["grpo_rm_to_finetune"]) if method == "grpo_rm" else "1"
        here = [f"{result['setting']}, {method}", f"{result['batch_size']} x {result['image_size']}^2", show(values["step_s"], 1, 1000), relative]
        here += [f"{values['images_per_s']:.0f}", f"{100 * values['matmul_share']:.0f} %", f"{values['kept_gb']:.1f}", memory, f"{values['epoch_s']:.1f}"]
        rows.append([*here, f"{values['paper_epoch_s']:g}", f"{values['floor_epoch_s']:.1f}", f"{values['paper_gb']:g}"])
    return rows


@stage
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = init_world(args.device)
    args.tasks, args.dataset, args.data_root, args.image_size = ("classification",), "tiny_imagenet", None, None
    args.backbone = args.backbone or ("dinov2_vits14" if world.device.type == "cuda" else "vit_tiny")
    resolve_model_arguments(args, world)
    if args.threads:
        torch.set_num_threads(args.threads)
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as in training
    if args.output:
        check_writable(Path(args.output))
    torch.manual_seed(args.seed or 0)
    repeats = args.repeats

    side = 256 if args.quick else 8192 if world.device.type == "cuda" else 1024
    args.matmul_rate = matmul_rate(world, args.amp, repeats, side)
    machine = environment(world) | {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"python": platform.python_version(), "amp": args.amp, "backbone": args.backbone, "matmul_tflops": args.matmul_rate / 1e12}
    name = machine["device_name"] if world.device.type == "cuda" else f"CPU ({machine['processor']}, {machine['threads']} threads)"
    print(f"# {name}, torch {machine['torch_version']}, Python {machine['python']}\n")
    print(f"Matrix multiplication: {machine['matmul_tflops']:.3g} TFLOP/s, amp {args.amp}. Medians of {repeats} turns (least to largest).\n")

    losses = []
    for shape in [(64, 21), (64, 100)] if args.quick else LOSS_SHAPES:
        losses.append(measure_loss(shape, repeats, world, compiled=not args.quick))
    print("## Loss, forward and backward\n\nThe paper's Eq. (5) took 1.05 to 54 times as long as its Eq. (4) for a whole epoch (Table 6).\n")
    header = ["(N, G)", "plain ms", "fused ms", "compiled ms", "fused speed-up", "compiled speed-up", "Eq. (5) / Eq. (4)"]
    print(table(header, [loss_row(result) for result in losses]))

    steps = []
    for setting in SETTINGS:
        try:
            steps.append(measure_steps(setting, args, world))
        except torch.OutOfMemoryError:
            print(f"{setting.name}: left out, a batch of {setting.batch_size} does not fit into this GPU", file=sys.stderr)
    if not steps:
        raise InputError("no setting fits into this GPU; take a smaller --backbone")
    scaled = "" if world.device.type == "cuda" else f" Scaled down to {args.backbone} and small batches: not comparable with the paper's."
    print(f"## Training step\n\nEpochs are worked out from the step; the floor is one H200 at 40 % of its bf16 rate. Kept: what a batch of the paper's size keeps for its backward pass.{scaled}\n")
    header = ["setting", "batch", "step ms", "/ fine-tuning", "images/s", "of matmul rate", "kept GB", "peak GB", "epoch s", "paper: epoch s", "floor: epoch s", "paper: GB"]
    print(table(header, [row for result in steps for row in step_rows(result)]))

    batch_size = steps[0]["batch_size"]
    loader = measure_loader(32 if args.quick else 4096, batch_size, args, world)
    consumed = steps[0]["methods"]["grpo_rm"]["images_per_s"]
    loader["to_step"] = loader["images_per_s"]["median"] / consumed
    print("## Loader\n\nTiny-ImageNet's sizes; decoding happens once, before the first epoch.\n")
    row = [f"{loader['decoded_images_per_s']:.0f}", show(loader["images_per_s"], 0), f"{consumed:.0f}", f"{loader['to_step']:.1f}"]
    print(table(["decoded images/s", "images/s", "GRPO-RM step images/s", "loader / step"], [row]))

    if args.output:
        settings = [asdict(setting) for setting in SETTINGS]
        write_json(Path(args.output), {"machine": machine, "loss": losses, "steps": steps, "loader": loader, "settings": settings})


if __name__ == "__main__":
    main()
