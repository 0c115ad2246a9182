"""Tables 2 to 6 of the paper from finished runs, ours beside the paper's, and its Figures 2 and 3.

    python -m tools.report runs                                         prints Markdown
    python -m tools.report runs --csv tables --figures figures          and writes the same tables as CSV, and figures

Reads what the other scripts left in every directory below RUNS_DIR: config.json, log.jsonl and the eval_*.json. Scores
are in percent, mean ± sample standard deviation over seeds. Only runs whose settings are equal in all but the seed are
averaged; where a row has several settings, each is labelled by its directory. What was not run is a dash.
"""

import csv
import itertools
import json
import math
import statistics
import textwrap
from pathlib import Path
from types import SimpleNamespace

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from PIL import Image
from scipy import stats

from common.checkpoint import MAY_DIFFER_ON_RESUME, make_directory
from common.cli import ArgumentParser, InputError, stage

# ----------------------------------------------------------------------------------------------------------------------
# What the paper reports, as printed there: a cell for each of ROWS; "score" is SR, or pixel accuracy of linear features

ROWS = {
    "frozen": "frozen",
    "finetune 10%": "Fine-tuning (10%)",
    "finetune": "Fine-tuning",
    "grpo_rm 10%": "GRPO-RM (10%)",
    "grpo_rm": "GRPO-RM",
    "grpo_rm none": "GRPO-RM, no uniformity reward",
    "grpo_rm eq5": "GRPO-RM, Eq. (5)",
}
PLAIN, ABLATION = list(ROWS)[:5], list(ROWS)[4:]  # of Tables 2 to 5, and of Table 6
TABLES = """
    cifar10 SR/k-NN       47.26/43.26  -  94.55±0.27/94.39±0.29  -  95.78±0.26/95.81±0.30  -  -
    cifar100 SR/k-NN      20.68/25.92  -  68.87±2.70/71.32±1.85  -  74.41±2.28/78.48±0.92  -  -
    stl10 SR/k-NN         15.71/37.57  -  43.44±6.89/89.76±3.50  -  46.42±5.86/89.03±4.43  -  -
    tiny_imagenet SR/k-NN 29.24/21.10  -  58.67±0.61/58.59±1.25  -  65.96±0.40/66.36±0.32  -  -
    imagenet SR/k-NN      74.34/72.61  -  74.48±0.85/71.33±0.45  -  76.21±0.92/72.16±0.73  -  -
    voc2012 linear pixel-acc        93.06  93.46±0.01  93.66±0.04  93.67±0.02  93.98±0.02  -  -
    voc2012 linear IoU              87.02  88.03±0.07  88.24±0.02  88.57±0.03  88.64±0.03  -  -
    voc2012 linear mIoU             66.77  69.62±0.18  69.78±0.11  70.38±0.08  70.44±0.12  -  -
    voc2012 multiscale pixel-acc    94.04  94.33±0.01  94.34±0.02  94.38±0.01  94.38±0.01  -  -
    voc2012 multiscale IoU          88.75  89.06±0.05  89.19±0.04  89.35±0.01  89.38±0.01  -  -
    voc2012 multiscale mIoU         70.20  70.98±0.04  71.45±0.05  71.66±0.06  71.71±0.06  -  -
    ade20k linear pixel-acc         70.19  69.72±0.02  69.74±0.02  69.74±0.01  69.76±0.01  -  -
    ade20k linear IoU               54.07  54.02±0.01  54.44±0.02  54.55±0.01  55.34±0.02  -  -
    ade20k linear mIoU              31.52  32.03±0.04  32.23±0.03  32.19±0.05  32.62±0.01  -  -
    ade20k multiscale pixel-acc     71.02  71.18±0.02  71.29±0.02  71.26±0.01  71.52±0.01  -  -
    ade20k multiscale IoU           55.07  55.32±0.01  55.80±0.02  55.35±0.01  56.01±0.03  -  -
    ade20k multiscale mIoU          32.26  32.19±0.05  33.19±0.03  33.12±0.02  33.58±0.02  -  -
    coco_stuff linear pixel-acc     63.43  63.71       64.08       63.72       64.10       -  -
    coco_stuff linear IoU           46.45  46.67       47.72       47.51       48.01       -  -
    coco_stuff linear mIoU          30.79  30.94       31.67       31.07       32.25       -  -
    coco_stuff multiscale pixel-acc 64.57  64.87       64.99       64.94       65.02       -  -
    coco_stuff multiscale IoU       47.68  47.98       48.26       48.08       48.53       -  -
    coco_stuff multiscale mIoU      31.75  32.77       32.88       32.22       33.06       -  -
    stl10 score/seconds/GB         -  -  -                 -  46.42/0.95/-         34.90/1.11/-    36.27/3.56/-
    tiny_imagenet score/seconds/GB -  -  -/9.30/13.26      -  65.96/10.37/15.12    62.16/9.40/-    60.32/18.57/-
    imagenet score/seconds/GB      -  -  -/175.95/95.40    -  76.21/238.20/107.00  77.04/232.00/-  74.70/251.30/-
    voc2012 score/seconds/GB       -  -  -/151.39/217.72   -  94.67/174.29/220.66  93.61/138.27/-  -/9420.00/-
    coco_stuff score/seconds/GB    -  -  -/1549.80/223.46  -  -/1669.80/232.04     -               -
"""
PAPER = {}  # {"dataset column": {row: (mean, standard deviation where the paper has one)}}
for line in TABLES.strip().splitlines():
    *dataset, columns = line.split()[: -len(ROWS)]
    for row, cell in zip(ROWS, line.split()[-len(ROWS) :], strict=True):
        for column, number in zip(columns.split("/"), cell.split("/"), strict=cell != "-"):
            if number != "-":
                PAPER.setdefault(" ".join([*dataset, column]), {})[row] = tuple(map(float, number.split("±")))
DATASETS = dict(
    cifar10="CIFAR-10",
    cifar100="CIFAR-100",
    stl10="STL-10",
    tiny_imagenet="Tiny-ImageNet",
    imagenet="ImageNet",
    voc2012="Pascal VOC 2012",
    ade20k="ADE20k",
    coco_stuff="COCO-stuff",
)
ORDER = {name: i for i, name in enumerate([*DATASETS, *ROWS])}

# ----------------------------------------------------------------------------------------------------------------------
# Runs, and which of them may be averaged

SCORES = {  # {task: {column: (result file, key)}}
    "classification": {"SR": ("eval_linear.json", "top1"), "k-NN": ("eval_knn.json", "top1")},
    "segmentation": {
        f"{features} {column}": (f"eval_linear{end}.json", key)
        for features, end in (("linear", ""), ("multiscale", "_multiscale"))
        for column, key in (("pixel-acc", "pixel_acc"), ("IoU", "iou"), ("mIoU", "miou"))
    },
}
RESULTS = {task: list(dict.fromkeys(file for file, _ in columns.values())) for task, columns in SCORES.items()}
COSTS = {"seconds": "seconds", "GB": "peak_memory_gb"}  # {column: key of the epoch event}
IDENTITY = ["dataset", "task", "method", "seed"]
NO_SETTING = MAY_DIFFER_ON_RESUME | {*IDENTITY, "fit_seed", "top1", "pixel_acc", "iou", "miou", "per_class_iou"}
OBJECTIVE = set(
    "clip_eps uniformity accuracy_weight uniformity_weight group_weighting ratio_floor old_policy_every "
    "background_penalty".split()
)  # fine-tuning does not depend on these


def load_run(directory):
    """What a run left in its directory. kind: dataset, task, row (method and variant, such as "grpo_rm 10%"); settings:
    {(file, key): value} of all that changes the mathematics; numbers: {column: score or cost}; epochs: those of its
    log, but for a half-written last line. Raises InputError where a file is damaged or belongs to another run."""
    files, numbers, epochs, identities = {}, {}, [], {}
    for path in (directory / name for name in ("config.json", *itertools.chain(*RESULTS.values()), "log.jsonl")):
        try:
            if path.name == "log.jsonl" and path.exists():
                events = map(json.loads, path.read_bytes().split(b"\n")[:-1])
                epochs = [event for event in events if event["event"] == "epoch"]
            elif path.exists():
                values = files[path.name] = json.loads(path.read_text())
                identities.setdefault(tuple(values[key] for key in IDENTITY), path.name)
                columns = SCORES[values["task"]].items()
                numbers |= {column: float(values[key]) for column, (file, key) in columns if file == path.name}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be used ({error!r:.80}); restore or remove it") from error
    if len(identities) != 1:
        raise InputError(f"{directory} holds files of several runs, or a log without config.json: {identities}")
    ((dataset, task, method, seed),) = identities
    config, first = files.get("config.json", {}), next(iter(files.values()))
    ignored = NO_SETTING | (OBJECTIVE if method == "finetune" else set())
    settings = {(f, key): value for f, values in files.items() for key, value in values.items() if key not in ignored}
    # Where a run started from and where it was stopped matters here, though not to a run that is resumed.
    start = ["max_steps", "weights", *["hub_repo"] * (not first.get("weights")), *["data_root"] * (dataset == "folder")]
    settings |= {("start", key): first.get(key) for key in start}
    row = method + (f" {100 * config['train_fraction']:g}%" if config.get("train_fraction", 1) != 1 else "")
    row += f" {config['uniformity']}" if method == "grpo_rm" and config.get("uniformity", "eq4") != "eq4" else ""
    numbers |= {"score": value for column, value in numbers.items() if column in ("SR", "linear pixel-acc")}  # noqa: B035
    for column, key in COSTS.items():
        if values := [event[key] for event in epochs[1:] if event.get(key) is not None]:
            numbers[column] = statistics.median(values) * (config.get("world_size", 1) if column == "GB" else 1)
    hardware = f"{config.get('world_size', '?')} x {config.get('device_name', '?')}"
    hardware += f", --grad-accum {config['grad_accum']}" if config.get("grad_accum", 1) > 1 else ""
    hardware += ", --compile" if config.get("compile") else ""
    return SimpleNamespace(
        path=directory,
        home=directory.parent if directory.name.startswith("seed") else directory,
        kind=(dataset, task, row),
        seed=seed,
        config=config,
        settings=settings,
        numbers=numbers,
        epochs=epochs,
        hardware=hardware,
        missing=sorted(set(RESULTS[task]) - files.keys()),
    )


def agree(one, other):
    """Whether no setting that both runs have differs."""
    return all(other.settings.get(key, value) == value for key, value in one.settings.items())


class Group:
    """Runs that differ in nothing but the seed; label: their directory, where it is needed to tell groups apart."""

    def __init__(self, runs, label=""):
        self.runs, self.label = runs, label
        self.dataset, self.task, self.row = self.kind = runs[0].kind
        self.title, self.name = DATASETS.get(self.dataset, self.dataset), ROWS.get(self.row, self.row) + label
        self.hardware = "; ".join(sorted({run.hardware for run in runs}))

    def numbers(self, column):
        """{seed: score or cost} of the runs that have it; {} for costs on several kinds of hardware."""
        comparable = column not in COSTS or ";" not in self.hardware
        return {run.seed: run.numbers[column] for run in self.runs if column in run.numbers and comparable}

    def curves(self, key):
        """{epoch, from 1: value} of each run that has logged some."""
        curves = ({e["epoch"] + 1: e[key] for e in run.epochs if e.get(key) is not None} for run in self.runs)
        return [curve for curve in curves if curve]


def load_groups(root):
    """The runs below `root` by what may be averaged, in the order of the paper's tables. Raises InputError."""
    names = ["log.jsonl", *itertools.chain(*RESULTS.values())]
    groups, directories = [], sorted({path.parent for name in names for path in root.rglob(name)})
    if not directories:
        raise InputError(f"{root}: no run there (log.jsonl, eval_linear.json, eval_knn.json); run_all.sh makes some")
    for run in map(load_run, directories):
        for group in groups:
            if all(run.kind == other.kind and run.seed != other.seed and agree(run, other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    found = []
    for group in groups:
        others = [run for other in groups if other is not group and other[0].kind == group[0].kind for run in other]
        shared = {run.home for run in others} & {run.home for run in group}  # then the seeds' own directories tell
        places = (str((run.path if shared else run.home).relative_to(root)) for run in group)
        found.append(Group(group, f", in {', '.join(dict.fromkeys(places))}" if others else ""))
    return sorted(found, key=lambda g: (ORDER.get(g.dataset, 99), g.dataset, ORDER.get(g.row, 99), g.row, g.label))


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def with_deviation(values):
    """ "mean ± sample standard deviation", the mean alone for one value, a dash for none."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{round(statistics.mean(values), 2) + 0.0:.2f}{deviation}" if values else "-"  # + 0.0: no -0.00


def difference(ours, theirs):
    """Of the means of two lists, with its sign; a dash where one is empty."""
    return f"{round(statistics.mean(ours) - statistics.mean(theirs), 2) + 0.0:+.2f}" if ours and theirs else "-"


def comparison(title, groups, columns, kinds=("",), rows=PLAIN, note="", hardware=False):
    """A table of our numbers beside the paper's: title, header, rows, and notes below it. columns: of Group.numbers,
    behind each of `kinds`; rows: the paper's. The paper's columns are left out where it has none of the datasets."""
    lines, notes, in_paper = [], [], any(key.split()[0] in {group.dataset for group in groups} for key in PAPER)
    for dataset, mine in itertools.groupby(groups, key=lambda group: group.dataset):
        mine = list(mine)
        for kind in kinds:
            papers = [PAPER.get(f"{dataset} {kind}{column}", {}) for column in columns]
            shown = {row for paper in papers for row in paper if row in rows} | {group.row for group in mine}
            for row in sorted(shown, key=lambda row: (ORDER.get(row, 99), row)):
                for group in [group for group in mine if group.row == row] or [None]:
                    numbers = [group.numbers(kind + column) if group else {} for column in columns]
                    seeds = sorted(set().union(*numbers))
                    cells = [mine[0].title, kind.strip(), group.name if group else ROWS[row]]
                    cells += [(group.hardware if group else "-") * hardware, ", ".join(map(str, seeds)) or "-"]
                    for found, paper in zip(numbers, papers, strict=True):
                        ours, paper = list(found.values()), paper.get(row, ())
                        cells.append(with_deviation(ours) + f" (n = {len(ours)})" * (0 < len(ours) < len(seeds)))
                        cells += [" ± ".join(f"{x:.2f}" for x in paper) or "-", difference(ours, paper[:1])] * in_paper
                    lines.append(cells)
        settings, shared = [run.settings for group in mine for run in group.runs], []
        for key in "backbone image_size epochs batch_size lr warmup_epochs ratio_floor limit_train".split():
            values = {values["config.json", key] for values in settings if ("config.json", key) in values}
            shared += [f"{key} {value}" for value in values if len(values) == 1 and value is not None]
        notes += [f"{mine[0].title}: {', '.join(shared)}."] if shared else []
    header = ["dataset", "features", "method", "hardware", "seeds"]
    header += [column + part for column in columns for part in ("", *(" paper", " diff") * in_paper)]
    kept = [i for i in range(len(header)) if any(line[i] for line in lines)]
    header, *lines = [[cells[i] for i in kept] for cells in (header, *lines)]
    return SimpleNamespace(title=title, header=header, rows=lines, notes=[*notes, note] if note else notes)


def paired_tests(title, groups):
    """GRPO-RM - fine-tuning over the seeds that both have, where all other settings are equal: mean and deviation, and
    the two-sided paired t-test."""
    lines = []
    for group in (group for group in groups if group.row.startswith("grpo_rm")):
        kind = (group.dataset, group.task, group.row.replace("grpo_rm", "finetune"))
        rivals = [g for g in groups if g.kind == kind and all(agree(a, b) for a in g.runs for b in group.runs)]
        for column in SCORES[group.task]:
            ours = group.numbers(column)
            pairs = [[(ours[seed], x) for seed, x in rival.numbers(column).items() if seed in ours] for rival in rivals]
            pairs, t, p = max(pairs, key=len, default=[]), "-", "-"  # those of the rival with most common seeds
            gains = [round(a - b, 4) for a, b in pairs]
            if len(set(gains)) > 1:  # there is no test of differences that do not vary
                test = stats.ttest_rel(*zip(*pairs, strict=True))
                t, p = f"{test.statistic:.2f}", f"{test.pvalue:.4f}" if test.pvalue >= 1e-4 else "< 0.0001"
            paper = PAPER.get(f"{group.dataset} {column}", {})
            printed = difference(*(paper.get(row, ())[:1] for row in (group.row, kind[2])))
            cells = [group.title, group.name, column, str(len(gains)), with_deviation(gains), printed, t, p]
            lines += [cells] if gains else []
    header = ["dataset", "method", "score", "seeds", "GRPO-RM - fine-tuning", "paper", "t", "p"]
    title = f"{title} tests: GRPO-RM - fine-tuning, paired over seeds"
    return SimpleNamespace(title=title, header=header, rows=lines, notes=[])


def make_tables(groups):
    """The paper's tables for which there are runs, each of scores followed by its paired tests."""
    plain, tables = [group for group in groups if group.row not in ABLATION[1:]], []
    masks = ["pixel-acc", "IoU", "mIoU"], ["linear ", "multiscale "]
    for title, task, coco, columns in (
        ("Table 2: semantic segmentation (%)", "segmentation", False, masks),
        ("Table 3: image classification (%)", "classification", False, [["SR", "k-NN"]]),
        ("Table 4: semantic segmentation, COCO-stuff (%)", "segmentation", True, masks),
    ):
        mine = [group for group in plain if (group.task, group.dataset == "coco_stuff") == (task, coco)]
        tables += [comparison(title, mine, *columns), paired_tests(title[:7], mine)]
    timed = [
        Group(runs, group.label)
        for group in plain
        for hardware in group.hardware.split("; ")
        if (runs := [run for run in group.runs if run.hardware == hardware and "seconds" in run.numbers])
    ]
    note = (
        "seconds: an epoch's training, median of all but the first; GB: the peak of process 0 times their number. "
        "Comparable on the same hardware only; the paper's is 4 A100 or 2 H200. bench.py counts the work (FLOPs)."
    )
    tables.append(comparison("Table 5: time of an epoch and peak memory", timed, list(COSTS), note=note, hardware=True))
    title = "Table 6: uniformity rewards; score: SR, or pixel accuracy of linear features (%)"
    tried = {(group.dataset, group.task) for group in groups if group.row in ABLATION[1:]}  # not Eq. (4) alone
    mine = [group for group in groups if group.row in ABLATION and (group.dataset, group.task) in tried]
    tables.append(comparison(title, mine, ["score", "seconds"], rows=ABLATION, hardware=True))
    return [table for table in tables if table.rows]


# ----------------------------------------------------------------------------------------------------------------------
# Figures

PANELS = {  # {figure: [(title, key of the epoch event, the method that has it or "" for all)]}
    "curves": [
        ("cross-entropy of fine-tuning", "loss", "finetune"),
        ("loss of GRPO-RM", "loss", "grpo_rm"),
        ("validation accuracy (%)", "val_accuracy", ""),
        ("validation pixel accuracy (%)", "val_pixel_acc", ""),
        ("validation mIoU (%)", "val_miou", ""),
    ],
    "policy": [
        ("clip fraction", "clip_fraction", "grpo_rm"),
        ("KL(q || p), nats", "kl", "grpo_rm"),
        ("largest ratio p/q in the epoch", "max_ratio", "grpo_rm"),
    ],
}


def save_figure(figure, title, path, handles):
    """Write the figure, below it a legend in as many columns as fit; the figure grows by its height."""
    letters = max(len(handle.get_label()) for handle in handles)
    columns = max(1, min(6, len(handles), int(figure.get_figwidth() / (0.7 + 0.085 * letters))))  # inches
    figure.set_figheight(figure.get_figheight() + 0.22 * -(-len(handles) // columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=3)
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    print(f"wrote {path}")


def draw_curves(groups, panels, path):
    """A panel for each quantity that was logged: thin lines of the seeds, a thick one of their mean."""
    panels = [(name, key, [g for g in groups if g.row.startswith(row) and g.curves(key)]) for name, key, row in panels]
    panels, handles = [panel for panel in panels if panel[2]], {}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(3.9 * len(panels), 3.4), layout="constrained", squeeze=False)
    last = max(event["epoch"] + 1 for group in groups for run in group.runs for event in run.epochs)
    for axis, (name, key, members) in zip(axes.flat, panels, strict=True):
        floor = any(run.config.get("ratio_floor") for group in members for run in group.runs)
        axis.set(title=name.replace("p/q", "p/(q + F/c)") if floor else name, xlabel="epoch", xlim=(0.5, last + 0.5))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
        sizes = sorted(abs(value) for group in members for curve in group.curves(key) for value in curve.values())
        if sizes[-1] > 100 * (typical := statistics.median(sizes)) > 0:  # one run that blew up would flatten the others
            axis.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(typical)), linscale=2)
        for group in members:
            curves, i = group.curves(key), groups.index(group)  # dashes and markers tell lines apart in grey, too
            style = {"color": f"C{i % 10}", "linestyle": "--" if group.row.startswith("finetune") else "-"}
            for curve in curves:
                axis.plot(curve.keys(), curve.values(), linewidth=0.7, alpha=0.4, color=style["color"])
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [statistics.mean(curve[epoch] for curve in curves) for epoch in epochs]
            style |= {"marker": "o^sDvx"[i % 6], "markersize": 5, "markevery": max(1, len(epochs) // 8)}
            handles[group] = axis.plot(epochs, means, label=group.name, linewidth=2, **style)[0]
    save_figure(figure, groups[0].title, path, list(handles.values()))


def draw_images(groups, path):
    """Figure 2: what eval_linear.py --save-images left for all groups of a dataset: in a row an image, the ground truth
    and the prediction of each group's first run that has some."""
    saved = {
        group.name: folder
        for group in groups
        for run in group.runs[::-1]
        if "score" in run.numbers and (folder := run.path / "eval_linear_images").is_dir()
    }
    truths = [{(file.name[:6], file.read_bytes()) for file in folder.glob("*_truth.png")} for folder in saved.values()]
    numbers = sorted(number for number, _ in set.intersection(*truths)) if truths else []  # of the same ground truth
    if not numbers:
        return
    first = next(iter(saved.values()))
    columns = {"image": (first, "image"), "ground truth": (first, "truth")}
    columns |= {name: (folder, "prediction") for name, folder in saved.items()}
    rows = [[Image.open(folder / f"{number}_{kind}.png") for folder, kind in columns.values()] for number in numbers]
    ratios, colours = [row[0].height / row[0].width for row in rows], {}
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(2.3 * len(columns), 0.9 + 2.3 * sum(ratios)),
        layout="constrained",
        squeeze=False,
        height_ratios=ratios,
    )
    for axis, image in zip(axes.flat, itertools.chain(*rows), strict=True):
        axis.imshow(image.convert("RGB"), interpolation="nearest")
        axis.axis("off")
        for _, i in image.getcolors() if image.mode == "P" else ():
            colours[i] = [x / 255 for x in image.getpalette()[3 * i : 3 * i + 3]]
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(textwrap.fill(name, 24), fontsize=10)
    classes = dict(enumerate(json.loads((first.parent / "eval_linear.json").read_text())["per_class_iou"]))
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=colours[i], edgecolor="black", label=classes.get(i, "void"))
        for i in sorted(colours)
    ]
    save_figure(figure, groups[0].title, path, handles)


def draw_figures(groups, directory):
    """Write <dataset>_curves.png, <dataset>_policy.png and <dataset>_scenes.png."""
    plt.switch_backend("Agg")
    plain = [group for group in groups if group.row not in ABLATION[1:]]
    for dataset, mine in itertools.groupby(plain, key=lambda group: group.dataset):
        mine = list(mine)
        for name, panels in PANELS.items():
            draw_curves([group for group in mine if group.row != "frozen"], panels, directory / f"{dataset}_{name}.png")
        masks = [group for group in mine if group.task == "segmentation" and "%" not in group.row]
        draw_images(masks, directory / f"{dataset}_scenes.png")


@stage
def main(argv=None):
    parser = ArgumentParser(__doc__)
    parser.usage = "%(prog)s RUNS_DIR [--csv DIR] [--figures DIR]"
    parser.add_argument("runs", metavar="RUNS_DIR", type=Path, help="directory that holds the runs, at any depth")
    parser.add_argument("--csv", metavar="DIR", type=Path, help="write the tables into this directory as CSV files")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="draw curves and images there")
    args = parser.parse_args(argv)
    groups = load_groups(args.runs)
    for table in (tables := make_tables(groups)):
        lines = [table.header, ["---"] * len(table.header), *table.rows]
        print(f"### {table.title}\n", *(f"| {' | '.join(cells)} |" for cells in lines), "", sep="\n")
        print("".join(f"{note}\n\n" for note in table.notes), end="")
    for run in (run for group in groups for run in group.runs if run.missing):
        where = "" if run.numbers.keys() - COSTS else f"epoch {len(run.epochs)} of {run.config.get('epochs')}, "
        print(f"- {run.path.relative_to(args.runs)} is not finished: {where}no {' and no '.join(run.missing)}")
    if args.csv:
        make_directory(args.csv, "--csv")
        for table in tables:  # "Table 2 tests: ..." is table2_tests.csv
            name = table.title.split(":")[0].lower().replace("table ", "table").replace(" ", "_")
            with open(args.csv / f"{name}.csv", "w", newline="") as file:
                csv.writer(file).writerows([table.header, *table.rows])
            print(f"wrote {file.name}")
    if args.figures:
        make_directory(args.figures, "--figures")
        draw_figures(groups, args.figures)


if __name__ == "__main__":
    main()
