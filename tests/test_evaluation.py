"""The evaluations against brute force, what they say about their run, and that processes do not change a digit."""

import argparse
import contextlib
import json
import os
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, TINY, in_processes, read_json, read_log, stderr_of
from PIL import Image

import data
import eval_knn
import eval_linear
import train_cls
import train_seg
from common import features
from common.backbone import Encoder, load_backbone
from common.demo import SHAPES
from common.features import PatchTokens, class_tokens
from common.images import palette
from common.loader import VOID, Loader
from data import load_splits
from eval_knn import knn_predict
from eval_linear import confusion_matrix, fit_softmax_regression, predict, segmentation_scores

SHORT = ["--device", "cpu", "--workers", "1", "--epochs", "2", "--backbone", "vit_tiny"]
SCENES = "--dataset shapes_seg --image-size 28 --map-size 8 --limit-train 40 --limit-val 40".split()


def recipe(**settings):
    """How a linear layer is trained, as fit_softmax_regression and fit_segmenter take it."""
    return argparse.Namespace(fit_seed=0, **settings)


# Classification


def brute_force(train, labels, test, k):
    """One neighbour at a time: votes first, then summed similarity."""
    predictions = []
    for x in test:
        similarity = [(torch.dot(x, y) / (x.norm() * y.norm())).item() for y in train]
        votes = defaultdict(lambda: [0, 0.0])
        for i in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            votes[labels[i].item()][0] += 1
            votes[labels[i].item()][1] += similarity[i]
        predictions.append(max(votes, key=lambda label: tuple(votes[label])))
    return predictions


@pytest.mark.parametrize(("n", "m", "k", "chunk"), [(200, 37, 5, 999), (200, 37, 5, 8), (50, 1, 1, 1), (60, 99, 9, 10)])
def test_knn_equals_brute_force(n, m, k, chunk):
    generator = torch.Generator().manual_seed(n + k)
    train, test = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (n, m))
    labels = torch.randint(4, (n,), generator=generator)
    predictions = knn_predict(train, labels, test, num_classes=4, k=k, chunk=chunk)
    assert predictions.tolist() == brute_force(train, labels, test, k)


def test_knn_tie_goes_to_the_nearer_class():
    angles, labels = torch.tensor([0.5, 0.1, 0.2, 0.4, 3.0]), torch.tensor([0, 0, 1, 1, 2])
    train, test = torch.stack([angles.cos(), angles.sin()], 1), torch.tensor([[1.0, 0.0]])
    # one of class 2; two of 0 at cos .5 + cos .1 = 1.873, two of 1 at cos .2 + cos .4 = 1.901
    assert knn_predict(train, labels, 100 * test, num_classes=3, k=5).tolist() == [1]
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k is {k}, but there are 5 training features"):
            knn_predict(train, labels, test, num_classes=3, k=k)


def test_softmax_regression_finds_the_optimum():
    """The problem is convex: where the gradient is zero."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 3, generator=generator)
    targets = (features @ torch.randn(3, 4, generator=generator)).argmax(1)
    noise = torch.randint(4, (300,), generator=generator)
    targets = torch.where(torch.rand(300, generator=generator) < 0.3, noise, targets)
    args = recipe(epochs=200, batch_size=300, lr=0.1, lr_end=1e-4)
    layer, again = (fit_softmax_regression(features, targets, 4, args) for _ in range(2))
    gradients = torch.autograd.grad(F.cross_entropy(layer(features), targets), list(layer.parameters()))
    assert max(gradient.abs().max() for gradient in gradients) < 1e-4
    assert torch.equal(layer.weight, again.weight)


# What a result says


def test_frozen_baseline_is_the_backbone_training_starts_from(tmp_path, monkeypatch):
    """Same seed, same random vit_tiny: its k-NN equals that of the weights saved before any step."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    torch.save(load_backbone("vit_tiny").state_dict(), "start.pth")
    eval_knn.main([*TINY, "--seed", "3"])
    eval_knn.main([*TINY, "--seed", "3", "--weights", "start.pth", "--output", "start.json"])
    eval_knn.main([*TINY, "--seed", "4", "--output", "other.json"])
    frozen = read_json(tmp_path / "runs" / "shapes" / "frozen" / "seed3" / "eval_knn.json")
    start, other = (read_json(tmp_path / name) for name in ("start.json", "other.json"))
    assert frozen["top1"] == start["top1"] != other["top1"]
    assert frozen["method"] == start["method"] == "frozen" and (frozen["seed"], frozen["weights"]) == (3, None)


def test_weights_of_a_run_are_evaluated_on_its_dataset(image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "copy")
    folder, own, shapes = ["--dataset", "folder", "--data-root"], tmp_path / "own", tmp_path / "shapes"
    run = "--device cpu --image-size 28 --backbone vit_tiny --batch-size 9 --epochs 1 --seed 3 --output-dir".split()
    train_cls.main([*folder, str(image_folder), *run, str(own)])
    train_cls.main(["--limit-train", "18", "--limit-val", "9", *run, str(shapes)])
    expected = {"dataset": "folder", "data_root": str(image_folder), "train_images": 18, "image_size": 28, "seed": 3}
    for same in ([], ["--dataset", "folder"], [*folder, os.path.relpath(image_folder)]):
        eval_knn.main(["--device", "cpu", "--weights", str(own / "backbone.pth"), *same])
        assert expected.items() <= read_json(own / "eval_knn.json").items()
        (own / "eval_knn.json").unlink()

    flags = ["--device", "cpu", "--limit-train", "9", "--limit-val", "9", "--weights", str(shapes / "backbone.pth")]
    config = read_json(shapes / "config.json") | {"data_root": "datasets"}  # drawn sets of older runs have one
    (shapes / "config.json").write_text(json.dumps(config))
    eval_knn.main(flags)
    assert {"dataset": "shapes", "image_size": 28}.items() <= read_json(shapes / "eval_knn.json").items()
    copy = [*flags[:-1], str(own / "backbone.pth"), *folder, str(tmp_path / "copy")]
    for other in ([*flags, *folder, str(image_folder)], copy):
        assert "come from a run on another dataset" in stderr_of(capsys, eval_knn.main, *other)
        eval_knn.main([*other, "--image-size", "28", "--output", str(tmp_path / "other.json")])
        assert read_json(tmp_path / "other.json")["method"] == "grpo_rm"
    (shapes / "config.json").write_text('{"dataset": "cifar10", "model_type": "dinov2"}')  # of somebody else
    eval_knn.main([*flags, "--output", str(tmp_path / "other.json")])
    assert {"dataset": "shapes", "method": "frozen"}.items() <= read_json(tmp_path / "other.json").items()


@pytest.mark.parametrize("dataset", ["shapes", "shapes_seg"])
def test_validation_images_never_train_the_layer(dataset, tmp_path):
    """Other validation images, the same layer; other training images, another layer."""
    layers = []
    for train, val in (("20", "4"), ("20", "9"), ("21", "4")):
        flags = [*SHORT, "--dataset", dataset, "--image-size", "28", "--limit-train", train, "--limit-val", val]
        eval_linear.main([*flags, "--output", str(tmp_path / "eval_linear.json")])
        layer = torch.load(tmp_path / "linear.pth", weights_only=True)
        layers.append(torch.cat([value.flatten().double() for value in layer.values()]))
    assert torch.equal(layers[0], layers[1]) and not torch.equal(layers[0], layers[2])


def test_every_class_is_counted(tmp_path):
    """What the layer that was written says of the validation images."""
    flags = [*SHORT, "--image-size", "28", "--limit-train", "50", "--limit-val", "9"]
    eval_linear.main([*flags, "--output", str(tmp_path / "other.json")])
    layer, result = torch.nn.Linear(96, 10), read_json(tmp_path / "other.json")
    layer.load_state_dict(torch.load(tmp_path / "other.pth", weights_only=True))
    features, targets = class_tokens(encoder_of_seed_0(), drawn("shapes", 9, part=1), 9)
    confusion = confusion_matrix(layer(features).argmax(1), targets, 10).numpy()
    assert np.array_equal(result["confusion"], confusion)
    assert result["top1"] == pytest.approx(100 * confusion.trace() / 9, abs=1e-4)
    accuracies = result["per_class_accuracy"]
    assert list(accuracies) == list(SHAPES) and None in accuracies.values()  # 9 images cannot be of 10 classes
    for row, k, accuracy in zip(confusion, range(10), accuracies.values(), strict=True):
        assert accuracy == (pytest.approx(100 * row[k] / row.sum(), abs=1e-4) if row.any() else None)


# Segmentation


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_counting_pixel_by_pixel(seed):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, 5, (4, 9, 7)), rng.integers(0, 6, (4, 9, 7))  # class 6 is in neither
    prediction[rng.random(truth.shape) < 0.5] = truth[0, 0, 0]
    truth[rng.random(truth.shape) < 0.1] = VOID
    tp, fp, fn = ([0] * 7 for _ in range(3))
    for t, p in zip(truth.flat, prediction.flat, strict=True):
        if t != VOID:
            tp[t] += t == p
            fn[t] += t != p
            fp[p] += t != p
    confusion = confusion_matrix(torch.tensor(prediction), torch.tensor(truth), 7)
    assert confusion.dtype == torch.int64 and confusion.sum() == sum(tp) + sum(fn)
    assert confusion[1, 2] == ((truth == 1) & (prediction == 2)).sum()  # rows truth, columns prediction
    each = [tp[c] / (tp[c] + fp[c] + fn[c]) if tp[c] + fp[c] + fn[c] else None for c in range(7)]
    present = [iou for iou in each if iou is not None]
    scores = segmentation_scores(confusion)
    assert scores.pop("per_class_iou") == [None if iou is None else pytest.approx(iou) for iou in each]
    counted = {"pixel_acc": sum(tp) / (sum(tp) + sum(fn)), "miou": sum(present) / len(present)}
    assert scores == pytest.approx(counted | {"iou": sum(tp) / (sum(tp) + sum(fp) + sum(fn))}) and len(present) == 6


def test_scores_without_any_pixel_are_zero():
    scores = segmentation_scores(torch.zeros(3, 3, dtype=torch.int64))
    assert scores == {"pixel_acc": 0.0, "iou": 0.0, "miou": 0.0, "per_class_iou": [None, None, None]}


def drawn(dataset, count, world=CPU, part=0):
    """A loader of so many drawn images, 28 pixels wide, of the training (0) or validation (1) split; maps have 12."""
    args = argparse.Namespace(dataset=dataset, data_root=None, image_size=28, map_size=12, workers=1, seed=0)
    data.resolve_dataset(args, "classification", "segmentation")
    split = load_splits(dataset, None, args.task, download=False)[part]
    return Loader(data.limit(split, count), args, world)


def encoder_of_seed_0():
    """Of the class tokens that the evaluations compute without weights and seed."""
    torch.manual_seed(0)
    return Encoder(load_backbone("vit_tiny"), "x_norm_clstoken", "off")


def tokens_of(layers=1, world=CPU, count=37):
    torch.manual_seed(0)
    return PatchTokens(load_backbone("vit_tiny"), drawn("shapes_seg", count, world), layers, "off")


def test_kept_and_recomputed_tokens_give_the_same_layer(monkeypatch):
    """All tokens kept, those of the first chunk alone, none; and of images that workers decode."""
    args, layers = recipe(epochs=2, batch_size=20, lr=1e-2, lr_end=1e-3), []
    chunk_bytes = 16 * (96 * 2 * 2 * 4 + 2 * 12 * 12)
    for room, kept, streamed in ((2**30, 37, 0), (2 * chunk_bytes - 1, 16, 0), (0, 0, 0), (2**30, 37, 1), (0, 0, 1)):
        monkeypatch.setattr("common.features.memory_share", lambda world, share, room=room: room)
        monkeypatch.setattr("common.loader.memory_share", lambda world, share, room=2**30 * (1 - streamed): room)
        source = tokens_of()
        assert (source.loader.resident is None) == streamed
        assert source.kept == kept
        layers.append(eval_linear.fit_segmenter(source, 11, args).state_dict())
    for other in layers[1:]:
        torch.testing.assert_close(layers[0], other, rtol=1e-4, atol=1e-5)
    assert layers[0]["1.weight"].abs().max() > 0.02  # has learned: it starts from a deviation of 0.01


def test_tokens_are_kept_in_the_precision_of_amp():
    torch.manual_seed(0)
    source = PatchTokens(load_backbone("vit_tiny"), drawn("shapes_seg", 20), 1, "bf16")
    ((features, masks),) = source.batches([torch.tensor([3, 19])])
    assert source.features.dtype == torch.bfloat16 and (features.dtype, masks.dtype) == (torch.float32, torch.int64)
    ((exact, same_masks),) = tokens_of(count=20).batches([torch.tensor([3, 19])])
    assert torch.equal(masks, same_masks) and (masks == -100).any() and torch.allclose(features, exact, atol=0.05)


def test_predict_averages_probabilities():
    torch.manual_seed(0)
    logits = [3 * torch.randn(5, side, side) for side in (4, 5, 7)]
    maps = [F.interpolate(x[None], size=(33, 47), mode="bilinear")[0] for x in logits]
    assert torch.equal(predict(logits, (33, 47)), sum(x.softmax(0) for x in maps).argmax(0))
    assert torch.equal(predict(logits[:1], (33, 47)), maps[0].argmax(0))
    assert not torch.equal(predict(logits, (33, 47)), sum(maps).argmax(0))


@pytest.mark.parametrize(("features", "name"), [("linear", "linear"), ("multiscale", "linear_multiscale")])
def test_images_are_scored_at_the_size_of_their_masks(features, name, mask_folder, tmp_path, monkeypatch):
    """The result against predictions made here, image by image, scale by scale, each with its mirror image."""
    monkeypatch.chdir(tmp_path)
    flags = [*SHORT, "--dataset", "folder", "--data-root", str(mask_folder), "--image-size", "56", "--map-size", "8"]
    flags += ["--features", features]
    eval_linear.main([*flags, "--save-images", "2"])
    directory = Path("runs/folder/frozen/seed0")
    result, confusion, found = read_json(directory / f"eval_{name}.json"), 0, []
    split = load_splits("folder", mask_folder, "segmentation", download=False)[1]
    layers = 1 if features == "linear" else 4
    segmenter = torch.nn.Sequential(torch.nn.BatchNorm2d(96 * layers), torch.nn.Conv2d(96 * layers, 3, 1)).eval()
    segmenter.load_state_dict(torch.load(directory / f"{name}.pth", weights_only=True))
    backbone = encoder_of_seed_0().backbone
    sides = [56] if features == "linear" else [56, 70, 98]  # 56 * 1.32 and 56 * 1.73 in whole patches
    loader = Loader(split, argparse.Namespace(**result, workers=0), CPU, sides=sides)
    ((*scaled, _),) = loader.fetch([torch.arange(4)])
    masks = [split.read(i)[1] for i in range(4)]
    assert [tuple(x.shape) for x in scaled] == [(4, 3, side, side) for side in sides]
    for i, mask in enumerate(masks):
        total = 0
        for x in scaled:
            for mirrored in (False, True) if features == "multiscale" else (False,):
                with torch.no_grad():
                    tokens = backbone.get_intermediate_layers(x.flip(3) if mirrored else x, n=layers, reshape=True)
                    logits = segmenter(torch.cat(tokens, 1))[i : i + 1]
                logits = logits.flip(3) if mirrored else logits
                total = total + F.interpolate(logits, size=mask.shape, mode="bilinear")[0].softmax(0)
        found.append(total.argmax(0))
        confusion = confusion + confusion_matrix(found[-1], torch.tensor(mask), 3)
    scores = segmentation_scores(confusion)
    assert result["val_pixels"] == confusion.sum() == sum((mask != VOID).sum() for mask in masks)
    assert all(result[name] == pytest.approx(100 * scores[name], abs=1e-4) for name in ("pixel_acc", "iou", "miou"))
    assert list(result["per_class_iou"]) == ["sky", "road", "car"]
    assert (result["method"], result["features"]) == ("frozen", features)
    saved = directory / f"eval_{name}_images"
    files = [f"{i:06d}_{kind}.png" for i in (0, 3) for kind in ("image", "prediction", "truth")]
    assert sorted(path.name for path in saved.iterdir()) == files
    for kind, labels in (("prediction", found[3]), ("truth", masks[3])):
        with Image.open(saved / f"000003_{kind}.png") as image:
            assert image.mode == "P" and np.array_equal(image, labels)
    with Image.open(saved / "000003_image.png") as image:
        assert np.array_equal(image, split.read(3)[0])
    (saved / "000001_mine.png").touch()
    eval_linear.main([*flags, "--save-images", "1"])  # leaves no picture of before, and what is not its own
    assert sorted(path.name for path in saved.iterdir()) == [*files[:3], "000001_mine.png"]


def test_palette_is_vocs():
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    colours = palette().tolist()
    assert all(tuple(colours[i]) == colour for i, colour in (expected | {255: (224, 224, 192)}).items())
    assert len({*map(tuple, colours)}) == 256


STAGES = {
    "knn": (eval_knn, TINY),
    "linear": (eval_linear, [*TINY, "--epochs", "5"]),
    "multiscale": (eval_linear, [*SHORT, *SCENES, "--features", "multiscale"]),
}


def run_stages(world, directory):
    """Class tokens, and patch tokens kept and, but for 16 images, computed anew, with targets and masks; then the
    scripts."""
    found = [*class_tokens(encoder_of_seed_0(), drawn("shapes", 50, world), 16)]
    for room in (2**30, 30000 * 16):
        features.memory_share = lambda world, share, room=room: room
        (batch,) = tokens_of(1, world).batches([torch.arange(36, -1, -1)])
        found += batch
    torch.save(found, f"{directory}/{world.rank} of {world.size}.pth")
    with open(f"{directory}/{world.rank} of {world.size}.txt", "w") as file, contextlib.redirect_stdout(file):
        for name, (module, flags) in STAGES.items():
            module.main.__wrapped__([*flags, "--batch-size", "16", "--output", f"{directory}/{name}{world.size}.json"])
        run = ["--batch-size", "20", "--lr", "1e-3", "--output-dir", f"{directory}/run{world.size}"]
        train_seg.main.__wrapped__([*SHORT, *SCENES, *run])


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stages")
    for size in (1, 2):
        in_processes(run_stages, size, str(directory))
    return directory


def test_features_are_the_same_bits_on_two_processes(stages):
    expected, *others = (torch.load(stages / f"{x}.pth", weights_only=True) for x in ("0 of 1", "0 of 2", "1 of 2"))
    assert [len(part) for part in expected] == [50, 50, 37, 37, 37, 37]
    assert all(part.flatten(1).abs().amax(1).min() > 0 for part in expected if part.dim() > 1)
    for found in others:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(expected[3], expected[5])
    torch.testing.assert_close(expected[2], expected[4])


@pytest.mark.parametrize("name", STAGES)
def test_evaluations_are_the_same_on_one_and_two_processes(name, stages):
    one, two = (read_json(stages / f"{name}{size}.json") for size in (1, 2))
    assert one == two and one["val_images"] == 40


def test_segmentation_trains_on_two_processes(stages):
    one, two = (read_log(stages / f"run{size}")[-1] for size in (1, 2))
    assert one.pop("event") == two.pop("event") and two == pytest.approx(one, rel=0.01, abs=1e-6)
    assert 0 <= two["val_miou"] <= two["val_pixel_acc"] <= 100
    assert read_json(stages / "run2" / "config.json")["world_size"] == 2
    assert (stages / "0 of 2.txt").read_text().count("epoch 2/2") == 1 and not (stages / "1 of 2.txt").read_text()
