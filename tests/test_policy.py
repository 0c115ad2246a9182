"""Backbones, heads and weights: what loads, what is refused, and what a saved backbone loads into."""

import json
import pickle
import shutil
import sys

import pytest
import torch
from conftest import TINY, stderr_of

import eval_knn
import eval_linear
import grpo_rm
import train_cls
from checkpoint import load_strictly
from data import InputError
from grpo_rm import ClassificationHead, Policy, VitTiny, check_image_size, load_backbone

HUBCONF = '''
dependencies = ["torch"]
import torch
from torch import nn

class Stand(nn.Module):
    patch_size, embed_dim = 4, 12
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 12)
        self.mask_token = nn.Parameter(torch.zeros(1, 12))
    def forward_features(self, images):
        tokens = self.project(images.mean((2, 3)))
        return {"x_norm_clstoken": tokens, "x_norm_patchtokens": tokens[:, None], "x_norm_regtokens": None}

def dinov2_vits14(*, pretrained=True, **kwargs):
    if pretrained:
        raise OSError("no network")
    return Stand()

dinov3_vits16 = dinov2_vits14

def resnet(*, pretrained=True):
    return nn.Linear(1, 1)

def strange():
    return Stand()
'''


@pytest.fixture
def hub_repo(tmp_path):
    """A local hub repository, which goes through the real torch.hub.load."""
    directory = tmp_path / "stand_in"
    directory.mkdir()
    (directory / "hubconf.py").write_text(HUBCONF)
    yield str(directory)
    sys.modules.pop("hubconf", None)


def test_vit_tiny_has_dinov2s_interface():
    backbone = load_backbone("vit_tiny").eval()
    assert 0.4e6 < sum(p.numel() for p in backbone.parameters()) < 0.6e6
    for h, w in ((42, 42), (70, 70), (98, 56)):
        images = torch.randn(2, 3, h, w)
        features = backbone.forward_features(images)
        assert features["x_norm_clstoken"].shape == (2, 96)
        assert features["x_norm_patchtokens"].shape == (2, h * w // 196, 96)
        layers = backbone.get_intermediate_layers(images, n=4, reshape=True, return_class_token=True)
        assert len(layers) == 4 and layers[-1][0].shape == (2, 96, h // 14, w // 14)
        torch.testing.assert_close(layers[-1][0].flatten(2).transpose(1, 2), features["x_norm_patchtokens"])
        torch.testing.assert_close(layers[-1][1], backbone(images))


def test_vit_tiny_sees_where_a_patch_is():
    backbone = VitTiny().eval()
    images = torch.zeros(2, 3, 42, 42)
    images[0, :, :14, :14] = 1
    images[1, :, 28:, 28:] = 1
    tokens = backbone(images)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-4


def test_hub_stand_in_through_torch_hub(hub_repo):
    backbone = load_backbone("dinov2_vits14", hub_repo=hub_repo)
    policy = Policy(backbone, ClassificationHead(backbone.embed_dim, 5))
    assert policy(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {"project.weight", "project.bias"}  # an unused mask_token would stop DDP
    assert load_backbone("dinov3_vits16", hub_repo=hub_repo).patch_size == 4


def test_exported_weights_load_strictly_into_a_fresh_hub_model(hub_repo, tmp_path, capsys):
    """A run of the script with a hub model, its export, and the two ways back; then both evaluations."""
    model = ["--backbone", "dinov2_vits14", "--hub-repo", hub_repo]
    train_cls.main([*TINY, *model, "--image-size", "40", "--batch-size", "50", "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    assert "starts from random weights" in capsys.readouterr().err
    file = tmp_path / "run" / "backbone.pth"
    state = torch.load(file, weights_only=True)
    fresh = torch.hub.load(hub_repo, "dinov2_vits14", source="local", pretrained=False)
    fresh.load_state_dict(state, strict=True)
    again = load_backbone("dinov2_vits14", hub_repo=hub_repo, weights=str(file))
    assert torch.equal(again.project.weight, fresh.project.weight) and torch.equal(fresh.project.weight, state["project.weight"])
    for module, name in ((eval_linear, "eval_linear.json"), (eval_knn, "eval_knn.json")):
        module.main([*TINY, "--weights", str(file)])  # backbone, hub repository and image size come from config.json
        result = json.loads((tmp_path / "run" / name).read_text())
        assert (result["backbone"], result["image_size"], result["val_images"]) == ("dinov2_vits14", 40, 40)


@pytest.mark.parametrize("name", grpo_rm.DINOV2)
def test_every_dinov2_name_asks_the_pinned_repository(name, monkeypatch):
    asked = {}

    def load(repo, model, **kwargs):
        asked.update(kwargs, repo=repo, model=model)
        return VitTiny()

    monkeypatch.setattr(torch.hub, "load", load)
    load_backbone(name)
    assert asked["repo"] == "facebookresearch/dinov2:b8931f7bf91576930313be2c6d6af376033b35f0"
    assert asked["model"] == name and asked["source"] == "github" and asked["pretrained"] and asked["skip_validation"]


def test_a_failed_download_is_one_line(monkeypatch):
    def load(*args, **kwargs):
        raise OSError("<urlopen error unreachable>")

    monkeypatch.setattr(torch.hub, "load", load)
    with pytest.raises(InputError, match=r"--hub-repo DIR .* and --weights FILE"):
        load_backbone("dinov2_vits14")


def test_unknown_names(hub_repo):
    with pytest.raises(InputError, match="dinov2_vits14_reg"):
        load_backbone("dinov2_vits15")
    with pytest.raises(InputError, match="resnet50 from"):
        load_backbone("resnet50", hub_repo=hub_repo)
    for name, reason in (("resnet", "has no forward_features"), ("strange", "unexpected keyword argument 'pretrained'")):
        with pytest.raises(InputError, match=reason):
            load_backbone(name, hub_repo=hub_repo)
    with pytest.raises(InputError, match="owner/repo"):
        load_backbone("resnet50", hub_repo="no such directory")


def altered(change):
    state = VitTiny().state_dict()
    change(state)
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (altered(lambda s: s.pop("vit.class_token")), "vit.class_token is missing"),
        (altered(lambda s: s.update(extra=torch.zeros(1))), "extra is not part of this backbone"),
        (altered(lambda s: s["vit.class_token"].fill_(float("nan"))), "vit.class_token has numbers that are not finite"),
        (altered(lambda s: s.update({"vit.class_token": torch.zeros(1, 1, 7)})), r"\(1, 1, 7\), not \(1, 1, 96\)"),
        ([1, 2], "does not hold a state dict"),
        ({"model": {"a": torch.zeros(1)}}, "does not hold a state dict"),
    ],
    ids=["missing", "extra", "not finite", "shape", "list", "nested"],
)
def test_weights_that_do_not_fit_are_named(content, message, tmp_path):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=message) as error:
        load_backbone("vit_tiny", weights=str(tmp_path / "weights.pth"))
    assert "weights.pth" in str(error.value) and "\n" not in str(error.value)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_malicious_weights_and_checkpoints_run_nothing(tmp_path, capsys):
    victim = tmp_path / "written_by_the_pickle"
    torch.save({"a": Malicious(str(victim))}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(str(victim))))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(InputError, match="cannot be loaded") as error:
            load_strictly(VitTiny(), tmp_path / name)
        assert "\n" not in str(error.value)
        shutil.copy(tmp_path / name, tmp_path / "checkpoint.pt")
        error = stderr_of(capsys, train_cls.main, *TINY, "--resume", "--output-dir", tmp_path, lines=2)
        assert "checkpoint.pt does not load and there is no other" in error
    assert not victim.exists()


@pytest.mark.parametrize("content", [None, b"", b"PK not a zip"], ids=["absent", "empty", "broken"])
def test_unreadable_weights(content, tmp_path):
    if content is not None:
        (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_strictly(VitTiny(), tmp_path / "weights.pth")


def test_image_size_must_fit_the_patches():
    with pytest.raises(InputError, match="take 42 or 56"):
        check_image_size(VitTiny(), 50)
    check_image_size(VitTiny(), 56)


def test_logits_are_float32_under_autocast():
    policy = Policy(VitTiny(), ClassificationHead(96, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = policy(torch.randn(2, 3, 42, 42))
    assert logits.dtype == torch.float32
