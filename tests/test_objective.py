"""The objective against a slow, obvious double loop, and the facts that can be derived on paper. All in float64."""

import itertools
import math
import shutil

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import grpo_rm
from grpo_rm import accuracy_reward, choose_groups, cross_entropy_loss, group_advantages, grpo_rm_loss, uniformity_reward

OPTIONS = [
    dict(uniformity=uniformity, weighting=weighting, ratio_floor=floor, background_penalty=penalty)
    for uniformity, weighting, floor, penalty in itertools.product(
        ["eq4", "eq5", "none"], ["uniform", "policy"], [0.0, 0.1], [0.0, 0.5]
    )
]

BOTH = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


def random_case(n=7, c=5, seed=0, scale=2.0, apart=0.3):
    """Logits, old logits near them, targets."""
    generator = torch.Generator().manual_seed(seed)
    old = scale * torch.randn(n, c, generator=generator, dtype=torch.float64)
    logits = old + apart * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits, old, torch.randint(c, (n,), generator=generator)


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def naive_loss(
    logits,
    old,
    targets,
    *,
    uniformity,
    weighting,
    ratio_floor,
    background_penalty,
    w_acc=1,
    w_uni=1,
    eps=0.2,
    ignore=255,
):
    """Eqs. (1) to (6) one number at a time, with quotients of probabilities as they are printed."""
    total, clipped, ratios, kl, entropy, hits, count = 0.0, 0, [], 0.0, 0.0, 0, 0
    for row, old_row, k in zip(logits.tolist(), old.tolist(), targets.tolist(), strict=True):
        if k == ignore:
            continue
        count += 1
        p, q, c = softmax(row), softmax(old_row), len(row)
        r = []
        for i in range(c):
            accuracy = c if i == k else 0
            if uniformity == "eq4":
                uniform = -q[i]
            elif uniformity == "eq5":
                uniform = q[k] if i == k else (1 - q[k]) / (c - 1) - q[i]
            else:
                uniform = 0
            r.append(w_acc * accuracy + w_uni * uniform - (background_penalty * c if i == 0 else 0))
        if weighting == "uniform":
            mean = sum(r) / c
            std = math.sqrt(sum((x - mean) ** 2 for x in r) / c)
            weight = [1 / c] * c
        else:
            mean = sum(qi * x for qi, x in zip(q, r, strict=True))
            std = math.sqrt(sum(qi * (x - mean) ** 2 for qi, x in zip(q, r, strict=True))) + 1e-4
            weight = q
        for i in range(c):
            A = (r[i] - mean) / std
            rho = p[i] / (q[i] + ratio_floor / c)
            inside = min(max(rho, 1 - eps), 1 + eps)
            total += weight[i] * min(rho * A, inside * A)
            clipped += (A > 0 and rho > 1 + eps) or (A < 0 and rho < 1 - eps)
            ratios.append(rho)
            kl += q[i] * math.log(q[i] / p[i])
            entropy -= p[i] * math.log(p[i])
        hits += row.index(max(row)) == k
    stats = {"clip_fraction": clipped / len(ratios), "mean_ratio": sum(ratios) / len(ratios), "max_ratio": max(ratios)}
    return -total / count, stats | {"kl": kl / count, "entropy": entropy / count, "accuracy": hits / count}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@BOTH
def test_loss_and_statistics_equal_the_double_loop(options, fused):
    logits, old, targets = random_case()
    targets[2] = 255
    expected, expected_stats = naive_loss(logits, old, targets, **options)
    loss, stats = grpo_rm_loss(logits, old, targets, fused=fused, **options)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, abs=1e-13)
    assert stats["loss"].item() == loss.item()
    for name, value in expected_stats.items():
        assert stats[name].item() == pytest.approx(value, abs=1e-12), name


@BOTH
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_gradcheck(options, fused):
    logits, old, targets = random_case(n=4, c=4)
    targets[1] = 255
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo_rm_loss(x, old, targets, fused=fused, **options)[0], (logits,))


def maps_case(seed=0, **options):
    """Maps (3, 5, 6, 4) in the layouts that heads give: contiguous, and with the classes last in memory."""
    logits, old, targets = random_case(n=3 * 6 * 4, seed=seed, **options)
    maps = [x.view(3, 6, 4, 5).permute(0, 3, 1, 2) for x in (logits, old)]
    return maps[0].contiguous(), maps[1], targets.view(3, 6, 4)


def with_voids(logits, old, targets):
    targets = targets.clone()
    targets[..., 1:3] = 255
    mask = (targets == 255).unsqueeze(1)
    return logits.masked_fill(mask, math.nan), old.masked_fill(mask, math.inf), targets


def with_extremes(logits, old, targets):
    """Ratios up to the clamp and beyond it, probabilities that underflow, ties for the largest logit."""
    logits, old = logits.clone(), old.clone()
    logits[0], old[0] = 400 * logits[0], -300 * old[0]
    logits[1], old[1] = 0, 1e5 * old[1]
    logits[2] = logits[2].round()
    return logits, old, targets


CASES = {
    "samples": random_case(n=9, apart=0.5),
    "void samples": with_voids(*random_case(n=9)),
    "all void": (*random_case(n=9)[:2], torch.full((9,), 255)),
    "no samples": random_case(n=0),
    "extreme": with_extremes(*random_case(n=9)),
    "no change": (lambda logits, old, targets: (old.clone(), old, targets))(*random_case(n=9)),
    "maps": maps_case(),
    "void pixels": with_voids(*maps_case()),
    "extreme maps": with_extremes(*maps_case()),
    "channels last": [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in with_voids(*maps_case())],
}


@pytest.mark.parametrize("numbers", [2**18, 20], ids=["one piece", "small pieces"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [(1, 1), (0, 1), (0.5, 3), (1, 0)], ids=str)
def test_fused_equals_plain(case, weights, numbers, monkeypatch):
    pieces = grpo_rm.batch_pieces
    monkeypatch.setattr(grpo_rm, "batch_pieces", lambda shape, _: pieces(shape, numbers))
    logits, old, targets = CASES[case]
    for options in OPTIONS:
        if weights[0] == 0 and (options["uniformity"] == "none" or "extreme" in case):
            continue  # all rewards of a group are equal: the sign of A is rounding
        results = []
        for fused in (True, False):
            x = logits.clone().requires_grad_()
            weighted = dict(accuracy_weight=weights[0], uniformity_weight=weights[1], fused=fused)
            loss, stats = grpo_rm_loss(x, old, targets, **weighted, **options)
            (loss / 7).backward()
            results.append(({"gradient": x.grad}, stats, loss.detach()))
        torch.testing.assert_close(*results, atol=1e-13, rtol=1e-12)


def test_pieces_are_small_and_cover_the_batch():
    for shape in ((1000, 21), (3, 1000), (5, 21, 8, 8), (5, 21, 3, 8), (2, 3, 7, 1)):
        seen = torch.zeros(shape)
        for piece in grpo_rm.batch_pieces(shape, 500):
            assert seen[piece].numel() <= max(500, shape[1] * (shape[3] if len(shape) == 4 else 1))
            seen[piece] += 1
        assert (seen == 1).all()


def test_fused_keeps_one_tensor_for_the_backward_pass():
    kept = []
    for case in (random_case(), maps_case()):
        logits, old, targets = case
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            grpo_rm_loss(logits.requires_grad_(), old, targets)
        assert [shape for shape in kept if shape.numel() > 1] == [logits.shape]
        kept.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_half_precision_is_rounded_once(dtype):
    """Also where the unscaled gradient is below fp16's smallest number: the scaler's factor comes first."""
    logits, old, targets = (x.to(dtype) if x.is_floating_point() else x for x in random_case())
    gradients = []
    for fused in (True, False):
        x = logits.clone().requires_grad_()
        (grpo_rm_loss(x, old, targets, fused=fused)[0] * 1e-9 * 65536).backward()
        gradients.append(x.grad)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


def test_gradient_equals_the_closed_form():
    """dL/dlogits_i = p_i sum_j w_j - w_i with w = m rho A / (N c), m = 1 where the unclipped branch is active."""
    logits, old, targets = random_case(n=50, c=9, apart=0.5)
    logits.requires_grad_()
    loss, stats = grpo_rm_loss(logits, old, targets)
    loss.backward()
    p, q = logits.detach().softmax(1), old.softmax(1)
    advantages = group_advantages(accuracy_reward(targets, 9) + uniformity_reward(q, targets))
    rho = p / q
    active = torch.where(advantages > 0, rho <= 1.2, rho >= 0.8)
    assert 0.05 < stats["clip_fraction"] < 0.95  # both branches are exercised
    w = active * rho * advantages / (50 * 9)
    torch.testing.assert_close(logits.grad, p * w.sum(1, keepdim=True) - w, atol=1e-15, rtol=1e-12)


@BOTH
def test_first_step_after_a_refresh(fused):
    """rho = 1 everywhere, loss 0, gradient exactly -A / (N c)."""
    logits, _, targets = random_case(n=20, c=10)
    logits.requires_grad_()
    loss, stats = grpo_rm_loss(logits, logits.detach().clone(), targets, fused=fused)
    loss.backward()
    q = logits.detach().softmax(1)
    advantages = group_advantages(accuracy_reward(targets, 10) + uniformity_reward(q, targets))
    assert stats["mean_ratio"] == stats["max_ratio"] == 1 and stats["clip_fraction"] == 0
    assert stats["kl"] == 0
    assert abs(loss.item()) < 1e-15
    torch.testing.assert_close(logits.grad, -advantages / 200, atol=1e-16, rtol=1e-12)


@BOTH
def test_old_logits_get_no_gradient(fused):
    logits, old, targets = random_case()
    logits.requires_grad_()
    old.requires_grad_()
    grpo_rm_loss(logits, old, targets, fused=fused)[0].backward()
    assert old.grad is None and logits.grad is not None


@pytest.mark.parametrize("c", [2, 3, 10, 1000])
def test_accuracy_reward_alone_gives_sqrt_c_minus_1(c):
    targets = torch.tensor([0, c - 1])
    advantages = group_advantages(accuracy_reward(targets, c).double())
    assert advantages[0, 0].item() == pytest.approx(math.sqrt(c - 1))
    assert advantages[0, 1].item() == pytest.approx(-1 / math.sqrt(c - 1))
    assert advantages[1, c - 1].item() == pytest.approx(math.sqrt(c - 1))


def test_two_classes_make_uniformity_irrelevant():
    _, old, _ = random_case(n=30, c=2)
    targets = torch.arange(30) % 2
    rewards = accuracy_reward(targets, 2) + uniformity_reward(old.softmax(1), targets)
    expected = 2 * torch.nn.functional.one_hot(targets, 2).double() - 1
    torch.testing.assert_close(group_advantages(rewards), expected)


def test_reward_statistics_in_closed_form():
    """Eqs. (3) + (4): mean (c - 1)/c, variance (c^2 - 2 c q_k + sum q^2)/c - mean^2."""
    c = 7
    _, old, targets = random_case(n=40, c=c)
    q = old.softmax(1)
    rewards = accuracy_reward(targets, c) + uniformity_reward(q, targets)
    mean = (c - 1) / c
    variance = (c**2 - 2 * c * q[torch.arange(40), targets] + q.square().sum(1)) / c - mean**2
    torch.testing.assert_close(rewards.mean(1), torch.full((40,), mean, dtype=torch.float64))
    torch.testing.assert_close(rewards.var(1, correction=0), variance)


def test_eq5_rewards_as_printed():
    q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    rewards = uniformity_reward(q, torch.tensor([1]), "eq5")
    torch.testing.assert_close(rewards, torch.tensor([[0.35 - 0.5, 0.3, 0.35 - 0.2]], dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("value", [1e3, 1e30, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_finite_for_any_finite_logits(value, options, fused):
    extreme = torch.tensor([[value, -value, 0.0], [-value, value, -value], [0.0, 0.0, 0.0]])
    for logits, old in itertools.product((extreme, -extreme, extreme.roll(1, 1), torch.zeros(3, 3)), repeat=2):
        logits = logits.clone().requires_grad_()
        loss, stats = grpo_rm_loss(logits, old, torch.tensor([0, 1, 2]), fused=fused, **options)
        loss.backward()
        assert loss.isfinite() and logits.grad.isfinite().all()
        assert all(value.isfinite() for value in stats.values())


@BOTH
def test_ignored_samples_leave_everything_untouched(fused):
    logits, old, targets = random_case(n=6)
    expected, expected_stats = grpo_rm_loss(logits, old, targets, fused=fused)
    void = torch.full((4, 5), torch.nan, dtype=torch.float64)
    more = (torch.cat([x, v]) for x, v in ((logits, void), (old, void), (targets, torch.full((4,), 255))))
    loss, stats = grpo_rm_loss(*more, fused=fused)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, expected_stats)


@BOTH
def test_all_ignored_is_zero_not_nan(fused):
    logits, old, _ = random_case()
    logits.requires_grad_()
    loss, stats = grpo_rm_loss(logits, old, torch.full((7,), 255), fused=fused)
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()
    assert all(value.isfinite() for value in stats.values())
    loss, stats = cross_entropy_loss(logits, torch.full((7,), 255))
    assert loss == 0 and stats["accuracy"] == 0


def test_class_255_is_a_class_when_asked():
    """ImageNet has a class 255; the default void label would drop it."""
    logits, old, _ = random_case(n=3, c=300)
    targets = torch.tensor([255, 255, 255])
    assert grpo_rm_loss(logits, old, targets)[0] == 0
    assert grpo_rm_loss(logits, old, targets, ignore_index=-100)[0] != 0


@BOTH
def test_maps_equal_their_pixels(fused):
    generator = torch.Generator().manual_seed(1)
    maps, old = (torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(4, (2, 3, 5), generator=generator)
    targets[0, 1] = 255
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 4) for x in (maps, old)]
    expected = grpo_rm_loss(*flat, targets.flatten(), background_penalty=0.5, fused=fused)
    torch.testing.assert_close(grpo_rm_loss(maps, old, targets, background_penalty=0.5, fused=fused), expected)


@BOTH
def test_half_precision_is_computed_in_float32(fused):
    logits, old, targets = (x.bfloat16() if x.is_floating_point() else x for x in random_case())
    loss, _ = grpo_rm_loss(logits, old, targets, fused=fused)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, grpo_rm_loss(logits.float(), old.float(), targets, fused=fused)[0])


def test_equal_rewards_give_zero_advantages():
    for constant in (0.0, 0.1, -3.7, 1000 / 3):
        assert (group_advantages(torch.full((2, 1000), constant)) == 0).all()


def test_ratio_floor_bounds_the_ratio():
    old = torch.tensor([[40.0, 0.0, 0.0, 0.0]])
    assert grpo_rm_loss(-old, old, torch.tensor([1]))[1]["max_ratio"] > 1e15
    assert grpo_rm_loss(-old, old, torch.tensor([1]), ratio_floor=0.1)[1]["max_ratio"] <= 4 / 0.1


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        dict(uniformity="eq6"),
        dict(weighting="half"),
        dict(targets=torch.zeros(3, dtype=torch.int64)),
        dict(old_logits=torch.zeros(7, 4)),
        dict(logits=torch.zeros(2, 4, 3, 5), old_logits=torch.zeros(2, 4, 3, 5), targets=torch.zeros(2, 5, 3, dtype=torch.int64)),
        dict(logits=torch.zeros(2, 4, 3, 5)),
    ],
    ids=["uniformity", "weighting", "targets", "old_logits", "transposed map", "map and no map"],
)
def test_bad_arguments_raise(change, fused):
    logits, old, targets = random_case()
    with pytest.raises(ValueError):
        grpo_rm_loss(**(dict(logits=logits, old_logits=old, targets=targets, fused=fused) | change))


def test_one_output_is_no_group():
    with pytest.raises(ValueError, match="G >= 2"):
        grpo_rm_loss(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64))


# Groups of some of the outputs


@pytest.mark.parametrize("shape", [(40,), (6, 5, 4)])
@pytest.mark.parametrize("size", [2, 4, 7])
def test_groups_hold_the_target_and_no_output_twice(shape, size):
    targets = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(0))
    targets.view(-1)[3] = -100
    order = torch.rand(shape[0], 7, generator=torch.Generator().manual_seed(1)).argsort(1)
    members = choose_groups(targets, order, size)
    assert members.shape == (shape[0], size, *shape[1:])
    rows, orders = members.movedim(1, -1).reshape(-1, size).tolist(), order.repeat_interleave(targets[0].numel(), 0).tolist()
    for row, target, first in zip(rows, targets.flatten().tolist(), orders, strict=True):
        target = max(target, 0)  # a void sample's group is of no account
        assert set(row) == {target, *[output for output in first if output != target][: size - 1]} and len(row) == size


@BOTH
@pytest.mark.parametrize("weighting", ["uniform", "policy"])
@pytest.mark.parametrize("maps", [False, True])
def test_a_group_of_some_outputs_against_a_loop(weighting, maps, fused):
    logits, old, targets = random_case(n=12, c=6, apart=0.5)
    targets[4] = 255
    members = choose_groups(targets.where(targets != 255, -100), torch.rand(12, 6).argsort(1), 3)
    options = dict(uniformity="eq5", background_penalty=0.5, ratio_floor=0.1, weighting=weighting)
    total, gradient = 0.0, torch.zeros_like(logits)
    p, q = (torch.softmax(x, 1) for x in (logits, old))
    for n in range(12):
        if n == 4:
            continue
        k, group = targets[n].item(), members[n].tolist()
        rewards = []
        for i in group:
            uniform = q[n, k] if i == k else (1 - q[n, k]) / 5 - q[n, i]
            rewards.append((6.0 if i == k else 0.0) + uniform.item() - (3.0 if i == 0 else 0.0))
        weights = [q[n, i].item() / sum(q[n, j].item() for j in group) if weighting == "policy" else 1 / 3 for i in group]
        mean = sum(w * r for w, r in zip(weights, rewards, strict=True))
        std = math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, rewards, strict=True))) + (1e-4 if weighting == "policy" else 0)
        for i, w, r in zip(group, weights, rewards, strict=True):
            ratio, advantage = p[n, i] / (q[n, i] + 0.1 / 6), (r - mean) / std
            total -= w / 11 * min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            if ratio * advantage <= ratio.clamp(0.8, 1.2) * advantage:  # dp_i/dlogits_j = p_i ([i = j] - p_j)
                slope = -w / 11 * advantage * ratio
                gradient[n] -= slope * p[n]
                gradient[n, i] += slope
    shape = (lambda x: x.view(3, 2, 2, -1).permute(0, 3, 1, 2)) if maps else (lambda x: x)
    leaf = logits.clone().requires_grad_()
    y = targets.view(3, 2, 2) if maps else targets
    loss, stats = grpo_rm_loss(shape(leaf), shape(old), y, members=shape(members), fused=fused, **options)
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), abs=1e-12)
    assert torch.allclose(leaf.grad, gradient, rtol=0, atol=1e-12)
    plain = grpo_rm_loss(shape(logits), shape(old), y, members=shape(members), fused=False, **options)[1]
    assert all(stats[name].item() == pytest.approx(plain[name].item(), abs=1e-12) for name in plain)


@BOTH
def test_a_group_of_all_outputs_in_any_order_is_the_default(fused):
    logits, old, targets = random_case(n=9, c=6)
    members = torch.rand(9, 6).argsort(1)
    for weighting in ("uniform", "policy"):
        one, other = (grpo_rm_loss(logits, old, targets, members=m, weighting=weighting, fused=fused) for m in (None, members))
        assert one[0].item() == pytest.approx(other[0].item(), abs=1e-13)
        assert all(one[1][name].item() == pytest.approx(other[1][name].item(), abs=1e-12) for name in one[1])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64, 30), {"uniformity": "eq5", "background_penalty": 0.5, "ignore_index": 3}),
        ((64, 30), {"weighting": "policy", "uniformity_weight": 0.3}),
        ((64, 30), {"members": 5, "uniformity": "none"}),
        ((2, 7, 12, 12), {"ratio_floor": 0.1, "ignore_index": 3}),
        ((2, 7, 12, 12), {"ratio_floor": 0.1, "background_penalty": 0.5, "channels_last": True}),
    ],
    ids=["Eq. (5)", "policy weighting", "part of the group", "maps", "channels last"],
)
def test_the_loss_compiles_into_one_or_two_kernels_each_way(shape, options):
    """With torch.compile's own backend, without a graph break; the same numbers as eager, and rho exactly 1 where q = p."""
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(shape, generator=generator, dtype=torch.float64)
    logits = old + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    options = dict(options)
    if options.pop("channels_last", False):  # as convolutions may leave them
        old, logits = (x.to(memory_format=torch.channels_last) for x in (old, logits))
    logits.requires_grad_()
    targets = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator)
    if "members" in options:
        order = torch.stack([torch.randperm(shape[1], generator=generator) for _ in range(len(old))])
        options["members"] = choose_groups(targets, order, options["members"])
    compiled = torch.compile(grpo_rm_loss, dynamic=False, fullgraph=True)

    def both(function):
        loss, stats = function(logits, old, targets, **options)
        return loss, stats, torch.autograd.grad(loss, logits)[0]

    found, code = run_and_get_code(both, compiled)
    assert len(code) == 2 and all(1 <= part.count("async_compile.cpp_pybinding(") <= 2 for part in code)
    torch.testing.assert_close(found, both(grpo_rm_loss), rtol=1e-12, atol=1e-15)
    loss, _ = compiled(logits, old, targets.clone().fill_(shape[1]), **options)
    assert loss.isnan()  # a target that is no class; eager code raises IndexError
    loss, stats = compiled(logits, logits.detach().clone(), targets)
    assert stats["max_ratio"] == stats["mean_ratio"] == 1 and abs(loss) < 1e-12
