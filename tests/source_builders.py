"""Tiny real sources for `sanitize pack`, and how tests read them: image folders, Hugging Face tables."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import encoded, members, random_image

from sanitize.errors import ConfigError
from sanitize.sources import open_source
from sanitize.sources.samples import SourceSample, Wanted


def write_images(folder: Path, count: int, classes: Iterable[str] = ("cat", "dog")) -> dict[str, bytes]:
    """JPEG files in sub-folders, one a class; returns the bytes of each by path, in sorted order."""
    names, files = list(classes), {}
    for number in range(count):
        path = folder / names[number % len(names)] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random_image(number), "JPEG"))
        files[str(path.relative_to(folder))] = path.read_bytes()
    return dict(sorted(files.items()))


HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def hf_table(count: int, first: int = 0, classes: Iterable[str] = ("cat", "dog")) -> pa.Table:
    """As Hugging Face `datasets` writes images with a ClassLabel and a caption."""
    names = list(classes)
    rows = [
        {
            "image": {"bytes": encoded(random_image(i)), "path": f"{i}.png"},
            "label": i % len(names),
            "caption": f"photo {i}",
        }
        for i in range(first, first + count)
    ]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema([("image", HF_IMAGE), ("label", pa.int64()), ("caption", pa.string())])
    return pa.Table.from_pylist(
        rows, schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    )


def write_parquet(path: Path, table: pa.Table, row_group: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group, compression="none")
    return path


def save_to_disk(folder: Path, tables: Iterable[pa.Table], batch: int = 3) -> Path:
    """The files of `Dataset.save_to_disk`: Arrow streams, and state.json that names them."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = list(tables)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as stream:
            stream.write_table(part, max_chunksize=batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


# ---------------------------------------------------------------- reading


def packed(out: Path) -> dict[str, bytes]:
    """Content of every member of all packed shards, by name."""
    return {name: content for path in sorted(out.glob("*.tar")) for name, _, content in members(path)}


def samples(path: Path, **wanted: str) -> list[SourceSample]:
    """Of a source, all of them."""
    source = open_source(str(path), Wanted(**wanted))
    return list(source.reader()(0, source.samples))


def classes(path: Path, **wanted: str) -> tuple[str, ...]:
    return open_source(str(path), Wanted(**wanted)).classes


def refused(path: Path, words: str, **wanted: str) -> None:
    """In one line that matches `words`, where {at} stands for the path."""
    with pytest.raises(ConfigError, match=words.format(at=re.escape(str(path)))) as failure:
        open_source(str(path), Wanted(**wanted))
    assert "\n" not in str(failure.value)
