"""Datasets and loaders: what is read, what is refused, and that batches are a function of the seed alone."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CLASSIFICATION, CPU, write_image
from PIL import Image

import data
from data import (
    IGNORE,
    EvalLoader,
    InputError,
    TrainLoader,
    draw_shapes_split,
    fraction,
    limit,
    load_splits,
    pad_crop_flip,
    square,
    to_input,
)
from grpo_rm import World


def rank(r: int, size: int) -> World:
    return World(r, r, size, torch.device("cpu"))


def test_shapes_are_deterministic_and_balanced():
    train, val = load_splits("shapes", None)
    assert len(train.classes) >= 10 and len(train) == 5000 and len(val) == 1000
    assert (train.targets.bincount() == 500).all()
    again, _ = load_splits("shapes", None)
    for i in (0, 1, 4999):
        assert np.array_equal(train.read(i), again.read(i))
    assert not np.array_equal(train.read(0), val.read(0))
    assert not np.array_equal(train.read(0), train.read(10))


@pytest.mark.parametrize("augment", [True, False])
def test_global_batches_depend_on_the_seed_alone(augment):
    """Joined over the ranks, images and targets are those of one process, bit for bit, augmentation included."""
    split = draw_shapes_split(50, seed=0)

    def epochs(size, seed=1):
        loaders = [TrainLoader(split, CLASSIFICATION["shapes"], 42, 16, rank(r, size), 1, seed=seed, augment=augment) for r in range(size)]
        batches = []
        for epoch in range(2):
            for parts in zip(*(loader.epoch(epoch) for loader in loaders), strict=True):
                images, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
                batches.append((images[targets != IGNORE], targets[targets != IGNORE]))
        return batches

    expected = epochs(1)
    assert [len(targets) for _, targets in expected] == [16, 16, 16, 2] * 2
    for size in (2, 3, 4):
        for (images, targets), (want_images, want_targets) in zip(epochs(size), expected, strict=True):
            assert torch.equal(images, want_images) and torch.equal(targets, want_targets)
    assert not torch.equal(expected[0][1], expected[4][1])  # another order in the next epoch
    assert not torch.equal(epochs(1, seed=2)[0][1], expected[0][1])


def test_an_epoch_can_start_in_its_middle():
    loader = TrainLoader(draw_shapes_split(50, seed=0), CLASSIFICATION["shapes"], 42, 16, CPU, 1, seed=0, augment=True)
    whole, rest = list(loader.epoch(3)), list(loader.epoch(3, start=2))
    assert len(whole) == len(loader) == 4 and len(rest) == 2
    assert all(torch.equal(a, b) for pair in zip(whole[2:], rest, strict=True) for a, b in zip(*pair, strict=True))


def test_every_sample_once_in_training():
    split = data.Split(["a", "b"], torch.arange(50), draw_shapes_split(50, seed=0).read)
    loader = TrainLoader(split, CLASSIFICATION["shapes"], 42, 16, CPU, 1, seed=0, augment=True)
    assert torch.cat([targets for _, targets in loader.epoch(0)]).sort().values.equal(torch.arange(50))


@pytest.mark.parametrize(("count", "size"), [(50, 1), (50, 3), (3, 4)])
def test_evaluation_sees_every_sample_once_in_the_same_batches(count, size):
    split = draw_shapes_split(count, seed=0)
    seen = {}
    for r in range(size):
        for indices, images, targets in EvalLoader(split, CLASSIFICATION["shapes"], 42, 8, rank(r, size), 1):
            assert torch.equal(targets, split.targets[indices])
            for position, i in enumerate(indices.tolist()):
                assert i not in seen and i % 8 == position
                seen[i] = images[position]
    assert sorted(seen) == list(range(count))


def test_resident_and_streamed_pixels_are_the_same(image_folder, monkeypatch):
    split, _ = load_splits("folder", str(image_folder))

    def batches(workers):
        loader = TrainLoader(split, CLASSIFICATION["folder"], 28, 5, CPU, workers, seed=0, augment=True)
        return [images for images, _ in loader.epoch(0)], loader.samples.resident is not None

    resident, kept = batches(2)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    for workers in (0, 2):
        streamed, kept_too = batches(workers)
        assert kept and not kept_too
        assert all(torch.equal(a, b) for a, b in zip(resident, streamed, strict=True))


def decoded(split, directory, **options):
    """The pixels of one epoch without augmentation, through the files of decoded images in `directory`."""
    loader = TrainLoader(split, CLASSIFICATION["folder"], 28, 5, CPU, 2, seed=0, augment=False, cache_dir=str(directory), **options)
    return [tensor for batch in loader.epoch(0) for tensor in batch]


def test_decoded_images_are_kept_for_the_next_run(image_folder, tmp_path, monkeypatch):
    split, _ = load_splits("folder", str(image_folder))
    first = decoded(split, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    reads = []
    monkeypatch.setattr(data, "read_image", lambda name, real=data.read_image: reads.append(name) or real(name))
    again = decoded(split, tmp_path / "cache")
    assert len(reads) == 1  # for the shapes; all the rest come from the file
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    changed = image_folder / "train" / "class1" / "2.png"
    write_image(changed, 77)
    assert not all(torch.equal(a, b) for a, b in zip(first, decoded(split, tmp_path / "cache"), strict=True))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # another file for other sources
    decoded(split, "off")
    assert len(list((tmp_path / "cache").glob("*"))) == 4  # and two locks


def refuse(*arguments):
    raise OSError("refused by the file system")


@pytest.mark.parametrize("harm", ["truncated", "not writable", "no locks", "full"])
def test_a_damaged_or_missing_store_of_decoded_images_changes_nothing(harm, image_folder, tmp_path, monkeypatch, capsys):
    split, _ = load_splits("folder", str(image_folder))
    expected = decoded(split, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    directory, whole = tmp_path / "cache", file.read_bytes()
    if harm == "truncated":
        file.write_bytes(whole[:300])
    elif harm == "not writable":
        directory = file / "below a file"
    elif harm == "no locks":  # as on some network file systems
        monkeypatch.setattr(data.fcntl, "flock", refuse)
    else:
        file.unlink()
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", refuse)
    again = decoded(split, directory)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    assert ("cannot be kept" in capsys.readouterr().err) == (harm != "truncated")
    if harm == "truncated":
        assert file.read_bytes() == whole
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_an_evaluation_finds_what_training_decoded(image_folder, tmp_path, monkeypatch):
    split, _ = load_splits("folder", str(image_folder))
    decoded(split, tmp_path / "cache")
    expected = EvalLoader(split, CLASSIFICATION["folder"], 28, 5, CPU, 2).samples.resident
    reads = []
    real = data.read_image
    monkeypatch.setattr(data, "read_image", lambda name: reads.append(name) or real(name))
    split, _ = load_splits("folder", str(image_folder))
    loader = EvalLoader(split, CLASSIFICATION["folder"], 28, 5, CPU, 2, str(tmp_path / "cache"))
    assert len(reads) == 1  # for the shapes
    assert all(torch.equal(a, b) for a, b in zip(loader.samples.resident, expected, strict=True))


def decode_in_process(root, directory, output):
    torch.set_num_threads(1)
    reads = []
    real = data.read_image
    data.read_image = lambda name: reads.append(name) or real(name)
    split, _ = load_splits("folder", root)
    tensors = decoded(split, directory)
    torch.save([len(reads), tensors], output)


def test_processes_that_start_together_decode_once(image_folder, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    outputs = [str(tmp_path / f"{i}.pth") for i in range(3)]
    processes = [context.Process(target=decode_in_process, args=(str(image_folder), str(tmp_path / "cache"), output)) for output in outputs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    results = [torch.load(output, weights_only=True) for output in outputs]
    assert sorted(reads for reads, _ in results) == [1, 1, 19]  # 18 images, and one for the shapes
    for _, tensors in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0][1], strict=True))


def test_input_can_be_chosen(image_folder):
    split, _ = load_splits("folder", str(image_folder))
    results = []
    for mode in ("resident", "stream"):
        loader = TrainLoader(split, CLASSIFICATION["folder"], 28, 5, CPU, 0, seed=0, augment=True, input_mode=mode)
        assert (loader.samples.resident is not None) == (mode == "resident")
        results.append([images for images, _ in loader.epoch(0)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_random_resized_crops_do_not_depend_on_workers_or_ranks(image_folder):
    split, _ = load_splits("imagenet", str(image_folder))

    def epoch(e, size, workers):
        loaders = [TrainLoader(split, CLASSIFICATION["imagenet"], 28, 6, rank(r, size), workers, seed=0, augment=True) for r in range(size)]
        return torch.cat([torch.cat([images for images, _ in parts]) for parts in zip(*(x.epoch(e) for x in loaders), strict=True)])

    expected = epoch(0, 1, 0)
    assert torch.equal(epoch(0, 1, 2), expected) and torch.equal(epoch(0, 2, 0), expected)
    assert not torch.equal(epoch(1, 1, 0), expected)


def test_imagenet_in_a_sub_directory_and_from_missing_archives(image_folder, tmp_path):
    shutil.move(image_folder, tmp_path / "root" / "imagenet")
    train, val = load_splits("imagenet", str(tmp_path / "root"))
    assert (len(train), len(val)) == (18, 6)
    with pytest.raises(InputError, match=r"ILSVRC2012_img_train\.tar"):
        load_splits("imagenet", str(tmp_path))


@pytest.mark.parametrize(("split", "left_over"), [("train", "n01440764.tar"), ("val", "ILSVRC2012_val_00000001.JPEG")])
def test_imagenet_that_was_not_unpacked_to_its_end(split, left_over, image_folder):
    """torchvision takes what is there for the whole."""
    (image_folder / split / left_over).touch()
    assert len(load_splits("imagenet", str(image_folder))[0]) == 18  # somebody's own folders: no archive
    (image_folder / f"ILSVRC2012_img_{split}.tar").touch()
    with pytest.raises(InputError, match=f"{split} was not unpacked to its end"):
        load_splits("imagenet", str(image_folder))


def test_pad_crop_flip_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (12, 8, 8, 3), generator=generator, dtype=torch.uint8)
    shifts = torch.randint(0, 5, (12, 2), generator=generator)
    flips = torch.arange(12) % 2 == 0
    result = pad_crop_flip(pixels, shifts, flips, 2)
    for i in range(12):
        padded = np.pad(pixels[i].numpy(), ((2, 2), (2, 2), (0, 0)))
        window = padded[shifts[i, 0] : shifts[i, 0] + 8, shifts[i, 1] : shifts[i, 1] + 8]
        assert np.array_equal(result[i], window[:, ::-1] if flips[i] else window)
    centre = pad_crop_flip(pixels, torch.full((12, 2), 2), torch.zeros(12, dtype=torch.bool), 2)
    assert torch.equal(centre, pixels)


def test_square_and_normalisation():
    image = Image.new("RGB", (90, 60), (255, 0, 124))
    assert square(image, 30).shape == (30, 30, 3)
    assert square(image, 28, 256 / 224).shape == (28, 28, 3)
    marked = Image.fromarray(np.arange(60 * 90, dtype=np.uint32).reshape(60, 90).view(np.uint8).reshape(60, 90, 4)[..., :3].copy())
    assert np.array_equal(square(marked, 60), np.asarray(marked)[:, 15:75])  # the centre, untouched
    images = to_input(torch.from_numpy(square(image, 30).copy())[None], 42)
    assert images.shape == (1, 3, 42, 42) and images.dtype == torch.float32
    expected = (torch.tensor([255, 0, 124]) / 255 - torch.tensor(data.MEAN)) / torch.tensor(data.STD)
    torch.testing.assert_close(images[0].mean((1, 2)), expected)


def test_class_folders(image_folder):
    train, val = load_splits("folder", str(image_folder))
    assert train.classes == ["class0", "class1", "class2"]
    assert train.targets.tolist() == [0] * 6 + [1] * 6 + [2] * 6 and len(val) == 6
    assert all(train.read(i).mode == "RGB" for i in range(len(train)))  # grey and palette images too


def test_sixteen_bit_grey_is_scaled(tmp_path):
    levels = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    pixels = np.asarray(data.read_image(str(tmp_path / "deep.png")))
    assert np.array_equal(pixels, np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_unknown_range_are_refused(kind, tmp_path):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(InputError, match=r"deep.tiff cannot be read \(32-bit numbers, whose range is not known; save it with 8 or 16 bits"):
        data.read_image(str(tmp_path / "deep.tiff"))


def test_imagenet_validation_is_the_centre_of_a_larger_resize(tmp_path):
    """The shorter side becomes size * 256 / 224, of which the centre is cut out."""
    image = Image.fromarray((np.random.default_rng(0).random((64, 96, 3)) * 255).astype(np.uint8))
    split = data.Split(["a", "b"], torch.zeros(1, dtype=torch.int64), lambda i: image)
    _, images, _ = next(iter(EvalLoader(split, CLASSIFICATION["imagenet"], 28, 4, CPU, 0)))
    expected = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC).crop((10, 2, 38, 30)))
    assert torch.equal(images, to_input(torch.from_numpy(expected.copy())[None], 28))


def test_tiny_imagenet_layout(tiny_imagenet):
    train, val = load_splits("tiny_imagenet", str(tiny_imagenet))
    assert train.classes == ["n03", "n01", "n02"]  # the order of wnids.txt
    assert train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert val.targets.tolist() == [0, 1, 2] * 2
    assert train.read(0).mode == "RGB"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda home: (home / "wnids.txt").unlink(), r"wnids\.txt is missing"),
        (lambda home: shutil.rmtree(home / "train" / "n01"), r"train/n01/images has 0 images, other classes 4"),
        (lambda home: next((home / "train" / "n02" / "images").iterdir()).unlink(), r"train/n02/images has 3 images, other classes 4"),
        (lambda home: (home / "val" / "images" / "val_3.JPEG").unlink(), r"lists val_3\.JPEG, which is not there"),
        (lambda home: (home / "val" / "val_annotations.txt").write_text(""), r"lists 0 of 6 images"),
        (lambda home: (home / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\t0\n"), r"lists 1 of 6 images"),
        (lambda home: (home / "wnids.txt").write_text(""), r"lists no class or holds no training image"),
        (lambda home: [shutil.rmtree(home / "train" / f"n0{i}") for i in (1, 2, 3)], r"lists no class or holds no training image"),
    ],
    ids=["wnids", "class", "image", "val", "no annotations", "annotations", "no classes", "no train"],
)
def test_half_extracted_tiny_imagenet(tiny_imagenet, harm, message):
    harm(tiny_imagenet / "tiny-imagenet-200")
    with pytest.raises(InputError, match=message) as error:
        load_splits("tiny_imagenet", str(tiny_imagenet))
    assert "unpack tiny-imagenet-200.zip" in str(error.value)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda root: shutil.rmtree(root / "val"), "val/ is missing"),
        (lambda root: [shutil.rmtree(root / "train" / f"class{i}") for i in (1, 2)], "1 class folders; at least two"),
        (lambda root: (root / "val" / "other").mkdir(), "val/other: no such class"),
        (lambda root: [path.unlink() for path in (root / "train" / "class1").iterdir()], "train/class1 holds no image"),
        (lambda root: [path.unlink() for path in root.glob("val/*/*")], "val holds no image"),
    ],
    ids=["no val", "one class", "unknown class", "empty class", "empty val"],
)
def test_folders_that_are_refused(image_folder, harm, message):
    harm(image_folder)
    with pytest.raises(InputError, match=message):
        load_splits("folder", str(image_folder))


@pytest.mark.parametrize(("name", "archive"), [("cifar10", "cifar-10-python"), ("cifar100", "cifar-100-python"), ("stl10", "stl10_binary")])
def test_missing_torchvision_sets_name_the_archive(name, archive, tmp_path):
    with pytest.raises(InputError, match=rf"add --download, or unpack {archive}\.tar\.gz"):
        load_splits(name, str(tmp_path))


def test_data_root_comes_from_the_environment(tiny_imagenet, monkeypatch):
    with pytest.raises(InputError, match="--data-root datasets: no such directory"):
        monkeypatch.chdir(tiny_imagenet)
        load_splits("tiny_imagenet", None)
    monkeypatch.setenv("GRPO_RM_DATA", str(tiny_imagenet))
    assert len(load_splits("tiny_imagenet", None)[0]) == 12


def test_a_download_is_checked_before_it_is_unpacked(tmp_path, monkeypatch):
    asked = {}

    def refuse(url, root, md5):
        asked.update(url=url, md5=md5)
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(data, "download_and_extract_archive", refuse)
    with pytest.raises(InputError, match="fetch it by hand"):
        load_splits("tiny_imagenet", str(tmp_path / "new"), download=True)
    assert asked["md5"] == "90528d7ca1a48142e341f4ef8d21d0de" and asked["url"].endswith("tiny-imagenet-200.zip")
    with pytest.raises(InputError, match="cannot be downloaded for you"):
        load_splits("imagenet", str(tmp_path), download=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(image_folder, content, stream, monkeypatch):
    bad = image_folder / "train" / "class1" / "0.jpg"
    write_image(bad, 0, (64, 64))
    bad.write_bytes(bad.read_bytes()[:500] if content is None else content)
    if stream:
        monkeypatch.setattr(data, "RESIDENT_BYTES", 0)
    split, _ = load_splits("folder", str(image_folder))
    with pytest.raises(InputError, match=r"class1/0\.jpg cannot be read") as error:
        list(TrainLoader(split, CLASSIFICATION["folder"], 28, 5, CPU, 2, seed=0, augment=True).epoch(0))
    assert "\n" not in str(error.value)


def test_limits_keep_all_classes_and_fractions_are_shared():
    split = data.Split(list("abcde"), torch.arange(5).repeat_interleave(20), lambda i: i)
    assert limit(split, 10).targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert limit(split, None) is split and limit(split, 1000) is split and fraction(split, 1.0, 0) is split
    tenth = fraction(split, 0.1, seed=3)
    assert len(tenth) == 10
    assert [tenth.read(i) for i in range(10)] == [fraction(split, 0.1, seed=3).read(i) for i in range(10)]
    assert [tenth.read(i) for i in range(10)] != [fraction(split, 0.1, seed=4).read(i) for i in range(10)]
    assert all(split.targets[tenth.read(i)] == tenth.targets[i] for i in range(10))
