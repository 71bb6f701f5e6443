"""Tar shards: list them, read samples in tar order, copy chosen byte ranges into a new tar.

Samples follow the WebDataset rule: the key is the path up to the first dot of the base name, the extension is the rest
(lower case); members of one sample stand together. Folders, links, devices and names without a key belong to no sample:
they are "loose" and never reach a clean shard.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import IO

import braceexpand
import fsspec

from sanitize import storage
from sanitize.errors import ConfigError, ShardError, StorageError
from sanitize.records import Member, Sample, Shard
from sanitize.stages.captions import MAX_CAPTION_BYTES, caption_text, split_member

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff")
BLOCK = 512
RECORD = 20 * BLOCK  # tar pads archives to this
MAX_IMAGE_BYTES = 1 << 28
MAX_HEADER = 1 << 20  # a long-name or pax header larger than this is an attack, not a name
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)


# ---------------------------------------------------------------- listing


def list_shards(patterns: Sequence[str]) -> list[Shard]:
    """Shards named by folders, tar files, globs and braces, local or fsspec URLs; sorted by stem.

    Raises ConfigError when something is missing, nothing is found, or two inputs would get the same name.
    """
    if isinstance(patterns, str):  # a str is a sequence of str: every letter would be looked for
        raise ConfigError(f"shards: {patterns!r} is one text, a list of paths was expected. Write ({patterns!r},).")
    found: dict[str, Shard] = {}
    for pattern in patterns:
        matches = [shard for url in braceexpand.braceexpand(pattern) for shard in _list_one(url)]
        for shard in matches:
            other = found.setdefault(shard.stem, shard)
            if other.url != shard.url:
                raise ConfigError(
                    f"{other.url} and {shard.url} would both write {shard.stem}.parquet. "
                    "Give their common parent folder, so that sub-folders keep them apart, or scan them into two folders."
                )
    return sorted(found.values(), key=lambda shard: shard.stem)


def _list_one(url: str) -> list[Shard]:
    url = storage.absolute(url)
    fs, inner = fsspec.core.url_to_fs(url)
    protocol = "" if storage.is_local(url) else url.split("://", 1)[0] + "://"
    try:
        if any(character in inner for character in "*?["):
            root = re.split(r"[*?\[]", inner, maxsplit=1)[0].rsplit("/", 1)[0]
            paths = [path for path in fs.glob(inner) if path.endswith(".tar")]
        elif fs.isdir(inner):
            root, paths = inner.rstrip("/"), [path for path in fs.find(inner) if path.endswith(".tar")]
        elif fs.exists(inner):
            root, paths = inner.rsplit("/", 1)[0], [inner]
        else:
            raise ConfigError(f"{url}: no such file or folder. Check the path; a folder means every .tar below it.")
        sizes = [int(fs.size(path)) for path in paths]
    except PermissionError:
        raise StorageError(f"{url}: no permission to read. Check the owner and mode of the folder.") from None
    paths_sizes = [(p, s) for p, s in zip(paths, sizes, strict=True) if not p.rsplit("/", 1)[-1].startswith(".")]
    if not paths_sizes:
        raise ConfigError(
            f"{url}: no .tar file found. Give a folder with WebDataset shards, or a glob that matches some."
        )
    return [
        Shard(
            protocol + path.removeprefix("/" if protocol else ""), path[len(root) :].lstrip("/").removesuffix(".tar"), s
        )
        for path, s in paths_sizes
    ]


def head_tail_sha256(shard: Shard, span: int = 1 << 16) -> str:
    """A cheap identity of a shard: hash of its size, first and last 64 KiB. The whole hash is kept by the scan."""
    with storage.open_read(shard.url) as file:
        head = file.read(span)
        file.seek(max(0, shard.size - span))
        return hashlib.sha256(b"%d|" % shard.size + head + file.read(span)).hexdigest()


# ---------------------------------------------------------------- reading


def open_shard(shard: Shard) -> IO[bytes]:
    """Open one shard of a run; one that has gone or cannot be opened fails alone."""
    try:
        return storage.open_read(shard.url)
    except StorageError as error:
        raise ShardError(str(error)) from None


def read_block(file: IO[bytes], size: int, url: str) -> bytes:
    """Read, and name the shard when the device or the network fails."""
    try:
        return file.read(size)
    except OSError as error:
        raise ShardError(
            f"{url}: cannot be read ({error}). Check the device or connection, then run the same command."
        ) from error


class _SequentialFile:
    """What `tarfile` reads from: skips forward by reading, so that one pass also gives the SHA-256 of the whole shard."""

    def __init__(self, file: IO[bytes], url: str, hashing: bool) -> None:
        self._file = file
        self._url = url
        self._position = 0
        self._digest = hashlib.sha256() if hashing else None
        self.last_read = b""

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        self.last_read = self.read_content(size)
        return self.last_read

    def read_content(self, size: int) -> bytes:
        data = read_block(self._file, size, self._url)
        self._position += len(data)
        if self._digest is not None:
            self._digest.update(data)
        return data

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if self._digest is None:
            self._position = self._file.seek(position)
            return self._position
        if position < self._position:
            raise tarfile.ReadError("a header points backwards")
        while self._position < position and self.read_content(min(1 << 20, position - self._position)):
            continue
        return self._position

    def rest_has_content(self) -> bool:
        """Read to the end; True when anything but zero bytes is left."""
        content = False
        while data := self.read_content(1 << 20):
            content = content or data.count(0) != len(data)
        return content

    def sha256(self) -> str:
        return self._digest.hexdigest() if self._digest is not None else ""


class ShardReader:
    """One pass over one shard. After `samples()` is exhausted, `damage`, `loose` and `sha256` are known."""

    def __init__(
        self,
        file: IO[bytes],
        shard: Shard,
        *,
        with_images: bool = True,
        image_member: str = "",
        caption_member: str = "",
    ) -> None:
        """`with_images`: read the image bytes and hash the shard; without, only headers are read.

        `image_member`: extension of the member to score, for samples with more than one image ("" = the only one).
        `caption_member`: "txt" or "json:<field>", "" = captions are not read.
        """
        self._file = _SequentialFile(file, shard.url, hashing=with_images)
        self._shard = shard
        self._with_images = with_images
        self._image_member = image_member.lower().lstrip(".")
        self._caption_extension, self._caption_field = split_member(caption_member)
        self.damage = ""  # "" or what is wrong with the tail of the shard
        self.loose = 0  # members that belong to no sample
        self.images = 0  # samples with an image member
        self.extensions: set[str] = set()  # of the first samples without one
        self.sha256 = ""  # of the whole shard, when images are read
        self.readable_end = 0  # first byte that belongs to no readable member

    def samples(self) -> Iterator[Sample]:
        """Complete samples in tar order. Raises ShardError for an archive that cannot be trusted as a whole."""
        seen: set[str] = set()
        pending: Sample | None = None
        for member in self._members():
            if not member.key:
                self.loose += 1
                continue
            if pending is not None and pending.key == member.key:
                pending = self._extended(pending, member)
                continue
            if pending is not None:
                yield self._finished(pending)
            if member.key in seen:
                raise ShardError(
                    f"{self._shard.url}: the files of sample {printable(member.key)!r} are not adjacent or the key comes "
                    "twice, so it would be scored in pieces. Rewrite the shard with unique keys and its members sorted by name."
                )
            seen.add(member.key)
            pending = self._extended(Sample(len(seen) - 1, member.key, ()), member)
        if pending is not None and pending.members[-1].end <= self._shard.size:
            yield self._finished(pending)
        self.sha256 = self._file.sha256()

    @property
    def bytes_read(self) -> int:
        return self._file.tell()

    def content(self, member: Member) -> bytes:
        """The bytes of a member of the sample that `samples()` just gave; only of a reader without images."""
        self._file.seek(member.data)
        return self._file.read_content(member.size)

    def _members(self) -> Iterator[Member]:
        """Members in tar order; stops at the first damage and describes it in `self.damage`."""
        if self._shard.size == 0:
            raise ShardError(f"{self._shard.url}: the file is empty (0 bytes). Download or write it again.")
        offset, failure, opened = 0, "", False
        try:
            tar: tarfile.TarFile = tarfile.open(fileobj=self._file, mode="r:", errors="surrogateescape")  # type: ignore[call-overload]  # noqa: SIM115
            opened = True
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header; a scan must not grow with the shard
                if tar.offset <= offset:
                    raise tarfile.ReadError("a member has a negative size")
                if set(tar.pax_headers) - {"comment"}:
                    raise ShardError(
                        f"{self._shard.url}: has a global pax header ({', '.join(sorted(tar.pax_headers))}) that changes all "
                        "members, so single members cannot be copied. Rewrite the shard without it."
                    )
                offset = tar.offset
                if offset <= self._shard.size:
                    self.readable_end = offset
                yield _member(info, offset)
        except (tarfile.TarError, ValueError, ArithmeticError, RecursionError) as error:
            failure = str(error)
        if not opened:
            raise ShardError(
                f"{self._shard.url}: not a tar archive ({failure}). Compressed archives must be unpacked to plain .tar first."
            )
        self._describe_end(failure)

    def _describe_end(self, failure: str) -> None:
        """tarfile stops without a word at a bad header; only zero blocks or the end of the file are a proper end."""
        last = self._file.last_read
        proper_end = not failure and (last == b"" or last.count(0) == BLOCK)
        trailing = self._file.rest_has_content()
        if not proper_end:
            failure = failure or ("truncated header" if len(last) < BLOCK else "bad header checksum")
            lost = self._shard.size - self.readable_end
            self.damage = f"damaged after byte {self.readable_end} ({failure}); the last {lost} bytes are unread"
        elif trailing:
            self.damage = f"more data follows the end of the archive at byte {self.readable_end}; it is unread (two tars in one file?)"

    def _extended(self, sample: Sample, member: Member) -> Sample:
        if any(member.extension == other.extension for other in sample.members):
            raise ShardError(
                f"{self._shard.url}: sample {printable(member.key)!r} has two members with extension .{member.extension}. "
                "Rewrite the shard so that every file name is unique."
            )
        if member.extension == self._caption_extension and member.end <= self._shard.size:
            sample = self._captioned(sample, member)
        wanted = self._is_image(member) and member.end <= self._shard.size
        image, status, reason = sample.image, sample.status, sample.reason
        if wanted and any(self._is_image(other) for other in sample.members):
            status, reason = "several_images", "more than one image member; name one with image_member"
        elif wanted and member.size > MAX_IMAGE_BYTES:
            status, reason = "too_large", f"image file of {member.size} bytes, the limit is {MAX_IMAGE_BYTES}"
        elif wanted and self._with_images:
            self._file.seek(member.data)
            image = self._file.read_content(member.size)
        return replace(sample, members=(*sample.members, member), image=image, status=status, reason=reason)

    def _captioned(self, sample: Sample, member: Member) -> Sample:
        if member.size > MAX_CAPTION_BYTES:
            reason = f"the caption's file has {member.size} bytes, the limit is {MAX_CAPTION_BYTES}"
            return replace(sample, caption_reason=reason)
        self._file.seek(member.data)
        text, reason = caption_text(self._file.read_content(member.size), self._caption_field)
        return replace(sample, caption=text, caption_reason=reason)

    def _is_image(self, member: Member) -> bool:
        return is_image(member.extension, self._image_member)

    def image_of(self, sample: Sample) -> Member | None:
        """The member that holds the sample's picture; None without one, or when it cannot be used."""
        found = [member for member in sample.members if self._is_image(member)]
        return found[0] if found and sample.status == "ok" else None

    def _finished(self, sample: Sample) -> Sample:
        if any(_leaves_folder(member.name) for member in sample.members):
            return replace(sample, image=None, status="unsafe_name", reason="a member path is absolute or has '..'")
        if not any(self._is_image(member) for member in sample.members):
            looked_for = self._image_member or " ".join(IMAGE_EXTENSIONS)
            found = {printable(member.extension) for member in sample.members}
            if len(self.extensions) < 20:
                self.extensions |= found
            return replace(
                sample,
                status="no_image",
                reason=f"no image member: has {' '.join(sorted(found))}, looked for {looked_for}",
            )
        self.images += 1
        if self._caption_extension and not (sample.caption or sample.caption_reason):
            sample = replace(sample, caption_reason=f"no caption: there is no .{self._caption_extension} member")
        return sample if sample.status == "ok" else replace(sample, image=None)


def _member(info: tarfile.TarInfo, end: int) -> Member:
    match = _KEY_AND_EXTENSION.match(info.name) if info.isreg() and not info.issparse() else None
    key, extension = match.groups() if match else ("", "")
    return Member(info.name, key, extension.lower(), info.offset, info.offset_data, info.size, end)


def is_image(extension: str, image_member: str = "") -> bool:
    """Whether a member is scored: by the extension asked for, else by any of IMAGE_EXTENSIONS."""
    if image_member:
        return extension == image_member.lower().lstrip(".")
    return extension.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS


def _leaves_folder(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")


def printable(name: str) -> str:
    """A member name as valid Unicode: bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- copying


def sample_ranges(samples: Iterable[Sample]) -> Iterator[tuple[int, int, int]]:
    """(index, start, end) of every member, in tar order."""
    for sample in samples:
        for member in sample.members:
            yield sample.index, member.start, member.end


def end_archive(target: storage.HashingWriter) -> None:
    """Two zero blocks, then padding to a whole record, as every tar program writes."""
    target.write(bytes(2 * BLOCK))
    target.write(bytes(-target.size % RECORD))
