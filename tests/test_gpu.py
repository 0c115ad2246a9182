"""What can only be seen on a GPU: its kernels, precisions and compiler, and that the host does not wait for it. Skipped without one."""

import json

import pytest
import torch
from conftest import CLASSIFICATION
from test_objective import CASES, OPTIONS
from test_training import without_speed

import train_cls
import train_seg
from checkpoint import read_log
from data import TrainLoader, draw_shapes_split
from grpo_rm import (
    ClassificationHead,
    Policy,
    SegmentationHead,
    VitTiny,
    World,
    compiled_loss,
    copy_policy,
    grpo_rm_loss,
    prepare,
    training_step,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"
SHAPES = ["--device", DEVICE, "--workers", "1", "--limit-train", "100", "--limit-val", "40", "--batch-size", "40", "--lr", "1e-3"]
SCENES = [*SHAPES, "--dataset", "shapes_seg", "--image-size", "56", "--map-size", "28", "--epochs", "2"]
EITHER = pytest.mark.parametrize("compiled", ["off", "on"])
AMP = pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])


def loss_and_gradient(function, logits, old, targets, **options):
    logits = logits.to(DEVICE).clone().requires_grad_()
    loss, stats = function(logits, old.to(DEVICE), targets.to(DEVICE), **options)
    return loss.detach(), stats, torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_fused_loss_equals_the_plain_one(case):
    for options in OPTIONS:
        fused, plain = (loss_and_gradient(grpo_rm_loss, *CASES[case], fused=fused, **options) for fused in (True, False))
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", ["samples", "void pixels"])
def test_the_compiled_loss_equals_the_eager_one(case):
    for options in OPTIONS[::5]:
        torch._dynamo.reset()
        compiled = torch.compile(grpo_rm_loss, dynamic=False, fullgraph=True)
        found, expected = (loss_and_gradient(function, *CASES[case], **options) for function in (compiled, grpo_rm_loss))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(1024, 1000), (2, 171, 128, 128)], ids=["samples", "maps"])
def test_the_compiled_loss_writes_nothing_of_the_logits_size_but_its_gradient(shape):
    logits, old = (torch.randn(shape, device=DEVICE) for _ in range(2))
    if len(shape) == 4:  # as the head leaves them
        logits, old = (x.contiguous(memory_format=torch.channels_last) for x in (logits, old))
    targets = torch.randint(shape[1], shape[:1] + shape[2:], device=DEVICE)
    logits.requires_grad_()
    function = compiled_loss(targets.numel())
    for _ in range(2):  # the first call compiles
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _kept = function(logits, old, targets, ratio_floor=0.1, ignore_index=-100)
        taken = torch.cuda.max_memory_allocated() - before
    assert taken < 1.2 * 4 * logits.numel()


def two_policies(task: str, amp: str, compiled: str, processes: int = 1):
    """Policy and old policy as train() has them, of different weights, with images (32, 3, 70, 70), targets and arguments."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    world = World(0, 0, processes, torch.device(DEVICE))
    head = ClassificationHead(96, 10) if task == "cls" else SegmentationHead(96, 10, 64, 20)
    policy = Policy(VitTiny(), head).to(DEVICE)
    args = train_cls.parse_args(["--amp", amp, "--ratio-floor", "0"])
    args.lr, args.compile = 1e-3, compiled == "on"
    old_policy, model, optimizer, scaler = prepare(policy, args, world)
    with torch.no_grad():
        for parameter in old_policy.parameters():
            parameter.mul_(1.1)
    images = torch.randn(32, 3, 70, 70, device=DEVICE)
    targets = torch.randint(10, (32,) if task == "cls" else (32, 20, 20), device=DEVICE)
    return policy, old_policy, (model, old_policy, optimizer, scaler, images, targets, args, world)


@EITHER
@AMP
@pytest.mark.parametrize("task", ["cls", "seg"])
def test_the_ratio_is_exactly_one_right_after_a_refresh(task, amp, compiled):
    policy, old_policy, step = two_policies(task, amp, compiled)
    before = training_step(*step)
    assert before["mean_ratio"] != before["samples"]
    copy_policy(old_policy, policy)
    sums = training_step(*step)  # fresh=False: the old policy is asked
    assert sums["mean_ratio"] == sums["samples"] and sums["max_ratio"] == 1
    assert abs(sums["loss"] / sums["samples"]) < 1e-6


@EITHER
@AMP
@pytest.mark.parametrize("task", ["cls", "seg"])
def test_the_host_does_not_wait_within_a_step(task, amp, compiled):
    *_, step = two_policies(task, amp, compiled)
    training_step(*step)
    world, protocol = step[-1], CLASSIFICATION["shapes"]
    loader = TrainLoader(draw_shapes_split(80, seed=0), protocol, 70, 32, world, 1, seed=0, augment=True)
    next(loader.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        next(loader.epoch(1))
        training_step(*step)
        training_step(*step, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EITHER
@AMP
@pytest.mark.parametrize("method", ["grpo_rm", "finetune"])
def test_a_run_in_every_precision(method, amp, compiled, tmp_path):
    flags = ["--method", method, "--amp", amp, "--compile", compiled, "--epochs", "3", "--output-dir", str(tmp_path)]
    train_cls.main([*SHAPES, *flags])
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "epoch" and last["accuracy"] > 0 and last["peak_memory_gb"] > 0
    assert (tmp_path / "backbone.pth").exists()


@pytest.fixture
def deterministic():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("script", "flags"), [(train_cls, [*SHAPES, "--epochs", "2"]), (train_seg, SCENES)], ids=["cls", "seg"])
def test_a_deterministic_run_twice_or_in_parts_gives_the_same_bits(script, flags, tmp_path):
    flags = [*flags, "--deterministic", "--log-every", "1"]
    for name in ("one", "two"):
        script.main([*flags, "--output-dir", str(tmp_path / name)])
    parts = [*flags, "--output-dir", str(tmp_path / "parts")]
    script.main([*parts, "--max-steps", "4"])  # within the second epoch of three steps
    script.main([*parts, "--resume"])
    for file in ("backbone.pth", "head.pth"):
        one, *others = (torch.load(tmp_path / name / file, weights_only=True) for name in ("one", "two", "parts"))
        assert all(torch.equal(one[key], other[key]) for other in others for key in one)
    logs = [without_speed(read_log(tmp_path / name / "log.jsonl")) for name in ("one", "two", "parts")]
    assert logs[0] == logs[1] == logs[2]


@pytest.mark.parametrize("task", ["cls", "seg"])
def test_ddp_of_one_process(task):
    """Told that there are two, one process has the collectives of DDP, and, as DDP averages, twice the gradient."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sums = []
        for processes in (1, 2):
            *_, step = two_policies(task, "off", "off", processes)
            sums.append(training_step(*step))
    finally:
        torch.distributed.destroy_process_group()
    alone, ddp = sums
    assert ddp.pop("grad_norm").item() == pytest.approx(2 * alone.pop("grad_norm").item(), rel=1e-3)
    assert {name: value.item() for name, value in ddp.items()} == pytest.approx({name: value.item() for name, value in alone.items()}, rel=1e-4)
