"""Tables 2 to 6 of the paper from finished runs, ours beside the paper's, and its Figures 2 and 3.

    python report.py runs                                         prints Markdown
    python report.py runs --csv tables --figures figures          and writes the same tables as CSV, and pictures

Reads what the stages left in every directory below RUNS_DIR: config.json, log.jsonl and the eval_*.json. Scores are in
percent, mean ± sample standard deviation over seeds. Only runs whose settings are equal in all but the seed are averaged;
others have a row of their own that names the settings which differ. What has not been run is a dash.
"""

import csv
import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from scipy import stats

from checkpoint import neutral, read_log
from data import ArgumentParser, InputError, draw_panels, first_line, stage

# ------------------------------------------------------------------------------------------------------------------
# What the paper reports, as printed there


def paper_table(text: str) -> dict[str, dict[str, tuple[float, ...]]]:
    """The rows of `text`, by their leading words: {column: (mean, standard deviation where the paper has one)}."""
    header, *lines = text.strip().splitlines()
    columns, rows = header.split(), {}
    for line in lines:
        words = line.split()
        cells = zip(columns, words[-len(columns) :], strict=True)
        rows[" ".join(words[: -len(columns)])] = {c: tuple(map(float, cell.split("±"))) for c, cell in cells if cell != "-"}
    return rows


PAPER_SCORES = paper_table("""                  SR            k-NN
    cifar10        frozen         47.26         43.26
    cifar10        finetune       94.55±0.27    94.39±0.29
    cifar10        grpo_rm        95.78±0.26    95.81±0.30
    cifar100       frozen         20.68         25.92
    cifar100       finetune       68.87±2.70    71.32±1.85
    cifar100       grpo_rm        74.41±2.28    78.48±0.92
    stl10          frozen         15.71         37.57
    stl10          finetune       43.44±6.89    89.76±3.50
    stl10          grpo_rm        46.42±5.86    89.03±4.43
    tiny_imagenet  frozen         29.24         21.10
    tiny_imagenet  finetune       58.67±0.61    58.59±1.25
    tiny_imagenet  grpo_rm        65.96±0.40    66.36±0.32
    imagenet       frozen         74.34         72.61
    imagenet       finetune       74.48±0.85    71.33±0.45
    imagenet       grpo_rm        76.21±0.92    72.16±0.73
""") | paper_table("""                              pixel-acc    IoU          mIoU
    voc2012     linear      frozen         93.06        87.02        66.77
    voc2012     linear      finetune 10%   93.46±0.01   88.03±0.07   69.62±0.18
    voc2012     linear      finetune       93.66±0.04   88.24±0.02   69.78±0.11
    voc2012     linear      grpo_rm 10%    93.67±0.02   88.57±0.03   70.38±0.08
    voc2012     linear      grpo_rm        93.98±0.02   88.64±0.03   70.44±0.12
    voc2012     multiscale  frozen         94.04        88.75        70.20
    voc2012     multiscale  finetune 10%   94.33±0.01   89.06±0.05   70.98±0.04
    voc2012     multiscale  finetune       94.34±0.02   89.19±0.04   71.45±0.05
    voc2012     multiscale  grpo_rm 10%    94.38±0.01   89.35±0.01   71.66±0.06
    voc2012     multiscale  grpo_rm        94.38±0.01   89.38±0.01   71.71±0.06
    ade20k      linear      frozen         70.19        54.07        31.52
    ade20k      linear      finetune 10%   69.72±0.02   54.02±0.01   32.03±0.04
    ade20k      linear      finetune       69.74±0.02   54.44±0.02   32.23±0.03
    ade20k      linear      grpo_rm 10%    69.74±0.01   54.55±0.01   32.19±0.05
    ade20k      linear      grpo_rm        69.76±0.01   55.34±0.02   32.62±0.01
    ade20k      multiscale  frozen         71.02        55.07        32.26
    ade20k      multiscale  finetune 10%   71.18±0.02   55.32±0.01   32.19±0.05
    ade20k      multiscale  finetune       71.29±0.02   55.80±0.02   33.19±0.03
    ade20k      multiscale  grpo_rm 10%    71.26±0.01   55.35±0.01   33.12±0.02
    ade20k      multiscale  grpo_rm        71.52±0.01   56.01±0.03   33.58±0.02
    coco_stuff  linear      frozen         63.43        46.45        30.79
    coco_stuff  linear      finetune 10%   63.71        46.67        30.94
    coco_stuff  linear      finetune       64.08        47.72        31.67
    coco_stuff  linear      grpo_rm 10%    63.72        47.51        31.07
    coco_stuff  linear      grpo_rm        64.10        48.01        32.25
    coco_stuff  multiscale  frozen         64.57        47.68        31.75
    coco_stuff  multiscale  finetune 10%   64.87        47.98        32.77
    coco_stuff  multiscale  finetune       64.99        48.26        32.88
    coco_stuff  multiscale  grpo_rm 10%    64.94        48.08        32.22
    coco_stuff  multiscale  grpo_rm        65.02        48.53        33.06
""")
PAPER_COSTS = paper_table("""               time      FLOPs     memory
    tiny_imagenet  finetune     9.30   5.72e11      13.26
    tiny_imagenet  grpo_rm     10.37   7.15e11      15.12
    imagenet       finetune   175.95   5.66e12      95.40
    imagenet       grpo_rm    238.20   7.07e12     107.00
    voc2012        finetune   151.39   2.90e12     217.72
    voc2012        grpo_rm    174.29   5.80e12     220.66
    coco_stuff     finetune  1549.80   3.39e12     223.46
    coco_stuff     grpo_rm   1669.80   6.78e12     232.04
""")
PAPER_ABLATION = paper_table("""            score      time
    stl10          grpo_rm none  34.90      1.11
    stl10          grpo_rm eq5   36.27      3.56
    stl10          grpo_rm       46.42      0.95
    tiny_imagenet  grpo_rm none  62.16      9.40
    tiny_imagenet  grpo_rm eq5   60.32     18.57
    tiny_imagenet  grpo_rm       65.96     10.37
    imagenet       grpo_rm none  77.04    232.00
    imagenet       grpo_rm eq5   74.70    251.30
    imagenet       grpo_rm       76.21    238.20
    voc2012        grpo_rm none  93.61    138.27
    voc2012        grpo_rm eq5       -   9420.00
    voc2012        grpo_rm       94.67    174.29
""")
DATASETS = {  # in the paper's order
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "stl10": "STL-10",
    "tiny_imagenet": "Tiny-ImageNet",
    "imagenet": "ImageNet",
    "voc2012": "Pascal VOC 2012",
    "ade20k": "ADE20k",
    "coco_stuff": "COCO-stuff",
}
METHODS = {"frozen": "frozen", "finetune": "Fine-tuning", "grpo_rm": "GRPO-RM"}  # the paper calls the first DINOv2
REWARDS = {"grpo_rm none": "set to 0", "grpo_rm eq5": "Eq. (5)", "grpo_rm": "Eq. (4) (GRPO-RM)"}  # rows of Table 6

# ------------------------------------------------------------------------------------------------------------------
# Runs, and which of them may be averaged

SCORES = {  # {task: {result file: {column: its key there}}}
    "classification": {"eval_linear": {"SR": "top1"}, "eval_knn": {"k-NN": "top1"}},
    "segmentation": {name: {"pixel-acc": "pixel_acc", "IoU": "iou", "mIoU": "miou"} for name in ("eval_linear", "eval_linear_multiscale")},
}
FEATURES = {"eval_linear": "linear", "eval_linear_multiscale": "multiscale"}
FILES = ("config", "eval_linear", "eval_knn", "eval_linear_multiscale")
MEASURED = {"top1", "pixel_acc", "iou", "miou", "per_class_iou"}
# What a row's name tells, what is different in each seed, and what does not touch the scores.
NAMED = {"dataset", "method", "seed", "fit_seed", "frozen", "features", "save_images", "train_fraction", "uniformity"}
# Settings of GRPO-RM's objective, which fine-tuning does not have: its runs are compared whatever these are.
OBJECTIVE = set(
    "clip_eps uniformity accuracy_weight uniformity_weight group_weighting group_size ratio_floor old_policy_every old_policy_dtype background_penalty".split()
)


@dataclass(frozen=True, eq=False)
class Run:
    """One run's directory. row: its method and variant, such as "grpo_rm 10%"; settings: {(file, key): value} of all that
    changes the mathematics; scores: {file: {column: percent}}; epochs: the epoch events of its log, which may be cut_off."""

    path: Path
    dataset: str
    task: str
    row: str
    seed: int
    config: dict
    settings: dict
    scores: dict
    epochs: list[dict]
    cut_off: bool

    @property
    def hardware(self) -> str:
        accumulation = f", --grad-accum {self.config['grad_accum']}" if self.config.get("grad_accum", 1) != 1 else ""
        return f"{self.config.get('world_size', '?')} x {self.config.get('device_name', '?')}{accumulation}"

    @property
    def missing(self) -> list[str]:
        """The result files that are not there yet."""
        return [f"{name}.json" for name in SCORES[self.task] if name not in self.scores]

    def cost(self, key: str) -> float | None:
        """The median over epochs, but for the first, of what the log says of "seconds" or "peak_memory_gb"."""
        values = [event[key] for event in self.epochs[1:] if event.get(key) is not None]
        return statistics.median(values) if values else None


@dataclass(eq=False)
class Group:
    """Runs that differ in nothing but the seed, and a label of the settings that set them apart from other groups."""

    runs: list[Run]
    label: str = ""
    settings: dict = field(init=False)

    def __post_init__(self):
        self.settings = {key: value for run in self.runs for key, value in run.settings.items()}

    dataset = property(lambda self: self.runs[0].dataset)
    task = property(lambda self: self.runs[0].task)
    row = property(lambda self: self.runs[0].row)

    @property
    def name(self) -> str:
        """As it stands in the tables, such as "GRPO-RM (10%), lr 0.004"."""
        return row_name(self.row) + (f", {self.label}" if self.label else "")

    def scores(self, file: str, column: str) -> dict[int, float]:
        """{seed: percent} of the runs that have been judged."""
        return {run.seed: run.scores[file][column] for run in self.runs if file in run.scores}

    def median_cost(self, key: str) -> float | None:
        """The median over seeds of Run.cost."""
        values = [run.cost(key) for run in self.runs if run.cost(key) is not None]
        return statistics.median(values) if values else None


def row_name(row: str) -> str:
    """ "grpo_rm 10%" -> "GRPO-RM (10%)"."""
    method, *variants = row.split()
    return METHODS.get(method, method) + "".join(f" ({variant})" for variant in variants)


def read_json(path: Path) -> dict:
    """The object stored in `path`. Raises InputError when it is damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); remove it and run its stage again") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no JSON object; remove it and run its stage again")
    return values


def read_epochs(path: Path) -> tuple[list[dict], bool]:
    """The epoch events of a log.jsonl, [] where there is none, and whether its last line is half-written. Raises InputError."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        events = read_log(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); restore it or remove the run") from error
    if len(events) < len(lines) - 1 or not all(isinstance(event, dict) for event in events):
        raise InputError(f"{path}: line {len(events) + 1} is damaged; restore it or remove the run")
    return [event for event in events if event.get("event") == "epoch"], len(events) < len(lines)


def read_scores(path: Path, result: dict, columns: dict[str, str]) -> dict[str, float]:
    """The scores that the result file `path` holds, by column. Raises InputError where one is missing."""
    for key in columns.values():
        if not isinstance(result.get(key), (int, float)):
            raise InputError(f'{path} holds no number "{key}"; remove it and run its stage again')
    return {column: result[key] for column, key in columns.items()}


def origin_of(values: dict) -> set[str]:
    """The settings that say which weights a run starts from: without a file of weights they come with the hub's code."""
    return {"weights"} if values.get("weights") else {"weights", "hub_repo"}


def settings_of(files: dict[str, dict], method: str) -> dict[tuple[str, str], object]:
    """All that config.json and the result files say and that changes the mathematics, by file and key."""
    settings = {}
    for file, values in files.items():
        # Where a run started from and where it was stopped matter here, though not to a run that is resumed.
        kept = {"max_steps", *origin_of(values)} if file == "config" else set()
        ignored = (neutral(values) - kept) | NAMED | MEASURED
        settings |= {(file, key): value for key, value in values.items() if key not in ignored}
    if method == "frozen":  # judged as it was, where a run would start from
        values = next(iter(files.values()))
        settings |= {("config", key): values.get(key) for key in origin_of(values)}
    elif "config" not in files:
        settings["config", "config.json"] = "missing"
    return settings


def load_run(directory: Path) -> Run:
    """Read a run's directory. Raises InputError where a file is damaged or belongs to another run."""
    files = {name: read_json(directory / f"{name}.json") for name in FILES if (directory / f"{name}.json").exists()}
    if not files:
        raise InputError(f"{directory / 'log.jsonl'} has no config.json beside it; restore that or remove the log")
    for key in ("dataset", "method", "seed"):
        for name, values in files.items():
            if key not in values:
                raise InputError(f'{directory / name}.json says no "{key}"; remove it and run its stage again')
        told = {name: values[key] for name, values in files.items()}
        if len({str(value) for value in told.values()}) > 1:
            raise InputError(f"{directory} mixes runs: {key} is {' and '.join(f'{v} in {k}.json' for k, v in told.items())}; separate them")
    first, config = next(iter(files.values())), files.get("config", {})
    segmentation = "map_size" in config or any("miou" in values for values in files.values())
    task = "segmentation" if segmentation else "classification"
    row, fraction, uniformity = first["method"], config.get("train_fraction", 1), config.get("uniformity", "eq4")
    row += f" {100 * fraction:g}%" if fraction != 1 else ""
    row += f" {uniformity}" if first["method"] == "grpo_rm" and uniformity != "eq4" else ""
    scores = {name: read_scores(directory / f"{name}.json", files[name], columns) for name, columns in SCORES[task].items() if name in files}
    settings, (epochs, cut_off) = settings_of(files, first["method"]), read_epochs(directory / "log.jsonl")
    return Run(directory, first["dataset"], task, row, first["seed"], config, settings, scores, epochs, cut_off)


def find_runs(root: Path) -> list[Run]:
    """Every directory below `root` that holds a result or a log. Raises InputError, also when there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such directory; name the one that holds the runs")
    names = ["log.jsonl", *(f"{name}.json" for name in FILES if name != "config")]
    directories = sorted({path.parent for name in names for path in root.rglob(name)})
    if not directories:
        raise InputError(f"{root} holds no run (log.jsonl, eval_linear.json, eval_knn.json); start some with run_all.sh")
    return [load_run(directory) for directory in directories]


def equal_settings(one: dict, other: dict, but: Iterable[str] = ()) -> bool:
    """Whether no setting that both have differs; `but` are keys that may."""
    return all(other.get(key, value) == value for key, value in one.items() if key[1] not in but)


def group_runs(runs: list[Run], root: Path) -> list[Group]:
    """The runs by what may be averaged, in the order of the paper's tables."""
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            same_row = (run.dataset, run.task, run.row) == (group[0].dataset, group[0].task, group[0].row)
            if same_row and all(run.seed != other.seed and equal_settings(run.settings, other.settings) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    found = [Group(group) for group in groups]
    for group in found:
        group.label = label(group, [other for other in found if (other.dataset, other.task) == (group.dataset, group.task)], root)
    return sorted(found, key=lambda group: (place(DATASETS, group.dataset), row_place(group.row), group.label))


def place(order: Iterable[str], name: str) -> tuple[int, str]:
    """A key to sort by: the place in `order`, and behind all of it by name."""
    order = list(order)
    return (order.index(name) if name in order else len(order), name)


def row_place(row: str) -> tuple:
    """A key to sort rows by as the paper does: "grpo_rm 10%" right before "grpo_rm"."""
    method, *variants = row.split()
    return place(METHODS, method), not variants, variants


def label(group: Group, others: list[Group], root: Path) -> str:
    """What sets `group` apart from `others`, all of one dataset: the settings that differ, else the directory."""

    def matters(key: str, member: Group) -> bool:
        return not (key in OBJECTIVE and member.row.startswith("finetune"))

    parts: dict[str, str] = {}
    for (file, key), value in group.settings.items():
        rivals = [other for other in others if matters(key, other)]
        if matters(key, group) and any(other.settings.get((file, key), value) != value for other in rivals):
            value = Path(value).name if key == "data_root" else value
            parts.setdefault(f"{key} {value}", "" if file == "config" else f" in {file}")  # an evaluation repeats much of config.json
    twins = [other for other in others if other is not group and other.row == group.row and equal_settings(group.settings, other.settings)]
    if twins:
        parts[f"in {group.runs[0].path.relative_to(root).parent}"] = ""
    return ", ".join(setting + file for setting, file in parts.items())


# ------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Table:
    """name: of its CSV file; notes: lines of Markdown below it. Where the paper has nothing in any row, its columns
    and those of the difference are left out."""

    name: str
    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        unknown = {name for i, name in enumerate(self.header) if name.endswith("paper") and all(row[i] == "-" for row in self.rows)}
        empty = {i for i, name in enumerate(self.header) if name.replace(" diff", " paper") in unknown}
        self.header, *self.rows = [[cell for i, cell in enumerate(line) if i not in empty] for line in (self.header, *self.rows)]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        return "\n\n".join([f"### {self.title}", table, *self.notes])


def with_deviation(values: Iterable[float]) -> str:
    """ "mean ± sample standard deviation", the mean alone for one value, a dash for none."""
    values = list(values)
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def difference(ours: float | None, theirs: float | None) -> str:
    """Ours - the paper's, with its sign; a dash where one is missing."""
    return "-" if ours is None or theirs is None else f"{round(ours - theirs, 2) + 0.0:+.2f}"  # + 0.0: no -0.00


def compare(ours: float | None, text: str, paper: tuple[float, ...]) -> list[str]:
    """Three cells: ours as `text`, the paper's, the difference."""
    return [text, " ± ".join(f"{x:.2f}" for x in paper) or "-", difference(ours, paper[0] if paper else None)]


def compared(column: str) -> list[str]:
    """The header above the cells of `compare`."""
    return [column, f"{column} paper", f"{column} diff"]


def seeds_of(group: Group | None, files: Iterable[str]) -> str:
    """The seeds of the runs that have a result in one of `files`."""
    seeds = sorted(run.seed for run in group.runs if any(file in run.scores for file in files)) if group else []
    return ", ".join(map(str, seeds)) or "-"


def rows_of(groups: list[Group], paper: Iterable[str]) -> list[tuple[str, str, Group | None]]:
    """(dataset, row, group or None where nothing was run): the rows of a table that has the datasets of `groups`; `paper`
    are the "dataset row" that it has in the paper."""
    rows = []
    for dataset in dict.fromkeys(group.dataset for group in groups):
        mine = [group for group in groups if group.dataset == dataset]
        names = {group.row for group in mine} | {key.split(maxsplit=1)[1] for key in paper if key.split()[0] == dataset}
        for row in sorted(names, key=row_place):
            rows += [(dataset, row, group) for group in mine if group.row == row] or [(dataset, row, None)]
    return rows


def score_cells(group: Group | None, file: str, column: str, paper: dict, seeds: str) -> list[str]:
    """`compare` of one score; how many seeds it has where that is not all of `seeds`."""
    values = group.scores(file, column).values() if group else []
    fewer = f" (n = {len(values)})" if values and len(values) < len(seeds.split(",")) else ""
    return compare(statistics.mean(values) if values else None, with_deviation(values) + fewer, paper.get(column, ()))


def classification_table(groups: list[Group]) -> Table:
    """Table 3."""
    files = SCORES["classification"]
    rows = []
    for dataset, row, group in rows_of(groups, PAPER_SCORES):
        paper, seeds = PAPER_SCORES.get(f"{dataset} {row}", {}), seeds_of(group, files)
        cells = [DATASETS.get(dataset, dataset), group.name if group else row_name(row), seeds]
        for file, columns in files.items():
            for column in columns:
                cells += score_cells(group, file, column, paper, seeds)
        rows.append(cells)
    header = ["dataset", "method", "seeds", *compared("SR"), *compared("k-NN")]
    return Table("table3", "Table 3: accuracy on image classification (%)", header, rows, settings_notes(groups))


def segmentation_table(groups: list[Group], name: str, title: str) -> Table:
    """Tables 2 and 4."""
    rows = []
    columns = ["pixel-acc", "IoU", "mIoU"]
    for dataset in dict.fromkeys(group.dataset for group in groups):
        for file, features in FEATURES.items():
            paper = {key.replace(f"{features} ", ""): value for key, value in PAPER_SCORES.items() if f" {features} " in key}
            for _, row, group in rows_of([group for group in groups if group.dataset == dataset], paper):
                seeds = seeds_of(group, [file])
                cells = [DATASETS.get(dataset, dataset), features, group.name if group else row_name(row), seeds]
                for column in columns:
                    cells += score_cells(group, file, column, paper.get(f"{dataset} {row}", {}), seeds)
                rows.append(cells)
    header = ["dataset", "features", "method", "seeds", *(cell for column in columns for cell in compared(column))]
    return Table(name, f"{title} (%)", header, rows, settings_notes(groups))


def settings_notes(groups: list[Group]) -> list[str]:
    """A line for each dataset with the settings that all its runs share and that a reader needs to judge its rows."""
    notes = []
    for dataset in dict.fromkeys(group.dataset for group in groups):
        parts = []
        for key in ("backbone", "image_size", "epochs", "batch_size", "lr", "ratio_floor", "limit_train"):
            values = {str(group.settings.get(("config", key))) for group in groups if group.dataset == dataset and group.row != "frozen"}
            if len(values) == 1 and values != {"None"}:
                parts.append(f"{key} {values.pop()}")
        judged = [group.settings for group in groups if group.dataset == dataset and group.task == "segmentation"]
        resolutions = {settings[key] for settings in judged for key in settings if key[1] == "resolution"}
        counted = {"native": "scored at the resolution of the ground truth", "map": "scored on the reduced map"}
        parts += [counted[resolution] for resolution in sorted(resolutions) if resolution in counted]
        notes += [f"{DATASETS.get(dataset, dataset)}: {', '.join(parts)}."] if parts else []
    return notes


def paired_tests(groups: list[Group], name: str, title: str) -> Table | None:
    """GRPO-RM - fine-tuning over the seeds that both have, where all other settings are equal: mean and deviation of the
    difference, and the two-sided paired t-test. None where there is nothing to compare."""
    rows = []
    for group in groups:
        method, *fraction = group.row.split()
        baselines = [other for other in groups if other.dataset == group.dataset and other.row == " ".join(["finetune", *fraction])]
        baselines = [other for other in baselines if equal_settings(group.settings, other.settings, but=OBJECTIVE)]
        if method != "grpo_rm" or not baselines:
            continue
        baseline = max(baselines, key=lambda other: len({run.seed for run in other.runs} & {run.seed for run in group.runs}))
        for file, columns in SCORES[group.task].items():
            features = f"{FEATURES[file]} " if group.task == "segmentation" else ""
            for column in columns:
                ours, theirs = group.scores(file, column), baseline.scores(file, column)
                seeds = sorted(ours.keys() & theirs.keys())
                if not seeds:
                    continue
                gains = [ours[seed] - theirs[seed] for seed in seeds]
                t = p = "-"
                if len(seeds) > 1 and max(gains) - min(gains) > 1e-9:  # there is no test of differences that do not vary
                    test = stats.ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
                    t, p = f"{test.statistic:.2f}", f"{test.pvalue:.4f}" if test.pvalue >= 1e-4 else "< 0.0001"
                printed = [PAPER_SCORES.get(f"{group.dataset} {features}{row}", {}).get(column, [None])[0] for row in (group.row, baseline.row)]
                cells = [DATASETS.get(group.dataset, group.dataset), group.name, features + column, str(len(seeds))]
                rows.append([*cells, with_deviation(gains), difference(*printed), t, p])
    header = ["dataset", "method", "score", "seeds", "GRPO-RM - fine-tuning", "paper", "t", "p"]
    return Table(name, f"{title}: GRPO-RM - fine-tuning, paired over seeds", header, rows) if rows else None


def by_hardware(group: Group) -> list[Group]:
    """The group's runs that have timed epochs, apart for each hardware: times are comparable on the same only."""
    timed = [run for run in group.runs if run.cost("seconds") is not None]
    return [Group([run for run in timed if run.hardware == name], group.label) for name in sorted({run.hardware for run in timed})]


def macs(config: dict) -> float | None:
    """Multiply-accumulates of a step's forward passes, as its config.json tells; None where it does not."""
    passes = 2 if config.get("method") == "grpo_rm" else 1  # the old policy's
    return config["forward_macs"] * config["batch_size"] * passes if {"forward_macs", "batch_size"} <= config.keys() else None


def compare_macs(ours: float | None, paper: float | None) -> list[str]:
    """As `compare`, of large numbers: 5.72e11, as the paper prints them."""
    cells = ["-" if number is None else f"{number:.2e}" for number in (ours, paper)]
    cells.append("-" if ours is None or paper is None else f"{ours - paper:+.2e}")
    return [cell.replace("e+", "e") for cell in cells]


def cost_cells(group: Group | None, paper: dict) -> tuple[list[str], list[str]]:
    """`compare` of the seconds of an epoch and of the GB at its peak, over all processes."""
    seconds = memory = None
    if group:
        seconds, memory = group.median_cost("seconds"), group.median_cost("peak_memory_gb")
        memory = memory and memory * group.runs[0].config.get("world_size", 1)
    texts = ("-" if value is None else f"{value:.2f}" for value in (seconds, memory))
    return compare(seconds, next(texts), paper.get("time", ())), compare(memory, next(texts), paper.get("memory", ()))


def cost_table(groups: list[Group]) -> Table | None:
    """Table 5; None where no run has timed an epoch."""
    timed = [part for group in groups for part in by_hardware(group)]
    rows = []
    for dataset, row, group in rows_of(timed, PAPER_COSTS):
        paper = PAPER_COSTS.get(f"{dataset} {row}", {})
        time, memory = cost_cells(group, paper)
        flops = compare_macs(macs(group.runs[0].config if group else {}), *paper.get("FLOPs", [None]))
        hardware = group.runs[0].hardware if group else "-"
        seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in group.runs)) if group else "-"
        rows.append([DATASETS.get(dataset, dataset), group.name if group else row_name(row), hardware, seeds, *time, *flops, *memory])
    header = ["dataset", "method", "hardware", "seeds", *compared("time (s)"), *compared("FLOPs"), *compared("memory (GB)")]
    notes = [
        "Time of an epoch's training, without validation: median over the epochs but for the first, then over seeds. Memory: the peak of "
        "the first process times their number, as the paper's sums over GPUs. Times are comparable on the same hardware only; the "
        "paper's is 4 A100 or 2 H200. FLOPs: multiply-accumulates of a step's forward passes of a batch, GRPO-RM's two and fine-tuning's "
        "one; the paper's leave attention out, and count the old policy's pass as a quarter for classification."
    ]
    return Table("table5", "Table 5: time of an epoch and peak memory", header, rows, notes) if rows else None


def ablations(groups: list[Group]) -> list[Group]:
    """The groups of Table 6: of every dataset that has a run with another uniformity reward than Eq. (4)."""
    groups = [group for group in groups if group.row in REWARDS]
    datasets = {(group.dataset, group.task) for group in groups if group.row != "grpo_rm"}
    return [group for group in groups if (group.dataset, group.task) in datasets]


def ablation_score(task: str) -> str:
    """The score of Table 6, from eval_linear.json."""
    return "SR" if task == "classification" else "pixel-acc"


def ablation_table(groups: list[Group]) -> Table | None:
    """Table 6; None where no other uniformity reward was tried."""
    groups = ablations(groups)
    rows = []
    for dataset, row, group in sorted(rows_of(groups, PAPER_ABLATION), key=lambda r: (place(DATASETS, r[0]), list(REWARDS).index(r[1]))):
        paper, seeds = PAPER_ABLATION.get(f"{dataset} {row}", {}), seeds_of(group, ["eval_linear"])
        column = ablation_score(next(other.task for other in groups if other.dataset == dataset))
        score = score_cells(group, "eval_linear", column, {column: paper.get("score", ())}, seeds)
        machines = by_hardware(group) if group else []
        time, _ = cost_cells(machines[0] if len(machines) == 1 else None, paper)  # times of several machines are not averaged
        hardware = "; ".join(part.runs[0].hardware for part in machines) or "-"
        name = REWARDS[row] + (f", {group.label}" if group and group.label else "")
        rows.append([DATASETS.get(dataset, dataset), name, seeds, column, *score, hardware, *time])
    header = ["dataset", "uniformity reward", "seeds", "score", *compared("SR or pixel-acc"), "hardware", *compared("time (s)")]
    notes = ["SR, or for segmentation pixel accuracy of linear features (%); time as in Table 5."]
    return Table("table6", "Table 6: uniformity rewards", header, rows, notes) if rows else None


def make_tables(groups: list[Group]) -> list[Table]:
    """The paper's tables for which there are runs, each of scores followed by its paired tests."""
    plain = [group for group in groups if group.row not in REWARDS or group.row == "grpo_rm"]
    classification = [group for group in plain if group.task == "classification"]
    segmentation = [group for group in plain if group.task == "segmentation"]
    coco = [group for group in segmentation if group.dataset == "coco_stuff"]
    others = [group for group in segmentation if group.dataset != "coco_stuff"]
    tables: list[Table | None] = []
    if others:
        tables += [segmentation_table(others, "table2", "Table 2: semantic segmentation"), paired_tests(others, "table2_tests", "Table 2")]
    if classification:
        tables += [classification_table(classification), paired_tests(classification, "table3_tests", "Table 3")]
    if coco:
        tables += [segmentation_table(coco, "table4", "Table 4: semantic segmentation, COCO-stuff"), paired_tests(coco, "table4_tests", "Table 4")]
    tables += [cost_table(plain), ablation_table(groups)]
    return [table for table in tables if table]


def remarks(runs: list[Run], root: Path) -> list[str]:
    """A line for every run that lacks a result or the end of its log, and one where the runs come from several sources."""
    lines = []
    for key in ("git_commit", "torch_version"):
        values = {str(run.config[key]) for run in runs if run.config.get(key)}
        if len(values) > 1:
            lines.append(f"- the runs differ in {key}: {', '.join(sorted(values))}")
    for run in runs:
        if run.missing:
            where = f"epoch {len(run.epochs)} of {run.config.get('epochs', '?')}, " if not run.scores else ""
            lines.append(f"- {run.path.relative_to(root)} is not finished: {where}no {' and no '.join(run.missing)}")
        if run.cut_off:
            lines.append(f"- {run.path.relative_to(root) / 'log.jsonl'} ends in half a line, which is left out")
    return lines


def write_csv(tables: list[Table], directory: Path) -> list[Path]:
    """The cells of each table as directory/<name>.csv. Raises InputError where they cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for table in tables:
            with open(directory / f"{table.name}.csv", "w", newline="") as file:
                csv.writer(file).writerows([table.header, *table.rows])
    except OSError as error:
        raise InputError(f"--csv {directory} cannot be written ({first_line(error)}); choose another directory") from error
    return [directory / f"{table.name}.csv" for table in tables]


# ------------------------------------------------------------------------------------------------------------------
# Figures

CURVES = {  # {title: (key of the epoch event, the method that has it or "" for all, scale)}; the losses are different quantities
    "cross-entropy of fine-tuning": ("loss", "finetune", "linear"),
    "loss of GRPO-RM": ("loss", "grpo_rm", "linear"),
    "validation accuracy (%)": ("val_accuracy", "", "linear"),
    "validation pixel accuracy (%)": ("val_pixel_acc", "", "linear"),
    "validation mIoU (%)": ("val_miou", "", "linear"),
}
POLICY = {
    "clip fraction": ("clip_fraction", "grpo_rm", "linear"),
    "KL(old policy || policy), nats": ("kl", "grpo_rm", "linear"),
    "largest ratio p/q in the epoch": ("max_ratio", "grpo_rm", "log"),
}
# A method has a dash pattern, its variants a shade and a marker each, so that lines can be told apart in grey too.
DASHES = {"finetune": "--", "grpo_rm": "-"}
SHADES = {"finetune": ["#d98200", "#f2b950", "#8c5a00"], "grpo_rm": ["#08306b", "#4a90c2", "#2a6e4f", "#a03a8c", "#c2452d"]}
MARKERS = ["", "o", "^", "s", "D", "v", "x"]


def line_styles(groups: list[Group]) -> dict[str, dict]:
    """How the lines of each group are drawn, by its name; those of the whole training set come first."""
    styles: dict[str, dict] = {}
    for method, shades in SHADES.items():
        members = sorted((group for group in groups if group.row.split()[0] == method), key=lambda group: len(group.row))
        for i, group in enumerate(members):
            styles[group.name] = {"color": shades[i % len(shades)], "linestyle": DASHES[method], "marker": MARKERS[i % len(MARKERS)]}
    return styles


def grid(count: int, columns: int):
    """A figure with `count` panels in at most `columns` columns: (figure, axes)."""
    from matplotlib import pyplot as plt

    columns = min(count, columns)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.9 * columns, 0.6 + 2.9 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, axes.flat[:count]


def draw_legend(figure, handles: list) -> None:
    """A legend below the panels, in as many columns as their labels leave room for."""
    longest = max(len(handle.get_label()) for handle in handles)
    columns = int(figure.get_figwidth() / (0.6 + 0.08 * longest))  # inches: the handle, and a letter
    figure.legend(handles=handles, loc="outside lower center", ncols=min(max(columns, 1), 4, len(handles)), frameon=False, handlelength=3)


def save_figure(figure, title: str, path: Path) -> Path:
    """Write the figure to `path` and let go of it."""
    from matplotlib import pyplot as plt

    figure.suptitle(title, fontweight="bold")
    figure.savefig(path, dpi=160)
    plt.close(figure)
    return path


def draw_lines(axis, runs: list[Run], key: str, style: dict) -> None:
    """The value of each run against the epoch as a thin line, and the mean of those that have come furthest as a thick one."""
    lines = [points for run in runs if (points := epoch_values(run, key))]
    furthest = [line for line in lines if max(line) == max(map(max, lines))]
    for line in lines if len(lines) > 1 else []:
        axis.plot(line.keys(), line.values(), linewidth=0.7, alpha=0.4, color=style["color"])
    epochs = sorted(set.intersection(*map(set, furthest)))
    means = [statistics.mean(line[epoch] for line in furthest) for epoch in epochs]
    style = style | ({"marker": style["marker"] or "o"} if len(epochs) == 1 else {})  # a line through one point shows nothing
    axis.plot(epochs, means, linewidth=2, markersize=5, markevery=max(1, len(epochs) // 8), **style)


def epoch_values(run: Run, key: str) -> dict[int, float]:
    """{epoch, from 1: value} of those epochs of the log that have one."""
    return {event["epoch"] + 1: event[key] for event in run.epochs if event.get(key) is not None}


def draw_curves(groups: list[Group], panels: dict, title: str, path: Path) -> Path | None:
    """One panel a quantity, of all groups that have it. None where no run has logged any of them."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatter, MaxNLocator

    wanted = {}
    for name, (key, method, scale) in panels.items():
        members = [group for group in groups if group.row.startswith(method) and any(epoch_values(run, key) for run in group.runs)]
        if members:
            wanted[name] = (key, scale, members)
    if not wanted:
        return None
    figure, axes = grid(len(wanted), columns=2 if len(wanted) == 4 else 3)
    styles, drawn = line_styles(groups), set()
    for axis, (name, (key, scale, members)) in zip(axes, wanted.items(), strict=True):
        axis.set(title=name, xlabel="epoch", yscale=scale)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axis.grid(alpha=0.3)
        if scale == "log":
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
        for group in members:
            draw_lines(axis, group.runs, key, styles[group.name])
            drawn.add(group.name)
        sizes = [abs(value) for group in members for run in group.runs for value in epoch_values(run, key).values()]
        typical = statistics.median(sizes)
        if scale == "linear" and max(sizes) > 100 * typical > 0:  # one run that blew up would flatten the others
            axis.set_yscale("symlog", linthresh=typical, linscale=2)
            axis.yaxis.get_major_locator().set_params(numticks=7)
    handles = [plt.Line2D([], [], linewidth=2, label=name, **style) for name, style in styles.items() if name in drawn]
    draw_legend(figure, handles)
    return save_figure(figure, title, path)


def draw_ablation(groups: list[Group], path: Path) -> Path | None:
    """Bars of Table 6's score with the standard deviation over seeds, the paper's as diamonds; None where there are none."""
    groups = [group for group in ablations(groups) if group.scores("eval_linear", ablation_score(group.task))]
    if not groups:
        return None
    shades = {"grpo_rm none": ("#e0e0e0", "black"), "grpo_rm eq5": ("#8fb3d1", "black"), "grpo_rm": ("#2f6aa8", "white")}
    datasets = list(dict.fromkeys((group.dataset, group.task) for group in groups))
    figure, axes = grid(len(datasets), columns=2)
    diamonds, longest = [], 0
    for axis, (dataset, task) in zip(axes, datasets, strict=True):
        members = sorted((g for g in groups if (g.dataset, g.task) == (dataset, task)), key=lambda g: list(REWARDS).index(g.row))
        for y, group in enumerate(members):
            values = list(group.scores("eval_linear", ablation_score(task)).values())
            colour, ink = shades[group.row]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            axis.barh(y, statistics.mean(values), xerr=deviation, color=colour, edgecolor="black", height=0.7, capsize=5)
            axis.annotate(with_deviation(values), (0, y), (4, 0), textcoords="offset points", va="center", color=ink)
            printed = PAPER_ABLATION.get(f"{dataset} {group.row}", {}).get("score")
            if printed:
                diamonds = axis.plot(printed[0], y, "D", color="white", markeredgecolor="black", label="the paper's")
        names = [", ".join(filter(None, [REWARDS[group.row].replace(" (GRPO-RM)", ""), group.label])) for group in members]
        axis.set_yticks(range(len(members)), names)
        longest = max(longest, *map(len, names))
        axis.invert_yaxis()
        axis.set(title=DATASETS.get(dataset, dataset), xlabel=f"{ablation_score(task)} (%)")
    figure.set_figwidth(figure.get_figwidth() + min(2, len(datasets)) * 0.07 * longest)  # inches a letter, beside the bars
    if diamonds:
        figure.legend(handles=diamonds, loc="outside lower center", frameon=False)
    return save_figure(figure, "Uniformity reward", path)


def draw_scenes(groups: list[Group], path: Path) -> Path | None:
    """Figure 2: the scenes that eval_linear.py --save-images left for all of these groups of one dataset, one a row, with the
    ground truth and each group's prediction (of its first run that has any) side by side. None where there are none."""
    saved = {}
    for group in groups:
        for run in group.runs:
            if "eval_linear" in run.scores and (directory := run.path / "eval_linear_images").is_dir():
                saved.setdefault(group.name, directory)
    found = [{(file.name.split("_")[0], file.read_bytes()) for file in directory.glob("*_truth.png")} for directory in saved.values()]
    indices = sorted(index for index, _ in set.intersection(*found)) if found else []  # the same scene by its ground truth
    if not indices:
        return None
    classes = list(read_json(next(iter(saved.values())).parent / "eval_linear.json")["per_class_iou"])
    rows = []
    for index in indices:
        cells = [(title, next(iter(saved.values())) / f"{index}_{kind}.png") for title, kind in (("image", "image"), ("ground truth", "truth"))]
        cells += [(name, directory / f"{index}_prediction.png") for name, directory in saved.items()]
        try:
            rows.append(draw_panels([(title, Image.open(file)) for title, file in cells], classes, height=200))
        except OSError as error:
            raise InputError(f"the pictures of scene {index} cannot be read ({first_line(error)}); run eval_linear.py --save-images again") from error
    figure = Image.new("RGB", (max(row.width for row in rows), sum(row.height for row in rows)), "white")
    for i, row in enumerate(rows):
        figure.paste(row, (0, sum(above.height for above in rows[:i])))
    figure.save(path)
    return path


def draw_figures(groups: list[Group], directory: Path) -> list[Path]:
    """<dataset>_curves.png, <dataset>_policy.png, <dataset>_scenes.png and ablation.png; returns those for which there was
    something to draw. Raises InputError where they cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    trained = [group for group in groups if group.row not in ("frozen", "grpo_rm none", "grpo_rm eq5")]
    written = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for dataset in dict.fromkeys(group.dataset for group in trained):
            mine, name = [group for group in trained if group.dataset == dataset], DATASETS.get(dataset, dataset)
            for panels, what in ((CURVES, "curves"), (POLICY, "policy")):
                written.append(draw_curves(mine, panels, name, directory / f"{dataset}_{what}.png"))
        for dataset in dict.fromkeys(group.dataset for group in groups if group.task == "segmentation"):
            written.append(draw_scenes([g for g in groups if g.dataset == dataset and g.row in METHODS], directory / f"{dataset}_scenes.png"))
        written.append(draw_ablation(groups, directory / "ablation.png"))
    except OSError as error:
        raise InputError(f"--figures {directory} cannot be written ({first_line(error)}); choose another directory") from error
    return [path for path in written if path]


@stage
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.usage = "%(prog)s RUNS_DIR [--csv DIR] [--figures DIR]"
    parser.add_argument("runs", metavar="RUNS_DIR", type=Path, help="directory that holds the runs, at any depth")
    parser.add_argument("--csv", metavar="DIR", type=Path, help="write the tables into this directory as CSV files")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="draw training curves, segmented scenes and the ablation into this directory")
    args = parser.parse_args(argv)
    runs = find_runs(args.runs)
    groups = group_runs(runs, args.runs)
    tables = make_tables(groups)
    print("\n\n".join([*(table.markdown() for table in tables), "\n".join(remarks(runs, args.runs))]).strip())
    written = write_csv(tables, args.csv) if args.csv else []
    written += draw_figures(groups, args.figures) if args.figures else []
    for path in written:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
