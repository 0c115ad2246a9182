"""Segmentation: label maps value by value, real layouts, the head and its chunks, scores against counting, the stages."""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, SEGMENTATION, run_script, stderr_of, write_image
from PIL import Image
from torch.profiler import ProfilerActivity, profile

import data
import eval_knn
import eval_linear
import grpo_rm
import train_cls
import train_seg
from data import IGNORE, VOID, InputError, SceneLoader, TrainLoader, draw_scenes_split, flip_scenes, fraction, load_splits, resize_mask
from eval_linear import LinearSegmenter, SceneFeatures, class_logits, fit_segmenter, patch_tokens, predict, upsampled_cross_entropy
from grpo_rm import SegmentationHead, World, confusion_matrix, cross_entropy_loss, grpo_rm_loss, load_backbone, segmentation_scores

SCENES = ["--device", "cpu", "--workers", "1", "--limit-train", "40", "--limit-val", "20", "--map-size", "28", "--image-size", "56"]


def rank(r: int, size: int) -> World:
    return World(r, r, size, torch.device("cpu"))


# Data sets


def write_mask(path: Path, labels, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    if mode == "P":
        image = data.palette_image(np.asarray(labels, dtype=np.uint8))
    (image if mode in ("L", "P") else image.convert(mode)).save(path)


def labels_of(size: tuple[int, int], low: int, high: int, seed: int) -> np.ndarray:
    """Random labels in low..high-1, of an image `size` (width, height)."""
    return np.random.default_rng(seed).integers(low, high, size[::-1])


@pytest.fixture
def voc(tmp_path) -> Path:
    home = tmp_path / "VOCdevkit" / "VOC2012"
    for split, names in {"train": ["2007_000032", "2007_000039", "2007_000063"], "val": ["2007_000033", "2007_000042"]}.items():
        (home / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (home / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            size = (50 + i, 37)
            mask = labels_of(size, 0, 21, i)
            mask[:3] = VOID
            write_image(home / "JPEGImages" / f"{name}.jpg", i, size)
            write_mask(home / "SegmentationClass" / f"{name}.png", mask, "P")
    return tmp_path


@pytest.fixture
def ade20k(tmp_path) -> Path:
    home = tmp_path / "ADEChallengeData2016"
    for part, count in (("training", 3), ("validation", 2)):
        for i in range(count):
            name, size = f"ADE_{part}_{i:08d}", (40, 30 + i)
            write_image(home / "images" / part / f"{name}.jpg", i, size)
            write_mask(home / "annotations" / part / f"{name}.png", labels_of(size, 0, 151, i))
    names = ["wall", "building, edifice", *(f"thing{i}" for i in range(3, 151))]
    lines = ["Idx\tRatio\tTrain\tVal\tName", *(f"{i}\t0.1\t1\t1\t{name}" for i, name in enumerate(names, 1))]
    (home / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def coco(tmp_path) -> Path:
    for part, count in (("train2017", 3), ("val2017", 2)):
        for i in range(count):
            size = (182, 4 + i)
            mask = np.tile(np.arange(182), (size[1], 1))  # every id
            mask[0, :9] = VOID
            write_image(tmp_path / part / f"{i:012d}.jpg", i, size, "L" if i else "RGB")
            write_mask(tmp_path / "stuffthingmaps" / part / f"{i:012d}.png", mask)
    return tmp_path


@pytest.fixture
def scene_folder(tmp_path) -> Path:
    """A folder set of 3 classes: 6 training and 4 validation scenes of several sizes."""
    root = tmp_path / "scenes"
    for part, count in (("train", 6), ("val", 4)):
        for i in range(count):
            size = (60 + i, 40)
            mask = np.zeros(size[::-1], np.uint8)
            mask[:, 20:40], mask[:, 40:], mask[:2] = 1, 2, VOID
            write_image(root / "images" / part / f"{i}.{'jpg' if i else 'png'}", i, size)
            write_mask(root / "masks" / part / f"{i}.png", mask, "P" if i % 2 else "L")
    (root / "classes.txt").write_text("sky\nroad\n\ncar\n")
    return root


def test_coco_labels_value_by_value():
    """Things 0-90 without the eleven that were never annotated, stuff 91-181, void; nothing else."""
    dropped = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    following = 0
    for label in range(256):
        got = data.COCO_TABLE[label]
        if label in dropped or label == 255:
            assert got == VOID, label
        elif label < 182:
            assert got == following, label
            following += 1
        else:
            assert got == -1, label
    assert following == 171 == len(data.COCO_CLASSES) == len(set(data.COCO_CLASSES))
    names = {label: data.COCO_CLASSES[data.COCO_TABLE[label]] for label in (0, 10, 12, 43, 89, 91, 105, 168, 181)}
    assert names == {0: "person", 10: "fire hydrant", 12: "stop sign", 43: "bottle", 89: "toothbrush", 91: "banner", 105: "clouds", 168: "tree", 181: "wood"}


def test_voc_and_ade20k_labels_value_by_value():
    for label in range(256):
        assert data.VOC_TABLE[label] == (label if label < 21 or label == 255 else -1)
        assert data.ADE20K_TABLE[label] == (VOID if label == 0 else label - 1 if label <= 150 else -1)
    assert len(data.VOC_CLASSES) == 21 and data.VOC_CLASSES[0] == "background" and data.VOC_CLASSES[15] == "person"


def test_voc_layout(voc):
    train, val = load_splits("voc2012", str(voc))
    assert (len(train), len(val), len(train.classes)) == (3, 2, 21)
    image, mask = train.read(1)
    expected = labels_of((51, 37), 0, 21, 1)
    expected[:3] = VOID
    assert image.mode == "RGB" and image.size == (51, 37) and mask.dtype == np.uint8
    assert np.array_equal(mask, expected)  # the palette's indices, not its colours


def test_ade20k_layout(ade20k):
    train, val = load_splits("ade20k", str(ade20k))
    assert (len(train), len(val), len(train.classes), train.classes[:3]) == (3, 2, 150, ["wall", "building", "thing3"])
    raw = labels_of((40, 31), 0, 151, 1)
    assert np.array_equal(train.read(1)[1], np.where(raw == 0, VOID, raw - 1))
    (ade20k / "ADEChallengeData2016" / "objectInfo150.txt").unlink()
    assert load_splits("ade20k", str(ade20k))[0].classes[149] == "class 150"


def test_coco_stuff_layout(coco):
    train, val = load_splits("coco_stuff", str(coco))
    assert (len(train), len(val), len(train.classes)) == (3, 2, 171)
    image, mask = val.read(1)
    assert image.mode == "RGB" and np.array_equal(mask[1], data.COCO_TABLE[:182]) and (mask[0, :9] == VOID).all()


def test_scene_folder_with_and_without_names(scene_folder):
    train, val = load_splits("folder", str(scene_folder))
    assert train.classes == val.classes == ["sky", "road", "car"] and (len(train), len(val)) == (6, 4)
    assert sorted(np.unique(train.read(0)[1])) == [0, 1, 2, VOID]
    (scene_folder / "classes.txt").unlink()
    assert load_splits("folder", str(scene_folder))[0].classes == ["class 0", "class 1", "class 2"]


def spoil(root: Path, harm: str) -> None:
    images, masks = root / "images" / "train", root / "masks" / "train"
    good = np.zeros((40, 62), np.uint8)
    if harm == "no mask":
        (masks / "3.png").unlink()
    elif harm == "no image":
        (images / "3.jpg").unlink()
    elif harm == "size":
        write_mask(masks / "2.png", np.zeros((40, 61)))
    elif harm == "label":
        good[5, 5] = 3
        write_mask(masks / "2.png", good)
    elif harm == "rgb":
        write_mask(masks / "2.png", good, "RGB")
    elif harm == "broken":
        (masks / "2.png").write_bytes(b"\x89PNG broken")
    elif harm == "empty":
        shutil.rmtree(root / "images" / "val")
        shutil.rmtree(root / "masks" / "val")
    elif harm == "jpeg":
        Image.open(masks / "2.png").convert("L").save(masks / "2.jpg")
        (masks / "2.png").unlink()
    elif harm == "rgb, no names":
        (root / "classes.txt").unlink(missing_ok=True)
        for file in [*masks.iterdir(), *(root / "masks" / "val").iterdir()]:
            write_mask(file, np.zeros((40, 60)), "RGB")
    elif harm == "binary":
        for file in masks.iterdir():
            write_mask(file, np.where(np.asarray(Image.open(file)) == 1, VOID, 0))
    elif harm == "void":
        for file in (root / "masks" / "val").iterdir():
            write_mask(file, np.full_like(np.asarray(Image.open(file)), VOID))
    elif harm == "names":
        (root / "classes.txt").write_text("sky\n")
    elif harm == "twice":
        (root / "classes.txt").write_text("sky\nroad\nsky\n")
    elif harm == "coding":
        (root / "classes.txt").write_bytes("Stra\u00dfe\nsky\nroad\n".encode("latin-1"))
    elif harm == "suffix":
        write_image(images / "3.png", 3, (63, 40))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("no mask", "train/3.jpg has no mask"),
        ("no image", "train/3.png has no image"),
        ("size", "masks/train/2.png is 61 x 40, its image"),
        ("label", "masks/train/2.png has label 3; labels are 0 to 2, and 255 for void"),
        ("rgb", "masks/train/2.png is RGB, not one class index a pixel"),
        ("broken", "masks/train/2.png cannot be read"),
        ("empty", "images/val holds no image"),
        ("void", "masks/val have nothing but void (255): nothing can be learned"),
        ("jpeg", "masks/train/2.jpg is a JPEG, which changes class indices"),
        ("rgb, no names", "masks/train/0.png is RGB, not one class index a pixel"),
        ("binary", "masks/train have nothing but class 0 and void (255); two classes are 0 and 1: nothing can be learned"),
        ("names", "classes.txt: 1 classes"),
        ("twice", "classes.txt names 'sky' twice"),
        ("coding", "classes.txt is not text in UTF-8"),
        ("suffix", "differ in their suffix only"),
    ],
)
def test_bad_scenes_end_every_stage_in_one_line(scene_folder, harm, message, tmp_path, capsys):
    spoil(scene_folder, harm)
    common = ["--dataset", "folder", "--data-root", scene_folder, "--backbone", "vit_tiny", "--image-size", "28", "--device", "cpu"]
    for main, output in ((train_seg.main, ["--output-dir", tmp_path / "run"]), (eval_linear.main, ["--output", tmp_path / "r.json"])):
        assert message in stderr_of(capsys, main, *common, *output)
    assert not (tmp_path / "run").exists() and not (tmp_path / "r.json").exists()


def test_stuff_only_masks_of_coco_are_refused(coco, tmp_path):
    mask = coco / "stuffthingmaps" / "val2017" / f"{0:012d}.png"
    write_mask(mask, np.full((4, 182), 183))
    with pytest.raises(InputError, match=r"has label 183.*stuff-only pixelmaps.*stuffthingmaps_trainval2017\.zip"):
        load_splits("coco_stuff", str(coco))[1].read(0)
    (coco / "stuffthingmaps").rename(coco / "stuff_train2017_pixelmaps")
    with pytest.raises(InputError, match=r"stuff_train2017_pixelmaps is stuff only and cannot be used.*stuffthingmaps is missing"):
        load_splits("coco_stuff", str(coco))


@pytest.mark.parametrize(("name", "message"), [("voc2012", "VOCtrainval_11-May-2012.tar"), ("ade20k", "ADEChallengeData2016.zip"), ("coco_stuff", "stuffthingmaps")])
def test_missing_sets_name_their_archive(name, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_splits(name, str(tmp_path))


def test_downloads_ask_the_publishers_once(voc, ade20k, coco, tmp_path, monkeypatch):
    """What is missing is fetched from its source with its MD5 sum; what is there is left alone."""
    asked = []
    monkeypatch.setattr(data, "download_and_extract_archive", lambda url, root, md5: asked.append((url, root, md5)))
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", lambda url, *rest, **options: asked.append((url, options["md5"])))
    for name in ("voc2012", "ade20k", "coco_stuff"):
        load_splits(name, str(tmp_path), download=True)
    assert not asked
    for gone in ("VOCdevkit", "ADEChallengeData2016", "train2017", "val2017"):
        (tmp_path / gone).rename(tmp_path / f"{gone}_gone")
    for name in ("voc2012", "ade20k", "coco_stuff"):
        with pytest.raises(InputError, match=name):  # nothing came
            load_splits(name, str(tmp_path), download=True)
    assert [call[0].rpartition("/")[2] for call in asked] == ["VOCtrainval_11-May-2012.tar", "ADEChallengeData2016.zip", "train2017.zip"]
    assert [call[-1] for call in asked] == ["6cd6e144f989b92b3379bac3b3de84fd", "7328b3957e407ddae1d3cbf487f149ef", "cced6f7f71b7629ddf16f17bbcfab6b2"]


def test_a_half_unpacked_voc_is_refused(voc):
    (voc / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2007_000042.png").unlink()
    with pytest.raises(InputError, match=r"2007_000042\.png is missing"):
        load_splits("voc2012", str(voc))


def test_a_set_of_the_other_task_is_refused(image_folder, scene_folder, tmp_path, capsys):
    for main, name, root, message in (
        (train_seg.main, "cifar10", tmp_path, "--dataset cifar10 is a classification set; it is for train_cls.py"),
        (train_seg.main, "folder", image_folder, "is a classification set (images/ and masks/ would make it one for segmentation)"),
        (train_cls.main, "voc2012", tmp_path, "--dataset voc2012 is a segmentation set; it is for train_seg.py"),
        (train_cls.main, "folder", scene_folder, "is a segmentation set; it is for train_seg.py"),
        (eval_knn.main, "shapes_seg", tmp_path, "--dataset shapes_seg is a segmentation set"),
    ):
        output = ["--output", tmp_path / "x.json"] if main is eval_knn.main else ["--output-dir", tmp_path / "run"]
        assert message in stderr_of(capsys, main, "--dataset", name, "--data-root", root, "--device", "cpu", *output)


def test_drawn_scenes():
    train, val = load_splits("shapes_seg", None)
    assert len(train.classes) == 11 and (len(train), len(val)) == (2000, 400)
    image, mask = train.read(3)
    assert image.size == (112, 112) == mask.shape and np.array_equal(mask, load_splits("shapes_seg", None)[0].read(3)[1])
    assert not np.array_equal(mask, val.read(3)[1])
    seen = np.bincount(np.concatenate([train.read(i)[1].ravel() for i in range(60)]), minlength=256)
    assert (seen[:11] > 0).all() and seen[11:255].sum() == 0
    assert 0.02 < seen[VOID] / seen.sum() < 0.2
    for axis in (0, 1):  # between a shape and the background there is void
        pairs = np.stack([np.take(mask, range(111), axis), np.take(mask, range(1, 112), axis)]).reshape(2, -1)
        assert not ((pairs == 0).any(0) & ~np.isin(pairs, [0, VOID]).all(0)).any()


# Transforms and loaders


@pytest.mark.parametrize(("size", "side"), [((37, 50), 16), ((8, 8), 8), ((5, 7), 12)])
def test_masks_are_resized_to_the_label_at_the_centre(size, side):
    mask = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = resize_mask(mask, side)
    for i in range(side):
        for j in range(side):
            assert result[i, j] == mask[int((i + 0.5) * size[0] / side), int((j + 0.5) * size[1] / side)]


def test_image_and_mask_are_flipped_together():
    pixels = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    masks = torch.arange(2 * 2 * 2, dtype=torch.uint8).view(2, 2, 2)
    images, labels = flip_scenes(pixels, masks, torch.tensor([True, False]))
    assert torch.equal(images[0], pixels[0].flip(1)) and torch.equal(labels[0], masks[0].flip(1))
    assert torch.equal(images[1], pixels[1]) and torch.equal(labels[1], masks[1])


@pytest.mark.parametrize("augment", [True, False])
def test_global_batches_of_scenes_depend_on_the_seed_alone(augment, monkeypatch):
    split = draw_scenes_split(21, seed=0)

    def epoch(size):
        loaders = [TrainLoader(split, SEGMENTATION["shapes_seg"], 28, 10, rank(r, size), 1, seed=1, augment=augment, map_size=12) for r in range(size)]
        batches = []
        for parts in zip(*(loader.epoch(2) for loader in loaders), strict=True):
            images, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            valid = (targets != IGNORE).flatten(1).any(1)
            batches.append((images[valid], targets[valid]))
        return batches

    expected = epoch(1)
    assert [tuple(targets.shape) for _, targets in expected] == [(10, 12, 12), (10, 12, 12), (1, 12, 12)]
    labels = torch.cat([targets.flatten() for _, targets in expected]).unique().tolist()
    assert IGNORE in labels and VOID not in labels and max(labels) <= 10
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)  # and streamed from files they are the same
    for size in (1, 2, 3):
        for (images, targets), (want_images, want_targets) in zip(epoch(size), expected, strict=True):
            assert torch.equal(images, want_images) and torch.equal(targets, want_targets)


def test_native_masks_keep_their_sizes(scene_folder):
    split, _ = load_splits("folder", str(scene_folder))
    for workers in (0, 1):
        loader = SceneLoader(split, [28, 42], None, CPU, workers)
        seen = list(loader.fetch([torch.tensor([3, 0]), torch.tensor([5])]))
        for indices, (small, large, masks) in zip([[3, 0], [5]], seen, strict=True):
            assert small.shape == (len(indices), 3, 28, 28) and large.shape == (len(indices), 3, 42, 42)
            assert all(np.array_equal(mask, split.read(i)[1]) for i, mask in zip(indices, masks, strict=True))


def test_decoded_scenes_are_kept_for_the_next_run(scene_folder, tmp_path):
    split, _ = load_splits("folder", str(scene_folder))

    def epoch():
        options = dict(seed=0, augment=True, map_size=12, cache_dir=str(tmp_path / "cache"))
        loader = TrainLoader(split, SEGMENTATION["folder"], 28, 4, CPU, 1, **options)
        return [tensor for batch in loader.epoch(0) for tensor in batch]

    assert all(torch.equal(a, b) for a, b in zip(epoch(), epoch(), strict=True))
    (file,) = (tmp_path / "cache").glob("*.npy")
    assert np.load(file, mmap_mode="r").shape == (6, 3 * 28 * 28 + 12 * 12)


def test_ten_percent_are_the_same_scenes_for_every_method_and_process(tmp_path, monkeypatch):
    seen = []

    class Spy(TrainLoader):
        def __init__(self, split, *rest, **options):
            seen.append([split.read(i)[1].tobytes() for i in range(len(split))])
            super().__init__(split, *rest, **options)

    monkeypatch.setattr(train_seg, "TrainLoader", Spy)
    for method in ("grpo_rm", "finetune"):
        extra = ["--train-fraction", "0.1", "--method", method, "--epochs", "1", "--batch-size", "4", "--output-dir", str(tmp_path / method)]
        train_seg.main([*SCENES, *extra])
    split = draw_scenes_split(40, seed=0)
    assert len(seen[0]) == 4 and seen[0] == seen[1]
    one, other = fraction(split, 0.1, seed=0), fraction(split, 0.1, seed=1)
    assert [one.read(i)[1].tobytes() for i in range(4)] != [other.read(i)[1].tobytes() for i in range(4)]


# Head and loss


def test_linear_before_upsampling_is_the_same_function():
    """Against the head as the paper has it, upsampling the tokens first, in float64."""
    torch.manual_seed(0)
    head = SegmentationHead(10, 5, 7, map_size=12).double()
    tokens = torch.randn(3, 16, 10, dtype=torch.float64)
    maps = F.interpolate(tokens.transpose(1, 2).unflatten(2, (4, 4)), size=(12, 12), mode="bilinear")
    expected = head.layers(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(head({"x_norm_patchtokens": tokens}), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", ["grpo_rm", "finetune"])
def test_chunks_change_neither_loss_nor_gradient(method):
    """All at once and image by image, with void pixels and one scene that is all void, in float64."""
    torch.manual_seed(0)
    reference = SegmentationHead(6, 5, 7, map_size=9, chunk=0).double()
    old = SegmentationHead(6, 5, 7, map_size=9, chunk=0).double()
    tokens = torch.randn(5, 16, 6, dtype=torch.float64)
    targets = torch.randint(0, 5, (5, 9, 9))
    targets[torch.rand(5, 9, 9) < 0.2] = IGNORE
    targets[2] = IGNORE
    with torch.no_grad():
        old_logits = old({"x_norm_patchtokens": tokens})
    results = []
    for chunk in (0, 1, 2, 5, 99):
        head = SegmentationHead(6, 5, 7, map_size=9, chunk=chunk).double()
        head.load_state_dict(reference.state_dict())
        leaf = tokens.clone().requires_grad_()
        logits = head({"x_norm_patchtokens": leaf})
        if method == "grpo_rm":
            loss, _ = grpo_rm_loss(logits, old_logits, targets, background_penalty=0.5, ratio_floor=0.1, ignore_index=IGNORE)
        else:
            loss, _ = cross_entropy_loss(logits, targets, ignore_index=IGNORE)
        loss.backward()
        results.append([loss.detach(), leaf.grad, *(parameter.grad for parameter in head.parameters())])
    assert all(tensor.abs().max() > 0 for tensor in results[0])
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-15)


def peak_of(images: int) -> int:
    """The most bytes allocated at once, beyond inputs, in a training step of head and loss at COCO-stuff's sizes."""
    torch.manual_seed(0)
    head, old = (SegmentationHead(384, 171, 256, map_size=128) for _ in range(2))
    tokens = torch.randn(images, 32 * 32, 384, requires_grad=True)
    targets = torch.randint(0, 171, (images, 128, 128))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.no_grad():
            old_logits = old({"x_norm_patchtokens": tokens})
        loss, _ = grpo_rm_loss(head({"x_norm_patchtokens": tokens}), old_logits, targets, ratio_floor=0.1)
        loss.backward()
    total = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return peak


def test_an_image_costs_less_than_60_mb():
    """171 classes, 448 px (32 x 32 tokens), 128 x 128 maps, float32."""
    first, few, more = (peak_of(images) for images in (1, 4, 8))
    assert (few - first) / 3 < 60e6 and (more - few) / 4 < 60e6


def test_all_void_scenes_are_no_nan(tmp_path, scene_folder):
    """A batch without any pixel to learn from changes nothing; scores without any pixel are 0."""
    write_mask(scene_folder / "masks" / "train" / "0.png", np.full((40, 60), VOID))
    common = ["--dataset", "folder", "--data-root", str(scene_folder), "--backbone", "vit_tiny", "--image-size", "28", "--device", "cpu"]
    for method in ("grpo_rm", "finetune"):
        run = tmp_path / method
        train_seg.main([*common, "--map-size", "8", "--method", method, "--batch-size", "1", "--epochs", "1", "--log-every", "1", "--output-dir", str(run)])
        steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert len(steps) == 7 and all(step[key] is not None for step in steps for key in step if key != "peak_memory_gb")
        assert all(torch.isfinite(value).all() for value in torch.load(run / "backbone.pth", weights_only=True).values())
    scores = segmentation_scores(torch.zeros(3, 3, dtype=torch.int64))
    assert scores == {"pixel_acc": 0.0, "iou": 0.0, "miou": 0.0, "per_class_iou": [None, None, None]}


# Scores


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_counting_pixel_by_pixel(seed):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, 5, (4, 9, 7)), rng.integers(0, 6, (4, 9, 7))
    prediction[rng.random(truth.shape) < 0.5] = truth[rng.random(truth.shape) < 0.5][0]
    truth[rng.random(truth.shape) < 0.1] = VOID
    tp, fp, fn = ([0] * 7 for _ in range(3))  # class 6 is in neither
    for t, p in zip(truth.flat, prediction.flat, strict=True):
        if t == VOID:
            continue
        if t == p:
            tp[t] += 1
        else:
            fn[t] += 1
            fp[p] += 1
    pixels = sum(tp) + sum(fn)
    per_class = [tp[c] / (tp[c] + fp[c] + fn[c]) if tp[c] + fp[c] + fn[c] else None for c in range(7)]
    present = [iou for iou in per_class if iou is not None]
    confusion = sum(confusion_matrix(torch.tensor(p), torch.tensor(t), 7) for p, t in zip(prediction, truth, strict=True))
    scores = segmentation_scores(confusion)
    assert confusion.dtype == torch.int64 and confusion.sum() == pixels
    assert confusion[1, 2] == ((truth == 1) & (prediction == 2)).sum()  # rows truth, columns prediction
    assert scores["pixel_acc"] == pytest.approx(sum(tp) / pixels)
    assert scores["iou"] == pytest.approx(sum(tp) / (sum(tp) + sum(fp) + sum(fn)))
    assert scores["iou"] == pytest.approx(scores["pixel_acc"] / (2 - scores["pixel_acc"]))
    assert scores["per_class_iou"] == [None if iou is None else pytest.approx(iou) for iou in per_class]
    assert scores["miou"] == pytest.approx(sum(present) / len(present))


def test_the_papers_frozen_rows_fit_the_micro_average():
    """Tables 2 and 4: IoU = acc / (2 - acc) for every DINOv2 row."""
    for accuracy, iou in ((0.9306, 0.8702), (0.7019, 0.5407), (0.9404, 0.8875), (0.7102, 0.5507), (0.6343, 0.4645), (0.6457, 0.4768)):
        hits = round(10000 * accuracy)
        scores = segmentation_scores(torch.tensor([[hits, 10000 - hits], [0, 0]]))
        assert scores["iou"] == pytest.approx(iou, abs=1.01e-4)


# Linear evaluation


def scene_source(world=CPU, layers=1, keep=True, n=21):
    torch.manual_seed(0)
    loader = SceneLoader(draw_scenes_split(n, seed=0), [28], 12, world, 1)
    return SceneFeatures(load_backbone("vit_tiny"), loader, layers, 12, "off", world, keep=keep)


def test_multiscale_features_are_the_last_four_layers():
    backbone, images = load_backbone("vit_tiny"), torch.randn(2, 3, 42, 42)
    features = patch_tokens(backbone, images, 4, "off")
    assert features.shape == (2, 4 * 96, 3, 3)
    last = backbone.forward_features(images)["x_norm_patchtokens"].transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(features[:, -96:], last)
    torch.testing.assert_close(patch_tokens(backbone, images, 1, "off"), last)


def test_the_gradient_of_the_linear_layer_is_that_of_the_whole_batch(monkeypatch):
    """Upsampled and scored piece by piece, with void pixels, against one plain cross-entropy, in float64."""
    monkeypatch.setattr(eval_linear, "PIECE", 2)
    logits = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 4, (5, 9, 9), dtype=torch.uint8)
    masks[:, :2], masks[3] = VOID, VOID
    upsampled_cross_entropy(logits, masks)
    copy = logits.detach().clone().requires_grad_()
    F.cross_entropy(F.interpolate(copy, size=(9, 9), mode="bilinear"), masks.long(), ignore_index=VOID).backward()
    torch.testing.assert_close(logits.grad, copy.grad, rtol=1e-12, atol=1e-15)


def test_kept_and_computed_features_give_the_same_layer():
    recipe = dict(epochs=2, batch_size=20, lr=1e-2, lr_end=1e-3, seed=0)
    kept, computed = (fit_segmenter(scene_source(keep=keep), 21, 11, **recipe) for keep in (True, False))
    for one, other in zip(kept.state_dict().values(), computed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_predictions_average_probabilities_over_scales_and_mirror_images():
    torch.manual_seed(0)
    backbone, segmenter = load_backbone("vit_tiny"), LinearSegmenter(4 * 96, 5, 0).eval()
    with torch.no_grad():
        segmenter.linear.weight.mul_(50)
    image = torch.randn(1, 3, 56, 56)
    images = [F.interpolate(image, size=(side, side), mode="bilinear") for side in (56, 70)]
    logits = class_logits(backbone, segmenter, images, 4, "off")
    assert [x.shape[-1] for x in logits] == [4, 4, 5, 5]
    prediction = predict([x[0] for x in logits], torch.Size((33, 47)))
    total = torch.zeros(5, 33, 47)
    with torch.no_grad():
        for x in images:
            for mirrored in (False, True):
                tokens = backbone.get_intermediate_layers(x.flip(3) if mirrored else x, n=4, reshape=True)
                scores = segmenter(torch.cat(tokens, 1))
                scores = scores.flip(3) if mirrored else scores
                total += F.interpolate(scores, size=(33, 47), mode="bilinear")[0].softmax(0)
    assert torch.equal(prediction, total.argmax(0)) and prediction.unique().numel() > 1
    (single,) = class_logits(backbone, segmenter, images[:1], 4, "off")
    expected = F.interpolate(single, size=(33, 47), mode="bilinear")[0].argmax(0)
    assert torch.equal(predict([single[0]], torch.Size((33, 47))), expected)


def test_scenes_are_scored_at_the_size_of_their_masks(scene_folder, tmp_path, capsys, monkeypatch):
    """The confusion matrix of the result is that of predictions at every mask's own size, counted here again."""
    common = ["--dataset", "folder", "--data-root", str(scene_folder), "--backbone", "vit_tiny", "--image-size", "28", "--device", "cpu"]
    common += ["--epochs", "2", "--map-size", "8"]
    found = []
    monkeypatch.setattr(eval_linear, "predict", lambda logits, size: found.append(predict(logits, size)) or found[-1])
    eval_linear.main([*common, "--save-images", "2", "--output", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    masks = [load_splits("folder", str(scene_folder))[1].read(i)[1] for i in range(4)]
    confusion = sum(confusion_matrix(p, torch.tensor(m), 3) for p, m in zip(found, masks, strict=True))
    assert [tuple(p.shape) for p in found] == [mask.shape for mask in masks]
    assert result["val_pixels"] == sum((mask != VOID).sum() for mask in masks) == confusion.sum()
    scores = segmentation_scores(confusion)
    assert all(result[name] == pytest.approx(100 * scores[name], abs=1e-4) for name in ("pixel_acc", "iou", "miou"))
    assert list(result["per_class_iou"]) == ["sky", "road", "car"] and result["resolution"] == "native"
    assert "at the ground truth's own resolution (linear)" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "r_images").iterdir())
    assert names == [f"{i:06d}_{kind}.png" for i in (0, 3) for kind in ("image", "panel", "prediction", "truth")]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "r_images" / "000003_truth.png")), masks[3])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "r_images" / "000003_prediction.png")), found[3])
    eval_linear.main([*common, "--save-images", "1", "--output", str(tmp_path / "r.json")])  # leaves no picture of before
    assert sorted(path.name for path in (tmp_path / "r_images").iterdir()) == [n for n in names if n.startswith("000000")]
    eval_linear.main([*common, "--resolution", "map", "--output", str(tmp_path / "map.json")])
    small = json.loads((tmp_path / "map.json").read_text())
    assert small["resolution"] == "map" and small["val_pixels"] <= 4 * 64 and "at 8 x 8 maps (linear)" in capsys.readouterr().out


def test_palette_is_vocs():
    colours = data.palette()
    assert colours[[0, 1, 2, 3, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]
    ]  # fmt: skip
    assert len(np.unique(colours, axis=0)) == 256


def test_a_legend_of_many_classes_stays_inside_its_panel():
    mask = np.arange(171, dtype=np.uint8).repeat(4).reshape(18, 38)
    panel = data.draw_panels([("image", Image.new("RGB", (38, 18))), ("truth", data.palette_image(mask))], data.COCO_CLASSES)
    pixels = np.asarray(panel)
    assert panel.height > 288 + 32 + 20 and (pixels[:, -4:] == 255).all() and (pixels[-4:] == 255).all()


# The stages


def test_stages_of_segmentation_end_to_end(scene_folder, tmp_path):
    common = ["--dataset", "folder", "--data-root", str(scene_folder), "--backbone", "vit_tiny", "--device", "cpu"]
    for method in ("grpo_rm", "finetune"):
        run = tmp_path / method
        train_seg.main([*common, "--image-size", "28", "--map-size", "8", "--method", method, "--batch-size", "4", "--epochs", "2", "--output-dir", str(run)])
        config = json.loads((run / "config.json").read_text())
        assert (config["task"], config["background_penalty"], config["hidden_dim"]) == ("segmentation", 0.5, 256)
        last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
        assert last["event"] == "epoch" and 0 <= last["val_miou"] <= last["val_pixel_acc"] <= 100
        for features, name in (("linear", "eval_linear.json"), ("multiscale", "eval_linear_multiscale.json")):
            eval_linear.main([*common, "--weights", str(run / "backbone.pth"), "--features", features, "--epochs", "2", "--map-size", "8"])
            result = json.loads((run / name).read_text())
            assert (result["method"], result["features"], result["image_size"], result["val_images"]) == (method, features, 28, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "shapes", "--features", "multiscale"], "are for segmentation; shapes is a classification set"),
        (["--dataset", "shapes", "--save-images", "2"], "are for segmentation; shapes is a classification set"),
        (["--dataset", "shapes_seg", "--scales", "1", "2"], "--scales are for --features multiscale"),
        (["--dataset", "shapes_seg", "--image-size", "14"], "--image-size 14 is a single patch"),
        (["--dataset", "shapes_seg", "--features", "multiscale", "--scales", "0"], "argument --scales: '0' must be a number above 0"),
    ],
)
def test_bad_arguments_of_segmentations_evaluation(arguments, message, tmp_path, capsys):
    assert message in stderr_of(capsys, eval_linear.main, *arguments, "--device", "cpu", "--output", tmp_path / "r.json")


def test_skip_unreadable_scenes(scene_folder, tmp_path, capsys):
    """A broken mask is passed over in training when 1 % allow it, the first too; validation has no stand-ins."""
    for i in range(6, 110):
        shutil.copy(scene_folder / "images" / "train" / "5.jpg", scene_folder / "images" / "train" / f"{i}.jpg")
        shutil.copy(scene_folder / "masks" / "train" / "5.png", scene_folder / "masks" / "train" / f"{i}.png")
    (scene_folder / "masks" / "train" / "0.png").write_bytes(b"broken")
    common = ["--dataset", "folder", "--data-root", str(scene_folder), "--backbone", "vit_tiny", "--image-size", "28", "--map-size", "8"]
    common += ["--device", "cpu", "--batch-size", "55", "--epochs", "1", "--skip-unreadable"]
    train_seg.main([*common, "--output-dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert ["masks/train/0.png cannot be read" in line["reason"] for line in lines if line["event"] == "unreadable"] == [True]
    capsys.readouterr()
    (scene_folder / "masks" / "val" / "1.png").write_bytes(b"broken")
    assert "masks/val/1.png cannot be read" in stderr_of(capsys, train_seg.main, *common, "--output-dir", tmp_path / "other")


def test_defaults_of_segmentation_are_the_papers(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(train_seg, "train", lambda policy, loader, validate, args, world: seen.update(vars(args), loader=loader))
    train_seg.main(["--device", "cpu", "--limit-train", "3", "--limit-val", "3", "--output-dir", str(tmp_path)])
    expected = {"batch_size": 256, "epochs": 100, "lr": 1e-5, "lr_end": 1e-7, "map_size": 128, "background_penalty": 0.5, "method": "grpo_rm"}
    assert {name: seen[name] for name in expected} == expected
    assert SEGMENTATION["voc2012"].hidden_dim == 64 and SEGMENTATION["ade20k"].hidden_dim == SEGMENTATION["coco_stuff"].hidden_dim == 256
    assert all(SEGMENTATION[name].image_size == 448 for name in ("voc2012", "ade20k", "coco_stuff"))


def test_a_resumed_segmentation_ends_with_the_same_bits(tmp_path):
    common = [*SCENES, "--batch-size", "8", "--epochs", "2", "--log-every", "1", "--lr", "1e-3"]
    train_seg.main([*common, "--output-dir", str(tmp_path / "whole")])
    train_seg.main([*common, "--output-dir", str(tmp_path / "cut"), "--max-steps", "3"])
    train_seg.main([*common, "--output-dir", str(tmp_path / "cut"), "--resume"])
    for name in ("backbone.pth", "head.pth"):
        whole, cut = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)
    logs = [[json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()] for run in ("whole", "cut")]
    for events in logs:
        for event in events:
            event.pop("images_per_s"), event.pop("seconds", None)
    assert logs[0] == logs[1]


def test_processes_train_the_same_segmenter_and_score_it_equally(tmp_path):
    """1 and 2 processes: weights equal up to rounding after training; from the same weights, the same scores to the last
    digit for 1, 2, 3 and 4 processes, kept features or not."""
    common = [*SCENES, "--batch-size", "8", "--epochs", "1", "--lr", "1e-3", "--augment", "none"]
    for nproc in (1, 2):
        done = run_script("train_seg.py", *common, "--output-dir", tmp_path / str(nproc), nproc=nproc)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    one, two = (torch.load(tmp_path / run / "backbone.pth", weights_only=True) for run in ("1", "2"))
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-2, atol=2e-4)
    results = []
    for nproc, cache in ((1, "4"), (2, "4"), (3, "0"), (4, "4")):
        output = tmp_path / f"{nproc}.json"
        arguments = [*SCENES, "--epochs", "3", "--batch-size", "32", "--features", "multiscale", "--cache-features", cache]
        done = run_script("eval_linear.py", *arguments, "--dataset", "shapes_seg", "--weights", tmp_path / "1" / "backbone.pth", "--output", output, nproc=nproc)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(output.read_text()) | {"output": None})
    assert all(result == results[0] for result in results)


def test_compiled_segmentation_is_the_same_up_to_rounding(tmp_path, monkeypatch):
    """The backbone and the loss are compiled; the head, in pieces, is not."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compile_(self, backend="aot_eager", **options))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    grpo_rm.compiled_loss.cache_clear()
    torch._dynamo.reset()
    for flag in ("on", "off"):
        flags = ["--batch-size", "20", "--epochs", "2", "--lr", "1e-3", "--compile", flag, "--output-dir", str(tmp_path / flag)]
        train_seg.main([*SCENES, *flags])
    grpo_rm.compiled_loss.cache_clear()
    for name in ("backbone.pth", "head.pth"):
        on, off = (torch.load(tmp_path / flag / name, weights_only=True) for flag in ("on", "off"))
        torch.testing.assert_close(on, off, atol=1e-3, rtol=0)
    first = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])
    assert 0.9 < first["mean_ratio"] < 1.1
