"""Images: which files a folder holds, what is in them, and how it becomes the network's input.

Shapes: B images, H W or S S pixels, M side of a map of labels. An image comes as pixels (H, W, 3) uint8, RGB; what is
prepared from it is (3, S, S) uint8.
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

try:
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
except ImportError:  # deprecated since torchvision 0.29: some day it will be gone
    decode_jpeg = None

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
    except Exception as error:  # a damaged file makes decoders raise almost anything
        raise InputError(f"{kind} {file} cannot be read ({first_line(error)}); replace or remove it") from error


def read_image(file, upright=True):
    """The image in `file`; `upright`: turned as its EXIF orientation says. Raises InputError."""
    with opened("image", file) as image:
        if decode_jpeg and image.format == "JPEG" and image.mode in ("L", "RGB"):  # the same pixels as Pillow's, sooner
            return decode_jpeg(read_file(file), ImageReadMode.RGB, apply_exif_orientation=upright).movedim(0, -1)
        return to_pixels(image, upright)


def read_labels(file):
    """The class indices in the mask `file`, (H, W) uint8 or int32; a palette is not applied. Raises InputError."""
    with opened("mask", file) as mask:
        if mask.format == "JPEG" or not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
            raise ValueError(f"{mask.format} {mask.mode} is not a class index a pixel; take a grey or palette PNG")
        return np.asarray(mask, dtype=np.uint8 if mask.mode in ("1", "L", "P") else np.int32)


def to_pixels(image, upright=True):
    """The pixels of a PIL image, also where it is grey or has a palette; `upright`: turned as its EXIF orientation
    says. Raises ValueError for 32-bit pixels."""
    if image.mode in ("I", "F"):
        raise ValueError("32-bit numbers, whose range is not known; save it with 8 or 16 bits")
    if upright:
        image = ImageOps.exif_transpose(image)  # a copy
    if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.tensor(np.asarray(image.convert("RGB")))


def square(pixels, crop_size, resize_size):
    """The centre (3, crop_size, crop_size) of an image whose shorter side becomes resize_size; bicubic, antialiased."""
    image = v2.functional.resize(pixels.movedim(-1, 0), [resize_size], InterpolationMode.BICUBIC)
    return v2.functional.center_crop(image, [crop_size])


def random_crop(pixels, crop_size, seed):
    """A random resized crop (3, crop_size, crop_size) of an image, a function of `seed` alone."""
    crop = v2.RandomResizedCrop(crop_size, interpolation=InterpolationMode.BICUBIC)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        return crop(pixels.movedim(-1, 0))


def resize(images, side):
    """(..., 3, H, W) uint8 -> (..., 3, side, side) uint8: bicubic, antialiased; the aspect ratio is not kept."""
    return v2.functional.resize(images, [side, side], InterpolationMode.BICUBIC)


def resize_mask(mask, side):
    """(H, W) labels -> (side, side), each the label at the centre of its pixel: no label is invented."""
    return v2.functional.resize(mask[None], [side, side], InterpolationMode.NEAREST_EXACT)[0]


def pad_crop_flip(images, shifts, flips, pad):
    """Zero padding by `pad` on every side, then for each image the window of the old size at `shifts` (B, 2) in
    0..2*pad (row, column), mirrored where `flips` (B,) is true. images (B, 3, H, W); returns the same shape."""
    B, _, H, W = images.shape
    rows = shifts[:, :1] + torch.arange(H, device=images.device)  # (B, H)
    columns = torch.arange(W, device=images.device).expand(B, W)
    columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)  # (B, W)
    padded = F.pad(images, (pad, pad, pad, pad))  # (B, 3, H + 2 pad, W + 2 pad)
    numbers = torch.arange(B, device=images.device)[:, None, None]
    return padded[numbers, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def to_input(images, image_size):
    """(B, 3, S, S) uint8 -> (B, 3, image_size, image_size) float32: bicubic (antialiased), ImageNet mean and std."""
    images = resize(images, image_size).contiguous().float()
    for channel, mean, std in zip(images.unbind(1), MEAN, STD, strict=True):
        channel.sub_(255 * mean).div_(255 * std)
    return images


def input_transform(config):
    """The function from a PIL image, or pixels (H, W, 3) uint8, to the network's input (3, image_size, image_size)
    float32, exactly as the loader prepares a validation image. config: a run's config.json as a dict."""

    def transform(image):
        pixels = to_pixels(image) if isinstance(image, Image.Image) else image
        if config["task"] == "segmentation":
            prepared = resize(pixels.movedim(-1, 0), config["image_size"])
        else:
            prepared = square(pixels, config["crop_size"], config["resize_size"])
        return to_input(prepared[None], config["image_size"])[0]

    return transform


def palette():
    """PASCAL VOC's colours of the indices 0 to 255, (256, 3) uint8: the bits of an index, from the lowest on, become
    the highest bits of red, green and blue, then the second highest, then the third."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        for bit in range(8):
            if index >> bit & 1:
                colours[index, bit % 3] += 128 >> bit // 3
    return colours


def palette_image(labels):
    """Class indices (H, W) uint8 as an image of mode P with VOC's palette, as VOC's own masks are."""
    image = Image.fromarray(labels)
    image.putpalette(palette().tobytes())
    return image
