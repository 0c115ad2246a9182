"""GRPO-RM: Algorithm 1 of "Fine-Tuning Representation Models via GRPO-Driven Reinforcement Learning" (arXiv
2511.15256).

From top to bottom: the objective, a function per equation; the policy, a backbone and a head; one training step; the
loop. What is edited here trains: there is no second form of anything.

Shapes: B images, N samples (images, or pixels of maps), G outputs in the group (= classes c), D features, M side of a
map. p = softmax(logits) is the policy pi_theta, q = softmax(old_logits) the old policy pi_theta_old, rho = p/q their
ratio.
"""

import contextlib
import copy
import functools
import math
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common.backbone import load_backbone  # noqa: F401  (others import it from here)
from common.checkpoint import Run

IGNORE = -100  # the target of a sample that takes no part (void pixels); 255 would be a class of ImageNet
LOGITS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}  # what fits a CPU's cache; few launches on a GPU

# ----------------------------------------------------------------------------------------------------------------------
# Objective


def accuracy_reward(targets, num_outputs):
    """Eq. (3): c for the output that names the target, 0 for the others. targets (N,) int64 -> (N, G) float32."""
    return num_outputs * F.one_hot(targets, num_outputs).float()


def uniformity_reward(old_probs, targets, kind="eq4"):
    """Eq. (4), "eq4": -q_i. The ablations of Table 6: "eq5", Eq. (5): q_k for the target k, (1 - q_k)/(c - 1) - q_i for
    i != k; "none": 0. old_probs, q (N, G), targets (N,) -> (N, G). Raises ValueError for another kind."""
    if kind == "eq4":
        return -old_probs
    if kind == "eq5":
        q_k = old_probs.gather(1, targets[:, None])  # (N, 1)
        others = (1 - q_k) / (old_probs.shape[1] - 1) - old_probs
        return torch.where(F.one_hot(targets, old_probs.shape[1]).bool(), q_k, others)
    if kind == "none":
        return torch.zeros_like(old_probs)
    raise ValueError(f"uniformity {kind!r}: choose eq4, eq5 or none")


def group_advantages(rewards, probs=None):
    """Eq. (2): A_i = (r_i - mean(r)) / std(r) over the group. rewards (N, G) -> (N, G). Paper silent: the group is the
    whole set of outputs, so its std divides by c. With probs (N, G), they weight both, and 1e-4 is added to the std."""
    mean = group_mean(rewards, probs)
    centred = rewards - mean
    std = group_mean(centred.square(), probs).sqrt()
    rounding = 4 * torch.finfo(rewards.dtype).eps * mean.abs()  # equal rewards leave no more than that: A = 0
    return centred / (std.where(std > rounding, math.inf) if probs is None else std + 1e-4)


def group_mean(values, probs=None):
    """Over the outputs of each group, all weighing 1/c, or probs: (N, G) -> (N, 1)."""
    return values.mean(1, keepdim=True) if probs is None else (probs * values).sum(1, keepdim=True)


def grpo_rm_loss(
    logits, old_logits, targets, *, clip_eps=0.2, uniformity="eq4", accuracy_weight=1.0, uniformity_weight=1.0,
    background_penalty=0.0, weighting="uniform", ratio_floor=0.0, ignore_index=255,
):  # fmt: skip
    """Lines 6 to 8 of Algorithm 1: the loss -J of Eq. (1) with beta = 0, and what to log.

        J = mean over samples of sum_i 1/c min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)

    logits, old_logits: (N, G), or maps (B, G, H, W); computed in float32 (float64 stays). No gradient to old_logits.
    targets: (N,) or (B, H, W); those equal to ignore_index (void; from 256 classes on pass another) take no part.
    background_penalty: share of c taken from the reward of class 0 (the paper's for segmentation: 0.5).
    weighting: "uniform", 1/c as in Eq. (1), or "policy", q_i: its expectation over outputs sampled from the old policy.
    ratio_floor: F in rho_i = p_i / (q_i + F/c) <= c/F (the paper's: 0). A wrong class with q_i < (1 - eps)/eps F/c is
    clipped from the refresh on: no longer pushed down.
    Returns the scalar loss and, detached, loss, accuracy, clip_fraction (of outputs whose clipped branch is active),
    mean_ratio, max_ratio, kl (KL(q || p)) and entropy (of p), the last two in nats. Raises ValueError for an unknown
    option, and for shapes that do not fit.
    """
    fits = logits.shape == old_logits.shape and targets.shape == logits.shape[:1] + logits.shape[2:]
    if not fits or logits.dim() not in (2, 4) or logits.shape[1] < 2:
        shapes = [tuple(x.shape) for x in (logits, old_logits, targets)]
        raise ValueError(f"logits, old_logits, targets: {shapes}, not (N, G) twice, (N,), or (B, G, H, W), (B, H, W)")
    if weighting not in ("uniform", "policy"):
        raise ValueError(f"weighting {weighting!r}: choose uniform or policy")
    if logits.dim() == 4:  # every pixel is a sample
        logits, old_logits = (x.movedim(1, -1).flatten(0, 2) for x in (logits, old_logits))
        targets = targets.flatten()
    G, valid = logits.shape[1], targets != ignore_index
    k, count = targets.where(valid, 0), valid.sum().clamp(min=1)

    def mean(values):  # (N,) -> over the samples that take part; divided first: a sum of huge ratios could overflow
        return torch.where(valid, values / count, 0).sum()

    logits, old_logits = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, old_logits.detach()))
    log_p, log_q = logits.log_softmax(1), old_logits.log_softmax(1).clamp(min=-1e30)  # (N, G); 0 * -inf is nan
    p, q = log_p.exp(), log_q.exp()

    r_acc, r_uni = accuracy_reward(k, G).to(q.dtype), uniformity_reward(q, k, uniformity)
    penalty = background_penalty * G * (torch.arange(G, device=q.device) == 0).to(q.dtype)  # (G,): class 0's
    rewards = accuracy_weight * r_acc + uniformity_weight * r_uni - penalty  # Eq. (6)
    probs = q if weighting == "policy" else None
    advantages = group_advantages(rewards, probs)  # (N, G)
    # Without a floor a difference of logarithms, because q can be 0 in float32; exp(80) is finite.
    ratio = p / (q + ratio_floor / G) if ratio_floor else (log_p - log_q).clamp(max=80).exp()  # rho (N, G)
    weighted = advantages * (1 / G if probs is None else probs)  # before the product with rho, which could overflow
    unclipped, clipped = ratio * weighted, ratio.clamp(1 - clip_eps, 1 + clip_eps) * weighted
    loss = -mean(torch.minimum(unclipped, clipped).sum(1))  # Eq. (1)

    with torch.no_grad():
        log_p = log_p.clamp(min=-1e30)
        stats = {
            "loss": loss.detach(),
            "accuracy": mean((logits.argmax(1) == k).to(q.dtype)),
            "clip_fraction": mean((clipped < unclipped).to(q.dtype).mean(1)),
            "mean_ratio": mean(ratio.mean(1)),
            "max_ratio": torch.where(valid, ratio.amax(1), 0).amax(),
            "kl": mean((q * (log_q - log_p)).sum(1)),
            "entropy": mean(-(p * log_p).sum(1)),
        }
    return loss, stats


def cross_entropy_loss(logits, targets, *, ignore_index=255):
    """The baseline, standard fine-tuning: cross-entropy, mean over the samples that take part. Shapes as above."""
    valid = targets != ignore_index
    count = valid.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none").sum() / count
    accuracy = ((logits.argmax(1) == targets) & valid).sum() / count
    return loss, {"loss": loss.detach(), "accuracy": accuracy}


def make_loss(args):
    """(logits, old_logits, targets) -> loss, statistics: that of args.method; GRPO-RM's is compiled with --compile."""
    if args.method == "finetune":
        return lambda logits, old_logits, targets: cross_entropy_loss(logits, targets, ignore_index=IGNORE)
    names = ("clip_eps", "uniformity", "accuracy_weight", "uniformity_weight", "background_penalty", "ratio_floor")
    options = {name: getattr(args, name) for name in names}
    loss_function = torch.compile(grpo_rm_loss, dynamic=False) if args.compile else grpo_rm_loss
    return functools.partial(loss_function, weighting=args.group_weighting, ignore_index=IGNORE, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Policy


class ClassificationHead(nn.Sequential):
    """Linear - ReLU - Linear on the class token: (B, D) -> logits (B, G), in float32: p/q needs more than bf16."""

    token = "x_norm_clstoken"

    def __init__(self, embed_dim, num_outputs, hidden_dim=256):
        super().__init__(nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_outputs))
        self.logits_per_image = num_outputs

    def forward(self, tokens):
        return super().forward(tokens.to(self[0].weight.dtype))


class SegmentationHead(ClassificationHead):
    """The same for every pixel of the patch tokens, upsampled to M x M: (B, h*w, D) -> (B, G, M, M). The first layer
    comes before the bilinear upsampling, which is the same function for 1/16 of the work: the weights of an
    interpolation sum to 1."""

    token = "x_norm_patchtokens"

    def __init__(self, embed_dim, num_outputs, hidden_dim=256, map_size=128):
        super().__init__(embed_dim, num_outputs, hidden_dim)
        self.map_size, self.logits_per_image = map_size, num_outputs * map_size**2

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        x = self[0](tokens.to(self[0].weight.dtype)).transpose(1, 2).unflatten(2, (side, side))  # (B, hidden, h, w)
        x = F.interpolate(x, size=(self.map_size, self.map_size), mode="bilinear")  # (B, hidden, M, M)
        return F.conv2d(x.relu_(), self[2].weight[:, :, None, None], self[2].bias)  # (B, G, M, M)


class Encoder(nn.Module):
    """images (B, 3, H, W) -> the backbone's tokens that the head classifies: what DDP wraps and --compile compiles."""

    def __init__(self, backbone, token, amp):
        super().__init__()
        self.backbone, self.token, self.amp = backbone, token, amp

    def forward(self, images):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp == "bf16"):
            return self.backbone.forward_features(images)[self.token]


class Policy(nn.Module):
    """pi_theta: a backbone and a head, trained together (Algorithm 1, line 1). amp: "bf16" or "off"."""

    def __init__(self, backbone, head, amp="off"):
        super().__init__()
        self.encoder, self.head = Encoder(backbone, head.token, amp), head

    def forward(self, images):
        return self.head(self.encoder(images))  # (B, G) or (B, G, M, M)


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def make_optimizer(policy, args):
    """Adam without weight decay. A group's rate is the schedule's times its "factor"."""
    backbone = [parameter for parameter in policy.encoder.parameters() if parameter.requires_grad]
    groups = [{"params": backbone, "factor": 1.0}, {"params": policy.head.parameters(), "factor": args.head_lr_factor}]
    return torch.optim.Adam(groups, lr=args.lr, weight_decay=0.0, fused=True)


def learning_rate(step, total_steps, warmup_steps, lr, lr_end):
    """Linear warm-up, then a cosine from lr down to lr_end at the last step (paper silent on the curve)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * progress)) / 2


def backward(policy, old_policy, encoder, loss_function, images, targets, share, meter):
    """Lines 5 to 8 for images (B, 3, H, W) and targets (B, ...), whose samples weigh `share` each: adds to gradients
    and meter.

    Head and loss take a few images at a time, because the logits of a batch of maps would be by far the largest
    tensors; the gradient that they leave at the tokens then goes through the backbone at once.
    """
    old_tokens = old_policy.encoder(images).detach() if old_policy else None
    tokens = encoder(images)  # (B, D) or (B, h*w, D)
    size = max(1, LOGITS_AT_ONCE[images.device.type] // policy.head.logits_per_image)
    chunks = [x.requires_grad_() for x in tokens.detach().split(size)]
    old_chunks = old_tokens.split(size) if old_policy else chunks
    for x, old_x, y in zip(chunks, old_chunks, targets.split(size), strict=True):
        old_logits = old_policy.head(old_x).detach() if old_policy else None  # line 5: pi_old(y|x)
        logits = policy.head(x)  # pi(y|x): (B, G) or (B, G, M, M)
        loss, stats = loss_function(logits, old_logits, y)  # lines 6 to 8
        samples = (y != IGNORE).sum()
        (loss * samples * share).backward()
        meter.add(samples, stats)
    tokens.backward(torch.cat([x.grad for x in chunks]))


def training_step(policy, old_policy, encoder, loss_function, optimizer, images, targets, meter, args):
    """Lines 5 to 9. images (B, 3, H, W) and targets (B, ...) are this process's share of the global batch, whose
    samples all weigh the same. `encoder` is policy.encoder, with several processes inside DDP, which averages its
    gradients over them."""
    distributed = dist.is_initialized()
    total = (targets != IGNORE).sum()
    if distributed:
        dist.all_reduce(total)
    share = (dist.get_world_size() if distributed else 1) / total.clamp(min=1).double()
    micro_batches = list(zip(images.chunk(args.grad_accum), targets.chunk(args.grad_accum), strict=True))
    for i, (x, y) in enumerate(micro_batches, 1):
        with encoder.no_sync() if distributed and i < len(micro_batches) else contextlib.nullcontext():
            backward(policy, old_policy, encoder, loss_function, x, y, share, meter)
    if distributed:
        average_gradients(list(policy.head.parameters()))
    norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
    optimizer.step()  # line 9
    policy.zero_grad()
    meter.add(1, {"grad_norm": norm, "finite": norm.isfinite(), "images": len(images)})


def average_gradients(parameters):
    """As DDP does with the backbone's gradients; it cannot with the head's, which come from several backward passes."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, total in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.grad = total.view_as(parameter) / dist.get_world_size()


def train(policy, loader, validate, args, world):
    """Algorithm 1, or with args.method "finetune" the baseline: the same network, batches and schedule without an old
    policy.

    loader.epoch(e, start) yields this process's (images, targets) from step `start` of epoch e on, len(loader) is the
    number of steps in an epoch; validate() gives numbers for the epoch's log line. Leaves config.json, log.jsonl,
    checkpoint.pt, head.pth and backbone.pth in args.output_dir. Raises InputError and RunError.
    """
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what is not bf16
    old_policy = None
    if args.method == "grpo_rm":
        # With --compile it keeps requires_grad: code compiled without gradients rounds otherwise, and q would not be p
        # right after a refresh.
        old_policy = copy.deepcopy(policy).requires_grad_(args.compile)
    optimizer, loss_function = make_optimizer(policy, args), make_loss(args)
    saved = {"policy": policy, "optimizer": optimizer} | ({"old_policy": old_policy} if old_policy else {})
    run = Run(args, world, len(loader), **saved)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut the policy's code, not the old policy's
        for network in (policy, old_policy) if old_policy else (policy,):
            network.encoder.compile(dynamic=False)
    encoder = policy.encoder
    if dist.is_initialized():  # all processes start from the first one's weights: DDP sees to the backbone
        warnings.filterwarnings("ignore", message="Grad strides do not match")  # of parameters (1, 1, D): harmless
        encoder = DistributedDataParallel(policy.encoder)
        for value in policy.head.state_dict().values():
            dist.broadcast(value, 0)

    steps_per_epoch, step = len(loader), run.step
    total_steps, warmup_steps = args.epochs * steps_per_epoch, round(args.warmup_epochs * steps_per_epoch)
    last_step, refresh_every = min(total_steps, args.max_steps or total_steps), args.old_policy_every or steps_per_epoch
    while step < last_step:
        epoch = step // steps_per_epoch  # line 2
        for images, targets in loader.epoch(epoch, start=step % steps_per_epoch):  # line 4
            if old_policy and step % refresh_every == 0:
                old_policy.load_state_dict(policy.state_dict())  # line 3: pi_old <- pi
            lr = learning_rate(step, total_steps, warmup_steps, args.lr, args.lr_end)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            # lines 5 to 9
            training_step(policy, old_policy, encoder, loss_function, optimizer, images, targets, run.meter, args)
            step += 1
            run.advance(step)
            epoch_ends, last = step % steps_per_epoch == 0, step == last_step
            if step % args.log_every == 0 or epoch_ends or last:
                run.log_steps(step, lr)
                if epoch_ends:
                    due = (epoch + 1) % args.eval_every == 0 or step == total_steps
                    run.log_epoch(step, lr, validate() if due else {})
                run.save_if_due(step, last)
            if last:
                break
    run.export("head.pth", policy.head)
    run.export("backbone.pth", policy.encoder.backbone)  # last: where it is, the run is whole
