"""bench.py on a tiny budget: what it writes, never how fast anything is."""

import json

import bench


def test_bench_writes_what_it_measured(tmp_path, capsys):
    bench.main(["--device", "cpu", "--quick", "--repeats", "2", "--workers", "2", "--output", str(tmp_path / "bench.json")])
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result.keys() == {"machine", "loss", "steps", "loader", "settings"}
    assert {"torch_version", "device_name", "threads", "matmul_tflops", "backbone", "amp"} <= result["machine"].keys()
    for loss in result["loss"]:
        assert {"shape", "plain_s", "fused_s", "fused_speed_up", "eq5_to_eq4"} <= loss.keys()
        assert loss["fused_s"].keys() == {"median", "min", "max"}
        assert 0 < loss["fused_s"]["min"] <= loss["fused_s"]["median"] <= loss["fused_s"]["max"]
    assert [step["setting"] for step in result["steps"]][:2] == ["tiny_imagenet", "imagenet"]
    for step in result["steps"]:
        assert step["methods"].keys() == {"finetune", "grpo_rm"}
        assert all(values["matmul_share"] > 0 and values["images_per_s"] > 0 for values in step["methods"].values())
        assert step["grpo_rm_to_finetune"]["min"] > 0
        assert abs(step["methods"]["grpo_rm"]["kept_gb"] / step["methods"]["finetune"]["kept_gb"] - 1) < 0.1  # the old policy keeps nothing
    assert result["loader"]["images_per_s"]["median"] > 0
    report = capsys.readouterr().out
    assert "## Loss" in report and "| tiny_imagenet, grpo_rm |" in report and "torch" in report.splitlines()[0]


def test_what_is_kept_for_the_backward_pass_by_hand():
    weight = bench.torch.ones(8, 4, requires_grad=True)

    def step(count):
        hidden = bench.torch.ones(count, 4) @ weight.T  # keeps its input, 16 bytes a row
        hidden.exp().mul(2).view(-1).sum().backward()  # and its output, 32

    assert bench.kept_per_image(step, 10) == 48


def test_ratios_are_taken_within_a_turn():
    seconds = bench.take_turns({"a": lambda: None, "b": lambda: None}, 3, bench.torch.device("cpu"))
    assert [len(values) for values in seconds.values()] == [3, 3]
    assert bench.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_arithmetic_of_grpo_rm_is_four_thirds_of_fine_tuning(monkeypatch):
    """The count behind the share of the matrix-multiply rate: one forward more, to the two and one of training."""
    counted = []
    total = bench.FlopCounterMode.get_total_flops
    monkeypatch.setattr(bench.FlopCounterMode, "get_total_flops", lambda self: counted.append(total(self)) or counted[-1])
    args = bench.parse_args(["--quick", "--repeats", "1"])
    args.amp, args.backbone, args.matmul_rate = "off", "vit_tiny", 1e12
    world = bench.init_world("cpu")
    bench.measure_steps(bench.SETTINGS[0], args, world)
    assert abs(counted[1] / counted[0] - 4 / 3) < 0.1
