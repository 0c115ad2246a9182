"""What the evaluations share: arguments, what they know of a run, frozen features, the file of scores."""

import json
from pathlib import Path

import torch

from common import cli
from common.backbone import prepare_backbone
from common.checkpoint import MAY_DIFFER_ON_RESUME, make_directory, write_json
from common.distributed import all_reduce, progress
from data import Loader, load_data
from grpo_rm import Encoder

CHUNK = 16  # images in a forward pass of segmentation, whatever the batch size and the number of processes
KEPT_BYTES = 4 * 2**30  # patch tokens of a training split up to this size are kept, larger ones computed in every epoch


def add_evaluation_arguments(parser, names):
    """Those of both evaluations; `names` of datasets that the script serves, the default first."""
    cli.add_data_arguments(parser, names)
    cli.add_model_arguments(parser)
    add = parser.add_argument_group("evaluation").add_argument
    add("--batch-size", type=cli.whole(1),
        help="the linear layer's batch m, without masks also the backbone's; default: 1024, masks: 256")  # fmt: skip
    add("--output", metavar="FILE.json", help="default: beside a run's weights, or in runs/<dataset>/frozen/seed<seed>")
    parser.set_defaults(seed=None)  # that of the run


def resolve_evaluation(args, world, protocol, name):
    """Fill in what was left out from the config.json beside the weights: method, seed, backbone and, for the same
    dataset, the image size. Returns where the result goes: args.output, else the file `name` beside the weights of a
    run on the same dataset, or in the directory of the frozen baseline. Raises InputError."""
    beside = Path(args.weights or "").parent / "config.json"
    config = json.loads(beside.read_text()) if args.weights and beside.is_file() else {}
    config = config if "method" in config else {}  # others' weights have a config.json too
    args.method = config.get("method", "frozen")
    args.fit_seed = args.seed if args.seed is not None else config.get("seed", 0)  # of the linear layer
    args.seed = config.get("seed", args.fit_seed)
    args.backbone, args.hub_repo = args.backbone or config.get("backbone"), args.hub_repo or config.get("hub_repo")
    same = config.get("dataset") == args.dataset and (args.dataset != "folder" or config["data_root"] == args.data_root)
    args.image_size = args.image_size or (config["image_size"] if same else None)
    cli.resolve_model_arguments(args, world, protocol)
    if config and not same and not args.output:
        raise cli.InputError(f"--weights {args.weights} come from a run on another dataset; give the result's --output")
    directory = Path(args.weights).parent if same else Path(f"runs/{args.dataset}/frozen/seed{args.seed}")
    path = Path(args.output or directory / name)
    make_directory(path.parent, "--output")
    return path


@torch.no_grad()
def class_tokens(args, world):
    """(features (n, D) float32, targets (n,)) of the training split and of the validation split, on every rank's
    device, and the names of the classes. A token is computed on one rank and the others add zero: no digit depends on
    the number of ranks."""
    splits = load_data(args, world)
    backbone, found = prepare_backbone(args, world), []
    encoder = Encoder(backbone, "x_norm_clstoken", args.amp)
    for split in splits:
        features = torch.zeros(len(split), backbone.embed_dim, device=world.device)
        targets = torch.zeros(len(split), dtype=torch.int64, device=world.device)
        batches = Loader(split, args, world).in_order(args.batch_size)
        for indices, images, labels in progress(batches, "features", world):
            features[indices], targets[indices] = encoder(images).float(), labels
        all_reduce(features, targets)
        found.append((features, targets))
    return *found, splits[0].classes


class PatchTokens:
    """The normalised patch tokens of the last `layers` layers side by side, with masks, of any lists of images."""

    def __init__(self, backbone, loader, layers, amp):
        self.backbone, self.loader, self.layers, self.amp, self.kept = backbone, loader, layers, amp, None
        count, world, side = len(loader.split), loader.world, loader.sides[0] // backbone.patch_size
        if count * side**2 * layers * backbone.embed_dim * 4 <= KEPT_BYTES:
            batches = torch.arange(count).split(CHUNK * world.size)
            parts = progress(self.compute(batches), "features", world, len(batches))
            self.kept = [torch.cat(part) for part in zip(*parts, strict=True)]

    @torch.no_grad()
    def of(self, images):
        """images (B, 3, H, W) -> (B, layers * D, h, w)."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            tokens = self.backbone.get_intermediate_layers(images, n=self.layers, reshape=True)  # of (B, D, h, w) each
        return torch.cat([layer.float() for layer in tokens], dim=1)

    def batches(self, batches):
        """(features (B, layers * D, h, w), masks (B, M, M) uint8) of every list of images."""
        if self.kept is None:
            return self.compute(batches)
        return (tuple(part[batch.to(part.device)] for part in self.kept) for batch in batches)

    def compute(self, batches):
        """Every chunk of a batch on one rank, the others add zero: all ranks have the same digits for any number."""
        world = self.loader.world
        mine = self.loader.fetch([chunk for batch in batches for chunk in batch.split(CHUNK)[world.rank :: world.size]])
        side, M = self.loader.sides[0] // self.backbone.patch_size, self.loader.args.map_size
        for batch in batches:
            features = torch.zeros(len(batch), self.layers * self.backbone.embed_dim, side, side, device=world.device)
            masks = torch.zeros(len(batch), M, M, dtype=torch.uint8, device=world.device)
            for places in torch.arange(len(batch)).split(CHUNK)[world.rank :: world.size]:
                images, masks[places] = next(mine)
                features[places] = self.of(images)
            all_reduce(features, masks)
            yield features, masks


def write_result(path, args, result):
    """Write an evaluation's scores and counts, which weights they are of, and all settings."""
    settings = {
        k: v
        for k, v in vars(args).items()
        if k not in MAY_DIFFER_ON_RESUME or k in ("weights", "hub_repo", "data_root")
    }
    write_json(path, settings | {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})
