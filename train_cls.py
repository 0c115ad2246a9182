"""Post-train a representation model for image classification, with GRPO-RM or with standard fine-tuning.

    python train_cls.py                                                 a try-out on any machine: drawn shapes, vit_tiny
    python train_cls.py --dataset cifar10                               one GPU, the paper's protocol
    torchrun --nproc_per_node=4 train_cls.py --dataset tiny_imagenet    four GPUs, the paper's main example
    torchrun --nproc_per_node=4 train_cls.py --dataset tiny_imagenet --method finetune        its baseline

Writes config.json, log.jsonl, checkpoint.pt, backbone.pth and head.pth to runs/<dataset>/<method>/seed<seed>; then
eval_linear.py and eval_knn.py evaluate backbone.pth. The paper's Table 3 has, for Tiny-ImageNet, 65.96 % (softmax
regression) and 66.36 % (k-NN) after GRPO-RM, 58.67 % and 58.59 % after fine-tuning.

Where this departs from the paper: --ratio-floor is 1 (the paper's: 0), because Eq. (1) as printed can blow up, and
--warmup-epochs 5 (the paper's: 0), because without one the first steps can destroy a pre-trained backbone.
"""

import torch

from common import cli, distributed
from common.backbone import prepare_backbone
from common.loader import Loader
from data import PROTOCOLS, load_data, resolve_dataset
from grpo_rm import ClassificationHead, Policy, train

PAPER_LR = 1e-3  # for a batch of 256


def parse_args(argv):
    parser = cli.ArgumentParser(__doc__)
    cli.add_data_arguments(parser, list(PROTOCOLS["classification"]))
    cli.add_model_arguments(parser)
    cli.add_training_arguments(parser, lr=PAPER_LR, batch_size=1024)
    add = parser.add_argument_group("classification").add_argument
    add("--label-noise", type=cli.number(0, 1), default=0.0, metavar="SHARE",
        help="replace this share of the training labels with other classes, to study wrong labels")  # fmt: skip
    parser.set_defaults(background_penalty=0.0)  # only train_seg.py has this flag
    return parser.parse_args(argv)


@torch.no_grad()
def head_accuracy(policy, loader, world):
    """Top-1 of the policy itself on the validation split, in percent. Each sample counts once."""
    correct = torch.zeros((), device=world.device)
    for _, images, targets in loader.in_order(256):
        correct += (policy(images).argmax(1) == targets).sum()
    distributed.all_reduce(correct)
    return {"val_accuracy": 100 * correct.item() / len(loader.split)}


@cli.stage
def main(argv=None):
    args = parse_args(argv)
    world = distributed.start_processes(args.device)
    protocol = resolve_dataset(args, "classification")
    cli.resolve_training_arguments(args, world, protocol, lr=PAPER_LR)
    train_split, val_split = load_data(args, world)
    args.classes, args.train_images = train_split.classes, len(train_split)
    backbone = prepare_backbone(args, world)
    head = ClassificationHead(backbone.embed_dim, len(args.classes), args.hidden_dim)
    policy = Policy(backbone, head, args.amp).to(world.device)  # line 1 of Algorithm 1

    loader = Loader(train_split, args, world, augment=args.augment == "default")
    val_loader = Loader(val_split, args, world)
    train(policy, loader, lambda: head_accuracy(policy, val_loader, world), args, world)


if __name__ == "__main__":
    main()
