"""The labels of a run's training set that its policy believes least: a list to look through for wrong ones.

    python -m tools.label_errors runs/mine                     a run of train_cls.py, best with a --ratio-floor of 3
    python -m tools.label_errors runs/mine --top 200 --output suspects

Writes label_errors.csv to --output, by default RUN_DIR/label_errors: file (or index), label and its probability under
the policy, prediction and its probability, the least probable label first; and label_errors.png, the first --top of
them as pictures. The policy has trained on these labels, so one that it has learnt by heart is not found.
"""

import argparse
import csv
import math
from pathlib import Path

import torch
from matplotlib import pyplot as plt

from common import cli, distributed
from common.checkpoint import make_directory, read_config
from common.loader import Loader
from data import load_data
from grpo_rm import load_policy


@torch.inference_mode()
def believe(policy, loader):
    """The policy's probabilities (n, G) of all samples, in their order, and their labels (n,), on the CPU."""
    probabilities, labels = [], []
    for _, images, targets in loader.in_order(256):
        probabilities.append(policy(images).softmax(1).cpu())
        labels.append(targets.cpu())
    return torch.cat(probabilities), torch.cat(labels)


def draw_sheet(pictures, rows, path):
    """The pictures, ten in a line, each with its row of the table: label and prediction, with their probabilities."""
    lines = math.ceil(len(pictures) / 10)
    figure, axes = plt.subplots(lines, 10, figsize=(16, 2.1 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    shown = zip(axes.flat[: len(pictures)], pictures, rows, strict=True)
    for axis, picture, (_, label, p_label, prediction, p_prediction) in shown:
        axis.imshow(picture.numpy())
        axis.set_title(f"{label} {p_label}\n-> {prediction} {p_prediction}", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


@cli.stage
def main(argv=None):
    parser = cli.ArgumentParser(__doc__)
    parser.usage = "%(prog)s RUN_DIR [flags]"
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="what train_cls.py wrote")
    parser.add_argument("--top", type=cli.whole(1), default=50, help="pictures on the sheet")
    parser.add_argument("--output", metavar="DIR", type=Path, help="default: RUN_DIR/label_errors")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    args = parser.parse_args(argv)
    plt.switch_backend("Agg")
    policy, _, classes = load_policy(args.run_dir)
    run = argparse.Namespace(**read_config(args.run_dir))
    if run.task != "classification":
        raise cli.InputError(f"{args.run_dir} is a run of segmentation; label_errors is for classification")
    run.workers = cli.cores_per_rank()  # of this machine
    world = distributed.start_processes(args.device)
    output = args.output or args.run_dir / "label_errors"
    make_directory(output, "--output")
    split, _ = load_data(run, world)
    if split.classes != classes:
        raise cli.InputError(f"{run.data_root} has other class folders than {args.run_dir} was trained on; undo that")
    probabilities, labels = believe(policy.to(world.device), Loader(split, run, world))
    best, predictions = probabilities.max(1)
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    order = of_label.argsort(stable=True).tolist()
    names, rows = split.names, []
    for i in order:
        label, prediction = classes[labels[i]], classes[predictions[i]]
        rows.append([names[i], label, f"{of_label[i]:.4f}", prediction, f"{best[i]:.4f}"])
    with open(output / "label_errors.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "label_probability", "prediction", "prediction_probability"])
        writer.writerows(rows)
    pictures = [split.read(i)[0] for i in order[: args.top]]
    draw_sheet(pictures, rows[: args.top], output / "label_errors.png")
    print(f"{len(rows)} labels, the least probable first -> {output}")


if __name__ == "__main__":
    main()
