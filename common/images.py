"""Image files: which ones a folder holds, and what is in them."""

import contextlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.cli import InputError, first_line
from common.transforms import to_rgb


def visible(folder):
    """The paths right in `folder`, sorted by name, without hidden ones; none where there is no folder."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.name)


def is_image(path):
    """Whether the suffix is one of an image."""
    return path.suffix.lower() in IMG_EXTENSIONS


def image_files(folder):
    """The files of the images right in `folder`, sorted by name."""
    return [str(path) for path in visible(folder) if is_image(path)]


def count_suffixes(paths):
    """How many paths there are of each suffix, as text: "12 .heic, 3 .txt"."""
    counts = Counter("folder(s)" if path.is_dir() else path.suffix.lower() or "without suffix" for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())


def pair_up(images, masks):
    """[(image, mask)] of equal names but for the suffix, from two folders. Raises InputError for one without the other,
    two of the same name, or none at all."""
    image_of, mask_of = by_stem(images), by_stem(masks)
    for name in sorted(image_of.keys() - mask_of.keys()):
        raise InputError(f"{image_of[name]} has no counterpart {name}.* in {masks}; add it, or remove the file")
    for name in sorted(mask_of.keys() - image_of.keys()):
        raise InputError(f"{mask_of[name]} has no counterpart {name}.* in {images}; add it, or remove the file")
    if not image_of:
        raise InputError(f"{images} holds no image; put them there, and their masks in {masks}")
    return [(image_of[name], mask_of[name]) for name in sorted(image_of)]


def by_stem(folder):
    """{name without suffix: file} of the images in `folder`. Raises InputError where two have the same."""
    found = {}
    for file in image_files(folder):
        name = Path(file).stem
        if name in found:
            raise InputError(f"{found[name]} and {file} differ in their suffix alone; remove or rename one")
        found[name] = file
    return found


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
