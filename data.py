"""Datasets: what each is, where its files are, how it is fetched, and what is refused.

A set becomes two splits (train, val) of images with a class, or for segmentation with a mask. common/loader.py makes
batches of them.
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.segmentation import FCN_ResNet50_Weights

from common.cli import InputError, dataset_name, first_line
from common.demo import SHAPES, draw_scene, draw_shape
from common.distributed import in_turn
from common.images import image_files, pair_up, read_image, read_labels, to_pixels, visible
from common.loader import VOID, WRONG_LABELS


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

DRAWN = ("shapes", "shapes_seg")  # by common/demo.py; there are no files


def resolve_dataset(args, *tasks):
    """Sets args.task, data_root, image_size, crop_size, resize_size and resized_crop; returns the dataset's protocol.
    Raises InputError for a dataset that is unknown or not of one of the `tasks`."""
    if args.dataset not in DRAWN:
        args.data_root = os.path.abspath(args.data_root or os.environ.get("GRPO_RM_DATA") or "datasets")
    elif args.data_root is not None:
        raise InputError(f"--data-root {args.data_root}: {args.dataset} is drawn and has no files; leave the flag out")
    args.task = next((task for task in PROTOCOLS if args.dataset in PROTOCOLS[task]), None)
    if args.dataset == "folder":
        has_masks = os.path.isdir(os.path.join(args.data_root, "masks"))
        args.task = "segmentation" if has_masks else "classification"
    if args.task is None:
        known = dict.fromkeys(name for task in tasks for name in PROTOCOLS[task])
        raise InputError(f"--dataset {args.dataset}: unknown; choose one of {', '.join(known)}")
    if args.task not in tasks:
        raise InputError(f"--dataset {args.dataset} is for {args.task} (a folder with masks/ is for segmentation); "
                         f"this script does {tasks[0]}")  # fmt: skip
    protocol = PROTOCOLS[args.task][args.dataset]
    args.image_size = args.image_size or protocol.image_size
    args.crop_size = protocol.stored_size or args.image_size  # the side that images are decoded to
    args.resize_size = args.crop_size  # their shorter side before the centre is cut out
    args.resized_crop = protocol.resized_crop
    if protocol.resized_crop:  # ImageNet's protocol: 256, cut to 224
        args.resize_size = round(args.image_size * 256 / 224)
    return protocol


@dataclasses.dataclass(frozen=True)
class Split:
    """One half of a set. read(i) gives sample i as pixels (H, W, 3) uint8 and its class or, with `masks`, its mask
    (H, W) uint8; it raises InputError naming the file that cannot be used. warnings: what the user should know of the
    whole set. files: the images' files, where there are any; of a subset its names."""

    classes: list[str]
    count: int
    read: Callable[[int], tuple[torch.Tensor, int | np.ndarray]]
    masks: bool = False
    warnings: Sequence[str] = ()
    files: np.ndarray | None = None

    def __len__(self):
        return self.count

    @property
    def names(self):
        """What a sample is called, (count,): its file, or its number in the whole set."""
        return np.arange(self.count) if self.files is None else self.files

    def subset(self, indices):
        """The samples at `indices`, in that order."""

        def read(i):
            return self.read(int(indices[i]))

        return dataclasses.replace(self, count=len(indices), read=read, files=self.names[indices])


def load_data(args, world):
    """The training split, with args.label_noise, cut to args.limit_train and args.train_fraction, and the validation
    split. Rank 0 prints what was found."""
    with in_turn(world, "data"):
        train, val = load_splits(args.dataset, args.data_root, args.task, download=args.download)
    noise, fraction = getattr(args, "label_noise", 0), getattr(args, "train_fraction", 1)
    if noise:
        train = with_wrong_labels(train, noise, args.seed)
    train, val = limit(train, args.limit_train), limit(val, args.limit_val)
    if fraction < 1:  # the same samples for every method
        order = np.random.default_rng((args.seed, len(train))).permutation(len(train))
        train = train.subset(np.sort(order[: max(1, round(fraction * len(train)))]))
    if world.rank == 0:
        for warning in train.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        found = f"{len(train.classes)} classes, {len(train)} training and {len(val)} validation images"
        replaced = f", each training label replaced with probability {noise:g}" if noise else ""
        print(f"{dataset_name(args)}: {found}{replaced}", flush=True)
    return train, val


def limit(split, count):
    """At most `count` samples (None: all) at even distances, so that sets sorted by class keep all their classes."""
    if count is None or count >= len(split):
        return split
    return split.subset(np.linspace(0, len(split) - 1, count).round().astype(int))


def with_wrong_labels(split, share, seed):
    """The split with label noise: label -> (label + label_shifts) % classes."""
    shifts = label_shifts(len(split), len(split.classes), share, seed)

    def read(i):
        image, label = split.read(i)
        return image, int((label + shifts[i]) % len(split.classes))

    return dataclasses.replace(split, read=read)


def label_shifts(count, num_classes, share, seed):
    """(count,) how far each label is moved on: with probability `share` to another class drawn uniformly, else 0. A
    function of seed and sample alone; labels that are wrong at one share are so at every larger one."""
    draws = np.random.default_rng((WRONG_LABELS, seed)).random((count, 2))
    shifts = 1 + (draws[:, 1] * (num_classes - 1)).astype(int)  # 1 to num_classes - 1
    return np.where(draws[:, 0] < share, shifts, 0)


def load_splits(name, root, task, *, download):
    """The training and validation split of dataset `name` below the directory `root`. `download`: fetch what is missing
    and may be fetched. Raises InputError where data are missing, saying which file belongs where."""
    if name == "shapes":
        train, val = (functools.partial(draw_shape, seed=seed) for seed in (0, 1))
        return Split(list(SHAPES), 5000, train), Split(list(SHAPES), 1000, val)
    if name == "shapes_seg":
        train, val = (functools.partial(draw_scene, seed=seed) for seed in (0, 1))
        classes = ["background", *SHAPES]
        return Split(classes, 2000, train, masks=True), Split(classes, 400, val, masks=True)
    root = Path(root)
    if name == "folder":
        return mask_folders(root) if task == "segmentation" else class_folders(root)
    if name == "imagenet":
        return imagenet(root, download)
    if name in ("cifar10", "cifar100", "stl10"):
        return torchvision_set(name, root, download)
    published = {"tiny_imagenet": tiny_imagenet, "voc2012": voc2012, "ade20k": ade20k, "coco_stuff": coco_stuff}
    return published[name](root, download)


@contextlib.contextmanager
def available(what, remedy, download):
    """A dataset that is not there or cannot be fetched is one line. No archive is unpacked before it was checked."""
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        fetch = "try again" if download else "leave out --no-download"
        raise InputError(f"{what} is missing or incomplete ({first_line(error)}); {fetch}, or {remedy}") from error


@contextlib.contextmanager
def unpacked(what, root, home, url, md5, download):
    """For reading the directory `home` below `root`; where it is missing, the archive that holds it is downloaded and
    unpacked, whole or not at all. Raises InputError where something is missing in the end."""
    with available(what, f"unpack {url} into {root}", download):
        if download and not home.is_dir():
            download_and_extract_archive(url, str(root), str(root / ".unpacking"), md5=md5)
            home.parent.mkdir(exist_ok=True)
            os.replace(root / ".unpacking" / home.relative_to(root), home)
        home.stat()
        yield


def torchvision_set(name, root, download):
    """CIFAR-10, CIFAR-100 or STL-10 through torchvision, which checks the archives' MD5 sums."""
    dataset = getattr(datasets, name.upper())
    parts = ("train", "test") if name == "stl10" else (True, False)
    with available(f"{name} in {root}", f"unpack {dataset.filename} there", download):
        found = [dataset(str(root), part, transform=to_pixels, download=download) for part in parts]
    return [Split(list(x.classes), len(x), x.__getitem__) for x in found]


def array_split(classes, pixels, targets):
    """A split of pixels (n, H, W, 3) uint8 and targets (n,)."""
    return Split(classes, len(targets), lambda i: (torch.tensor(pixels[i]), int(targets[i])))


def tiny_imagenet(root, download):
    """Tiny-ImageNet in its official layout; classes in the order of wnids.txt."""
    home = root / "tiny-imagenet-200"
    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    with unpacked("tiny_imagenet", root, home, url, "90528d7ca1a48142e341f4ef8d21d0de", download):
        classes = (home / "wnids.txt").read_text().split()
        lines = (home / "val" / "val_annotations.txt").read_text().splitlines()
        folders = [image_files(home / "train" / wnid / "images") for wnid in classes]
        if len({len(folder) for folder in folders}) != 1 or not folders[0]:
            raise OSError("its classes do not have equally many images")
    train = [(file, label) for label, folder in enumerate(folders) for file in folder]
    rows = [line.split("\t")[:2] for line in lines]
    val = [(str(home / "val" / "images" / file), classes.index(wnid)) for file, wnid in rows]
    return file_split(classes, train), file_split(classes, val)


def label_table(labels, ignored=()):
    """(257,) table from what a set's masks hold to class indices: `labels` are the classes in their order; `ignored`
    and VOID become VOID, everything else -1, and so does 256, for what is no byte."""
    table = np.full(257, -1, np.int16)
    table[[*ignored, VOID]] = VOID
    table[labels] = range(len(labels))
    return table


VOC_CLASSES = ["background", *FCN_ResNet50_Weights.DEFAULT.meta["categories"][1:]]
VOC_TABLE = label_table(range(21))
ADE20K_TABLE = label_table(range(1, 151), ignored=[0])

# COCO-stuff numbers 91 things from 0 and 91 kinds of stuff from 91; eleven of the things were never annotated.
COCO_UNUSED = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
COCO_TABLE = label_table([label for label in range(182) if label not in COCO_UNUSED], ignored=COCO_UNUSED)
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


def imagenet(root, download):
    """ImageNet-1k as class folders in `root` or root/imagenet, or from the official archives there, which torchvision
    checks and unpacks."""
    if (root / "imagenet").is_dir():
        root = root / "imagenet"
    if (root / "ILSVRC2012_img_val.tar").is_file() and not (root / "val").is_dir():
        with available(f"imagenet in {root}", "remove train/ and val/ there", download):
            for part in ("train", "val"):
                datasets.ImageNet(str(root), split=part)
    return class_folders(root)


def voc2012(root, download):
    """PASCAL VOC 2012 segmentation."""
    home = root / "VOCdevkit" / "VOC2012"
    url = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
    with unpacked("voc2012", root, home, url, "6cd6e144f989b92b3379bac3b3de84fd", download):
        found = [datasets.VOCSegmentation(str(root), image_set=part) for part in ("train", "val")]
    return [mask_split(VOC_CLASSES, list(zip(x.images, x.masks, strict=True)), VOC_TABLE) for x in found]


def ade20k(root, download):
    """ADE20k's scene parsing set; class names, all their synonyms, from objectInfo150.txt."""
    home = root / "ADEChallengeData2016"
    url = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
    with unpacked("ade20k", root, home, url, "7328b3957e407ddae1d3cbf487f149ef", download):
        lines = (home / "objectInfo150.txt").read_text(errors="replace").splitlines()[1:]
    classes = [line.split("\t")[-1].strip() for line in lines]
    folders = [(home / "images" / part, home / "annotations" / part) for part in ("training", "validation")]
    return [mask_split(classes, pair_up(images, masks), ADE20K_TABLE) for images, masks in folders]


def coco_stuff(root, download):
    """COCO-stuff with 171 classes: the images of COCO 2017 and the masks of stuffthingmaps_trainval2017.zip, which
    have no published checksum and are left to the user."""
    source = "calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip"
    parts = {"train2017": "cced6f7f71b7629ddf16f17bbcfab6b2", "val2017": "442b8da7639aecaf257c1dceb8ba8c80"}
    splits, hint = [], f"182 and 183 mean the stuff-only pixelmaps, without things: use {source}"
    for part, md5 in parts.items():
        images, masks = root / part, root / "stuffthingmaps" / part
        if not masks.is_dir():
            raise InputError(f"coco_stuff: {masks} is missing; unpack {source} into {masks.parent}")
        with unpacked("coco_stuff", root, images, f"http://images.cocodataset.org/zips/{part}.zip", md5, download):
            splits.append(mask_split(COCO_CLASSES, pair_up(images, masks), COCO_TABLE, hint=hint))
    return splits


def class_folders(root):
    """train/<class>/* and val/<class>/*; classes in sorted order."""
    classes = [path.name for path in visible(root / "train") if path.is_dir()]
    samples = {"train": [], "val": []}
    for part in samples:
        for folder in filter(Path.is_dir, visible(root / part)):
            if folder.name not in classes:
                raise InputError(f"{folder}: no such class in {root / 'train'}; rename or remove it")
            images, label = image_files(folder), classes.index(folder.name)
            if not images:
                raise InputError(f"{folder} holds no image; add some or remove it")
            samples[part] += [(image, label) for image in images]
    if len(classes) < 2 or not samples["val"]:
        raise InputError(f"--data-root {root}: class folders are missing; needed are {{train,val}}/<class>/*, two at "
                         "least, or for segmentation images/{train,val}/*, masks/{train,val}/*.png")  # fmt: skip
    warnings = about_passed_over(root, ["train", "val"], [file for part in samples.values() for file, _ in part])
    seen = {label for _, label in samples["val"]}
    unseen = [name for label, name in enumerate(classes) if label not in seen]
    if unseen:
        warnings.append(f"classes without validation images: {', '.join(unseen)}")
    return [file_split(classes, samples[part], warnings) for part in samples]


def file_split(classes, samples, warnings=()):
    """A split of (image file, class)."""
    files = np.array([file for file, _ in samples])  # which workers share
    targets = [target for _, target in samples]
    return Split(classes, len(files), lambda i: (read_image(files[i]), targets[i]), warnings=warnings, files=files)


def mask_folders(root):
    """A user's own scenes: images/{train,val}/*, masks/{train,val}/*.png; class names one a line in classes.txt, or as
    many numbers as the masks use."""
    folders = [(root / "images" / part, root / "masks" / part) for part in ("train", "val")]
    pairs = [pair_up(images, masks) for images, masks in folders]
    warnings = about_passed_over(root, ["images", "masks"], [file for part in pairs for pair in part for file in pair])
    where = root / "classes.txt"
    if where.is_file():
        classes = [line.strip() for line in where.read_text("utf-8-sig", "replace").splitlines() if line.strip()]
    else:
        where = root / "masks"
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda pair: np.unique(read_labels(pair[1])), pairs[0] + pairs[1]))
        labels = set(np.concatenate(found).tolist()) - {VOID}
        classes = [f"class {i}" for i in range(max(labels, default=-1) + 1)]
        unused = [str(i) for i in range(len(classes)) if i not in labels]
        if unused:
            warnings.append(f"{where}: labels below {max(labels)} that never occur: {', '.join(unused)}")
    if not 2 <= len(classes) <= VOID or len(set(classes)) < len(classes):
        raise InputError(f"{where}: {len(classes)} classes ({', '.join(classes[:3])}, ...); needed are 2 to {VOID} "
                         f"different ones, with indices from 0 ({VOID} is void)")  # fmt: skip
    table = label_table(range(len(classes)))
    return [mask_split(classes, part, table, warnings=warnings) for part in pairs]


def mask_split(classes, pairs, table, warnings=(), hint="correct the mask or the list of classes"):
    """A split of (image file, mask file); `table` turns a mask's labels into class indices."""
    files = np.array(pairs)

    def read(i):
        image_file, mask_file = files[i]
        labels = read_labels(mask_file)
        mask = table[labels if labels.dtype == np.uint8 else labels.clip(-1, 256)]  # table[-1] is table[256]
        if (mask < 0).any():
            highest = np.flatnonzero(table[:VOID] >= 0)[-1]
            raise InputError(f"mask {mask_file} has label {labels[mask < 0].max()}; labels are 0 to {highest}, and "
                             f"{VOID} for void; {hint}")  # fmt: skip
        pixels = read_image(image_file)
        if pixels.shape[:2] != mask.shape:  # the mask may have been drawn over the image as it is stored
            pixels = read_image(image_file, upright=False)
        if pixels.shape[:2] != mask.shape:
            height, width = pixels.shape[:2]
            raise InputError(f"mask {mask_file} has {mask.shape[0]} x {mask.shape[1]} pixels, its image "
                             f"{height} x {width}; make them equal")  # fmt: skip
        return pixels, mask.astype(np.uint8)

    return Split(classes, len(files), read, masks=True, warnings=warnings, files=files[:, 0])


def about_passed_over(root, folders, files):
    """A list of one warning, on what is in these folders of `root` and none of the `files` that are read; [] where
    there is no such thing. Hidden files are left alone."""
    found = [os.path.join(root, path) for x in folders for path in glob(f"{x}/**/*.*", root_dir=root, recursive=True)]
    counts = Counter(Path(path).suffix.lower() for path in sorted({*found} - {*files}) if os.path.isfile(path))
    if not counts:
        return []
    passed_over = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
    return [f"passed over: {passed_over}; read are only images right in the folders, as {' '.join(IMG_EXTENSIONS)}"]
