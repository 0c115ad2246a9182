"""Tables 2 to 6 of the paper from finished runs, ours beside the paper's (paper.csv), and its Figures 2 and 3.

    python -m tools.report runs                                     prints Markdown
    python -m tools.report runs --csv tables --figures figures      and writes CSV files, and figures as PNG and PDF

Reads every run below RUNS_DIR. Scores are in percent, mean ± sample standard deviation over seeds; n = 1 is one run's.
Only runs whose settings are equal but for the seed are averaged; several settings of a method are named by the one or
two that differ, else by directories. Paired tests need three common seeds: two get none. A dash: no number.
"""

import csv
import itertools
import json
import operator
import os
import statistics
from pathlib import Path

from scipy import stats

from common.checkpoint import MAY_DIFFER_ON_RESUME, make_directory
from common.cli import ArgumentParser, InputError, stage
from tools.figures import draw_figures

with open(Path(__file__).with_name("paper.csv"), newline="", encoding="utf-8") as file:
    PAPER = {(line["dataset"], line["column"]): line for line in csv.DictReader(file)}  # a line is {row: cell}
TITLES = {dataset: line["title"] for (dataset, _), line in PAPER.items()}
METHODS = {"frozen": "frozen", "finetune": "Fine-tuning", "grpo_rm": "GRPO-RM"}
REWARDS = {"eq4": "", "none": ", no uniformity reward", "eq5": ", Eq. (5)"}
ABLATIONS = ["GRPO-RM, no uniformity reward", "GRPO-RM, Eq. (5)"]  # of Table 6 alone
ROWS = ["frozen", "Fine-tuning (10%)", "Fine-tuning", "GRPO-RM (10%)", "GRPO-RM", *ABLATIONS]
ORDER = {name: i for i, name in enumerate([*TITLES, *ROWS])}

CONFIG = "config.json"
FEATURES = {"linear": "eval_linear.json", "multiscale": "eval_linear_multiscale.json"}  # of segmentation
FILES = [CONFIG, "eval_knn.json", *FEATURES.values()]
MASK_SCORES = {"pixel-acc": "pixel_acc", "IoU": "iou", "mIoU": "miou"}
SCORES = {"SR": ("eval_linear.json", "top1"), "k-NN": ("eval_knn.json", "top1")}  # {column: (file, key)}
for features, file in FEATURES.items():
    SCORES |= {f"{features} {column}": (file, key) for column, key in MASK_SCORES.items()}
IDENTITY = ["dataset", "task", "method", "seed"]  # of a run, in each of its files
NO_SETTINGS = {*IDENTITY, "fit_seed", "top1", "per_class_accuracy", "confusion", *MASK_SCORES.values(), "per_class_iou"}
# A resumed run may have other values of weights, hub_repo and max_steps; runs that are averaged may not.
NO_SETTINGS |= MAY_DIFFER_ON_RESUME - {"weights", "hub_repo", "max_steps"}
GRPO_SETTINGS = {"clip_eps", "uniformity", "accuracy_weight", "uniformity_weight", "ratio_floor", "old_policy_every"}
GRPO_SETTINGS.add("background_penalty")
FOLLOWS = {"lr_end": "lr", "warmup_epochs": "epochs", "train_images": "limit_train"}  # by default
FOLLOWS |= {"crop_size": "image_size", "resize_size": "image_size"}
SHOWN = "label_noise backbone image_size epochs batch_size lr warmup_epochs ratio_floor limit_train".split()


class Results:
    """What a run left in its directory. Raises InputError where that is of different runs."""

    def __init__(self, directory):
        self.directory = directory
        self.files = {name: json.loads((directory / name).read_text()) for name in FILES if (directory / name).exists()}
        self.config = self.files.get(CONFIG, {})  # frozen features have none
        identities = {operator.itemgetter(*IDENTITY)(values) for values in self.files.values()}
        if len(identities) > 1:
            raise InputError(f"{directory} holds files of different runs, {identities}; move some of them")
        ((self.dataset, self.task, self.method, self.seed),) = identities
        self.title = TITLES.get(self.dataset, self.dataset)
        if self.dataset == "folder":  # own data are called by their directory
            self.title = Path(next(iter(self.files.values()))["data_root"]).name
        self.data = self.dataset, self.title, self.task
        self.row = row_of(self.method, self.config)
        self.name = self.row  # add_labels says more where it must
        self.settings = settings_of(self.files)
        self.epochs = []
        if (directory / "log.jsonl").exists():
            *lines, _ = (directory / "log.jsonl").read_text().split("\n")  # the last is empty or half-written
            self.epochs = [event for event in map(json.loads, lines) if event["event"] == "epoch"]
        self.numbers = numbers_of(self.files, self.epochs)
        hardware = [self.config.get(key) for key in ("world_size", "device_name", "grad_accum", "compile")]
        self.hardware = "{} x {}, grad_accum {}, compile {}".format(*hardware)


def row_of(method, config):
    """The row of the paper's tables that a run belongs to."""
    row, fraction = METHODS[method], config.get("train_fraction", 1)
    if fraction != 1:
        row += f" ({100 * fraction:g}%)"
    if method == "grpo_rm":
        row += REWARDS[config.get("uniformity", "eq4")]
    return row


def settings_of(files):
    """{(file, key): value as text} of all that changes the mathematics of a run."""
    settings = {}
    for file, values in files.items():
        ignored = set(NO_SETTINGS)
        if values["method"] == "finetune":
            ignored |= GRPO_SETTINGS
        if values["dataset"] == "folder":
            ignored.remove("data_root")
        if file != CONFIG and CONFIG in files:
            ignored.add("weights")  # those that the run made
        for key in values.keys() - ignored:
            value = values[key]
            settings[file, key] = f"{value:.12g}" if isinstance(value, float) else str(value)
    return settings


def numbers_of(files, epochs):
    """{column: score in percent or cost}; costs without the first epoch, which warms up."""
    numbers = {column: files[file][key] for column, (file, key) in SCORES.items() if key in files.get(file, {})}
    for column in numbers.keys() & {"SR", "linear pixel-acc"}:
        numbers["score"] = numbers[column]  # of Table 6
    if len(epochs) > 1:
        numbers["seconds"] = statistics.median(event["seconds"] for event in epochs[1:])
        if epochs[-1]["peak_memory_gb"] is not None:
            numbers["GB"] = epochs[-1]["peak_memory_gb"] * files[CONFIG]["world_size"]
    return numbers


def agree(run, other):
    """Whether no setting that both runs have differs."""
    return all(other.settings.get(key, value) == value for key, value in run.settings.items())


def split(items, key):
    """The items as lists of equal key(item)."""
    found = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.values())


def load_groups(root):
    """The runs below `root` as lists of those that may be averaged, all of one name. Raises InputError."""
    directories = {path.parent for name in FILES for path in root.rglob(name)}
    if not directories:
        raise InputError(f"{root}: no run there (config.json, eval_linear.json, eval_knn.json); run_all.sh makes some")
    groups = []
    for runs in split(map(Results, sorted(directories)), lambda run: (run.data, run.row)):
        alike = []
        for run in runs:
            fitting = [group for group in alike if all(run.seed != r.seed and agree(run, r) for r in group)]
            if fitting:
                fitting[0].append(run)
            else:
                alike.append([run])
        if len(alike) > 1:
            add_labels(alike, root)
        groups += alike
    return sorted(groups, key=lambda g: (ORDER.get(g[0].dataset, 99), g[0].data, ORDER.get(g[0].row, 99), g[0].name))


def values_of(setting, runs):
    """The different values of a setting of config.json."""
    return {run.settings[CONFIG, setting] for run in runs if (CONFIG, setting) in run.settings}


def add_labels(groups, root):
    """Name groups of one row by the one or two settings in which they differ, else by directories."""
    runs = list(itertools.chain(*groups))
    names = [name for name in runs[0].config if len(values_of(name, runs)) > 1]
    names = sorted(name for name in names if FOLLOWS.get(name) not in names)
    labels = [", ".join(" ".join([name, *values_of(name, group)]) for name in names) for group in groups]
    if len(names) > 2 or len(set(labels)) < len(groups):
        labels = [f"in {os.path.relpath(group[0].directory.parent, root)}" for group in groups]
    for group, label in zip(groups, labels, strict=True):
        for run in group:
            run.name = f"{run.row}, {label}"


def numbers(group, column):
    """{seed: score or cost} of the runs that have it."""
    return {run.seed: run.numbers[column] for run in group if column in run.numbers}


def average(values, seeds):
    """Mean ± sample standard deviation; and how many, where it is one or not all seeds."""
    text = f"{statistics.mean(values):z.2f}"  # z: no -0.00
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}"
    if len(values) == 1 or len(values) < len(seeds):
        text += f" (n = {len(values)})"
    return text


def comparison(groups, columns, **more):
    """Rows {header: cell} of our numbers beside the paper's. columns: {header: key of Results.numbers}; more: cells."""
    rows = []
    for group in groups:
        found = {header: numbers(group, column) for header, column in columns.items()}
        seeds = sorted(set().union(*found.values()))
        if not seeds:
            continue
        row = {"dataset": group[0].title, "method": group[0].name, **more, "seeds": ", ".join(map(str, seeds))}
        for header, ours in found.items():
            paper = PAPER.get((group[0].dataset, columns[header]), {}).get(group[0].row)
            if ours:
                row[header] = average(ours.values(), seeds)
            if ours and paper:
                row[f"{header} paper"] = paper
                row[f"{header} diff"] = f"{statistics.mean(ours.values()) - float(paper.split(' ± ')[0]):+z.2f}"
        rows.append(row)
    return rows


def segmentation(groups):
    """The rows of linear features, then those of multi-scale ones."""
    rows = []
    for features in FEATURES:
        rows += comparison(groups, {column: f"{features} {column}" for column in MASK_SCORES}, features=features)
    return rows


def costs(groups, columns):
    """Rows by hardware: costs are comparable only where it is the same."""
    rows = []
    for group in groups:
        for runs in split(group, lambda run: run.hardware):
            rows += comparison([runs], {column: column for column in columns}, hardware=runs[0].hardware)
    return rows


def paired_tests(groups):
    """GRPO-RM - fine-tuning over three seeds or more that both have, where all other settings are equal: mean and
    deviation, and the two-sided paired t-test."""
    rows = []
    for ours, theirs in itertools.product(groups, groups):
        if (ours[0].data, ours[0].method, theirs[0].method) != (theirs[0].data, "grpo_rm", "finetune"):
            continue
        if not all(agree(run, other) for run, other in itertools.product(ours, theirs)):
            continue
        for column in SCORES:
            a, b = numbers(ours, column), numbers(theirs, column)
            gains = {seed: round(a[seed] - b[seed], 4) for seed in sorted(a.keys() & b.keys())}
            if len(gains) < 3:
                continue
            row = {"dataset": ours[0].title, "methods": f"{ours[0].name} - {theirs[0].name}", "score": column}
            row |= {"seeds": ", ".join(map(str, gains)), "difference": average(gains.values(), gains)}
            if len(set(gains.values())) > 1:  # there is no test of differences that do not vary
                test = stats.ttest_1samp(list(gains.values()), 0)
                row |= {"t": f"{test.statistic:.2f}", "p": f"{test.pvalue:.4f}"}
            rows.append(row)
    return rows


def make_tables(groups):
    """{title: rows} of the paper's tables, and of paired tests, for which there are runs."""
    plain = [group for group in groups if group[0].row not in ABLATIONS]
    images = [group for group in plain if group[0].task == "classification"]
    coco = [group for group in plain if group[0].dataset == "coco_stuff"]
    masks = [group for group in plain if group[0].task == "segmentation" and group not in coco]
    ablated = {group[0].data for group in groups if group[0].row in ABLATIONS}
    rewards = [group for group in groups if group[0].data in ablated and group[0].row in ("GRPO-RM", *ABLATIONS)]
    table5, table6 = costs(plain, ["seconds", "GB"]), costs(rewards, ["score", "seconds"])
    tables = {
        "Table 2: semantic segmentation (%)": segmentation(masks),
        "Table 2 tests: paired over seeds": paired_tests(masks),
        "Table 3: image classification (%)": comparison(images, {"SR": "SR", "k-NN": "k-NN"}),
        "Table 3 tests: paired over seeds": paired_tests(images),
        "Table 4: semantic segmentation of COCO-stuff (%)": segmentation(coco),
        "Table 4 tests: paired over seeds": paired_tests(coco),
        "Table 5: seconds of training per epoch, peak GB of all processes; the paper's: 4 A100 or 2 H200": table5,
        "Table 6: uniformity rewards; score: SR, or pixel accuracy of linear features (%)": table6,
    }
    return {title: rows for title, rows in tables.items() if rows}


def notes(groups, root):
    """Lines: the settings that all runs of a dataset share; runs that lack epochs, or evaluations that others have."""
    lines = []
    for runs in split(itertools.chain(*groups), lambda run: run.data):
        shared = [" ".join([name, *values_of(name, runs)]) for name in SHOWN if len(values_of(name, runs)) == 1]
        shared = [text for text in shared if text not in ("label_noise 0", "limit_train None")]
        if shared:
            lines.append(f"{runs[0].title}: {', '.join(shared)}.\n")
        evaluated = {file for run in runs for file in run.files} - {CONFIG}
        for run in runs:
            lacking = [f"no {file}" for file in sorted(evaluated - run.files.keys())]
            if len(run.epochs) < run.config.get("epochs", 0):
                lacking.insert(0, f"epoch {len(run.epochs)} of {run.config['epochs']}")
            if lacking:
                lines.append(f"- {run.directory.relative_to(root)} is not finished: {', '.join(lacking)}")
    return lines


def print_table(title, rows):
    """Print rows {header: cell} as Markdown, a dash where there is no cell. Returns the lines of cells as text."""
    headers = list(dict.fromkeys(itertools.chain(max(rows, key=len), *rows)))  # in the order of the fullest row
    lines = [headers]
    for row in rows:
        cells = [row.get(header, "-") for header in headers]
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells])
    print(f"### {title}\n")
    for cells in [headers, ["---"] * len(headers), *lines[1:]]:
        print(f"| {' | '.join(cells)} |")
    print(flush=True)
    return lines


@stage
def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.usage = "%(prog)s RUNS_DIR [--csv DIR] [--figures DIR]"
    parser.add_argument("runs", metavar="RUNS_DIR", type=Path, help="directory that holds the runs, at any depth")
    parser.add_argument("--csv", metavar="DIR", type=Path, help="write the tables into this directory as CSV files")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="draw curves and images there, as PNG and PDF")
    args = parser.parse_args(argv)
    groups = load_groups(args.runs)
    if args.csv:
        make_directory(args.csv, "--csv")
    for title, rows in make_tables(groups).items():
        lines = print_table(title, rows)
        if args.csv:
            name = title.split(":")[0].lower().replace("table ", "table").replace(" ", "_")  # table2, table2_tests
            with open(args.csv / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(lines)
    print(*notes(groups, args.runs), sep="\n")
    if args.figures:
        make_directory(args.figures, "--figures")
        draw_figures(split(groups, lambda group: group[0].data), args.figures)


if __name__ == "__main__":
    main()
