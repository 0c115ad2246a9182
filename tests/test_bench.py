"""bench.py on a tiny budget: what it writes, never how fast anything is."""

import json

import torch
from conftest import stderr_of

from tools import bench


@torch._dynamo.config.patch(suppress_errors=False)  # bench.py sets it
def test_bench_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "sub" / "bench.json"
    bench.main(["--device", "cpu", "--quick", "--repeats", "2", "--threads", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert {"torch_version", "device_name", "threads", "backbone", "amp"} <= result["machine"].keys()
    for loss in result["loss"]:
        assert 0 < loss["eager ms"]["min"] <= loss["eager ms"]["median"] <= loss["eager ms"]["max"]
        assert 1 < loss["eager keeps"] < 10 and loss["Eq. (5) / Eq. (4)"]["min"] > 0
    assert [step["setting"] for step in result["steps"]] == ["tiny_imagenet", "imagenet", "voc2012", "coco_stuff"]
    for step in result["steps"]:
        assert step["grpo_rm_to_finetune"].keys() == {"median", "min", "max"}
        finetune, grpo_rm = step["methods"]
        assert 1 <= grpo_rm["kept GB"] / finetune["kept GB"] < 1.5  # the old policy keeps nothing
    assert result["loader"]["images/s"]["median"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert "torch" in lines[0] and sum(line.startswith("| voc2012, grpo_rm, ") for line in lines) == 1


def test_what_is_kept_for_the_backward_pass_by_hand():
    weight = torch.ones(8, 4, requires_grad=True)

    def run(rows):
        hidden = torch.ones(rows, 4) @ weight.T  # keeps its input, 16 bytes a row, and the weight
        hidden.exp().mul(2).view(-1).sum().backward()  # keeps the output of exp, 32 bytes a row

    assert bench.bytes_kept(lambda: run(10), weight) == 10 * 48
    assert bench.bytes_kept(lambda: [run(10), run(7)], weight) == 10 * 48  # what was let go of does not count


def test_turns_are_paired_and_the_first_does_not_count(monkeypatch):
    taken = iter([100.0, 100.0, 2.0, 1.0, 9.0, 3.0, 4.0, 1.0])
    monkeypatch.setattr(bench.timeit, "timeit", lambda run, number: next(taken))
    seconds = bench.take_turns({"a": list, "b": list}, 3, torch.device("cpu"))
    assert bench.spread(seconds["a"] / seconds["b"]) == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--output" in stderr_of(capsys, bench.main, "--quick", "--output", tmp_path / "file" / "bench.json")
