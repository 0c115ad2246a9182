"""Table of finished runs, beside the paper's: mean and sample standard deviation over seeds, in percent.

    python report.py runs                       prints Markdown
    python report.py runs --figures figures     and draws loss, accuracy and ratio of every run against the epoch

Reads eval_linear.json and eval_knn.json (and for the figures log.jsonl) of every directory below RUNS_DIR. Results are
averaged over seeds only where all their other settings are equal; a row stands for one set of settings.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from checkpoint import NEUTRAL, read_log
from data import ArgumentParser, InputError, first_line, stage

METHODS = {"frozen": "frozen", "finetune": "Fine-tuning", "grpo_rm": "GRPO-RM"}  # the paper calls the first DINOv2
PAPER = {  # Table 3: (mean, standard deviation) of softmax regression and of k-NN over 5 runs, DINOv2 ViT-S/14
    "cifar10": {"frozen": ((47.26,), (43.26,)), "finetune": ((94.55, 0.27), (94.39, 0.29)), "grpo_rm": ((95.78, 0.26), (95.81, 0.30))},
    "cifar100": {"frozen": ((20.68,), (25.92,)), "finetune": ((68.87, 2.70), (71.32, 1.85)), "grpo_rm": ((74.41, 2.28), (78.48, 0.92))},
    "stl10": {"frozen": ((15.71,), (37.57,)), "finetune": ((43.44, 6.89), (89.76, 3.50)), "grpo_rm": ((46.42, 5.86), (89.03, 4.43))},
    "tiny_imagenet": {
        "frozen": ((29.24,), (21.10,)),
        "finetune": ((58.67, 0.61), (58.59, 1.25)),
        "grpo_rm": ((65.96, 0.40), (66.36, 0.32)),
    },
    "imagenet": {"frozen": ((74.34,), (72.61,)), "finetune": ((74.48, 0.85), (71.33, 0.45)), "grpo_rm": ((76.21, 0.92), (72.16, 0.73))},
}
SCORES = {"SR": "eval_linear.json", "k-NN": "eval_knn.json"}
def read_json(path: Path) -> dict:
    """The object stored in `path`; {} where there is no such file. Raises InputError when it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); remove it and run its stage again") from error


def find_runs(root: Path) -> list[dict]:
    """Every directory in `root`, at any depth, that holds a result, as {"path", "dataset", "method", "seed", "settings",
    "scores"}; settings are all that its files say and that changes the mathematics. Raises InputError."""
    if not root.is_dir():
        raise InputError(f"{root}: no such directory; name the one that holds the runs")
    runs = []
    for directory in sorted({path.parent for name in SCORES.values() for path in root.rglob(name)}):
        results = {score: read_json(directory / name) for score, name in SCORES.items() if (directory / name).exists()}
        files = {"config": read_json(directory / "config.json")} | results
        # Where a run started from and where it was stopped matter here, though not to a run that is resumed.
        neutral = NEUTRAL | {"seed", "fit_seed", "top1"}
        settings = {
            (file, k): v
            for file, values in files.items()
            for k, v in values.items()
            if k not in neutral or (file == "config" and k in ("weights", "max_steps"))
        }
        first = next(iter(results.values()))
        try:
            run = {key: first[key] for key in ("dataset", "method", "seed")} | {"path": directory, "settings": settings}
            runs.append(run | {"scores": {score: result["top1"] for score, result in results.items()}})
        except KeyError as error:
            raise InputError(f"{directory}: a result without {error}; remove it and run its stage again") from error
    if not runs:
        raise InputError(f"{root} holds no finished run (eval_linear.json, eval_knn.json); run run_all.sh or the eval scripts first")
    return runs


def group_runs(runs: list[dict]) -> list[list[dict]]:
    """Runs that may be averaged: same dataset and method, other seeds, and no setting that both have and that differs."""

    def fits(run: dict, group: list[dict]) -> bool:
        return all(
            run["seed"] != other["seed"]
            and (run["dataset"], run["method"]) == (other["dataset"], other["method"])
            and all(other["settings"].get(key, value) == value for key, value in run["settings"].items())
            for other in group
        )

    groups: list[list[dict]] = []
    for run in runs:
        group = next((group for group in groups if fits(run, group)), None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return sorted(groups, key=lambda group: (group[0]["dataset"], [*METHODS, group[0]["method"]].index(group[0]["method"])))


def mean_and_deviation(values: list[float]) -> str:
    """ "mean ± sample standard deviation", the mean alone for one value, a dash for none."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def label(path: Path, root: Path) -> str:
    """A run's directory relative to `root`, without its seed: what the runs of one row have in common."""
    parts = path.relative_to(root).parts
    return "/".join(parts[:-1] if parts and parts[-1].startswith("seed") else parts) or "."


def table(runs: list[dict], root: Path) -> str:
    """The Markdown table: one row per dataset, method and settings, with the paper's numbers where it has them."""
    lines = ["| dataset | method | runs | seeds | SR | paper's SR | k-NN | paper's k-NN |", "|---|---|---|---|---|---|---|---|"]
    for group in group_runs(runs):
        dataset, method = group[0]["dataset"], group[0]["method"]
        places = {label(run["path"], root) for run in group}
        seeds = ", ".join(str(seed) for seed in sorted(run["seed"] for run in group))
        cells = [dataset, METHODS.get(method, method), ", ".join(sorted(places)), seeds]
        paper = PAPER.get(dataset, {}).get(method, (None, None))
        for score, printed in zip(SCORES, paper, strict=True):
            cells.append(mean_and_deviation([run["scores"][score] for run in group if score in run["scores"]]))
            cells.append(" ± ".join(f"{x:.2f}" for x in printed) if printed else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_curves(root: Path, figures: Path) -> list[Path]:
    """One picture per dataset: training loss of each method on its own axis (they are different quantities), validation
    accuracy, and the largest ratio p/q, against the epoch, for every run that has a log. Returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "cross-entropy": ("loss", "finetune"),
        "GRPO-RM loss": ("loss", "grpo_rm"),
        "validation accuracy (%)": ("val_accuracy", None),
        "largest ratio p/q in the epoch": ("max_ratio", "grpo_rm"),
    }
    datasets = defaultdict(list)
    for path in sorted(root.rglob("log.jsonl")):
        config = read_json(path.parent / "config.json")
        if config:
            datasets[config["dataset"]].append((path, config, [e for e in read_log(path) if e["event"] == "epoch"]))
    written = []
    for dataset, logs in datasets.items():
        figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
        colours = {}
        for path, config, epochs in logs:
            colour = colours.setdefault(label(path.parent, root), f"C{len(colours) % 10}")
            for axis, (title, (key, method)) in zip(axes.flat, panels.items(), strict=True):
                axis.set(title=title, xlabel="epoch")
                points = [(e["epoch"] + 1, e[key]) for e in epochs if e.get(key) is not None]
                if points and method in (None, config["method"]):
                    axis.plot(*zip(*points, strict=True), color=colour, alpha=0.8, linestyle="-" if config["method"] == "grpo_rm" else "--")
        axes[1, 1].set_yscale("log")
        handles = [plt.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(handles)), frameon=False)
        figure.suptitle(f"{dataset}: every line is one seed; fine-tuning dashed")
        written.append(figures / f"{dataset}_curves.png")
        try:
            figures.mkdir(parents=True, exist_ok=True)
            figure.savefig(written[-1], dpi=120)
        except OSError as error:
            raise InputError(f"--figures {figures} cannot be written ({first_line(error)}); choose another directory") from error
        plt.close(figure)
    return written


@stage
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.usage = "%(prog)s RUNS_DIR [--figures DIR]"
    parser.add_argument("runs", metavar="RUNS_DIR", type=Path, help="directory that holds the runs, at any depth")
    parser.add_argument("--figures", metavar="DIR", type=Path, help="draw the training curves into this directory")
    args = parser.parse_args(argv)
    print(table(find_runs(args.runs), args.runs))
    if args.figures:
        for path in draw_curves(args.runs, args.figures):
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
