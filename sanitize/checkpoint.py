"""The detector folder: what `fit` writes and `scan` reads."""

import hashlib
import importlib.metadata
import math
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

import sanitize
from sanitize import storage
from sanitize.config import DecoderConfig, EncoderSpec, altered_share, from_mapping, to_mapping
from sanitize.errors import CheckpointError
from sanitize.stages.decoder import Decoder
from sanitize.stages.encoders import Encoder, load_encoder
from sanitize.stages.images import DECODE_PATH
from sanitize.stages.reactions import CleanSignature
from sanitize.stages.scoring import References, Scorer
from sanitize.stages.text import TextEncoder

FORMAT_VERSION = 3


@dataclass(frozen=True)
class Detector:
    """Everything a scan needs. Scores and first looks are those of held-out auxiliary images, aligned, (n,) float32.

    clean: of the scorer `reaction`, else None.
    """

    encoder: EncoderSpec
    encoder_fingerprint: str
    decoder: Decoder
    references: References
    clean: CleanSignature | None
    scores: NDArray[np.float32]
    first_looks: NDArray[np.float32]  # of the scorer `reaction`, else the scores again
    scorer: str
    mask_ratio: float
    seed: int
    summary: dict[str, Any]  # training and calibration, for people
    fingerprint: str = ""  # of the folder; known after save or load

    def gate(self, effort: str) -> float:
        """The first look below which `effort` does not look twice: the quantile that its share of clean pictures exceeds."""
        share = altered_share(effort)
        if self.clean is None or share == 1:
            return -math.inf
        return float(np.quantile(self.first_looks, 1 - share))

    def calibration(self, effort: str) -> NDArray[np.float32]:
        """The null distribution of the score under `effort`, sorted upwards."""
        gate = self.gate(effort)
        return np.sort(np.where(self.first_looks >= gate, self.scores, self.first_looks - np.float32(gate)))


def save(detector: Detector, folder: str) -> Detector:
    """Write the folder, detector.json last. Returns the detector with its fingerprint."""
    tensors = {f"decoder.{name}": t.contiguous().cpu() for name, t in detector.decoder.state_dict().items()}
    tensors |= {"references.mean": detector.references.mean, "references.mean_square": detector.references.mean_square}
    if detector.clean:
        tensors |= {f"clean.{name}": tensor.contiguous() for name, tensor in vars(detector.clean).items()}
    weights = safetensors.torch.save(tensors)
    storage.write_bytes(storage.join(folder, "decoder.safetensors"), weights)
    sink = pa.BufferOutputStream()
    columns = {"score": detector.scores, "first_look": detector.first_looks}
    pq.write_table(pa.table({name: pa.array(values, pa.float32()) for name, values in columns.items()}), sink)
    calibration = sink.getvalue().to_pybytes()
    storage.write_bytes(storage.join(folder, "calibration.parquet"), calibration)
    storage.write_json(
        storage.join(folder, "detector.json"),
        {
            "format_version": FORMAT_VERSION,
            "decode_path": DECODE_PATH,
            "encoder": to_mapping(detector.encoder),
            "encoder_fingerprint": detector.encoder_fingerprint,
            "decoder": to_mapping(detector.decoder.config),
            "embedding_size": len(detector.decoder.embedding_mean),
            "scorer": detector.scorer,
            "mask_ratio": detector.mask_ratio,
            "seed": detector.seed,
            "summary": detector.summary,
            "versions": library_versions(),
            "sha256": {
                "decoder.safetensors": hashlib.sha256(weights).hexdigest(),
                "calibration.parquet": hashlib.sha256(calibration).hexdigest(),
            },
        },
    )
    return load(folder)


def load(folder: str) -> Detector:
    """Read a detector folder. Raises CheckpointError when it is missing, damaged or of another version."""
    path = storage.join(folder, "detector.json")
    if not storage.exists(path):
        raise CheckpointError(
            f"{folder}: no detector there (detector.json is missing). Run `sanitize fit` first, or give --detector."
        )
    values = storage.read_json(path)
    if values.get("format_version") != FORMAT_VERSION or values.get("decode_path") != DECODE_PATH:
        raise CheckpointError(
            f"{path}: written by another version of sanitize (format {values.get('format_version')}, decode path "
            f"{values.get('decode_path')}; this one uses {FORMAT_VERSION}, {DECODE_PATH}). Run `sanitize fit` again."
        )
    tensors = safetensors.torch.load(_checked(folder, "decoder.safetensors", values))
    decoder = Decoder(from_mapping(DecoderConfig, values["decoder"], path), values["embedding_size"])
    decoder.load_state_dict({n.removeprefix("decoder."): t for n, t in tensors.items() if n.startswith("decoder.")})
    table = pq.read_table(pa.BufferReader(_checked(folder, "calibration.parquet", values)))
    return Detector(
        encoder=from_mapping(EncoderSpec, values["encoder"], path),
        encoder_fingerprint=values["encoder_fingerprint"],
        decoder=decoder.eval().requires_grad_(False),
        references=References(tensors["references.mean"], tensors["references.mean_square"]),
        clean=_clean_signature(tensors),
        scores=table.column("score").to_numpy(),
        first_looks=table.column("first_look").to_numpy(),
        scorer=values["scorer"],
        mask_ratio=values["mask_ratio"],
        seed=values["seed"],
        summary=values["summary"],
        fingerprint=storage.file_sha256(path),
    )


def _clean_signature(tensors: dict[str, Tensor]) -> CleanSignature | None:
    found = {n.removeprefix("clean."): tensor for n, tensor in tensors.items() if n.startswith("clean.")}
    return CleanSignature(**found) if found else None


def _checked(folder: str, name: str, values: dict[str, Any]) -> bytes:
    data = storage.read_bytes(storage.join(folder, name))
    if hashlib.sha256(data).hexdigest() != values["sha256"][name]:
        raise CheckpointError(
            f"{folder}/{name}: does not match detector.json (changed or damaged). Run `sanitize fit` again."
        )
    return data


def load_matching_encoder(detector: Detector, spec: EncoderSpec | None) -> Encoder:
    """The encoder the detector was fitted to. Raises CheckpointError when the weights or the preprocessing differ."""
    spec = spec or detector.encoder
    encoder = load_encoder(spec)
    found = encoder.fingerprint()
    if found != detector.encoder_fingerprint:
        raise CheckpointError(
            f"the detector was fitted to another encoder: {spec.weights or spec.architecture} has fingerprint {found[:12]}, "
            f"the detector expects {detector.encoder_fingerprint[:12]}. Give the encoder it was fitted to, or run `sanitize fit` "
            "for this one."
        )
    return encoder


def scorer(
    detector: Detector,
    encoder: Encoder,
    precision: str,
    device: torch.device,
    *,
    effort: str = "thorough",
    text: TextEncoder | None = None,
) -> Scorer:
    return Scorer(
        encoder,
        detector.decoder,
        detector.references,
        name=detector.scorer,
        mask_ratio=detector.mask_ratio,
        seed=detector.seed,
        precision=precision,
        device=device,
        text=text,
        clean=detector.clean,
        gate=detector.gate(effort),
    )


def library_versions() -> dict[str, str]:
    names = ("torch", "torchvision", "pillow", "pyarrow", "ray")
    versions = {name: importlib.metadata.version(name) for name in names}
    return versions | {"sanitize": sanitize.__version__, "python": platform.python_version()}
