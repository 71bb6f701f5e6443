"""The predictor inside a detector folder: its shape in detector.json, its tensors in decoder.safetensors."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from sanitize.errors import check
from sanitize.stages.agreement import IMAGE_HASH, NONE, RESIDUALS, Departures
from sanitize.stages.prediction import Departure, LinearEye, PredictionTarget, Predictor, Student

PREFIX = "predictor."  # of the names of its tensors


@dataclass(frozen=True)
class PredictorShape:
    """outputs, components: of what it predicts; width: of a student, 0 with a reference encoder, that gives `features`."""

    outputs: int
    eye_size: int
    width: int
    features: int
    explained: float

    def __post_init__(self) -> None:
        check(1 <= self.outputs <= 1 << 16, f"predictor.outputs: {self.outputs} is not between 1 and 2^16.")
        check(0 <= self.eye_size <= 4096, f"predictor.eye_size: {self.eye_size} is not between 0 and 4096.")
        check(0 <= self.width <= 4096, f"predictor.width: {self.width} is not between 0 and 4096.")
        check(0 <= self.features <= 1 << 20, f"predictor.features: {self.features} is not between 0 and 2^20.")
        check(self.explained <= 1, f"predictor.explained: {self.explained} is above 1.")


def named_tensors(predictor: Predictor) -> dict[str, Tensor]:
    return {PREFIX + name: tensor.contiguous().cpu() for name, tensor in predictor.state_dict().items()}


def shape_of(predictor: Predictor) -> PredictorShape:
    eye = predictor.eye
    return PredictorShape(
        outputs=len(predictor.get_buffer("target_scale")),
        eye_size=predictor.eye_size,
        width=eye.width if isinstance(eye, Student) else 0,
        features=eye.linear.in_features - 1 if isinstance(eye, LinearEye) else 0,
        explained=predictor.explained,
    )


def filled_predictor(shape: PredictorShape, embedding_size: int, tensors: Mapping[str, Tensor]) -> Predictor:
    """Built once it is known that the tensors of the file fill it: a description alone costs no memory. Raises ValueError."""
    state = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
    build = functools.partial(_empty_predictor, shape, embedding_size)
    with torch.device("meta"):
        wanted = build().state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape or state[name].dtype != tensor.dtype:
            raise ValueError(f"{PREFIX}{name} of shape {tuple(tensor.shape)} is not in it")
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{PREFIX}{name} holds numbers that are not finite")
    predictor = build()
    predictor.load_state_dict(state)
    return predictor.eval().requires_grad_(False)


def _empty_predictor(shape: PredictorShape, embedding_size: int) -> Predictor:
    outputs = shape.outputs
    eye = Student(outputs, shape.width) if shape.width else LinearEye(shape.features, outputs)
    target = PredictionTarget(
        torch.empty(embedding_size),
        torch.empty(embedding_size, outputs - 1),
        torch.empty(outputs),
        torch.empty(outputs),
    )
    departure = Departure(
        *(torch.empty(shape) for shape in ((outputs,), (outputs, outputs)) * 2)
    )  # each its own memory
    return Predictor(eye, target, departure, shape.explained, shape.eye_size)


def departures_of(calibration: pa.Table) -> Departures:
    """Of the calibration images, from calibration.parquet."""
    if RESIDUALS not in calibration.column_names:
        return NONE
    return Departures.from_bytes(*(calibration.column(name).to_pylist() for name in (RESIDUALS, IMAGE_HASH)))
