"""Datasets, transforms and loaders: everything that depends on samples.

A set becomes two splits (train, val) of images with a class, or for segmentation with a mask. A loader makes batches:

    decode    file -> RGB uint8 square        once, into the device's memory, up to 4 GiB a split; else by workers
    augment   crop after zero padding, flip   whole batches, on the device (segmentation: flip)
    resize    bicubic to the network's side, ImageNet's mean and std          whole batches, on the device

The sequence of global batches, and what augmentation does to each sample, are functions of seed, epoch and step alone:
the number of processes, workers and accumulation steps changes neither.

Shapes: B images, H W pixels, M side of a map of labels. Void is 255 in masks, IGNORE in batches.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights
from torchvision.transforms import InterpolationMode, v2

from common.cli import InputError, first_line
from common.demo import SHAPES, draw_scene, draw_shape
from common.distributed import all_reduce, in_turn, progress
from common.transforms import square, stretch, to_input, to_rgb
from grpo_rm import IGNORE

VOID = 255  # in masks: a pixel that takes no part
RESIDENT_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a dataset is prepared. image_size: the side that the network sees (the paper's, or the nearest multiple of 14
    above the native side where the paper is silent); stored_size: the side that images are decoded to (None:
    image_size); resized_crop: random resized crops instead of padded ones; hidden_dim: width of the head."""

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


def resolve_dataset(args, *tasks):
    """Sets args.task and args.data_root; returns the dataset's protocol. `folder` is a segmentation set where it holds
    masks/. Raises InputError for a dataset that is unknown or not of one of the `tasks`."""
    args.data_root = args.data_root or os.environ.get("GRPO_RM_DATA") or "datasets"
    if args.dataset == "folder":
        args.data_root = os.path.abspath(args.data_root)  # its directory is its name
        args.task = "segmentation" if os.path.isdir(os.path.join(args.data_root, "masks")) else "classification"
    else:
        args.task = next((task for task, protocols in PROTOCOLS.items() if args.dataset in protocols), None)
    if args.task is None:
        known = dict.fromkeys(name for task in tasks for name in PROTOCOLS[task])
        raise InputError(f"--dataset {args.dataset}: unknown; choose one of {', '.join(known)}")
    if args.task not in tasks:
        raise InputError(f"--dataset {args.dataset} is for {args.task} (a folder with masks/ is for segmentation); "
                         f"this script does {tasks[0]}")  # fmt: skip
    return PROTOCOLS[args.task][args.dataset]


@dataclasses.dataclass(frozen=True)
class Split:
    """One half of a set. read(i) gives sample i as an RGB image and its class or, with `masks`, its mask (H, W) uint8;
    it raises InputError naming the file that cannot be used."""

    classes: list[str]
    count: int
    read: Callable[[int], tuple[Image.Image, int | np.ndarray]]
    masks: bool = False

    def __len__(self):
        return self.count

    def subset(self, indices):
        """The samples at `indices`, in that order."""
        return dataclasses.replace(self, count=len(indices), read=lambda i: self.read(int(indices[i])))


def load_data(args, world):
    """The training split, cut to args.limit_train and args.train_fraction, and the validation split."""
    with in_turn(world, "data"):
        train, val = load_splits(args.dataset, args.data_root, args.task, download=args.download)
    train, val = limit(train, args.limit_train), limit(val, args.limit_val)
    share = getattr(args, "train_fraction", 1)  # the same samples for every method
    if share < 1:
        order = np.random.default_rng((args.seed, len(train))).permutation(len(train))
        train = train.subset(np.sort(order[: max(1, round(share * len(train)))]))
    return train, val


def limit(split, count):
    """At most `count` samples (None: all) at even distances, so that sets sorted by class keep all their classes."""
    if count is None or count >= len(split):
        return split
    return split.subset(np.linspace(0, len(split) - 1, count).round().astype(int))


# ----------------------------------------------------------------------------------------------------------------------
# Datasets


def load_splits(name, root, task, *, download):
    """The training and validation split of dataset `name` below the directory `root`. `download`: fetch what is missing
    and may be fetched. Raises InputError where data are missing, saying which file belongs where."""
    root = Path(root)
    if name == "shapes":
        return [Split(list(SHAPES), n, functools.partial(draw_shape, seed=seed)) for seed, n in enumerate((5000, 1000))]
    if name == "shapes_seg":
        draw = [functools.partial(draw_scene, seed=seed) for seed in range(2)]
        return [Split(["background", *SHAPES], n, read, masks=True) for read, n in zip(draw, (2000, 400), strict=True)]
    if name == "folder":
        return mask_folders(root) if task == "segmentation" else class_folders(root)
    if name in ("cifar10", "cifar100", "stl10"):
        return torchvision_set(name, root, download)
    load = [tiny_imagenet, imagenet, voc2012, ade20k, coco_stuff]
    return next(function for function in load if function.__name__ == name)(root, download)


@contextlib.contextmanager
def available(what, remedy, download):
    """A dataset that is not there or cannot be fetched is one line. No archive is unpacked before it was checked."""
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        fetch = "try again" if download else "leave out --no-download"
        raise InputError(f"{what} is missing or incomplete ({first_line(error)}); {fetch}, or {remedy}") from error


def fetch_archive(what, root, home, url, md5, download, needed="."):
    """Where the directory `home` below `root` is missing, download the archive that holds it and unpack it, whole or
    not at all. Raises InputError where home/needed is not there in the end."""
    with available(what, f"unpack {url} into {root}", download):
        if download and not home.is_dir():
            download_and_extract_archive(url, str(root), str(root / ".unpacking"), md5=md5)
            home.parent.mkdir(exist_ok=True)
            os.replace(root / ".unpacking" / home.relative_to(root), home)
        (home / needed).stat()


def torchvision_set(name, root, download):
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, which checks the archives' MD5 sums."""
    dataset = getattr(datasets, name.upper())
    which = [{"split": "train"}, {"split": "test"}] if name == "stl10" else [{"train": True}, {"train": False}]
    with available(f"{name} in {root}", f"unpack {dataset.filename} there", download):
        found = [dataset(str(root), download=download, **part) for part in which]
    if name == "stl10":
        return [array_split(list(x.classes), x.data.transpose(0, 2, 3, 1), x.labels) for x in found]
    return [array_split(list(x.classes), x.data, x.targets) for x in found]


def array_split(classes, pixels, targets):
    """A split of pixels (n, H, W, 3) uint8 and targets (n,)."""
    return Split(classes, len(targets), lambda i: (Image.fromarray(pixels[i]), int(targets[i])))


def tiny_imagenet(root, download):
    """Tiny-ImageNet in its official layout; classes in the order of wnids.txt."""
    home, url = root / "tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    labels, remedy = "val/val_annotations.txt", f"remove {home} and unpack {url} again"
    fetch_archive("tiny_imagenet", root, home, url, "90528d7ca1a48142e341f4ef8d21d0de", download, needed=labels)
    with available("tiny_imagenet", remedy, download):
        classes = (home / "wnids.txt").read_text().split()
        folders = [image_files(home / "train" / wnid / "images") for wnid in classes]
        if len({len(folder) for folder in folders}) != 1 or not folders[0]:
            raise OSError("its classes do not have equally many images")
    train = [(file, label) for label, folder in enumerate(folders) for file in folder]
    rows = [line.split("\t")[:2] for line in (home / labels).read_text().splitlines()]
    val = [(str(home / "val" / "images" / file), classes.index(wnid)) for file, wnid in rows]
    return file_split(classes, train), file_split(classes, val)


def imagenet(root, download):
    """ImageNet-1k as train/ and val/ class folders under `root` or root/imagenet, or from the official archives there,
    which torchvision checks and unpacks. They cannot be fetched: image-net.org asks for a login."""
    archives = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
    for home in (root, root / "imagenet"):
        if not (home / "val").is_dir() and all((home / archive).is_file() for archive in archives):
            with available(f"imagenet in {home}", "remove train/ and val/ there", download):
                for part in ("train", "val"):
                    datasets.ImageNet(str(home), split=part)
        if (home / "train").is_dir() and (home / "val").is_dir():
            return class_folders(home)
    raise InputError(f"imagenet: {root} has neither train/ and val/ nor the archives; put {', '.join(archives)} there "
                     "(image-net.org asks for a login)")  # fmt: skip


def class_folders(root):
    """train/<class>/* and val/<class>/*; classes in sorted order."""
    names, samples = {}, {"train": [], "val": []}
    for part in samples:
        if not (root / part).is_dir():
            raise InputError(f"--data-root {root}: {part}/ is missing; needed are {{train,val}}/<class>/*, or for "
                             "segmentation images/{train,val}/*, masks/{train,val}/*.png")  # fmt: skip
        names[part] = sorted(x.name for x in os.scandir(root / part) if x.is_dir() and x.name[0] != ".")
    if len(names["train"]) < 2:
        raise InputError(f"{root / 'train'} has {len(names['train'])} class folders; needed are two at least")
    for part, classes in names.items():
        for name in classes:
            files = image_files(root / part / name)
            if name not in names["train"]:
                raise InputError(f"{root / part / name}: no such class in {root / 'train'}; rename or remove it")
            if not files:
                raise InputError(f"{root / part / name} holds no image; add some or remove it")
            label = names["train"].index(name)
            samples[part] += [(file, label) for file in files]
    return [file_split(names["train"], samples[part]) for part in samples]


def image_files(folder):
    """Paths of the images right in `folder`, sorted by name, without hidden ones; none where there is no folder."""
    found = [entry for entry in os.scandir(folder) if entry.name[0] != "."] if folder.is_dir() else []
    return sorted(entry.path for entry in found if Path(entry.name).suffix.lower() in datasets.folder.IMG_EXTENSIONS)


def file_split(classes, samples):
    """A split of (image file, class)."""
    files, targets = np.array([file for file, _ in samples]), [label for _, label in samples]  # workers share an array
    return Split(classes, len(files), lambda i: (read_image(str(files[i])), targets[i]))


@contextlib.contextmanager
def opened(kind, file):
    """The image in `file`. Raises InputError naming it where it cannot be read or does not hold what it should."""
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{kind} {file} cannot be read ({first_line(error)}); replace or remove it") from error


def read_image(file):
    """The image in `file` as RGB, also where it is grey or has a palette. Raises InputError."""
    with opened("image", file) as image:
        return to_rgb(image, upright=False)


def read_labels(file):
    """The class indices in the mask `file`, (H, W) integers; a palette is not applied. Raises InputError."""
    with opened("mask", file) as mask:
        if mask.format == "JPEG" or not (mask.mode in ("1", "L", "P", "I") or mask.mode.startswith("I;16")):
            raise ValueError(f"{mask.format} {mask.mode} is not a class index a pixel; take a grey or palette PNG")
        return np.asarray(mask, dtype=np.int32)


def label_table(label_to_class):
    """(256,) table from the labels in a set's masks to class indices or VOID; -1 for labels that it does not have."""
    table = np.full(256, -1, np.int16)
    table[list(label_to_class)] = list(label_to_class.values())
    return table


VOC_CLASSES = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]
VOC_TABLE = label_table({i: i for i in (*range(21), VOID)})
ADE20K_TABLE = label_table({0: VOID} | {i: i - 1 for i in range(1, 151)})

# COCO-stuff numbers 91 things from 0 and 91 kinds of stuff from 91; eleven of the things were never annotated.
COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
COCO_USED = {label: i for i, label in enumerate(sorted(set(range(182)) - set(COCO_UNUSED)))}
COCO_TABLE = label_table({VOID: VOID} | dict.fromkeys(COCO_UNUSED, VOID) | COCO_USED)
COCO_CLASSES = [name for name in MaskRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"][1:] if name != "N/A"] + (
    "banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other ceiling-tile cloth "
    "clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble floor-other floor-stone "
    "floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel ground-other hill house leaves "
    "light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow plant-other plastic platform "
    "playingfield railing railroad river road rock roof rug salad sand sea shelf sky-other skyscraper snow "
    "solid-other stairs stone straw structural-other table tent textile-other towel tree vegetable wall-brick "
    "wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops window-blind "
    "window-other wood"
).split()


def mask_split(classes, pairs, table, hint=""):
    """A split of (image file, mask file); `table` turns a mask's labels into class indices."""
    files = np.array(pairs)
    hint = hint or f"labels are 0 to {len(classes) - 1}, and {VOID} for void; correct the mask or the list of classes"

    def read(i):
        image_file, mask_file = map(str, files[i])
        image, labels = read_image(image_file), read_labels(mask_file)
        mask = np.where((labels >= 0) & (labels < 256), table[labels & 255], -1)
        if (mask < 0).any():
            raise InputError(f"mask {mask_file} has label {labels[mask < 0].max()}; {hint}")
        if image.size != mask.shape[::-1]:
            raise InputError(f"mask {mask_file} is {mask.shape[::-1]} pixels, its image {image.size}; make them equal")
        return image, mask.astype(np.uint8)

    return Split(classes, len(files), read, masks=True)


def pair_up(images, masks):
    """(image, mask) of equal names but for the suffix. InputError for one without the other, or none at all."""
    image_of, mask_of = ({Path(file).stem: file for file in image_files(folder)} for folder in (images, masks))
    for name in image_of.keys() ^ mask_of.keys():
        file, where = (image_of[name], masks) if name in image_of else (mask_of[name], images)
        raise InputError(f"{file} has no counterpart {name}.* in {where}; add it, or remove the file")
    if not image_of:
        raise InputError(f"{images} holds no image; put them there, and their masks in {masks}")
    return [(image_of[name], mask_of[name]) for name in sorted(image_of)]


def voc2012(root, download):
    """PASCAL VOC 2012 segmentation."""
    home, url = (
        root / "VOCdevkit" / "VOC2012",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    )
    fetch_archive("voc2012", root, home, url, "6cd6e144f989b92b3379bac3b3de84fd", download)
    with available("voc2012", f"remove {home} and unpack {url} into {root}", download):
        found = [datasets.VOCSegmentation(str(root), image_set=part) for part in ("train", "val")]
    return [mask_split(VOC_CLASSES, list(zip(x.images, x.masks, strict=True)), VOC_TABLE) for x in found]


def ade20k(root, download):
    """ADE20k's scene parsing set; class names, all their synonyms, from objectInfo150.txt."""
    home, url = root / "ADEChallengeData2016", "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
    fetch_archive("ade20k", root, home, url, "7328b3957e407ddae1d3cbf487f149ef", download, needed="objectInfo150.txt")
    lines = (home / "objectInfo150.txt").read_text(errors="replace").splitlines()[1:]
    hint = "ADE20k's are 0 (void) and 1 to 150; use the annotations of ADEChallengeData2016.zip"
    folders = [(home / "images" / part, home / "annotations" / part) for part in ("training", "validation")]
    classes = [line.split("\t")[-1].strip() for line in lines]
    return [mask_split(classes, pair_up(*pair), ADE20K_TABLE, hint) for pair in folders]


def coco_stuff(root, download):
    """COCO-stuff with 171 classes: the images of COCO 2017 and the masks of stuffthingmaps_trainval2017.zip, which
    have no published checksum and are left to the user."""
    source = "calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
    masks = root / "stuffthingmaps"
    parts = {"train2017": "cced6f7f71b7629ddf16f17bbcfab6b2", "val2017": "442b8da7639aecaf257c1dceb8ba8c80"}
    for part, md5 in parts.items():
        if not (masks / part).is_dir():
            raise InputError(f"coco_stuff: {masks / part} is missing; unpack {source} into {masks}")
        fetch_archive("coco_stuff", root, root / part, f"http://images.cocodataset.org/zips/{part}.zip", md5, download)
    hint = f"the set has 0 to 181 and {VOID}. 182 and 183 mean the stuff-only pixelmaps, without things: use {source}"
    return [mask_split(COCO_CLASSES, pair_up(root / part, masks / part), COCO_TABLE, hint) for part in parts]


def mask_folders(root):
    """A user's own scenes: images/{train,val}/*, masks/{train,val}/*.png; class names one a line in classes.txt, or as
    many numbers as the masks use."""
    pairs = {part: pair_up(root / "images" / part, root / "masks" / part) for part in ("train", "val")}
    where = root / "classes.txt"
    if where.is_file():
        classes = [line.strip() for line in where.read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    else:
        where = root / "masks"
        masks = [mask for part in pairs.values() for _, mask in part]
        with ThreadPoolExecutor() as pool:
            labels = set().union(*pool.map(lambda mask: np.unique(read_labels(mask)).tolist(), masks)) - {VOID}
        classes = [f"class {i}" for i in range(max(labels, default=-1) + 1)]
    if not 2 <= len(classes) <= VOID or len(set(classes)) < len(classes):
        raise InputError(f"{where}: {len(classes)} classes ({', '.join(classes[:3])}, ...); needed are 2 to {VOID} "
                         f"different ones, with indices from 0 ({VOID} is void)")  # fmt: skip
    table = label_table({i: i for i in (*range(len(classes)), VOID)})
    return [mask_split(classes, pairs[part], table) for part in ("train", "val")]


# ----------------------------------------------------------------------------------------------------------------------
# Transforms

ORDER, AUGMENT, CROP, LINEAR = range(4)  # what a stream of random numbers is for


def random_generator(purpose, *key):
    """A generator whose numbers belong to `purpose` and `key`, whatever was drawn elsewhere."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((purpose, *key)).generate_state(1)[0]))


def resize_mask(mask, side):
    """(H, W) labels -> (side, side), each the label at the centre of its pixel: no label is invented."""
    return v2.functional.resize(mask[None], [side] * 2, InterpolationMode.NEAREST_EXACT)[0]


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


# ----------------------------------------------------------------------------------------------------------------------
# Loader


class Loader:
    """Batches of a split on this process's device: `epoch` for training, `in_order` for evaluation, `fetch` for any
    lists of samples.

    Images are (B, 3, S, S) float32, S = args.image_size; for segmentation there may be several, one for each of
    `sides`. Targets are (B,) int64, or masks (B, M, M) with M = args.map_size; with `native` a list of masks (H, W) as
    their files have them.
    """

    def __init__(self, split, args, world, *, augment=False, train=False, sides=None, native=False):
        self.split, self.args, self.world, self.augment = split, args, world, augment
        protocol = PROTOCOLS[args.task][args.dataset]
        stored = args.image_size if split.masks else protocol.stored_size or args.image_size
        self.sides, self.native = sides or [stored], native
        self.resized_crop = protocol.resized_crop and augment
        self.margin = 256 / 224 if protocol.resized_crop and not train else 1.0  # ImageNet's: 256, cut to 224
        self.pad = 0 if self.resized_crop else stored // 8  # 4 pixels for CIFAR, 8 for Tiny-ImageNet
        sample_bytes = sum(3 * side**2 for side in self.sides) + (args.map_size**2 if split.masks else 8)
        streams = native or self.resized_crop or len(split) * sample_bytes > RESIDENT_BYTES
        self.resident = None if streams else self.decode_all()

    def __len__(self):
        """The number of steps in an epoch."""
        return math.ceil(len(self.split) / self.args.batch_size)

    def epoch(self, epoch, start=0):
        """This process's (images, targets) of each global batch of `epoch`, from number `start` on.

        Global batch number s holds samples s*m to (s+1)*m of a permutation drawn from (seed, epoch); the last one may
        be smaller. The ranks get near-equal runs of it. One for which nothing is left gets an image whose target is
        IGNORE: all take the same steps.
        """
        order = torch.randperm(len(self.split), generator=random_generator(ORDER, self.args.seed, epoch))
        batches = order.split(self.args.batch_size)[start:]
        places = [torch.arange(len(batch)).tensor_split(self.world.size)[self.world.rank] for batch in batches]
        mine = [batch[place] if len(place) else batch[:1] for batch, place in zip(batches, places, strict=True)]
        for step, (images, targets) in enumerate(self.pixels(mine, key=(self.args.seed, epoch))):
            place = places[step] if len(places[step]) else torch.arange(1)
            if self.augment:  # drawn for the whole global batch: the same whatever the number of ranks
                generator, total = random_generator(AUGMENT, self.args.seed, epoch, start + step), len(batches[step])
                shifts = torch.randint(0, 2 * self.pad + 1, (total, 2), generator=generator)[place]
                flips = (torch.rand(total, generator=generator) < 0.5)[place].to(images.device, non_blocking=True)
                if self.split.masks:
                    flips = flips[:, None, None]
                    images = torch.where(flips[..., None], images.flip(2), images)
                    targets = torch.where(flips, targets.flip(2), targets)
                else:
                    images = pad_crop_flip(images, shifts.to(images.device, non_blocking=True), flips, self.pad)
            targets = targets.long().masked_fill_(targets == VOID, IGNORE) if self.split.masks else targets
            targets = targets if len(places[step]) else torch.full_like(targets, IGNORE)
            yield to_input(images, self.args.image_size), targets

    def in_order(self, batch_size):
        """(indices, *images, targets) of every sample once. Whole batches are dealt to the ranks in turn, so a sample's
        batch is the same for any number of processes, and so are its features to the last bit."""
        mine = torch.arange(len(self.split)).split(batch_size)[self.world.rank :: self.world.size]
        for indices, parts in zip(mine, self.fetch(mine), strict=True):
            yield indices, *parts

    def fetch(self, batches):
        """(*images, targets) of each list of samples."""
        sides = self.sides if self.split.masks else [self.args.image_size]
        for *images, targets in self.pixels(batches):
            yield *(to_input(x, side) for x, side in zip(images, sides, strict=True)), targets

    def pixels(self, batches, key=()):
        """As `fetch`, but images are (B, S, S, 3) uint8, as decoded; `key` is for what is drawn at random there."""
        if self.resident:
            on_device = (indices.to(self.world.device, non_blocking=True) for indices in batches)
            yield from (tuple(part[indices] for part in self.resident) for indices in on_device)
            return

        def load(indices):
            try:
                parts = zip(*(self.decode(i, key) for i in indices.tolist()), strict=True)
                *images, targets = ([*part] for part in parts)
                return *map(torch.stack, images), targets if self.native else torch.stack(targets)
            except InputError as error:  # as a value: the DataLoader would wrap it into a traceback
                return error

        options = {"num_workers": self.args.workers, "pin_memory": self.world.device.type == "cuda"}
        if self.args.workers:  # fork: functions cannot be pickled; setpgid: signals to the group are for the run
            options |= {"multiprocessing_context": "fork", "worker_init_fn": lambda worker: os.setpgid(0, 0)}
        for parts in DataLoader(list(batches), batch_size=None, collate_fn=load, **options):
            if isinstance(parts, InputError):
                raise parts
            yield [x if isinstance(x, list) else x.to(self.world.device, non_blocking=True) for x in parts]

    def decode(self, i, key=()):
        """Sample i: pixels (S, S, 3) uint8 for each side, and target or mask. A random crop depends on i and key."""
        image, target = self.split.read(i)
        if self.split.masks:
            mask = torch.from_numpy(target)
            mask = mask if self.native else resize_mask(mask, self.args.map_size)
            return *(stretch(image, side) for side in self.sides), mask
        if not self.resized_crop:
            return square(image, self.sides[0], round(self.sides[0] * self.margin)), torch.tensor(target)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_generator(CROP, *key, i).initial_seed())
            crop = v2.RandomResizedCrop(self.sides[0], interpolation=InterpolationMode.BICUBIC)
            return torch.tensor(np.asarray(crop(image))), torch.tensor(target)

    def decode_all(self):
        """Every part of all samples, stacked, on the device. Each rank decodes its share, adds zero to the others'."""
        world, count = self.world, len(self.split)
        stores = [torch.zeros(count, *part.shape, dtype=part.dtype) for part in self.decode(0)]

        def load(i):
            for store, part in zip(stores, self.decode(i), strict=True):
                store[i] = part

        mine = range(world.rank, count, world.size)
        with ThreadPoolExecutor(max(1, self.args.workers)) as pool:
            list(progress(pool.map(load, mine), "decode", world, len(mine)))
        stores = [store.to(world.device) for store in stores]
        all_reduce(*stores)
        return stores
