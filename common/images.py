"""Images: which files a folder holds, what is in them, and how it becomes the network's input.

Shapes: B images, H W or S S pixels, M side of a map of labels.
"""

import contextlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from common.cli import InputError, first_line

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained with


def visible(folder):
    """The paths right in `folder`, sorted by name, without hidden ones; none where there is no folder."""
    return sorted(folder.glob("[!.]*"))


def image_files(folder):
    """The files of the images right in `folder`, sorted by name."""
    return [str(path) for path in visible(folder) if path.suffix.lower() in IMG_EXTENSIONS]


def pair_up(images, masks):
    """[(image, mask)] of equal names but for the suffix, from two folders. Raises InputError for one without the other,
    two of the same name in a folder, or none at all."""
    files_of = defaultdict(list)  # by name
    for folder in (images, masks):
        for file in image_files(folder):
            files_of[Path(file).stem].append(file)
    for name, files in files_of.items():
        if [Path(file).parent for file in files] != [images, masks]:
            raise InputError(f"{' and '.join(files)}: needed are one image {name}.* in {images} and one mask {name}.* "
                             f"in {masks}; add what is missing, or remove one")  # fmt: skip
    if not files_of:
        raise InputError(f"{images} holds no image; put them there, and their masks in {masks}")
    return [tuple(files_of[name]) for name in sorted(files_of)]


@contextlib.contextmanager
def opened(kind, file):
    """The image in `file`. Raises InputError naming it where it cannot be read or does not hold what it should."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{kind} {file} cannot be read ({first_line(error)}); replace or remove it") from error


def read_image(file, upright=True):
    """The image in `file` as RGB; `upright`: turned as its EXIF orientation says. Raises InputError."""
    with opened("image", file) as image:
        return to_rgb(image, upright)


def read_labels(file):
    """The class indices in the mask `file`, (H, W) integers; a palette is not applied. Raises InputError."""
    with opened("mask", file) as mask:
        if mask.format == "JPEG" or not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
            raise ValueError(f"{mask.format} {mask.mode} is not a class index a pixel; take a grey or palette PNG")
        return np.asarray(mask, dtype=np.int32)


def to_rgb(image, upright=True):
    """The PIL `image` as RGB, also where it is grey or has a palette; `upright`: turned as its EXIF orientation says.
    Raises ValueError for 32-bit pixels."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit numbers, whose range is not known; save it with 8 or 16 bits")
    if upright:
        image = ImageOps.exif_transpose(image)  # a copy
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def square(image, crop_size, resize_size):
    """The PIL `image` as (crop_size, crop_size, 3) uint8: its centre, after a bicubic resize of its shorter side to
    resize_size."""
    image = v2.functional.resize(image, [resize_size], InterpolationMode.BICUBIC)
    return torch.tensor(np.asarray(v2.functional.center_crop(image, [crop_size])))


def random_crop(image, crop_size, seed):
    """A random resized crop (crop_size, crop_size, 3) uint8 of the PIL `image`, a function of `seed` alone."""
    crop = v2.RandomResizedCrop(crop_size, interpolation=InterpolationMode.BICUBIC)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.tensor(np.asarray(crop(image)))


def stretch(image, side):
    """The whole PIL `image` as (side, side, 3) uint8; the aspect ratio is not kept."""
    return resize(v2.functional.pil_to_tensor(image), side).movedim(0, -1)


def resize(images, side):
    """(..., 3, H, W) uint8 -> (..., 3, side, side) uint8: bicubic, antialiased; the aspect ratio is not kept."""
    return v2.functional.resize(images, [side, side], InterpolationMode.BICUBIC, antialias=True)


def resize_mask(mask, side):
    """(H, W) labels -> (side, side), each the label at the centre of its pixel: no label is invented."""
    return v2.functional.resize(mask[None], [side, side], InterpolationMode.NEAREST_EXACT)[0]


def pad_crop_flip(pixels, shifts, flips, pad):
    """Zero padding by `pad` on every side, then for each image the window of the old size at `shifts` (B, 2) in
    0..2*pad (row, column), mirrored where `flips` (B,) is true. pixels (B, H, W, 3) uint8; returns the same shape."""
    B, H, W, _ = pixels.shape
    rows = shifts[:, :1] + torch.arange(H, device=pixels.device)  # (B, H)
    columns = torch.arange(W, device=pixels.device).expand(B, W)
    columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)  # (B, W)
    padded = F.pad(pixels, (0, 0, pad, pad, pad, pad))  # (B, H + 2 pad, W + 2 pad, 3)
    images = torch.arange(B, device=pixels.device)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]]


def to_input(pixels, image_size):
    """(B, S, S, 3) uint8 -> (B, 3, image_size, image_size) float32: bicubic (antialiased), ImageNet mean and std."""
    images = resize(pixels.movedim(-1, 1), image_size).contiguous().float()  # channels last in memory until here
    for channel, mean, std in zip(images.unbind(1), MEAN, STD, strict=True):
        channel.sub_(255 * mean).div_(255 * std)
    return images


def input_transform(config):
    """The function from a PIL image to the network's input (3, image_size, image_size) float32, exactly as the loader
    prepares a validation image. config: a run's config.json as a dict."""

    def transform(image):
        image = to_rgb(image)
        if config["task"] == "segmentation":
            pixels = stretch(image, config["image_size"])
        else:
            pixels = square(image, config["crop_size"], config["resize_size"])
        return to_input(pixels[None], config["image_size"])[0]

    return transform
