"""The figures of report.py: curves over the epochs and segmentations side by side (the paper's Figures 3 and 2).

A group is a list of runs (report.Results) that differ in the seed alone. A colour belongs to a method, whatever else is
drawn; several groups of one method differ by dashes and markers.
"""

import itertools
import json
import math
import statistics
import textwrap

from matplotlib import pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from PIL import Image

from common.images import palette

COLOURS = {"finetune": "#d55e00", "grpo_rm": "#0072b2"}  # colour-blind readers tell these apart, too
STYLES = [("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ("-", "x"), ("--", "v"), (":", "P"), ("-.", "*")]
PANELS = {  # {figure: {label of the y axis: what is drawn, a key of curves()}}
    "curves": {
        "validation accuracy (%)": "val_accuracy",
        "validation mIoU (%)": "val_miou",
        "validation pixel accuracy (%)": "val_pixel_acc",
        "training accuracy (%)": "accuracy",
    },
    "losses": {"cross-entropy of fine-tuning": "finetune_loss", "loss of GRPO-RM, Eq. (1)": "grpo_rm_loss"},
    "policy": {"clip fraction": "clip_fraction", "KL(q || p), nats": "kl", "largest ratio rho": "max_ratio"},
}


def curves(group, key):
    """{epoch, from 1: value} of each run that has logged some of `key`: a key of log.jsonl, or the loss of one method,
    since the two losses are not comparable. Accuracies are in percent."""
    found = []
    for run in group:
        curve = {}
        for event in run.epochs:
            values = event | {"accuracy": 100 * event["accuracy"], f"{run.method}_loss": event["loss"]}
            if values.get(key) is not None:
                curve[event["epoch"] + 1] = values[key]
        if curve:
            found.append(curve)
    return found


def draw_curves(groups, title, panels, path):
    """A panel for each quantity that was logged: thin lines of the seeds, a thick one with markers of their mean."""
    panels = {label: key for label, key in panels.items() if any(curves(group, key) for group in groups)}
    if not panels:
        return
    size = (4.6 * len(panels), 3.6)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False, sharex=True)
    legend = {}
    for axis, (label, key) in zip(axes.flat, panels.items(), strict=True):
        styles = {method: itertools.cycle(STYLES) for method in COLOURS}
        for group in groups:
            colour, (dashes, marker) = COLOURS[group[0].method], next(styles[group[0].method])
            found = curves(group, key)
            if not found:
                continue
            for curve in found:
                axis.plot(curve.keys(), curve.values(), dashes, color=colour, linewidth=0.8, alpha=0.45)
            epochs = sorted(set.intersection(*map(set, found)))  # those of all seeds
            means = [statistics.mean(curve[epoch] for curve in found) for epoch in epochs]
            style = {"color": colour, "linewidth": 2, "marker": marker, "markersize": 5}
            (line,) = axis.plot(epochs, means, dashes, markevery=1 + len(epochs) // 12, **style)
            legend[f"{group[0].name} (n = {len(group)})"] = line
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
        if axis.get_ylim()[1] > 200:
            axis.set_yscale("symlog")  # a run that blew up would flatten the others
    save(figure, title, legend, len(panels), path)


def ground_truths(directory):
    """{(number, content)} of the ground truths among what eval_linear.py --save-images left."""
    return {(file.name.removesuffix("_truth.png"), file.read_bytes()) for file in directory.glob("*_truth.png")}


def draw_scenes(groups, title, path):
    """In a row an image, its ground truth, and the prediction of each group's first run that has saved images."""
    saved = {}
    for run in itertools.chain(*groups):
        directory = run.directory / "eval_linear_images"
        if directory.is_dir() and "eval_linear.json" in run.files:  # its evaluation has ended
            saved.setdefault(run.name, directory)
    if not saved:
        return
    shared = set.intersection(*map(ground_truths, saved.values()))  # the same images, not only of the same number
    first, rows = next(iter(saved.values())), []
    for number, _ in sorted(shared):
        files = [first / f"{number}_image.png", first / f"{number}_truth.png"]
        files += [directory / f"{number}_prediction.png" for directory in saved.values()]
        rows.append([Image.open(file) for file in files])
    if not rows:
        return
    heights = [row[0].height / row[0].width for row in rows]
    size, layout = (2.3 * len(rows[0]), 0.9 + 2.3 * sum(heights)), {"layout": "constrained", "height_ratios": heights}
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False, **layout)
    for axis, image in zip(axes.flat, itertools.chain(*rows), strict=True):
        axis.imshow(image.convert("RGB"), interpolation="nearest")
        axis.axis("off")
    for axis, name in zip(axes[0], ["image", "ground truth", *saved], strict=True):
        axis.set_title(textwrap.fill(name, 24), fontsize=10)
    classes = list(json.loads((first.parent / "eval_linear.json").read_text())["per_class_iou"])
    masks = [image for row in rows for image in row[1:]]
    legend = {}
    for index in sorted({index for mask in masks for _, index in mask.getcolors()}):
        name = classes[index] if index < len(classes) else "void"
        legend[name] = Patch(facecolor=palette()[index] / 255, edgecolor="black")
    save(figure, title, legend, len(rows[0]), path)


def save(figure, title, legend, columns, path):
    """Write PNG and PDF. legend: {label: line or patch}, drawn below the figure, which grows by its height."""
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(legend) / columns))
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(title)
    for suffix in ("png", "pdf"):
        figure.savefig(f"{path}.{suffix}", dpi=160, bbox_inches="tight")  # as wide as long names need
        print(f"wrote {path}.{suffix}")
    plt.close(figure)


def draw_figures(datasets, directory):
    """Write <dataset>_curves, _losses, _policy and _scenes for each list of groups of one dataset."""
    plt.switch_backend("Agg")
    for groups in datasets:
        first = groups[0][0]
        name = first.title if first.dataset == "folder" else first.dataset
        trained = [group for group in groups if group[0].method != "frozen"]
        title, noise = first.title, {run.config.get("label_noise", 0) for run in itertools.chain(*trained)}
        if len(noise) == 1 and noise != {0}:
            title += f", label_noise {noise.pop():g}"
        for figure, panels in PANELS.items():
            draw_curves(trained, title, panels, directory / f"{name}_{figure}")
        draw_scenes(groups, title, directory / f"{name}_scenes")
