"""Algorithm 1 of "GRPO-RM: Fine-Tuning Representation Models via GRPO-Driven Reinforcement Learning" (arXiv 2511.15256)

What differs from GRPO for language models:
1. The group is exact: its outputs are the c classes, all of them; nothing is sampled.
2. beta = 0: there is no reference model and no KL term.
3. The old policy is a copy of the policy, refreshed at the start of every epoch.
4. The ratio has a floor, which is ours: rho_i = p_i / (q_i + F/c). Eq. (1) as printed (F = 0) can blow up.

With a floor, right after a refresh, every wrong class with q_i < (1 - eps)/eps F/c is clipped. Where all are, the
gradient is A_k/c times that of -log(p_k + F/c): cross-entropy with each sample weighted by p_k / (p_k + F/c). Samples
that the policy has wrong weigh little, wrong labels among them. A sample that has reached p_k = (1 + eps)(q_k + F/c)
gives no gradient, until it falls back or the old policy is refreshed.

Shapes: B images, N samples (images, or pixels of maps), G outputs in the group (= classes c), D features, M side of a
map. p = softmax(logits) is the policy pi_theta, q = softmax(old_logits) the old policy pi_theta_old, k the target.
"""

import copy
import functools
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from common.backbone import Encoder, load_backbone, load_strictly
from common.checkpoint import Run, read_config
from common.cli import InputError
from common.distributed import all_reduce, data_parallel
from common.images import input_transform

VALUES_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}  # in the widest tensor of head and loss: fits a CPU's cache; feeds a GPU

# Objective ------------------------------------------------------------------------------------------------------------


def accuracy_reward(targets, num_outputs):
    """Eq. (3): c for the output that names the target, 0 for the others. targets (N,) int64 -> (N, G) float32."""
    return num_outputs * F.one_hot(targets, num_outputs).float()


def uniformity_reward(old_probs, targets, kind="eq4"):
    """Eq. (4), "eq4": -q_i. The ablations of Table 6: "eq5", Eq. (5): q_k for the target k, (1 - q_k)/(c - 1) - q_i for
    i != k; "none": 0. old_probs, q (N, G), targets (N,) -> (N, G). Raises ValueError for another kind."""
    if kind == "eq4":
        return -old_probs
    if kind == "eq5":
        num_outputs = old_probs.shape[1]
        q_k = old_probs.gather(1, targets[:, None])  # (N, 1)
        others = (1 - q_k) / (num_outputs - 1) - old_probs
        return torch.where(F.one_hot(targets, num_outputs).bool(), q_k, others)
    if kind == "none":
        return torch.zeros_like(old_probs)
    raise ValueError(f"uniformity {kind!r}: choose eq4, eq5 or none")


def group_advantages(rewards):
    """Eq. (2): A_i = (r_i - mean(r)) / std(r) over the group. rewards (N, G) -> (N, G). Paper silent: the group is the
    whole set of outputs, so its std divides by c; rewards that are all equal give A = 0."""
    mean = rewards.mean(1, keepdim=True)
    std = (rewards - mean).square().mean(1, keepdim=True).sqrt()
    rounding = 4 * torch.finfo(rewards.dtype).eps * mean.abs()  # equal rewards leave no larger std
    return (rewards - mean) / std.where(std > rounding, math.inf)


def grpo_rm_loss(
    logits, old_logits, targets, *, clip_eps=0.2, uniformity="eq4", accuracy_weight=1.0, uniformity_weight=1.0,
    background_penalty=0.0, ratio_floor=0.0, ignore_index=-100,
):  # fmt: skip
    """Lines 6 to 8 of Algorithm 1: the loss -J of Eq. (1) with beta = 0, and what to log.

        J = mean over samples of 1/c sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)

    logits, old_logits: (N, G), or maps (B, G, H, W); computed in float32 (float64 stays). No gradient to old_logits.
    targets: (N,) or (B, H, W); those equal to ignore_index (void pixels) take no part.
    background_penalty: share of c taken from the reward of class 0 (the paper's for segmentation: 0.5).
    ratio_floor: F in rho_i = p_i / (q_i + F/c) <= c/F; the paper's is 0.
    Returns the scalar loss and, detached, what to log: clip_fraction is the share of outputs whose clipped branch is
    active, kl is KL(q || p), entropy is of p, in nats. Raises ValueError for shapes that do not fit.
    """
    fits = logits.shape == old_logits.shape and targets.shape == logits.shape[:1] + logits.shape[2:]
    if not fits or logits.dim() not in (2, 4) or logits.shape[1] < 2:
        shapes = [tuple(x.shape) for x in (logits, old_logits, targets)]
        raise ValueError(f"logits, old_logits, targets: {shapes}, not (N, G) twice, (N,), or (B, G, H, W), (B, H, W)")
    if logits.dim() == 4:  # every pixel is a sample
        logits, old_logits = (x.movedim(1, -1).flatten(0, 2) for x in (logits, old_logits))
        targets = targets.flatten()
    G = logits.shape[1]
    valid = targets != ignore_index
    k = targets.where(valid, 0)
    count = valid.sum().clamp(min=1)

    def mean(values):  # (N,) -> over the samples that take part; divided first: a sum of huge ratios could overflow
        return torch.where(valid, values / count, 0).sum()

    logits, old_logits = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logits, old_logits.detach()))
    # (N, G); -inf, where logits are further apart than float32's range, would make 0 * -inf = nan
    log_p, log_q = (x.log_softmax(1).clamp(min=-1e30) for x in (logits, old_logits))
    p, q = log_p.exp(), log_q.exp()

    r_acc = accuracy_reward(k, G).to(q.dtype)
    r_uni = uniformity_reward(q, k, uniformity)
    penalty = background_penalty * G * (torch.arange(G, device=q.device) == 0).to(q.dtype)  # (G,): of class 0 alone
    rewards = accuracy_weight * r_acc + uniformity_weight * r_uni - penalty  # Eq. (6)
    advantages = group_advantages(rewards)  # (N, G)
    if ratio_floor:
        ratio = p / (q + ratio_floor / G)  # rho (N, G)
    else:
        ratio = (log_p - log_q).clamp(max=80).exp()  # p/q, where q can be 0 in float32; exp(80) is finite
    weighted = advantages * (1 / G)  # the 1/c of Eq. (1)
    unclipped, clipped = ratio * weighted, ratio.clamp(1 - clip_eps, 1 + clip_eps) * weighted
    loss = -mean(torch.minimum(unclipped, clipped).sum(1))  # Eq. (1)

    with torch.no_grad():
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


def cross_entropy_loss(logits, targets, *, ignore_index=-100):
    """The baseline, standard fine-tuning: cross-entropy, mean over the samples that take part. Shapes as above."""
    valid = targets != ignore_index
    count = valid.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none").sum() / count
    accuracy = ((logits.argmax(1) == targets) & valid).sum() / count
    return loss, {"loss": loss.detach(), "accuracy": accuracy}


def make_loss(args):
    """(logits, old_logits, targets) -> loss, statistics: that of args.method; GRPO-RM's is compiled with --compile."""
    if args.method == "finetune":
        return lambda logits, old_logits, targets: cross_entropy_loss(logits, targets)
    names = ("clip_eps", "uniformity", "accuracy_weight", "uniformity_weight", "background_penalty", "ratio_floor")
    options = {name: getattr(args, name) for name in names}
    loss_function = torch.compile(grpo_rm_loss, dynamic=False) if args.compile else grpo_rm_loss
    return functools.partial(loss_function, **options)


# Policy ---------------------------------------------------------------------------------------------------------------


class ClassificationHead(nn.Sequential):
    """Linear - ReLU - Linear on the class token: (B, D) -> logits (B, G), in float32: p/q needs more than bf16."""

    token = "x_norm_clstoken"

    def __init__(self, embed_dim, num_outputs, hidden_dim=256):
        super().__init__(nn.Linear(embed_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, num_outputs))
        self.values_per_image = max(hidden_dim, num_outputs)  # of the widest tensor between tokens and loss

    def forward(self, tokens):
        return super().forward(tokens.to(self[0].weight.dtype))


class SegmentationHead(ClassificationHead):
    """The same for every pixel of the patch tokens, upsampled to M x M: (B, h*w, D) -> (B, G, M, M). The first layer
    comes before the upsampling: the same function for 1/16 of the work, as an interpolation's weights sum to 1."""

    token = "x_norm_patchtokens"

    def __init__(self, embed_dim, num_outputs, hidden_dim=256, map_size=128):
        super().__init__(embed_dim, num_outputs, hidden_dim)
        self.map_size = map_size
        self.values_per_image *= map_size**2

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        x = self[0](tokens.to(self[0].weight.dtype))  # (B, h*w, hidden)
        x = x.transpose(1, 2).unflatten(2, (side, side))  # (B, hidden, h, w)
        x = F.interpolate(x, size=(self.map_size, self.map_size), mode="bilinear")  # (B, hidden, M, M)
        return F.conv2d(x.relu_(), self[2].weight[:, :, None, None], self[2].bias)  # (B, G, M, M)


class Policy(nn.Module):
    """pi_theta: a backbone and a head, trained together (Algorithm 1, line 1). amp: "bf16" or "off"."""

    def __init__(self, backbone, head, amp="off"):
        super().__init__()
        self.encoder, self.head = Encoder(backbone, head.token, amp), head

    def forward(self, images):
        return self.head(self.encoder(images))  # (B, G) or (B, G, M, M)


# Algorithm 1 ----------------------------------------------------------------------------------------------------------


def make_optimizer(policy, args):
    """Adam without weight decay. A group's rate is the schedule's times its "factor"."""
    backbone = {"params": policy.encoder.parameters(), "factor": 1.0}
    head = {"params": policy.head.parameters(), "factor": args.head_lr_factor}
    return torch.optim.Adam([backbone, head], lr=args.lr, weight_decay=0.0, fused=True)


def learning_rate(step, total_steps, warmup_steps, lr, lr_end):
    """Linear warm-up, then a cosine from lr down to lr_end at the last step (paper silent on the curve)."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * progress)) / 2


def accumulate_gradients(policy, old_policy, encoder, loss_function, images, targets, sample_weight, meter):
    """Lines 5 to 8 for images (B, 3, H, W) and targets (B, ...), whose samples weigh `sample_weight` each, up to the
    backward pass: adds to the gradients and to the meter.

    Head and loss take a few images at a time, because the maps of a whole batch would be by far the largest tensors;
    the gradient that they leave at the tokens then goes through the backbone at once.
    """
    chunk_size = max(1, VALUES_AT_ONCE[images.device.type] // policy.head.values_per_image)
    old_tokens = old_policy.encoder(images).detach() if old_policy else None  # first: one graph at a time
    tokens = encoder(images)  # (B, D) or (B, h*w, D)
    chunks = [x.requires_grad_() for x in tokens.detach().split(chunk_size)]
    old_chunks = old_tokens.split(chunk_size) if old_policy else [None for _ in chunks]
    for x, old_x, y in zip(chunks, old_chunks, targets.split(chunk_size), strict=True):
        old_logits = old_policy.head(old_x).detach() if old_policy else None  # line 5: pi_old(y|x)
        logits = policy.head(x)  # pi(y|x): (B, G) or (B, G, M, M)
        loss, stats = loss_function(logits, old_logits, y)  # lines 6 to 8
        samples = (y >= 0).sum()
        (loss * samples * sample_weight).backward()
        meter.add(samples, stats)
    if tokens.requires_grad:  # not where the whole backbone is frozen
        tokens.backward(torch.cat([x.grad for x in chunks]))


def training_step(policy, old_policy, encoder, loss_function, optimizer, images, targets, meter, args):
    """Lines 5 to 9. images (B, 3, H, W) and targets (B, ...) are this process's share of the global batch, whose
    samples all weigh the same. `encoder` is policy.encoder, with several processes inside DDP, which averages its
    gradients over them."""
    total = (targets >= 0).sum()
    all_reduce(total)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    # Averaging divides by the number of processes. In float64, because a batch of maps can have more than 2^24 samples.
    sample_weight = world_size / total.clamp(min=1).double()
    micro_batches = list(zip(images.chunk(args.grad_accum), targets.chunk(args.grad_accum), strict=True))
    for i, (x, y) in enumerate(micro_batches, 1):
        encoder.require_backward_grad_sync = i == len(micro_batches)  # DDP averages once, with the last of them
        accumulate_gradients(policy, old_policy, encoder, loss_function, x, y, sample_weight, meter)
    for parameter in policy.head.parameters():  # DDP cannot average these, which come from several backward passes
        if parameter.grad is not None:
            all_reduce(parameter.grad)
            parameter.grad /= world_size
    norm = nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or math.inf)
    optimizer.step()  # line 9
    policy.zero_grad()
    meter.add(1, {"grad_norm": norm, "finite": norm.isfinite(), "images": len(images)})


def train(policy, loader, validate, args, world):
    """Algorithm 1, or with args.method "finetune" the baseline: the same network, batches and schedule without an old
    policy. A parameter that does not require a gradient stays as it is.

    loader.epoch(e, start) yields this process's (images, targets) from step `start` of epoch e on, len(loader) is the
    number of steps in an epoch; validate() gives numbers for the epoch's log line. Leaves config.json, log.jsonl,
    checkpoint.pt, head.pth and backbone.pth in args.output_dir. Raises InputError and RunError.
    """
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs for what is not bf16
    # It keeps requires_grad: without, other kernels might run and round differently, and q not be p after a refresh.
    old_policy = copy.deepcopy(policy) if args.method == "grpo_rm" else None
    optimizer, loss_function = make_optimizer(policy, args), make_loss(args)
    run = Run(args, world, len(loader), policy=policy, old_policy=old_policy, optimizer=optimizer)
    if args.compile:
        torch._dynamo.config.optimize_ddp = False  # it would cut the policy's code, not the old policy's
        for network in filter(None, [policy, old_policy]):
            network.encoder.compile(dynamic=False)
    encoder = data_parallel(policy)
    steps_per_epoch, step = len(loader), run.step
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)
    refresh_every = args.old_policy_every or steps_per_epoch
    while step < run.last_step:
        epoch = step // steps_per_epoch  # line 2
        for images, targets in loader.epoch(epoch, start=step % steps_per_epoch):  # line 4
            if old_policy and step % refresh_every == 0:
                old_policy.load_state_dict(policy.state_dict())  # line 3: pi_old <- pi
            lr = learning_rate(step, run.total_steps, warmup_steps, args.lr, args.lr_end)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["factor"]
            # lines 5 to 9
            training_step(policy, old_policy, encoder, loss_function, optimizer, images, targets, run.meter, args)
            step += 1
            run.after_step(step, lr, validate)  # log, validate and save where it is time
            if step == run.last_step:
                break
    run.finish(policy)


def load_policy(run_dir):
    """What a run of either task left in run_dir: the Policy in evaluation mode on the CPU, in float32; the transform of
    a PIL image to its input (3, S, S) float32; the names of the classes. Raises InputError for no finished run."""
    run_dir, config = Path(run_dir), read_config(run_dir)
    if "method" not in config or not (run_dir / "backbone.pth").is_file():
        raise InputError(f"{run_dir} is no finished run of train_cls.py or train_seg.py; give the directory of one")
    backbone = load_backbone(config["backbone"], hub_repo=config["hub_repo"], weights=run_dir / "backbone.pth")
    sizes = backbone.embed_dim, len(config["classes"]), config["hidden_dim"]
    if config["task"] == "segmentation":
        head = SegmentationHead(*sizes, config["map_size"])
    else:
        head = ClassificationHead(*sizes)
    load_strictly(head, run_dir / "head.pth")
    policy = Policy(backbone, head).eval().requires_grad_(False)
    return policy, input_transform(config), config["classes"]
