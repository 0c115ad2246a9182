"""Post-train a representation model for semantic segmentation, with GRPO-RM or with standard fine-tuning.

    python train_seg.py                                                        drawn scenes, vit_tiny: a try-out on any machine
    python train_seg.py --dataset voc2012 --download                           one GPU, the paper's protocol
    torchrun --nproc_per_node=4 train_seg.py --dataset voc2012                 four GPUs
    torchrun --nproc_per_node=4 train_seg.py --dataset voc2012 --method finetune              its baseline
    torchrun --nproc_per_node=4 train_seg.py --dataset ade20k --train-fraction 0.1            the paper's 10 % rows

A sample is a pixel: the classes of each pixel of a map_size x map_size map are a group, void pixels take no part, and
class 0, the background, has c/2 taken from its reward. Writes config.json, log.jsonl, checkpoint.pt, backbone.pth and
head.pth to runs/<dataset>/<method>/seed<seed>; then eval_linear.py judges backbone.pth. The paper's Table 2 has, for VOC
2012 and linear features, a pixel accuracy of 93.98 % and an mIoU of 70.44 % after GRPO-RM, 93.66 % and 69.78 % after
fine-tuning.

Where this departs from the paper: --ratio-floor is 0.1 (the paper's is 0), because Eq. (1) to the letter can blow up.
The paper's learning rate, 1e-5 at a batch of 256, hardly moves a new head: see --head-lr-factor.
"""

import torch
import torch.distributed as dist

from data import ArgumentParser, SceneLoader, TrainLoader, add_data_arguments, fraction, number, stage
from grpo_rm import (
    Policy,
    SegmentationHead,
    World,
    add_model_arguments,
    add_training_arguments,
    autocast,
    confusion_matrix,
    init_world,
    load_data_and_backbone,
    make_deterministic,
    resolve_training_arguments,
    segmentation_scores,
    train,
)

PAPER = {"lr": 1e-5, "lr_end": 1e-7}  # for a batch of 256


def parse_args(argv: list[str] | None):
    parser = ArgumentParser(__doc__)
    add_data_arguments(parser, "segmentation")
    add_model_arguments(parser)
    add_training_arguments(parser, **PAPER, batch_size=256)
    group = parser.add_argument_group("segmentation")
    group.add_argument("--map-size", type=number(1, kind=int), default=128, help="side of the map of pixels that are classified; the paper's is 128")
    group.add_argument("--background-penalty", type=number(0), default=0.5, help="share of c taken from the reward of class 0 on every pixel; the paper's is 0.5, 0 switches it off")
    group.add_argument("--head-chunk", type=number(0, kind=int), default=2, metavar="IMAGES", help="upsample and classify so many images at a time, and again in the backward pass, to save memory; 0: all at once; the result is the same")
    return parser.parse_args(argv)


@torch.no_grad()
def head_scores(policy: Policy, loader: SceneLoader, batches: list[torch.Tensor], num_classes: int, amp: str, world: World) -> dict[str, float]:
    """Pixel accuracy and mIoU of the policy itself on the validation maps, in percent. Each scene counts once."""
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=world.device)
    for images, masks in loader.fetch(batches):
        with autocast(amp, world.device):
            logits = policy(images)  # (B, G, M, M)
        confusion += confusion_matrix(logits.argmax(1), masks.to(world.device), num_classes)
    if world.size > 1:
        dist.all_reduce(confusion)
    scores = segmentation_scores(confusion)
    return {f"val_{name}": 100 * scores[name] for name in ("pixel_acc", "miou")}


@stage
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = init_world(args.device, args.timeout_minutes)
    protocol = resolve_training_arguments(args, world, **PAPER)
    train_split, val_split, backbone = load_data_and_backbone(args, world)
    if args.deterministic:
        make_deterministic(backbone)
    train_split = fraction(train_split, args.train_fraction, args.seed)
    num_classes = len(train_split.classes)
    head = SegmentationHead(backbone.embed_dim, num_classes, args.hidden_dim, args.map_size, args.head_chunk)
    policy = Policy(backbone, head).to(world.device)  # line 1 of Algorithm 1

    options = {"seed": args.seed, "augment": args.augment == "default", "map_size": args.map_size, "skip_unreadable": args.skip_unreadable}
    options |= {"input_mode": args.input, "cache_dir": args.decoded_cache}
    loader = TrainLoader(train_split, protocol, args.image_size, args.batch_size, world, args.workers, **options)
    mine = torch.arange(len(val_split)).split(16)[world.rank :: world.size]  # whole batches: the same for any number of processes
    val_scenes = val_split.subset(torch.cat(mine).numpy() if mine else [])
    # No stand-ins for what cannot be read: each scene counts once.
    val_loader = SceneLoader(val_scenes, [args.image_size], args.map_size, world, args.workers, cache_dir=args.decoded_cache)
    val_batches = list(torch.arange(len(val_scenes)).split(16)) if mine else []
    train(policy, loader, lambda: head_scores(policy, val_loader, val_batches, num_classes, args.amp, world), args, world)


if __name__ == "__main__":
    main()
