"""The representation model f_pre of Algorithm 1: DINOv2, another model of a hub repository, or the demo's vit_tiny."""

import os
import re
import sys
import warnings

import torch
from torch import nn

from common.checkpoint import load_tensors
from common.cli import InputError, first_line
from common.demo import VitTiny
from common.distributed import in_turn

HUB_REPO = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"  # pinned: else each call asks the network
DINOV2 = [f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]


def load_backbone(name, *, hub_repo=None, weights=None):
    """A module with DINOv2's interface: `forward_features`, `embed_dim` (D) and `patch_size`.

    name: a DINOv2 model, "vit_tiny", or any model of hub_repo that gives DINOv2's keys, such as DINOv3's.
    hub_repo: "owner/repo[:ref]" or a local directory with hub code; default: DINOv2 at a pinned commit.
    weights: file with a state dict; every name and shape must match. Without it a repository's own weights are
        downloaded; a local directory holds code only and gives random weights.

    It stays in evaluation mode, where DINOv2 does the same: dropout would give policy and old policy different noise.
    All parameters but the unused mask_token are trainable. Raises InputError for anything that cannot be loaded.
    """
    if name == "vit_tiny":
        if hub_repo:
            raise InputError(f"--hub-repo {hub_repo}: vit_tiny is built in; leave one of the two out")
        backbone = VitTiny()
    elif name in DINOV2 or hub_repo:
        backbone = load_from_hub(name, hub_repo or HUB_REPO, pretrained=weights is None)
    else:
        known = ", ".join(["vit_tiny", *DINOV2])
        raise InputError(f"--backbone {name}: unknown; choose one of {known}, or name its --hub-repo")
    if weights:
        load_strictly(backbone, weights)
    for parameter_name, parameter in backbone.named_parameters():
        parameter.requires_grad_(not parameter_name.endswith("mask_token"))  # DDP stops at one that gets no gradient
    return backbone.eval()


def load_from_hub(name, hub_repo, *, pretrained):
    os.environ.setdefault("XFORMERS_DISABLED", "1")  # torch's own attention: as fast, and xFormers crashes on the CPU
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # downloaded weights are unpickled as plain tensors too
    local = os.path.isdir(hub_repo)
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+)?", hub_repo):
        raise InputError(f"--hub-repo {hub_repo}: neither a directory here nor of the form owner/repo[:ref]")
    options = {"source": "local" if local else "github", "pretrained": pretrained and not local, "verbose": False}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="xFormers")
            # skip_validation: the check asks GitHub's API, and does not know a commit as a ref
            backbone = torch.hub.load(hub_repo, name, trust_repo=True, skip_validation=True, **options)
    except Exception as error:  # code of others, which may raise anything
        raise InputError(f"--backbone {name} from {hub_repo} cannot be loaded ({first_line(error)}); without a network "
                         "give --hub-repo DIR (a copy of the repository) and --weights FILE") from error  # fmt: skip
    for needed in ("forward_features", "embed_dim", "patch_size"):
        if not hasattr(backbone, needed):
            raise InputError(f"--backbone {name} from {hub_repo} has no {needed}; it must have DINOv2's interface")
    return backbone


def load_strictly(module, path):
    """Load the state dict in the file `path`. Names and shapes must match, numbers be finite; else InputError."""
    state = load_tensors(path, "give a state dict of torch.save")
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(f"weights file {path} does not hold a state dict (name -> tensor); give backbone.pth of a run")
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"weights file {path} does not fit ({reason}); check --backbone and --weights") from error
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise InputError(f"weights file {path}: {bad[0]} has numbers that are not finite; take another")


class Encoder(nn.Module):
    """images (B, 3, H, W) -> the backbone's tokens that the head classifies: what DDP wraps and --compile compiles."""

    def __init__(self, backbone, token, amp):
        super().__init__()
        self.backbone, self.token, self.amp = backbone, token, amp

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            return self.backbone.forward_features(images)[self.token]


def prepare_backbone(args, world):
    """load_backbone for a script, on this process's device. Random weights are those of args.seed, in post-training as
    in evaluation. Raises InputError, also where --image-size is no multiple of the patch size."""
    torch.manual_seed(args.seed)
    with in_turn(world, "backbone"):
        backbone = load_backbone(args.backbone, hub_repo=args.hub_repo, weights=args.weights)
    patch, size = backbone.patch_size, args.image_size
    if size % patch:
        lower = max(1, size // patch) * patch
        raise InputError(f"--image-size {size} is no multiple of patch size {patch}; take {lower} or {lower + patch}")
    if world.rank == 0 and not args.weights and os.path.isdir(args.hub_repo or ""):
        print(f"warning: random weights: {args.hub_repo} holds code only; give --weights FILE", file=sys.stderr)
    return backbone.to(world.device)
