"""Datasets, downloads, transforms, loaders: what is read, fetched and refused; batches are a function of the seed."""

import argparse
import http.server
import os
import pickle
import shutil
import threading
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, in_processes, write_mask, write_pair
from PIL import Image
from torchvision.datasets.utils import calculate_md5

import data
from common import distributed, transforms
from common.cli import InputError
from data import IGNORE, VOID, Loader, Split, load_data, load_splits, resolve_dataset

CLASSIFICATION, SEGMENTATION = TASKS = ("classification", "segmentation")
CLASSES, MASKS = ("folder", CLASSIFICATION, "image_folder"), ("folder", SEGMENTATION, "mask_folder")
TINY, COCO = ("tiny_imagenet", CLASSIFICATION, "tiny_imagenet"), ("coco_stuff", SEGMENTATION, "tmp_path")
JPG, TWO, MISSING = "train/class1/0.jpg", "train/2.png", r"is missing or incomplete \(.*\); try again, or .*unpack "


def splits(name, root=".", download=False):
    args = arguments(name, data_root=str(root))
    resolve_dataset(args, *TASKS)
    return load_splits(name, root, args.task, download=download)


def arguments(dataset="shapes", task=CLASSIFICATION, **more):
    """What a Loader takes from the command line."""
    defaults = {"image_size": 28, "batch_size": 16, "map_size": 12, "seed": 1, "workers": 1}
    return argparse.Namespace(**{"task": task, "dataset": dataset} | defaults | more)


def equal(one, other):
    """Whether two nested sequences of tensors hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))


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
    """A dataset as its archives hold it, 3 training and 2 validation images; of CIFAR 2 in every batch."""
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
    elif name == "coco_stuff":
        for i, part in enumerate(["train2017"] * 3 + ["val2017"] * 2):
            write_pair(root / part, root / "stuffthingmaps" / part, f"{i}", labels_of(name, i), image_mode="L")
    elif name == "stl10":
        for part, count in (("train", 3), ("test", 2), ("unlabeled", 0)):
            write(root / "stl10_binary" / f"{part}_X.bin", noise(0, count, 3, 96, 96).tobytes())  # column by column
            write(root / "stl10_binary" / f"{part}_y.bin", bytes(i % 2 + 1 for i in range(count)))
        write(root / "stl10_binary" / "class_names.txt", b"cat\ndog\n")
    else:
        files, fine = ["train", "test", "meta"], "fine_"
        if name == "cifar10":
            files, fine = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"], ""
        home = root / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[name]
        for file in files:
            content = {"data": noise(0, 2, 3072), f"{fine}labels": [0, 1], f"{fine}label_names": ["cat", "dog"]}
            write(home / file, pickle.dumps(content))


@pytest.mark.parametrize("name", ["shapes", "shapes_seg"])
def test_drawn_sets_are_deterministic_and_balanced(name):
    train, val = splits(name)
    assert (len(train), len(val)) == ((5000, 1000) if name == "shapes" else (2000, 400))
    samples, again = ([split.read(i) for i in range(60)] for split in (train, splits(name)[0]))
    assert all(np.array_equal(a, b) for pair in zip(samples, again, strict=True) for a, b in zip(*pair, strict=True))
    assert len({np.asarray(image).tobytes() for image, _ in [*samples, *map(val.read, range(60))]}) == 120
    targets = [target for _, target in samples]
    if name == "shapes":
        assert np.bincount(targets).tolist() == [6] * 10
        return
    seen = np.bincount(np.concatenate([mask.ravel() for mask in targets]), minlength=256)
    assert (seen[:11] > 0).all() and seen[11:255].sum() == 0 and 0.02 < seen[VOID] / seen.sum() < 0.2
    for axis in (0, 1):  # between a shape and the background there is void
        one, other = (np.take(targets[3], range(i, 111 + i), axis) for i in (0, 1))
        assert np.isin(other[one == 0], [0, VOID]).all() and np.isin(one[other == 0], [0, VOID]).all()


def test_label_tables_value_by_value():
    """COCO-stuff: things 0-90 without the eleven that were never annotated, stuff 91-181, void; nothing else."""
    dropped, following = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90, VOID}, iter(range(999))
    for label in range(256):
        assert data.VOC_TABLE[label] == (label if label < 21 or label == VOID else -1)
        assert data.ADE20K_TABLE[label] == (VOID if label == 0 else label - 1 if label <= 150 else -1)
        assert data.COCO_TABLE[label] == (VOID if label in dropped else next(following) if label < 182 else -1)
    assert next(following) == 171 == len(data.COCO_CLASSES) == len(set(data.COCO_CLASSES))
    some = {0: "person", 12: "stop sign", 43: "bottle", 89: "toothbrush", 91: "banner", 105: "clouds", 181: "wood"}
    assert all(data.COCO_CLASSES[data.COCO_TABLE[label]] == name for label, name in some.items())
    assert len(data.VOC_CLASSES) == 21 and data.VOC_CLASSES[0] == "background" and data.VOC_CLASSES[15] == "person"


def hide(root):
    """Put hidden files and folders everywhere, as systems and editors do; no set has anything of them."""
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        write(folder / ".DS_Store", b"")
        write(folder / "._0.jpg", b"not an image")
        (folder / ".ipynb_checkpoints").mkdir()


@pytest.mark.parametrize("name", ["folder", "imagenet", "tiny_imagenet"])
def test_layouts_of_classification_sets(name, image_folder, tiny_imagenet, tmp_path):
    tiny, root = name == "tiny_imagenet", tiny_imagenet if name == "tiny_imagenet" else image_folder
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(deep).save(image_folder / "train" / "class0" / "1.png")
    hide(root)
    train, val = splits(name, root)
    assert train.classes == (["n03", "n01", "n02"] if tiny else ["class0", "class1", "class2"])  # wnids.txt's order
    images, targets = zip(*map(train.read, range(len(train))), strict=True)
    assert {image.mode for image in images} == {"RGB"}  # grey and palette images too; 16 bits are scaled, not cut off
    assert tiny or np.array_equal(images[1], (deep >> 8)[..., None].repeat(3, 2))
    assert list(targets) == sorted([0, 1, 2] * (4 if tiny else 6))
    assert [val.read(i)[1] for i in range(6)] == ([0, 1, 2] * 2 if tiny else [0, 0, 1, 1, 2, 2]) and len(val) == 6
    if name == "imagenet":
        shutil.move(image_folder, tmp_path / "root" / "imagenet")
        assert [len(split) for split in splits("imagenet", tmp_path / "root")] == [18, 6]


def test_layout_of_a_folder_with_masks(mask_folder):
    hide(mask_folder)
    train, val = splits("folder", mask_folder)
    assert train.classes == val.classes == ["sky", "road", "car"] and (len(train), len(val)) == (6, 4)
    for i in range(4):  # grey masks and the indices of palettes
        image, mask = val.read(i)
        assert (image.mode, image.size, mask.dtype) == ("RGB", mask.shape[::-1], np.uint8)
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
    (CLASSES, remove("val"), "val/ is missing"),
    (("imagenet", CLASSIFICATION, "tmp_path"), remove(), r"put .* ILSVRC2012_img_train\.tar.* there"),
    (CLASSES, remove("train/class[12]"), "1 class folders"),
    (CLASSES, put("val/other/0.jpg", b""), "val/other: no such class"),
    (CLASSES, remove("train/class1/*"), "train/class1 holds no image"),
    (CLASSES, remove("val/*/*"), "val/class0 holds no image"),
    (CLASSES, put(JPG, b""), r"train/class1/0\.jpg cannot be read"),
    (CLASSES, put("val/class1/0.jpg", b"no image"), r"val/class1/0\.jpg cannot be read"),
    (CLASSES, lambda root: write(root / JPG, (root / JPG).read_bytes()[:-99]), r"class1/0\.jpg cannot be read"),
    (CLASSES, lambda root: Image.new("F", (9, 9)).save(root / "val/class1/x.tiff"), r"x\.tiff .* \(32-bit numbers"),
    (CLASSES, lambda root: Image.new("I", (9, 9)).save(root / "val/class1/x.tiff"), r"x\.tiff .* \(32-bit numbers"),
    (MASKS, remove("masks/train/3.png"), r"images/train/3\.jpg has no "),
    (MASKS, remove("images/val/3.jpg"), r"masks/val/3\.png has no "),
    (MASKS, remove("images/val", "masks/val"), "images/val holds no image"),
    (MASKS, partial(relabel, TWO, lambda x: x[1:]), r"train/2\.png is \(62, 39\) pixels, its image \(62, 40\)"),
    (MASKS, partial(relabel, "val/2.png", lambda x: x + 1), r"val/2\.png has label 3; labels are 0 to 2, and 255"),
    (MASKS, partial(relabel, TWO, lambda x: x, mode="RGB"), r"train/2\.png cannot be read \(PNG RGB "),
    (MASKS, partial(relabel, TWO, lambda x: x, suffix=".jpg"), r"train/2\.jpg cannot be read \(JPEG L "),
    (MASKS, put("masks/train/2.png", b"\x89PNG broken"), r"train/2\.png cannot be read"),
    (MASKS, put("classes.txt", b"sky\n"), r"classes\.txt: 1 classes"),
    (MASKS, put("classes.txt", b"sky\nroad\nsky\n"), r"classes\.txt: 3 classes \(sky, road, sky"),
    (MASKS, lambda root: (relabel("*/*.png", np.zeros_like, root), remove("classes.txt")(root)), ": 1 classes"),
    (TINY, remove("*/wnids.txt"), MISSING),
    (TINY, remove("*/train/n02/images/*_1.JPEG"), MISSING),
    (TINY, remove("*/val/val_annotations.txt"), MISSING),
    (COCO, remove("stuffthingmaps"), r"is missing; unpack .*stuffthingmaps_trainval2017\.zip"),
    (COCO, lambda root: write_mask(root / "stuffthingmaps/train2017/0.png", [[183]]), "label 183; .* stuff-only"),
])  # fmt: skip
def test_bad_folders_are_named_in_one_line(dataset, spoil, message, request, monkeypatch):
    name, task, fixture = dataset
    root = request.getfixturevalue(fixture)
    if dataset == COCO:
        write_set(root, name)
    spoil(root)
    for resident in (2**30, 0):  # decoded in threads, and in a worker process
        monkeypatch.setattr(data, "RESIDENT_BYTES", resident)
        with pytest.raises(InputError, match=message) as error:
            for split in splits(name, root, download=True):
                list(Loader(split, arguments(name, task), CPU).epoch(0))
        assert "\n" not in str(error.value)


def test_datasets_are_resolved(image_folder, mask_folder, monkeypatch):
    folders = (*CLASSES[:2], str(image_folder)), (*MASKS[:2], str(mask_folder))
    for dataset, task, root in (("stl10", CLASSIFICATION, "x"), ("voc2012", SEGMENTATION, "x"), *folders):
        args = argparse.Namespace(dataset=dataset, data_root=root)
        assert resolve_dataset(args, *TASKS) == data.PROTOCOLS[task][dataset]
        assert (args.task, args.data_root) == (task, root)
        with pytest.raises(InputError, match=f"--dataset {dataset} is .*{task}"):
            resolve_dataset(args, TASKS[task == CLASSIFICATION])
    for expected in ("datasets", "/somewhere"):
        args = argparse.Namespace(dataset="shapes", data_root=None)
        resolve_dataset(args, *TASKS)
        assert args.data_root == expected
        monkeypatch.setenv("GRPO_RM_DATA", "/somewhere")


ARCHIVES = {  # what is asked for: archives and their MD5 sums
    "cifar10": "cifar-10-python.tar.gz c58f30108f718f92721af3b95e74349a",
    "cifar100": "cifar-100-python.tar.gz eb9058c3a382ffc7106e4002c42a8d85",
    "stl10": "stl10_binary.tar.gz 91f7769df0f17e558f3565bffb0c7dfb",
    "voc2012": "VOCtrainval_11-May-2012.tar 6cd6e144f989b92b3379bac3b3de84fd",
    "ade20k": "ADEChallengeData2016.zip 7328b3957e407ddae1d3cbf487f149ef",
    "coco_stuff": "train2017.zip cced6f7f71b7629ddf16f17bbcfab6b2 val2017.zip 442b8da7639aecaf257c1dceb8ba8c80",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_missing_sets_are_fetched_from_their_publishers_once(name, tmp_path, monkeypatch):
    asked, expected, failures = [], ARCHIVES[name].split(), ["File not found or corrupted.\nand more"]

    def fetch(url, root, extract_root=None, filename=None, md5=None):
        asked.extend([url.rpartition("/")[2], md5])
        if failures:
            raise RuntimeError(failures.pop())
        write_set(Path(extract_root or root), name)

    monkeypatch.setattr(data, "download_and_extract_archive", fetch)
    for module in ("cifar", "stl10"):  # of torchvision, which knows the MD5 sums of the files, too
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", fetch)
        whole = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(whole, lambda file, md5=None: os.path.isfile(file))
    if name == "coco_stuff":  # masks have no published checksum and are left to the user
        write_set(tmp_path, name)
        remove("train2017", "val2017")(tmp_path)
    with pytest.raises(InputError, match=rf"^{name}.* missing .*; leave out --no-download, or unpack .*{expected[0]}"):
        splits(name, tmp_path)
    assert not asked
    with pytest.raises(InputError, match=r"\(File not found or corrupted\.\); try again, or unpack [^\n]+$"):
        splits(name, tmp_path, download=True)
    asked.clear()
    for download in (True, True, False):
        train, val = splits(name, tmp_path, download=download)
        assert asked == expected
    image, target = train.read(1)
    assert (len(train), len(val), image.mode) == ({"cifar10": 10, "cifar100": 2}.get(name, 3), 2, "RGB")
    if train.masks:
        table = {"voc2012": data.VOC_TABLE, "ade20k": data.ADE20K_TABLE, "coco_stuff": data.COCO_TABLE}[name]
        assert np.array_equal(target, table[labels_of(name, 1)]) and (target.dtype, image.size) == (np.uint8, (51, 37))
        assert len(train.classes) == len(set(train.classes)) == {"voc2012": 21, "ade20k": 150, "coco_stuff": 171}[name]
        assert name != "ade20k" or (train.classes[0] == "wall" and train.classes[1].startswith("building"))
    else:
        stl10, cifar = noise(0, 3, 3, 96, 96)[1].transpose(2, 1, 0), noise(0, 2, 3, 32, 32)[1].transpose(1, 2, 0)
        assert np.array_equal(image, stl10 if name == "stl10" else cifar) and train.classes[target] == "dog"


@pytest.mark.parametrize("reason", ["404: File not found", "File not found or corrupted", "no space left"])
def test_a_set_is_whole_or_absent(reason, tiny_imagenet, tmp_path, monkeypatch):
    """Fetched from a server of this machine, which is asked instead of the official one."""
    archive = Path(shutil.make_archive(tmp_path / "published" / "tiny", "zip", tiny_imagenet, "tiny-imagenet-200"))
    root, whole, md5, asked = tmp_path / "new" / "data", archive.read_bytes(), calculate_md5(archive), []

    def fetch(url, *folders, real=data.download_and_extract_archive, **sums):
        asked.append((url, sums["md5"]))
        real(f"http://127.0.0.1:{server.server_address[1]}/{archive.name}", *folders, md5=md5)

    def extract_some(self, path):
        for name in self.namelist()[:-3]:
            self.extract(name, path)
        raise OSError("no space left on device")

    handler = partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "download_and_extract_archive", fetch)
    with pytest.raises(InputError, match=r"leave out --no-download, or unpack .*tiny-imagenet-200\.zip"):
        splits("tiny_imagenet", root)
    assert not asked and not root.exists()
    with monkeypatch.context() as patch:
        if reason == "404: File not found":
            archive.unlink()
        elif reason == "File not found or corrupted":
            archive.write_bytes(whole + b"\0")
        else:
            patch.setattr("zipfile.ZipFile.extractall", extract_some)
        with pytest.raises(InputError, match=rf"{reason}[^\n]*\); try again, or unpack [^\n]+$"):
            splits("tiny_imagenet", root, download=True)
        assert not (root / "tiny-imagenet-200").exists()
        assert any(root.rglob("*.JPEG")) == (reason == "no space left")
    archive.write_bytes(whole)
    for _ in range(2):
        train, val = splits("tiny_imagenet", root, download=True)
        assert [len(train), len(val)] == [12, 6] and all(train.read(i)[0].size == (64, 64) for i in range(12))
    official = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
    assert asked == [official] * 2
    server.shutdown()


def load_on_two_ranks(world, directory):
    """Rank 0 fetches, slowly; both decode."""
    asked, reads, read = [], [], data.read_image

    def fetch(url, root, extract_root, md5):
        time.sleep(1)
        asked.append(shutil.copytree(f"{directory}/tiny-imagenet-200", f"{extract_root}/tiny-imagenet-200"))

    data.download_and_extract_archive = fetch
    data.read_image = lambda file: reads.append(Path(file).name) or read(file)
    args = arguments("tiny_imagenet", data_root=f"{directory}/data", download=True, limit_train=None, limit_val=None)
    train, _ = load_data(args, world)
    torch.save([len(asked), reads, Loader(train, args, world).resident], f"{directory}/{world.rank}.pth")


def test_one_rank_downloads_and_all_decode_their_share(tiny_imagenet, tmp_path):
    in_processes(load_on_two_ranks, 2, str(tmp_path))
    files = [tmp_path / f"{rank}.pth" for rank in range(2)]
    (asked, reads, stores), (asked_too, reads_too, stores_too) = (torch.load(file, weights_only=True) for file in files)
    assert (asked, asked_too) == (1, 0)
    names = [f"n0{c}_{i}.JPEG" for c in (3, 1, 2) for i in range(4)]
    assert (reads, reads_too) == ([names[0], *names[::2]], [names[0], *names[1::2]])  # the first one tells the shape
    alone = Loader(splits("tiny_imagenet", tmp_path / "data")[0], arguments("tiny_imagenet"), CPU).resident
    assert equal(stores, alone) and equal(stores_too, alone) and alone[0].amax((1, 2, 3)).min() > 0


def test_pad_crop_flip_against_a_loop():
    pixels, shifts = torch.tensor(noise(0, 12, 8, 8, 3)), torch.tensor(noise(1, 12, 2, high=5).astype(int))
    flips = torch.arange(12) % 2 == 0
    result = data.pad_crop_flip(pixels, shifts, flips, 2)
    for i, (row, column) in enumerate(shifts.tolist()):
        window = np.pad(pixels[i].numpy(), ((2, 2), (2, 2), (0, 0)))[row : row + 8, column : column + 8]
        assert np.array_equal(result[i], window[:, ::-1] if flips[i] else window)


def test_inputs_have_imagenets_mean_and_std():
    images = transforms.to_input(torch.tensor([255, 0, 124], dtype=torch.uint8).expand(1, 30, 30, 3), 42)
    expected = (torch.tensor([255, 0, 124]) / 255 - torch.tensor(transforms.MEAN)) / torch.tensor(transforms.STD)
    torch.testing.assert_close(images, expected[:, None, None].expand(1, 3, 42, 42))


@pytest.mark.parametrize(("size", "side"), [((37, 50), 16), ((8, 8), 8), ((5, 7), 12)])
def test_masks_are_resized_to_the_label_at_the_centre(size, side):
    mask = torch.tensor(noise(0, *size))
    result = data.resize_mask(mask, side)
    for i, j in np.ndindex(side, side):
        assert result[i, j] == mask[int((i + 0.5) * size[0] / side), int((j + 0.5) * size[1] / side)]


def joined(loader, size, epoch, start):
    """The global batches, all ranks' parts side by side, without the sample that a rank has where nothing is left."""
    ranks, batches = [], []
    for rank in range(size):
        loader.world = distributed.World(rank, rank, size, CPU.device)
        ranks.append(list(loader.epoch(epoch, start)))
    for parts in zip(*ranks, strict=True):
        images, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        valid = (targets != IGNORE).flatten(1).any(1) if loader.split.masks else targets != IGNORE
        assert len(images) == max(size, valid.sum())
        batches.append((images[valid], targets[valid]))
    return batches


@pytest.mark.parametrize("augment", [True, False])
@pytest.mark.parametrize("name", ["shapes", "shapes_seg", "imagenet"])
def test_global_batches_depend_on_the_seed_alone(name, augment, monkeypatch):
    """Bit for bit the same for any number of ranks, resident or streamed by workers, augmentation included; every
    sample is there once, and an epoch can start in its middle."""
    task = SEGMENTATION if name == "shapes_seg" else CLASSIFICATION
    drawn = splits("shapes" if name == "imagenet" else name)[0]
    split = Split(drawn.classes, 35, cache(drawn.read), drawn.masks)

    def batches(size=1, epoch=2, start=0, augment=augment, **more):
        args = arguments(name, task, batch_size=11, **more)
        return joined(Loader(split, args, CPU, augment=augment, train=True), size, epoch, start)

    expected = batches()
    assert [len(targets) for _, targets in expected] == [11, 11, 11, 2]
    assert len({image.numpy().tobytes() for images, _ in expected for image in images}) == 35
    labels = set(torch.cat([targets.flatten() for _, targets in expected]).tolist())
    assert labels == ({IGNORE, *range(11)} if split.masks else set(range(10)))
    assert equal(batches(augment=False), expected) != augment
    assert not any(torch.equal(other[0][1], expected[0][1]) for other in (batches(epoch=3), batches(seed=2)))
    for resident in (2**30, 0):
        monkeypatch.setattr(data, "RESIDENT_BYTES", resident)
        assert equal(batches(size=2, workers=0), expected) and equal(batches(size=3, workers=2), expected)
        assert equal(batches(start=2), expected[2:])


@pytest.mark.parametrize(("count", "size"), [(30, 1), (30, 3), (3, 4)])
def test_in_order_deals_whole_batches(count, size):
    loader, seen = Loader(splits("shapes")[0].subset(range(count)), arguments(), CPU), []
    for rank in range(size):
        loader.world = distributed.World(rank, rank, size, CPU.device)
        for indices, images, targets in loader.in_order(8):
            assert images.shape == (len(indices), 3, 28, 28) and targets.tolist() == [i % 10 for i in indices]
            seen.append(indices.tolist())
    assert sorted(seen) == [list(range(i, min(i + 8, count))) for i in range(0, count, 8)]


@pytest.mark.parametrize(("train", "size", "corner"), [(True, (42, 28), (7, 0)), (False, (48, 32), (10, 2))])
def test_imagenet_validation_is_the_centre_of_a_larger_resize(train, size, corner):
    """The shorter side becomes size * 256 / 224 there, and `size` in training without augmentation."""
    image, (left, top) = Image.fromarray(noise(0, 64, 96, 3)), corner
    loader = Loader(Split(["a", "b"], 1, lambda i: (image, 0)), arguments("imagenet"), CPU, train=train)
    ((_, images, _),) = loader.in_order(4)
    expected = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 28, top + 28))
    assert torch.equal(images, transforms.to_input(torch.tensor(np.asarray(expected))[None], 28))
    loader.resized_crop = True  # as with augmentation: drawn for a sample in an epoch
    crops = [loader.decode(i, key=(1, epoch))[0] for i, epoch in ((0, 0), (1, 0), (0, 1))]
    assert len({crop.numpy().tobytes() for crop in crops}) == 3


def test_image_and_mask_are_flipped_together():
    """Every image shows its mask, and still does after augmentation."""
    masks = noise(0, 20, 28, 28, high=200)
    split = Split(["a"] * 200, 20, lambda i: (Image.fromarray(masks[i]).convert("RGB"), masks[i]), masks=True)
    loader = Loader(split, arguments("folder", SEGMENTATION, map_size=28), CPU, augment=True)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (transforms.MEAN, transforms.STD))
    images, targets = (torch.cat(parts) for parts in zip(*loader.epoch(0), strict=True))
    assert torch.equal((images * std + mean).round().long(), targets[:, None].expand(-1, 3, -1, -1))
    original = {mask.tobytes() for mask in masks}
    assert 0 < sum(target.byte().numpy().tobytes() in original for target in targets) < 20


def test_limits_keep_all_classes_and_a_fraction_is_the_seeds():
    def load(**more):
        train, val = load_data(arguments(data_root=".", download=False, limit_train=100, limit_val=2000, **more), CPU)
        assert len(val) == 1000
        return [(np.asarray(image).tobytes(), label) for image, label in map(train.read, range(len(train)))]

    everything, some = load(), load(train_fraction=0.1)
    assert len(everything) == 100 and len({label for _, label in everything}) == 10
    assert len(some) == 10 and set(some) <= set(everything)
    assert load(train_fraction=0.1, method="finetune") == some != load(train_fraction=0.1, seed=2)
