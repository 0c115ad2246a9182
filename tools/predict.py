"""Apply the policy of a finished run, its backbone and head, to images.

    python -m tools.predict runs/cifar10/grpo_rm/seed0 photo.jpg more_photos/
    python -m tools.predict runs/voc2012/grpo_rm/seed0 photos/ --output predictions --device cuda

Images are files, or directories of which the images right in them are taken. Everything goes to --output, by default
RUN_DIR/predictions. Classification: prints the most probable class of each image and its probability, and writes them
to predictions.csv. Segmentation: writes for each image <name>.png, the class index of every pixel at the image's own
size (with PASCAL VOC's palette), and <name>_overlay.jpg, the image blended with the colours of its classes.
"""

import csv
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from common import cli, distributed
from common.checkpoint import make_directory
from common.images import image_files, palette_image, read_image
from grpo_rm import SegmentationHead, load_policy


def find_images(paths):
    """The files among `paths`, and the images right in the directories. Raises InputError where there is none."""
    files = []
    for path in paths:
        found = [path] if path.is_file() else image_files(path)
        if not found:
            raise cli.InputError(f"{path}: no image there; give image files, or directories with images right in them")
        files += [Path(file) for file in found]
    return files


def check_names(files, output):
    """Raises InputError where two images would give files of one name, or an image might be overwritten."""
    ((name, count),) = Counter(file.stem for file in files).most_common(1)
    if count > 1:
        raise cli.InputError(f"{count} images would become {name}.png; rename all but one of them")
    if output.resolve() in {file.resolve().parent for file in files}:
        raise cli.InputError(f"--output {output} holds some of the images; choose another directory")


def classify(policy, transform, classes, files, device, output):
    """Print the most probable class of every image, and write predictions.csv."""
    with open(output / "predictions.csv", "w", encoding="utf-8", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["file", "class", "probability"])
        for file in files:
            logits = policy(transform(read_image(file))[None].to(device))  # (1, G)
            probability, index = logits.float().softmax(1)[0].max(0)
            writer.writerow([file, classes[index], f"{probability:.4f}"])
            print(f"{file}  {classes[index]}  {probability:.4f}")


def segment(policy, transform, files, device, output):
    """Write the class indices of every image as a palette PNG, and the image blended with their colours."""
    for file in files:
        pixels = read_image(file)
        logits = policy(transform(pixels)[None].to(device))  # (1, G, M, M)
        labels = label_map(logits[0].float(), tuple(pixels.shape[:2]))
        picture = palette_image(labels.byte().cpu().numpy())
        picture.save(output / f"{file.stem}.png")
        overlay = Image.blend(Image.fromarray(pixels.numpy()), picture.convert("RGB"), 0.5)
        overlay.save(output / f"{file.stem}_overlay.jpg")
    print(f"class indices and overlays of {len(files)} images -> {output}")


def label_map(logits, size):
    """The class with the largest of the logits (G, M, M), upsampled bilinearly to `size`: (H, W) int64. A class at a
    time: all upsampled maps of a photograph would be gigabytes."""
    best = logits.new_full(size, -torch.inf)
    labels = torch.zeros(size, dtype=torch.int64, device=logits.device)
    for index, part in enumerate(logits):
        upsampled = F.interpolate(part[None, None], size=size, mode="bilinear")[0, 0]  # (H, W)
        labels[upsampled > best] = index
        best = torch.maximum(best, upsampled)
    return labels


@cli.stage
@torch.inference_mode()
def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    parser.usage = "%(prog)s RUN_DIR IMAGE_OR_DIR... [flags]"
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="what train_cls.py or train_seg.py wrote")
    parser.add_argument("images", metavar="IMAGE_OR_DIR", type=Path, nargs="+", help="image files, or directories")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: RUN_DIR/predictions")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    args = parser.parse_args(argv)
    files = find_images(args.images)
    device = distributed.start_processes(args.device).device
    policy, transform, classes = load_policy(args.run_dir)
    policy.to(device)
    output = args.output or args.run_dir / "predictions"
    segmentation = isinstance(policy.head, SegmentationHead)
    if segmentation:
        check_names(files, output)
    make_directory(output, "--output")
    if segmentation:
        segment(policy, transform, files, device, output)
    else:
        classify(policy, transform, classes, files, device, output)


if __name__ == "__main__":
    main()
