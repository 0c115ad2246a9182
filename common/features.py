"""What the evaluations share: arguments, what the run beside the weights says, frozen features, scores, the result."""

import os
from pathlib import Path

import torch

from common import cli
from common.checkpoint import MAY_DIFFER_ON_RESUME, read_config, write_json
from common.distributed import all_reduce, progress
from common.loader import memory_share

CHUNK = 16  # images in a forward pass of segmentation, whatever the batch size and the number of processes


def add_evaluation_arguments(parser, names):
    """Those of both evaluations; `names` of datasets that the script serves. Returns the function that adds more."""
    cli.add_data_arguments(parser, names)
    cli.add_model_arguments(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--output", metavar="FILE.json", help="default: beside a run's weights, or in runs/<dataset>/frozen/seed<seed>")
    parser.set_defaults(dataset=None, seed=None)  # those of the run
    return add


def resolve_run(args, name):
    """What the run beside --weights says. Arguments that were left out are filled in from its config.json: dataset,
    backbone, hub repository and seed; on the same dataset also its root and the image size. Sets args.method, and
    args.fit_seed, the seed of the linear layer.

    Returns where the result goes: args.output, else the file `name` beside the weights of a run on the same dataset, or
    in the directory of the frozen baseline. Raises InputError for a damaged config.json, or a run on another dataset.
    """
    run = {}
    if args.weights and (Path(args.weights).parent / "config.json").is_file():
        run = read_config(Path(args.weights).parent)
    if "method" not in run:  # weights from elsewhere may have a config.json of another kind
        run = {}
    args.method = run.get("method", "frozen")
    run_seed = run.get("seed", args.seed or 0)
    args.fit_seed = run_seed if args.seed is None else args.seed
    args.seed = run_seed
    args.backbone = args.backbone or run.get("backbone")
    args.hub_repo = args.hub_repo or run.get("hub_repo")
    args.dataset = args.dataset or run.get("dataset", "shapes")
    same = args.dataset == run.get("dataset")
    if same and args.dataset not in ("shapes", "shapes_seg"):  # these are drawn and have no root
        args.data_root = args.data_root or run["data_root"]
    if same and args.dataset == "folder":  # its path is its name
        same = os.path.abspath(args.data_root) == run["data_root"]
    if same:
        args.image_size = args.image_size or run["image_size"]
    if args.output:
        return Path(args.output)
    if same:
        return Path(args.weights).parent / name
    if run:
        raise cli.InputError(f"--weights {args.weights} come from a run on another dataset; give the result's --output")
    return Path(f"runs/{args.dataset}/frozen/seed{args.seed}", name)


def write_result(path, args, result, summary):
    """Write an evaluation's scores and counts, which weights they are of, and all settings; print the summary."""
    left_out = MAY_DIFFER_ON_RESUME - {"weights", "hub_repo", "data_root"}
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    write_json(path, settings | result)
    print(f"{cli.dataset_name(args)} {args.method} seed {args.seed}: {summary} -> {path}")


def percent(share):
    """A share in percent with four decimals; None, for no share, stays."""
    return None if share is None else round(100 * share, 4)


@torch.no_grad()
def class_tokens(encoder, loader, batch_size):
    """(features (n, D) float32, targets (n,)) of the loader's split, on every rank's device. A token is computed on one
    rank and the others add zero: no digit depends on the number of ranks."""
    world, count = loader.world, len(loader.split)
    features = torch.zeros(count, encoder.backbone.embed_dim, device=world.device)
    targets = torch.zeros(count, dtype=torch.int64, device=world.device)
    for indices, images, labels in progress(loader.in_order(batch_size), "features", world):
        features[indices] = encoder(images).float()
        targets[indices] = labels
    all_reduce(features, targets)
    return features, targets


class PatchTokens:
    """The normalised patch tokens of the last `layers` layers side by side, with masks, of any lists of images; in the
    precision of `amp`.

    Chunks of images belong to the ranks in turn. Tokens of the first ones are computed once and kept, up to half of the
    GPUs' memory (4 GiB on a CPU, which is that of all ranks); the others are computed whenever they are asked for. One
    rank has or computes a token and the others add zero: on a CPU no digit depends on the number of ranks.
    """

    def __init__(self, backbone, loader, layers, amp):
        self.backbone, self.loader, self.layers, self.amp = backbone, loader, layers, amp
        self.dtype = torch.bfloat16 if amp == "bf16" else torch.float32
        self.dim = layers * backbone.embed_dim
        side, M, world = loader.args.image_size // backbone.patch_size, loader.args.map_size, loader.world
        self.shape, self.mask_shape = (self.dim, side, side), (M, M)
        room = memory_share(world, 1 / 2)
        if world.device.type == "cuda":
            room *= world.size
        chunk_bytes = CHUNK * (self.dim * side**2 * self.dtype.itemsize + 2 * M**2)
        chunks = torch.arange(len(loader.split)).split(CHUNK)[: int(room // chunk_bytes)]
        self.kept = sum(map(len, chunks))  # images 0 to kept - 1
        own = chunks[world.rank :: world.size]
        self.row = torch.full((len(loader.split),), -1)  # of each image in what this rank keeps; -1: not here
        self.features = torch.empty(len(own) * CHUNK, *self.shape, dtype=self.dtype, device=world.device)
        self.masks = torch.empty(len(own) * CHUNK, M, M, dtype=torch.int16, device=world.device)
        loaded = progress(loader.fetch(own), "features", world, len(own))
        for number, (indices, (images, masks)) in enumerate(zip(own, loaded, strict=True)):
            rows = number * CHUNK + torch.arange(len(indices))
            self.row[indices] = rows
            self.features[rows], self.masks[rows] = self.of(images), masks.short()

    @torch.no_grad()
    def of(self, images):
        """images (B, 3, H, W) -> (B, layers * D, h, w)."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            tokens = self.backbone.get_intermediate_layers(images, n=self.layers, reshape=True)  # of (B, D, h, w) each
        return torch.cat(tokens, dim=1).to(self.dtype)

    def batches(self, batches):
        """(features (B, layers * D, h, w) float32, masks (B, M, M) int64) of every list of images, on all ranks."""
        world, to_compute = self.loader.world, []  # by this rank: places in each batch, a chunk at a time
        for batch in batches:
            not_kept = torch.nonzero(batch >= self.kept)[:, 0]
            chunks = not_kept.split(CHUNK) if len(not_kept) else ()
            to_compute.append(chunks[world.rank :: world.size])
        missing = [batch[places] for batch, chunks in zip(batches, to_compute, strict=True) for places in chunks]
        loaded = self.loader.fetch(missing)
        for batch, chunks in zip(batches, to_compute, strict=True):
            features = torch.zeros(len(batch), *self.shape, dtype=self.dtype, device=world.device)
            masks = torch.zeros(len(batch), *self.mask_shape, dtype=torch.int64, device=world.device)
            rows = self.row[batch]
            here = rows >= 0
            features[here] = self.features[rows[here]]
            masks[here] = self.masks[rows[here]].long()
            for places in chunks:
                images, masks[places] = next(loaded)
                features[places] = self.of(images)
            all_reduce(features, masks)
            yield features.float(), masks


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
