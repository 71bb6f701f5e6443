import dataclasses
import pickle
import zipfile

import pytest
import safetensors.torch
import torch
from builders import SPEC, write_encoder

from sanitize.artifacts.encoder_folder import export_encoder
from sanitize.config import EncoderSpec
from sanitize.config_loading import load_encoder_spec
from sanitize.errors import CheckpointError, ConfigError
from sanitize.stages.encoders import Encoder, build_backbone, load_encoder

IMAGES = torch.rand(3, 3, SPEC.image_size, SPEC.image_size, generator=torch.Generator().manual_seed(0))


def simclr_names(state):
    """torchvision's names → those of the SimCLR wrapper of BadEncoder and DRUPE."""
    positions = {"conv1": "0", "bn1": "1", "layer1": "3", "layer2": "4", "layer3": "5", "layer4": "6"}
    renamed = {f"f.f.{positions[k.split('.')[0]]}{k[k.find('.') :]}": v for k, v in state.items()}
    return {"epoch": 7, "state_dict": renamed | {"g.0.weight": torch.zeros(2, 2)}, "optimizer": {"lr": 0.1}}


def ctrl_names(state):
    renamed = {f"module.backbone.{k.replace('downsample', 'shortcut')}": v for k, v in state.items()}
    return {"state_dict": renamed | {"module.proj_head.0.weight": torch.zeros(2)}}


LAYOUTS = {
    "bare": lambda state: state,
    "nested": lambda state: {"state_dict": state},
    "data parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "visual": lambda state: {f"visual.{k}": v for k, v in state.items()} | {"visual.fc.weight": torch.zeros(1)},
    "simclr wrapper": simclr_names,
    "ctrl": ctrl_names,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_known_checkpoint_layout_gives_the_same_embeddings(layout, tmp_path):
    torch.manual_seed(1)
    backbone = build_backbone(SPEC).eval()
    torch.save(LAYOUTS[layout](backbone.state_dict()), tmp_path / "e.pth")
    encoder = load_encoder(dataclasses.replace(SPEC, weights=str(tmp_path / "e.pth")))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(IMAGES), Encoder(backbone, SPEC)(IMAGES))


def test_safetensors_and_pytorch_files_have_one_fingerprint(tmp_path):
    path = write_encoder(tmp_path)
    spec = load_encoder_spec(str(path))
    torch.save(safetensors.torch.load_file(spec.weights), tmp_path / "e.pt")
    other = dataclasses.replace(spec, weights=str(tmp_path / "e.pt"))
    assert load_encoder(spec).fingerprint() == load_encoder(other).fingerprint()


@pytest.mark.parametrize("change", [{"mean": (0.4, 0.5, 0.5)}, {"image_size": 32}, {"resize": "crop"}])
def test_other_preprocessing_is_another_fingerprint(encoder_spec, change):
    assert (
        load_encoder(encoder_spec).fingerprint()
        != load_encoder(dataclasses.replace(encoder_spec, **change)).fingerprint()
    )


@pytest.mark.parametrize(
    ("spec", "fingerprint"),
    [
        (
            EncoderSpec("resnet10-cifar", "", 16, width=2),
            "ddc99b693da82e8308ef6dc8e8ba8d28f7c4c6b7d1450219e1d904a2757d2f1d",
        ),
        (EncoderSpec("resnet18"), "44b61fd6fa418770289ca43acf5e91a21a0d67f7256007289cf436785f923529"),
        (
            EncoderSpec("timm:resnet10t", "", 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            "8b190f8818405f09fac18d8e86ada808143487e54410b8a8d93944d4d29d0e7a",
        ),
    ],
)
def test_fingerprints_are_those_of_version_0_1_0(tmp_path, spec, fingerprint):
    """Detectors that were fitted before stay valid. All weights are zero here."""
    if spec.architecture.startswith("timm:"):
        pytest.importorskip("timm", reason="timm is not installed: pip install 'sanitize-shards[timm]'")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in build_backbone(spec).state_dict().items()}
    safetensors.torch.save_file(zeros, tmp_path / "zeros.safetensors")
    spec = dataclasses.replace(spec, weights=str(tmp_path / "zeros.safetensors"))
    assert load_encoder(spec).fingerprint() == fingerprint


def test_the_encoder_is_frozen_and_in_eval_mode(encoder_spec):
    encoder = load_encoder(encoder_spec)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not any(m.training for m in encoder.modules())


def test_weights_of_another_architecture_are_named(encoder_spec):
    with pytest.raises(
        CheckpointError, match=r"does not fit architecture resnet34-cifar .*missing .*Correct `architecture`"
    ):
        load_encoder(dataclasses.replace(encoder_spec, architecture="resnet34-cifar"))
    with pytest.raises(CheckpointError, match=r"of another shape \(first: bn1.bias \(8,\) instead of \(16,\)"):
        load_encoder(dataclasses.replace(encoder_spec, width=16))


def test_thin_strided_convolutions_keep_the_layout_whose_gradient_is_safe(tmp_path):
    """oneDNN issue 6035: with channels last, 31 images and two threads this ends in "corrupted size vs. prev_size"."""
    encoders = [load_encoder(load_encoder_spec(str(write_encoder(tmp_path / str(w), width=w)))) for w in (4, 8, 16)]
    channels_last = [
        encoder.backbone.get_parameter("conv1.weight").is_contiguous(memory_format=torch.channels_last)
        for encoder in encoders
    ]
    assert channels_last == [False, False, True]
    thin = encoders[1]
    thin.requires_grad_(True)
    for _ in range(20):
        thin(torch.rand(31, 3, 32, 32)).sum().backward()


def test_an_unknown_architecture_lists_the_known_ones(encoder_spec):
    with pytest.raises(ConfigError, match=r"'vgg' is not known. Use one of resnet10, resnet18.*timm:<name>"):
        load_encoder(dataclasses.replace(encoder_spec, architecture="vgg"))


class Bomb:
    def __reduce__(self):
        return (open, ("pwned", "w"))


def test_a_pickled_checkpoint_is_refused_and_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Bomb()}, "evil.pth")
    with pytest.raises(
        CheckpointError, match=r"refused, it does not load as plain tensors .* can run any code.*convert it once"
    ):
        load_encoder(dataclasses.replace(SPEC, weights="evil.pth"))
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="refused"):
        load_encoder(dataclasses.replace(SPEC, weights="raw.pth"))
    assert not (tmp_path / "pwned").exists()


def test_damaged_and_empty_weight_files_say_so(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0notjson!")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_encoder(dataclasses.replace(SPEC, weights=str(tmp_path / "bad.safetensors")))
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no named tensors in it"):
        load_encoder(dataclasses.replace(SPEC, weights=str(tmp_path / "empty.pth")))


def test_nan_weights_are_refused(tmp_path, encoder_spec):
    tensors = safetensors.torch.load_file(encoder_spec.weights)
    tensors["conv1.weight"][0] = float("nan")
    safetensors.torch.save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="contains NaN or infinite weights"):
        load_encoder(dataclasses.replace(encoder_spec, weights=str(tmp_path / "nan.safetensors")))


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50", "resnet18-cifar"])
def test_published_architectures_are_torchvisions(architecture):
    import torchvision

    backbone = build_backbone(EncoderSpec(architecture))
    reference = getattr(torchvision.models, architecture.removesuffix("-cifar"))()
    reference.fc = torch.nn.Identity()
    shapes = {k: v.shape for k, v in reference.state_dict().items()}
    if architecture.endswith("cifar"):
        shapes["conv1.weight"] = torch.Size((64, 3, 3, 3))
    assert {k: v.shape for k, v in backbone.state_dict().items()} == shapes


def test_timm_models_load_when_timm_is_there(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=0)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "t.safetensors")
    encoder = load_encoder(EncoderSpec("timm:resnet10t", weights=str(tmp_path / "t.safetensors"), image_size=64))
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, model.num_features)


# ---------------------------------------------------------------- torch.export


@pytest.fixture
def exported(tmp_path):
    torch.manual_seed(2)
    backbone = build_backbone(SPEC).eval()
    program = torch.export.export(
        backbone, (torch.randn(2, 3, 16, 16),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    torch.export.save(program, tmp_path / "e.pt2")
    return backbone, tmp_path / "e.pt2"


def exported_spec(path):
    return dataclasses.replace(SPEC, architecture=f"exported:{path}")


def test_an_exported_program_is_a_black_box_encoder(exported):
    backbone, path = exported
    encoder = load_encoder(exported_spec(path))
    with torch.inference_mode():
        torch.testing.assert_close(encoder(IMAGES), Encoder(backbone, SPEC)(IMAGES))
    assert len(encoder.fingerprint()) == 64


def rewrite(path, change):
    """The archive with every entry passed through `change(name, data)`; None drops it."""
    with zipfile.ZipFile(path) as source:
        entries = {name: change(name, source.read(name)) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for name, data in entries.items():
            if data is not None:
                target.writestr(name, data)


def test_an_exported_program_never_unpickles(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, path = exported
    rewrite(path, lambda name, data: pickle.dumps(Bomb()) if "sample_inputs" in name else data)
    load_encoder(exported_spec(path))  # sample inputs are not needed, so they are not read
    assert not (tmp_path / "pwned").exists()
    rewrite(path, lambda _, data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1))
    with pytest.raises(CheckpointError, match="refused, it holds pickled weights"):
        load_encoder(exported_spec(path))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (b"torch.ops.aten.flatten.using_ints", b"torch.os.system", "refused, it calls 'torch.os.system'"),
        (b"positive=True, integer=True)", b"positive=exit())", "refused, it holds the shape expression"),
    ],
)
def test_an_exported_program_with_other_code_is_refused(exported, before, after, words):
    _, path = exported
    rewrite(path, lambda _, data: data.replace(before, after))
    with pytest.raises(CheckpointError, match=words):
        load_encoder(exported_spec(path))


def test_a_file_that_is_no_archive_says_how_to_write_one(tmp_path):
    (tmp_path / "e.pt2").write_bytes(b"hello")
    with pytest.raises(
        CheckpointError, match=r"cannot be loaded as a torch.export archive .* Write it with torch.export.save"
    ):
        load_encoder(exported_spec(tmp_path / "e.pt2"))


# ---------------------------------------------------------------- a module of one's own


class TakesItems(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :4] if images.sum().item() > 0 else images.flatten(1)[:, :4] * 2


class GivesPairs(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1), images


def test_any_module_becomes_an_encoder(tmp_path):
    torch.manual_seed(3)
    convolution = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
    module = torch.nn.Sequential(convolution, torch.nn.Dropout(0.5), torch.nn.Linear(128, 10)).train()
    spec = export_encoder(module, tmp_path / "own", image_size=16, mean=SPEC.mean, std=SPEC.std)
    assert module.training  # as it was
    encoder = load_encoder(spec)
    with torch.inference_mode():
        normalised = (IMAGES - encoder.mean) / encoder.std
        torch.testing.assert_close(encoder(IMAGES), module.eval()(normalised))
        assert encoder(IMAGES[:1]).shape == (1, 10)
    assert spec == load_encoder_spec(str(tmp_path / "own" / "encoder.yaml"))
    other = export_encoder(module, tmp_path / "other", image_size=16, mean=(0, 0, 0), std=SPEC.std)
    assert load_encoder(other).fingerprint() != encoder.fingerprint()


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (TakesItems(), r"TakesItems: cannot be exported \(.*use tensor operations alone"),
        (GivesPairs(), r"GivesPairs: gives tuple, embeddings \(B, D\) were expected. Wrap it"),
        (torch.nn.ReLU(), r"ReLU: gives a tensor of shape \(3, 3, 16, 16\), embeddings"),
        (torch.nn.Linear(5, 2), r"Linear: cannot be exported \(.*must take images \(B, 3, S, S\)"),
    ],
)
def test_a_module_that_cannot_be_one_says_why(tmp_path, module, words):
    with pytest.raises(ConfigError, match=words):
        export_encoder(module, tmp_path / "own", image_size=16, mean=SPEC.mean, std=SPEC.std)
    assert not (tmp_path / "own").exists()
