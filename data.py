"""Datasets, transforms and loaders: everything that depends on samples; and how every stage answers bad input.

Every set becomes two splits (train, val): a `Split` of labelled images, or a `SceneSplit` of images with masks for
segmentation. A loader turns a split into batches in three stages:

    decode    file -> RGB uint8 square of the set's stored side       once when the set fits into memory, else in workers
    augment   random crop after zero padding (not scenes), flip       whole batches, on the device
    resize    bicubic to the protocol's side, ImageNet mean and std   whole batches, on the device

The sequence of global batches, and what augmentation does to each of their samples, are functions of the seed, the
epoch and the step alone: the number of processes, workers or accumulation steps changes neither.

Letters: B images, H W pixels, M side of a map of labels, n samples of a split. `world` is this process among torchrun's: rank, size, device.
"""

import argparse
import colorsys
import contextlib
import fcntl
import functools
import hashlib
import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch.utils.data import DataLoader
from torchvision import datasets, tv_tensors
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

IGNORE = -100  # in batches: a target that takes no part in loss or scores; 255 would be a class of ImageNet
VOID = 255  # in masks: a pixel that takes no part
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
        status, message, together = 0, "", False
        try:
            main(argv)
        except KeyboardInterrupt:  # before or after the part of a run that can be saved
            status, message = 130, "interrupted"
        except Stopped as stopped:  # as Diverged, by all ranks together
            status, message, together = stopped.status, str(stopped), True
        except InputError as error:
            status, message = 2, f"error: {error}"
        except PermissionError as error:
            status, message = 2, f"error: {error.filename}: permission denied; make it accessible, or name another"
        except Diverged as error:
            status, message, together = 1, f"error: {error}", True
        except torch.OutOfMemoryError as error:
            hint = "--grad-accum 2 (4, ...) trains the same in less memory, --recompute-activations too; evaluations take a smaller --batch-size"
            status, message = 1, f"error: {first_line(error)} {hint}"
        except RuntimeError as error:
            if not (isinstance(error, torch.distributed.DistError) or LOST.search(str(error))):
                raise
            status, message = 1, f"error: another process ended or hangs ({first_line(error)}); its own message says why"
        else:
            together = True
        if together and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if not message:
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
    decoded to (None: `image_size`); `resized_crop` asks for random resized crops instead of padded ones; `hidden_dim`
    is the width of the head."""

    image_size: int
    stored_size: int | None = None
    resized_crop: bool = False
    hidden_dim: int = 256


PROTOCOLS = {
    "classification": {
        "shapes": Protocol(image_size=42, stored_size=42),
        "cifar10": Protocol(image_size=42, stored_size=32),  # paper silent: 42
        "cifar100": Protocol(image_size=42, stored_size=32),  # paper silent: 42
        "stl10": Protocol(image_size=98, stored_size=96),  # paper silent: 98
        "tiny_imagenet": Protocol(image_size=70, stored_size=64),  # 70 follows from the FLOPs of Table 5
        "imagenet": Protocol(image_size=224, resized_crop=True),  # 224 follows from the FLOPs of Table 5
        "folder": Protocol(image_size=224),
    },
    "segmentation": {
        "shapes_seg": Protocol(image_size=112, hidden_dim=64),
        "voc2012": Protocol(image_size=448, hidden_dim=64),  # 64 and 256 fit the FLOPs of Table 5 best
        "ade20k": Protocol(image_size=448),
        "coco_stuff": Protocol(image_size=448),
        "folder": Protocol(image_size=448),
    },
}


def data_root(root: str | None) -> Path:
    """The directory of the datasets: `root`, else $GRPO_RM_DATA, else ./datasets."""
    return Path(root or os.environ.get("GRPO_RM_DATA") or "datasets")


def task_of(name: str, root: str | None) -> str:
    """ "classification" or "segmentation"; `folder` is the latter where its directory holds masks/. InputError for a name
    that neither has."""
    if name == "folder":
        return "segmentation" if (data_root(root) / "masks").is_dir() else "classification"
    for task, protocols in PROTOCOLS.items():
        if name in protocols:
            return task
    known = ", ".join(dict.fromkeys(name for protocols in PROTOCOLS.values() for name in protocols))
    raise InputError(f"--dataset {name}: unknown; choose one of {known}")


@dataclass(frozen=True)
class Split:
    """One half of a classification set: class names, targets (n,) int64, and `read(i)`, which gives sample i as an RGB
    image and raises InputError naming the file when it cannot be read. `files` (n,) are their paths, where they have any."""

    classes: list[str]
    targets: torch.Tensor
    read: Callable[[int], Image.Image]
    files: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: np.ndarray) -> "Split":
        """The samples at `indices`, in that order."""
        files = None if self.files is None else self.files[indices]
        return Split(self.classes, self.targets[torch.as_tensor(indices)], lambda i: self.read(int(indices[i])), files)


@dataclass(frozen=True)
class SceneSplit:
    """One half of a segmentation set: class names, the number n of scenes, and `read(i)`, which gives scene i as an RGB
    image and its mask (H, W) uint8 of the same size, with class indices and VOID. It raises InputError naming the file
    when either cannot be used. `files` (n, 2) are the paths of both, where they have any."""

    classes: list[str]
    count: int
    read: Callable[[int], tuple[Image.Image, np.ndarray]]
    files: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count

    def subset(self, indices: np.ndarray) -> "SceneSplit":
        """The scenes at `indices`, in that order."""
        files = None if self.files is None else self.files[indices]
        return SceneSplit(self.classes, len(indices), lambda i: self.read(int(indices[i])), files)


def load_splits(name: str, root: str | None, *, download: bool = False) -> tuple[Split, Split] | tuple[SceneSplit, SceneSplit]:
    """The training and validation split of dataset `name` below the directory `root` (None: $GRPO_RM_DATA, else
    ./datasets). `download` fetches what its publisher lets one fetch. Raises InputError when data are missing or
    incomplete, saying which file belongs where."""
    task = task_of(name, root)
    if name == "shapes":
        return draw_shapes_split(5000, seed=0), draw_shapes_split(1000, seed=1)
    if name == "shapes_seg":
        return draw_scenes_split(2000, seed=0), draw_scenes_split(400, seed=1)
    root = data_root(root)
    if not root.is_dir():
        if not download:
            raise InputError(f"--data-root {root}: no such directory; name the one that holds {'your images' if name == 'folder' else name + ', or add --download'}")
        try:
            root.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"--data-root {root} cannot be created ({first_line(error)}); choose another directory") from error
    if name in ("cifar10", "cifar100", "stl10"):
        return _torchvision_splits(name, root, download)
    if name == "tiny_imagenet":
        return _tiny_imagenet_splits(root, download)
    if name == "voc2012":
        return _voc_splits(root, download)
    if name == "ade20k":
        return _ade20k_splits(root, download)
    if name == "coco_stuff":
        return _coco_stuff_splits(root, download)
    if download:
        raise InputError(f"--download: {name} cannot be downloaded for you; put its files under --data-root {root}")
    if name == "imagenet":
        return _imagenet_splits(root)
    return _mask_folder_splits(root) if task == "segmentation" else _class_folder_splits(root)


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
            f"{'try again' if download else 'add --download'}, or unpack {archive[name]} there"
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
    for split, archive, left_over in zip(("train", "val"), archives[1:], ("*.tar", "*.JPEG"), strict=True):
        if (home / archive).is_file() and next((home / split).glob(left_over), None):  # torchvision does not go on where it was stopped
            raise InputError(f"imagenet: {home / split} was not unpacked to its end; remove it, and {archive} is unpacked again")
    return _class_folder_splits(home)


def _class_folder_splits(root: Path) -> tuple[Split, Split]:
    """A user's own images: train/<class>/* and val/<class>/*; classes in sorted order."""
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise InputError(f"--data-root {root}: {split}/ is missing; a folder set is train/<class>/*, val/<class>/*, or for segmentation images/{{train,val}}/*, masks/{{train,val}}/*.png")
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
    return Split(classes, torch.tensor([label for _, label in samples]), lambda i: read_image(str(files[i])), files)


def read_image(file: str) -> Image.Image:
    """The image in `file` as RGB, also where it is grey or has a palette. Raises InputError naming the file."""
    try:
        with Image.open(file) as image:
            if image.mode in ("I", "F"):
                raise ValueError("32-bit numbers, whose range is not known; save it with 8 or 16 bits")
            if image.mode.startswith("I;16"):  # Pillow would cut 16 bits off at 255 instead of scaling them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = first_line(error).replace(f" {file!r}", "")
        raise InputError(f"image {file} cannot be read ({reason}); replace or remove it") from error


def read_labels(file: str) -> np.ndarray:
    """The class indices in the mask `file`, (H, W) of integers; a palette is not applied. Raises InputError naming the
    file, also where it holds colours."""
    try:
        with Image.open(file) as mask:
            if mask.mode not in ("1", "L", "P", "I") and not mask.mode.startswith("I;16"):
                raise InputError(f"mask {file} is {mask.mode}, not one class index a pixel; save it as a grey or palette PNG of indices")
            if mask.format == "JPEG":
                raise InputError(f"mask {file} is a JPEG, which changes class indices; save it as a grey or palette PNG of indices")
            return np.asarray(mask, dtype=np.int32)
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        reason = first_line(error).replace(f" {file!r}", "")
        raise InputError(f"mask {file} cannot be read ({reason}); replace or remove it") from error


def label_table(label_to_class: dict[int, int]) -> np.ndarray:
    """(256,) int16 look-up table from the labels in a set's masks to class indices or VOID; -1 for labels that it does not have."""
    table = np.full(256, -1, np.int16)
    table[list(label_to_class)] = list(label_to_class.values())
    return table


VOC_CLASSES = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]
VOC_TABLE = label_table({i: i for i in (*range(21), VOID)})
ADE20K_TABLE = label_table({0: VOID} | {i: i - 1 for i in range(1, 151)})

# COCO-stuff numbers 91 things from 0 and 91 kinds of stuff from 91; eleven of the things were never annotated.
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO_TABLE = label_table(
    {VOID: VOID} | dict.fromkeys(COCO_UNUSED, VOID) | {old: new for new, old in enumerate(i for i in range(182) if i not in COCO_UNUSED)}
)
COCO_CLASSES = [name for name in MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"][1:] if name != "N/A"] + (
    "banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other ceiling-tile cloth clothes "
    "clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble floor-other floor-stone floor-tile "
    "floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill house leaves light mat metal "
    "mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform playingfield railing "
    "railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow solid-other stairs stone straw "
    "structural-other table tent textile-other towel tree vegetable wall-brick wall-concrete wall-other wall-panel wall-stone "
    "wall-tile wall-wood water-other waterdrops window-blind window-other wood"
).split()


def _scene_split(classes: list[str], pairs: list[tuple[str, str]], table: np.ndarray, hint: str = "", least: int = 1) -> SceneSplit:
    """Scenes from (image file, mask file); `table` turns a mask's labels into class indices. A split whose masks have fewer than
    `least` classes, or are all void, is refused here: nothing would come of it."""
    files = np.array(pairs)  # an array: a list of strings would be copied into every worker
    images, masks = files.T
    hint = hint or f"labels are 0 to {len(classes) - 1}, and {VOID} for void; correct the mask or the list of classes"

    def labels(i: int) -> np.ndarray:
        raw = read_labels(str(masks[i]))
        mask = np.where((raw >= 0) & (raw < 256), table[raw & 255], -1)
        if (mask < 0).any():
            raise InputError(f"mask {masks[i]} has label {raw[mask < 0].max()}; {hint}")
        return mask.astype(np.uint8)

    def read(i: int) -> tuple[Image.Image, np.ndarray]:
        image, mask = read_image(str(images[i])), labels(i)
        if image.size != mask.shape[::-1]:
            width, height = mask.shape[::-1]
            raise InputError(f"mask {masks[i]} is {width} x {height}, its image {images[i]} {image.size[0]} x {image.size[1]}; they must be equal")
        return image, mask

    found: set[int] = set()
    for i in range(len(masks)):
        try:
            found |= set(np.unique(labels(i)).tolist()) - {VOID}
        except InputError:  # the decoding will say so, or pass over it
            break
        if len(found) >= least:
            break
    else:
        content = f"nothing but class {min(found)} and void ({VOID}); two classes are 0 and 1" if found else f"nothing but void ({VOID})"
        raise InputError(f"all {len(masks)} masks in {Path(masks[0]).parent} have {content}: nothing can be learned or scored")
    return SceneSplit(classes, len(images), read, files)


def _pair_up(images: Path, masks: Path) -> list[tuple[str, str]]:
    """(image, mask) of equal names but for the suffix. InputError for an image without mask, a mask without image, or none."""
    image_files, mask_files = ({Path(file).stem: file for file in _image_files(folder)} for folder in (images, masks))
    for folder, files in ((images, image_files), (masks, mask_files)):
        twice = next((file for file in _image_files(folder) if files[Path(file).stem] != file), None)
        if twice:
            raise InputError(f"{twice} and {files[Path(twice).stem]} differ in their suffix only; remove one")
    for name, file in image_files.items():
        if name not in mask_files:
            raise InputError(f"image {file} has no mask; {masks / name}.png is missing")
    for name, file in mask_files.items():
        if name not in image_files:
            raise InputError(f"mask {file} has no image of that name in {images}; unpack the images again, or remove it")
    if not image_files:
        raise InputError(f"{images} holds no image; put them there, and their masks in {masks}")
    return [(file, mask_files[name]) for name, file in image_files.items()]


def _voc_splits(root: Path, download: bool) -> tuple[SceneSplit, SceneSplit]:
    """PASCAL VOC 2012 segmentation through torchvision, which downloads and checks the archive."""
    splits = []
    for part in ("train", "val"):
        try:
            dataset = datasets.VOCSegmentation(str(root), year="2012", image_set=part, download=download and not (root / "VOCdevkit" / "VOC2012").is_dir())
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            raise InputError(f"voc2012 under {root} is missing or incomplete ({reason}); {'try again' if download else 'add --download'}, or unpack VOCtrainval_11-May-2012.tar there") from error
        pairs = list(zip(dataset.images, dataset.masks, strict=True))
        absent = next((file for pair in pairs for file in pair if not os.path.isfile(file)), None)
        if absent or not pairs:
            raise InputError(f"voc2012: {absent or f'the list of {part} scenes'} is missing or empty; unpack VOCtrainval_11-May-2012.tar into {root} again")
        splits.append(_scene_split(VOC_CLASSES, pairs, VOC_TABLE))
    return splits[0], splits[1]


def _ade20k_splits(root: Path, download: bool) -> tuple[SceneSplit, SceneSplit]:
    """ADE20k's scene parsing set; class names from objectInfo150.txt where it is there, as it is in the archive."""
    home = root / "ADEChallengeData2016"
    if download and not home.is_dir():
        _download_zip("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip", root, "7328b3957e407ddae1d3cbf487f149ef")
    if not home.is_dir():
        raise InputError(f"ade20k: {home} is missing; add --download, or unpack ADEChallengeData2016.zip into {root}")
    info = home / "objectInfo150.txt"
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:]]
    if len(set(classes)) != 150:
        classes = [f"class {i}" for i in range(1, 151)]
    folders = [(home / "images" / part, home / "annotations" / part) for part in ("training", "validation")]
    hint = "ADE20k's are 0 (void) and 1 to 150; use the annotations of ADEChallengeData2016.zip"
    train, val = (_scene_split(classes, _pair_up(*pair), ADE20K_TABLE, hint) for pair in folders)
    return train, val


def _coco_stuff_splits(root: Path, download: bool) -> tuple[SceneSplit, SceneSplit]:
    """COCO-stuff with 171 classes: the images of COCO 2017 and the masks of stuffthingmaps_trainval2017.zip."""
    source = "calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
    pixelmaps = [path for name in ("stuff_train2017_pixelmaps", "stuff_val2017_pixelmaps") for path in (root / name, root / "stuffthingmaps" / name)]
    if not (root / "stuffthingmaps").is_dir():
        found = next((f"{path} is stuff only and cannot be used; " for path in pixelmaps if path.exists()), "")
        raise InputError(f"coco_stuff: {found}{root / 'stuffthingmaps'} is missing; unpack {source} there (it has no published checksum, so --download leaves it to you)")
    for name, md5 in (("train2017", "cced6f7f71b7629ddf16f17bbcfab6b2"), ("val2017", "442b8da7639aecaf257c1dceb8ba8c80")):
        if download and not (root / name).is_dir():
            _download_zip(f"http://images.cocodataset.org/zips/{name}.zip", root, md5)
        for folder in (root / name, root / "stuffthingmaps" / name):
            if not folder.is_dir():
                raise InputError(f"coco_stuff: {folder} is missing; images: images.cocodataset.org/zips/{name}.zip, masks: {source}")
    hint = f"the set has 0 to 181 and {VOID}. 182 and 183 mean the stuff-only pixelmaps, where things have no class: use {source}"
    folders = [(root / part, root / "stuffthingmaps" / part) for part in ("train2017", "val2017")]
    train, val = (_scene_split(COCO_CLASSES, _pair_up(*pair), COCO_TABLE, hint) for pair in folders)
    return train, val


def _highest_label(file: str) -> int:
    """The highest class index in a mask; 0 where it cannot be read: the decoding will say so, or pass over it."""
    try:
        labels = read_labels(file)
    except InputError:
        return 0
    return int(labels[labels != VOID].max(initial=0))


def _mask_folder_splits(root: Path) -> tuple[SceneSplit, SceneSplit]:
    """A user's own scenes: images/{train,val}/*, masks/{train,val}/*.png; class names one a line in classes.txt, or as many
    numbers as the masks use."""
    pairs = {part: _pair_up(root / "images" / part, root / "masks" / part) for part in ("train", "val")}
    if (root / "classes.txt").is_file():
        try:
            lines = (root / "classes.txt").read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise InputError(f"{root / 'classes.txt'} is not text in UTF-8 ({first_line(error)}); save it as such") from error
        classes = [line.strip() for line in lines if line.strip()]
        if len(set(classes)) < len(classes):
            raise InputError(f"{root / 'classes.txt'} names {max(classes, key=classes.count)!r} twice; give every class a name of its own")
    else:
        with ThreadPoolExecutor() as pool:
            highest = pool.map(_highest_label, [mask for part in pairs.values() for _, mask in part])
            classes = [f"class {i}" for i in range(max(highest) + 1)]
    if not 2 <= len(classes) <= VOID:
        for _, mask in pairs["train"][:1]:
            read_labels(mask)  # one that is no mask of indices is the likely cause
        where = root / "classes.txt" if (root / "classes.txt").is_file() else root / "masks"
        raise InputError(f"{where}: {len(classes)} classes; between 2 and {VOID} are possible, with indices from 0 ({VOID} is void)")
    table = label_table({i: i for i in (*range(len(classes)), VOID)})
    return _scene_split(classes, pairs["train"], table, least=2), _scene_split(classes, pairs["val"], table)


def limit(split: Split | SceneSplit, count: int | None) -> Split | SceneSplit:
    """At most `count` samples at even distances, so that sets sorted by class keep all their classes."""
    if count is None or count >= len(split):
        return split
    return split.subset(np.linspace(0, len(split) - 1, count).round().astype(int))


def fraction(split: Split | SceneSplit, share: float, seed: int) -> Split | SceneSplit:
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


def _silhouette(label: int, size: int, scale: float, centre: np.ndarray, angle: float) -> Image.Image:
    """The shape number `label` in white on black, (size, size); scale in pixels, angle in degrees."""
    outline, hole = list(SHAPES.values())[label]
    angle = math.radians(angle)
    turn = scale * np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    mask = Image.new("L", (size, size))
    pen = ImageDraw.Draw(mask)
    pen.polygon([tuple(point) for point in np.array(outline) @ turn + centre], fill=255)
    if hole:
        pen.polygon([tuple(point) for point in np.array(hole) @ turn + centre], fill=0)
    return mask


def _draw(silhouettes: list[tuple[Image.Image, float | None]], rng: np.random.Generator, side: int) -> np.ndarray:
    """A picture (side, side, 3) uint8 of bright silhouettes, of the given hues or any, on a darker, shaded background, with
    noise and stray lines in front. The silhouettes have twice the side, for smooth edges."""
    size = 2 * side
    corners = rng.integers(0, 140, (2, 2, 3), dtype=np.uint8)
    picture = Image.fromarray(corners).resize((size, size), Image.Resampling.BILINEAR)
    for mask, hue in silhouettes:
        tint = colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 0.9), rng.uniform(0.7, 1)) if hue is not None else None
        picture.paste(tuple(int(255 * x) for x in tint) if tint else tuple(rng.integers(120, 256, 3)), mask=mask)
    pen = ImageDraw.Draw(picture)
    for _ in range(3):
        pen.line(tuple(rng.uniform(0, size, 4)), fill=tuple(rng.integers(0, 256, 3)), width=2)
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BOX), dtype=np.float32)
    return np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)


def draw_shape(label: int, rng: np.random.Generator, side: int = 42) -> np.ndarray:
    """A picture (side, side, 3) uint8 of the shape number `label` with random place, size, turn and colours."""
    size = 2 * side
    scale = size * rng.uniform(0.25, 0.42)
    centre = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - scale)
    return _draw([(_silhouette(label, size, scale, centre, rng.uniform(-30, 30)), None)], rng, side)


def draw_scene(rng: np.random.Generator, side: int = 112) -> tuple[np.ndarray, np.ndarray]:
    """A picture (side, side, 3) uint8 of two to four shapes that may cover each other, and its mask (side, side) uint8: 0
    background, 1 + the shape's number, VOID on a border of two pixels around every shape. A hue belongs to two kinds of
    shape, so that colour helps but does not decide."""
    size = 2 * side
    silhouettes, mask = [], np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(2, 5)):
        label, scale = int(rng.integers(len(SHAPES))), size * rng.uniform(0.14, 0.26)
        centre = size / 2 + rng.uniform(-1, 1, 2) * (size / 2 - scale)
        silhouette = _silhouette(label, size, scale, centre, rng.uniform(-30, 30))
        silhouettes.append((silhouette, (label + rng.uniform(-0.8, 0.8)) / len(SHAPES) % 1))
        small = silhouette.resize((side, side), Image.Resampling.BOX).point(lambda value: 255 * (value > 127))
        mask[np.asarray(small.filter(ImageFilter.MaxFilter(3))) > 0] = VOID
        mask[np.asarray(small.filter(ImageFilter.MinFilter(3))) > 0] = 1 + label
    return _draw(silhouettes, rng, side), mask


def draw_shapes_split(count: int, seed: int) -> Split:
    """`count` shapes, the classes in turn; a function of `count` and `seed` alone."""
    targets = np.arange(count) % len(SHAPES)

    def read(i: int) -> Image.Image:
        return Image.fromarray(draw_shape(int(targets[i]), np.random.default_rng((seed, i))))

    return Split(list(SHAPES), torch.from_numpy(targets).long(), read)


def draw_scenes_split(count: int, seed: int) -> SceneSplit:
    """`count` scenes of shapes; a function of `count` and `seed` alone."""

    def read(i: int) -> tuple[Image.Image, np.ndarray]:
        picture, mask = draw_scene(np.random.default_rng((seed, i)))
        return Image.fromarray(picture), mask

    return SceneSplit(["background", *SHAPES], count, read)


# ------------------------------------------------------------------------------------------------------------------
# From samples to batches


ORDER, AUGMENT, CROP, HEAD, GROUP = range(5)  # what a stream of random numbers is for


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


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """(..., 3, H, W) uint8 -> (..., 3, side, side) uint8: bicubic, antialiased. The sides become equal, whatever they were."""
    return v2.functional.resize(images, [side] * 2, InterpolationMode.BICUBIC, antialias=True)


def resize_mask(mask: torch.Tensor, side: int) -> torch.Tensor:
    """(H, W) labels -> (side, side), each the label at the centre of its pixel: no label is invented. (What older
    torchvision does to a tv_tensors.Mask takes the pixel's corner instead: half a pixel beside the image.)"""
    return v2.functional.resize(mask[None], [side] * 2, InterpolationMode.NEAREST_EXACT)[0]


Decode = Callable[[int, tuple[int, ...]], tuple[torch.Tensor, ...]]


def decode_labelled(split: Split, side: int, *, margin: float = 1.0, resized_crop: bool = False) -> Decode:
    """sample i -> its pixels (side, side, 3) uint8 and its target (). A random resized crop depends on i and the key alone."""
    random_crop = v2.RandomResizedCrop(side, interpolation=InterpolationMode.BICUBIC)

    def decode(i: int, key: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        image = split.read(i)
        if not resized_crop:
            return torch.tensor(square(image, side, margin)), split.targets[i]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(CROP, *key, i))
            return torch.tensor(np.asarray(random_crop(image))), split.targets[i]

    return decode


def labelled_recipe(split: Split, side: int, margin: float = 1.0) -> str:
    """What decides the bytes that decode_labelled gives, beside the files: part of the name of their cache."""
    return f"labelled {side} {margin:g} {split.targets.tolist()}"


def decode_scene(split: SceneSplit, sides: list[int], map_size: int | None) -> Decode:
    """scene i -> its pixels (side, side, 3) uint8 for each of `sides`, and its mask, (map_size, map_size) or, without one, of
    the size it has."""

    def decode(i: int, key: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        image, mask = split.read(i)
        image, mask = v2.functional.pil_to_tensor(image), torch.from_numpy(mask)
        return *(resize(image, side).movedim(0, -1) for side in sides), resize_mask(mask, map_size) if map_size else mask

    return decode


def scene_recipe(split: SceneSplit, sides: list[int], map_size: int | None) -> str:
    """As labelled_recipe, of decode_scene."""
    return f"scenes {sides} {map_size} {len(split.classes)}"


def decoded_cache(split: Split | SceneSplit, recipe: str, directory: str | None) -> Path | None:
    """The file that keeps the decoded samples of `split` in `directory` (None: $GRPO_RM_CACHE, else ~/.cache/grpo-rm; "off":
    nowhere), named after the recipe and the path, size and date of every source file. None where there are no files, as
    for CIFAR and STL-10, which are stored decoded."""
    if split.files is None or directory == "off":
        return None
    digest = hashlib.sha256(os.fsencode(recipe))
    for file in split.files.flat:
        with contextlib.suppress(OSError):  # a file that is gone: the decoding will say so
            stat = os.stat(file)
            digest.update(os.fsencode(f"\n{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns}"))
    home = Path(directory or os.environ.get("GRPO_RM_CACHE") or Path.home() / ".cache" / "grpo-rm")
    return home / f"{digest.hexdigest()[:32]}.npy"


def _write_rows(path: Path, parts: list[np.ndarray]) -> None:
    """Store parts (n, k) uint8 side by side as one .npy file, whole or not at all; a warning where it cannot be written."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            shape = (len(parts[0]), sum(part.shape[1] for part in parts))
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, shape[0], 1024):
                file.write(np.concatenate([part[start : start + 1024] for part in parts], axis=1).tobytes())
        os.replace(temporary, path)
    except OSError as error:
        print(f"warning: decoded images cannot be kept in {path.parent} ({first_line(error)}); the run goes on without", file=sys.stderr)
    finally:
        temporary.unlink(missing_ok=True)


class Samples:
    """The decoded samples of a split: for every list of them `fetch` yields their parts, each stacked to (B, ...) on the
    device, or where sizes differ a list of B tensors on the CPU.

    Where `resident` is true they are decoded once and kept on the device, and in the file `cache` (decoded_cache) for runs
    to come; else DataLoader workers decode them as they are asked for. A file that cannot be read raises InputError; with
    `skip_unreadable` the next sample stands in for it, and `unreadable` says which and why.
    """

    def __init__(self, count: int, decode: Decode, world, workers: int, *, resident: bool, cache: Path | None = None, skip_unreadable: bool = False):
        self.count, self.decode, self.device, self.workers = count, decode, world.device, workers
        self.skip_unreadable, self.unreadable = skip_unreadable, {}
        self.resident = None
        if count and resident:
            disable = None if world.rank == 0 else True
            stores = self._through_cache(cache, disable) if cache else self._decode_all(disable)
            self.resident = [store.to(self.device) for store in stores]
            self.check_share(self.unreadable.values())

    def _through_cache(self, cache: Path, disable: bool | None) -> list[torch.Tensor]:
        """What _decode_all gives, from the file `cache` where there is one; else it is written. Of several processes one
        decodes, the others wait for its file. A row of it holds the bytes of a sample's parts, one after the other."""
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            lock = open(cache.with_suffix(".lock"), "w")  # noqa: SIM115
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        except OSError as error:
            print(f"warning: decoded images cannot be kept ({first_line(error)}); --decoded-cache DIR names another place", file=sys.stderr)
            return self._decode_all(disable)
        with lock:
            with contextlib.suppress(OSError, ValueError):  # absent or damaged: decoded again
                rows, stores, start = torch.from_numpy(np.load(cache, mmap_mode="c")), [], 0
                for part in self._decode(0)[0]:
                    end = start + part.numel() * part.element_size()
                    row = rows[:, start:end] if part.dtype == torch.uint8 else rows[:, start:end].contiguous()
                    stores.append(row.view(part.dtype).view(self.count, *part.shape))
                    start = end
                return stores
            stores = self._decode_all(disable)
            if not self.unreadable:
                _write_rows(cache, [store.reshape(self.count, -1).view(torch.uint8).numpy() for store in stores])
            return stores

    def _decode_all(self, disable: bool | None) -> list[torch.Tensor]:
        """Every part of all samples, stacked: their sizes must be equal."""
        stores = [torch.empty(self.count, *part.shape, dtype=part.dtype) for part in self._decode(0)[0]]

        def load(i: int) -> None:
            parts, unreadable = self._decode(i)
            self.unreadable.update(unreadable)
            for store, part in zip(stores, parts, strict=True):
                store[i] = part

        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            list(tqdm(pool.map(load, range(self.count)), "decode", self.count, disable=disable, leave=False, unit=" images"))
        return stores

    def _decode(self, index: int, key: tuple[int, ...] = ()) -> tuple[tuple[torch.Tensor, ...], dict[int, str]]:
        """The parts of sample `index`, or of the next one that can be read, and why those before it could not."""
        unreadable: dict[int, str] = {}
        for i in itertools.count(index):
            try:
                return self.decode(i % self.count, key), unreadable
            except InputError as error:
                unreadable[i % self.count] = str(error)
                if not self.skip_unreadable or len(unreadable) > 0.01 * self.count:
                    raise

    def check_share(self, reasons: Collection[str]) -> None:
        """Raise InputError where `reasons`, one for each file that cannot be read, are more than 1 % of the samples."""
        if len(reasons) > 0.01 * self.count:
            raise InputError(f"{len(reasons)} of {self.count} images cannot be read, more than 1 %; among them: {min(reasons)}")

    def fetch(self, batches: list[torch.Tensor], key: tuple[int, ...] = ()) -> Iterator[tuple]:
        """The parts of the samples of each batch (indices); `key` is for what is drawn at random in decoding."""
        if self.resident is not None:
            for indices in batches:
                indices = to_device(indices, self.device)
                yield tuple(part[indices] for part in self.resident)
            return

        def load(indices: torch.Tensor) -> tuple | InputError:
            try:
                samples, unreadable = zip(*(self._decode(i, key) for i in indices.tolist()), strict=True)
            except InputError as error:  # handed over as a value: the DataLoader would wrap it into a traceback
                return error
            parts = zip(*samples, strict=True)
            return tuple(torch.stack(part) if len({p.shape for p in part}) == 1 else list(part) for part in parts), unreadable

        for batch in DataLoader(
            list(batches),
            batch_size=None,
            collate_fn=load,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=lambda worker: os.setpgid(0, 0),  # a signal to the process group, as torchrun's, is for the run, not for them
            multiprocessing_context="fork" if self.workers else None,  # other ways cannot hand over a split's functions
        ):
            if isinstance(batch, InputError):
                raise batch
            parts, unreadable = batch
            for found in unreadable:
                self.unreadable.update(found)
            self.check_share(self.unreadable.values())
            yield tuple(part.to(self.device, non_blocking=True) if isinstance(part, torch.Tensor) else part for part in parts)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device`. Of pinned memory, so that the host does not wait for what the GPU has still to do before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


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


def flip_scenes(pixels: torch.Tensor, masks: torch.Tensor, flips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (B, H, W, 3) and mask (B, M, M) mirrored together where `flips` (B,) is true."""
    images, masks = tv_tensors.Image(pixels.movedim(-1, 1)), tv_tensors.Mask(masks)
    images, masks = (torch.where(flips.view(-1, *[1] * (x.dim() - 1)), v2.functional.horizontal_flip(x), x) for x in (images, masks))
    return images.movedim(1, -1), masks


def to_input(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """(B, S, S, 3) uint8 -> (B, 3, image_size, image_size) float32: bicubic (antialiased), ImageNet mean and std."""
    images = resize(pixels.movedim(-1, 1), image_size).contiguous()  # channels last in memory until here
    mean, std = _mean_and_std(pixels.device)
    return images.float().sub_(mean).div_(std)


@functools.cache
def _mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 1, 1) each, of bytes; made once, for a copy to a GPU waits for it."""
    return tuple(255 * torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))


class TrainLoader:
    """Batches of one rank: `for images, targets in loader.epoch(e)` with images (B, 3, S, S) float32 and targets (B,), or
    (B, map_size, map_size) for scenes, int64, IGNORE where there is none.

    Global batch number s of epoch e holds the samples s*m .. (s+1)*m of a permutation drawn from (seed, e); the last
    one of an epoch may be smaller. Rank r gets the r-th of `world_size` near-equal runs of it. Where a small last
    batch has nothing for a rank, it gets one image whose targets are IGNORE, so that all ranks take the same steps.
    """

    def __init__(
        self,
        split: Split | SceneSplit,
        protocol: Protocol,
        image_size: int,
        batch_size: int,
        world,
        workers: int,
        *,
        seed: int,
        augment: bool,
        map_size: int = 128,
        input_mode: str = "auto",
        cache_dir: str | None = "off",
        skip_unreadable: bool = False,
    ):
        self.batch_size, self.image_size, self.seed, self.augment, self.world = batch_size, image_size, seed, augment, world
        side = protocol.stored_size or image_size
        resized_crop = protocol.resized_crop and augment
        self.pad = 0 if resized_crop else side // 8  # 4 pixels for CIFAR, 8 for Tiny-ImageNet
        if isinstance(split, SceneSplit):
            decode, recipe = decode_scene(split, [image_size], map_size), scene_recipe(split, [image_size], map_size)
            sample_bytes = 3 * image_size**2 + map_size**2
        else:
            decode, recipe = decode_labelled(split, side, resized_crop=resized_crop), labelled_recipe(split, side)
            sample_bytes = 3 * side**2
        fits = len(split) * sample_bytes <= RESIDENT_BYTES
        resident = not resized_crop and (input_mode == "resident" or (input_mode == "auto" and fits))
        cache = decoded_cache(split, recipe, cache_dir) if resident else None
        self.samples = Samples(len(split), decode, world, workers, resident=resident, cache=cache, skip_unreadable=skip_unreadable)
        self.classes = split.classes

    def __len__(self) -> int:
        """The number of steps in an epoch."""
        return math.ceil(self.samples.count / self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches of `epoch`, from number `start` on."""
        order = torch.randperm(self.samples.count, generator=random_generator(ORDER, self.seed, epoch))
        batches = order.split(self.batch_size)[start:]
        runs = [self._run(start + step) for step in range(len(batches))]
        mine = [batch[run if len(run) else slice(1)] for batch, run in zip(batches, runs, strict=True)]
        for step, (pixels, targets) in enumerate(self.samples.fetch(mine, key=(self.seed, epoch))):
            run, targets = runs[step], targets.to(self.world.device)
            if not len(run):
                run, targets = torch.arange(1), torch.full_like(targets, VOID if targets.dtype == torch.uint8 else IGNORE)
            if self.augment:
                generator = random_generator(AUGMENT, self.seed, epoch, start + step)
                pixels, targets = self._augment(pixels, targets, run, len(batches[step]), generator)
            if targets.dtype == torch.uint8:  # masks
                targets = targets.long().masked_fill_(targets == VOID, IGNORE)
            yield to_input(pixels, self.image_size), targets

    def _run(self, step: int) -> torch.Tensor:
        """The places of this rank's samples in global batch number `step` of an epoch."""
        length = min(self.batch_size, self.samples.count - step * self.batch_size)
        return torch.arange(length).tensor_split(self.world.size)[self.world.rank]

    def random_orders(self, epoch: int, step: int, num_outputs: int) -> torch.Tensor:
        """A random order of the outputs for each sample of this rank's batch number `step` of `epoch`, (B, num_outputs)."""
        generator, run = random_generator(GROUP, self.seed, epoch, step), self._run(step)
        orders = torch.rand(self.batch_size, num_outputs, generator=generator).argsort(1)  # of the whole global batch
        return to_device(orders[run if len(run) else slice(1)], self.world.device)

    def _augment(
        self, pixels: torch.Tensor, targets: torch.Tensor, run: torch.Tensor, total: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Drawn for the whole global batch, of which this rank holds the run: the same whatever the number of ranks."""
        shifts = torch.randint(0, 2 * self.pad + 1, (total, 2), generator=generator)[run]
        flips = to_device((torch.rand(total, generator=generator) < 0.5)[run], pixels.device)
        if targets.dim() > 1:
            return flip_scenes(pixels, targets, flips)
        return pad_crop_flip(pixels, to_device(shifts, pixels.device), flips, self.pad), targets


class EvalLoader:
    """Every sample of a classification split once, in order and without augmentation: yields (indices (B,), images
    (B, 3, S, S), targets (B,)). Whole batches are dealt to the ranks in turn, so a sample's batch is the same for any
    number of processes, and so are its features to the last bit."""

    def __init__(self, split: Split, protocol: Protocol, image_size: int, batch_size: int, world, workers: int, cache_dir: str | None = "off"):
        self.image_size, self.device, self.num_samples, self.batch_size = image_size, world.device, len(split), batch_size
        batches = torch.arange(len(split)).split(batch_size)[world.rank :: world.size]
        self.mine = torch.cat(batches) if batches else torch.arange(0)
        margin = 256 / 224 if protocol.resized_crop else 1.0  # ImageNet's habit: resize to 256, cut out 224
        side = protocol.stored_size or image_size
        mine = split.subset(self.mine.numpy())
        decode = decode_labelled(mine, side, margin=margin)
        resident = len(mine) * 3 * side**2 <= RESIDENT_BYTES
        cache = decoded_cache(mine, labelled_recipe(mine, side, margin), cache_dir) if resident else None
        self.samples = Samples(len(mine), decode, world, workers, resident=resident, cache=cache)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        local = list(torch.arange(len(self.mine)).split(self.batch_size)) if len(self.mine) else []
        for places, (pixels, targets) in zip(local, self.samples.fetch(local), strict=True):
            yield self.mine[places], to_input(pixels, self.image_size), targets.to(self.device)


class SceneLoader:
    """Scenes without augmentation, in whatever batches are asked for: `for *images, masks in loader.fetch(batches)` gives
    images (B, 3, S, S) float32 for each side S of `sides`, and masks uint8 with VOID: (B, map_size, map_size), or without a
    map_size as the files have them, a list of (H, W) on the CPU where their sizes differ. Those are never kept, nor is
    anything with `stream`: for one pass."""

    def __init__(
        self,
        split: SceneSplit,
        sides: list[int],
        map_size: int | None,
        world,
        workers: int,
        *,
        stream: bool = False,
        cache_dir: str | None = "off",
    ):
        self.sides = sides
        resident = False
        if map_size and not stream:
            resident = len(split) * (sum(3 * side**2 for side in sides) + map_size**2) <= RESIDENT_BYTES
        cache = decoded_cache(split, scene_recipe(split, sides, map_size), cache_dir) if resident else None
        self.samples = Samples(len(split), decode_scene(split, sides, map_size), world, workers, resident=resident, cache=cache)

    def fetch(self, batches: list[torch.Tensor]) -> Iterator[tuple]:
        for *pixels, masks in self.samples.fetch(batches):
            yield *(to_input(x, side) for x, side in zip(pixels, self.sides, strict=True)), masks


# ------------------------------------------------------------------------------------------------------------------
# Pictures of masks


def palette() -> np.ndarray:
    """PASCAL VOC's colours of the indices 0 to 255, (256, 3) uint8: the bits of an index, three at a time, are the highest
    bits of red, green and blue. Every set is drawn with it."""
    index, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def palette_image(mask: np.ndarray) -> Image.Image:
    """Class indices (H, W) uint8 as a palette image, as VOC's own masks are."""
    image = Image.fromarray(mask)
    image.putpalette(palette().tobytes())
    return image


def draw_panels(pictures: list[tuple[str, Image.Image]], classes: list[str], height: int = 288) -> Image.Image:
    """The pictures (title, image) side by side at one height, with a legend of the classes in those of palette images."""
    gap, font = 8, ImageFont.load_default(size=14)
    shown = sorted({int(i) for _, image in pictures if image.mode == "P" for i in np.unique(np.asarray(image)) if i < len(classes) or i == VOID})
    cells = []
    for title, image in pictures:
        resample = Image.Resampling.NEAREST if image.mode == "P" else Image.Resampling.BICUBIC
        cells.append((title, image.resize((round(image.width * height / image.height), height), resample).convert("RGB")))
    width = gap + sum(cell.width + gap for _, cell in cells)
    entries, x, y = [], gap, height + 32
    for i in shown:
        name = classes[i] if i < len(classes) else "void"
        length = 18 + round(font.getlength(name)) + 2 * gap
        if x + length > width and x > gap:
            x, y = gap, y + 20
        entries.append((x, y, i, name))
        x += length
    panel = Image.new("RGB", (width, y + 24), "white")
    pen, left = ImageDraw.Draw(panel), gap
    for title, cell in cells:
        while font.getlength(title) > cell.width:
            title = title.removesuffix("...")[:-1] + "..."
        pen.text((left, 4), title, "black", font)
        panel.paste(cell, (left, 24))
        left += cell.width + gap
    for x, y, i, name in entries:
        pen.rectangle((x, y, x + 13, y + 13), tuple(palette()[i].tolist()), "black")
        pen.text((x + 18, y - 2), name, "black", font)
    return panel


# ------------------------------------------------------------------------------------------------------------------
# Arguments that the stages share


def add_data_arguments(parser: ArgumentParser, *tasks: str) -> None:
    """Which images, and how they are prepared, for a stage that serves these tasks."""
    names = list(dict.fromkeys(name for task in tasks for name in PROTOCOLS[task]))
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default=names[0], metavar="NAME", help=f"{', '.join(names[:-1])}, or folder (your own); {names[0]} is drawn on the fly")
    group.add_argument("--data-root", metavar="DIR", help="where the datasets live; default: $GRPO_RM_DATA, else ./datasets")
    group.add_argument("--download", action="store_true", help="fetch what may be fetched: all but imagenet, folder and the masks of coco_stuff")
    group.add_argument("--decoded-cache", metavar="DIR", help="where decoded images are kept for runs to come, or off; default: $GRPO_RM_CACHE, else ~/.cache/grpo-rm")
    group.add_argument("--image-size", type=number(1, kind=int), help="side in pixels; default: the protocol's for the dataset")
    group.add_argument("--limit-train", type=number(1, kind=int), metavar="N", help="N training images at even distances")
    group.add_argument("--limit-val", type=number(1, kind=int), metavar="N", help="N validation images at even distances")
    parser.set_defaults(tasks=tasks)


def resolve_task(args: argparse.Namespace) -> Protocol:
    """The protocol of args.dataset; its task becomes args.task. InputError where the stage does not serve it."""
    tasks = vars(args).pop("tasks")
    args.task = task_of(args.dataset, args.data_root)
    if args.task not in tasks:
        stages = {"classification": "train_cls.py, eval_linear.py and eval_knn.py", "segmentation": "train_seg.py and eval_linear.py"}
        where = f" in {data_root(args.data_root)}" if args.dataset == "folder" else ""
        hint = " (images/ and masks/ would make it one for segmentation)" if (args.dataset, args.task) == ("folder", "classification") else ""
        raise InputError(f"--dataset {args.dataset}{where} is a {args.task} set{hint}; it is for {stages[args.task]}")
    return PROTOCOLS[args.task][args.dataset]
