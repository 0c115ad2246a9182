"""Judge frozen features with a linear layer: softmax regression on the class token (the SR column of the paper's Table 3),
or for segmentation a linear layer on every patch token (Tables 2 and 4).

    python eval_linear.py --dataset cifar10 --weights runs/cifar10/grpo_rm/seed0/backbone.pth
    python eval_linear.py --dataset cifar10                                   the backbone as it came from the hub
    torchrun --nproc_per_node=4 eval_linear.py --dataset imagenet --weights FILE
    python eval_linear.py --dataset voc2012 --weights FILE --save-images 8    "Linear": the last layer's patch tokens
    python eval_linear.py --dataset voc2012 --weights FILE --features multiscale              "Multi Scale"

Nothing but the layer is trained, on the training split without augmentation (Adam, 50 epochs, 1e-3 * m/256 falling to
1e-5 * m/256), and it is scored once, on the validation split. For segmentation it is batch normalisation and a linear
layer, as DINOv2's authors evaluate; "Multi Scale" takes the last four layers' tokens and averages the class probabilities
over scales of the image and its mirror image. Scores are counted at the size of the ground truth: the layer's logits are
upsampled to every mask as its file has it. --resolution map counts on the paper's reduced map instead.
Writes scores in percent to --output: eval_linear.json (eval_linear_multiscale.json) beside the weights of a run, or in
runs/<dataset>/frozen/seed<seed>.

Where this departs from the paper: for segmentation it names the rate of post-training, 1e-5 * m/256, which hardly moves a
new layer in 50 epochs; --lr 1e-5 --lr-end 1e-7 (at a batch of 256) gives it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm, trange

from checkpoint import make_directory, result_path, write_atomically
from data import (
    HEAD,
    VOID,
    ArgumentParser,
    InputError,
    Protocol,
    SceneLoader,
    SceneSplit,
    add_data_arguments,
    draw_panels,
    number,
    palette_image,
    random_generator,
    stage,
)
from grpo_rm import (
    World,
    add_evaluation_arguments,
    add_model_arguments,
    autocast,
    confusion_matrix,
    frozen_features,
    init_world,
    learning_rate,
    load_data_and_backbone,
    resolve_evaluation_arguments,
    resolve_learning_rate,
    segmentation_scores,
    write_result,
)

SCALES = [1.0, 1.32, 1.73]  # the default of the segmentation notebook in DINOv2's repository
PIECE = 16  # images in a forward pass over scenes, whatever the batch size and the number of processes

# ------------------------------------------------------------------------------------------------------------------
# Classification


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


def judge_images(args: argparse.Namespace, world: World, protocol: Protocol, path: Path) -> None:
    """Softmax regression on the class token: write top-1."""
    train, val, classes = frozen_features(args, protocol, world)
    if world.rank != 0:
        return
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "lr_end": args.lr_end, "seed": args.fit_seed}
    layer = fit_softmax_regression(*train, len(classes), **recipe)
    with torch.no_grad():
        top1 = 100 * (layer(val[0]).argmax(1) == val[1]).double().mean().item()
    write_result(path, args, {"train_images": len(train[1]), "val_images": len(val[1]), "top1": top1})
    print(f"{args.dataset} {args.method} seed {args.seed}: top-1 {top1:.2f} % of {len(val[1])} images (softmax regression) -> {path}")


# ------------------------------------------------------------------------------------------------------------------
# Segmentation


class LinearSegmenter(nn.Module):
    """Batch normalisation, then one linear layer on every patch token (DINOv2's linear segmentation head)."""

    def __init__(self, embed_dim: int, num_classes: int, seed: int):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(embed_dim), nn.Conv2d(embed_dim, num_classes, 1)
        nn.init.normal_(self.linear.weight, std=0.01, generator=random_generator(HEAD, seed))
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """features (B, D, h, w) -> logits (B, C, h, w)."""
        return self.linear(self.norm(features))


@torch.no_grad()
def patch_tokens(backbone: nn.Module, images: torch.Tensor, layers: int, amp: str) -> torch.Tensor:
    """The normalised patch tokens of the last `layers` layers side by side: images (B, 3, H, W) -> (B, layers * D, h, w)."""
    with autocast(amp, images.device):
        tokens = backbone.get_intermediate_layers(images, n=layers, reshape=True)  # of (B, D, h, w) each
    return torch.cat([layer.float() for layer in tokens], dim=1)


class SceneFeatures:
    """Patch tokens and masks of the training scenes, in whatever batches are asked for; kept where `keep` is true, else
    computed each time. Every PIECE of a batch is computed on one rank, the others add zero to it: all ranks have the same
    digits, whatever their number."""

    def __init__(self, backbone: nn.Module, loader: SceneLoader, layers: int, map_size: int, amp: str, world: World, *, keep: bool):
        self.backbone, self.loader, self.layers, self.map_size, self.amp, self.world = backbone, loader, layers, map_size, amp, world
        self.kept = None
        if keep:
            kept = self._empty(loader.samples.count)
            batches = torch.arange(loader.samples.count).split(PIECE * world.size)
            bar = tqdm(self._compute(batches), "features", len(batches), disable=None if world.rank == 0 else True, leave=False)
            for batch, parts in zip(batches, bar, strict=True):
                for store, part in zip(kept, parts, strict=True):
                    store[batch[0] : batch[-1] + 1] = part
            self.kept = kept

    def batches(self, batches: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(features (B, D, h, w), masks (B, M, M) uint8) of every batch of indices."""
        if self.kept is None:
            yield from self._compute(batches)
        else:
            yield from (tuple(part[batch.to(part.device)] for part in self.kept) for batch in batches)

    def _empty(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        h, device = self.loader.sides[0] // self.backbone.patch_size, self.world.device
        features = torch.zeros(count, self.layers * self.backbone.embed_dim, h, h, device=device)
        return features, torch.zeros(count, self.map_size, self.map_size, dtype=torch.uint8, device=device)

    def _compute(self, batches: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rank, size = self.world.rank, self.world.size
        pieces = self.loader.fetch([piece for batch in batches for piece in batch.split(PIECE)[rank::size]])
        for batch in batches:
            features, masks = self._empty(len(batch))
            for places in torch.arange(len(batch)).split(PIECE)[rank::size]:
                images, piece_masks = next(pieces)
                features[places], masks[places] = patch_tokens(self.backbone, images, self.layers, self.amp), piece_masks.to(masks.device)
            if size > 1:
                dist.all_reduce(features)
                dist.all_reduce(masks)
            yield features, masks


def fit_segmenter(
    source: SceneFeatures, num_scenes: int, num_classes: int, *, epochs: int, batch_size: int, lr: float, lr_end: float, seed: int
) -> LinearSegmenter:
    """A LinearSegmenter trained with cross-entropy by Adam, its logits upsampled to the masks' maps. Batches and first
    weights are a function of `seed`; the rate falls from lr to lr_end on a cosine. Every rank does the same; rank 0's
    result is given to all."""
    world, generator = source.world, random_generator(HEAD, seed)
    segmenter = LinearSegmenter(source.layers * source.backbone.embed_dim, num_classes, seed).to(world.device)
    optimizer = torch.optim.Adam(segmenter.parameters(), lr=lr, weight_decay=0.0)
    steps_per_epoch = -(-num_scenes // batch_size)
    for epoch in trange(epochs, desc="linear layer", disable=None if world.rank == 0 else True, leave=False):
        batches = torch.randperm(num_scenes, generator=generator).split(batch_size)
        for step, (features, masks) in enumerate(source.batches(batches), epoch * steps_per_epoch):
            optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps_per_epoch, 0, lr, lr_end)
            optimizer.zero_grad(set_to_none=True)
            upsampled_cross_entropy(segmenter(features), masks)
            optimizer.step()
    if world.size > 1:
        for value in segmenter.state_dict().values():
            dist.broadcast(value, 0)
    return segmenter.eval()


def upsampled_cross_entropy(logits: torch.Tensor, masks: torch.Tensor) -> None:
    """The backward pass of the mean cross-entropy of logits (B, C, h, w), upsampled, over the pixels of masks (B, M, M)
    uint8 that are not void. PIECE images at a time: their (C, M, M) maps are never all there."""
    count = (masks != VOID).sum().clamp(min=1)
    leaf = logits.detach().requires_grad_()
    for part, mask in zip(leaf.split(PIECE), masks.split(PIECE), strict=True):
        maps = F.interpolate(part, size=mask.shape[1:], mode="bilinear")
        (F.cross_entropy(maps, mask.long(), ignore_index=VOID, reduction="sum") / count).backward()
    logits.backward(leaf.grad)


@torch.no_grad()
def class_logits(backbone: nn.Module, segmenter: LinearSegmenter, images: list[torch.Tensor], layers: int, amp: str) -> list[torch.Tensor]:
    """Logits (B, C, h, w) of the images (B, 3, S, S) at every scale and, where there are several scales, of their mirror
    images (mirrored back)."""
    logits = []
    for x in images:
        logits.append(segmenter(patch_tokens(backbone, x, layers, amp)))
        if len(images) > 1:
            logits.append(segmenter(patch_tokens(backbone, x.flip(-1), layers, amp)).flip(-1))
    return logits


def predict(logits: list[torch.Tensor], size: torch.Size) -> torch.Tensor:
    """The most probable class (H, W) of each pixel: logits (C, h, w) of one image, upsampled to `size`; of several, their
    softmax is averaged."""
    scores = 0  # (C, H, W)
    for x in logits:
        x = F.interpolate(x[None], size=tuple(size), mode="bilinear")[0]
        scores = x if len(logits) == 1 else x.softmax(0).add_(scores)
    return scores.argmax(0)


def score_scenes(
    backbone: nn.Module,
    segmenter: LinearSegmenter,
    split: SceneSplit,
    args: argparse.Namespace,
    layers: int,
    directory: Path,
    world: World,
) -> torch.Tensor:
    """The confusion matrix (C, C) int64 of a split, whose pieces are dealt to the ranks; saves args.save_images scenes at even
    distances in `directory`."""
    if world.rank == 0 and args.save_images:  # no picture of an earlier evaluation among those of this one
        for file in directory.glob("*.png"):
            file.unlink()
    if world.size > 1:
        dist.barrier()
    confusion = torch.zeros(len(split.classes), len(split.classes), dtype=torch.int64, device=world.device)
    mine = torch.arange(len(split)).split(PIECE)[world.rank :: world.size]
    map_size = args.map_size if args.resolution == "map" else None
    loader = SceneLoader(split, scaled_sides(args, backbone.patch_size), map_size, world, args.workers, stream=True)
    to_save = set(torch.linspace(0, len(split) - 1, args.save_images).round().int().tolist())
    pieces = zip(mine, loader.fetch(list(mine)), strict=True)
    for indices, (*images, masks) in tqdm(pieces, "scores", len(mine), disable=None if world.rank == 0 else True, leave=False):
        logits = class_logits(backbone, segmenter, images, layers, args.amp)
        for i, index in enumerate(indices.tolist()):
            truth = masks[i].to(world.device)  # (H, W)
            prediction = predict([x[i] for x in logits], truth.shape)
            confusion += confusion_matrix(prediction, truth, len(split.classes))
            if index in to_save:
                save_scene(directory, index, split, prediction.byte().cpu())
    if world.size > 1:
        dist.all_reduce(confusion)
    return confusion


def scaled_sides(args: argparse.Namespace, patch_size: int) -> list[int]:
    """The sides in pixels that a scene is judged at: args.image_size times each scale, as multiples of the patch size."""
    scales = args.scales or [1.0]
    return [max(1, round(args.image_size * scale / patch_size)) * patch_size for scale in scales]


def save_scene(directory: Path, index: int, split: SceneSplit, prediction: torch.Tensor) -> None:
    """Write a scene's image, and ground truth and prediction as palette PNGs of class indices, and a panel of the three."""
    image, mask = split.read(index)
    truth, found = palette_image(mask), palette_image(prediction.numpy()).resize(image.size, 0)
    make_directory(directory)
    panel = draw_panels([("image", image), ("ground truth", truth), ("prediction", found)], split.classes)
    for name, picture in (("image", image), ("truth", truth), ("prediction", found), ("panel", panel)):
        write_atomically(directory / f"{index:06d}_{name}.png", lambda file, picture=picture: picture.save(file, format="PNG"))


def judge_scenes(args: argparse.Namespace, world: World, path: Path) -> None:
    """A linear layer on frozen patch tokens: write pixel accuracy, IoU, mIoU and the IoU of every class."""
    train_split, val_split, backbone = load_data_and_backbone(args, world)
    if not hasattr(backbone, "get_intermediate_layers"):
        raise InputError(f"--backbone {args.backbone} has no get_intermediate_layers; segmentation needs DINOv2's interface")
    if args.image_size == backbone.patch_size:
        raise InputError(f"--image-size {args.image_size} is a single patch; segmentation needs more of them")
    layers, classes = 4 if args.features == "multiscale" else 1, train_split.classes
    if layers > (blocks := getattr(backbone, "n_blocks", layers)):
        raise InputError(f"--features multiscale takes the last {layers} blocks; --backbone {args.backbone} has {blocks}: take --features linear")
    tokens = (args.image_size // backbone.patch_size) ** 2
    gib = len(train_split) * tokens * layers * backbone.embed_dim * 4 / 2**30
    keep = gib <= args.cache_features
    loader = SceneLoader(train_split, [args.image_size], args.map_size, world, args.workers, stream=keep)  # one pass
    source = SceneFeatures(backbone, loader, layers, args.map_size, args.amp, world, keep=keep)
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "lr_end": args.lr_end, "seed": args.fit_seed}
    segmenter = fit_segmenter(source, len(train_split), len(classes), **recipe)
    confusion = score_scenes(backbone, segmenter, val_split, args, layers, path.with_name(f"{path.stem}_images"), world)
    if world.rank != 0:
        return
    scores = segmentation_scores(confusion)
    iou = {name: None if x is None else round(100 * x, 4) for name, x in zip(classes, scores.pop("per_class_iou"), strict=True)}
    percent = {name: 100 * score for name, score in scores.items()}
    counts = {"train_images": len(train_split), "val_images": len(val_split), "val_pixels": int(confusion.sum())}
    write_result(path, args, counts | percent | {"per_class_iou": iou})
    where = f"{args.map_size} x {args.map_size} maps" if args.resolution == "map" else "the ground truth's own resolution"
    print(
        f"{args.dataset} {args.method} seed {args.seed}: pixel accuracy {percent['pixel_acc']:.2f} %, IoU {percent['iou']:.2f} %, "
        f"mIoU {percent['miou']:.2f} % of {len(val_split)} images at {where} ({args.features}) -> {path}"
    )
    for name, x in iou.items():
        print(f"  {name:24s} {'absent' if x is None else f'{x:6.2f} %'}")


# ------------------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add_data_arguments(parser, "classification", "segmentation")
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    parser.add_argument("--epochs", type=number(1, kind=int), default=50, help="epochs of the linear layer; the paper's is 50")
    parser.add_argument("--lr", type=number(0, open_low=True), help="first learning rate; default: 1e-3 * m/256, the paper's for classification")
    parser.add_argument("--lr-end", type=number(0), help="last learning rate; default: 1e-5 * m/256")
    group = parser.add_argument_group("segmentation")
    group.add_argument("--features", choices=["linear", "multiscale"], default="linear", help="the last layer's patch tokens, or those of the last four layers with test-time augmentation")
    group.add_argument("--scales", type=number(0, 8, open_low=True), nargs="+", help="of the image in multiscale evaluation; default: 1.0 1.32 1.73, those of DINOv2's segmentation notebook (with more of them 2.28 and 3.0 follow)")
    group.add_argument("--resolution", choices=["native", "map"], default="native", help="count pixels at the size of each ground truth, or on the paper's reduced map")
    group.add_argument("--map-size", type=number(1, kind=int), default=128, help="side of the maps that the layer is trained on")
    group.add_argument("--cache-features", type=number(0), nargs="?", const=float("inf"), default=4.0, metavar="GIB", help="keep the training features on every process's device if they need no more than this; without a number: always; 0: never")
    group.add_argument("--save-images", type=number(0, kind=int), default=0, metavar="N", help="save N validation scenes with ground truth and prediction, beside the result")
    return parser.parse_args(argv)


@stage
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    world = init_world(args.device, args.timeout_minutes)
    protocol = resolve_evaluation_arguments(args, world)
    resolve_learning_rate(args, lr=1e-3, lr_end=1e-5)
    if args.task == "classification" and (args.features != "linear" or args.resolution != "native" or args.save_images):
        raise InputError(f"--features multiscale, --resolution map and --save-images are for segmentation; {args.dataset} is a classification set")
    if args.scales and args.features == "linear":
        raise InputError("--scales are for --features multiscale; add it or leave them out")
    if args.features == "multiscale":
        args.scales = args.scales or SCALES
    if args.task == "segmentation":
        judge_scenes(args, world, result_path(args, "eval_linear.json" if args.features == "linear" else "eval_linear_multiscale.json"))
    else:
        judge_images(args, world, protocol, result_path(args, "eval_linear.json"))


if __name__ == "__main__":
    main()
