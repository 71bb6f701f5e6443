"""What `sanitize pack` makes shards of, by what is there: image files, a manifest of them, or tables with images in them."""

from collections.abc import Sequence

import pyarrow.parquet as pq

from sanitize import storage
from sanitize.errors import ConfigError
from sanitize.sources.columns import explain_table_errors, image_column, with_names
from sanitize.sources.image_folder import ListedFile, list_folder, open_image_folder
from sanitize.sources.manifest import DELIMITERS, open_manifest
from sanitize.sources.rows import open_rows
from sanitize.sources.samples import Source, Wanted
from sanitize.stages.shards import IMAGE_EXTENSIONS, printable
from sanitize.stages.unpacking import ENDINGS

STATE = "state.json"  # of Hugging Face's save_to_disk: which .arrow files there are the data set
KINDS = "a folder of images, Parquet files, a `save_to_disk` folder, or a CSV, TSV or Parquet manifest"


def open_source(source: str, wanted: Wanted) -> Source:
    """Raises ConfigError when there is nothing to pack, or it is not clear what."""
    source = storage.absolute(source) if storage.is_local(source) else source.rstrip("/")
    fs, inner = storage.filesystem(source)
    with storage.explain_read_errors(source):
        is_folder, is_file = fs.isdir(inner), fs.isfile(inner)
        size = int(fs.size(inner) or 0) if is_file else 0
    if is_folder:
        found: Source = _open_folder(source, wanted)
    elif is_file:
        found = _open_file(source, size, wanted)
    elif any(character in source for character in "*?["):
        found = _open_glob(source, wanted)
    else:
        raise ConfigError(f"{source}: no such file or folder. Give {KINDS}.")
    if not found.samples:
        raise ConfigError(f"{source}: holds no samples. Give {KINDS}.")
    return found


def _open_file(path: str, size: int, wanted: Wanted) -> Source:
    name = path.rsplit("/", 1)[-1]
    if path.endswith(tuple(DELIMITERS)):
        return open_manifest(path, wanted)
    if path.endswith(".arrow") or (path.endswith(".parquet") and _holds_images(path, wanted)):
        return open_rows([(path, name, size)], wanted)
    if path.endswith(".parquet"):
        return open_manifest(path, wanted)
    raise ConfigError(f"{path}: cannot be packed. Give {KINDS}.")


def _holds_images(path: str, wanted: Wanted) -> bool:
    with storage.explain_read_errors(path), storage.open_read(path) as file, explain_table_errors(path):
        return bool(image_column(with_names(pq.read_schema(file)), wanted.images, path))


def _open_glob(pattern: str, wanted: Wanted) -> Source:
    fs, inner = storage.filesystem(pattern)
    with storage.explain_read_errors(pattern):
        found = fs.glob(inner, detail=True)
    root = fixed_part(inner)
    tables = [
        ListedFile(path[len(root) + 1 :], int(info["size"] or 0), "")
        for path, info in sorted(found.items())
        if path.endswith(".parquet")
    ]
    if not tables:
        raise ConfigError(f"{pattern}: matches no .parquet file. A pattern means Parquet files; else give {KINDS}.")
    return _open_tables(fixed_part(pattern), tables, wanted)


def fixed_part(pattern: str) -> str:
    """The folder that a pattern begins in; of a path without one the path itself."""
    places = [pattern.index(character) for character in "*?[" if character in pattern]
    return pattern[: min(places)].rsplit("/", 1)[0] if places else pattern


def _open_folder(folder: str, wanted: Wanted) -> Source:
    files = list_folder(folder)
    names = {file.path for file in files}
    if STATE in names and any(name.endswith(".arrow") for name in names):
        return _open_tables(folder, _files_of_state(folder, files), wanted)
    if "dataset_dict.json" in names:
        splits = sorted(name.removesuffix(f"/{STATE}") for name in names if name.endswith(f"/{STATE}"))
        raise ConfigError(
            f"{folder}: holds several data sets ({', '.join(map(printable, splits))}). Pack each into a folder of its own, for example "
            f"sanitize pack {folder}/{printable(splits[0]) if splits else 'train'} packed/"
        )
    return _open_by_endings(folder, files, wanted)


def _open_by_endings(folder: str, files: Sequence[ListedFile], wanted: Wanted) -> Source:
    def ending(*endings: str) -> list[ListedFile]:
        return [file for file in files if file.path.lower().endswith(endings)]

    tars = ending(*ENDINGS)
    tables = ending(".parquet") or [f for f in ending(".arrow") if not f.path.rsplit("/", 1)[-1].startswith("cache-")]
    images = ending(*(f".{extension}" for extension in IMAGE_EXTENSIONS))
    if tars and not images and not tables:
        raise ConfigError(
            f"{folder}: holds {len(tars)} tar shards already. Scan them as they are: sanitize scan {folder}"
        )
    if images and tables:
        raise ConfigError(
            f"{folder}: holds {len(images)} images and {len(tables)} tables ({printable(tables[0].path)}): which are the data? Name one "
            f"table, or a pattern such as '{folder}/**/*.parquet', or the sub-folder that has the images."
        )
    if tables:
        return _open_tables(folder, tables, wanted)
    return open_image_folder(folder, files, wanted)


def _open_tables(folder: str, files: Sequence[ListedFile], wanted: Wanted) -> Source:
    if odd := [file.path for file in files if printable(file.path) != file.path]:
        raise ConfigError(
            f"{folder}/{printable(odd[0])}: its name holds control characters or is not UTF-8. Rename it."
        )
    return open_rows([(storage.join(folder, file.path), file.path, file.size) for file in files], wanted)


def _files_of_state(folder: str, files: Sequence[ListedFile]) -> list[ListedFile]:
    """The .arrow files that state.json names: beside them may lie caches of the same library."""
    path = storage.join(folder, STATE)
    state = storage.read_json(path)
    known = {file.path: file for file in files}
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        found = [known[name] for name in names]
    except (KeyError, TypeError):
        raise ConfigError(
            f"{path}: names files that are not there, or none. Save the data set again (save_to_disk)."
        ) from None
    if not found or not all(file.path.endswith(".arrow") for file in found) or state.get("_indices_data_files"):
        raise ConfigError(
            f"{path}: is not of a data set of .arrow files alone. Save it again with a recent `datasets`."
        )
    return found
