"""bench.py on a tiny budget: what it writes, never how fast anything is."""

import functools

import pytest
import torch
from conftest import read_json

from common.cli import cores_per_rank
from tools import bench


@torch._dynamo.config.patch(suppress_errors=False)  # bench.py sets it
def test_bench_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    output = tmp_path / "sub" / "bench.json"
    monkeypatch.setattr(bench, "LOSS_SHAPES", [(64, 21)])
    monkeypatch.setattr(bench, "JPEG_FILES", 16)
    monkeypatch.setattr(bench, "SETTINGS", dict.fromkeys(bench.SETTINGS, (5, 9, 2, 1.0)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    bench.main(["--device", "cpu", "--repeats", "1", "--threads", "1", "--output", str(output)])
    result = read_json(output)
    assert {"torch_version", "device_name", "threads", "backbone", "amp"} <= result["machine"].keys()
    (loss,) = result["loss"]
    assert loss["eager ms"] > 0 and loss["compiled ms"] > 0
    names = [row["setting"].split(", ")[:2] for row in result["steps"]]
    assert names == [[dataset, method] for dataset in bench.SETTINGS for method in ("finetune", "grpo_rm")]
    rates = {row["loader"]: row["images/s"] for row in result["loaders"]}
    assert rates.keys() == {"imagenet", "coco_stuff", "imagenet, torchvision"} and min(rates.values()) > 0
    last = result["steps"][-1]
    workers = cores_per_rank()
    fed = workers * rates["coco_stuff"] * last["step ms"] / 1e3 / 2
    assert last["paper: s"] == "1669.80" and last[f"fed by {workers} workers"] == pytest.approx(fed)
    assert "| voc2012, grpo_rm, 2 x 448^2 | " in capsys.readouterr().out
