"""Algorithm 1: processes and accumulation, the old policy, the schedule, what a run leaves behind and warns of."""

import contextlib
import functools
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, TINY, in_processes, parse, read_json, read_log, stderr_of, write_mask

import data
import grpo_rm
import train_cls
import train_seg
from common import cli, demo
from common.distributed import Meter
from common.loader import VOID, Loader
from grpo_rm import ClassificationHead, Policy, SegmentationHead, learning_rate, load_backbone, training_step

TRAIN = [*TINY, "--batch-size", "40", "--lr", "1e-3", "--epochs", "2", "--log-every", "1"]  # 3 steps an epoch
MAPS = ["--dataset", "shapes_seg", "--image-size", "28", "--map-size", "14"]
BOTH = [(task, method) for task in ("cls", "seg") for method in ("grpo_rm", "finetune")]


def run(directory, *extra):
    train_cls.main([*TRAIN, "--output-dir", str(directory), *extra])


def steps_of(directory):
    return [event for event in read_log(directory) if event["event"] == "step"]


def weights(directory, name="backbone.pth"):
    return torch.load(Path(directory) / name, weights_only=True)


# Processes and accumulation, in float64: beyond float32's rounding


class DoubleLoader(Loader):
    def epoch(self, epoch, start=0):
        for images, targets in super().epoch(epoch, start):
            yield images.double(), targets


def freeze(policy, part):
    """As a fork would, in one line."""
    if part == "half":
        policy.encoder.backbone.vit.encoder.layers[:2].requires_grad_(False)
    elif part == "backbone":
        policy.encoder.backbone.requires_grad_(False)
    elif part == "layer":
        policy.head[0].requires_grad_(False)


def train_in_double(directory, world, task, *flags, frozen=None):
    """Two epochs of three steps, the last of 2 images: a third process has none."""
    script, count = (train_cls, 82) if task == "cls" else (train_seg, 22)
    batch = ["--batch-size", "40"] if task == "cls" else ["--batch-size", "10", *MAPS]
    base = ["--workers", "1", "--lr", "2e-3", "--epochs", "2", "--log-every", "2", "--ratio-floor", "0"]
    args = parse(script, *batch, *base, "--output-dir", str(directory), *flags)
    split = data.load_splits(args.dataset, ".", args.task, download=False)[0].subset(range(count))
    args.classes, args.train_images = split.classes, count
    torch.manual_seed(world.rank)  # rank 0's weights count
    shape = (96, len(split.classes), 32)
    head = ClassificationHead(*shape) if task == "cls" else SegmentationHead(*shape, args.map_size)
    policy = Policy(load_backbone("vit_tiny"), head).double()
    freeze(policy, frozen)
    loader = DoubleLoader(split, args, world, augment=True)
    grpo_rm.train(policy, loader, dict, args, world)


def not_finite_at(call, kind):
    """A cross_entropy_loss whose value, or else only its gradient, is nan the `call`-th time."""
    calls, original = itertools.count(1), grpo_rm.cross_entropy_loss

    def poisoned(logits, targets, **options):
        loss, stats = original(logits, targets, **options)
        if next(calls) == call:
            loss = loss * math.nan if kind == "loss" else loss + (0 * logits).sum().abs().sqrt()
        return loss, stats

    return poisoned


def keep(graphs, graph, inputs):
    """A backend of torch.compile that runs what was captured as it is; appends the functions that it calls."""
    graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
    return graph


FROZEN = ("half", "backbone", "layer")


def train_in_processes(world, root):
    """Everything that several processes are needed for, in one start of them."""
    size = world.size
    for task, method in BOTH:
        flags = ["--method", method, "--grad-accum", "2" if size == 2 else "1"]
        train_in_double(f"{root}/{task} {method} {size} processes", world, task, *flags)
    if size == 2:
        for part in FROZEN:
            train_in_double(f"{root}/{part} frozen, 2 processes", world, "seg", "--grad-accum", "2", frozen=part)
        graphs, torch.compile = [], functools.partial(torch.compile, backend=lambda *graph: keep(graphs, *graph))
        train_in_double(f"{root}/seg grpo_rm 2 processes, compiled", world, "seg", "--compile")
        assert len(graphs) == 4  # not cut for DDP's buckets, as the old policy's would not be
        if world.rank == 1:
            grpo_rm.cross_entropy_loss = not_finite_at(5, "loss")
        with pytest.raises(cli.RunError, match="not finite at step 5"):
            train_in_double(f"{root}/poisoned", world, "cls", "--method", "finetune", "--checkpoint-minutes", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of runs on 1, 2 and 3 processes, and with accumulation."""
    root = tmp_path_factory.mktemp("double")
    for size in (2, 3):
        in_processes(train_in_processes, size, str(root))
    for task, method in BOTH:
        train_in_double(root / f"{task} {method} one", CPU, task, "--method", method)
        train_in_double(root / f"{task} {method} accumulated", CPU, task, "--method", method, "--grad-accum", "3")
    return root


def assert_equal_runs(one, other):
    """Equal up to the rounding of float64 (an accuracy is rounded to float32)."""
    for name in ("backbone.pth", "head.pth"):
        torch.testing.assert_close(weights(other, name), weights(one, name), rtol=0, atol=1e-9)
    for event, expected in zip(read_log(other), read_log(one), strict=True):
        assert event.pop("event") == expected.pop("event")
        assert event == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("task", "method", "other"), [
    *((*pair, other) for pair in BOTH for other in ("2 processes", "3 processes", "accumulated")),
    ("seg", "grpo_rm", "2 processes, compiled"),
])  # fmt: skip
def test_processes_and_accumulation_change_nothing(task, method, other, trained):
    assert_equal_runs(trained / f"{task} {method} one", trained / f"{task} {method} {other}")


@pytest.mark.parametrize("part", FROZEN)
def test_what_is_frozen_stays_and_the_rest_trains(part, trained, tmp_path):
    """On one and two processes, to the same weights."""
    train_in_double(tmp_path, CPU, "seg", frozen=part)
    assert_equal_runs(tmp_path, trained / f"{part} frozen, 2 processes")
    torch.manual_seed(0)
    head = SegmentationHead(96, 11, 32)  # the first, as above
    start = Policy(load_backbone("vit_tiny"), head).double()
    end = weights(tmp_path, "checkpoint.pt")["policy"]
    same = {name for name, value in start.state_dict().items() if torch.equal(value, end[name])}
    freeze(start, part)
    assert same == {name for name, value in start.named_parameters() if not value.requires_grad}


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(trained):
    assert weights(trained / "poisoned", "checkpoint.pt")["step"] == 4


# The old policy, torch.compile, schedule, optimiser


@pytest.mark.parametrize(("flags", "fresh"), [
    ("--amp off", {1, 4}), ("--amp bf16", {1, 4}), ("--grad-accum 4", {1, 4}), ("--old-policy-every 2", {1, 3, 5}),
])  # fmt: skip
def test_the_old_policy_is_the_policy_right_after_a_refresh_alone(flags, fresh, tmp_path, before_steps):
    """There the ratio is exactly 1; in between the old policy stays as it is."""
    sums = []

    def look(number, policy, old_policy, optimizer):
        assert all(parameter.grad is None for parameter in old_policy.parameters())
        sums.append(sum(parameter.double().sum().item() for parameter in old_policy.parameters()))

    before_steps(look)
    run(tmp_path, "--ratio-floor", "0", *flags.split())
    for line in steps_of(tmp_path):
        one = (line["max_ratio"], line["kl"], line["clip_fraction"]) == (1, 0, 0)
        assert one == (line["step"] in fresh)
        assert (abs(line["loss"]) < 1e-7 and line["mean_ratio"] == pytest.approx(1, abs=1e-6)) or not one
    changed = {number for number, pair in enumerate(itertools.pairwise(sums), 2) if pair[0] != pair[1]}
    assert changed == fresh - {1}


def test_compiled_backbones_and_loss(trained, tmp_path, monkeypatch):
    """The same results as without, from one code for both policies: else rho would not be exactly 1 after a refresh."""
    graphs = []
    backend = functools.partial(torch.compile, backend=lambda *graph: keep(graphs, *graph))
    monkeypatch.setattr(torch, "compile", backend)
    torch._dynamo.reset()
    train_in_double(tmp_path, CPU, "cls", "--compile")
    assert_equal_runs(trained / "cls grpo_rm one", tmp_path)
    backbones = [calls for calls in graphs if torch.conv2d in calls]
    assert (len(backbones), len(graphs)) == (2, 4)  # backbone and loss; batches of 40 images and, at the end, of 2
    assert all(calls.count(torch.nn.functional.multi_head_attention_forward) == 4 for calls in backbones)  # whole


def test_learning_rate():
    rates = [learning_rate(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(54, 100, 10, 1.0, 0.0) == pytest.approx((1 + math.cos(math.pi * 44 / 89)) / 2)
    assert learning_rate(0, 1, 0, 1.0, 0.01) == 1.0


@pytest.mark.parametrize(("script", "flags", "expected"), [
    (train_cls, "tiny_imagenet", {"lr": 4e-3, "lr_end": 4e-3 / 100, "batch_size": 1024, "hidden_dim": 256}),
    (train_cls, "cifar10 --batch-size 64", {"lr": 2.5e-4, "lr_end": 2.5e-4 / 100, "label_noise": 0}),
    (train_cls, "cifar10 --lr 0.5", {"lr": 0.5, "lr_end": 5e-3, "background_penalty": 0}),
    (train_cls, "cifar10 --lr 0.5 --lr-end 0", {"lr": 0.5, "lr_end": 0}),
    (train_seg, "voc2012", {"lr": 1e-5, "lr_end": 1e-5 / 100, "batch_size": 256, "background_penalty": 0.5}),
    (train_seg, "ade20k --batch-size 1024", {"lr": 4e-5, "hidden_dim": 256, "map_size": 128}),
])  # fmt: skip
def test_defaults_are_the_papers(script, flags, expected):
    expected |= {"epochs": 100, "clip_eps": 0.2, "uniformity": "eq4", "accuracy_weight": 1, "uniformity_weight": 1}
    expected |= {"method": "grpo_rm", "backbone": "dinov2_vits14", "old_policy_every": None, "train_fraction": 1}
    expected |= {"ratio_floor": 1.0, "warmup_epochs": 5}  # not the paper's
    args = vars(parse(script, "--dataset", *flags.split()))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("method", "warmup"), [("grpo_rm", 0), ("finetune", 1)])
def test_the_rates_of_a_run(method, warmup, tmp_path, before_steps):
    rates = []
    before_steps(lambda *step: rates.append([group["lr"] for group in step[-1].param_groups]))
    run(tmp_path, "--method", method, "--head-lr-factor", "10", "--warmup-epochs", str(warmup), "--lr-end", "1e-5")
    expected = [learning_rate(step, 6, 3 * warmup, 1e-3, 1e-5) for step in range(6)]
    assert rates == [[rate, pytest.approx(10 * rate)] for rate in expected]
    assert [line["lr"] for line in steps_of(tmp_path)] == expected


@pytest.mark.parametrize(("task", "method"), BOTH)
def test_nothing_in_a_step_needs_a_number_of_the_device(task, method, monkeypatch):
    """On meta tensors, which have none: a step that asked for one would make the host wait."""
    script, head = (train_cls, ClassificationHead) if task == "cls" else (train_seg, SegmentationHead)
    args = parse(script, "--method", method, "--grad-accum", "2", "--max-grad-norm", "1")
    monkeypatch.setitem(grpo_rm.VALUES_AT_ONCE, "meta", 2**20)
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: contextlib.nullcontext())  # has none for meta
    policy, old_policy = (Policy(load_backbone("vit_tiny"), head(96, 11)).to("meta") for _ in range(2))
    old_policy = old_policy if method == "grpo_rm" else None
    images = torch.empty(8, 3, 28, 28, device="meta")
    targets = torch.empty(8, *((128, 128) if task == "seg" else ()), dtype=torch.int64, device="meta")
    optimizer, meter = torch.optim.Adam(policy.parameters(), fused=False), Meter()
    for _ in range(2):
        rest = policy.encoder, grpo_rm.make_loss(args), optimizer, images, targets, meter, args
        training_step(policy, old_policy, *rest)
    assert meter.sums["accuracy"].is_meta and meter.sums["images"][0] == 16
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        meter.sums["accuracy"].sum().item()  # as anything that asks for a number would


def test_gradient_clipping():
    def norms(*flags):
        torch.manual_seed(0)
        policy, meter = Policy(load_backbone("vit_tiny"), ClassificationHead(96, 10)), Meter()
        policy.zero_grad = lambda: None  # leave the gradients for the test to see
        args, batch = parse(train_cls, "--method", "finetune", *flags), (torch.ones(10, 3, 42, 42), torch.arange(10))
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        training_step(policy, None, policy.encoder, grpo_rm.make_loss(args), optimizer, *batch, meter, args)
        gradients = [parameter.grad for parameter in policy.parameters()]
        return meter.read(CPU)["grad_norm"][0], torch.nn.utils.get_total_norm(gradients).item()

    logged, kept = norms()
    assert logged == pytest.approx(kept) and kept > 0.1
    clipped_logged, clipped = norms("--max-grad-norm", "0.05")
    assert clipped_logged == logged and clipped == pytest.approx(0.05, rel=1e-3)  # logged before clipping


def test_another_optimizer_is_a_change_of_one_place(tmp_path, monkeypatch):
    """AdamW of the backbone's blocks alone. What it leaves out stays as it was."""

    def blocks_alone(policy, args):
        blocks = {"params": policy.encoder.backbone.vit.encoder.layers.parameters(), "factor": 0.1}
        return torch.optim.AdamW([blocks], lr=args.lr, weight_decay=0.05)

    monkeypatch.setattr(grpo_rm, "make_optimizer", blocks_alone)
    run(tmp_path, "--max-steps", "3")
    torch.manual_seed(0)
    start, end = load_backbone("vit_tiny").state_dict(), weights(tmp_path)
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all("encoder.layers" in name for name in changed)


def test_what_a_run_leaves_behind(tmp_path, capsys):
    run(tmp_path)
    names = {"config.json", "log.jsonl", "checkpoint.pt", "backbone.pth", "head.pth"}
    assert {path.name for path in tmp_path.iterdir()} == names
    config = read_json(tmp_path / "config.json")
    expected = {"method": "grpo_rm", "ratio_floor": 1.0, "classes": list(demo.SHAPES), "train_images": 100}
    expected |= {"world_size": 1, "device_name": "cpu", "torch_version": torch.__version__, "background_penalty": 0}
    assert {name: config[name] for name in expected} == expected and config["git_commit"]
    events = read_log(tmp_path)
    assert [line["event"][0] + str(line["step"]) for line in events] == "s1 s2 s3 e3 s4 s5 s6 e6".split()
    assert [line["epoch"] for line in events] == [0] * 4 + [1] * 4
    keys = {*"loss accuracy clip_fraction mean_ratio max_ratio kl entropy grad_norm lr".split()}
    assert all(keys <= line.keys() for line in events)
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert {"images_per_s", "seconds", "peak_memory_gb", "val_accuracy"} <= last.keys()
    ClassificationHead(96, 10).load_state_dict(weights(tmp_path, "head.pth"))
    *steps, epoch = events[:4]
    mean = sum(line["loss"] * n for line, n in zip(steps, [40, 40, 20], strict=True)) / 100
    assert epoch["loss"] == pytest.approx(mean, rel=1e-5)  # an epoch's line has the means of its steps
    assert epoch["max_ratio"] == max(line["max_ratio"] for line in steps)
    shown = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"epoch 2/2  acc \d+\.\d %  \d+ img/s  val accuracy \d+\.\d", shown), shown


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_numbers_that_are_not_finite_end_a_run(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grpo_rm, "cross_entropy_loss", not_finite_at(5, kind))
    flags = [*TRAIN, "--method", "finetune", "--log-every", "2", "--checkpoint-minutes", "0", "--output-dir", tmp_path]
    assert "the loss or the gradient is not finite at step 5" in stderr_of(capsys, train_cls.main, *flags, status=1)
    state = weights(tmp_path, "checkpoint.pt")
    assert state["step"] == 4 and all(value.isfinite().all() for value in state["policy"].values())
    assert read_log(tmp_path)[-1]["step"] == 4 and not (tmp_path / "backbone.pth").exists()


def test_a_huge_ratio_is_warned_of_once(tmp_path, capsys, before_steps):
    """An old policy that denies what the policy is sure of: ratios beyond 1e4."""
    before_steps(lambda at, policy, old_policy, *_: old_policy.head[2].bias.data.add_(torch.linspace(-6, 6, 10)))
    run(tmp_path, "--ratio-floor", "0", "--lr", "1e-6")
    assert all(line["max_ratio"] > 1e4 for line in steps_of(tmp_path))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "p/q" in line]
    assert line.startswith("warning: the ratio") and "--ratio-floor" in line


def test_a_policy_at_the_level_of_chance_is_warned_of_once(tmp_path, capsys):
    run(tmp_path, "--lr", "1e-9", "--epochs", "5", "--warmup-epochs", "1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: after epoch 3") and "--warmup-epochs" in line and "--lr" in line


@pytest.mark.parametrize(("flags", "warned"), [
    ("", 0), ("--batch-size 100", 1), ("--batch-size 100 --old-policy-every 5", 0), ("--old-policy-every 1", 1),
    ("--batch-size 100 --method finetune", 0),
])  # fmt: skip
def test_a_refresh_before_every_step_is_warned_of(flags, warned, tmp_path, capsys):
    run(tmp_path, "--epochs", "1", *flags.split())
    assert capsys.readouterr().err.count("the old policy is refreshed before every step") == warned


@pytest.mark.parametrize("method", ["grpo_rm", "finetune"])
def test_own_scenes_of_which_one_is_nothing_but_void(method, mask_folder, tmp_path):
    write_mask(mask_folder / "masks" / "train" / "0.png", np.full((40, 60), VOID))
    flags = [*TINY, *MAPS, "--dataset", "folder", "--data-root", str(mask_folder), "--backbone", "vit_tiny"]
    flags += ["--batch-size", "1", "--epochs", "1", "--log-every", "1", "--output-dir", str(tmp_path / "run")]
    train_seg.main([*flags, "--method", method])
    assert [line["accuracy"] == line["loss"] == 0 for line in steps_of(tmp_path / "run")].count(True) == 1
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    config = read_json(tmp_path / "run" / "config.json")
    assert (config["task"], config["background_penalty"], config["hidden_dim"]) == ("segmentation", 0.5, 256)
