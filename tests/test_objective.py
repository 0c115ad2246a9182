"""The objective against a slow, obvious double loop, and the facts that can be derived on paper; in float64 where not
said otherwise."""

import itertools
import math
import shutil

import pytest
import torch
from torch import nn

import grpo_rm
import train_cls
from grpo_rm import accuracy_reward, cross_entropy_loss, group_advantages, grpo_rm_loss, uniformity_reward

OPTIONS = [
    dict(uniformity=uniformity, ratio_floor=floor, background_penalty=penalty)
    for uniformity, floor, penalty in itertools.product(["eq4", "eq5", "none"], [0.0, 0.1], [0.0, 0.3])
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))


def random_case(n=7, c=5, seed=0, apart=0.5):
    """Logits, old logits near them, targets."""
    generator = torch.Generator().manual_seed(seed)
    old = 2 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    logits = old + apart * torch.randn(n, c, generator=generator, dtype=torch.float64)
    return logits, old, torch.randint(c, (n,), generator=generator)


def void_case(**options):
    """The same with two void samples, of which one would have an enormous ratio."""
    logits, old, targets = random_case(**options)
    logits[1, 0], old[1, 0], targets[1:3] = 50, -50, -100
    return logits, old, targets


def softmax(row):
    exponentials = [x.exp() for x in row]
    return [x / sum(exponentials) for x in exponentials]


def naive_loss(
    logits, old, targets, *, uniformity, ratio_floor, background_penalty,
    accuracy_weight=1, uniformity_weight=1, clip_eps=0.2,
):  # fmt: skip
    """Eqs. (1) to (6) one number at a time, with quotients of probabilities as they are printed."""
    total, clipped, ratios, kl, entropy, hits, count = 0, [], [], 0, 0, 0, 0
    for row, old_row, k in zip(logits, old, targets.tolist(), strict=True):
        if k == -100:
            continue
        count += 1
        p, q, c = softmax(row), [x.item() for x in softmax(old_row)], len(row)
        r = []
        for i in range(c):
            eq5 = q[k] if i == k else (1 - q[k]) / (c - 1) - q[i]
            uniform = {"eq4": -q[i], "eq5": eq5, "none": 0}[uniformity]
            background = background_penalty * c if i == 0 else 0
            r.append(accuracy_weight * (c if i == k else 0) + uniformity_weight * uniform - background)
        mean = sum(r) / c
        std = math.sqrt(sum((r[i] - mean) ** 2 for i in range(c)) / c)
        for i in range(c):
            A, rho = (r[i] - mean) / std, p[i] / (q[i] + ratio_floor / c)
            p_i, rho_i = p[i].item(), rho.item()
            inside = min(max(rho_i, 1 - clip_eps), 1 + clip_eps)
            total += 1 / c * (rho * A if rho_i * A <= inside * A else inside * A)
            clipped.append((A > 0 and rho_i > 1 + clip_eps) or (A < 0 and rho_i < 1 - clip_eps))
            ratios.append(rho_i)
            kl += q[i] * math.log(q[i] / p_i)
            entropy -= p_i * math.log(p_i)
        hits += row.argmax().item() == k
    stats = {"clip_fraction": sum(clipped) / len(ratios), "mean_ratio": sum(ratios) / len(ratios)}
    stats |= {"max_ratio": max(ratios), "kl": kl / count, "entropy": entropy / count, "accuracy": hits / count}
    return -total / count, stats


@every_option
@pytest.mark.parametrize("more", [{}, dict(accuracy_weight=0.7, uniformity_weight=3.0, clip_eps=0.05)], ids=len)
@pytest.mark.parametrize("c", [5, 2])
def test_loss_statistics_and_gradient_equal_the_double_loop(options, more, c):
    logits, old, targets = void_case(n=12, c=c, apart=1.0)
    x, y, old = (tensor.clone().requires_grad_() for tensor in (logits, logits, old))
    loss, stats = grpo_rm_loss(x, old, targets, **options, **more)
    loss.backward()
    expected, expected_stats = naive_loss(y, old, targets, **options, **more)
    expected.backward()
    assert loss.dtype == torch.float64 and stats["loss"] == loss and not stats["loss"].requires_grad
    assert loss.item() == pytest.approx(expected.item(), abs=1e-13)
    assert {name: stats[name].item() for name in expected_stats} == pytest.approx(expected_stats, abs=1e-12)
    torch.testing.assert_close(x.grad, y.grad, atol=1e-14, rtol=1e-12)
    assert old.grad is None  # nothing flows into the old policy
    inputs = logits.requires_grad_(), old.detach(), targets
    assert torch.autograd.gradcheck(lambda *x: grpo_rm_loss(*x, **options, **more)[0], inputs)  # finite differences


def test_first_step_after_a_refresh():
    """rho = 1 everywhere, the loss is 0, its gradient -A / (N c)."""
    _, old, targets = random_case(n=20, c=10)
    logits = old.clone().requires_grad_()
    loss, stats = grpo_rm_loss(logits, old, targets)
    loss.backward()
    advantages = group_advantages(accuracy_reward(targets, 10) + uniformity_reward(old.softmax(1), targets))
    assert (stats["max_ratio"], stats["clip_fraction"], stats["kl"]) == (1, 0, 0) and abs(loss) < 1e-14
    torch.testing.assert_close(logits.grad, -advantages / 200)


def test_rewards_as_printed():
    q, target = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([1])
    torch.testing.assert_close(accuracy_reward(target, 3), torch.tensor([[0.0, 3.0, 0.0]]))  # Eq. (3), float32
    expected = torch.tensor([[-(0.5**0.5), 2**0.5, -(0.5**0.5)]])  # -1/sqrt(c - 1), sqrt(c - 1)
    torch.testing.assert_close(group_advantages(accuracy_reward(target, 3)), expected)
    torch.testing.assert_close(uniformity_reward(q, target), -q)  # Eq. (4)
    torch.testing.assert_close(uniformity_reward(q, target, "eq5"), torch.tensor([[0.35 - 0.5, 0.3, 0.35 - 0.2]]))


@pytest.mark.parametrize("c", [2, 3, 10, 200])
@pytest.mark.parametrize("floor", [0.3, 1.0, 3.0])
def test_with_a_floor_it_is_cross_entropy_that_weighs_each_sample(c, floor):
    """Right after a refresh, where all wrong classes are clipped: A_k/c times the gradient of -log(p_k + F/c), which is
    cross-entropy's times p_k/(p_k + F/c). Each of m wrong classes that are not clipped adds at most about 1/(c - 1)."""
    generator = torch.Generator().manual_seed(c)
    logits = torch.randn(200, c, generator=generator, dtype=torch.float64)
    logits *= torch.linspace(0.1, 10, 200)[:, None]  # from unsure to sure
    targets = torch.randint(c, (200,), generator=generator)
    targets[::2] = logits[::2].argmax(1)
    p_k = logits.softmax(1).gather(1, targets[:, None])[:, 0]
    A_k = math.sqrt(c - 1)  # with the accuracy reward alone

    def gradients(losses):
        return torch.autograd.grad(losses.sum(), x)[0]

    x = logits.clone().requires_grad_()
    found = gradients(200 * grpo_rm_loss(x, logits, targets, uniformity="none", ratio_floor=floor)[0])
    weighted = A_k / c * gradients(-torch.log(x.softmax(1).gather(1, targets[:, None]) + floor / c))
    cross_entropy = gradients(nn.functional.cross_entropy(x, targets, reduction="none"))
    torch.testing.assert_close(weighted, A_k / c * (p_k / (p_k + floor / c))[:, None] * cross_entropy)
    wrong = nn.functional.one_hot(targets, c) == 0
    unclipped = ((logits.softmax(1) >= 4 * floor / c) & wrong).sum(1)  # m, of each sample
    exact = unclipped == 0
    assert exact.any() and exact.all() == (4 * floor >= c)
    torch.testing.assert_close(found[exact], weighted[exact], rtol=1e-12, atol=1e-16)
    difference = (found - weighted).norm(dim=1) / (A_k / c * math.sqrt(2))  # of what one sample can pull
    assert (difference <= unclipped / (c - 1) + 1e-12).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7, 1000 / 3])
def test_equal_rewards_give_no_advantage(constant):
    """Such a group says nothing about its outputs; what is left of the mean is rounding."""
    assert (group_advantages(torch.full((2, 1000), constant)) == 0).all()


@every_option
@pytest.mark.parametrize("value", [1e3, 1e38, torch.finfo(torch.float32).max])
def test_finite_for_any_finite_logits(options, value):
    """In float32, and where many samples are extreme at once."""
    rows = torch.tensor([[value, -value, 0.0], [-value, value, -value], [0.0, 0.0, 0.0]])
    pairs = list(itertools.product((rows, -rows, rows.roll(1, 1), torch.zeros(3, 3)), repeat=2))
    logits, old = (torch.cat([pair[i] for pair in pairs]).repeat(100, 1) for i in range(2))
    loss, stats = grpo_rm_loss(logits.requires_grad_(), old, torch.arange(len(old)) % 3, **options)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all() and torch.stack(list(stats.values())).isfinite().all()


def test_cross_entropy_is_the_mean_over_samples_that_are_not_ignored():
    logits, _, targets = void_case()
    valid = targets != -100
    loss, stats = cross_entropy_loss(logits, targets)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits[valid], targets[valid]))
    assert stats["loss"] == loss and stats["accuracy"] == (logits.argmax(1) == targets)[valid].float().mean()


def test_all_ignored_is_zero_not_nan():
    logits, old, _ = random_case()
    logits.requires_grad_()
    targets = torch.full((7,), -100)
    for loss, stats in (grpo_rm_loss(logits, old, targets), cross_entropy_loss(logits, targets)):
        assert loss == 0 and (torch.autograd.grad(loss, logits)[0] == 0).all()
        assert stats["accuracy"] == 0 and all(value.isfinite() for value in stats.values())


def test_255_is_a_class_unless_asked():
    """ImageNet has a class 255; void is torch's own -100."""
    logits, old, _ = random_case(n=3, c=300)
    targets = torch.tensor([255, 255, 255])
    assert grpo_rm_loss(logits, old, targets)[0] != 0 != cross_entropy_loss(logits, targets)[0]
    assert grpo_rm_loss(logits, old, targets, ignore_index=255)[0] == 0
    assert cross_entropy_loss(logits, targets, ignore_index=255)[0] == 0


def test_maps_equal_their_pixels():
    pixels = void_case(n=2 * 3 * 4)
    logits, old = (x.view(2, 3, 4, 5).movedim(-1, 1) for x in pixels[:2])
    targets = pixels[2].view(2, 3, 4)
    found, expected = (
        grpo_rm_loss(*case, background_penalty=0.5, ratio_floor=0.1) for case in ((logits, old, targets), pixels)
    )
    torch.testing.assert_close(found, expected)
    found, expected = (cross_entropy_loss(*case) for case in ((logits, targets), pixels[::2]))
    torch.testing.assert_close(found, expected)


def test_half_precision_is_computed_in_float32():
    logits, old, targets = random_case()
    logits, old = logits.bfloat16().requires_grad_(), old.bfloat16()
    loss, _ = grpo_rm_loss(logits, old, targets)
    assert loss.dtype == torch.float32 and torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16
    assert loss == grpo_rm_loss(logits.float(), old.float(), targets)[0]


@pytest.mark.parametrize("change", [
    dict(uniformity="eq6"),
    dict(targets=torch.zeros(3, dtype=torch.int64)),
    dict(old_logits=torch.zeros(7, 4)),
    dict(logits=torch.zeros(2, 4, 3, 5), old_logits=torch.zeros(2, 4, 3, 5), targets=torch.zeros(2, 5, 3).long()),
    dict(logits=torch.zeros(7, 1), old_logits=torch.zeros(7, 1)),
], ids=["uniformity", "targets", "old_logits", "transposed map", "one output"])  # fmt: skip
def test_bad_arguments_raise(change):
    logits, old, targets = random_case()
    with pytest.raises(ValueError, match=r"choose|logits, old_logits, targets"):
        grpo_rm_loss(**(dict(logits=logits, old_logits=old, targets=targets) | change))


def test_what_is_edited_in_accuracy_reward_trains(monkeypatch):
    """There is no second form of the objective: an edit changes the loss that training takes."""
    loss_function, case = grpo_rm.make_loss(train_cls.parse_args([])), random_case(apart=0)
    before, _ = loss_function(*case)
    monkeypatch.setattr(grpo_rm, "accuracy_reward", lambda targets, c: accuracy_reward((targets + 1) % c, c))
    assert abs(loss_function(*case)[0] - before) > 1e-4


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_equals_eager():
    """Without a graph break; and rho is exactly 1 where q = p."""
    torch._dynamo.reset()
    logits, old, targets = void_case(n=2 * 6 * 8, c=30)
    logits, old = (x.view(2, 6, 8, 30).permute(0, 3, 1, 2) for x in (logits, old))
    targets = targets.view(2, 6, 8)
    logits.requires_grad_()
    compiled = torch.compile(grpo_rm_loss, dynamic=False, fullgraph=True)

    def run(function, old):
        loss, stats = function(logits, old, targets, background_penalty=0.5)
        return stats, torch.autograd.grad(loss, logits)

    torch.testing.assert_close(run(compiled, old), run(grpo_rm_loss, old), rtol=1e-12, atol=1e-15)
    assert run(compiled, logits.detach().clone())[0]["max_ratio"] == 1
