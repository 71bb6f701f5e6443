"""A detector folder that somebody else made: it loads, or one message says what is wrong; nothing runs, nothing fills the memory."""

import hashlib
import json
import math
import shutil
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from sanitize import storage
from sanitize.artifacts.detector_folder import CALIBRATION, DESCRIPTION, WEIGHTS, load_detector
from sanitize.errors import CheckpointError, SanitizeError

ODD: tuple[Any, ...] = (None, -1, 0, 2**70, 1e308, math.nan, True, "", "x", "../../x", [], [None], {}, {"a": 1}, [[[]]])


@pytest.fixture
def folder(detector, tmp_path):
    shutil.copytree(detector, tmp_path / "d")
    return tmp_path / "d"


def rewrite(folder, name: str, data: bytes) -> None:
    """Replace a file and its hash: whoever can change one can change the other."""
    (folder / name).write_bytes(data)
    values = json.loads((folder / DESCRIPTION).read_text())
    values["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(values))


def rewrite_tensors(folder, change) -> None:
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    change(tensors)
    rewrite(folder, WEIGHTS, safetensors.torch.save(tensors))


def places(values, path=()):
    """Paths of every value of nested settings, blocks included."""
    for key in values:
        yield (*path, key)
        if isinstance(values[key], dict):
            yield from places(values[key], (*path, key))


def test_no_value_in_the_description_gives_a_traceback(folder):
    path = folder / DESCRIPTION
    whole = json.loads(path.read_text())
    refused = 0
    for place in places(whole):
        for odd in (*ODD, "absent"):
            values = json.loads(json.dumps(whole))
            block = values
            for key in place[:-1]:
                block = block[key]
            if odd == "absent":
                del block[place[-1]]
            else:
                block[place[-1]] = odd
            path.write_text(json.dumps(values))
            try:
                load_detector(str(folder))
            except SanitizeError as error:
                assert str(path.parent) in str(error)
                refused += 1
    assert refused > 300


TENSORS = {
    "absent": lambda tensors, name: tensors.pop(name),
    "not a number": lambda tensors, name: tensors[name].view(-1)[:1].fill_(math.nan),
    "infinite": lambda tensors, name: tensors[name].view(-1)[:1].fill_(math.inf),
    "another shape": lambda tensors, name: tensors.update({name: torch.zeros(3, 1, 1)}),
}


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize(
    "name", ["decoder.mask_token", "references.mean", "clean.centre", "clean.precision", "clean.bank"]
)
def test_a_tensor_that_is_not_as_fit_writes_it_is_refused(folder, name, case):
    rewrite_tensors(folder, lambda tensors: TENSORS[case](tensors, name))
    with pytest.raises(CheckpointError, match=r"no usable detector \(.*\)\. Run `sanitize fit` again\."):
        load_detector(str(folder))


CALIBRATIONS = {
    "no column": {"score": pa.array([1.0], pa.float32())},
    "no rows": {"score": pa.array([], pa.float32()), "first_look": pa.array([], pa.float32())},
    "text": {"score": pa.array(["x"]), "first_look": pa.array(["x"])},
    "a hole": {"score": pa.array([1, None], pa.float32()), "first_look": pa.array([1, 2], pa.float32())},
    "not a number": {"score": pa.array([np.nan], pa.float32()), "first_look": pa.array([1.0], pa.float32())},
}


@pytest.mark.parametrize("case", CALIBRATIONS)
def test_a_calibration_that_is_not_as_fit_writes_it_is_refused(folder, case):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(CALIBRATIONS[case]), sink)
    rewrite(folder, CALIBRATION, sink.getvalue().to_pybytes())
    with pytest.raises(CheckpointError, match="no usable detector"):
        load_detector(str(folder))


@pytest.mark.parametrize("name", [WEIGHTS, CALIBRATION])
@pytest.mark.parametrize("data", [b"", b"x", b"\xff" * 64, b"PAR1PAR1"], ids=["empty", "short", "noise", "magic"])
def test_files_of_another_kind_are_refused(folder, name, data):
    rewrite(folder, name, data)
    with pytest.raises(CheckpointError, match="no usable detector"):
        load_detector(str(folder))


def test_a_description_of_a_huge_decoder_costs_no_memory(folder):
    values = storage.read_json(str(folder / DESCRIPTION))
    values["decoder"] |= {"width": 16384, "encoder_depth": 256, "decoder_depth": 256}
    (folder / DESCRIPTION).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"of shape \(.*16384.*\) is not in it"):
        load_detector(str(folder))


def test_deeply_nested_json_is_refused(folder):
    (folder / DESCRIPTION).write_text("[" * 100_000)
    with pytest.raises(SanitizeError, match="not valid JSON"):
        load_detector(str(folder))
