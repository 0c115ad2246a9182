"""Evaluate frozen features with k nearest neighbours, k = 5 (the kNN column of the paper's Table 3).

    python eval_knn.py --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_knn.py --dataset cifar10                                    the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_knn.py --dataset imagenet --weights FILE

Neighbours are sought by cosine similarity among the training split's class tokens; weights of a run are evaluated on
its dataset. Writes top-1 in percent to --output: eval_knn.json beside them, or in runs/<dataset>/frozen/seed<seed>.
"""

import torch
import torch.nn.functional as F

from common import cli, distributed
from common.backbone import Encoder, prepare_backbone
from common.checkpoint import make_directory
from common.features import add_evaluation_arguments, class_tokens, percent, resolve_run, write_result
from common.loader import Loader
from data import PROTOCOLS, load_data, resolve_dataset


def knn_predict(train_features, train_labels, test_features, *, num_classes, k=5, chunk=128):
    """The classes (m,) int64 that the k nearest of train_features (n, D), labels (n,), give to test_features (m, D).

    Similarity is the cosine; every neighbour has one vote, and a tie goes to the class whose votes have the larger
    summed similarity. `chunk` test features are compared at a time: 0.7 GB of similarities for ImageNet. Raises
    ValueError where k is not between 1 and n.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k is {k}, but there are {len(train_features)} training features")
    train = F.normalize(train_features, dim=1)
    predictions = []
    for test in F.normalize(test_features, dim=1).split(chunk):  # (b, D)
        best, index = (test @ train.T).topk(k, dim=1)
        labels = train_labels[index]  # (b, k)
        votes = best.new_zeros(len(test), num_classes).scatter_add_(1, labels, torch.ones_like(best))
        similarity = torch.zeros_like(votes).scatter_add_(1, labels, best)
        winners = votes == votes.amax(1, keepdim=True)
        predictions.append(similarity.masked_fill(~winners, -torch.inf).argmax(1))
    return torch.cat(predictions)


def parse_args(argv):
    parser = cli.ArgumentParser(__doc__)
    add = add_evaluation_arguments(parser, list(PROTOCOLS["classification"]))
    add("--batch-size", type=cli.whole(1), default=1024, help="images in a forward pass")
    add("--k", type=cli.whole(1), default=5, help="neighbours; the paper's is 5")
    return parser.parse_args(argv)


@cli.stage
def main(argv=None):
    args = parse_args(argv)
    world = distributed.start_processes(args.device)
    path = resolve_run(args, "eval_knn.json")  # first: it may name the dataset
    resolve_dataset(args, "classification")
    cli.resolve_model_arguments(args, world)
    make_directory(path.parent, "--output")
    train_split, val_split = load_data(args, world)
    if args.k > len(train_split):
        raise cli.InputError(f"--k {args.k} is more than the {len(train_split)} training images; take at most as many")
    encoder = Encoder(prepare_backbone(args, world), "x_norm_clstoken", args.amp)
    features, labels = class_tokens(encoder, Loader(train_split, args, world), args.batch_size)
    val_features, val_labels = class_tokens(encoder, Loader(val_split, args, world), args.batch_size)
    if world.rank != 0:
        return
    predictions = knn_predict(features, labels, val_features, num_classes=len(train_split.classes), k=args.k)
    top1 = percent((predictions == val_labels).double().mean().item())
    result = {"train_images": len(train_split), "val_images": len(val_split), "top1": top1}
    write_result(path, args, result, f"top-1 {top1:.2f} % of {len(val_split)} images (k-NN)")


if __name__ == "__main__":
    main()
