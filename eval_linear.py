"""Evaluate frozen features with a linear layer: softmax regression on the class token (the SR column of the paper's
Table 3), or for segmentation a linear layer on every patch token (Tables 2 and 4).

    python eval_linear.py --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_linear.py --dataset cifar10                              the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_linear.py --dataset imagenet --weights FILE
    python eval_linear.py --dataset voc2012 --save-images 8              "Linear": the last layer's patch tokens
    python eval_linear.py --dataset voc2012 --features multiscale        "Multi Scale"

Nothing but the layer is trained, on the training split without augmentation (Adam, 50 epochs, 1e-3 * m/256 falling to
1e-5 * m/256), and it is scored once, on the validation split. For segmentation it is batch normalisation and a linear
layer, as DINOv2's authors evaluate; "Multi Scale" takes the last four layers' tokens and averages the class
probabilities over scales of the image and its mirror image. Scores are counted at the size of the ground truth: the
layer's logits are upsampled to every mask as its file has it.

Weights of a run are evaluated on its dataset, others on --dataset (default: shapes); --seed is the layer's. Writes
scores in percent to --output: eval_linear.json (eval_linear_multiscale.json) beside the weights of a run, or in
runs/<dataset>/frozen/seed<seed>; and beside it the layer: linear.pth (linear_multiscale.pth).

Where this departs from the paper: for segmentation the paper trains the layer at the rate of post-training,
1e-5 * m/256, which hardly moves it in 50 epochs; --lr 1e-5 (at a batch of 256) gives it.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import cli, distributed
from common.backbone import Encoder, prepare_backbone
from common.checkpoint import make_directory, write_atomically
from common.distributed import progress
from common.features import (
    CHUNK,
    PatchTokens,
    add_evaluation_arguments,
    class_tokens,
    confusion_matrix,
    percent,
    resolve_run,
    segmentation_scores,
    write_result,
)
from common.images import palette_image
from common.loader import LINEAR, Loader, random_generator
from data import PROTOCOLS, load_data, resolve_dataset
from grpo_rm import learning_rate

SCALES = [1.0, 1.32, 1.73]  # of "Multi Scale": the default of the segmentation notebook in DINOv2's repository


def layer_path(path):
    """Where the layer of the result `path` goes: eval_linear.json -> linear.pth, other.json -> other.pth."""
    return path.with_name(path.stem.removeprefix("eval_") + ".pth")


def write_layer(path, layer):
    """Write the state dict of `layer`, on the CPU, beside the result `path`."""
    state = {name: value.cpu() for name, value in layer.state_dict().items()}
    write_atomically(layer_path(path), lambda file: torch.save(state, file))


# Classification -------------------------------------------------------------------------------------------------------


def fit_softmax_regression(features, targets, num_classes, args):
    """One linear layer trained with cross-entropy by Adam on features (n, D) and targets (n,), on their device. Batches
    and first weights are a function of args.fit_seed; the rate falls from args.lr to args.lr_end on a cosine."""
    generator = random_generator(LINEAR, args.fit_seed)
    layer = nn.Linear(features.shape[1], num_classes)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    layer.to(features.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=args.lr, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(features) / args.batch_size)
    for epoch in range(args.epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for step, batch in enumerate(order.split(args.batch_size), epoch * steps_per_epoch):
            rate = learning_rate(step, args.epochs * steps_per_epoch, 0, args.lr, args.lr_end)
            optimizer.param_groups[0]["lr"] = rate
            loss = F.cross_entropy(layer(features[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer


def evaluate_classification(args, world, path):
    """Softmax regression on the class token: writes top-1, the accuracy of every class and the confusion matrix."""
    train_split, val_split = load_data(args, world)
    classes = train_split.classes
    encoder = Encoder(prepare_backbone(args, world), "x_norm_clstoken", args.amp)
    features, targets = class_tokens(encoder, Loader(train_split, args, world), args.batch_size)
    val_features, val_targets = class_tokens(encoder, Loader(val_split, args, world), args.batch_size)
    if world.rank != 0:
        return
    layer = fit_softmax_regression(features, targets, len(classes), args)
    with torch.no_grad():
        predictions = layer(val_features).argmax(1)
    top1 = percent((predictions == val_targets).double().mean().item())
    confusion = confusion_matrix(predictions, val_targets, len(classes)).tolist()
    shares = [row[k] / sum(row) if sum(row) else None for k, row in enumerate(confusion)]
    write_layer(path, layer)
    result = {"train_images": len(train_split), "val_images": len(val_split), "top1": top1}
    result["per_class_accuracy"] = {name: percent(share) for name, share in zip(classes, shares, strict=True)}
    result["confusion"] = confusion
    write_result(path, args, result, f"top-1 {top1:.2f} % of {len(val_split)} images (softmax regression)")


# Segmentation ---------------------------------------------------------------------------------------------------------


def fit_segmenter(source, num_classes, args):
    """Batch normalisation and one linear layer (DINOv2's linear segmentation head), (B, D, h, w) -> (B, C, h, w),
    trained with cross-entropy by Adam on the PatchTokens `source`, logits upsampled to the masks' maps. Batches and
    first weights are a function of args.fit_seed; the rate falls from args.lr to args.lr_end on a cosine. All ranks get
    rank 0's."""
    world, count = source.loader.world, len(source.loader.split)
    linear = nn.Conv2d(source.dim, num_classes, 1)
    nn.init.normal_(linear.weight, std=0.01, generator=random_generator(LINEAR, args.fit_seed))
    nn.init.zeros_(linear.bias)
    segmenter = nn.Sequential(nn.BatchNorm2d(source.dim), linear).to(world.device)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=args.lr, weight_decay=0.0)
    generator = random_generator(LINEAR, args.fit_seed)
    steps_per_epoch = math.ceil(count / args.batch_size)
    for epoch in progress(range(args.epochs), "linear layer", world):
        batches = torch.randperm(count, generator=generator).split(args.batch_size)
        for step, (features, masks) in enumerate(source.batches(batches), epoch * steps_per_epoch):
            rate = learning_rate(step, args.epochs * steps_per_epoch, 0, args.lr, args.lr_end)
            optimizer.param_groups[0]["lr"] = rate
            maps = F.interpolate(segmenter(features), size=masks.shape[1:], mode="bilinear")  # (B, C, M, M)
            loss = F.cross_entropy(maps, masks, reduction="sum") / (masks >= 0).sum().clamp(min=1)  # not void: -100
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    if dist.is_initialized():
        for value in segmenter.state_dict().values():
            dist.broadcast(value, 0)
    return segmenter.eval()


def predict(logits, size):
    """The most probable class (H, W) of each pixel: the softmax of one image's logits, a list of (C, h, w), upsampled
    to `size` and averaged."""
    probabilities = 0
    for x in logits:
        probabilities = probabilities + F.interpolate(x[None], size=tuple(size), mode="bilinear")[0].softmax(0)
    return probabilities.argmax(0)


@torch.no_grad()
def confusion_of(source, segmenter, split, args, world, directory):
    """The confusion matrix (C, C) int64 of a split at the size of its masks as they are read, whose chunks are dealt to
    the ranks; saves args.save_images images at even distances in `directory`."""
    num_classes, patch = len(split.classes), source.backbone.patch_size
    to_save = torch.linspace(0, len(split) - 1, args.save_images).round().int().tolist()
    scales = SCALES if args.features == "multiscale" else [1.0]
    sides = [max(1, round(args.image_size * scale / patch)) * patch for scale in scales]
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=world.device)
    chunks = Loader(split, args, world, sides=sides).in_order(CHUNK)
    for indices, *scaled, _ in progress(chunks, "scores", world):
        logits = [segmenter(source.of(images).float()) for images in scaled]
        if args.features == "multiscale":  # the mirror images too, mirrored back
            logits += [segmenter(source.of(images.flip(-1)).float()).flip(-1) for images in scaled]
        for i, index in enumerate(indices.tolist()):
            pixels, truth = split.read(index)  # (H, W, 3), (H, W)
            prediction = predict([x[i] for x in logits], truth.shape)
            confusion += confusion_matrix(prediction, torch.from_numpy(truth).to(world.device), num_classes)
            if index in to_save:
                save_images(directory, index, pixels, truth, prediction.byte().cpu().numpy())
    distributed.all_reduce(confusion)
    return confusion


def save_images(directory, index, pixels, truth, prediction):
    """Write the image, and ground truth and prediction as palette PNGs of class indices."""
    directory.mkdir(exist_ok=True)
    Image.fromarray(pixels.numpy()).save(directory / f"{index:06d}_image.png")
    palette_image(truth).save(directory / f"{index:06d}_truth.png")
    palette_image(prediction).save(directory / f"{index:06d}_prediction.png")


def remove_images(directory):
    """Remove what save_images wrote, and nothing else."""
    for file in directory.glob("[0-9]*_prediction.png"):
        for kind in ("image", "truth", "prediction"):
            file.with_name(file.name.replace("prediction", kind)).unlink(missing_ok=True)


def evaluate_segmentation(args, world, path):
    """A linear layer on frozen patch tokens: writes pixel accuracy, IoU, mIoU and the IoU of every class."""
    train_split, val_split = load_data(args, world)
    classes = train_split.classes
    backbone = prepare_backbone(args, world)
    if not hasattr(backbone, "get_intermediate_layers"):
        raise cli.InputError(f"--backbone {args.backbone} has no get_intermediate_layers, which segmentation needs")
    images = path.with_name(f"{path.stem}_images")
    if world.rank == 0:
        remove_images(images)  # of an earlier evaluation
    layers = 4 if args.features == "multiscale" else 1
    source = PatchTokens(backbone, Loader(train_split, args, world), layers, args.amp)
    segmenter = fit_segmenter(source, len(classes), args)
    confusion = confusion_of(source, segmenter, val_split, args, world, images)
    if world.rank != 0:
        return
    scores = segmentation_scores(confusion)
    result = {"train_images": len(train_split), "val_images": len(val_split), "val_pixels": int(confusion.sum())}
    for name in ("pixel_acc", "iou", "miou"):
        result[name] = percent(scores[name])
    result["per_class_iou"] = {name: percent(iou) for name, iou in zip(classes, scores["per_class_iou"], strict=True)}
    write_layer(path, segmenter)
    summary = f"pixel accuracy {result['pixel_acc']:.2f} %, IoU {result['iou']:.2f} %, mIoU {result['miou']:.2f} %"
    write_result(path, args, result, f"{summary}, {len(val_split)} images ({args.features})")
    for name, iou in result["per_class_iou"].items():
        print(f"  {name:24s} {'absent' if iou is None else f'{iou:6.2f} %'}")


# Command line ---------------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = cli.ArgumentParser(__doc__)
    add = add_evaluation_arguments(parser, list(PROTOCOLS["classification"] | PROTOCOLS["segmentation"]))
    add("--batch-size", type=cli.whole(1),
        help="the layer's m, for classification also the backbone's; default: 1024, for segmentation 256")  # fmt: skip
    add("--epochs", type=cli.whole(1), default=50, help="epochs of the linear layer; the paper's is 50")
    add("--lr", type=cli.number(0, above=True), help="first learning rate; default: 1e-3 * m/256")
    add("--lr-end", type=cli.number(0), help="last learning rate; default: a hundredth of --lr")
    add = parser.add_argument_group("segmentation").add_argument
    add("--features", choices=["linear", "multiscale"], default="linear",
        help="the last layer's patch tokens, or those of the last four layers with test-time augmentation")  # fmt: skip
    add("--map-size", type=cli.whole(1), help="side of the maps that the layer is trained on; default: 128")
    add("--save-images", type=cli.whole(0), default=0, metavar="N", help="save N validation images and predictions")
    return parser.parse_args(argv)


@cli.stage
def main(argv=None):
    args = parse_args(argv)
    world = distributed.start_processes(args.device)
    multiscale = args.features == "multiscale"
    path = resolve_run(args, "eval_linear_multiscale.json" if multiscale else "eval_linear.json")
    resolve_dataset(args, "classification", "segmentation")
    cli.resolve_model_arguments(args, world)
    segmentation = args.task == "segmentation"
    if not segmentation and (multiscale or args.map_size or args.save_images):
        raise cli.InputError("--features multiscale, --map-size and --save-images are for segmentation, not for "
                             f"{args.dataset}")  # fmt: skip
    args.map_size = args.map_size or 128
    if args.weights and layer_path(path).resolve() == Path(args.weights).resolve():
        raise cli.InputError(f"--output {path}: the layer would replace --weights {args.weights}; choose another name")
    make_directory(path.parent, "--output")
    args.batch_size = args.batch_size or (256 if segmentation else 1024)
    cli.resolve_learning_rate(args, lr=1e-3)
    if segmentation:
        evaluate_segmentation(args, world, path)
    else:
        evaluate_classification(args, world, path)


if __name__ == "__main__":
    main()
