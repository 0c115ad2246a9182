"""Evaluate frozen features with k nearest neighbours, k = 5 (the kNN column of the paper's Table 3).

    python eval_knn.py --dataset cifar10 --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_knn.py --dataset cifar10                                      the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_knn.py --dataset imagenet --weights FILE

Neighbours are sought by cosine similarity among the training split's class tokens. Writes top-1 in percent to --output:
eval_knn.json beside the weights of a run, or in runs/<dataset>/frozen/seed<seed>.
"""

import torch
import torch.nn.functional as F

from common import cli, distributed
from common.features import add_evaluation_arguments, class_tokens, resolve_evaluation, write_result
from data import PROTOCOLS, resolve_dataset

BLOCK = 2**26  # similarities held at once: 256 MiB


def knn_predict(train_features, train_labels, test_features, *, num_classes, k=5, chunk=1024):
    """The classes (m,) int64 that the k nearest of train_features (n, D), labels (n,), give to test_features (m, D).

    Similarity is the cosine; every neighbour has one vote, and a tie goes to the class whose votes have the larger
    summed similarity. `chunk` test features are compared at a time, with as many training features as BLOCK allows.
    Raises ValueError where k is not between 1 and n.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, but there are {len(train_features)} training features")
    train, size = F.normalize(train_features, dim=1), max(k, BLOCK // chunk)
    predictions = []
    for test in F.normalize(test_features, dim=1).split(chunk):  # (b, D)
        best, labels = test.new_empty(len(test), 0), train_labels.new_empty(len(test), 0)  # of the nearest (b, <= k)
        for block, block_labels in zip(train.split(size), train_labels.split(size), strict=True):
            near, index = (test @ block.T).topk(min(k, len(block)), dim=1)
            best, labels = torch.cat([best, near], dim=1), torch.cat([labels, block_labels[index]], dim=1)
            best, index = best.topk(min(k, best.shape[1]), dim=1)
            labels = labels.gather(1, index)
        votes = best.new_zeros(len(test), num_classes).scatter_add_(1, labels, torch.ones_like(best))
        similarity = torch.zeros_like(votes).scatter_add_(1, labels, best)
        winners = votes == votes.amax(1, keepdim=True)
        predictions.append(similarity.masked_fill(~winners, -torch.inf).argmax(1))
    return torch.cat(predictions)


def parse_args(argv):
    parser = cli.ArgumentParser(__doc__)
    add_evaluation_arguments(parser, list(PROTOCOLS["classification"]))
    parser.add_argument("--k", type=cli.whole(1), default=5, help="neighbours; the paper's is 5")
    return parser.parse_args(argv)


@cli.stage
def main(argv=None):
    args = parse_args(argv)
    world = distributed.start_processes(args.device)
    path = resolve_evaluation(args, world, resolve_dataset(args, "classification"), "eval_knn.json")
    args.batch_size = args.batch_size or 1024
    train, val, classes = class_tokens(args, world)
    if args.k > len(train[1]):
        raise cli.InputError(f"--k {args.k} is more than the {len(train[1])} training images; take at most as many")
    if world.rank != 0:
        return
    predictions = knn_predict(*train, val[0], num_classes=len(classes), k=args.k)
    top1 = 100 * (predictions == val[1]).double().mean().item()
    write_result(path, args, {"train_images": len(train[1]), "val_images": len(val[1]), "top1": top1})
    print(f"{args.dataset} {args.method} seed {args.seed}: top-1 {top1:.2f} % of {len(val[1])} images (k-NN) -> {path}")


if __name__ == "__main__":
    main()
