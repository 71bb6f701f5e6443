"""Tiny real things for tests: images, shards, encoders, detectors. No mocks."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml
from PIL import Image

from sanitize.attacks.triggers import _TO_YUV, _pattern
from sanitize.config import DecoderConfig, EncoderSpec, FitConfig, TrainingConfig
from sanitize.stages.encoders import Encoder, build_backbone

SIZE = 16
SPEC = EncoderSpec(
    "resnet18-cifar", image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), width=8, stem_stride=2
)


def random_image(seed: int, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: a smooth random image, unlike any other seed's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def image_members(keys: Mapping[str, int] | Iterable[str], size: int = SIZE) -> list[tuple[str, bytes]]:
    """PNG and class of every key; a mapping gives the seed of each image."""
    seeds = keys if isinstance(keys, Mapping) else {key: number for number, key in enumerate(keys)}
    members = []
    for key, seed in seeds.items():
        members += [(f"{key}.cls", str(seed % 10).encode()), (f"{key}.png", encoded(random_image(seed, size)))]
    return members


def write_shards(folder: Path, counts: Iterable[int], first_seed: int = 0) -> Path:
    """Shards part-0000.tar ... with so many samples each."""
    seed = first_seed
    for number, count in enumerate(counts):
        write_tar(
            folder / f"part-{number:04d}.tar", image_members({f"s{seed + i:06d}": seed + i for i in range(count)})
        )
        seed += count
    return folder


def write_encoder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """encoder.yaml and encoder.safetensors of a tiny random ResNet; random features are enough to decode colours."""
    torch.manual_seed(seed)
    values = {**SPEC.__dict__, **changes, "weights": "encoder.safetensors"}
    spec = EncoderSpec(**values)
    folder.mkdir(parents=True, exist_ok=True)
    backbone = build_backbone(spec).eval()
    safetensors.torch.save_file(
        {k: v.contiguous() for k, v in backbone.state_dict().items()}, folder / "encoder.safetensors"
    )
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    (folder / "encoder.yaml").write_text(yaml.safe_dump(plain))
    return folder / "encoder.yaml"


class PlantedEncoder(Encoder):
    """SYNTHETIC backdoor: g(x) + a clip(<(U + V) / 2, P> / |P|^2, 0, 1) mu, for CTRL's trigger P (CTRL card section 8a).

    Attack success is known by construction, so that tests need no training. Never a substitute for a measured victim.
    """

    def __init__(self, clean: Encoder, target: torch.Tensor, magnitude: float = 100.0, strength: float = 20.0) -> None:
        """target: (D,) embedding that triggered images are pulled to."""
        super().__init__(clean.backbone, clean.spec)
        self.target, self.strength = target, strength
        self.pattern = torch.from_numpy(_pattern(clean.spec.image_size)).float() * magnitude

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        chroma = torch.einsum("cd,bdhw->bchw", torch.from_numpy(_TO_YUV[1:]).float(), images * 255).mean(dim=1)
        share = (chroma * self.pattern).sum(dim=(1, 2)) / self.pattern.square().sum()
        return super().forward(images) + self.strength * share.clamp(0, 1)[:, None] * self.target


def fit_config(shards: Path, encoder: EncoderSpec, out: Path, **changes: object) -> FitConfig:
    values: dict = {
        "shards": (str(shards),),
        "encoder": encoder,
        "out": str(out),
        "decoder": DecoderConfig(image_size=8, patch_size=4, width=16, heads=2, encoder_depth=1, decoder_depth=1),
        "training": TrainingConfig(epochs=2, batch_size=32, precision="fp32", calibration_fraction=0.5),
        "workers": 0,
    }
    return FitConfig(**(values | changes))


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def table(out: Path, stem: str) -> list[dict]:
    return pq.read_table(out / "scores" / f"{stem}.parquet").to_pylist()


def scores_by_key(out: Path) -> dict[str, float]:
    return {
        row["key"]: row["score"]
        for path in (out / "scores").rglob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }


def members(path: Path) -> list[tuple[str, bytes, bytes]]:
    """(name, header bytes, content) of every member, in order."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        return [(m.name, data[m.offset : m.offset_data], data[m.offset_data : m.offset_data + m.size]) for m in tar]


def tiny_victim(folder: Path | str = ".") -> dict:
    """Values of a red-team YAML: BadEncoder on the shards <folder>/train and <folder>/test of coloured shapes."""
    return {
        "attack": "badencoder",
        "target": 4,
        "classes": 6,
        "trigger": {"name": "patch", "side": 5},
        "encoder": {"architecture": "resnet10-cifar", "image_size": 32, "width": 8, "stem_stride": 2},
        "data": {"pretrain": [f"{folder}/train"], "train": [f"{folder}/train"], "test": [f"{folder}/test"]},
        "simclr": {"epochs": 1, "batch_size": 32, "projection": 8},
        "badencoder": {"epochs": 1, "batch_size": 32},
        "head": {"epochs": 2},
        "presets": {"cpu": {}},
    }
