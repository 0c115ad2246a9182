"""bench.py on a tiny budget: what it writes, never how fast anything is."""

import json
from types import SimpleNamespace

import torch
from conftest import stderr_of

from tools import bench


@torch._dynamo.config.patch(suppress_errors=False)  # bench.py sets it
def test_bench_writes_what_it_measured(tmp_path, capsys):
    output = tmp_path / "sub" / "bench.json"
    bench.main(["--device", "cpu", "--quick", "--repeats", "1", "--threads", "1", "--output", str(output)])
    result = json.loads(output.read_text())
    assert {"torch_version", "device_name", "threads", "backbone", "amp"} <= result["machine"].keys()
    (loss,) = result["loss"]
    assert loss["eager ms"] > 0 and loss["compiled ms"] > 0 and 1 < loss["eager keeps"] < 10
    names = [row["setting"].split(", ")[:2] for row in result["steps"]]
    assert names == [[dataset, method] for dataset in bench.SETTINGS for method in ("finetune", "grpo_rm")]
    for finetune, grpo_rm in zip(result["steps"][::2], result["steps"][1::2], strict=True):
        assert 1 <= grpo_rm["kept GB"] / finetune["kept GB"] < 1.5  # the old policy keeps nothing
    assert result["steps"][-1]["paper: s"] == "1669.80" and result["loader"]["images/s"] > 0
    assert "| voc2012, grpo_rm, 2 x 28^2 | " in capsys.readouterr().out


def test_what_is_kept_for_the_backward_pass_by_hand():
    weight = torch.ones(8, 4, requires_grad=True)

    def run(rows):
        hidden = torch.ones(rows, 4) @ weight.T  # keeps its input, 16 bytes a row, and the weight
        hidden.exp().mul(2).view(-1).sum().backward()  # keeps the output of exp, 32 bytes a row

    assert bench.bytes_kept(lambda: run(10), weight) == 10 * 48
    assert bench.bytes_kept(lambda: [run(10), run(7)], weight) == 10 * 48  # what was let go of does not count


def test_medians_are_taken_over_turns(monkeypatch):
    taken = iter([3.0, 10.0, 1.0, 30.0, 2.0, 20.0])
    monkeypatch.setattr(bench.Timer, "timeit", lambda timer, number: SimpleNamespace(median=next(taken)))
    assert bench.medians({"a": list, "b": list}, 3) == {"a": 2.0, "b": 20.0}


def test_unwritable_output_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "--output" in stderr_of(capsys, bench.main, "--quick", "--output", tmp_path / "file" / "bench.json")
