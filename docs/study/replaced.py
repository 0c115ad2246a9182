"""How well tools.label_errors found the labels that the run itself replaced (--label-noise), and how many of them the
policy had learnt by heart. From the repository's root, after tools.label_errors:

    PYTHONPATH=. python docs/study/replaced.py RUN
"""

import argparse
import csv
import sys
from pathlib import Path

import torch
from scipy import stats

from common.checkpoint import read_config
from common.distributed import start_processes
from data import load_data


def true_labels(run, world):
    """{file, or index, as text: class} of the training set of `run`, a run's config.json, without its label noise."""
    run = argparse.Namespace(**vars(run) | {"label_noise": 0})
    split, _ = load_data(run, world)
    return {str(name): split.read(i)[1] for i, name in enumerate(split.names)}


def print_found(doubt, predictions, labels, truth):
    """How well `doubt` (n,), 1 - p(label), tells the labels (n,) that are not the truth from the others, and what is
    predicted (n,) for both."""
    replaced = labels != truth
    count = int(replaced.sum())
    repeats = (predictions == labels).double()
    suspects = doubt.argsort(descending=True, stable=True)[:count]
    pairs = count * (len(labels) - count)
    auroc = stats.mannwhitneyu(doubt[replaced], doubt[~replaced]).statistic / pairs
    print(f"{count} labels were replaced: AUROC {auroc:.3f}, among the first {count} of the list "
          f"{100 * replaced[suspects].double().mean():.1f} %")  # fmt: skip
    print(f"the policy predicts {100 * repeats[replaced].mean():.1f} % of the replaced labels and "
          f"{100 * repeats[~replaced].mean():.1f} % of the others")  # fmt: skip


if __name__ == "__main__":
    run = argparse.Namespace(**read_config(sys.argv[1]))
    with open(Path(sys.argv[1], "label_errors", "label_errors.csv"), newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    doubt = torch.tensor([1 - float(row["label_probability"]) for row in rows])
    labels = torch.tensor([run.classes.index(row["label"]) for row in rows])
    predictions = torch.tensor([run.classes.index(row["prediction"]) for row in rows])
    truth = true_labels(run, start_processes("cpu"))
    print_found(doubt, predictions, labels, torch.tensor([truth[row["file"]] for row in rows]))
