"""Post-train a representation model for semantic segmentation, with GRPO-RM or with standard fine-tuning.

    python train_seg.py                                           a try-out on any machine: drawn scenes, vit_tiny
    python train_seg.py --dataset voc2012                         one GPU, the paper's protocol
    torchrun --nproc_per_node=4 train_seg.py --dataset voc2012    four GPUs
    torchrun --nproc_per_node=4 train_seg.py --dataset voc2012 --method finetune              its baseline
    torchrun --nproc_per_node=4 train_seg.py --dataset ade20k --train-fraction 0.1            the paper's 10 % rows

A sample is a pixel: the classes of each pixel of a map_size x map_size map are a group, void pixels take no part, and
class 0, the background, has c/2 taken from its reward. Writes config.json, log.jsonl, checkpoint.pt, backbone.pth and
head.pth to runs/<dataset>/<method>/seed<seed>; then eval_linear.py evaluates backbone.pth. The paper's Table 2 has, for
VOC 2012 and linear features, a pixel accuracy of 93.98 % and an mIoU of 70.44 % after GRPO-RM, 93.66 % and 69.78 %
after fine-tuning.

Where this departs from the paper: --ratio-floor is 1 (the paper's: 0), because Eq. (1) as printed can blow up, and
--warmup-epochs 5 (the paper's: 0), because without one the first steps can destroy a pre-trained backbone.
The paper's learning rate, 1e-5 at a batch of 256, hardly moves a new head: see --head-lr-factor.
"""

import torch

from common import cli, distributed
from common.backbone import prepare_backbone
from common.features import confusion_matrix, segmentation_scores
from common.loader import Loader
from data import PROTOCOLS, load_data, resolve_dataset
from grpo_rm import Policy, SegmentationHead, train

PAPER_LR = 1e-5  # for a batch of 256


def parse_args(argv):
    parser = cli.ArgumentParser(__doc__)
    cli.add_data_arguments(parser, list(PROTOCOLS["segmentation"]))
    cli.add_model_arguments(parser)
    cli.add_training_arguments(parser, lr=PAPER_LR, batch_size=256)
    add = parser.add_argument_group("segmentation").add_argument
    add("--map-size", type=cli.whole(1), default=128, help="side of the map of classified pixels; the paper's is 128")
    add("--background-penalty", type=cli.number(0), default=0.5,
        help="share of c taken from the reward of class 0 on every pixel; the paper's is 0.5, 0: off")  # fmt: skip
    return parser.parse_args(argv)


@torch.no_grad()
def head_scores(policy, loader, world):
    """Pixel accuracy and mIoU of the policy itself on the validation maps, in percent. Each image counts once."""
    num_classes = len(loader.split.classes)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=world.device)
    for _, images, masks in loader.in_order(16):
        confusion += confusion_matrix(policy(images).argmax(1), masks, num_classes)
    distributed.all_reduce(confusion)
    scores = segmentation_scores(confusion)
    return {f"val_{name}": 100 * scores[name] for name in ("pixel_acc", "miou")}


@cli.stage
def main(argv=None):
    args = parse_args(argv)
    world = distributed.start_processes(args.device)
    protocol = resolve_dataset(args, "segmentation")
    cli.resolve_training_arguments(args, world, protocol, lr=PAPER_LR)
    train_split, val_split = load_data(args, world)
    args.classes, args.train_images = train_split.classes, len(train_split)
    backbone = prepare_backbone(args, world)
    head = SegmentationHead(backbone.embed_dim, len(args.classes), args.hidden_dim, args.map_size)
    policy = Policy(backbone, head, args.amp).to(world.device)  # line 1 of Algorithm 1

    loader = Loader(train_split, args, world, augment=args.augment == "default")
    val_loader = Loader(val_split, args, world)
    train(policy, loader, lambda: head_scores(policy, val_loader, world), args, world)


if __name__ == "__main__":
    main()
