"""Loader and transforms: batches are a function of the seed alone; an image is prepared in one way everywhere."""

import os
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, assert_same_bits, children
from PIL import Image
from test_data import ORIENTATION, SEGMENTATION, arguments, noise, splits

from common import distributed
from common.cli import InputError
from common.images import MEAN, STD, input_transform, pad_crop_flip, resize_mask, to_pixels
from common.loader import Loader
from data import Split


def joined(loader, size, epoch, start):
    """The global batches, all ranks' parts side by side, without the sample that a rank has where nothing is left."""
    ranks, batches = [], []
    for rank in range(size):
        loader.world = distributed.World(rank, rank, size, CPU.device)
        ranks.append(list(loader.epoch(epoch, start)))
    for parts in zip(*ranks, strict=True):
        images, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        valid = (targets != -100).flatten(1).any(1) if loader.split.masks else targets != -100
        assert len(images) == max(size, valid.sum())
        batches.append((images[valid], targets[valid]))
    return batches


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("name", ["shapes", "shapes_seg", "imagenet"])
def test_global_batches_depend_on_the_seed_alone(name, augment, monkeypatch):
    """Bit for bit the same for any number of ranks, resident or streamed by workers, augmentation included; every
    sample is there once, and an epoch can start in its middle."""
    drawn = splits("shapes" if name == "imagenet" else name)[0]
    split = Split(drawn.classes, 35, cache(drawn.read), drawn.masks)

    def batches(size=1, epoch=2, start=0, augment=augment, **more):
        args = arguments(name, batch_size=11, **more)
        return joined(Loader(split, args, CPU, augment=augment), size, epoch, start)

    expected = batches()
    assert [len(targets) for _, targets in expected] == [11, 11, 11, 2]
    assert len({image.numpy().tobytes() for images, _ in expected for image in images}) == 35
    labels = set(torch.cat([targets.flatten() for _, targets in expected]).tolist())
    assert labels == ({-100, *range(11)} if split.masks else set(range(10)))
    assert torch.equal(batches(augment=False)[0][0], expected[0][0]) != augment
    assert not any(torch.equal(other[0][1], expected[0][1]) for other in (batches(epoch=3), batches(seed=2)))
    for resident in (2**30, 0):
        monkeypatch.setattr("common.loader.memory_share", lambda world, share, room=resident: room)
        assert_same_bits(batches(size=2, workers=0), expected)
        assert_same_bits(batches(size=3, workers=2), expected)
        assert_same_bits(batches(start=2), expected[2:])


def test_workers_live_on_and_share_a_batch(monkeypatch):
    """Through all epochs, also after one that was left in its middle; what each is given is a piece of a batch."""
    monkeypatch.setattr("common.loader.memory_share", lambda world, share: 0)
    monkeypatch.setattr("common.loader.PIECE", 4)
    split = Split(["a"] * 256, 22, lambda i: (torch.full((28, 28, 3), i, dtype=torch.uint8), os.getpid() + 256 * i))
    loader, found = Loader(split, arguments(batch_size=11, workers=2), CPU), []
    next(loader.epoch(0))
    for epoch in range(3):
        for images, targets in loader.epoch(epoch):
            assert torch.equal(images[:, 0, 0, 0].argsort(), (targets // 256).argsort())
            pids = {target - 256 * i for i in range(22) for target in targets.tolist()}
            found.append(pids.intersection(children(os.getpid())))
    assert len(set.union(*found)) == 2 and max(map(len, found)) == 2 and os.getpid() not in found[0]


def test_too_little_shared_memory_is_one_line(monkeypatch):
    monkeypatch.setattr("common.loader.memory_share", lambda world, share: 0)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=20 * 2**20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    split = splits("shapes")[0]
    assert next(Loader(split, arguments(batch_size=100, workers=2), CPU).epoch(0))
    loader = Loader(split, arguments(batch_size=1024, workers=2), CPU)
    message = r"--workers 2: up to 0\.03 GB .* /dev/shm has 0\.02 GB; take fewer or 0, or give"
    with pytest.raises(InputError, match=message):
        next(loader.epoch(0))


def test_image_and_mask_are_flipped_together():
    """Every image shows its mask, and still does after augmentation."""
    masks = noise(0, 20, 28, 28, high=200)
    grey = torch.tensor(masks)[..., None].expand(-1, -1, -1, 3)
    split = Split(["a"] * 200, 20, lambda i: (grey[i], masks[i]), masks=True)
    loader = Loader(split, arguments("voc2012", map_size=28), CPU, augment=True)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images, targets = (torch.cat(parts) for parts in zip(*loader.epoch(0), strict=True))
    assert torch.equal((images * std + mean).round().long(), targets[:, None].expand(-1, 3, -1, -1))
    original = {mask.tobytes() for mask in masks}
    assert 0 < sum(target.byte().numpy().tobytes() in original for target in targets) < 20


def test_pad_crop_flip_against_a_loop():
    pixels, shifts = torch.tensor(noise(0, 12, 8, 8, 3)), torch.tensor(noise(1, 12, 2, high=5).astype(int))
    flips = torch.arange(12) % 2 == 0
    result = pad_crop_flip(pixels.movedim(-1, 1), shifts, flips, 2).movedim(1, -1)
    for i, (row, column) in enumerate(shifts.tolist()):
        window = np.pad(pixels[i].numpy(), ((2, 2), (2, 2), (0, 0)))[row : row + 8, column : column + 8]
        assert np.array_equal(result[i], window[:, ::-1] if flips[i] else window)


@pytest.mark.parametrize(("size", "side"), [((37, 50), 16), ((8, 8), 8), ((5, 7), 12)])
def test_masks_are_resized_to_the_label_at_the_centre(size, side):
    mask = torch.tensor(noise(0, *size))
    result = resize_mask(mask, side)
    for i, j in np.ndindex(side, side):
        assert result[i, j] == mask[int((i + 0.5) * size[0] / side), int((j + 0.5) * size[1] / side)]


def test_imagenet_validation_is_the_centre_of_a_larger_resize():
    """The shorter side becomes image_size * 256 / 224."""
    pixels = noise(0, 64, 96, 3)
    split = Split(["a", "b"], 1, lambda i: (torch.tensor(pixels), 0))
    decoded, target = Loader(split, arguments("imagenet"), CPU).resident
    expected = Image.fromarray(pixels).resize((48, 32), Image.Resampling.BICUBIC).crop((10, 2, 38, 30))
    assert abs(decoded[0].movedim(0, -1).int() - torch.tensor(np.asarray(expected)).int()).max() <= 1 and target == 0
    decoder = Loader(split, arguments("imagenet"), CPU, augment=True).decoder  # drawn for a sample in an epoch
    crops = [decoder.decode(i, key=(1, epoch))[0] for i, epoch in ((0, 0), (1, 0), (0, 1))]
    assert len({crop.numpy().tobytes() for crop in crops}) == 3


@pytest.mark.parametrize("dataset", ["imagenet", "cifar10", "voc2012"])
def test_the_transform_of_a_run_is_the_loaders(dataset):
    """Also for palettes, 16 bits and images that are stored on their side."""
    args, pixels = arguments(dataset), noise(0, 40, 61, 3)
    turned = Image.fromarray(np.rot90(pixels).copy())
    turned.getexif()[ORIENTATION] = 6
    images = [Image.fromarray(pixels), turned, Image.fromarray(noise(1, 40, 61)).convert("P")]
    images += [Image.fromarray(noise(2, 40, 61).astype(np.uint16) * 257)]
    masks, mask = args.task == SEGMENTATION, np.zeros((4, 4), np.uint8)
    split = Split(["a", "b"], 4, lambda i: (to_pixels(images[i]), mask if masks else 0), masks)
    ((_, expected, _),) = Loader(split, args, CPU).in_order(4)
    assert torch.equal(torch.stack([*map(input_transform(vars(args)), images)]), expected)
    assert torch.equal(expected[0], expected[1]) and turned.size == (40, 61)
