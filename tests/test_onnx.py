"""An ONNX file gives the features of the checkpoint, stands only when onnxruntime agrees, and says what it lacks."""

import importlib.util
import json
import types

import pytest
import timm
import torch

from selfsight.cli import main
from selfsight.interop import to_onnx
from selfsight.interop.export import ExportError

have_extra = all(importlib.util.find_spec(name) for name in to_onnx.PACKAGES)
needs_extra = pytest.mark.skipif(not have_extra, reason="the extra [onnx] is not installed")
NORM = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
# As small as each family comes: translating takes as long as the graph is deep.
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}, 32),
    "vit, mean": ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8,
                                           "class_token": False, "global_pool": "avg", "fc_norm": False}, 32),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    "convnextv2": ("convnextv2_atto", {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}, 64),
    "shvit": ("shvit_s1", {"embed_dim": [16, 24, 32], "partial_dim": [8, 8, 8], "depth": [1, 1, 1],
                           "types": ["i", "s", "s"]}, 128),
}  # fmt: skip


def write(name, out):
    architecture, kwargs, size = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.train()(torch.randn(4, 3, size, size))  # running statistics of its own
    modes = [m.training for m in model.modules()]
    to_onnx.export_onnx(model, out, image_size=size, crop_pct=1.0, card={"steps": 7}, **NORM)
    assert modes == [m.training for m in model.modules()]
    return model.eval(), size


@needs_extra
@pytest.mark.parametrize("name", ["vit", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS if n != "vit")])
def test_onnxruntime_gives_the_same_features_for_any_batch(name, tmp_path):
    import onnxruntime

    model, size = write(name, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        x = torch.randn(batch, 3, size, size)
        pooled, patches = map(torch.from_numpy, session.run(["pooled", "patches"], {"images": x.numpy()}))
        with torch.no_grad():
            features = model.forward_features(x)
            expected = features[:, model.num_prefix_tokens :] if features.ndim == 3 else features.flatten(2).mT
            torch.testing.assert_close(pooled, model(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(patches, expected, rtol=1e-4, atol=1e-4)
    meta = session.get_modelmeta().custom_metadata_map
    assert json.loads(meta["mean"]) == [0.4, 0.5, 0.6] and json.loads(meta["selfsight"]) == {"steps": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


class Program:
    """Stands in for torch's: the file that it saves is another model's."""

    def __init__(self, path):
        self.model, self.path = types.SimpleNamespace(metadata_props={}), path

    def save(self, path, external_data):
        path.write_bytes(self.path.read_bytes())


@needs_extra
def test_a_file_with_other_features_does_not_stand(tmp_path, monkeypatch):
    model, _ = write("vit", tmp_path / "good.onnx")
    monkeypatch.setattr(to_onnx, "_translate", lambda *_: Program(tmp_path / "good.onnx"))
    with torch.no_grad():
        model.norm.bias += 1
    with pytest.raises(ExportError, match="another pooled feature than torch"):
        to_onnx.export_onnx(model, tmp_path / "bad.onnx", image_size=32, crop_pct=1.0, card={}, **NORM)
    assert [path.name for path in tmp_path.iterdir()] == ["good.onnx"]


def export(*words):
    return main("export", list(words))


@needs_extra
def test_an_export_folder_becomes_one_file(tmp_path, capsys):
    from selfsight.backbones import build_backbone
    from selfsight.backbones.tokens import Needs
    from selfsight.interop.export import export_backbone

    backbone = build_backbone("vit_nano", Needs(), image_sizes=(32,), embed_dim=32, depth=1, num_heads=2)
    card = {"objective": "mae", "backbone": "vit_nano", "which": "student", "steps": 7}
    export_backbone(backbone, tmp_path / "folder", image_size=32, card=card, **NORM)
    out = tmp_path / "model.onnx"
    words = (f"checkpoint={tmp_path / 'folder'}", f"out={out}", "format=onnx")
    assert export(*words) == 0 and out.is_file()
    assert "images [batch, 3, 32, 32] -> pooled, patches" in capsys.readouterr().out
    assert export(*words) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert export(*words, "overwrite=true", "which=teacher") == 2
    assert "holds the student alone" in capsys.readouterr().err


def test_a_missing_extra_is_named_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert export("checkpoint=x", f"out={tmp_path / 'model.onnx'}", "format=onnx") == 2
    err = capsys.readouterr().err
    assert "needs onnx and onnxscript and onnxruntime" in err and "uv sync --extra onnx" in err and err.count("\n") == 1


def test_the_file_ends_in_onnx(tmp_path, capsys):
    assert export("checkpoint=x", f"out={tmp_path / 'model'}", "format=onnx") == 2
    assert "must end in .onnx" in capsys.readouterr().err
