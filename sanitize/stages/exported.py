"""torch.export archives (.pt2) as black-box encoders, without running anything the file brings along.

`torch.export.load` unpickles sample inputs and some weights, resolves operator names with getattr and evaluates shape
expressions. So the archive is checked first and handed over without its sample inputs and guards: only ATen operators,
raw weights and plain shape arithmetic pass.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sanitize import storage
from sanitize.errors import CheckpointError

_OPERATOR = re.compile(
    r"torch\.ops\.aten\.\w+(\.\w+)?|torch\.sym_(int|float|max|min|not|ite)|"
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge)"
)
_EXPRESSION = re.compile(
    r"(Symbol\('[su]\d+'(, (positive|integer|nonnegative)=True)*\)|Integer\(-?\d+\)|Add|Mul|Pow|Max|Min|Mod|FloorDiv|"
    r"[su]\d+|[-+*/(), ]|\d+)+"
)
_ENTRY = re.compile(
    r"models/model\.json|data/weights/\w+(\.\w+)?|data/constants/\w+(\.\w+)?|data/sample_inputs/model\.pt|"
    r"archive_format|archive_version|\.data/\w+|byteorder|\.format_version|extra/.*|version"
)


def load_exported(path: str) -> nn.Module:
    """The exported program as a module: (B, 3, S, S) → (B, D). Raises CheckpointError when it is not plainly safe."""
    try:
        archive = _checked_copy(storage.read_bytes(path), path)
        module: nn.Module = torch.export.load(archive).module()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive fails in many ways
        raise CheckpointError(
            f"{path}: cannot be loaded as a torch.export archive ({str(error).splitlines()[0] if str(error) else error!r}). "
            "Write it with torch.export.save(torch.export.export(model, (images,), dynamic_shapes=...), path)."
        ) from None
    return module


def _checked_copy(data: bytes, path: str) -> io.BytesIO:
    copy = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for entry in source.namelist():
            name = entry.partition("/")[2]
            if not _ENTRY.fullmatch(name):
                raise CheckpointError(f"{path}: refused, it holds {entry!r}, which is not needed for a plain encoder.")
            content = b"" if name == "data/sample_inputs/model.pt" else source.read(entry)
            if name.endswith(".json"):
                content = _checked_json(json.loads(content), path)
            target.writestr(entry, content)
    copy.seek(0)
    return copy


def _checked_json(value: dict[str, Any], path: str) -> bytes:
    how = "Export the encoder again in eval mode with torch.export.export(...).run_decompositions()."
    for key, item in _pairs(value):
        if key == "use_pickle" and item is not False:
            raise CheckpointError(f"{path}: refused, it holds pickled weights, which can run any code. {how}")
        if key == "target" and not (isinstance(item, str) and _OPERATOR.fullmatch(item)):
            raise CheckpointError(f"{path}: refused, it calls {item!r}, which is not a plain tensor operator. {how}")
        if key == "expr_str" and not (isinstance(item, str) and _EXPRESSION.fullmatch(item)):
            raise CheckpointError(f"{path}: refused, it holds the shape expression {item!r}. {how}")
    if "guards_code" in value:
        value["guards_code"] = []
    return json.dumps(value).encode()


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value at any depth. Operator calls stand under "target" next to "inputs"."""
    if isinstance(value, dict):
        if "target" in value and "inputs" in value:
            yield "target", value["target"]
        yield from ((key, item) for key, item in value.items() if key in ("use_pickle", "expr_str"))
        for item in value.values():
            yield from _pairs(item)
    elif isinstance(value, list):
        for item in value:
            yield from _pairs(item)
