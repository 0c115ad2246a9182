"""The evaluations against brute force, and their independence of the number of processes."""

import json
import os
import shutil
from collections import defaultdict

import pytest
import torch
from conftest import CLASSIFICATION, TINY, free_port, run_script, stderr_of

import eval_knn
import eval_linear
import train_cls
from data import EvalLoader, draw_shapes_split
from eval_knn import knn_predict
from eval_linear import fit_softmax_regression
from grpo_rm import class_tokens, init_world, load_backbone


def brute_force(train, labels, test, num_classes, k):
    """One neighbour at a time: votes first, then summed similarity."""
    predictions = []
    for x in test:
        similarity = [(torch.dot(x, y) / (x.norm() * y.norm())).item() for y in train]
        nearest = sorted(range(len(train)), key=lambda i: -similarity[i])[:k]
        votes = defaultdict(lambda: [0, 0.0])
        for i in nearest:
            votes[labels[i].item()][0] += 1
            votes[labels[i].item()][1] += similarity[i]
        predictions.append(max(votes, key=lambda label: tuple(votes[label])))
    return torch.tensor(predictions)


@pytest.mark.parametrize(("n", "m", "k", "chunk"), [(200, 37, 5, 1024), (200, 37, 5, 8), (3, 10, 5, 4), (50, 1, 1, 1), (60, 99, 20, 10)])
def test_knn_equals_brute_force(n, m, k, chunk, monkeypatch):
    generator = torch.Generator().manual_seed(n + k)
    train, test = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (n, m))
    labels = torch.randint(4, (n,), generator=generator)
    expected = brute_force(train, labels, test, 4, k)
    assert torch.equal(knn_predict(train, labels, test, num_classes=4, k=k, chunk=chunk), expected)
    monkeypatch.setattr(eval_knn, "BLOCK", 64)  # the training features in many blocks
    assert torch.equal(knn_predict(train, labels, test, num_classes=4, k=k, chunk=chunk), expected)


def test_knn_tie_goes_to_the_nearer_class():
    angles = torch.tensor([0.5, 0.1, 0.2, 0.4, 3.0])
    train = torch.stack([angles.cos(), angles.sin()], 1)
    labels = torch.tensor([0, 0, 1, 1, 2])
    test = torch.tensor([[1.0, 0.0]])
    # one of class 2; two of 0 at cos .5 + cos .1 = 1.873, two of 1 at cos .2 + cos .4 = 1.901
    assert knn_predict(train, labels, test, num_classes=3, k=5).tolist() == [1]
    assert knn_predict(train, labels, 100 * test, num_classes=3, k=5).tolist() == [1]


def test_knn_without_training_features_or_test_features():
    with pytest.raises(ValueError, match="at least one"):
        knn_predict(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.ones(1, 3), num_classes=2)
    labels = torch.zeros(2, dtype=torch.int64)
    assert knn_predict(torch.ones(2, 3), labels, torch.zeros(0, 3), num_classes=2).shape == (0,)


def test_softmax_regression_finds_the_optimum():
    """Against full-batch L-BFGS on the same convex problem, in float64."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 3, generator=generator, dtype=torch.float64)
    targets = (features @ torch.randn(3, 4, generator=generator, dtype=torch.float64)).argmax(1)
    targets = torch.where(torch.rand(300, generator=generator) < 0.3, torch.randint(4, (300,), generator=generator), targets)
    torch.set_default_dtype(torch.float64)
    try:
        recipe = dict(epochs=200, batch_size=300, lr=0.1, lr_end=1e-4, seed=0)
        layer = fit_softmax_regression(features, targets, 4, **recipe)
        again = fit_softmax_regression(features, targets, 4, **recipe)
        best = torch.nn.Linear(3, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(best(features), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    reached = torch.nn.functional.cross_entropy(layer(features), targets)
    assert reached.item() == pytest.approx(closure().item(), abs=1e-5)
    assert torch.equal(layer.weight, again.weight)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "shapes" / "grpo_rm" / "seed3"
    train_cls.main([*TINY, "--batch-size", "50", "--epochs", "1", "--seed", "3", "--output-dir", str(directory)])
    return directory


def test_results_know_their_run(finished_run):
    for module, name in ((eval_linear, "eval_linear.json"), (eval_knn, "eval_knn.json")):
        module.main([*TINY, "--weights", str(finished_run / "backbone.pth"), "--batch-size", "32"])
        result = json.loads((finished_run / name).read_text())
        assert (result["dataset"], result["method"], result["seed"]) == ("shapes", "grpo_rm", 3)
        assert (result["train_images"], result["val_images"]) == (100, 40)
        assert 0 <= result["top1"] <= 100 and result["top1"] * 40 / 100 == pytest.approx(round(result["top1"] * 40 / 100))


def test_frozen_baseline_is_the_backbone_training_starts_from(finished_run, tmp_path):
    """Same seed, same random vit_tiny: its k-NN equals that of the weights saved before any step."""
    eval_knn.main([*TINY, "--seed", "3", "--output", str(tmp_path / "frozen.json")])
    torch.manual_seed(3)
    torch.save(load_backbone("vit_tiny").state_dict(), tmp_path / "start.pth")
    eval_knn.main([*TINY, "--seed", "3", "--weights", str(tmp_path / "start.pth"), "--output", str(tmp_path / "start.json")])
    frozen, start = (json.loads((tmp_path / name).read_text()) for name in ("frozen.json", "start.json"))
    assert frozen["top1"] == start["top1"] and frozen["method"] == start["method"] == "frozen" and frozen["seed"] == 3


def test_evaluation_does_not_depend_on_the_number_of_processes(finished_run, tmp_path):
    for script in ("eval_linear.py", "eval_knn.py"):
        results = []
        for nproc in (1, 4):
            output = tmp_path / f"{script}{nproc}.json"
            arguments = (*TINY, "--weights", finished_run / "backbone.pth", "--batch-size", "16", "--output", output)
            done = run_script(script, *arguments, nproc=nproc)
            assert done.returncode == 0, done.stderr
            results.append(json.loads(output.read_text()) | {"output": None})
        assert results[0] == results[1]


def test_validation_images_never_train_the_linear_layer(monkeypatch, tmp_path):
    """The layer is fitted to the training features, and its score is that of the validation features."""
    seen = {}
    monkeypatch.setattr(eval_linear, "frozen_features", lambda *a: seen.setdefault("all", original(*a)))
    monkeypatch.setattr(eval_linear, "fit_softmax_regression", lambda f, t, *a, **k: seen.setdefault("fit", (f, t)) and fit(f, t, *a, **k))
    eval_linear.main([*TINY, "--epochs", "3", "--output", str(tmp_path / "result.json")])
    train, val, classes = seen["all"]
    assert torch.equal(seen["fit"][0], train[0]) and torch.equal(seen["fit"][1], train[1]) and len(train[0]) == 100
    layer = fit(*train, len(classes), epochs=3, batch_size=1024, lr=4e-3, lr_end=4e-5, seed=0)
    expected = (layer(val[0]).argmax(1) == val[1]).double().mean().item()
    assert json.loads((tmp_path / "result.json").read_text())["top1"] == pytest.approx(100 * expected)


original, fit = eval_linear.frozen_features, fit_softmax_regression


def ranks_extract(rank, size, port, directory):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = init_world("cpu")
    torch.manual_seed(0)
    loader = EvalLoader(draw_shapes_split(41, seed=0), CLASSIFICATION["shapes"], 42, 8, world, 1)
    torch.save(class_tokens(load_backbone("vit_tiny"), loader, "off", world), f"{directory}/{size}_{rank}.pth")
    if world.size > 1:
        torch.distributed.destroy_process_group()


def test_features_are_the_same_bits_on_any_number_of_processes(tmp_path):
    for size in (1, 2, 3, 4):
        torch.multiprocessing.spawn(ranks_extract, (size, free_port(), str(tmp_path)), nprocs=size)
    expected = torch.load(tmp_path / "1_0.pth", weights_only=True)
    assert expected[0].abs().amin(0).min() > 0 and expected[1].tolist() == [i % 10 for i in range(41)]
    for file in tmp_path.glob("[234]_*.pth"):
        features = torch.load(file, weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


def test_weights_of_a_run_can_be_a_baseline(finished_run, tmp_path):
    eval_knn.main([*TINY, "--weights", str(finished_run / "backbone.pth"), "--seed", "7", "--frozen", "--output", str(tmp_path / "k.json")])
    result = json.loads((tmp_path / "k.json").read_text())
    assert (result["method"], result["seed"]) == ("frozen", 7)


def test_weights_of_a_run_on_another_dataset_need_an_output(finished_run, image_folder, capsys):
    command = ["--dataset", "folder", "--data-root", image_folder, "--image-size", "42", "--device", "cpu"]
    command += ["--weights", finished_run / "backbone.pth"]
    assert "come from a run on another dataset" in stderr_of(capsys, eval_knn.main, *command)
    eval_knn.main([str(part) for part in [*command, "--output", finished_run / "other.json"]])
    assert json.loads((finished_run / "other.json").read_text())["method"] == "grpo_rm"


def test_weights_of_a_run_on_another_folder_need_an_output(image_folder, tmp_path, capsys):
    flags = ["--image-size", "42", "--device", "cpu", "--backbone", "vit_tiny", "--dataset", "folder", "--data-root"]
    train_cls.main([*flags, str(image_folder), "--batch-size", "6", "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    shutil.copytree(image_folder, tmp_path / "other")
    weights = ["--weights", str(tmp_path / "run" / "backbone.pth")]
    assert "come from a run on another dataset" in stderr_of(capsys, eval_knn.main, *flags, tmp_path / "other", *weights)
    eval_knn.main([*flags, os.path.relpath(image_folder), *weights])  # the same, by another name
    assert json.loads((tmp_path / "run" / "eval_knn.json").read_text())["data_root"] == str(image_folder)
