"""Datasets, downloads, transforms, loaders: what is read, fetched and refused; batches are a function of the seed."""

import argparse
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, assert_same_bits, in_processes, write_mask, write_pair
from PIL import Image, ImageOps

import data
from common import distributed
from common.cli import InputError
from common.loader import VOID, Loader
from data import load_data, load_splits, resolve_dataset

CLASSIFICATION, SEGMENTATION = TASKS = ("classification", "segmentation")
CLASSES, MASKS, TINY = ("folder", "image_folder"), ("folder", "mask_folder"), ("tiny_imagenet", "tiny_imagenet")
COCO, NO_CLASSES = ("coco_stuff", "tmp_path"), r"--data-root .*: class folders are missing; .*{train,val}/<class>/\*"
ORIENTATION = 0x0112  # in EXIF; 6: to be turned by 90 degrees clockwise
JPG, TWO, MISSING = "train/class1/0.jpg", "train/2.png", r"is missing or incomplete \(.*\); try again, or .*unpack "


def arguments(dataset="shapes", root=None, **more):
    """What load_data and a Loader take from the command line, resolved."""
    args = argparse.Namespace(dataset=dataset, data_root=root, image_size=28, batch_size=16, map_size=12, seed=1)
    vars(args).update({"workers": 1, "download": False, "limit_train": None, "limit_val": None} | more)
    resolve_dataset(args, *TASKS)
    return args


def splits(name, root=None, download=False):
    args = arguments(name, root)
    return load_splits(name, args.data_root, args.task, download=download)


def everything(split):
    """All pixels of a split, and all targets, as bytes."""
    images, targets = zip(*map(split.read, range(len(split))), strict=True)
    return [np.asarray(image).tobytes() for image in images], [np.asarray(target).tobytes() for target in targets]


def noise(seed, *shape, high=256):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=np.uint8)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def labels_of(name, i):
    """Sample i's labels as the set's masks have them."""
    labels = noise(i, 37, 50 + i, high={"voc2012": 21, "ade20k": 151, "coco_stuff": 182}[name])
    labels[:3] = 0 if name == "ade20k" else VOID
    return labels


def write_set(root, name):
    """A dataset as its archives hold it, 3 training and 2 validation images."""
    if name == "voc2012":
        home = root / "VOCdevkit" / "VOC2012"
        write(home / "ImageSets" / "Segmentation" / "train.txt", b"2007_0\n2007_1\n2007_2\n")
        write(home / "ImageSets" / "Segmentation" / "val.txt", b"2007_3\n2007_4\n")
        for i in range(5):
            write_pair(home / "JPEGImages", home / "SegmentationClass", f"2007_{i}", labels_of(name, i), "P")
    elif name == "ade20k":
        home = root / "ADEChallengeData2016"
        for i, part in enumerate(["training"] * 3 + ["validation"] * 2):
            write_pair(home / "images" / part, home / "annotations" / part, f"{i}", labels_of(name, i))
        names = ["Name", "wall", "building, edifice", *(f"thing{i}" for i in range(3, 151))]
        write(home / "objectInfo150.txt", "".join(f"{i}\t0.1\t1\t1\t{x}\n" for i, x in enumerate(names)).encode())
    else:
        for i, part in enumerate(["train2017"] * 3 + ["val2017"] * 2):
            write_pair(root / part, root / "stuffthingmaps" / part, f"{i}", labels_of(name, i), image_mode="L")


@pytest.mark.parametrize("name", ["shapes", "shapes_seg"])
def test_drawn_sets_are_deterministic_and_balanced(name):
    train, val = splits(name)
    assert (len(train), len(val)) == ((5000, 1000) if name == "shapes" else (2000, 400))
    some, again, others = (everything(split.subset(range(60))) for split in (train, splits(name)[0], val))
    assert some == again and len({*some[0], *others[0]}) == 120
    targets = [train.read(i)[1] for i in range(60)]
    if name == "shapes":
        assert np.bincount(targets).tolist() == [6] * 10
        return
    seen = np.bincount(np.concatenate([mask.ravel() for mask in targets]), minlength=256)
    assert (seen[:11] > 0).all() and seen[11:255].sum() == 0 and 0.02 < seen[VOID] / seen.sum() < 0.2


def test_label_tables_value_by_value():
    """COCO-stuff: things 0-90 without the eleven that were never annotated, stuff 91-181, void; nothing else."""
    dropped, following = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, VOID}, iter(range(999))
    for label in range(256):
        assert data.VOC_TABLE[label] == (label if label < 21 or label == VOID else -1)
        assert data.ADE20K_TABLE[label] == (VOID if label in (0, VOID) else label - 1 if label <= 150 else -1)
        assert data.COCO_TABLE[label] == (VOID if label in dropped else next(following) if label < 182 else -1)
    assert next(following) == 171
    some = {0: "person", 12: "stop sign", 43: "bottle", 89: "toothbrush", 91: "banner", 105: "clouds", 181: "wood"}
    assert all(data.COCO_CLASSES[data.COCO_TABLE[label]] == name for label, name in some.items())
    assert data.VOC_CLASSES[0] == "background" and data.VOC_CLASSES[15] == "person"


def hide(root):
    """Put hidden files and folders everywhere, as systems and editors do; no set has anything of them."""
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        write(folder / ".DS_Store", b"")
        write(folder / "._0.jpg", b"not an image")
        (folder / ".ipynb_checkpoints").mkdir()


def test_layout_of_tiny_imagenet(tiny_imagenet):
    hide(tiny_imagenet)
    train, val = splits("tiny_imagenet", tiny_imagenet)
    assert train.classes == ["n03", "n01", "n02"]  # wnids.txt's order
    assert [train.read(i)[1] for i in range(12)] == sorted([0, 1, 2] * 4) and len(train) == 12
    assert [val.read(i)[1] for i in range(6)] == [0, 1, 2] * 2 and len(val) == 6


@pytest.mark.parametrize(("name", "home"), [("folder", "."), ("imagenet", "."), ("imagenet", "imagenet")])
def test_layout_of_folders_of_classes(name, home, image_folder, tmp_path):
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(deep).save(image_folder / "train" / "class0" / "1.png")
    hide(image_folder)
    shutil.copytree(image_folder, tmp_path / "root" / home)
    train, val = splits(name, tmp_path / "root")
    assert train.classes == ["class0", "class1", "class2"] and (len(train), len(val)) == (18, 6)
    images, targets = zip(*map(train.read, range(18)), strict=True)
    assert {image.shape[2] for image in images} == {3}  # grey and palette images too; 16 bits are scaled, not cut off
    assert np.array_equal(images[1], (deep >> 8)[..., None].repeat(3, 2)) and list(targets) == sorted([0, 1, 2] * 6)
    assert [val.read(i)[1] for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_layout_of_a_folder_with_masks(mask_folder):
    hide(mask_folder)
    train, val = splits("folder", mask_folder)
    assert train.classes == val.classes == ["sky", "road", "car"] and (len(train), len(val)) == (6, 4)
    for i in range(4):  # grey masks and the indices of palettes
        image, mask = val.read(i)
        assert (image.shape, mask.dtype) == ((*mask.shape, 3), np.uint8)
        assert mask[1:3, (0, 20, 40)].tolist() == [[VOID] * 3, [0, 1, 2]]
    (mask_folder / "classes.txt").unlink()
    assert splits("folder", mask_folder)[0].classes == ["class 0", "class 1", "class 2"]


def remove(*patterns):
    return lambda root: [shutil.rmtree(x) if x.is_dir() else x.unlink() for y in patterns for x in [*root.glob(y)]]


def put(name, content):
    return lambda root: write(root / name, content)


def relabel(pattern, change, root, mode="L", suffix=".png"):
    for file in [*(root / "masks").glob(pattern)]:
        labels = change(np.array(Image.open(file)))
        file.unlink()
        write_mask(file.with_suffix(suffix), labels, mode)


@pytest.mark.parametrize(("dataset", "spoil", "message"), [
    (CLASSES, remove("train/class[12]", "val/class[12]"), NO_CLASSES),
    (CLASSES, put("val/other/0.jpg", b""), "val/other: no such class"),
    (CLASSES, remove("train/class1/*"), "train/class1 holds no image"),
    (CLASSES, lambda root: (remove("val/*")(root), put("val/0.jpg", b"")(root)), NO_CLASSES),
    (CLASSES, put("val/class1/0.jpg", b"no image"), r"val/class1/0\.jpg cannot be read"),
    (CLASSES, lambda root: write(root / JPG, (root / JPG).read_bytes()[:-99]), r"class1/0\.jpg cannot be read"),
    (CLASSES, lambda root: Image.new("F", (9, 9)).save(root / "val/class1/x.tiff"), r"x\.tiff .* \(32-bit numbers"),
    (CLASSES, put("val/class1/x.pgm", b"P5 65520 65520 255\n"), r"x\.pgm cannot be read \(Image size .* exceeds limit"),
    (MASKS, remove("masks/train/3.png"), r"images/train/3\.jpg: needed are one image 3\.\* .* and one mask 3\.\* "),
    (MASKS, remove("images/val", "masks/val"), "images/val holds no image"),
    (MASKS, put("images/train/2.webp", b""), r"train/2\.jpg and .*train/2\.webp and .*2\.png: needed"),
    (MASKS, partial(relabel, TWO, lambda x: x[1:]), r"train/2\.png has 39 x 62 pixels, its image 40 x 62"),
    (MASKS, partial(relabel, "val/2.png", lambda x: x + 1), r"val/2\.png has label 3; labels are 0 to 2, and 255"),
    (MASKS, partial(relabel, TWO, lambda x: x, mode="RGB"), r"train/2\.png cannot be read \(PNG RGB "),
    (MASKS, partial(relabel, TWO, lambda x: x, suffix=".jpg"), r"train/2\.jpg cannot be read \(JPEG L "),
    (MASKS, put("masks/train/2.png", b"\x89PNG broken"), r"train/2\.png cannot be read"),
    (MASKS, put("classes.txt", b"sky\n"), r"classes\.txt: 1 classes"),
    (MASKS, put("classes.txt", b"sky\nroad\nsky\n"), r"classes\.txt: 3 classes \(sky, road, sky"),
    (MASKS, lambda root: (relabel("*/*.png", np.zeros_like, root), remove("classes.txt")(root)), ": 1 classes"),
    (TINY, remove("*/wnids.txt"), MISSING),
    (TINY, remove("*/train/n02/images/*_1.JPEG"), MISSING),
    (COCO, remove("stuffthingmaps"), r"is missing; unpack .*stuffthingmaps_trainval2017\.zip"),
    (COCO, lambda root: write_mask(root / "stuffthingmaps/train2017/0.png", [[183]]), "label 183; .* stuff-only"),
])  # fmt: skip
def test_bad_folders_are_named_in_one_line(dataset, spoil, message, request, monkeypatch):
    name, fixture = dataset
    root = request.getfixturevalue(fixture)
    if dataset == COCO:
        write_set(root, name)
    spoil(root)
    for resident in (2**30, 0):  # decoded in threads, and in a worker process
        monkeypatch.setattr("common.loader.memory_share", lambda world, share, room=resident: room)
        with pytest.raises(InputError, match=message) as error:
            for split in splits(name, root, download=True):
                list(Loader(split, arguments(name, root), CPU).epoch(0))
        assert "\n" not in str(error.value)


def test_datasets_are_resolved(image_folder, mask_folder, monkeypatch):
    folders = ("folder", CLASSIFICATION, str(image_folder)), ("folder", SEGMENTATION, str(mask_folder))
    for dataset, task, root in (("stl10", CLASSIFICATION, "x"), ("voc2012", SEGMENTATION, "x"), *folders):
        args = arguments(dataset, root)
        assert resolve_dataset(args, *TASKS) == data.PROTOCOLS[task][dataset]
        assert (args.task, args.data_root) == (task, os.path.abspath(root))
        with pytest.raises(InputError, match=f"--dataset {dataset} is .*{task}"):
            resolve_dataset(args, TASKS[task == CLASSIFICATION])
    for expected in ("datasets", "elsewhere"):
        assert arguments("cifar10").data_root == os.path.abspath(expected)
        monkeypatch.setenv("GRPO_RM_DATA", "elsewhere")
    assert arguments("shapes").data_root is None
    with pytest.raises(InputError, match=r"--data-root x: shapes is drawn .*leave the flag out"):
        arguments("shapes", "x")


@pytest.mark.parametrize(("dataset", "given", "sizes"), [
    ("cifar10", 28, (28, 32, 32)), ("imagenet", None, (224, 224, 256)), ("imagenet", 112, (112, 112, 128)),
    ("shapes_seg", None, (112, 112, 112)), ("voc2012", 56, (56, 56, 56)),
])  # fmt: skip
def test_sizes_follow_from_dataset_and_image_size(dataset, given, sizes):
    args = arguments(dataset, image_size=given)
    assert (args.image_size, args.crop_size, args.resize_size, args.resized_crop) == (*sizes, dataset == "imagenet")


def test_a_run_says_what_it_found(image_folder, mask_folder, capsys):
    def said(root, world=CPU, **more):
        load_data(arguments("folder", root, **more), world)
        return capsys.readouterr()

    hide(image_folder)
    hide(mask_folder)
    assert said(image_folder) == ("folder: 3 classes, 18 training and 6 validation images\n", "")
    found = said(image_folder, limit_val=2, train_fraction=0.5, label_noise=0.4).out
    replaced = "each training label replaced with probability 0.4"
    assert found == f"folder: 3 classes, 9 training and 2 validation images, {replaced}\n"
    assert said(mask_folder) == ("scenes: 3 classes, 6 training and 4 validation images\n", "")
    for name in ("train/class0/a.heic", "val/class1/b.HEIC", "train/list.txt", "train/class2/more/1.jpg", "val/0.jpg"):
        write(image_folder / name, b"")
    remove("val/class0", "val/class2")(image_folder)
    passed_over, unseen = said(image_folder).err.splitlines()
    assert passed_over.startswith("warning: passed over: 2 .heic, 2 .jpg, 1 .txt; read are only images")
    assert unseen == "warning: classes without validation images: class0, class2"
    write(mask_folder / "images/val/notes.txt", b"")
    write(mask_folder / "masks/train/0.json", b"")
    remove("classes.txt")(mask_folder)
    relabel("*/*.png", lambda mask: np.where(mask == 1, 4, mask), mask_folder)
    passed_over, unused = said(mask_folder).err.splitlines()
    assert passed_over.startswith("warning: passed over: 1 .txt, 1 .json; read are only images")
    assert unused == f"warning: {mask_folder}/masks: labels below 4 that never occur: 1, 3"
    other = distributed.World(1, 1, 2, CPU.device, argparse.Namespace(wait=lambda *_: None))
    assert said(mask_folder, other) == ("", "")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_sets_of_torchvision(name, tmp_path, monkeypatch):
    """Which are fetched, checked and read there."""
    shape = (3, 3, 96, 96) if name == "stl10" else (3, 32, 32, 3)

    def fake(self, root, part, transform, download):
        if not download:
            raise RuntimeError("Dataset not found.\nand more")
        self.data, self.targets, self.classes = noise(0, *shape), [0, 1, 0], ["cat", "dog"]
        self.labels, self.transform, self.target_transform = np.array(self.targets), transform, None
        asked.append((root, part))

    asked = []
    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}.__init__", fake)
    with pytest.raises(InputError, match=r"Dataset not found\.\); leave out --no-download, or unpack .* there$"):
        splits(name, tmp_path)
    train, val = splits(name, tmp_path, download=True)
    assert asked == [(str(tmp_path), part) for part in (("train", "test") if name == "stl10" else (True, False))]
    image, target = train.read(1)
    pixels = noise(0, *shape)[1]
    assert np.array_equal(image, pixels.transpose(1, 2, 0) if name == "stl10" else pixels)
    assert train.classes[target] == "dog" and len(train) == len(val) == 3


@pytest.mark.parametrize(("name", "archives", "table", "classes"), [
    ("voc2012", "VOCtrainval_11-May-2012.tar 6cd6e144f989b92b3379bac3b3de84fd", data.VOC_TABLE, 21),
    ("ade20k", "ADEChallengeData2016.zip 7328b3957e407ddae1d3cbf487f149ef", data.ADE20K_TABLE, 150),
    ("coco_stuff", "train2017.zip cced6f7f71b7629ddf16f17bbcfab6b2 val2017.zip 442b8da7639aecaf257c1dceb8ba8c80",
     data.COCO_TABLE, 171),
])  # fmt: skip
def test_missing_sets_are_fetched_from_their_publishers_once(name, archives, table, classes, tmp_path, monkeypatch):
    asked, expected, failures = [], archives.split(), ["no space left on device\nand more"]

    def fetch(url, root, extract_root, md5):
        asked.extend([url.rpartition("/")[2], md5])
        write_set(Path(extract_root), name)
        if failures:  # in the middle of it
            raise OSError(failures.pop())

    monkeypatch.setattr(data, "download_and_extract_archive", fetch)
    if name == "coco_stuff":  # masks have no published checksum and are left to the user
        write_set(tmp_path, name)
        remove("train2017", "val2017")(tmp_path)
    missing = rf"^{name} .*missing .*; leave out --no-download, or unpack .*{expected[0]}"
    with pytest.raises(InputError, match=missing):
        splits(name, tmp_path)
    assert not asked
    with pytest.raises(InputError, match=r"\(no space left on device\); try again, or unpack [^\n]+$"):
        splits(name, tmp_path, download=True)
    with pytest.raises(InputError, match=missing):
        splits(name, tmp_path)
    asked.clear()
    for download in (True, True, False):
        train, val = splits(name, tmp_path, download=download)
        assert asked == expected
    image, target = train.read(1)
    assert (len(train), len(val), image.shape, target.dtype) == (3, 2, (37, 51, 3), np.uint8)
    assert np.array_equal(target, table[labels_of(name, 1)]) and len({*train.classes}) == len(train.classes) == classes
    assert name != "ade20k" or (train.classes[0] == "wall" and train.classes[1].startswith("building"))


def test_imagenets_official_archives_are_unpacked_by_torchvision(image_folder, tmp_path, monkeypatch):
    (tmp_path / "ILSVRC2012_img_val.tar").write_bytes(b"")
    parts = []

    def unpack(root, split):
        parts.append(split)
        shutil.copytree(image_folder / split, Path(root) / split)

    monkeypatch.setattr(data.datasets, "ImageNet", unpack)
    assert [len(split) for split in splits("imagenet", tmp_path)] == [18, 6]
    assert [len(split) for split in splits("imagenet", tmp_path)] == [18, 6] and parts == ["train", "val"]


def test_archives_are_checked_and_unpacked(tiny_imagenet, tmp_path, monkeypatch):
    archive = shutil.make_archive(tmp_path / "published", "zip", tiny_imagenet, "tiny-imagenet-200")
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, max_hops: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", lambda url, file: shutil.copyfile(archive, file))
    with pytest.raises(InputError, match=r"not found or corrupted[^\n]*\); try again, or unpack [^\n]+$"):
        splits("tiny_imagenet", tmp_path / "new", download=True)
    monkeypatch.setattr("torchvision.datasets.utils.check_integrity", lambda file, md5: Path(file).is_file())
    assert [len(split) for split in splits("tiny_imagenet", tmp_path / "new", download=True)] == [12, 6]


def load_on_two_ranks(world, directory):
    """Rank 0 fetches, slowly; both decode."""
    asked, reads, read = [], [], data.read_image

    def fetch(url, root, extract_root, md5):
        time.sleep(1)
        shutil.copytree(f"{directory}/tiny-imagenet-200", f"{extract_root}/tiny-imagenet-200")
        asked.extend([url, md5])

    data.download_and_extract_archive = fetch
    data.read_image = lambda file: reads.append(Path(file).name) or read(file)
    args = arguments("tiny_imagenet", f"{directory}/data", download=True)
    train, _ = load_data(args, world)
    torch.save([asked, reads, Loader(train, args, world).resident], f"{directory}/{world.rank}.pth")


def test_one_rank_downloads_and_all_decode_their_share(tiny_imagenet, tmp_path):
    in_processes(load_on_two_ranks, 2, str(tmp_path))
    names = [f"n0{c}_{i}.JPEG" for c in (3, 1, 2) for i in range(4)]
    official = ["http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"]
    alone = Loader(splits("tiny_imagenet", tmp_path / "data")[0], arguments("tiny_imagenet"), CPU).resident
    for rank in range(2):
        asked, reads, stores = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert asked == ([] if rank else official)
        assert reads == [names[0], *names[rank::2]]  # the first one tells the shape
        assert_same_bits(stores, alone)
        assert alone[0].amax((1, 2, 3)).min() > 0


def test_exif_orientation_is_applied_where_the_mask_fits(image_folder, mask_folder):
    upright, exif = noise(0, 30, 20, 3), Image.Exif()
    exif[ORIENTATION] = 6
    stored = np.rot90(upright).copy()
    remove("train/class0/0.jpg")(image_folder)
    for file in (image_folder / "train/class0/0.png", mask_folder / "images/train/0.png"):
        Image.fromarray(stored).save(file, exif=exif)
    assert np.array_equal(splits("folder", image_folder)[0].read(0)[0], upright)
    for image in (upright, stored):
        write_mask(mask_folder / "masks/train/0.png", image[..., 0] % 3)
        assert np.array_equal(splits("folder", mask_folder)[0].read(0)[0], image)


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK", "one pixel", "turned", "without torchvision's decoder"])
def test_a_jpeg_is_pillows_to_the_bit(kind, tmp_path, monkeypatch):
    file, exif = tmp_path / "x.jpg", Image.Exif()
    exif[ORIENTATION] = 6 if kind == "turned" else 1
    image = Image.fromarray(noise(0, 1, 1, 3) if kind == "one pixel" else noise(0, 37, 50, 3))
    image.convert(kind if kind in ("L", "CMYK") else "RGB").save(file, exif=exif)
    if kind == "without torchvision's decoder":
        monkeypatch.setattr("common.images.decode_jpeg", None)
    with Image.open(file) as stored:
        upright, as_stored = (np.asarray(x.convert("RGB")) for x in (ImageOps.exif_transpose(stored), stored))
    assert np.array_equal(data.read_image(file), upright)
    assert np.array_equal(data.read_image(file, upright=False), as_stored)
    assert upright.shape != as_stored.shape or kind != "turned"


def test_limits_keep_all_classes_a_fraction_is_the_seeds_and_noise_is_of_training_labels():
    def load(**more):
        train, val = load_data(arguments(limit_train=100, limit_val=2000, **more), CPU)
        assert len(val) == 1000
        assert [val.read(i)[1] for i in range(20)] == [*range(10)] * 2  # right, whatever the label noise
        return [*zip(*everything(train), strict=True)]

    whole, some, noisy = load(), load(train_fraction=0.1), load(label_noise=1)
    assert len(whole) == 100 and len({label for _, label in whole}) == 10
    assert len(some) == 10 and set(some) <= set(whole)
    assert load(train_fraction=0.1, method="finetune") == some != load(train_fraction=0.1, seed=2)
    assert all(one[0] == other[0] and one[1] != other[1] for one, other in zip(whole, noisy, strict=True))


@pytest.mark.parametrize("share", [0.2, 1])
def test_wrong_labels_are_drawn_uniformly(share):
    draws = np.random.default_rng((4, 3)).random((2000, 2))  # the study rests on these very numbers
    shifts = data.label_shifts(2000, 10, share, seed=3)
    assert shifts.tolist() == [1 + int(9 * which) if chance < share else 0 for chance, which in draws]
