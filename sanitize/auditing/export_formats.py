"""What other tools read beside the images of an export: FiftyOne's data set folder, and a datasource of LightlyOne.

FiftyOne: https://docs.voxel51.com/user_guide/import_datasets.html#fiftyonedataset, the form without `version` in metadata.json: it needs
no ids and no schema of one release, and every release of FiftyOne takes it for its own (LegacyFiftyOneDatasetImporter).
LightlyOne: https://docs.lightly.ai/docs/custom-embeddings and /work-with-metadata; images/ is the input datasource, the folder itself the
Lightly datasource.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from sanitize import storage
from sanitize.stages.reasons import without_p_values

Row = dict[str, Any]  # of one sample: a column of samples.parquet by name
IMAGES = "images"
# columns that LightlyOne shows: name → (type, what is shown of samples without a value)
LIGHTLY_COLUMNS: dict[str, tuple[str, Any]] = {
    "keep": ("CATEGORICAL_BOOLEAN", True),
    "reason": ("CATEGORICAL_STRING", ""),
    "score": ("NUMERIC_FLOAT", 0.0),
    "p_value": ("NUMERIC_FLOAT", 1.0),
    "threshold": ("NUMERIC_FLOAT", 0.0),
    "label": ("CATEGORICAL_STRING", ""),
    "caption": ("CATEGORICAL_STRING", ""),
    "shard": ("CATEGORICAL_STRING", ""),
    "key": ("CATEGORICAL_STRING", ""),
    "index": ("NUMERIC_INT", 0),
}


def write_fiftyone(out: str, rows: Sequence[Row]) -> None:
    """metadata.json and samples.json. rows: of the samples that have an image."""
    about = {"media_type": "image", "info": {"made_by": "sanitize export"}}
    storage.write_json(storage.join(out, "metadata.json"), about)
    _write_json(storage.join(out, "samples.json"), {"samples": [_fiftyone_sample(row) for row in rows]})


def _fiftyone_sample(row: Row) -> Row:
    """Columns as fields, those without a value left out: a field is of one type."""
    decision = "kept" if row["keep"] else "removed"
    tags = [decision, without_p_values(row["reason"])] if row["reason"] else [decision]
    fields = {
        name: value for name, value in row.items() if value is not None and name not in ("file", "missing", "label")
    }
    label = {"label": {"_cls": "Classification", "label": row["label"]}} if row["label"] else {}
    return {"filepath": row["file"], "tags": tags, **fields, **label}


def write_lightly(out: str, rows: Sequence[Row]) -> None:
    """.lightly/embeddings/custom_embeddings.csv and .lightly/metadata/. rows: of the samples that have an image."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    size = len(rows[0]["embedding"]) if rows else 0
    lines.writerow(["filenames", *(f"embedding_{number}" for number in range(size)), "labels"])
    lines.writerows([_lightly_name(row), *row["embedding"], 0] for row in rows)  # 0: that is what LightlyOne asks for
    storage.write_bytes(storage.join(out, ".lightly", "embeddings", "custom_embeddings.csv"), text.getvalue().encode())
    metadata = storage.join(out, ".lightly", "metadata")
    _write_json(storage.join(metadata, "schema.json"), _lightly_schema())
    for row in rows:
        values = {name: row[name] for name in LIGHTLY_COLUMNS if row[name] is not None}
        name = _lightly_name(row).rpartition(".")[0]
        _write_json(storage.join(metadata, f"{name}.json"), {"type": "image", "metadata": values})


def _lightly_schema() -> list[Row]:
    return [
        {"name": name, "path": name, "defaultValue": usual, "valueDataType": kind}
        for name, (kind, usual) in LIGHTLY_COLUMNS.items()
    ]


def _lightly_name(row: Row) -> str:
    """Below the input datasource."""
    return str(row["file"]).removeprefix(f"{IMAGES}/")


def _write_json(path: str, value: Any) -> None:
    storage.write_bytes(path, (json.dumps(value, allow_nan=False) + "\n").encode())


FORMATS: dict[str, Callable[[str, Sequence[Row]], None]] = {
    "folder": lambda *_: None,  # images and samples.parquet are there in every format
    "fiftyone": write_fiftyone,
    "lightly": write_lightly,
}
