"""GRPO-RM: the method of "Fine-Tuning Representation Models via GRPO-Driven Reinforcement Learning" (arXiv 2511.15256).

Three parts, in the order of the paper: the objective (one function per equation), the policy (backbone and head), and
Algorithm 1 with its distributed and mixed-precision training. train_cls.py and train_seg.py are the stages that put them to work.

Letters: B images, N samples (images or pixels), G outputs in the group (= classes), D features, H W pixels.
The policy pi_theta gives p = softmax(logits); the old policy pi_theta_old gives q = softmax(old_logits).
"""

import argparse
import contextlib
import copy
import functools
import itertools
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer
from tqdm import tqdm

from checkpoint import Meter, Run, config_beside, load_strictly, neutral, write_json
from data import (
    IGNORE,
    ArgumentParser,
    EvalLoader,
    InputError,
    Protocol,
    SceneSplit,
    Split,
    data_root,
    first_line,
    limit,
    load_splits,
    number,
    resolve_task,
)

# ------------------------------------------------------------------------------------------------------------------
# Objective


def accuracy_reward(targets: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Eq. (3): c for the output that names the sample's class, 0 for the others. targets (N,) int64 -> (N, G) float32."""
    rewards = torch.zeros(len(targets), num_outputs, device=targets.device)
    return rewards.scatter_(1, targets[:, None], float(num_outputs))


def uniformity_reward(old_probs: torch.Tensor, targets: torch.Tensor, kind: str = "eq4") -> torch.Tensor:
    """The reward against confident wrong outputs, from the old policy's probabilities (N, G) and targets (N,) -> (N, G).

    "eq4"   Eq. (4): -q_i (the paper's choice)
    "eq5"   Eq. (5): (1 - q_k) / (c - 1) - q_i for i != k, and q_k for the target k
    "none"  0, the paper's ablation
    """
    if kind == "eq4":
        return -old_probs
    if kind == "eq5":
        target_prob = old_probs.gather(1, targets[:, None])  # (N, 1)
        wrong = (1 - target_prob) / (old_probs.shape[1] - 1) - old_probs  # (N, G)
        return wrong.scatter(1, targets[:, None], target_prob)
    if kind == "none":
        return torch.zeros_like(old_probs)
    raise ValueError(f"uniformity {kind!r}: choose eq4, eq5 or none")


def group_advantages(rewards: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Eq. (2): A_i = (r_i - mean(r)) / std(r) over the group. rewards (N, G) -> (N, G).

    Paper silent: the std is that of the population (divided by c), because the group is the whole set of outputs. A
    group whose rewards are all equal says nothing about its outputs and gets A = 0. With `weights` (N, G), each row
    summing to 1, mean and std are the weighted ones, and 1e-4 is added to the std.
    """
    if weights is not None:
        mean = (weights * rewards).sum(1, keepdim=True)  # (N, 1)
        std = (weights * (rewards - mean) ** 2).sum(1, keepdim=True).sqrt()
        return (rewards - mean) / (std + 1e-4)
    centred = rewards - rewards.mean(1, keepdim=True)
    std = centred.square().mean(1, keepdim=True).sqrt()
    rounding = 4 * torch.finfo(rewards.dtype).eps * rewards.abs().amax(1, keepdim=True)
    return torch.where(std > rounding, centred / std, 0)


def choose_groups(targets: torch.Tensor, order: torch.Tensor, group_size: int) -> torch.Tensor:
    """For each sample the target and `group_size` - 1 other outputs, the first in its random order: targets (N,) or maps
    (B, H, W), order (N, G) or (B, G), one for all pixels of an image -> indices (N, K) or (B, K, H, W). The paper's group is
    the whole set; this is for the question whether it must be."""
    order = order.to(targets.device).view(*order.shape, *[1] * (targets.dim() - 1)).expand(-1, -1, *targets.shape[1:])
    k = targets.clamp(min=0).unsqueeze(1)  # void pixels draw too, for nothing
    first, last = order[:, : group_size - 1], order[:, group_size - 1 : group_size]
    return torch.cat([first, torch.where((first == k).any(1, keepdim=True), last, k)], dim=1)


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """log softmax over the last dimension, finite for any finite logits (the difference of two could overflow)."""
    return F.log_softmax(logits, dim=-1).clamp(min=torch.finfo(logits.dtype).min / 8)


def grpo_rm_loss(
    logits: torch.Tensor,
    old_logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    clip_eps: float = 0.2,
    uniformity: str = "eq4",
    accuracy_weight: float = 1.0,
    uniformity_weight: float = 1.0,
    background_penalty: float = 0.0,
    weighting: str = "uniform",
    ratio_floor: float = 0.0,
    members: torch.Tensor | None = None,
    ignore_index: int = 255,
    fused: bool = True,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. (1) with beta = 0, negated: lines 6 to 8 of Algorithm 1.

        J = mean over samples of sum_i g_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i),    loss = -J

    Args:
        logits, old_logits: (N, G), or maps (B, G, H, W), of the policy and of the old policy. Computed in float32
            (float64 stays float64). No gradient reaches old_logits.
        targets: (N,) or (B, H, W) int64. Samples with `ignore_index` touch neither loss nor statistics. The default
            is the void label of masks: for classification into more than 255 classes pass another, such as -100.
        clip_eps: eps of Eq. (1); the paper's is 0.2.
        uniformity, accuracy_weight, uniformity_weight: Eq. (6), r = w_acc r_acc + w_uni r_uni; the paper's are eq4, 1, 1.
        background_penalty: fraction of c taken from the reward of class 0; the paper's is 0.5 for segmentation.
        weighting: "uniform" is Eq. (1) as written, g_i = 1/c. "policy" is its expectation over outputs sampled from
            the old policy: g_i = q_i, and A from the q-weighted mean and std.
        ratio_floor: F in rho_i = p_i / (q_i + F/c); 0 is the paper's. A class that the old policy gives less than
            F/c is clipped and no longer pushed down, and rho never exceeds c/F.
        members: (N, K) or (B, K, H, W) int64, the outputs that make up each sample's group (see choose_groups); default:
            all of them, as in the paper. Rewards and probabilities are those of the whole set; g, A and the statistics of
            rho are the group's.
        fused: False is the form to lay beside the paper; True, several times faster, writes its gradient down (FusedLoss).

    Returns:
        The scalar loss and detached scalars, means over the samples: "loss", "accuracy", "clip_fraction" (share of
        outputs whose clipped branch is active), "mean_ratio", "max_ratio" (the largest), "kl" (exact KL(q || p)) and
        "entropy" (of p), both in nats.

    Raises ValueError for shapes that do not belong together, fewer than two outputs, or an unknown option.
    """
    fit = logits.dim() in (2, 4) and logits.shape == old_logits.shape and targets.shape == logits.shape[:1] + logits.shape[2:]
    if not fit or logits.shape[1] < 2:
        shapes = [tuple(tensor.shape) for tensor in (logits, old_logits, targets)]
        raise ValueError(
            "logits, old_logits, targets must be (N, G), (N, G), (N,) or (B, G, H, W), (B, G, H, W), (B, H, W), "
            "with G >= 2; got {}, {}, {}".format(*shapes)
        )
    if weighting not in ("uniform", "policy"):
        raise ValueError(f"weighting {weighting!r}: choose uniform or policy")
    if uniformity not in ("eq4", "eq5", "none"):
        raise ValueError(f"uniformity {uniformity!r}: choose eq4, eq5 or none")
    channels_last = logits.dim() == 4 and logits.is_contiguous(memory_format=torch.channels_last)  # as SegmentationHead leaves them
    if channels_last or (logits.dim() == 4 and (not fused or torch.compiler.is_compiling())):  # (N, G), the first without a copy
        logits, old_logits = (maps.movedim(1, -1).flatten(0, 2) for maps in (logits, old_logits))
        targets = targets.flatten()
        members = members if members is None else members.movedim(1, -1).flatten(0, 2)
    if fused:
        options = (clip_eps, uniformity, accuracy_weight, uniformity_weight, background_penalty, weighting == "policy", ratio_floor)
        loss, values = FusedLoss.apply(logits, old_logits.detach(), targets, targets != ignore_index, members, *options)
        return loss, {"loss": loss.detach()} | dict(zip(STATISTICS, values.unbind(), strict=True))
    N, G = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    valid = targets != ignore_index  # (N,)
    sample_weight = valid.to(dtype) / valid.sum().clamp(min=1)  # (N,)
    targets = torch.where(valid, targets, 0)
    logits, old_logits = (torch.where(valid[:, None], x, 0).to(dtype) for x in (logits, old_logits.detach()))

    log_p, log_q = log_probs(logits), log_probs(old_logits)  # (N, G)
    q = log_q.exp()

    # A difference of logarithms, never a quotient of probabilities; the clamp only keeps exp finite.
    log_reference = torch.logaddexp(log_q, torch.full_like(log_q[:1], math.log(ratio_floor / G))) if ratio_floor else log_q
    ratio = (log_p - log_reference).clamp(max=80).exp()  # (N, G)

    rewards = accuracy_weight * accuracy_reward(targets, G) + uniformity_weight * uniformity_reward(q, targets, uniformity)
    rewards[:, 0] -= background_penalty * G
    group_probs = q
    if members is not None:  # from here on G stands for the K members
        rewards, ratio, group_probs = (x.gather(1, members) for x in (rewards, ratio, q))
        group_probs = group_probs / group_probs.sum(1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    advantages = group_advantages(rewards, group_probs if weighting == "policy" else None)  # (N, G)
    weights = group_probs if weighting == "policy" else 1 / ratio.shape[1]  # g
    weighted = weights * advantages  # first: rho A alone could overflow
    objective = torch.minimum(ratio * weighted, ratio.clamp(1 - clip_eps, 1 + clip_eps) * weighted).sum(1)  # (N,)
    loss = -(sample_weight * objective).sum()

    with torch.no_grad():
        p = log_p.exp()
        clipped = torch.where(advantages > 0, ratio > 1 + clip_eps, (advantages < 0) & (ratio < 1 - clip_eps))  # (N, G)
        per_sample = {  # (N,) each
            "accuracy": (logits.argmax(1) == targets).to(dtype),
            "clip_fraction": clipped.to(dtype).mean(1),
            "mean_ratio": ratio.mean(1),
            "kl": (q * (log_q - log_p)).sum(1),
            "entropy": -(p * log_p).sum(1),
        }
        stats = {name: (sample_weight * values).sum() for name, values in per_sample.items()}
        stats["max_ratio"] = torch.where(valid[:, None], ratio, 0).amax() if N else loss.detach()
    return loss, {"loss": loss.detach()} | stats


STATISTICS = ("accuracy", "clip_fraction", "mean_ratio", "kl", "entropy", "max_ratio")


class FusedLoss(torch.autograd.Function):
    """Eq. (1), its statistics and its gradient in one go; only the gradient is kept for the backward pass.

    The rewards, and so g_i A_i, do not depend on the logits. With s_i = sign(A_i),

        min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) = |A_i| min(s_i rho_i, s_i + eps)

    whose slope in rho_i is m_i A_i: m_i is 1 where s_i rho_i <= s_i + eps, and 0 where the clip is active. With
    drho_i/dlogits_j = rho_i ([i = j] - p_j) and w_i = m_i rho_i g_i A_i / N, over the N samples that are not void,

        dL/dlogits_j = -sum_i w_i ([i = j] - p_j) = p_j sum_i w_i - w_j

    A does not change when all rewards of a group do so alike. Hence both uniformity rewards are -q_i here, and Eq. (5)
    gives its target 2 q_k - (1 - q_k)/(c - 1) more. The ratio floor is log p - log(q + F/c).

    The group is dimension 1, of samples and maps alike. A CPU goes through the batch in pieces that stay in its cache, in
    place in four buffers; a GPU takes pieces only to bound the memory. Compiled, it is one kernel that reads both logits and
    writes the gradient, and a few that add up what it found in each sample.
    """

    @staticmethod
    def forward(ctx, logits, old_logits, targets, valid, members, *options):
        """logits, old_logits (N, G) or (B, G, H, W); targets, valid (N,) or (B, H, W); members (N, K), (B, K, H, W) or None
        -> loss, then STATISTICS in one tensor."""
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        new = functools.partial(torch.empty, dtype=dtype, device=logits.device)
        count = valid.sum().clamp(min=1)
        gradient = new(logits.shape)  # not in half precision: fp16's smallest number is above most of it
        compiling = torch.compiler.is_compiling()
        cached = logits.device.type == "cpu" and not compiling
        pieces = [(slice(None),)] if compiling else batch_pieces(logits.shape, 2**18 if cached else 2**26)
        buffers = [new(max(gradient[piece].numel() for piece in pieces)) for _ in range(4)] if pieces else []
        sums, peaks = [], []
        for piece in pieces:
            samples = (piece[0], *piece[2:])  # the same piece of a tensor without the group's dimension
            fill = not (cached and valid[samples].all())  # a GPU is not asked: the host would wait for it
            inputs = (logits[piece], old_logits[piece], targets[samples], valid[samples], None if members is None else members[piece])
            piece_sums, peak = fused_piece(*inputs, gradient[piece], buffers, fill, logits.numel(), count, *options)
            sums.append(piece_sums)
            peaks.append(peak)
        means = torch.cat(sums, 1).sum(1, dtype=torch.float64) / count if pieces else new(6).zero_()
        peak = torch.cat(peaks).amax(0, keepdim=True) if pieces else new(1).zero_()
        values = torch.cat([means[1:], peak]).to(dtype)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        ctx.mark_non_differentiable(values)
        return means[0].to(dtype, copy=True), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss).to(ctx.dtype), *[None] * 11


def batch_pieces(shape: torch.Size, numbers: int) -> list[tuple[slice, ...]]:
    """Indices that cut (N, G), or maps (B, G, H, W), into pieces of at most so many numbers, if one sample or row of
    pixels has no more: along the batch and, where one image has more, along H."""
    images, whole = max(1, numbers // max(1, math.prod(shape[1:]))), slice(None)
    batch = [slice(i, i + images) for i in range(0, shape[0], images)]
    if len(shape) == 2:
        return [(part, whole) for part in batch]
    rows = max(1, numbers // (shape[1] * shape[3])) if images == 1 else shape[2]
    return [(part, whole, slice(i, i + rows)) for part in batch for i in range(0, shape[2], rows)]


def fused_piece(
    logits, old_logits, targets, valid, members, gradient, buffers, fill, numel, count,
    clip_eps, uniformity, accuracy_weight, uniformity_weight, background_penalty, by_policy, ratio_floor,
):  # fmt: skip
    """FusedLoss on a piece of the batch, whose logits have `numel` numbers and `count` valid samples. Writes `gradient`.

    Returns two tensors whose columns are to be summed and to be compared: (6, n) of the loss, the correct samples, the shares of
    clipped outputs, the means of rho, KL(q || p) and entropy; and (n,) of the largest rho. n is the number of samples in compiled
    code (see `summed`), 1 for the sums otherwise. An underscore at the end of a name: it works in place, and its tensor's old
    name no longer holds."""
    G = logits.shape[1]
    log_p, log_q, p, q = (buffer[: logits.numel()].view(logits.shape) for buffer in buffers)
    shift_(old_logits, log_q)
    shift_(logits, log_p)
    outputs = torch.arange(G, dtype=p.dtype, device=p.device).view(-1, *[1] * (p.dim() - 2))
    predictions = G - torch.eq(log_p, 0, out=p).mul_(G - outputs).amax(1, keepdim=True)  # argmax is several times slower
    lowest = torch.finfo(p.dtype).min / 8 / numel  # for any finite logits, log-probabilities and their sums are finite
    softmax_(log_q, q, lowest)
    softmax_(log_p, p, lowest)
    valid = valid.unsqueeze(1)
    k = torch.where(valid, targets.unsqueeze(1), 0)
    if fill:  # a void sample has p = q = p/q = 0: it adds nothing to any sum
        for x, value in ((p, 0), (q, 0), (log_p, -2000), (log_q, -1000)):
            x.masked_fill_(~valid, value)
    hits, entropy = summed((predictions == k) & valid), -summed(p, log_p)

    if ratio_floor:
        kl = summed(q, log_q.sub_(log_p))
        log_p.sub_(torch.add(q, ratio_floor / G, out=log_q).log_())
    else:
        kl = -summed(q, log_p.sub_(log_q))
    ratio, rewards = log_p.clamp_(max=80).exp_(), log_q
    K = G
    if members is not None:  # the group is these outputs; the others have p/q = 0, A = 0 and the weight 0
        K, chosen = members.shape[1], torch.zeros_like(ratio).scatter_(1, members, 1)
        ratio.mul_(chosen)
    ratio_sum, peak = summed(ratio), ratio.amax(1).flatten()

    slope, constant = 0.0, accuracy_weight * G  # what the target's reward has more is affine in q_k
    if uniformity == "eq5":
        slope, constant = uniformity_weight * (2 + 1 / (G - 1)), constant - uniformity_weight / (G - 1)
    torch.mul(q, 0 if uniformity == "none" else -uniformity_weight, out=rewards)  # Eq. (6)
    if torch.compiler.is_compiling():  # a scatter would end the kernel. A target that is no class, which it refuses, gives NaN
        others = torch.where((k >= 0) & (k < G), 0.0, math.nan)
        rewards.add_(torch.where(outputs == k, q * slope + constant, others)).sub_(torch.where(outputs == 0, background_penalty * G, 0))
    else:
        rewards.scatter_add_(1, k, q.gather(1, k).mul_(slope).add_(constant))[:, 0] -= background_penalty * G
    if members is not None:
        rewards.mul_(chosen)
        q.mul_(chosen)
        q.div_(q.sum(1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny))
    mean = (q * rewards).sum(1, keepdim=True) if by_policy else rewards.sum(1, keepdim=True) / K
    centred = rewards.sub_(mean) if members is None else rewards.sub_(mean).mul_(chosen)
    if by_policy:
        std = (q * centred).mul_(centred).sum(1, keepdim=True).sqrt_()
        scale, signs = 1 / (std + 1e-4), torch.empty_like(q)
    else:
        std = torch.mul(centred, centred, out=q).sum(1, keepdim=True).div_(K).sqrt_()
        scale, signs = torch.where(std > 4 * torch.finfo(std.dtype).eps * mean.abs(), 1 / (K * std), 0), q

    advantages = centred.mul_(scale * valid / count)  # Eq. (2), by 1/N and by g = 1/c
    torch.sign(advantages, out=signs)
    weights = advantages.abs_()
    if by_policy:
        weights.mul_(q)
    signed_ratio = ratio.mul_(signs)
    surrogate = torch.minimum(signed_ratio, signs.add_(clip_eps), out=signs)
    loss = -summed(weights, surrogate)
    unclipped = surrogate.eq_(signed_ratio)  # m
    kept = summed(unclipped)
    clipped = unclipped.numel() / len(kept) - kept
    w = F.threshold_(signed_ratio.mul_(unclipped), -0.999 * math.exp(80), 0).mul_(weights)  # rho that was cut off is constant
    torch.sub(p.mul_(w.sum(1, keepdim=True)), w, out=gradient)
    return torch.stack([loss * count, hits, clipped / K, ratio_sum / K, kl, entropy]), peak


def shift_(logits, shifted) -> None:
    """Write the logits less the largest of their group to `shifted`, in its precision."""
    shifted.copy_(logits)
    shifted.sub_(shifted.amax(1, keepdim=True))


def softmax_(shifted, probs, lowest: float) -> None:
    """Write softmax(shifted) to `probs`, and its logarithm, at least `lowest`, in place: one exponential for both."""
    total = torch.exp(shifted, out=probs).sum(1, keepdim=True)
    probs.mul_(1 / total)
    shifted.sub_(total.log_()).clamp_(min=lowest)


def summed(a: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of the elements (of the products of two tensors' elements, without a tensor of products), of shape (1,). In compiled
    code (n,), a sum for each sample: sums over all of them end the kernel."""
    if torch.compiler.is_compiling():
        return (a if b is None else a * b).sum(1).flatten()
    return (a.sum() if b is None else torch.dot(a.view(-1), b.view(-1))).view(1)


def cross_entropy_loss(
    logits: torch.Tensor, targets: torch.Tensor, *, ignore_index: int = 255
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The baseline, standard fine-tuning: mean cross-entropy over the samples that are not ignored, in float32.
    Shapes, return value and the names of the statistics as in `grpo_rm_loss`."""
    valid = targets != ignore_index
    count = valid.sum().clamp(min=1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none").sum() / count  # its own sum of maps is not deterministic on GPUs
    correct = (logits.detach().argmax(1) == targets) & valid
    return loss, {"loss": loss.detach(), "accuracy": correct.sum() / count}


# ------------------------------------------------------------------------------------------------------------------
# Policy

HUB_REPO = "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"  # pinned: without a ref, each call asks the network
DINOV2 = [f"dinov2_vit{size}14{registers}" for size in "sblg" for registers in ("", "_reg")]


class VitTiny(nn.Module):
    """torchvision's VisionTransformer, small enough for a CPU (0.5 M parameters), with DINOv2's interface: patch size
    14, D = 96, 4 blocks, position embedding of a 70-pixel image, interpolated for other sizes."""

    patch_size, embed_dim = 14, 96

    def __init__(self):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        self.vit = VisionTransformer(70, self.patch_size, 4, 3, self.embed_dim, 4 * self.embed_dim, norm_layer=norm)
        self.vit.heads = nn.Identity()
        torch.backends.mha.set_fastpath_enabled(False)  # without gradients it would take other kernels: rho = 1 needs the same

    def _position_embedding(self, h: int, w: int) -> torch.Tensor:
        embedding = self.vit.encoder.pos_embedding  # (1, 1 + side * side, D)
        side = math.isqrt(embedding.shape[1] - 1)
        if (h, w) == (side, side):
            return embedding
        grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, D, side, side)
        grid = F.interpolate(grid, size=(h, w), mode="bicubic")  # (1, D, h, w)
        return torch.cat([embedding[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

    def get_intermediate_layers(self, images, n=1, reshape=False, return_class_token=False, norm=True) -> tuple:
        """The outputs of the last n blocks: patch tokens (B, h*w, D), or (B, D, h, w) with `reshape`, each with the
        class token (B, D) beside it when asked for. images: (B, 3, H, W), sides multiples of the patch size."""
        patches = self.vit.conv_proj(images)  # (B, D, h, w)
        h, w = patches.shape[-2:]
        class_token = self.vit.class_token.expand(len(images), -1, -1)
        tokens = torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1)  # (B, 1 + h*w, D)
        tokens = tokens + self._position_embedding(h, w)
        outputs = []
        for block in self.vit.encoder.layers:
            tokens = block(tokens)
            outputs.append(tokens)
        outputs = [self.vit.encoder.ln(tokens) if norm else tokens for tokens in outputs[-n:]]
        patch_tokens = [tokens[:, 1:] for tokens in outputs]
        if reshape:
            patch_tokens = [tokens.transpose(1, 2).unflatten(2, (h, w)) for tokens in patch_tokens]
        if return_class_token:
            return tuple(zip(patch_tokens, [tokens[:, 0] for tokens in outputs], strict=True))
        return tuple(patch_tokens)

    def forward_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """images (B, 3, H, W) -> normalised class token (B, D) and patch tokens (B, h*w, D)."""
        ((patch_tokens, class_token),) = self.get_intermediate_layers(images, return_class_token=True)
        return {"x_norm_clstoken": class_token, "x_norm_patchtokens": patch_tokens}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_features(images)["x_norm_clstoken"]


def load_backbone(name: str, *, hub_repo: str | None = None, weights: str | None = None) -> nn.Module:
    """The representation model f_pre of Algorithm 1.

    Args:
        name: a DINOv2 model, "vit_tiny" (built in), or with `hub_repo` any of its models whose `forward_features`
            gives DINOv2's keys, such as DINOv3's.
        hub_repo: "owner/repo[:ref]", or a local directory with the hub code. Default: DINOv2 at a pinned commit.
        weights: file with a state dict; all names and shapes must match. Without it a GitHub repository's own
            pre-trained weights are downloaded; a local directory holds code only and gives random weights.

    Returns a module with `forward_features`, `embed_dim` (D) and `patch_size`, all its parameters but the unused
    `mask_token` trainable. It is in evaluation mode and stays there: DINOv2 does the same in both, and a backbone with
    dropout or random scales would give the policy and the old policy different noise, so that rho = 1 never held.
    Raises InputError, in one line, for anything that cannot be loaded.
    """
    if name == "vit_tiny":
        backbone = VitTiny()
    elif name in DINOV2 or hub_repo:
        backbone = _load_from_hub(name, hub_repo or HUB_REPO, pretrained=weights is None)
    else:
        known = ", ".join(["vit_tiny", *DINOV2])
        raise InputError(f"--backbone {name}: unknown; choose one of {known}, or name its --hub-repo")
    if weights:
        load_strictly(backbone, weights)
    for parameter_name, parameter in backbone.named_parameters():
        # Never part of our forward pass: DDP would stop at a parameter that gets no gradient.
        parameter.requires_grad_(not parameter_name.endswith("mask_token"))
    return backbone.eval()


def _load_from_hub(name: str, hub_repo: str, *, pretrained: bool) -> nn.Module:
    os.environ.setdefault("XFORMERS_DISABLED", "1")  # torch's own attention: as fast, and xFormers crashes on the CPU
    os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # downloaded weights are unpickled as plain tensors too
    local = os.path.isdir(hub_repo)
    if not local and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+)?", hub_repo):
        raise InputError(f"--hub-repo {hub_repo}: neither a directory here nor of the form owner/repo[:ref]")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="xFormers")
            backbone = torch.hub.load(
                hub_repo,
                name,
                source="local" if local else "github",
                trust_repo=True,
                skip_validation=True,  # the check asks GitHub's API, and does not know a commit as a ref
                verbose=False,
                pretrained=pretrained and not local,
            )
    except Exception as error:  # code of others, which may raise anything
        raise InputError(
            f"--backbone {name} from {hub_repo} cannot be loaded ({first_line(error)}); without a network give "
            f"--hub-repo DIR (a copy of the repository) and --weights FILE"
        ) from error
    missing = [name for name in ("forward_features", "embed_dim", "patch_size") if not hasattr(backbone, name)]
    if missing:
        raise InputError(f"--backbone {name} from {hub_repo} has no {missing[0]}; it must have DINOv2's interface")
    return backbone


class ClassificationHead(nn.Module):
    """Linear(D, hidden) - ReLU - Linear(hidden, G) on the normalised class token; the paper's hidden width is 256.
    Always outside autocast: the ratio p/q needs more digits than bf16 has (float32; GPUs multiply in TF32)."""

    def __init__(self, embed_dim: int, num_outputs: int, hidden_dim: int = 256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_outputs))

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """DINOv2's dict of features -> logits (B, G) float32."""
        class_token = features["x_norm_clstoken"]  # (B, D)
        with torch.autocast(class_token.device.type, enabled=False):
            return self.layers(class_token.to(self.layers[0].weight.dtype))


class SegmentationHead(nn.Module):
    """Patch tokens upsampled from h x w to map_size x map_size, then Linear(D, hidden) - ReLU - Linear(hidden, G) per pixel.

    The first linear layer comes before the bilinear upsampling, which is the same function for 1/16 of the work: the
    weights of an interpolation sum to 1. Always outside autocast, as ClassificationHead. `chunk` images at a time go through what
    follows, and their (hidden, M, M) maps are computed again in the backward pass, so that an image keeps no more than its
    logits; 0: all at once, and all is kept."""

    def __init__(self, embed_dim: int, num_outputs: int, hidden_dim: int = 256, map_size: int = 128, chunk: int = 2):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_outputs))
        self.map_size, self.chunk = map_size, chunk

    @torch.compiler.disable  # unrolled, the pieces of a large batch would take minutes to compile
    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """DINOv2's dict of features of square images -> logits (B, G, M, M) float32."""
        tokens = features["x_norm_patchtokens"]  # (B, h*w, D)
        side = math.isqrt(tokens.shape[1])
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = self.layers[0](tokens.to(self.layers[0].weight.dtype))  # (B, h*w, hidden)
            hidden = hidden.transpose(1, 2).unflatten(2, (side, side))  # (B, hidden, h, w)
            parts = hidden.split(self.chunk or len(hidden))
            if self.chunk and hidden.requires_grad:
                return torch.cat([checkpoint(self._upsampled_logits, part, use_reentrant=False) for part in parts])
            return torch.cat([self._upsampled_logits(part) for part in parts])  # the same pieces: the same kernels, rho = 1

    def _upsampled_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = F.interpolate(hidden, size=[self.map_size] * 2, mode="bilinear")  # (b, hidden, M, M)
        last = self.layers[2]
        return F.conv2d(F.relu(hidden), last.weight[:, :, None, None], last.bias)  # (b, G, M, M)


class Policy(nn.Module):
    """pi_theta: a backbone and a head, trained together (Algorithm 1, line 1)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images (B, 3, H, W) -> logits (B, G), or maps of them (B, G, M, M), float32."""
        return self.head(self.backbone.forward_features(images))


def recompute_activations(backbone: nn.Module) -> None:
    """Let each of the backbone's blocks keep its input only, and run again in the backward pass: a third more work for a
    fraction of the memory."""
    lists = [module for module in backbone.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    blocks = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    for block in blocks:
        block.__class__ = _recomputed(type(block))


@functools.cache
def _recomputed(block: type[nn.Module]) -> type[nn.Module]:
    """A block whose forward pass runs again in the backward pass. A class, not a function in each block: then compiled code fits
    all blocks, and those of the old policy, which must be computed alike."""

    class Recomputed(block):
        def forward(self, *inputs):
            return checkpoint(super().forward, *inputs, use_reentrant=False)

    return Recomputed


def check_image_size(backbone: nn.Module, image_size: int) -> None:
    """InputError unless `image_size` is a multiple of the backbone's patch size."""
    if image_size % backbone.patch_size:
        lower = max(1, image_size // backbone.patch_size) * backbone.patch_size
        raise InputError(
            f"--image-size {image_size} is not a multiple of the patch size {backbone.patch_size}; "
            f"take {lower} or {lower + backbone.patch_size}"
        )


# ------------------------------------------------------------------------------------------------------------------
# Processes and precision


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; rank 0 of size 1, and no process group, without torchrun."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def init_world(device: str = "auto", timeout_minutes: float = 10) -> World:
    """Join torchrun's process group (nccl on GPUs, gloo on the CPU). device: "auto", "cpu" or "cuda". A process that waits
    for another longer than timeout_minutes gives up."""
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and device != "cpu"
    if device == "cuda" and not cuda:
        raise InputError("--device cuda: no CUDA device here; use --device cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise InputError(f"{torch.cuda.device_count()} GPUs for more processes; lower --nproc_per_node or add --device cpu")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        backend, later = ("nccl", 1) if cuda else ("gloo", 0)  # nccl's watchdog kills without a word: Run's own group is to be first
        timeout = timedelta(minutes=timeout_minutes + later)
        dist.init_process_group(backend, timeout=timeout, device_id=device if cuda else None)
    return World(rank, local_rank, size, device)


def make_deterministic(backbone: nn.Module) -> None:
    """Let torch use deterministic kernels only (RuntimeError where an operation has none). The backward pass of the bicubic
    interpolation of position embeddings has none on GPUs, so these are not trained."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    for name, parameter in backbone.named_parameters():
        if name.rpartition(".")[2] in ("pos_embed", "pos_embedding"):
            parameter.requires_grad_(False)


@contextlib.contextmanager
def one_rank_first(world: World) -> Iterator[None]:
    """Rank 0, then one rank of every other node, then all others: a download happens once, with or without a file
    system shared between the nodes. A rank that fails lets the others have their turn, so that each can say why."""
    turn = 0 if world.rank == 0 else 1 if world.local_rank == 0 else 2
    for _ in range(turn if world.size > 1 else 0):
        dist.barrier()
    try:
        yield
    finally:
        for _ in range(2 - turn if world.size > 1 else 0):
            dist.barrier()


def resolve_amp(amp: str, device: torch.device) -> str:
    """The default "auto" becomes bf16 on GPUs that have it and off elsewhere."""
    if amp != "auto":
        return amp
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "off"


def autocast(amp: str, device: torch.device) -> torch.autocast:
    """The context both policies' forward passes run in; amp: "bf16", "fp16" or "off"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# ------------------------------------------------------------------------------------------------------------------
# Training: Algorithm 1

COMPILE_STEPS = 5000  # compiling takes a minute or so; an estimate, not measured on a GPU yet


def learning_rate(step: int, total_steps: int, warmup_steps: int, lr: float, lr_end: float) -> float:
    """A cosine from `lr` down to `lr_end` at the last step (paper silent on the curve), after a linear warm-up."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@torch.no_grad()
def copy_policy(old_policy: nn.Module, policy: nn.Module) -> None:
    """pi_theta_old <- pi_theta, in place."""
    for old, new in zip(old_policy.state_dict().values(), policy.state_dict().values(), strict=True):
        old.copy_(new)


@functools.cache
def compiled_loss(samples: int) -> Callable:
    """grpo_rm_loss as torch.compile makes it of so many samples: a GPU then reads the logits of both policies and writes the
    gradient, once each, instead of some forty passes.

    To occupy the whole GPU, the compiler splits sums wherever there are few of them: those over millions of samples, as it
    should, but with less than about 8,000 samples also those over a sample's outputs, which would end the kernel each time."""
    return torch.compile(grpo_rm_loss, dynamic=False, options={"split_reductions": samples >= 8000})


def training_step(model, old_policy, optimizer, scaler, images, targets, args, world, fresh=False, order=None) -> dict[str, torch.Tensor]:
    """One batch: lines 5 to 9 of Algorithm 1, or a cross-entropy step where there is no old policy. `fresh` says that the
    old policy was refreshed just now: the policy's logits are its own, to the last bit, and it need not run.

    `model` is the policy, inside DDP when there are several processes; images (B, 3, H, W) and targets (B, ...) are
    this rank's part of the global batch, cut into args.grad_accum pieces. Every piece weighs as its share of the
    global batch's valid samples, so the gradient does not depend on how the batch was cut. `order` (B, G) is the
    random order that groups of args.group_size outputs are chosen from; None: all outputs are the group. Returns sums over
    this rank's samples (float64 scalars), their number as "samples", and the largest "max_ratio".
    """
    total = (targets != IGNORE).sum()
    sums = {"images": torch.full((), len(images), dtype=torch.float64, device=world.device)}
    if world.size > 1:
        dist.all_reduce(total)
    meter = Meter()
    orders = [None] * args.grad_accum if order is None else order.tensor_split(args.grad_accum)
    pieces = zip(images.tensor_split(args.grad_accum), targets.tensor_split(args.grad_accum), orders, strict=True)
    pieces = [piece for piece in pieces if len(piece[0])]
    for i, (x, y, y_order) in enumerate(pieces, 1):
        wait = world.size > 1 and i < len(pieces)  # the ranks' gradients are summed with the last piece
        with model.no_sync() if wait else contextlib.nullcontext():
            with autocast(args.amp, world.device):
                if old_policy is not None and not fresh:
                    old_logits = old_policy(x).detach()  # line 5: pi_old(y|x), (B, G) or (B, G, M, M)
                logits = model(x)  # pi(y|x), of the same shape
            if old_policy is None:
                loss, stats = cross_entropy_loss(logits, y, ignore_index=IGNORE)
            else:
                old_logits = logits.detach() if fresh else old_logits
                loss_function = compiled_loss(y.numel()) if args.compile is True else grpo_rm_loss
                loss, stats = loss_function(  # lines 6 to 8
                    logits,
                    old_logits,
                    y,
                    clip_eps=args.clip_eps,
                    uniformity=args.uniformity,
                    accuracy_weight=args.accuracy_weight,
                    uniformity_weight=args.uniformity_weight,
                    background_penalty=args.background_penalty,
                    weighting=args.group_weighting,
                    ratio_floor=args.ratio_floor,
                    members=None if y_order is None else choose_groups(y, y_order, args.group_size),
                    ignore_index=IGNORE,
                )
            samples = (y != IGNORE).sum()
            share = samples / total.clamp(min=1) * world.size  # times their number, for DDP averages over the ranks
            scaler.scale(loss * share).backward()
        meter.add({k: v.double() if k == "max_ratio" else samples * v.double() for k, v in stats.items()})
        meter.add({"samples": samples.double()})
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
    if not scaler.is_enabled():  # fused Adam then does nothing, on the device, from the first gradient on that is not finite
        bad = (~norm.isfinite()).float()
        optimizer.found_inf = torch.maximum(getattr(optimizer, "found_inf", bad), bad)
    scaler.step(optimizer)  # line 9
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return sums | meter.sums | {"grad_norm": norm.double() * meter.sums["samples"]}


def sum_gradients(optimizer: torch.optim.Optimizer, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own reduction. Before it, optimizer.bad_here notes whether this rank's part is finite: after it no rank can tell."""
    bad = ~bucket.buffer().isfinite().all()
    optimizer.bad_here = getattr(optimizer, "bad_here", bad) | bad
    return allreduce_hook(None, bucket)


def prepare(policy: Policy, args: argparse.Namespace, world: World):
    """What training needs beside the policy: the old policy (None for fine-tuning), the model whose gradients are those of all
    processes, the optimizer, and the scaler of fp16's losses."""
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if args.recompute_activations:
        recompute_activations(policy.backbone)
    old_policy = None
    if args.method == "grpo_rm":
        old_policy = copy.deepcopy(policy)  # allocated once, outside DDP; nothing is ever propagated back into it
        if not args.compile:  # with gradients other code is compiled, which rounds differently: both policies need the same
            old_policy.requires_grad_(False)
        if args.old_policy_dtype == "bf16":
            old_policy.backbone.bfloat16()
    torch._dynamo.config.optimize_ddp = False  # it cuts the graph of the policy, not the old policy's: both need the same code
    for network in (policy, old_policy) if args.compile else ():
        if network is not None:
            network.compile(dynamic=False)  # in place: no name in a state dict changes; a size always has the same code
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # DDP, of tokens of shape (1, 1, D): harmless
    backbone = [parameter for parameter in policy.backbone.parameters() if parameter.requires_grad]
    groups = [{"params": backbone, "factor": 1.0}, {"params": list(policy.head.parameters()), "factor": args.head_lr_factor}]
    optimizer = torch.optim.Adam(groups, lr=args.lr, weight_decay=0.0, fused=True)
    model = policy
    if world.size > 1:
        model = DistributedDataParallel(policy, device_ids=[world.device] if world.device.type == "cuda" else None)
        model.register_comm_hook(optimizer, sum_gradients)
    return old_policy, model, optimizer, torch.amp.GradScaler(world.device.type, enabled=args.amp == "fp16")


@torch.no_grad()
def forward_macs(policy: Policy, image_size: int) -> int:
    """Multiply-accumulates of the policy's forward pass of one image: its convolutions and matrix products, attention's too."""
    parameter = next(policy.parameters())
    image = torch.zeros(1, 3, image_size, image_size, dtype=parameter.dtype, device=parameter.device)
    eager, plain = torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH)  # what the counter can look into
    with eager, plain, FlopCounterMode(display=False) as counter:
        policy(image)
    return counter.get_total_flops() // 2


def train(policy: Policy, loader, validate: Callable[[], dict[str, float]], args: argparse.Namespace, world: World) -> None:
    """Algorithm 1, and with args.method "finetune" the baseline: the same network, batches and schedule without an old
    policy.

    `loader` is a TrainLoader: `loader.epoch(e, start)` yields this rank's (images, targets), len(loader) is the number of
    steps in an epoch, loader.samples.unreadable names the files that were passed over. `validate()` gives numbers for the
    epoch's log line. Leaves config.json, log.jsonl, checkpoint.pt, backbone.pth and head.pth in args.output_dir; with
    args.resume it goes on from the checkpoint there. Raises InputError, Diverged and Stopped.
    """
    num_outputs = policy.head.layers[-1].out_features
    if args.group_size and not 2 <= args.group_size <= num_outputs:
        raise InputError(f"--group-size {args.group_size} must be at least 2 and at most the number of classes, {num_outputs}")
    steps_per_epoch = len(loader)
    total_steps = args.epochs * steps_per_epoch
    last_step = min(total_steps, args.max_steps or total_steps)
    worthwhile = world.device.type == "cuda" and last_step >= COMPILE_STEPS and any(map(shutil.which, ("cc", "gcc", "clang")))
    args.compile = args.compile == "on" or (args.compile == "auto" and worthwhile)
    old_policy, model, optimizer, scaler = prepare(policy, args, world)
    refresh_every = args.old_policy_every or steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    with Run(args, world, loader, policy=policy, old_policy=old_policy, optimizer=optimizer, scaler=scaler) as run:
        step = run.start(forward_macs=forward_macs(policy, args.image_size))
        for line in announcement(args, world, steps_per_epoch, last_step):
            run.say(line, file=sys.stdout)
        for epoch in range(run.open_epoch(step), args.epochs):  # line 2
            if last_step <= step <= epoch * steps_per_epoch:  # --max-steps came before this epoch
                break
            batches = loader.epoch(epoch, start=step - epoch * steps_per_epoch)
            for images, targets in itertools.islice(batches, max(0, last_step - step)):  # line 4
                fresh = old_policy is not None and step % refresh_every == 0
                if fresh:
                    copy_policy(old_policy, policy)  # line 3: pi_old <- pi
                lr = learning_rate(step, total_steps, warmup_steps, args.lr, args.lr_end)
                for group in optimizer.param_groups:
                    group["lr"] = lr * group["factor"]
                order = None
                if args.group_size not in (None, num_outputs):
                    order = loader.random_orders(epoch, step % steps_per_epoch, num_outputs)
                sums = training_step(model, old_policy, optimizer, scaler, images, targets, args, world, fresh, order)  # lines 5 to 9
                step += 1
                run.record(step, lr, sums)
            if step % steps_per_epoch == 0:
                due = epoch + 1 == args.epochs or (epoch + 1) % args.eval_every == 0
                if due:  # validation may take longer than a node gives after its signal
                    run.save(step)
                with torch.compiler.set_stance("force_eager"):  # validation's few batches do not repay another compilation
                    run.end_epoch(step, validate if due else None)
            else:  # --max-steps ends within the epoch
                run.flush(step)
            run.save(step)
        run.export("head.pth", policy.head)
        run.export("backbone.pth", policy.backbone)  # last: where it is, the run is whole


def announcement(args: argparse.Namespace, world: World, steps_per_epoch: int, last_step: int) -> list[str]:
    """The first lines of a run: what it does, and where it departs from the paper."""
    lines = [
        f"{args.method} of {args.backbone} on {args.dataset}: {last_step} steps, {steps_per_epoch} an epoch, on {world.size} x {args.device}, "
        f"amp {args.amp}, lr {args.lr:g} to {args.lr_end:g} -> {args.output_dir}"
    ]
    if args.method == "grpo_rm" and args.ratio_floor:
        floor = f"{args.ratio_floor:g}"
        lines.append(f"ratio floor {floor}: rho = p / (q + {floor}/c); Eq. (1) to the letter is --ratio-floor 0")
    return lines


# ------------------------------------------------------------------------------------------------------------------
# What the stages measure


def confusion_matrix(predictions: torch.Tensor, targets: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(C, C) int64 counts, rows truth and columns prediction, of predictions and targets of one shape on one device.
    Targets outside 0..C-1 (void) take no part."""
    valid = (targets >= 0) & (targets < num_classes)
    pairs = targets[valid].long() * num_classes + predictions[valid]
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def segmentation_scores(confusion: torch.Tensor) -> dict[str, float | list[float | None]]:
    """Scores between 0 and 1 from a confusion matrix (C, C), rows truth and columns prediction.

    "pixel_acc" is sum TP / all pixels; "iou" the micro-averaged sum TP / sum (TP + FP + FN) = acc / (2 - acc), which is
    what the paper's tables call IoU; "per_class_iou" TP / (TP + FP + FN), None for a class absent from both truth and
    prediction; "miou" the mean of those that are not None. Without any pixel all scores are 0.
    """
    confusion = torch.as_tensor(confusion, dtype=torch.float64).cpu()
    hits, total = confusion.diag(), confusion.sum()
    union = confusion.sum(0) + confusion.sum(1) - hits  # TP + FP + FN
    present = union > 0
    per_class = hits / union.clamp(min=1)
    return {
        "pixel_acc": (hits.sum() / total.clamp(min=1)).item(),
        "iou": (hits.sum() / (2 * total - hits.sum()).clamp(min=1)).item(),
        "miou": (per_class.sum() / present.sum().clamp(min=1)).item(),
        "per_class_iou": [iou if there else None for iou, there in zip(per_class.tolist(), present.tolist(), strict=True)],
    }


@torch.no_grad()
def class_tokens(backbone: nn.Module, loader: EvalLoader, amp: str, world: World) -> tuple[torch.Tensor, torch.Tensor]:
    """The class tokens (n, D) float32 of all n samples of the loader's split, and their targets (n,), on every rank's
    device. A token is computed on one rank and the others add zero to it: no digit depends on the number of ranks."""
    features = torch.zeros(loader.num_samples, backbone.embed_dim, device=world.device)
    targets = torch.zeros(loader.num_samples, dtype=torch.int64, device=world.device)
    for indices, images, labels in tqdm(loader, "features", disable=None if world.rank == 0 else True, leave=False):
        with autocast(amp, world.device):
            tokens = backbone.forward_features(images)["x_norm_clstoken"]  # (B, D)
        features[indices], targets[indices] = tokens.float(), labels
    if world.size > 1:
        dist.all_reduce(features)
        dist.all_reduce(targets)
    return features, targets


def frozen_features(args: argparse.Namespace, protocol: Protocol, world: World) -> tuple[tuple, tuple, list[str]]:
    """What a classification's evaluation starts from: (features, targets) of the training split, the same of the validation
    split, and the names of the classes. Raises InputError."""
    train_split, val_split, backbone = load_data_and_backbone(args, world)
    options = (protocol, args.image_size, args.batch_size, world, args.workers, args.decoded_cache)
    loaders = [EvalLoader(split, *options) for split in (train_split, val_split)]
    train, val = (class_tokens(backbone, loader, args.amp, world) for loader in loaders)
    return train, val, train_split.classes


def write_result(path: Path, args: argparse.Namespace, result: dict) -> None:
    """Write an evaluation's result: the scores and counts in `result`, which weights, which data, and all settings."""
    settings = {k: v for k, v in vars(args).items() if k not in neutral(vars(args)) or k in ("weights", "hub_repo")}
    write_json(path, settings | {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()})


# ------------------------------------------------------------------------------------------------------------------
# Arguments that the stages share


def add_model_arguments(parser: ArgumentParser) -> None:
    """Backbone, device and precision: for every stage that runs a network."""
    group = parser.add_argument_group("model and machine")
    group.add_argument("--backbone", help="dinov2_vit{s,b,l,g}14[_reg], vit_tiny, or any model of --hub-repo; default: dinov2_vits14 (the paper's), vit_tiny for shapes")
    group.add_argument("--hub-repo", help="owner/repo[:ref], or a local directory with the hub code (then weights come from --weights, else they are random); default: DINOv2 at a pinned commit")
    group.add_argument("--weights", help="state dict of the backbone, which a run starts from or an evaluation judges; every name and shape must match")
    group.add_argument("--seed", type=number(0, 2**32 - 1, kind=int), default=0, help="seed of weights, batches and augmentation; the paper has 5 runs. An evaluation takes that of the run that it judges")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto is cuda where there is one")
    group.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="mixed precision; auto is bf16 on GPUs that have it, else off")
    group.add_argument("--workers", type=number(0, kind=int), default=min(8, os.cpu_count() or 1), help="decoding threads or processes of each rank")
    group.add_argument("--timeout-minutes", type=number(0, open_low=True), default=10.0, help="how long a process waits for the others before it gives up")


def add_training_arguments(parser: ArgumentParser, *, lr: float, lr_end: float, batch_size: int) -> None:
    """Objective, optimisation and files of a run: for a train stage whose paper's values are batch_size and, for a batch
    of 256, lr and lr_end."""
    group = parser.add_argument_group("training data")
    group.add_argument("--train-fraction", type=number(0, 1, open_low=True), default=1.0, help="random share of the training set, the same for both methods")
    group.add_argument("--augment", choices=["default", "none"], default="default", help="default: crop after zero padding and flip; ImageNet: random resized crop and flip; segmentation: flip")
    group.add_argument("--input", choices=["auto", "resident", "stream"], default="auto", help="resident: decoded once, kept as bytes on the device; stream: decoded by workers in every epoch; auto: resident up to 4 GiB. Random resized crops always stream")
    group.add_argument("--skip-unreadable", action="store_true", help="let the next sample stand in for a file that cannot be read, and list it in the log; stop at 1 %% of them")

    group = parser.add_argument_group("objective")
    group.add_argument("--method", choices=["grpo_rm", "finetune"], default="grpo_rm", help="finetune is cross-entropy on the same network, batches and schedule")
    group.add_argument("--clip-eps", type=number(0, 1, open_low=True), default=0.2, help="eps of Eq. (1); the paper's is 0.2")
    group.add_argument("--uniformity", choices=["eq4", "eq5", "none"], default="eq4", help="uniformity reward; the paper's is eq4")
    group.add_argument("--accuracy-weight", type=number(0), default=1.0, help="w_acc of Eq. (6); the paper's is 1")
    group.add_argument("--uniformity-weight", type=number(0), default=1.0, help="w_uni of Eq. (6); the paper's is 1")
    group.add_argument("--group-weighting", choices=["uniform", "policy"], default="uniform", help="weight of each output in Eq. (1): uniform (1/c, the paper's) or the old policy's probability")
    group.add_argument("--old-policy-dtype", choices=["float32", "bf16"], default="float32", help="bf16 halves the memory of the old policy's backbone, for a noise of the order of a percent in rho; needs --amp bf16")
    group.add_argument("--group-size", type=number(2, kind=int), metavar="K", help="let the group be the target and K - 1 other outputs at random; default: all, as in the paper")
    group.add_argument("--ratio-floor", type=number(0), default=0.1, help="F in rho = p / (q + F/c); 0 is Eq. (1) to the letter, which can blow up at high learning rates")
    group.add_argument("--old-policy-every", type=number(1, kind=int), metavar="STEPS", help="refresh the old policy every so many steps; default: an epoch (the paper's). Few steps lift the clip's protection: 1 destroys a pre-trained backbone")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=number(1, kind=int), default=100, help="the paper's is 100; below log(c)/log(1.2) epochs GRPO-RM has not converged")
    group.add_argument("--batch-size", type=number(1, kind=int), default=batch_size, help=f"global batch m, over all processes; the paper's is {batch_size}")
    group.add_argument("--grad-accum", type=number(1, kind=int), default=1, help="cut each process's batch into so many pieces, to save memory; the result is the same")
    group.add_argument("--recompute-activations", action="store_true", help="keep only the inputs of the backbone's blocks for the backward pass and run them again there, to save memory; the result is the same")
    group.add_argument("--lr", type=number(0, open_low=True), help=f"first learning rate; default: the paper's {lr:g} * m/256")
    group.add_argument("--lr-end", type=number(0), help=f"last learning rate; default: the paper's {lr_end:g} * m/256")
    group.add_argument("--head-lr-factor", type=number(0, open_low=True), default=1.0, help="multiplies the head's learning rate; the paper's is 1")
    group.add_argument("--warmup-epochs", type=number(0), default=0.0, help="linear warm-up; the paper has none")
    group.add_argument("--max-grad-norm", type=number(0, open_low=True), help="clip the gradient's norm; default: off, as in the paper")
    group.add_argument("--hidden-dim", type=number(1, kind=int), help="width of the head; default: the paper's 256, and 64 for VOC (and shapes_seg)")

    group = parser.add_argument_group("run")
    group.add_argument("--compile", nargs="?", const="on", choices=["auto", "on", "off"], default="auto", help=f"torch.compile of both policies; auto: on GPUs, for runs of {COMPILE_STEPS} steps and more")
    group.add_argument("--deterministic", action="store_true", help="the same bits in every run on the same GPUs; position embeddings are then not trained, for their interpolation has no deterministic gradient there")
    group.add_argument("--output-dir", help="default: runs/<dataset>/<method>/seed<seed>")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of --output-dir, or start where there is none")
    group.add_argument("--checkpoint-minutes", type=number(0), default=10.0, help="checkpoint that often within an epoch, besides at its end")
    group.add_argument("--eval-every", type=number(1, kind=int), default=5, metavar="EPOCHS", help="validate that often, and after the last epoch")
    group.add_argument("--log-every", type=number(1, kind=int), default=10, metavar="STEPS", help="steps per line of log.jsonl")
    group.add_argument("--max-steps", type=number(1, kind=int), help="stop after so many steps; the schedule stays that of --epochs")


def add_evaluation_arguments(parser: ArgumentParser) -> None:
    """For both evaluations of frozen features."""
    group = parser.add_argument_group("evaluation")
    group.add_argument("--batch-size", type=number(1, kind=int), help="images in a forward pass, for the linear layer also its batch m; default: the paper's 1024, 256 for segmentation")
    group.add_argument("--frozen", action="store_true", help="the weights are the baseline that post-training starts from, also where they come from a run")
    group.add_argument("--output", metavar="FILE.json", help="default: beside the weights of a run, else in runs/<dataset>/frozen/seed<seed>")
    parser.set_defaults(seed=None)  # that of the run that is judged


def resolve_training_arguments(args: argparse.Namespace, world: World, *, lr: float, lr_end: float) -> Protocol:
    """Fill in the defaults that depend on other arguments, lr and lr_end being the paper's for a batch of 256, and refuse
    combinations that cannot work (InputError). Returns the dataset's protocol."""
    pieces = world.size * args.grad_accum
    if args.batch_size % pieces:
        raise InputError(f"--batch-size {args.batch_size} cannot be divided by {world.size} processes x --grad-accum {args.grad_accum}; take a multiple of {pieces}")
    resolve_learning_rate(args, lr, lr_end)
    if args.warmup_epochs >= args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}; take fewer")
    if args.method == "grpo_rm" and args.accuracy_weight == 0 and (args.uniformity == "none" or args.uniformity_weight == 0):
        raise InputError("--accuracy-weight 0 with no uniformity reward leaves nothing to learn; give one of them a weight")
    protocol = resolve_model_arguments(args, world)
    if args.old_policy_dtype == "bf16" and args.amp != "bf16":
        raise InputError(f"--old-policy-dtype bf16 goes with --amp bf16, not with {args.amp}; change one of them")
    args.hidden_dim = args.hidden_dim or protocol.hidden_dim
    args.output_dir = args.output_dir or f"runs/{args.dataset}/{args.method}/seed{args.seed}"
    return protocol


def resolve_evaluation_arguments(args: argparse.Namespace, world: World) -> Protocol:
    """Fill in the arguments that were left out, from the config.json beside the weights where there is one: method, seed,
    backbone, and the image size if the dataset is the same. Returns the dataset's protocol. Raises InputError."""
    config = {} if args.frozen else config_beside(args.weights)
    args.method = config.get("method", "frozen")
    args.fit_seed = next(seed for seed in (args.seed, config.get("seed"), 0) if seed is not None)
    args.seed = config.get("seed", args.fit_seed)
    args.backbone, args.hub_repo = args.backbone or config.get("backbone"), args.hub_repo or config.get("hub_repo")
    if not args.image_size and config.get("dataset") == args.dataset:
        args.image_size = config["image_size"]
    protocol = resolve_model_arguments(args, world)
    args.batch_size = args.batch_size or (256 if args.task == "segmentation" else 1024)
    return protocol


def resolve_learning_rate(args: argparse.Namespace, lr: float, lr_end: float) -> None:
    """The paper's rule where nothing was given: lr * m/256 falling to lr_end * m/256, m the batch size."""
    args.lr = args.lr or lr * args.batch_size / 256
    args.lr_end = min(args.lr, lr_end * args.batch_size / 256) if args.lr_end is None else args.lr_end
    if args.lr_end > args.lr:
        raise InputError(f"--lr-end {args.lr_end:g} is above --lr {args.lr:g}; the rate falls from the one to the other")


def resolve_model_arguments(args: argparse.Namespace, world: World) -> Protocol:
    """Fill in the defaults that belong to the dataset and the device. Returns the dataset's protocol."""
    protocol = resolve_task(args)
    args.device = world.device.type
    args.backbone = args.backbone or ("vit_tiny" if args.dataset.startswith("shapes") else "dinov2_vits14")
    args.hub_repo = args.hub_repo or (HUB_REPO if args.backbone in DINOV2 else None)
    if os.path.isdir(args.hub_repo or ""):  # for stages that are started elsewhere
        args.hub_repo = os.path.abspath(args.hub_repo)
    if args.dataset == "folder":  # its directory is its name
        args.data_root = os.path.abspath(data_root(args.data_root))
    args.image_size = args.image_size or protocol.image_size
    args.amp = resolve_amp(args.amp, world.device)
    return protocol


def load_data_and_backbone(args: argparse.Namespace, world: World) -> tuple[Split | SceneSplit, Split | SceneSplit, nn.Module]:
    """The training and validation split, cut to the limits, and the backbone on this process's device, checked against the
    image size. The weights of a randomly initialised backbone are those of args.seed, in post-training as in evaluation."""
    with one_rank_first(world):
        train_split, val_split = load_splits(args.dataset, args.data_root, download=args.download)
    torch.manual_seed(args.seed)
    with one_rank_first(world):
        backbone = load_backbone(args.backbone, hub_repo=args.hub_repo, weights=args.weights)
    check_image_size(backbone, args.image_size)
    if world.rank == 0 and not args.weights and args.hub_repo and os.path.isdir(args.hub_repo):
        print(f"warning: {args.backbone} starts from random weights: {args.hub_repo} holds code only; give --weights FILE", file=sys.stderr)
    return limit(train_split, args.limit_train), limit(val_split, args.limit_val), backbone.to(world.device)
