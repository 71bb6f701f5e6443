"""The folder that `sanitize pack` writes.

pack.json                    what was packed, and how; a folder belongs to one source
shard-000000.tar ...         WebDataset shards: <key>.<image>, <key>.cls, <key>.txt
originals/<stem>.parquet     where every sample comes from; columns in artifacts/originals.py
done/<stem>.json             PackMarker: counts and SHA-256 of a shard's files; written last
classes.txt                  names of the labels, line n + 1 is that of label n; only where they have names
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sanitize import storage
from sanitize.artifacts import originals, run_record
from sanitize.artifacts.scan_folder import WrittenFile
from sanitize.config_loading import from_mapping, to_mapping
from sanitize.errors import ConfigError, RefusedError, StorageError

RECORD, CLASSES = "pack.json", "classes.txt"


@dataclass(frozen=True)
class PackMarker:
    """One shard is committed. samples: in it; failed: that it lacks; files: by name below the folder."""

    shard: str
    samples: int
    failed: int
    files: dict[str, WrittenFile]


class PackedFolder:
    """Paths and typed content. Picklable: holds a path."""

    def __init__(self, path: str) -> None:
        self.path = path

    def at(self, *names: str) -> str:
        return storage.join(self.path, *names)

    def claim(self, identity: dict[str, Any]) -> None:
        """Write pack.json, or check that it describes this very run. Raises RefusedError: a folder never mixes two."""
        if not storage.exists(self.at(RECORD)) and (found := storage.list_files(self.path, ".tar")):
            raise RefusedError(
                f"{self.path}: holds {len(found)} .tar files that `sanitize pack` did not write, and would be taken for one data set "
                "with those it writes. Give another --out."
            )
        run_record.claim_folder(self.path, RECORD, identity, "a pack")

    def tar(self, stem: str) -> str:
        return self.at(f"{stem}.tar")

    def originals(self, stem: str) -> str:
        return self.at(originals.name_of(stem))

    def committed(self, stems: Sequence[str]) -> dict[str, PackMarker]:
        """By stem: those that are finished: all files are there, and no sample of the source is missing in them."""
        done = {name.removesuffix(".json") for name in storage.list_files(self.at("done"), ".json")}
        present = set(storage.list_files(self.path, ".tar")) | {
            f"{originals.FOLDER}/{name}" for name in storage.list_files(self.at(originals.FOLDER), ".parquet")
        }
        found = storage.read_ahead(self.marker, [stem for stem in stems if stem in done])
        return {marker.shard: marker for marker in found if not marker.failed and marker.files.keys() <= present}

    def marker(self, stem: str) -> PackMarker:
        path = self.at("done", f"{stem}.json")
        try:
            return from_mapping(PackMarker, storage.read_json(path), path)
        except ConfigError as error:
            raise StorageError(f"{error} Delete it and run the same command again.") from None

    def write_marker(self, marker: PackMarker) -> None:
        storage.write_json(self.at("done", f"{marker.shard}.json"), to_mapping(marker))

    def write_classes(self, names: Sequence[str]) -> None:
        if names:
            storage.write_bytes(self.at(CLASSES), "".join(f"{name}\n" for name in names).encode())
