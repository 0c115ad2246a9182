"""What can only be seen on a GPU: its kernels, precisions and compiler, and that the host does not wait for it."""

import copy
import itertools
import json

import pytest
import torch
from conftest import TORCHRUN, parse, read_log, start

import data
import grpo_rm
import train_cls
import train_seg
from common import distributed
from common.distributed import Meter
from common.features import PatchTokens
from common.loader import Loader
from grpo_rm import ClassificationHead, Policy, SegmentationHead, grpo_rm_loss, training_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
WORLD = distributed.World(0, 0, 1, torch.device("cuda", 0))
SHAPES = ["--device", "cuda", "--workers", "1", "--limit-train", "100", "--limit-val", "40", "--batch-size", "40"]
SHAPES += ["--lr", "1e-3", "--epochs", "2", "--log-every", "1"]  # 3 steps an epoch
SCENES = [*SHAPES, "--dataset", "shapes_seg", "--image-size", "56", "--map-size", "28"]
CASES = list(itertools.product(("cls", "seg"), ("off", "bf16"), ([], ["--compile"])))


@pytest.mark.parametrize("shape", [(1024, 1000), (2, 171, 128, 128)], ids=["samples", "maps"])
@pytest.mark.parametrize("options", [
    {"ratio_floor": 0.1}, {"uniformity": "eq5", "background_penalty": 0.5},
], ids=["floor", "eq5"])  # fmt: skip
def test_the_compiled_loss_equals_the_eager_one_and_keeps_little(shape, options):
    torch._dynamo.reset()
    torch.manual_seed(0)
    logits, old_logits = (3 * torch.randn(shape, device="cuda", dtype=torch.float64) for _ in range(2))
    targets = torch.randint(shape[1], shape[:1] + shape[2:], device="cuda")
    targets.view(-1)[::7] = -100
    results, options = [], {"ignore_index": -100, **options}
    for function in (grpo_rm_loss, torch.compile(grpo_rm_loss, dynamic=False)):
        for _ in range(2):  # the first call compiles
            leaf = logits.clone().requires_grad_()
            before = torch.cuda.memory_allocated()
            loss, stats = function(leaf, old_logits, targets, **options)
            kept = torch.cuda.memory_allocated() - before
            loss.backward()
        results.append((loss.detach(), stats, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    assert kept < 1.05 * logits.nbytes  # for the backward pass


def make_step(task, amp, compiled):
    """Policy and old policy as train() has them, of different weights, and a function that makes a step with an epoch's
    first batch and returns the meter."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    script, flags = (train_cls, SHAPES) if task == "cls" else (train_seg, SCENES)
    args = parse(script, *flags, "--amp", amp, "--ratio-floor", "0", *compiled, world=WORLD)
    split, _ = data.load_data(args, WORLD)
    head = ClassificationHead(96, 10) if task == "cls" else SegmentationHead(96, 11, 64, args.map_size)
    policy = Policy(grpo_rm.load_backbone("vit_tiny"), head, args.amp).to("cuda")
    old_policy = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in old_policy.parameters():
            parameter.mul_(1.1)
    for network in (policy, old_policy) if args.compile else ():
        network.encoder.compile(dynamic=False)
    rest = (policy.encoder, grpo_rm.make_loss(args), grpo_rm.make_optimizer(policy, args))
    meter, loader = Meter(), Loader(split, args, WORLD, augment=True)

    def step(epoch):
        images, targets = next(loader.epoch(epoch))
        training_step(policy, old_policy, *rest, images, targets, meter, args)
        return meter

    return policy, old_policy, step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_ratio_is_exactly_one_right_after_a_refresh(case):
    policy, old_policy, step = make_step(*case)
    assert step(0).read(WORLD)["max_ratio"][0] > 1
    old_policy.load_state_dict(policy.state_dict())
    reading = step(1).read(WORLD)
    assert reading["max_ratio"][0] == 1 and reading["kl"][0] == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_host_does_not_wait_within_a_step(case):
    *_, step = make_step(*case)
    step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("streamed", [False, True])
def test_patch_tokens_are_the_same_kept_and_computed(streamed, monkeypatch):
    """Of images in the GPU's memory, and of images that workers decode."""
    args = train_seg.parse_args(SCENES)
    data.resolve_dataset(args, "segmentation")
    split, found = data.load_data(args, WORLD)[0], []
    monkeypatch.setattr("common.loader.memory_share", lambda world, share: 2**30 * (not streamed))
    for room in (2**30, 0):
        monkeypatch.setattr("common.features.memory_share", lambda world, share, room=room: room)
        loader = Loader(split, args, WORLD)
        torch.manual_seed(0)
        source = PatchTokens(grpo_rm.load_backbone("vit_tiny").to("cuda"), loader, 1, "bf16")
        assert (loader.resident is None) == streamed and source.kept == (100 if room else 0)
        found.append([*source.batches([torch.arange(99, -1, -3), torch.arange(5)])])
    for (one, masks), (other, same_masks) in zip(*found, strict=True):
        assert torch.equal(masks, same_masks) and (masks >= 0).any()
        torch.testing.assert_close(one, other, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("method", "case"), [*itertools.product(("grpo_rm", "finetune"), CASES[:4])], ids=str)
def test_a_run_trains(method, case, tmp_path):
    _, amp, compiled = case
    train_cls.main([*SHAPES, "--method", method, "--amp", amp, *compiled, "--output-dir", str(tmp_path)])
    first, *_, last = [event for event in read_log(tmp_path) if event["event"] == "epoch"]
    assert method == "grpo_rm" or last["loss"] < first["loss"]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["peak_memory_gb"] > 0
    assert (tmp_path / "backbone.pth").exists()


@pytest.mark.parametrize(("script", "flags"), [(train_cls, SHAPES), (train_seg, SCENES)], ids=["cls", "seg"])
def test_a_resumed_run_is_close_to_an_uninterrupted_one(script, flags, tmp_path):
    script.main([*flags, "--output-dir", str(tmp_path / "whole")])
    for stop in (["--max-steps", "4"], []):
        script.main([*flags, "--output-dir", str(tmp_path / "parts"), "--resume", *stop])
    for one, other in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), strict=True):
        assert one.pop("event") == other.pop("event") and one["step"] == other["step"]
        assert other["loss"] == pytest.approx(one["loss"], abs=0.01)


def test_a_process_group_of_one(tmp_path):
    """torchrun with one process: nccl and DDP."""
    launch = [*TORCHRUN, "--standalone", "--nproc_per_node=1"]
    process = start("train_cls.py", *SHAPES, "--output-dir", tmp_path / "nccl", launch=launch)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    train_cls.main([*SHAPES, "--output-dir", str(tmp_path / "alone")])
    losses = [[event["loss"] for event in read_log(tmp_path / name)] for name in ("nccl", "alone")]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
