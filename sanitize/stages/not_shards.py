"""What people give in place of WebDataset shards, and the one line that says what to do with it."""

import shlex
from collections.abc import Sequence

from sanitize.errors import ConfigError

UNPACK = {".tar.bz2": "bunzip2 -k", ".tar.xz": "unxz -k"}
DATASETS = {".arrow": "an Arrow dataset", ".parquet": "Parquet", ".csv": "a table", ".tsv": "a table"}


def refuse_compressed(paths: Sequence[str], shown: Sequence[str]) -> None:
    """Raises ConfigError when one of `paths` is a tar compressed as none is read, without its unpacked .tar. shown: how to name each."""
    there = set(paths)
    for path, name in zip(paths, shown, strict=True):
        for ending, command in UNPACK.items():
            if path.endswith(ending) and path.removesuffix(ending) + ".tar" not in there:
                raise ConfigError(
                    f"{name}: is compressed in a way that is not read; .tar, .tar.gz, .tgz and .tar.zst are. Unpack it: {command} "
                    f"{shlex.quote(name)} (and any like it), or make new shards of the original images with `sanitize pack`."
                )


def refuse_data_to_pack(url: str, folder: str, paths: Sequence[str], image_extensions: Sequence[str]) -> None:
    """Raises ConfigError when `url` names data that `sanitize pack` makes shards of.

    paths: what it holds; folder: the one that images would be packed from.
    """
    endings = {f".{path.rsplit('.', 1)[-1].lower()}": path for path in reversed(paths)}
    for ending, what in DATASETS.items():
        if ending in endings:
            source = endings[ending].rsplit("/", 1)[0] if ending == ".arrow" else url
            raise ConfigError(_pack_first(url, what, source))
    if any(f".{extension}" in endings for extension in image_extensions):
        raise ConfigError(_pack_first(url, "images", folder))


def _pack_first(url: str, what: str, source: str) -> str:
    return (
        f"{url}: holds {what}, no WebDataset shards. Make shards of it first: sanitize pack {shlex.quote(source)} packed/ - and give "
        "packed/ in its place."
    )
