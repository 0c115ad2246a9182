"""Evaluate frozen features with a linear layer: softmax regression on the class token (the SR column of the paper's
Table 3), or for segmentation a linear layer on every patch token (Tables 2 and 4).

    python eval_linear.py --dataset cifar10 --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_linear.py --dataset cifar10                                   the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_linear.py --dataset imagenet --weights FILE
    python eval_linear.py --dataset voc2012 --weights FILE --save-images 8    "Linear": the last layer's patch tokens
    python eval_linear.py --dataset voc2012 --weights FILE --features multiscale              "Multi Scale"

Nothing but the layer is trained, on the training split without augmentation (Adam, 50 epochs, 1e-3 * m/256 falling to
1e-5 * m/256), and it is scored once, on the validation split. For segmentation it is batch normalisation and a linear
layer, as DINOv2's authors evaluate; "Multi Scale" takes the last four layers' tokens and averages the class
probabilities over scales of the image and its mirror image. Scores are counted at the size of the ground truth: the
layer's logits are upsampled to every mask as its file has it. Writes scores in percent to --output: eval_linear.json
(eval_linear_multiscale.json) beside the weights of a run, or in runs/<dataset>/frozen/seed<seed>.

Where this departs from the paper: for segmentation it names the rate of post-training, 1e-5 * m/256, which hardly moves
a new layer in 50 epochs; --lr 1e-5 --lr-end 1e-7 (at a batch of 256) gives it.
"""

import shutil

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common import cli, distributed
from common.backbone import prepare_backbone
from common.distributed import progress
from common.features import CHUNK, PatchTokens, add_evaluation_arguments, class_tokens, resolve_evaluation, write_result
from data import LINEAR, PROTOCOLS, VOID, Loader, load_data, random_generator, resolve_dataset
from grpo_rm import learning_rate

SCALES = [1.0, 1.32, 1.73]  # of "Multi Scale": the default of the segmentation notebook in DINOv2's repository


def recipe(args):
    """How the linear layer is trained, in the evaluations of both tasks."""
    return {name: getattr(args, name) for name in ("epochs", "batch_size", "lr", "lr_end")} | {"seed": args.fit_seed}


# ----------------------------------------------------------------------------------------------------------------------
# Classification


def fit_softmax_regression(features, targets, num_classes, *, epochs, batch_size, lr, lr_end, seed):
    """One linear layer trained with cross-entropy by Adam on features (n, D) and targets (n,), on their device. Batches
    and first weights are a function of `seed`; the rate falls from lr to lr_end on a cosine."""
    generator = random_generator(LINEAR, seed)
    layer = nn.Linear(features.shape[1], num_classes)
    nn.init.normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    layer.to(features.device)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, weight_decay=0.0)
    steps_per_epoch = -(-len(features) // batch_size)
    for epoch in range(epochs):
        order = torch.randperm(len(features), generator=generator).to(features.device)
        for step, batch in enumerate(order.split(batch_size), epoch * steps_per_epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps_per_epoch, 0, lr, lr_end)
            loss = F.cross_entropy(layer(features[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer


@torch.no_grad()
def evaluate_classification(args, world, path):
    """Softmax regression on the class token: writes top-1."""
    train, val, classes = class_tokens(args, world)
    if world.rank != 0:
        return
    with torch.enable_grad():
        layer = fit_softmax_regression(*train, len(classes), **recipe(args))
    top1 = 100 * (layer(val[0]).argmax(1) == val[1]).double().mean().item()
    write_result(path, args, {"train_images": len(train[1]), "val_images": len(val[1]), "top1": top1})
    print(f"{args.dataset} {args.method} seed {args.seed}: top-1 {top1:.2f} % of {len(val[1])} images "
          f"(softmax regression) -> {path}")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Segmentation


def confusion_matrix(predictions, targets, num_classes):
    """(C, C) int64 counts, rows truth and columns prediction, of predictions and targets of one shape on one device.
    Targets outside 0..C-1 (void) take no part."""
    valid = (targets >= 0) & (targets < num_classes)
    pairs = targets[valid].long() * num_classes + predictions[valid]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_scores(confusion):
    """Scores between 0 and 1 from a confusion matrix (C, C), rows truth and columns prediction.

    "pixel_acc" is sum TP / all pixels; "iou" the micro-averaged sum TP / sum (TP + FP + FN) = acc / (2 - acc), which is
    what the paper's tables call IoU; "per_class_iou" TP / (TP + FP + FN), None for a class absent from both truth and
    prediction; "miou" the mean of those that are not None. Without any pixel all scores are 0.
    """
    confusion = torch.as_tensor(confusion, dtype=torch.float64).cpu()
    hits, total = confusion.diag(), confusion.sum()
    union = confusion.sum(0) + confusion.sum(1) - hits  # TP + FP + FN
    per_class = hits / union.clamp(min=1)
    return {
        "pixel_acc": (hits.sum() / total.clamp(min=1)).item(),
        "iou": (hits.sum() / (2 * total - hits.sum()).clamp(min=1)).item(),
        "miou": (per_class.sum() / (union > 0).sum().clamp(min=1)).item(),
        "per_class_iou": [iou if n else None for iou, n in zip(per_class.tolist(), union.tolist(), strict=True)],
    }


def fit_segmenter(source, num_classes, *, epochs, batch_size, lr, lr_end, seed):
    """Batch normalisation and one linear layer (DINOv2's linear segmentation head), (B, D, h, w) -> (B, C, h, w),
    trained with cross-entropy by Adam on the PatchTokens `source`, logits upsampled to the masks' maps. Batches and
    first weights are a function of `seed`; the rate falls from lr to lr_end on a cosine. All ranks get rank 0's."""
    world, generator, count = source.loader.world, random_generator(LINEAR, seed), len(source.loader.split)
    embed_dim = source.layers * source.backbone.embed_dim
    linear = nn.Conv2d(embed_dim, num_classes, 1)
    nn.init.normal_(linear.weight, std=0.01, generator=random_generator(LINEAR, seed))
    nn.init.zeros_(linear.bias)
    segmenter = nn.Sequential(nn.BatchNorm2d(embed_dim), linear).to(world.device)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=lr, weight_decay=0.0)
    steps_per_epoch = -(-count // batch_size)
    for epoch in progress(range(epochs), "linear layer", world):
        batches = torch.randperm(count, generator=generator).split(batch_size)
        for step, (features, masks) in enumerate(source.batches(batches), epoch * steps_per_epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps_per_epoch, 0, lr, lr_end)
            optimizer.zero_grad()
            upsampled_cross_entropy(segmenter(features), masks)
            optimizer.step()
    for value in segmenter.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(value, 0)
    return segmenter.eval()


def upsampled_cross_entropy(logits, masks):
    """The backward pass of the mean cross-entropy of logits (B, C, h, w), upsampled, over the pixels of masks (B, M, M)
    uint8 that are not void. A chunk at a time: the (C, M, M) maps of all images are never there at once."""
    count = (masks != VOID).sum().clamp(min=1)
    leaf = logits.detach().requires_grad_()
    for part, mask in zip(leaf.split(CHUNK), masks.split(CHUNK), strict=True):
        maps = F.interpolate(part, size=mask.shape[1:], mode="bilinear")
        (F.cross_entropy(maps, mask.long(), ignore_index=VOID, reduction="sum") / count).backward()
    logits.backward(leaf.grad)


def predict(logits, size):
    """The most probable class (H, W) of each pixel: the softmax of one image's logits, a list of (C, h, w), upsampled
    to `size` and averaged."""
    return sum(F.interpolate(x[None], size=tuple(size), mode="bilinear")[0].softmax(0) for x in logits).argmax(0)


@torch.no_grad()
def confusion_of(source, segmenter, split, args, world, directory):
    """The confusion matrix (C, C) int64 of a split at the size of its masks, whose chunks are dealt to the ranks; saves
    args.save_images images at even distances in `directory`."""
    to_save = set(torch.linspace(0, len(split) - 1, args.save_images).round().int().tolist())
    confusion = torch.zeros(len(split.classes), len(split.classes), dtype=torch.int64, device=world.device)
    patch, scales = source.backbone.patch_size, SCALES if args.features == "multiscale" else [1.0]
    sides = [max(1, round(args.image_size * scale / patch)) * patch for scale in scales]
    chunks = Loader(split, args, world, sides=sides, native=True).in_order(CHUNK)
    for indices, *scaled, masks in progress(chunks, "scores", world):
        logits = [segmenter(source.of(images)) for images in scaled]
        if args.features == "multiscale":  # the mirror images too, mirrored back
            logits += [segmenter(source.of(images.flip(-1))).flip(-1) for images in scaled]
        for i, index in enumerate(indices.tolist()):
            truth = masks[i].to(world.device)  # (H, W)
            prediction = predict([x[i] for x in logits], truth.shape)
            confusion += confusion_matrix(prediction, truth, len(split.classes))
            if index in to_save:
                save_images(directory, index, split, prediction.byte().cpu().numpy())
    distributed.all_reduce(confusion)
    return confusion


def palette():
    """PASCAL VOC's colours of the indices 0 to 255, (256, 3) uint8: the bits of an index, three at a time, are the
    highest bits of red, green and blue."""
    bits = np.arange(256)[:, None] >> np.arange(3)  # (256, 3)
    return sum(((bits >> 3 * bit & 1) << 7 - bit for bit in range(3)), np.zeros((256, 3), np.int64)).astype(np.uint8)


def save_images(directory, index, split, prediction):
    """Write the image, and ground truth and prediction as palette PNGs of class indices, as VOC's own masks are."""
    image, mask = split.read(index)
    directory.mkdir(exist_ok=True)
    image.save(directory / f"{index:06d}_image.png")
    for name, labels in (("truth", mask), ("prediction", prediction)):
        picture = Image.fromarray(labels)
        picture.putpalette(palette().tobytes())
        picture.save(directory / f"{index:06d}_{name}.png")


def evaluate_segmentation(args, world, path):
    """A linear layer on frozen patch tokens: writes pixel accuracy, IoU, mIoU and the IoU of every class."""
    (train_split, val_split), backbone = load_data(args, world), prepare_backbone(args, world)
    if not hasattr(backbone, "get_intermediate_layers"):
        raise cli.InputError(f"--backbone {args.backbone} has no get_intermediate_layers, which segmentation needs")
    layers, classes = 4 if args.features == "multiscale" else 1, train_split.classes
    images = path.with_name(f"{path.stem}_images")
    if world.rank == 0:
        shutil.rmtree(images, ignore_errors=True)  # of an earlier evaluation
    source = PatchTokens(backbone, Loader(train_split, args, world), layers, args.amp)
    segmenter = fit_segmenter(source, len(classes), **recipe(args))
    confusion = confusion_of(source, segmenter, val_split, args, world, images)
    if world.rank != 0:
        return
    scores = segmentation_scores(confusion)
    each = [None if x is None else round(100 * x, 4) for x in scores.pop("per_class_iou")]
    iou, percent = dict(zip(classes, each, strict=True)), {name: 100 * score for name, score in scores.items()}
    counts = {"train_images": len(train_split), "val_images": len(val_split), "val_pixels": int(confusion.sum())}
    write_result(path, args, counts | percent | {"per_class_iou": iou})
    print(
        f"{args.dataset} {args.method} seed {args.seed}: pixel accuracy {percent['pixel_acc']:.2f} %, IoU "
        f"{percent['iou']:.2f} %, mIoU {percent['miou']:.2f} %, {len(val_split)} images ({args.features}) -> {path}"
    )
    for name, x in iou.items():
        print(f"  {name:24s} {'absent' if x is None else f'{x:6.2f} %'}")


# ----------------------------------------------------------------------------------------------------------------------


def parse_args(argv):
    parser = cli.ArgumentParser(__doc__)
    add_evaluation_arguments(parser, list(PROTOCOLS["classification"] | PROTOCOLS["segmentation"]))
    parser.add_argument("--epochs", type=cli.whole(1), default=50, help="epochs of the linear layer; the paper's is 50")
    parser.add_argument("--lr", type=cli.number(0, above=True), help="first learning rate; default: 1e-3 * m/256")
    parser.add_argument("--lr-end", type=cli.number(0), help="last learning rate; default: 1e-5 * m/256")
    add = parser.add_argument_group("segmentation").add_argument
    add("--features", choices=["linear", "multiscale"], default="linear",
        help="the last layer's patch tokens, or those of the last four layers with test-time augmentation")  # fmt: skip
    add("--map-size", type=cli.whole(1), default=128, help="side of the maps that the layer is trained on")
    add("--save-images", type=cli.whole(0), default=0, metavar="N", help="save N validation images and predictions")
    return parser.parse_args(argv)


@cli.stage
def main(argv=None):
    args = parse_args(argv)
    world = distributed.start_processes(args.device)
    protocol = resolve_dataset(args, "classification", "segmentation")
    name = "eval_linear.json" if args.features == "linear" else "eval_linear_multiscale.json"
    path = resolve_evaluation(args, world, protocol, name)
    segmentation = args.task == "segmentation"
    if not segmentation and (args.features != "linear" or args.save_images):
        raise cli.InputError(f"--features multiscale and --save-images are for segmentation, not for {args.dataset}")
    args.batch_size = args.batch_size or (256 if segmentation else 1024)
    cli.resolve_learning_rate(args, lr=1e-3, lr_end=1e-5)
    (evaluate_segmentation if segmentation else evaluate_classification)(args, world, path)


if __name__ == "__main__":
    main()
