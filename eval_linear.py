"""Judge frozen features with a linear layer: softmax regression on the class token (the SR column of the paper's Table 3).

    python eval_linear.py --dataset cifar10 --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_linear.py --dataset cifar10                                   the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_linear.py --dataset imagenet --weights FILE

The features are extracted once, without augmentation; then one linear layer is trained on those of the training split
as in the paper (Adam, 50 epochs, 1e-3 * m/256 falling to 1e-5 * m/256) and scored, once, on the validation split.
Writes top-1 in percent to --output: eval_linear.json beside the weights of a run, or in runs/<dataset>/frozen/seed<seed>.
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from checkpoint import result_path
from data import HEAD, ArgumentParser, add_data_arguments, number, random_generator, stage
from grpo_rm import (
    add_evaluation_arguments,
    add_model_arguments,
    frozen_features,
    init_world,
    learning_rate,
    resolve_learning_rate,
    write_result,
)


def fit_softmax_regression(
    features: torch.Tensor,
    targets: torch.Tensor,
    num_classes: int,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    lr_end: float,
    seed: int,
) -> nn.Linear:
    """One linear layer trained with cross-entropy by Adam on features (n, D) and targets (n,), on their device. Batches
    and first weights are a function of `seed`; the rate falls from lr to lr_end on a cosine."""
    generator = random_generator(HEAD, seed)
    layer = nn.Linear(features.shape[1], num_classes)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    layer.to(features.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=0.0)
    steps_per_epoch = -(-len(features) // batch_size)
    for epoch in trange(epochs, desc="softmax regression", disable=None, leave=False):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for step, batch in enumerate(order.split(batch_size), epoch * steps_per_epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps_per_epoch, 0, lr, lr_end)
            loss = F.cross_entropy(layer(features[batch]), targets[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return layer


def parse_args(argv: list[str] | None):
    parser = ArgumentParser(__doc__)
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    parser.add_argument("--epochs", type=number(1, kind=int), default=50, help="epochs of the linear layer; the paper's is 50")
    parser.add_argument("--lr", type=number(0, open_low=True), help="first learning rate; default: the paper's 1e-3 * m/256")
    parser.add_argument("--lr-end", type=number(0), help="last learning rate; default: the paper's 1e-5 * m/256")
    args = parser.parse_args(argv)
    resolve_learning_rate(args, lr=1e-3, lr_end=1e-5)
    return args


@stage
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    path = result_path(args, "eval_linear.json")
    world = init_world(args.device, args.timeout_minutes)
    train, val, classes = frozen_features(args, world)
    if world.rank != 0:
        return
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "lr_end": args.lr_end, "seed": args.fit_seed}
    layer = fit_softmax_regression(*train, len(classes), **recipe)
    with torch.no_grad():
        top1 = 100 * (layer(val[0]).argmax(1) == val[1]).double().mean().item()
    write_result(path, args, train, val, top1)


if __name__ == "__main__":
    main()
