"""A folder of images, at any depth. Its sub-folders may be the classes, as for torchvision's ImageFolder."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from sanitize import storage
from sanitize.errors import ConfigError, StorageError
from sanitize.sources.files import ENTRIES, FileSource
from sanitize.sources.samples import FOLDERS, NONE, Wanted
from sanitize.stages.shards import IMAGE_EXTENSIONS, printable


class ListedFile(NamedTuple):
    """path: below the folder; modified: whatever the file system says of when it was written, "" = nothing."""

    path: str
    size: int
    modified: str


def list_folder(folder: str) -> list[ListedFile]:
    """Every file below `folder`, sorted by the bytes of its path; hidden files and folders left out, links to folders refused."""
    with storage.explain_read_errors(folder):
        found = _list_local(folder) if storage.is_local(folder) else _list_remote(folder)
        return sorted(found, key=lambda file: os.fsencode(file.path))


def _list_local(folder: str) -> Iterator[ListedFile]:
    def fail(error: OSError) -> None:
        raise StorageError(
            f"{printable(str(error.filename))}: cannot be listed ({error.strerror}). Make it readable, or move it out of {folder}."
        )

    root = str(storage.local_path(folder))
    for place, folders, files in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = place[len(root) :].lstrip("/")
        for name in folders:
            path = f"{place}/{name}"
            if os.path.islink(path):  # noqa: PTH114 - millions of them
                raise ConfigError(
                    f"{printable(path)}: is a link to a folder, which is not followed (it may lead in a circle). Pack the folder it "
                    "leads to, or put the folder itself here."
                )
        for name in files:
            if not name.startswith("."):
                yield ListedFile(f"{below}/{name}" if below else name, *_local_state(f"{place}/{name}"))


def _local_state(path: str) -> tuple[int, str]:
    """Of a file that may be a link to nothing: reading it will fail, and that sample alone."""
    try:
        state = os.stat(path)  # noqa: PTH116 - millions of them
        return state.st_size, str(state.st_mtime_ns)
    except OSError:
        return 0, ""


def _list_remote(folder: str) -> Iterator[ListedFile]:
    fs, inner = storage.filesystem(folder)
    inner = inner.rstrip("/")
    for path, info in fs.find(inner, detail=True).items():
        name = path[len(inner) + 1 :]
        if not any(part.startswith(".") for part in name.split("/")):
            modified = str(info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or "")
            yield ListedFile(name, int(info.get("size") or 0), modified)


def open_image_folder(folder: str, files: Sequence[ListedFile], wanted: Wanted) -> FileSource:
    """files: of `list_folder`; those that are no images by name are left out, and said."""
    images = [file for file in files if _ending(file.path) in IMAGE_EXTENSIONS]
    for option, value in (("images", wanted.images), ("captions", wanted.captions if wanted.captions != NONE else "")):
        if value:
            raise ConfigError(
                f"--{option} {value}: {folder} is a folder of images, which has no columns. Leave it out, or pack a table of paths and "
                "captions (a CSV or Parquet manifest) in its place."
            )
    labels, classes = _labels([file.path for file in images], folder, wanted.labels)
    columns = {
        "path": pa.array([os.fsencode(file.path) for file in images], pa.large_binary()),
        "label": pa.array(labels, pa.int64()),
        "caption": pa.nulls(len(images), pa.large_binary()),
        "size": pa.array([file.size for file in images], pa.int64()),
    }
    digest = hashlib.sha256()
    for file in images:
        digest.update(os.fsencode(f"{file.path}\0{file.size}\0{file.modified}\0"))
    identity: dict[str, Any] = {"files": digest.hexdigest(), "labels": FOLDERS if classes else NONE}
    return FileSource(folder, pa.table(columns, ENTRIES), classes, identity, _notes(files, len(images), classes))


def _labels(paths: Sequence[str], folder: str, wanted: str) -> tuple[list[int | None], tuple[str, ...]]:
    """The class of each: the first sub-folder, when every image is in one."""
    if wanted not in ("", FOLDERS, NONE):
        raise ConfigError(f"--labels {wanted}: {folder} is a folder of images, give folders or none.")
    loose = next((path for path in paths if "/" not in path), None)
    if wanted == FOLDERS and loose is not None:
        raise ConfigError(
            f"--labels folders: {printable(loose)} is in no sub-folder of {folder}, so it has no class. Move it into one, or give "
            "--labels none."
        )
    if wanted == NONE or loose is not None or not paths:
        return [None] * len(paths), ()
    names = sorted({path.split("/", 1)[0] for path in paths}, key=os.fsencode)
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[path.split("/", 1)[0]] for path in paths], tuple(printable(name) for name in names)


def _notes(files: Sequence[ListedFile], images: int, classes: Sequence[str]) -> tuple[str, ...]:
    notes = []
    if classes:
        notes.append(f"labels: the {len(classes)} sub-folders are the classes (--labels none leaves them out)")
    if len(files) > images:
        kinds = Counter(_ending(file.path) or "no ending" for file in files)
        others = [(kind, count) for kind, count in kinds.most_common() if kind not in IMAGE_EXTENSIONS]
        shown = ", ".join(f"{printable(kind)} {count}" for kind, count in others[:5])
        notes.append(f"{len(files) - images} files are no images by their names and are left out ({shown})")
    return tuple(notes)


def _ending(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[-1].lower() if "." in name else ""
