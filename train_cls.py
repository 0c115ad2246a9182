"""Post-train a representation model for image classification, with GRPO-RM or with standard fine-tuning.

    python train_cls.py                                                        shapes, vit_tiny: a try-out on any machine
    python train_cls.py --dataset cifar10 --download                           one GPU, the paper's protocol
    torchrun --nproc_per_node=4 train_cls.py --dataset tiny_imagenet           four GPUs: the paper's main example
    torchrun --nproc_per_node=4 train_cls.py --dataset tiny_imagenet --method finetune        its baseline

Writes config.json, log.jsonl, checkpoint.pt, backbone.pth and head.pth to runs/<dataset>/<method>/seed<seed>; then
eval_linear.py and eval_knn.py judge backbone.pth. The paper's Table 3 has, for Tiny-ImageNet, 65.96 % (softmax
regression) and 66.36 % (k-NN) after GRPO-RM, 58.67 % and 58.59 % after fine-tuning.

Where this departs from the paper: --ratio-floor is 0.1 (the paper's is 0), because Eq. (1) to the letter can blow up.
"""

import torch
import torch.distributed as dist

from data import ArgumentParser, EvalLoader, TrainLoader, add_data_arguments, fraction, stage
from grpo_rm import (
    ClassificationHead,
    Policy,
    World,
    add_model_arguments,
    add_training_arguments,
    autocast,
    init_world,
    load_data_and_backbone,
    make_deterministic,
    resolve_training_arguments,
    train,
)

PAPER = {"lr": 1e-3, "lr_end": 1e-5}  # for a batch of 256


def parse_args(argv: list[str] | None):
    parser = ArgumentParser(__doc__)
    add_data_arguments(parser, "classification")
    add_model_arguments(parser)
    add_training_arguments(parser, **PAPER, batch_size=1024)
    parser.set_defaults(background_penalty=0.0)  # segmentation's
    return parser.parse_args(argv)


@torch.no_grad()
def head_accuracy(policy: Policy, loader: EvalLoader, amp: str, world: World) -> dict[str, float]:
    """Top-1 of the policy itself on the validation split, in percent. Each sample counts once."""
    correct = torch.zeros((), device=world.device)
    for _, images, targets in loader:
        with autocast(amp, world.device):
            logits = policy(images)  # (B, G)
        correct += (logits.argmax(1) == targets).sum()
    if world.size > 1:
        dist.all_reduce(correct)
    return {"val_accuracy": 100 * correct.item() / loader.num_samples}


@stage
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = init_world(args.device, args.timeout_minutes)
    protocol = resolve_training_arguments(args, world, **PAPER)
    train_split, val_split, backbone = load_data_and_backbone(args, world)
    if args.deterministic:
        make_deterministic(backbone)
    train_split = fraction(train_split, args.train_fraction, args.seed)
    head = ClassificationHead(backbone.embed_dim, len(train_split.classes), args.hidden_dim)
    policy = Policy(backbone, head).to(world.device)  # line 1 of Algorithm 1

    options = {"seed": args.seed, "augment": args.augment == "default", "skip_unreadable": args.skip_unreadable}
    options |= {"input_mode": args.input, "cache_dir": args.decoded_cache}
    loader = TrainLoader(train_split, protocol, args.image_size, args.batch_size, world, args.workers, **options)
    val_loader = EvalLoader(val_split, protocol, args.image_size, 256, world, args.workers, args.decoded_cache)  # no stand-ins: each counts once
    train(policy, loader, lambda: head_accuracy(policy, val_loader, args.amp, world), args, world)


if __name__ == "__main__":
    main()
