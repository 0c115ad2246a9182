"""Judge frozen features with k nearest neighbours, k = 5 (the kNN column of the paper's Table 3).

    python eval_knn.py --dataset cifar10 --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_knn.py --dataset cifar10                                      the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_knn.py --dataset imagenet --weights FILE

Neighbours are sought by cosine similarity among the training split's class tokens, in blocks: 3 or 1.3 million of them
fit. Writes top-1 in percent to --output: eval_knn.json beside the weights of a run, or in runs/<dataset>/frozen/seed<seed>.
"""

import torch
import torch.nn.functional as F

from checkpoint import result_path
from data import ArgumentParser, add_data_arguments, number, stage
from grpo_rm import add_evaluation_arguments, add_model_arguments, frozen_features, init_world, resolve_evaluation_arguments, write_result

BLOCK = 2**26  # similarities held at once: 256 MiB


def knn_predict(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    *,
    num_classes: int,
    k: int = 5,
    chunk: int = 1024,
) -> torch.Tensor:
    """The classes (m,) int64 that the k nearest of train_features (n, D), labels (n,), give to test_features (m, D).

    Similarity is the cosine; every neighbour has one vote, and a tie goes to the class whose votes have the larger
    summed similarity. With fewer than k training features all of them vote. `chunk` test features are compared at a
    time, with as many training features as BLOCK allows; neither matters but for which of equally near ones is taken. Raises ValueError when there is
    no training feature.
    """
    if not len(train_features):
        raise ValueError("knn_predict needs at least one training feature")
    k = min(k, len(train_features))
    train = F.normalize(train_features, dim=1)
    predictions = []
    for test in test_features.split(chunk):  # (b, D)
        test = F.normalize(test, dim=1)
        best = test.new_empty(len(test), 0)  # similarities of the nearest so far (b, <= k), and their labels
        labels = train_labels.new_empty(len(test), 0)
        for block, block_labels in zip(train.split(max(k, BLOCK // chunk)), train_labels.split(max(k, BLOCK // chunk)), strict=True):
            near, index = (test @ block.T).topk(min(k, len(block)), dim=1)  # (b, k)
            best, labels = torch.cat([best, near], dim=1), torch.cat([labels, block_labels[index]], dim=1)
            best, index = best.topk(min(k, best.shape[1]), dim=1)
            labels = labels.gather(1, index)
        votes = best.new_zeros(len(test), num_classes).scatter_add_(1, labels, torch.ones_like(best))
        similarity = torch.zeros_like(votes).scatter_add_(1, labels, best)
        winners = votes == votes.amax(1, keepdim=True)
        predictions.append(similarity.masked_fill(~winners, -torch.inf).argmax(1))
    return torch.cat(predictions) if predictions else train_labels.new_empty(0)


def parse_args(argv: list[str] | None):
    parser = ArgumentParser(__doc__)
    add_data_arguments(parser, "classification")
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    parser.add_argument("--k", type=number(1, kind=int), default=5, help="neighbours; the paper's is 5")
    return parser.parse_args(argv)


@stage
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = init_world(args.device, args.timeout_minutes)
    protocol = resolve_evaluation_arguments(args, world)
    path = result_path(args, "eval_knn.json")
    train, val, classes = frozen_features(args, protocol, world)
    if world.rank != 0:
        return
    predictions = knn_predict(*train, val[0], num_classes=len(classes), k=args.k)
    top1 = 100 * (predictions == val[1]).double().mean().item()
    write_result(path, args, {"train_images": len(train[1]), "val_images": len(val[1]), "top1": top1})
    print(f"{args.dataset} {args.method} seed {args.seed}: top-1 {top1:.2f} % of {len(val[1])} images (k-NN) -> {path}")


if __name__ == "__main__":
    main()
