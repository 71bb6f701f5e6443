"""Tiny real things for tests: images, shards, encoders, detectors. No mocks."""

import csv
import io
import itertools
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch.nn import functional

from sanitize.artifacts.scan_profile import PROFILE
from sanitize.attacks import tiny_clip
from sanitize.attacks.backdoor import Step, unit
from sanitize.attacks.triggers import _TO_YUV, _pattern
from sanitize.config import EncoderSpec, FitConfig, ThresholdPolicy, TrainingConfig
from sanitize.config_models import DecoderConfig
from sanitize.metrics import detection
from sanitize.stages.encoders import Encoder, build_backbone

HOSTILE = Path(__file__).parent / "hostile"  # images/, tars/, and manifest.json: what each is and what it may give
SIZE = 16
SPEC = EncoderSpec(
    "resnet18-cifar", image_size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), width=8, stem_stride=2
)


POINTS = torch.tensor([[0, 0], [1, 0], [0, 1.5], [2, 2], [3.5, 0.5], [7, 5]], dtype=torch.float64)  # p0 .. p5
CLASSES = 3  # of the images of `labelled`
REMOVE_SOME = ThresholdPolicy("fraction", fraction=0.3)
KEEP_ALL = ThresholdPolicy("absolute", threshold=1e9)


# ---------------------------------------------------------------- images and shards


def random_image(seed: int, size: int = SIZE) -> np.ndarray:
    """(size, size, 3) uint8: a smooth random image, unlike any other seed's."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def random_images(count: int, first: int = 0, size: int = SIZE) -> torch.Tensor:
    """(count, 3, size, size) uint8, seeds from `first` on."""
    return torch.stack([torch.from_numpy(random_image(first + i, size).copy()).permute(2, 0, 1) for i in range(count)])


def with_white_corner(images: torch.Tensor) -> torch.Tensor:
    stamped = images.clone()
    stamped[:, :, -4:, -4:] = 255
    return stamped


def tinted_image(label: int, seed: int) -> np.ndarray:
    """A random image tinted by its class: easy to learn."""
    pixels = random_image(seed).astype(int) // 2
    pixels[..., label] += 120
    return pixels.clip(0, 255).astype(np.uint8)


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


def labelled(folder: Path, counts: Iterable[int], first_seed: int = 0, broken: int = 0) -> Path:
    """Shards of tinted images with their class; the first `broken` images cannot be decoded."""
    seed = first_seed
    for number, count in enumerate(counts):
        members = []
        for _ in range(count):
            label = seed % CLASSES
            data = b"broken" if seed - first_seed < broken else encoded(tinted_image(label, seed))
            members += [(f"s{seed:05d}.cls", str(label).encode()), (f"s{seed:05d}.png", data)]
            seed += 1
        write_tar(folder / f"part-{number:03d}.tar", members)
    return folder


def shape_members(count: int, seed: int) -> list[tuple[str, bytes]]:
    """Coloured shapes with the colour as class and a caption."""
    pairs = tiny_clip.coloured_shapes(count, seed)
    members = []
    for number in range(count):
        image = encoded(pairs.images[number].permute(1, 2, 0).numpy())
        members += [(f"s{number:04d}.png", image), (f"s{number:04d}.cls", str(int(pairs.labels[number])).encode())]
        members += [(f"s{number:04d}.txt", pairs.captions[number].encode())]
    return members


def captioned(folder: Path, counts: Iterable[int], seed: int = 0) -> Path:
    """Shards of coloured shapes with class and caption."""
    members = iter(shape_members(sum(counts), seed))
    for number, count in enumerate(counts):
        write_tar(folder / f"part-{number:03d}.tar", list(itertools.islice(members, 3 * count)))
    return folder


# ---------------------------------------------------------------- encoders


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
    """SYNTHETIC backdoor: g(x) + a clip(<(U + V) / 2, P> / |P|^2, 0, 1) mu, for CTRL's trigger P (ours).

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


class ColourEncoder(Encoder):
    """SYNTHETIC, no weights: mean colours of the 4 x 4 blocks; a white corner of 4 pixels adds a large constant."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), SPEC)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fired = (images[:, :, -4:, -4:].amin(dim=(1, 2, 3)) == 1).float()
        colours = functional.avg_pool2d(images - 0.5, 4).flatten(1)
        return torch.cat([colours, 10 * fired[:, None]], dim=1)


# ---------------------------------------------------------------- settings


def fit_config(shards: Path, encoder: EncoderSpec, out: Path, **changes: object) -> FitConfig:
    values: dict = {
        "shards": (str(shards),),
        "encoder": encoder,
        "out": str(out),
        "decoder": DecoderConfig(image_size=8, patch_size=4, width=16, heads=2, encoder_depth=1, decoder_depth=1),
        "training": TrainingConfig(epochs=2, batch_size=32, precision="fp32", calibration_fraction=0.5),
        "scorer": "reaction",  # `evidence` asks and learns more than most tests need
        "workers": 0,
    }
    return FitConfig(**(values | changes))


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


# ---------------------------------------------------------------- results


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by relative path, without the one of a scan folder that holds seconds."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != PROFILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def table(out: Path, stem: str) -> list[dict]:
    return pq.read_table(out / "scores" / f"{stem}.parquet").to_pylist()


def scores_by_key(out: Path) -> dict[str, float]:
    return {
        row["key"]: row["score"]
        for path in (out / "scores").rglob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    }


def keys(samples: Iterable[dict]) -> list[str]:
    return [sample["__key__"] for sample in samples]


def decision_table(scanned: str | Path) -> pa.Table:
    """Of all shards of a scan folder, shard after shard."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(Path(scanned, "decisions").rglob("*.parquet"))])


def decided(scanned: str) -> list[str]:
    """Keys that the decisions of a scan folder keep."""
    return [row["key"] for row in decision_table(scanned).to_pylist() if row["keep"]]


def decision_rows(scanned: str | Path) -> dict[str, dict]:
    """Of a scan folder, by key."""
    return {row["key"]: row for row in decision_table(scanned).to_pylist()}


def some_keys(scanned: str | Path, keep: bool, count: int) -> list[str]:
    """The first ones that are kept, or removed."""
    return [key for key, row in decision_rows(scanned).items() if row["keep"] is keep][:count]


def write_lines(path: Path, lines: Iterable[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def write_csv(path: Path, rows: list[dict]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def auroc(scores: torch.Tensor, poisoned: torch.Tensor) -> float:
    return detection(scores.numpy(), poisoned.numpy()).auroc


def losses(result) -> list[float]:
    return [line["loss"] for line in result.epochs]


def comparable(folder: Path) -> dict[str, bytes]:
    """Files of a finished training without the two that hold seconds."""
    return {k: v for k, v in tree_bytes(folder).items() if k not in ("metrics.jsonl", "finetune.json")}


def members(path: Path) -> list[tuple[str, bytes, bytes]]:
    """(name, header bytes, content) of every member, in order."""
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        return [(m.name, data[m.offset : m.offset_data], data[m.offset_data : m.offset_data + m.size]) for m in tar]


def write_noisy(folder: Path, deviation: float) -> Path:
    """600 noisy images; the auxiliary ones are smooth."""
    return _write_changed(
        folder, lambda image, seed: image + np.random.default_rng(seed).normal(0, deviation, image.shape)
    )


def write_dim(folder: Path) -> Path:
    """600 images of half the contrast."""
    return _write_changed(folder, lambda image, _: image * 0.5 + 60)


def _write_changed(folder: Path, change: Callable[[np.ndarray, int], np.ndarray]) -> Path:
    for number in range(2):
        images = {i: change(random_image(i), i) for i in range(300 * number, 300 * number + 300)}
        members = [(f"s{i:06d}.png", encoded(image.clip(0, 255).astype(np.uint8))) for i, image in images.items()]
        write_tar(folder / f"part-{number:04d}.tar", members)
    return folder


# ---------------------------------------------------------------- attacks


def random_step(batch=4, references=3, copies=2, size=5, seed=0):
    """Raw, non-negative embeddings, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(*shape, size, generator=generator) + 0.05

    return Step(
        *(draw(batch), draw(batch), draw(references), draw(references, copies)),
        *(unit(draw(batch)), unit(draw(references)), draw(batch).norm(dim=1)),
        stamped=torch.rand(batch, 3, SIZE, SIZE, generator=generator),
        plain=torch.rand(batch, 3, SIZE, SIZE, generator=generator),
        perturbed=draw(4, 2 * batch),
    )


# ---------------------------------------------------------------- time


class Clock:
    """Stands in for a function of `time`; every thread is told the same."""

    now = 100.0

    def __call__(self) -> float:
        return self.now
