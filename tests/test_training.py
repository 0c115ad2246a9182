"""Algorithm 1: the old policy, the schedule, processes and pieces, checkpoints and resuming."""

import argparse
import functools
import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import CLASSIFICATION, CPU, TINY, free_port, stderr_of
from torch._dynamo.backends.distributed import DDPOptimizer

import checkpoint
import grpo_rm
import train_cls
from checkpoint import Meter, means, read_log
from data import InputError, TrainLoader, draw_shapes_split
from grpo_rm import (
    ClassificationHead,
    Policy,
    VitTiny,
    World,
    copy_policy,
    forward_macs,
    init_world,
    learning_rate,
    load_backbone,
    train,
    training_step,
)


def arguments(*extra: str) -> argparse.Namespace:
    args = train_cls.parse_args([*TINY, "--batch-size", "40", "--lr", "1e-3", "--epochs", "2", "--log-every", "2", *extra])
    grpo_rm.resolve_training_arguments(args, CPU, **train_cls.PAPER)
    return args


def run(directory, *extra: str) -> None:
    base = ["--batch-size", "40", "--lr", "1e-3", "--epochs", "4", "--log-every", "1", "--output-dir", str(directory)]
    train_cls.main([*TINY, *base, *extra])


def without_speed(events):
    return [{k: v for k, v in event.items() if k not in ("images_per_s", "seconds", "peak_memory_gb")} for event in events]


def small_policy(seed: int = 0) -> Policy:
    torch.manual_seed(seed)
    return Policy(VitTiny(), ClassificationHead(96, 10, 32)).double()


class DoubleLoader(TrainLoader):
    """float64 images, so that processes and pieces can be compared beyond float32's rounding."""

    def epoch(self, epoch, start=0):
        for images, targets in super().epoch(epoch, start):
            yield images.double(), targets


def train_in_double(directory: str, world: World, *extra: str) -> None:
    """Two epochs of three steps, the last of 3 samples: some ranks and pieces are empty."""
    args = arguments("--output-dir", directory, *extra)
    loader = DoubleLoader(draw_shapes_split(83, seed=0), CLASSIFICATION["shapes"], 42, 40, world, 1, seed=3, augment=args.augment == "default")
    train(small_policy(), loader, dict, args, world)


def rank_of_several(rank: int, size: int, port: int, directory: str, *extra: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    train_in_double(directory, init_world("cpu"), *extra)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("size", "pieces", "flags"), [(4, 1, ()), (2, 1, ("--group-size", "4")), (2, 2, ("--method", "finetune"))])
def test_processes_and_accumulation_change_nothing(size, pieces, flags, tmp_path):
    common = ("--ratio-floor", "0", *flags)
    train_in_double(str(tmp_path / "one"), CPU, *common)
    train_in_double(str(tmp_path / "pieces"), CPU, *common, "--grad-accum", "5")
    start = (size, free_port(), str(tmp_path / "processes"), *common, "--grad-accum", str(pieces))
    torch.multiprocessing.spawn(rank_of_several, start, nprocs=size)
    expected = torch.load(tmp_path / "one" / "backbone.pth", weights_only=True)
    start = small_policy().backbone.state_dict()
    assert any((expected[name] - start[name]).abs().max() > 1e-4 for name in start)
    for name in ("pieces", "processes"):
        torch.testing.assert_close(torch.load(tmp_path / name / "backbone.pth", weights_only=True), expected, atol=1e-9, rtol=1e-9)
        for event, other in zip(*(without_speed(read_log(tmp_path / run / "log.jsonl")) for run in ("one", name)), strict=True):
            assert event.pop("event") == other.pop("event")
            assert event == pytest.approx(other, rel=1e-7, abs=1e-12)


def one_step(policy, old_policy, args, scaler=None):
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(40, 3, 42, 42, generator=generator, dtype=next(policy.parameters()).dtype)
    targets = torch.arange(40) % 10
    meter = Meter()
    meter.add(training_step(policy, old_policy, optimizer, scaler, images, targets, args, CPU))
    return means(meter.read())


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_ratio_is_exactly_one_at_the_first_step_after_a_refresh(amp):
    policy, old_policy = small_policy().float(), small_policy(seed=1).float()
    args = arguments("--ratio-floor", "0", "--amp", amp)
    assert one_step(policy, old_policy, args)["mean_ratio"] != 1
    copy_policy(old_policy, policy)
    stats = one_step(policy, old_policy, args)
    assert stats["mean_ratio"] == stats["max_ratio"] == 1
    assert stats["clip_fraction"] == stats["kl"] == 0 and abs(stats["loss"]) < 1e-7
    assert one_step(policy, old_policy, args)["max_ratio"] > 1  # the policy moved, the old one did not


def test_the_old_policy_stays_behind_between_refreshes(tmp_path, monkeypatch):
    """Seen from outside: it changes exactly at the refreshes, and then equals the policy."""
    seen = []
    original = grpo_rm.training_step

    def spy(model, old_policy, *rest):
        same = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), old_policy.state_dict().values(), strict=True))
        seen.append((same, id(old_policy), sum(p.double().sum().item() for p in old_policy.parameters())))
        assert not any(p.requires_grad or p.grad is not None for p in old_policy.parameters())
        return original(model, old_policy, *rest)

    monkeypatch.setattr(grpo_rm, "training_step", spy)
    run(tmp_path / "epoch", "--epochs", "2")  # 3 steps an epoch
    assert [same for same, _, _ in seen] == [True, False, False] * 2
    assert len({identity for _, identity, _ in seen}) == 1  # allocated once
    assert seen[0][2] == seen[1][2] == seen[2][2] != seen[3][2]
    seen.clear()
    run(tmp_path / "steps", "--epochs", "2", "--old-policy-every", "2")
    assert [same for same, _, _ in seen] == [True, False] * 3


@pytest.mark.parametrize("extra", [(), ("--grad-accum", "4"), ("--amp", "bf16"), ("--old-policy-every", "1")], ids=str)
def test_the_old_policy_does_not_run_right_after_a_refresh(extra, tmp_path, monkeypatch):
    """And not a bit changes by that."""
    run(tmp_path / "skipped", "--epochs", "2", *extra)
    original, steps, forwards = grpo_rm.training_step, [], []

    def spy(model, old_policy, *rest):
        *rest, fresh, order = rest
        steps.append(fresh)
        counting = old_policy.register_forward_hook(lambda *_: forwards.append(fresh))
        sums = original(model, old_policy, *rest, False, order)
        counting.remove()
        return sums

    monkeypatch.setattr(grpo_rm, "training_step", spy)
    run(tmp_path / "all", "--epochs", "2", *extra)
    assert steps == ([True] * 6 if "--old-policy-every" in extra else [True, False, False] * 2) and len(forwards) >= 6
    for name in ("backbone.pth", "head.pth"):
        skipped, whole = (torch.load(tmp_path / d / name, weights_only=True) for d in ("skipped", "all"))
        assert all(torch.equal(skipped[key], whole[key]) for key in whole)
    logs = [read_log(tmp_path / d / "log.jsonl") for d in ("skipped", "all")]
    assert without_speed(logs[0]) == without_speed(logs[1])


def test_a_fresh_old_policy_is_not_asked():
    class Silent(torch.nn.Module):
        def forward(self, images):
            raise AssertionError

    args = arguments("--ratio-floor", "0")
    optimizer = torch.optim.Adam((policy := small_policy()).parameters(), fused=True)
    images, targets = torch.ones(4, 3, 42, 42, dtype=torch.float64), torch.arange(4)
    sums = training_step(policy, Silent(), optimizer, torch.amp.GradScaler("cpu", enabled=False), images, targets, args, CPU, True)
    assert sums["mean_ratio"] == sums["samples"] == 4  # rho = 1


def test_compiled_policies_share_their_code(tmp_path, monkeypatch):
    """So rho is exactly 1 after a refresh; names, resuming and, up to rounding, the result are those of a plain run."""
    compile_, original, same = torch.nn.Module.compile, grpo_rm.training_step, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="aot_eager", **options))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    grpo_rm.compiled_loss.cache_clear()

    def spy(model, old_policy, optimizer, scaler, images, targets, args, world, fresh, order):
        if fresh:
            same.append(torch.equal(old_policy(images), model(images)))
        return original(model, old_policy, optimizer, scaler, images, targets, args, world, fresh, order)

    run(tmp_path / "plain", "--epochs", "2")
    monkeypatch.setattr(grpo_rm, "training_step", spy)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(tmp_path / "whole", "--epochs", "2", "--compile")
    assert same == [True, True]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # policies and loss; batches of 40 images and, at the end, of 20
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    same.clear()
    run(tmp_path / "recomputed", "--epochs", "2", "--compile", "--recompute-activations")
    assert same == [True, True] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    run(tmp_path / "parts", "--epochs", "2", "--compile", "on", "--max-steps", "4")
    run(tmp_path / "parts", "--epochs", "2", "--compile", "--resume")
    for name in ("backbone.pth", "head.pth"):
        plain, whole, parts = (torch.load(tmp_path / d / name, weights_only=True) for d in ("plain", "whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
        torch.testing.assert_close(whole, plain, atol=1e-3, rtol=0)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["compile"] is True
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["compile"] is False  # auto, on a CPU
    grpo_rm.compiled_loss.cache_clear()


def compiled_rank(rank: int, port: int, directory: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    module_compile, cuts = torch.nn.Module.compile, []
    torch.nn.Module.compile = lambda self, **options: module_compile(self, backend="aot_eager", **options)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    cut = DDPOptimizer.compile_fn
    DDPOptimizer.compile_fn = lambda self, *graph: cuts.append(rank) or cut(self, *graph)
    run(directory, "--compile", "on", "--workers", "1", "--max-steps", "2")
    Path(directory, f"cuts{rank}.json").write_text(json.dumps(cuts))


def test_processes_compile_the_whole_policy(tmp_path):
    """Cut for DDP's buckets, its code would not be the old policy's, nor, were that compiled first, that of a resumed run."""
    torch.multiprocessing.spawn(compiled_rank, (free_port(), str(tmp_path)), nprocs=2)
    assert [json.loads((tmp_path / f"cuts{rank}.json").read_text()) for rank in range(2)] == [[], []]


def test_multiply_accumulates_by_hand():
    T, D, patch = 26, 96, 14  # tokens of a 70-pixel image, width
    block = 4 * D * D * T + 2 * 4 * D * D * T + 2 * T * T * D  # query, key, value and output; the MLP; attention
    expected = 25 * 3 * patch**2 * D + 4 * block + D * 32 + 32 * 10
    assert forward_macs(small_policy(), 70) == expected


def test_learning_rate():
    rates = [learning_rate(step, 100, 10, 1.0, 0.01) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0 and rates[99] == pytest.approx(0.01)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(54, 100, 10, 1.0, 0.0) == pytest.approx((1 + math.cos(math.pi * 44 / 89)) / 2)
    assert learning_rate(0, 1, 0, 1.0, 0.01) == 1.0


def test_defaults_are_the_papers():
    args = train_cls.parse_args(["--dataset", "tiny_imagenet"])
    grpo_rm.resolve_training_arguments(args, CPU, **train_cls.PAPER)
    assert (args.lr, args.lr_end, args.batch_size, args.epochs, args.hidden_dim) == (4e-3, 4e-5, 1024, 100, 256)
    assert (args.clip_eps, args.uniformity, args.accuracy_weight, args.uniformity_weight) == (0.2, "eq4", 1, 1)
    assert (args.image_size, args.backbone, args.ratio_floor) == (70, "dinov2_vits14", 0.1)
    assert args.output_dir == "runs/tiny_imagenet/grpo_rm/seed0"


def test_head_factor_and_gradient_clipping(monkeypatch, tmp_path):
    rates = []
    monkeypatch.setattr(grpo_rm, "training_step", lambda m, o, optimizer, *rest: rates.append(
        [group["lr"] for group in optimizer.param_groups]) or {k: torch.ones((), dtype=torch.float64) for k in
        ("samples", "images", "loss", "accuracy", "grad_norm")})
    run(tmp_path, "--method", "finetune", "--head-lr-factor", "10", "--epochs", "1")
    assert all(head == pytest.approx(10 * backbone) for backbone, head in rates)


def test_gradient_norm_clipping():
    class Keep(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):  # leave the gradients for the test to see
            pass

    def gradient_norm(*flags):
        policy = small_policy()
        meter = Meter()
        optimizer = Keep(policy.parameters(), lr=0.0, fused=True)
        images, targets = torch.ones(10, 3, 42, 42, dtype=torch.float64), torch.arange(10)
        args = arguments("--method", "finetune", *flags)
        meter.add(training_step(policy, None, optimizer, torch.amp.GradScaler("cpu", enabled=False), images, targets, args, CPU))
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
        return means(meter.read())["grad_norm"], norm

    logged, kept = gradient_norm()
    assert logged == pytest.approx(kept) and kept > 0.1
    clipped_logged, clipped = gradient_norm("--max-grad-norm", "0.05")
    assert clipped_logged == pytest.approx(logged)  # logged before clipping
    assert clipped == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("extra", [(), ("--old-policy-every", "5"), ("--method", "finetune")], ids=["grpo_rm", "refresh5", "finetune"])
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(extra, tmp_path):
    run(tmp_path / "whole", *extra)
    for stop in ("3", "7", "7", "2", "8"):  # 3 steps an epoch: at an epoch's end, within one, twice the same, and one long past
        run(tmp_path / "parts", *extra, "--max-steps", stop, "--resume")
    run(tmp_path / "parts", *extra, "--resume")
    for name in ("backbone.pth", "head.pth"):
        whole, parts = (torch.load(tmp_path / d / name, weights_only=True) for d in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    logs = [read_log(tmp_path / d / "log.jsonl") for d in ("whole", "parts")]
    assert without_speed(logs[0]) == without_speed(logs[1])
    assert [e["step"] for e in logs[0] if e["event"] == "step"] == list(range(1, 13))


def test_lines_after_the_checkpoint_are_not_doubled(tmp_path):
    run(tmp_path, "--max-steps", "6")
    with open(tmp_path / "log.jsonl", "a") as file:  # what a process wrote before it was killed
        file.write(json.dumps({"event": "step", "epoch": 2, "step": 7, "loss": 9.0}) + "\n" + '{"event": "st')
    run(tmp_path, "--resume")
    steps = [event["step"] for event in read_log(tmp_path / "log.jsonl") if event["event"] == "step"]
    assert steps == list(range(1, 13))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    run(tmp_path / "whole")
    run(tmp_path / "parts", "--max-steps", "6")
    newest = tmp_path / "parts" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    capsys.readouterr()
    run(tmp_path / "parts", "--resume")
    assert f"warning: {newest} does not load" in capsys.readouterr().err
    whole, parts = (torch.load(tmp_path / d / "backbone.pth", weights_only=True) for d in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    run(tmp_path, "--max-steps", "3")
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full_disk(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full_disk)
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path, "--resume")
    assert exit_.value.code == 2
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*tmp"))


def test_checkpoints_within_an_epoch_come_by_the_clock(tmp_path, monkeypatch):
    saved = []
    original = checkpoint.Run.save
    monkeypatch.setattr(checkpoint.Run, "save", lambda self, step: saved.append(step) or original(self, step))
    run(tmp_path / "often", "--epochs", "1", "--checkpoint-minutes", "0")
    assert saved == [1, 2, 3, 3, 3]  # and at the epoch's end, before its validation and after it
    saved.clear()
    run(tmp_path / "seldom", "--epochs", "1")
    assert saved == [3, 3]


def test_what_a_run_leaves_behind(tmp_path):
    run(tmp_path)
    names = {"config.json", "log.jsonl", "checkpoint.pt", "checkpoint_previous.pt", "backbone.pth", "head.pth"}
    assert {path.name for path in tmp_path.iterdir()} == names
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["method"] == "grpo_rm" and config["ratio_floor"] == 0.1 and config["torch_version"] == torch.__version__
    assert config["world_size"] == 1 and config["device_name"] == "cpu" and "git_commit" in config
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {line["event"] for line in lines} == {"step", "epoch"}
    needed = {"epoch", "step", "loss", "lr", "images_per_s", "accuracy", "clip_fraction", "mean_ratio", "max_ratio", "kl", "entropy", "grad_norm"}
    assert all(needed <= line.keys() for line in lines)
    assert "val_accuracy" in lines[-1] and lines[-1]["event"] == "epoch"
    load_backbone("vit_tiny", weights=str(tmp_path / "backbone.pth"))


def test_numbers_without_a_name_in_json_become_null():
    assert json.loads(checkpoint.to_json({"a": math.inf, "b": math.nan, "c": 1.5})) == {"a": None, "b": None, "c": 1.5}


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(grpo_rm, "cross_entropy_loss", lambda logits, *a, **k: (logits.sum() * math.nan, {"loss": logits.sum().detach() * math.nan, "accuracy": logits.sum().detach()}))
    arguments = [*TINY, "--method", "finetune", "--log-every", "1", "--output-dir", tmp_path]
    assert "the loss is not finite at step 1" in stderr_of(capsys, train_cls.main, *arguments, status=1)


def test_a_huge_ratio_is_warned_of_once(tmp_path, capsys, monkeypatch):
    """The objective to the letter and an old policy that denies what the policy is sure of: ratios beyond 1e4."""
    original = grpo_rm.training_step

    def spy(model, old_policy, *rest):
        with torch.no_grad():
            old_policy.head.layers[-1].bias.add_(torch.linspace(-6, 6, 10))
        return original(model, old_policy, *rest)

    monkeypatch.setattr(grpo_rm, "training_step", spy)
    run(tmp_path, "--ratio-floor", "0", "--lr", "1e-6", "--epochs", "2")
    ratios = [event["max_ratio"] for event in read_log(tmp_path / "log.jsonl") if event["event"] == "step"]
    assert [ratio > 1e4 for ratio in ratios] == [False, True, True] * 2  # right after a refresh the old policy does not run
    assert capsys.readouterr().err.count("warning: the ratio p/q reached") == 1


def test_fp16_scaler_is_part_of_the_checkpoint(tmp_path):
    run(tmp_path, "--amp", "fp16", "--epochs", "1")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["scaler"]["scale"] > 1
    assert state["old_policy"].keys() == state["policy"].keys()


def test_random_layers_are_off_in_both_policies():
    """A backbone with dropout: policy and old policy still agree exactly after a refresh."""

    class Noisy(VitTiny):
        def forward_features(self, images):
            features = super().forward_features(images)
            return {name: torch.nn.functional.dropout(x, 0.5, self.training) for name, x in features.items()}

    grpo_rm_vit, grpo_rm.VitTiny = grpo_rm.VitTiny, Noisy
    try:
        policy = Policy(load_backbone("vit_tiny"), ClassificationHead(96, 10))
    finally:
        grpo_rm.VitTiny = grpo_rm_vit
    old_policy = Policy(Noisy().eval(), ClassificationHead(96, 10))
    copy_policy(old_policy, policy)
    assert one_step(policy, old_policy, arguments("--ratio-floor", "0"))["max_ratio"] == 1


def test_a_checkpoint_of_other_classes_is_refused(image_folder, tmp_path, capsys):
    command = ["--dataset", "folder", "--data-root", image_folder, "--image-size", "42", "--backbone", "vit_tiny", "--device", "cpu"]
    command += ["--batch-size", "9", "--epochs", "1", "--output-dir", tmp_path / "run"]
    train_cls.main([str(part) for part in command])
    capsys.readouterr()
    (image_folder / "train" / "class3").mkdir()
    (image_folder / "train" / "class0" / "0.jpg").rename(image_folder / "train" / "class3" / "0.jpg")
    assert "the training images or the classes are not those" in stderr_of(capsys, train_cls.main, *command, "--resume")


def ranks_that_differ(rank: int, port: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu")
    order = []
    for turn in range(2):  # rank 0 first, also when it fails
        try:
            with grpo_rm.one_rank_first(world):
                order.append(len(os.listdir(directory)))
                open(f"{directory}/{turn}_{rank}", "w").close()
                if turn == 1:
                    raise InputError("no such thing")
        except InputError:
            order.append(-1)
        torch.distributed.barrier()
    assert order == ([0, 2, -1] if rank == 0 else [1, 3, -1]), order
    split = draw_shapes_split(9, seed=0)
    state = {"step": 3, "epoch_sums": {}, "lr": 0.1, "log_lines": 0, "ranks": [{"window": {}, "seconds": 0.0}], "data": {"images": 9, "classes": split.classes}}
    args = argparse.Namespace(output_dir=f"{directory}/rank{rank}", resume=True, lr=0.1, timeout_minutes=1)
    os.makedirs(args.output_dir)
    if rank == 0:
        torch.save(state | {"args": vars(args)}, f"{args.output_dir}/checkpoint.pt")
    with pytest.raises(InputError, match="all nodes must see one directory"):
        checkpoint.Run(args, world, TrainLoader(split, CLASSIFICATION["shapes"], 42, 3, world, 1, seed=0, augment=False)).start()
    torch.distributed.destroy_process_group()


def test_ranks_take_turns_and_must_find_the_same_checkpoint(tmp_path):
    torch.multiprocessing.spawn(ranks_that_differ, (free_port(), str(tmp_path)), nprocs=2)


def test_a_group_of_all_classes_is_the_default_bit_for_bit(tmp_path, capsys):
    for name, size in (("default", []), ("all", ["--group-size", "10"]), ("some", ["--group-size", "4"])):
        run(tmp_path / name, "--epochs", "2", *size)
    default, everything, some = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("default", "all", "some"))
    assert all(torch.equal(default[key], everything[key]) for key in default)
    assert not all(torch.equal(default[key], some[key]) for key in default)
    assert "--group-size 11 must be at least 2 and at most the number of classes, 10" in stderr_of(
        capsys, train_cls.main, *TINY, "--batch-size", "50", "--group-size", "11", "--output-dir", tmp_path / "none"
    )


def test_recomputed_activations_change_nothing_but_memory(tmp_path):
    images, held, gradients = torch.randn(64, 3, 42, 42), [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        backbone = VitTiny()
        if recompute:
            grpo_rm.recompute_activations(backbone)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            output = backbone(images)
        held.append(sum(kept))
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)) and held[1] < held[0] / 2
    for name, flags in (("kept", []), ("recomputed", ["--recompute-activations"])):
        run(tmp_path / name, "--epochs", "2", *flags)  # the old policy is a copy, and has blocks of its own
    one, other = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("kept", "recomputed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_old_policy_can_be_kept_in_bf16(tmp_path, monkeypatch, capsys):
    original, dtypes, apart = grpo_rm.training_step, [], []

    def spy(model, old_policy, optimizer, scaler, images, *rest):
        dtypes.append({parameter.dtype for parameter in old_policy.backbone.parameters()} | {next(old_policy.head.parameters()).dtype})
        sums = original(model, old_policy, optimizer, scaler, images, *rest)
        apart.append((sums["mean_ratio"] / sums["samples"] - 1).abs().item())
        return sums

    monkeypatch.setattr(grpo_rm, "training_step", spy)
    flags = ["--amp", "bf16", "--old-policy-dtype", "bf16", "--ratio-floor", "0", "--lr", "1e-6", "--epochs", "2"]
    run(tmp_path / "whole", *flags)
    assert dtypes == [{torch.bfloat16, torch.float32}] * 6
    assert apart[0] == apart[3] == 0 and 0 < max(apart) < 0.02  # right after a refresh its logits are the policy's own
    run(tmp_path / "parts", *flags, "--max-steps", "2")
    run(tmp_path / "parts", *flags, "--resume")
    whole, parts = (torch.load(tmp_path / name / "backbone.pth", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    capsys.readouterr()
    error = stderr_of(capsys, train_cls.main, *TINY, "--batch-size", "50", "--old-policy-dtype", "bf16", "--output-dir", tmp_path / "none")
    assert "--old-policy-dtype bf16 goes with --amp bf16, not with off" in error
