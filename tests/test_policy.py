"""Backbones, heads and weights: what loads, what is refused, and what an exported backbone loads into."""

import pickle
import sys
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, TINY, read_json
from torch import nn

import eval_knn
import eval_linear
import grpo_rm
import train_cls
from common.backbone import DINOV2, load_backbone, load_strictly
from common.cli import InputError
from common.demo import VitTiny
from common.distributed import Meter
from grpo_rm import ClassificationHead, Policy, SegmentationHead

HUBCONF = """
import torch
from torch import nn
dependencies = ["torch"]
class Stand(nn.Module):
    patch_size, embed_dim = 4, 12
    def __init__(self):
        super().__init__()
        self.project, self.drop = nn.Linear(3, 12), nn.Dropout(0.5)
        self.mask_token = nn.Parameter(torch.zeros(1, 12))
    def forward_features(self, images):
        tokens = self.drop(self.project(images.mean((2, 3))))
        return {"x_norm_clstoken": tokens, "x_norm_patchtokens": tokens[:, None], "x_norm_regtokens": None}
def dinov2_vits14(*, pretrained=True, **kwargs):
    return Stand() if not pretrained else 1 / 0
dinov3_vits16 = dinov2_vits14
def resnet(*, pretrained=True):
    return nn.Linear(1, 1)
"""


@pytest.fixture
def hub_repo(tmp_path):
    """A local hub repository, which goes through the real torch.hub.load."""
    directory = tmp_path / "stand_in"
    directory.mkdir()
    (directory / "hubconf.py").write_text(HUBCONF)
    yield str(directory)
    sys.modules.pop("hubconf", None)


def test_vit_tiny_has_dinov2s_interface():
    backbone = load_backbone("vit_tiny")
    for h, w in ((42, 42), (70, 70), (98, 56)):
        images = torch.randn(2, 3, h, w)
        features = backbone.forward_features(images)
        assert [x.shape for x in features.values()] == [(2, 96), (2, h * w // backbone.patch_size**2, 96)]
        layers = backbone.get_intermediate_layers(images, n=4, reshape=True, return_class_token=True)
        assert len(layers) == 4 and layers[-1][0].shape == (2, 96, h // 14, w // 14)
        torch.testing.assert_close(layers[-1][0].flatten(2).transpose(1, 2), features["x_norm_patchtokens"])
        torch.testing.assert_close(layers[-1][1], backbone(images))


def test_hub_stand_in_through_torch_hub(hub_repo):
    backbone = load_backbone("dinov2_vits14", hub_repo=hub_repo)
    policy = Policy(backbone, ClassificationHead(backbone.embed_dim, 5))
    images = torch.randn(2, 3, 8, 8)
    assert policy(images).shape == (2, 5) and torch.equal(policy(images), policy(images))  # without dropout
    frozen = [name for name, p in backbone.named_parameters() if not p.requires_grad]
    assert frozen == ["mask_token"]  # unused, it would stop DDP
    assert load_backbone("dinov3_vits16", hub_repo=hub_repo).patch_size == 4


def test_exported_weights_load_strictly_into_a_fresh_hub_model(hub_repo, tmp_path, capsys):
    """A run of the script with a hub model and its export; then both evaluations."""
    model = ["--backbone", "dinov2_vits14", "--hub-repo", hub_repo, "--image-size", "40"]
    train_cls.main([*TINY, *model, "--batch-size", "50", "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    assert f"warning: random weights: {hub_repo} holds code only; give --weights" in capsys.readouterr().err
    state = torch.load(file := tmp_path / "run" / "backbone.pth", weights_only=True)
    fresh = torch.hub.load(hub_repo, "dinov2_vits14", source="local", pretrained=False)
    fresh.load_state_dict(state, strict=True)
    for module, name in ((eval_linear, "eval_linear.json"), (eval_knn, "eval_knn.json")):
        module.main([*TINY, "--weights", str(file)])  # backbone, hub repository and image size come from config.json
        result = read_json(tmp_path / "run" / name)
        assert (result["backbone"], result["image_size"], result["method"]) == ("dinov2_vits14", 40, "grpo_rm")


@pytest.mark.parametrize("name", DINOV2)
def test_every_dinov2_name_asks_the_pinned_repository(name, monkeypatch):
    asked = {}
    monkeypatch.setattr(torch.hub, "load", lambda *names, **options: asked.update(options, names=names) or VitTiny())
    load_backbone(name)
    assert asked["names"] == ("facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0", name)
    assert asked["source"] == "github" and asked["pretrained"] and asked["skip_validation"]


def test_what_cannot_be_loaded_from_a_hub(hub_repo, monkeypatch):
    for name, repo, reason in (
        ("resnet50", hub_repo, "resnet50 from"), ("resnet", hub_repo, "no forward_features"),
        ("vit_tiny", hub_repo, "vit_tiny is built in"), ("resnet", "no directory", "owner/repo"),
        ("dinov2_vits15", None, "vits14_reg"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=reason):
            load_backbone(name, hub_repo=repo)
    monkeypatch.setattr(torch.hub, "load", Mock(side_effect=OSError("unreachable\nsecond line")))
    with pytest.raises(InputError, match=r"\(unreachable\); .*--hub-repo DIR .* and --weights FILE$"):
        load_backbone("dinov2_vits14")


STATE = VitTiny().state_dict()


@pytest.mark.parametrize(("content", "message"), [
    ({k: v for k, v in STATE.items() if k != "vit.class_token"}, r"does not fit .*vit\.class_token"),
    (STATE | {"vit.class_token": torch.full((1, 1, 96), torch.nan)}, r"vit\.class_token .* not finite"),
    (STATE | {"vit.class_token": torch.zeros(1, 1, 7)}, "does not fit .*class_token.*1, 1, 7.*1, 1, 96"),
    ({"model": {"a": torch.zeros(1)}}, "does not hold a state dict"),
], ids=["missing", "not finite", "shape", "nested"])  # fmt: skip
def test_weights_that_do_not_fit_are_named(content, message, tmp_path):
    torch.save(content, file := tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message) as error:
        load_backbone("vit_tiny", weights=str(file))
    assert "weights.pth" in str(error.value) and "\n" not in str(error.value)


def test_malicious_and_broken_weights_run_nothing(tmp_path):
    class Malicious:
        def __reduce__(self):
            return open, (str(tmp_path / "victim"), "w")

    torch.save({"a": Malicious()}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious()))
    (tmp_path / "broken.pth").write_bytes(b"PK not a zip")
    for name in ("torch.pth", "plain.pth", "broken.pth"):
        with pytest.raises(InputError, match="cannot be loaded"):
            load_strictly(VitTiny(), tmp_path / name)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("head", [ClassificationHead(96, 5), SegmentationHead(96, 5, map_size=6)], ids=["cls", "seg"])
def test_logits_are_float32_with_bf16(head):
    backbone, images = load_backbone("vit_tiny"), torch.randn(2, 3, 42, 42)
    logits, exact = Policy(backbone, head, "bf16")(images), Policy(backbone, head, "off")(images)
    assert logits.dtype == torch.float32 and 1e-6 < (logits - exact).abs().max() < 0.1
    assert head(backbone.forward_features(images)[head.token].bfloat16()).dtype == torch.float32


def test_the_first_layer_before_upsampling_is_the_same_function():
    head = SegmentationHead(8, 5, hidden_dim=6, map_size=12).double()
    tokens = torch.randn(2, 16, 8, dtype=torch.float64)
    maps = F.interpolate(tokens.transpose(1, 2).unflatten(2, (4, 4)), size=(12, 12), mode="bilinear")  # (B, D, M, M)
    expected = nn.Sequential(*head)(maps.movedim(1, -1)).movedim(-1, 1)  # Linear - ReLU - Linear at every pixel
    torch.testing.assert_close(head(tokens), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["grpo_rm", "finetune"])
def test_chunks_give_the_gradients_of_the_whole_batch(method, monkeypatch):
    torch.manual_seed(0)
    policy, old_policy = (Policy(VitTiny(), SegmentationHead(96, 5, 8, 6)).double() for _ in range(2))
    images, targets = torch.randn(7, 3, 28, 28, dtype=torch.float64), torch.randint(5, (7, 6, 6))
    targets[0], targets[3, :2] = -100, -100  # void: chunks weigh differently
    loss_function = grpo_rm.make_loss(train_cls.parse_args(["--method", method]))
    loss, stats = loss_function(policy(images), old_policy(images).detach(), targets)
    loss.backward()
    expected = {name: p.grad for name, p in policy.named_parameters()}
    old = old_policy if method == "grpo_rm" else None
    sizes, weight = [], 1 / (targets >= 0).sum().double()
    policy.head.register_forward_hook(lambda module, tokens, logits: sizes.append(len(logits)))
    for chunk in (100, 3, 0):  # a chunk is one image at least
        monkeypatch.setitem(grpo_rm.VALUES_AT_ONCE, "cpu", chunk * 8 * 6**2 + 7)  # 8 hidden channels, 5 classes
        policy.zero_grad()
        meter = Meter()
        grpo_rm.accumulate_gradients(policy, old, policy.encoder, loss_function, images, targets, weight, meter)
        found = {name: p.grad for name, p in policy.named_parameters()}
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-9)
        total, samples = meter.read(CPU)["accuracy"]
        assert total / samples == pytest.approx(stats["accuracy"].item())
    assert sizes == [7, 3, 3, 1, *[1] * 7]
