"""What is packed: the samples of a source, in its order, and how a worker reads some of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sanitize.stages.shards import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES

MAX_SAMPLES = 10**9  # keys have nine digits
SIGNATURES = {  # first bytes → extension, for images without a name
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"P6\n": "ppm",
}


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One sample before it is packed.

    source: the file it comes from, printable; row: in that file, None where the file is the image
    image:  the file's bytes as they are, None when they cannot be had; then `problem` says why
    label:  of the .cls member; caption: of the .txt member; None = it gets no such member
    """

    source: str
    row: int | None
    image: bytes | None
    extension: str
    label: int | None = None
    caption: bytes | None = None
    problem: str = ""


ReadSamples = Callable[[int, int], Iterator[SourceSample]]  # of the samples [start, stop), in order, each of them


class Source(Protocol):
    """Picklable: a worker gets it whole.

    classes: names, in the order of the labels; () = labels are numbers already, or there are none
    identity: plain values that differ when the source does; notes: what the user should know before it is packed
    """

    @property
    def samples(self) -> int: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def reader(self) -> ReadSamples:
        """For one worker, which may keep files open from one call to the next."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, "" = what fits. images: a column; labels: a column, "folders" or "none"; captions: a column or "none"."""

    images: str = ""
    labels: str = ""
    captions: str = ""


NONE, FOLDERS = "none", "folders"


def image_extension(name: str, data: bytes) -> str:
    """Of the member that will hold the image: that of its name, else by its first bytes; "" when neither is an image's."""
    named = name.rsplit(".", 1)[-1].lower() if "." in name else ""
    if named in IMAGE_EXTENSIONS:
        return named
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((extension for start, extension in SIGNATURES.items() if data.startswith(start)), "")


def image_sample(
    source: str, row: int | None, name: str, data: bytes | None, label: int | None, caption: bytes | None
) -> SourceSample:
    """A sample with its image, or with the reason why these bytes are none. name: of the image's file, "" = not known."""
    if data is None:
        return SourceSample(source, row, None, "", problem="there are no image bytes")
    if len(data) > MAX_IMAGE_BYTES:
        problem = f"the image has more than {MAX_IMAGE_BYTES} bytes"
        return SourceSample(source, row, None, "", problem=problem)
    extension = image_extension(name, data)
    if not extension:
        return SourceSample(source, row, None, "", problem="not an image, by its name or its first bytes")
    return SourceSample(source, row, data, extension, label, caption)
