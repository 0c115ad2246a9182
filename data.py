"""Datasets, transforms and loaders: everything that depends on samples; and how every stage answers bad input.

Every classification set becomes two `Split`s (train, val). A loader turns a split into batches in three stages:

    decode    file -> RGB uint8 square of the set's stored side       once when the set fits into memory, else in workers
    augment   random crop after zero padding, random flip             whole batches, on the device
    resize    bicubic to the protocol's side, ImageNet mean and std   whole batches, on the device

The sequence of global batches, and what augmentation does to each of their samples, are functions of the seed, the
epoch and the step alone: the number of processes, workers or accumulation steps changes neither.

Letters: B images, H W pixels, n samples of a split. `world` is this process among torchrun's: rank, size, device.
"""

import argparse
import functools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

IGNORE = -100  # a target that takes no part in loss or accuracy; 255 would be a class of ImageNet
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as DINOv2 was trained with
RESIDENT_BYTES = 4 * 2**30  # a decoded split up to this size is kept on the device
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif"}


# ------------------------------------------------------------------------------------------------------------------
# Bad input: one line on stderr and exit status 2


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what is wrong, where, what to do."""


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite; the message is one line."""


class Stopped(RuntimeError):
    """A signal asked the run to end, and it has been saved; the message is one line."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.status = 130 if signal_number == signal.SIGINT else 143  # as shells report SIGINT and SIGTERM


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the script's manual as it is written, and the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or action.default is False or action.default is argparse.SUPPRESS
        return action.help if hidden else f"{action.help} [%(default)s]"


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(usage="%(prog)s [flags]", description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help explains all flags)\n")


def number(low: float, high: float = math.inf, *, open_low: bool = False, kind: type = float) -> Callable[[str], float]:
    """An argparse type: a finite number of `kind` in [low, high], or (low, high] with `open_low`."""

    def parse(text: str) -> float:
        bounds = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high) or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{text!r} must be {'a whole' if kind is int else 'a'} number {bounds}")
        return value

    return parse


def stage(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], None]:
    """Decorates a script's main(argv), so that what may go wrong ends in one line on stderr: bad input with exit status
    2, a run that diverged or lost another process with 1, one that a signal stopped with 143 (Ctrl-C: 130)."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except KeyboardInterrupt:  # before or after the part of a run that can be saved
            status, message = 130, "interrupted"
        except Stopped as stopped:
            status, message = stopped.status, str(stopped)
        except InputError as error:
            status, message = 2, f"error: {error}"
        except Diverged as error:
            status, message = 1, f"error: {error}"
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
                raise
            status, message = 1, f"error: another process ended or hangs ({first_line(error)}); its own message says why"
        else:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
            return
        rank = f" [rank {os.environ.get('RANK', 0)}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{Path(sys.argv[0]).name}:{rank} {message}", file=sys.stderr)
        raise SystemExit(status)

    return wrapped


# What gloo and NCCL say when a process at the other end is gone or silent.
LOST = re.compile(r"by peer|pair closure|[Tt]imed? ?out|Broken pipe|Connection refused|Socket|NCCL (error|communicator)")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters of it, to quote inside a message of one line."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:157] + "..."


# ------------------------------------------------------------------------------------------------------------------
# Datasets


@dataclass(frozen=True)
class Protocol:
    """How one dataset is prepared. `image_size` is the side in pixels that the network sees (the paper's, or the
    nearest multiple of 14 above the native side where the paper is silent); `stored_size` the side that images are
    decoded to (None: `image_size`); `resized_crop` asks for random resized crops instead of padded ones."""

    image_size: int
    stored_size: int | None = None
    resized_crop: bool = False


PROTOCOLS = {
    "shapes": Protocol(image_size=42, stored_size=42),
    "cifar10": Protocol(image_size=42, stored_size=32),  # paper silent: 42
    "cifar100": Protocol(image_size=42, stored_size=32),  # paper silent: 42
    "stl10": Protocol(image_size=98, stored_size=96),  # paper silent: 98
    "tiny_imagenet": Protocol(image_size=70, stored_size=64),  # 70 follows from the FLOPs of Table 5
    "imagenet": Protocol(image_size=224, resized_crop=True),  # 224 follows from the FLOPs of Table 5
    "folder": Protocol(image_size=224),
}


@dataclass(frozen=True)
class Split:
    """One half of a dataset: class names, targets (n,) int64, and `read(i)`, which gives sample i as an RGB image and
    raises InputError naming the file when it cannot be read."""

    classes: list[str]
    targets: torch.Tensor
    read: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: np.ndarray) -> "Split":
        """The samples at `indices`, in that order."""
        return Split(self.classes, self.targets[torch.as_tensor(indices)], lambda i: self.read(int(indices[i])))


def load_splits(name: str, root: str | None, *, download: bool = False) -> tuple[Split, Split]:
    """The training and validation split of dataset `name` below the directory `root` (None: $GRPO_RM_DATA, else
    ./datasets). `download` fetches what its publisher lets one fetch. Raises InputError when data are missing or
    incomplete, saying which file belongs where."""
    if name not in PROTOCOLS:
        raise InputError(f"--dataset {name}: unknown; choose one of {', '.join(PROTOCOLS)}")
    if name == "shapes":
        return draw_shapes_split(5000, seed=0), draw_shapes_split(1000, seed=1)
    root = Path(root or os.environ.get("GRPO_RM_DATA") or "datasets")
    if not root.is_dir():
        if not download:
            raise InputError(f"--data-root {root}: no such directory; name the one that holds {name}, or add --download")
        try:
            root.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--data-root {root} cannot be created ({first_line(error)}); choose another directory") from error
    if name in ("cifar10", "cifar100", "stl10"):
        return _torchvision_splits(name, root, download)
    if name == "tiny_imagenet":
        return _tiny_imagenet_splits(root, download)
    if download:
        raise InputError(f"--download: {name} cannot be downloaded for you; put its files under --data-root {root}")
    if name == "imagenet":
        return _imagenet_splits(root)
    return _class_folder_splits(root)


def _torchvision_splits(name: str, root: Path, download: bool) -> tuple[Split, Split]:
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, which downloads and checks the archives' MD5 sums."""
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    which = [{"split": "train"}, {"split": "test"}] if name == "stl10" else [{"train": True}, {"train": False}]
    try:
        train, val = (dataset(str(root), download=download, **kwargs) for kwargs in which)
    except (OSError, RuntimeError, EOFError) as error:
        archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz", "stl10": "stl10_binary.tar.gz"}
        raise InputError(
            f"{name} under {root} is missing or incomplete ({first_line(error)}); "
            f"add --download, or unpack {archive[name]} there"
        ) from error

    def split(part) -> Split:
        pixels = part.data.transpose(0, 2, 3, 1) if name == "stl10" else part.data  # (n, H, W, 3) uint8
        targets = part.labels if name == "stl10" else part.targets
        return Split(list(part.classes), torch.as_tensor(targets).long(), lambda i: Image.fromarray(pixels[i]))

    return split(train), split(val)


def _tiny_imagenet_splits(root: Path, download: bool) -> tuple[Split, Split]:
    """Tiny-ImageNet in its official layout; classes in the order of wnids.txt."""
    home = root / "tiny-imagenet-200"
    remedy = f"remove what is there and add --download, or unpack tiny-imagenet-200.zip into {root} again"
    if download and not home.is_dir():
        _download_zip("http://cs231n.stanford.edu/tiny-imagenet-200.zip", root, "90528d7ca1a48142e341f4ef8d21d0de")
    for needed in ("wnids.txt", "train", "val/val_annotations.txt", "val/images"):
        if not (home / needed).exists():
            raise InputError(f"tiny_imagenet: {home / needed} is missing; {remedy}")

    classes = (home / "wnids.txt").read_text().split()
    train_files = {wnid: _image_files(home / "train" / wnid / "images") for wnid in classes}
    full = max(map(len, train_files.values()), default=0)
    if not full:
        raise InputError(f"tiny_imagenet: {home} lists no class or holds no training image; {remedy}")
    for wnid, files in train_files.items():  # every class has as many images as any other, unless unpacking was cut off
        if len(files) < full:
            raise InputError(f"tiny_imagenet: train/{wnid}/images has {len(files)} images, other classes {full}; {remedy}")

    rows = [line.split("\t")[:2] for line in (home / "val" / "val_annotations.txt").read_text().splitlines() if line]
    names = set(os.listdir(home / "val" / "images"))
    for row in rows:
        if len(row) < 2 or row[0] not in names or row[1] not in train_files:
            raise InputError(f"tiny_imagenet: val/val_annotations.txt lists {row[0]}, which is not there; {remedy}")
    if not rows or len(rows) < len(names):
        raise InputError(f"tiny_imagenet: val/val_annotations.txt lists {len(rows)} of {len(names)} images; {remedy}")
    index = {wnid: i for i, wnid in enumerate(classes)}
    train = [(file, index[wnid]) for wnid, files in train_files.items() for file in files]
    val = [(str(home / "val" / "images" / file), index[wnid]) for file, wnid in rows]
    return _file_split(classes, train), _file_split(classes, val)


def _download_zip(url: str, root: Path, md5: str) -> None:
    """Fetch and unpack an archive into `root`; nothing is unpacked before its MD5 sum is right."""
    try:
        download_and_extract_archive(url, str(root), md5=md5)
    except (OSError, RuntimeError) as error:
        raise InputError(f"--download: {url} failed ({first_line(error)}); fetch it by hand into {root}") from error


def _imagenet_splits(root: Path) -> tuple[Split, Split]:
    """ImageNet-1k as train/ and val/ class folders under `root` or root/imagenet, or from the official archives
    there, which torchvision checks and unpacks on the first call."""
    home = next((home for home in (root, root / "imagenet") if (home / "train").is_dir()), None)
    archives = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    if home is None or not (home / "val").is_dir():
        home = next((home for home in (root, root / "imagenet") if all((home / name).is_file() for name in archives)), None)
        if home is None:
            raise InputError(
                f"imagenet: {root} has neither train/ and val/ class folders nor the archives; "
                f"put {', '.join(archives)} there (image-net.org asks for a login)"
            )
        try:
            for split in ("train", "val"):
                datasets.ImageNet(str(home), split=split)
        except (OSError, RuntimeError) as error:
            raise InputError(f"imagenet: unpacking the archives in {home} failed: {first_line(error)}") from error
    return _class_folder_splits(home)


def _class_folder_splits(root: Path) -> tuple[Split, Split]:
    """A user's own images: train/<class>/* and val/<class>/*; classes in sorted order."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise InputError(f"--data-root {root}: {split}/ is missing; a folder set is train/<class>/*, val/<class>/*")
    classes = sorted(entry.name for entry in os.scandir(root / "train") if entry.is_dir())
    if len(classes) < 2:
        raise InputError(f"{root / 'train'} has {len(classes)} class folders; at least two are needed (train/<class>/*)")
    unknown = sorted(entry.name for entry in os.scandir(root / "val") if entry.is_dir() and entry.name not in classes)
    if unknown:
        raise InputError(f"{root / 'val' / unknown[0]}: no such class in {root / 'train'}; rename or remove it")
    splits = []
    for split in ("train", "val"):
        samples = []
        for label, name in enumerate(classes):
            folder = root / split / name
            files = _image_files(folder) if folder.is_dir() else []
            if split == "train" and not files:
                raise InputError(f"{folder} holds no image; add some or remove the folder")
            samples += [(file, label) for file in files]
        if not samples:
            raise InputError(f"{root / split} holds no image in class folders ({split}/<class>/*)")
        splits.append(_file_split(classes, samples))
    return splits[0], splits[1]


def _image_files(folder: Path) -> list[str]:
    """Paths of the images right in `folder`, sorted by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.path for entry in os.scandir(folder) if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES)


def _file_split(classes: list[str], samples: list[tuple[str, int]]) -> Split:
    files = np.array([file for file, _ in samples])  # one array: a list of strings would be copied into every worker
    return Split(classes, torch.tensor([label for _, label in samples]), lambda i: read_image(str(files[i])))


def read_image(file: str) -> Image.Image:
    """The image in `file` as RGB, also where it is grey or has a palette. Raises InputError naming the file."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = first_line(error).replace(f" {file!r}", "")
        raise InputError(f"image {file} cannot be read ({reason}); replace or remove it") from error


def limit(split: Split, count: int | None) -> Split:
    """At most `count` samples at even distances, so that sets sorted by class keep all their classes."""
    if count is None or count >= len(split):
        return split
    return split.subset(np.linspace(0, len(split) - 1, count).round().astype(int))


def fraction(split: Split, share: float, seed: int) -> Split:
    """A random share (0 < share <= 1) of the samples, the same for every method and process of one seed."""
    if share == 1:
        return split
    order = np.random.default_rng((seed, len(split))).permutation(len(split))
    return split.subset(np.sort(order[: max(1, round(share * len(split)))]))


# ------------------------------------------------------------------------------------------------------------------
# The embedded dataset


def _turn(radii: list[float], start: float = -90) -> list[tuple[float, float]]:
    """Corners at the given distances from the origin, at equal angles, from `start` degrees on."""
    angles = np.radians(start + 360 * np.arange(len(radii)) / len(radii))
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


_DISC = _turn([1] * 32)
SHAPES = {  # outline on [-1, 1]^2, and the outline of what is cut out of it
    "circle": (_DISC, None),
    "ring": (_DISC, [(0.55 * x, 0.55 * y) for x, y in _DISC]),
    "crescent": (_DISC, [(0.9 * x + 0.5, 0.9 * y) for x, y in _DISC]),
    "half_disc": ([(x, y + 0.5) for x, y in _DISC if y < 0.01], None),
    "triangle": (_turn([1.1] * 3), None),
    "square": ([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], None),
    "bar": ([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)], None),
    "star": (_turn([1.1, 0.45] * 5), None),
    "plus": (_turn([1.05, 0.42, 1.05] * 4, start=-75), None),
    "arrow": ([(-1, -0.25), (0, -0.25), (0, -0.8), (1, 0), (0, 0.8), (0, 0.25), (-1, 0.25)], None),
}


def draw_shape(label: int, rng: np.random.Generator, side: int = 42) -> np.ndarray:
    """A picture (side, side, 3) uint8 of the shape number `label` with random place, size, turn and colours, on a
    shaded background with noise and stray lines in front."""
    size = 2 * side  # drawn at twice the side, for smooth edges
    outline, hole = list(SHAPES.values())[label]
    scale = size * rng.uniform(0.25, 0.42)
    centre = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - scale)
    angle = math.radians(rng.uniform(-30, 30))
    turn = scale * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    pen.polygon([tuple(point) for point in np.array(outline) @ turn + centre], fill=255)
    if hole:
        pen.polygon([tuple(point) for point in np.array(hole) @ turn + centre], fill=0)

    corners = rng.integers(0, 140, (2, 2, 3), dtype=np.uint8)  # the shape is brighter than its background
    picture = Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)
    colour = rng.integers(120, 256, 3)
    picture.paste(tuple(colour), mask=mask)
    pen = ImageDraw.Draw(picture)
    for _ in range(3):
        pen.line(tuple(rng.uniform(0, size, 4)), fill=tuple(rng.integers(0, 256, 3)), width=2)
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


def draw_shapes_split(count: int, seed: int) -> Split:
    """`count` shapes, the classes in turn; a function of `count` and `seed` alone."""
    targets = np.arange(count) % len(SHAPES)

    def read(i: int) -> Image.Image:
        return Image.fromarray(draw_shape(int(targets[i]), np.random.default_rng((seed, i))))

    return Split(list(SHAPES), torch.from_numpy(targets).long(), read)


# ------------------------------------------------------------------------------------------------------------------
# From samples to batches


ORDER, AUGMENT, CROP, HEAD = range(4)  # what a stream of random numbers is for


def stream_seed(purpose: int, *key: int) -> int:
    """The seed of the stream of random numbers that belongs to `purpose` and `key`, whatever was drawn elsewhere."""
    return int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0])


def random_generator(purpose: int, *key: int) -> torch.Generator:
    """A generator at the start of that stream."""
    return torch.Generator().manual_seed(stream_seed(purpose, *key))


def square(image: Image.Image, side: int, margin: float = 1.0) -> np.ndarray:
    """The centre of `image` as (side, side, 3) uint8, after a bicubic resize of its shorter side to side * margin."""
    shorter = round(side * margin)
    if min(image.size) != shorter:
        scale = shorter / min(image.size)
        new_size = [max(shorter, round(length * scale)) for length in image.size]
        image = image.resize(new_size, Image.Resampling.BICUBIC)
    left, top = ((length - side) // 2 for length in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)))


class _Pixels:
    """The decoded pixels of a split: for every list of samples `fetch` yields (B, side, side, 3) uint8 on the device, and
    the samples (B,) that they come from.

    A split that fits into RESIDENT_BYTES is decoded once and kept on the device; one that does not, or that needs
    random resized crops of the full image, is decoded by DataLoader workers as it is asked for. A file that cannot be
    read raises InputError; with `skip_unreadable` the next sample stands in for it, and `unreadable` says which and why.
    """

    def __init__(
        self, split: Split, side: int, world, workers: int, *, skip_unreadable: bool, margin: float = 1.0, resized_crop: bool = False
    ):
        self.split, self.side, self.device, self.workers, self.margin = split, side, world.device, workers, margin
        self.resized_crop = v2.RandomResizedCrop(side, interpolation=InterpolationMode.BICUBIC) if resized_crop else None
        self.skip_unreadable, self.unreadable = skip_unreadable, {}
        self.resident = None
        if not resized_crop and len(split) * side * side * 3 <= RESIDENT_BYTES:
            pixels = torch.empty(len(split), side, side, 3, dtype=torch.uint8)
            sources = torch.arange(len(split))

            def decode(i: int) -> None:
                image, sources[i], unreadable = self._decode(i)
                pixels[i] = torch.from_numpy(image.copy())
                self.unreadable.update(unreadable)

            with ThreadPoolExecutor(max(1, workers)) as pool:
                jobs = pool.map(decode, range(len(split)))
                list(tqdm(jobs, "decode", len(split), disable=None if world.rank == 0 else True, leave=False, unit=" images"))
            self.resident, self.sources = pixels.to(self.device), sources
            self._check_share()

    def _decode(self, index: int, crop_key: tuple[int, ...] = ()) -> tuple[np.ndarray, int, dict[int, str]]:
        """The pixels of sample `index`, or of the next one that can be read; which one; and why those before it could not."""
        unreadable = {}
        for i in range(index, index + len(self.split)):
            try:
                image = self.split.read(i % len(self.split))
                break
            except InputError as error:
                unreadable[i % len(self.split)] = str(error)
                if not self.skip_unreadable or len(unreadable) > 0.01 * len(self.split):
                    raise
        if self.resized_crop is None:
            return square(image, self.side, self.margin), i % len(self.split), unreadable
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(CROP, *crop_key, index))
            return np.asarray(self.resized_crop(image)), i % len(self.split), unreadable

    def _check_share(self) -> None:
        if len(self.unreadable) > 0.01 * len(self.split):
            some = next(iter(self.unreadable.values()))
            raise InputError(f"{len(self.unreadable)} of {len(self.split)} images cannot be read, more than 1 %; among them: {some}")

    def fetch(self, batches: list[torch.Tensor], crop_key: tuple[int, ...] = ()) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        if self.resident is not None:
            for indices in batches:
                yield self.resident[indices.to(self.device)], self.sources[indices]
            return

        def load(indices: list[int]) -> tuple | InputError:
            try:
                images, sources, unreadable = zip(*(self._decode(i, crop_key) for i in indices), strict=True)
                return torch.from_numpy(np.stack(images)), torch.tensor(sources), unreadable
            except InputError as error:  # handed over as a value: the DataLoader would wrap it into a traceback
                return error

        for batch in DataLoader(
            [indices.tolist() for indices in batches],
            batch_size=None,
            collate_fn=load,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if self.workers else None,  # other ways cannot hand over a Split's functions
        ):
            if isinstance(batch, InputError):
                raise batch
            pixels, sources, unreadable = batch
            for found in unreadable:
                self.unreadable.update(found)
            self._check_share()
            yield pixels.to(self.device, non_blocking=True), sources


def pad_crop_flip(pixels: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor, pad: int) -> torch.Tensor:
    """Zero padding by `pad` on every side, then for each image the window of the old size at `shifts` (B, 2) in
    0..2*pad (row, column), mirrored where `flips` (B,) is true. pixels (B, H, W, 3) uint8; returns the same shape."""
    B, H, W, _ = pixels.shape
    rows = shifts[:, :1] + torch.arange(H, device=pixels.device)  # (B, H)
    columns = torch.arange(W, device=pixels.device).expand(B, W)
    columns = shifts[:, 1:] + torch.where(flips[:, None], columns.flip(1), columns)  # (B, W)
    padded = F.pad(pixels, (0, 0, pad, pad, pad, pad))  # (B, H + 2 pad, W + 2 pad, 3)
    images = torch.arange(B, device=pixels.device)[:, None, None]
    return padded[images, rows[:, :, None], columns[:, None, :]]


def to_input(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, image_size, image_size) float32: bicubic (antialiased), ImageNet mean and std."""
    images = pixels.permute(0, 3, 1, 2)  # (B, 3, S, S), channels last in memory
    images = v2.functional.resize(images, [image_size] * 2, InterpolationMode.BICUBIC, antialias=True)
    mean, std = _mean_and_std(pixels.device)
    return images.float().sub_(mean).div_(std).contiguous()


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each, of bytes; made once, for a copy to a GPU waits for it."""
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


class TrainLoader:
    """Batches of one rank: `for images, targets in loader.epoch(e)` with images (B, 3, S, S) float32, targets (B,).

    Global batch number s of epoch e holds the samples s*m .. (s+1)*m of a permutation drawn from (seed, e); the last
    one of an epoch may be smaller. Rank r gets the r-th of `world_size` near-equal runs of it. Where a small last
    batch has nothing for a rank, it gets one image whose target is IGNORE, so that all ranks take the same steps.
    """

    def __init__(self, split: Split, name: str, image_size: int, batch_size: int, world, workers: int, *, seed: int, augment: bool, skip_unreadable: bool = False):
        protocol = PROTOCOLS[name]
        self.batch_size, self.image_size, self.seed, self.augment = batch_size, image_size, seed, augment
        self.world = world
        self.resized_crop = protocol.resized_crop and augment
        side = protocol.stored_size or image_size
        self.pixels = _Pixels(split, side, world, workers, skip_unreadable=skip_unreadable, resized_crop=self.resized_crop)
        self.targets, self.num_samples = split.targets, len(split)

    def __len__(self) -> int:
        """The number of steps in an epoch."""
        return math.ceil(len(self.targets) / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of `epoch`, from number `start` on."""
        order = torch.randperm(len(self.targets), generator=random_generator(ORDER, self.seed, epoch))
        batches = order.split(self.batch_size)[start:]
        runs = [torch.arange(len(batch)).tensor_split(self.world.size)[self.world.rank] for batch in batches]
        mine = [batch[run if len(run) else slice(1)] for batch, run in zip(batches, runs, strict=True)]
        for step, (pixels, sources) in enumerate(self.pixels.fetch(mine, crop_key=(self.seed, epoch))):
            run, targets = runs[step], self.targets[sources]
            if not len(run):
                run, targets = torch.arange(1), torch.full_like(targets, IGNORE)
            if self.augment:
                pixels = self._augment(pixels, run, len(batches[step]), random_generator(AUGMENT, self.seed, epoch, start + step))
            yield to_input(pixels, self.image_size), targets.to(self.world.device)

    def _augment(self, pixels: torch.Tensor, run: torch.Tensor, total: int, generator: torch.Generator) -> torch.Tensor:
        """Drawn for the whole global batch, of which this rank holds the run: the same whatever the number of ranks."""
        pad = 0 if self.resized_crop else pixels.shape[1] // 8  # 4 pixels for CIFAR, 8 for Tiny-ImageNet
        shifts = torch.randint(0, 2 * pad + 1, (total, 2), generator=generator)[run]
        flips = (torch.rand(total, generator=generator) < 0.5)[run]
        return pad_crop_flip(pixels, shifts.to(pixels.device), flips.to(pixels.device), pad)


class EvalLoader:
    """Every sample of a split once, in order and without augmentation: yields (indices (B,), images (B, 3, S, S),
    targets (B,)). Whole batches are dealt to the ranks in turn, so a sample's batch is the same for any number of
    processes, and so are its features to the last bit."""

    def __init__(self, split: Split, name: str, image_size: int, batch_size: int, world, workers: int, *, skip_unreadable: bool = False):
        protocol = PROTOCOLS[name]
        self.image_size, self.device, self.targets, self.num_samples = image_size, world.device, split.targets, len(split)
        batches = torch.arange(len(split)).split(batch_size)[world.rank :: world.size]
        self.mine = torch.cat(batches) if batches else torch.arange(0)
        self.batch_size = batch_size
        margin = 256 / 224 if protocol.resized_crop else 1.0  # ImageNet's habit: resize to 256, cut out 224
        side = protocol.stored_size or image_size
        self.pixels = _Pixels(split.subset(self.mine.numpy()), side, world, workers, margin=margin, skip_unreadable=skip_unreadable)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        local = list(torch.arange(len(self.mine)).split(self.batch_size)) if len(self.mine) else []
        for places, (pixels, sources) in zip(local, self.pixels.fetch(local), strict=True):
            yield self.mine[places], to_input(pixels, self.image_size), self.targets[self.mine[sources]].to(self.device)



# ------------------------------------------------------------------------------------------------------------------
# Arguments that the stages share


def add_data_arguments(parser: ArgumentParser) -> None:
    """Which images, and how they are prepared."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=list(PROTOCOLS), default="shapes", help="shapes is drawn on the fly; folder is a user's own")
    group.add_argument("--data-root", metavar="DIR", help="where the datasets live; default: $GRPO_RM_DATA, else ./datasets")
    group.add_argument("--download", action="store_true", help="fetch what may be fetched: cifar10, cifar100, stl10, tiny_imagenet")
    group.add_argument("--image-size", type=number(1, kind=int), help="side in pixels; default: the protocol's for the dataset")
    group.add_argument("--limit-train", type=number(1, kind=int), metavar="N", help="N training images at even distances")
    group.add_argument("--limit-val", type=number(1, kind=int), metavar="N", help="N validation images at even distances")
