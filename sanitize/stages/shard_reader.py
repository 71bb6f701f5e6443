"""One pass over one shard: samples in tar order, with where every member lies. Hostile tars end in words, not in a crash.

Samples follow the WebDataset rule: the key is the path up to the first dot of the base name, the extension is the rest
(lower case); members of one sample stand together. Folders, links, devices and names without a key belong to no sample:
they are "loose" and never reach a clean shard. Not webdataset's own reader: it gives no byte ranges, and stops at damage.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import IO

from sanitize.errors import ShardError
from sanitize.records import Member, Sample, Shard
from sanitize.stages.captions import MAX_CAPTION_BYTES, caption_text, split_member
from sanitize.stages.shards import (
    BLOCK,
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    is_image,
    printable,
    read_block,
    tar_size,
)

MAX_MEMBERS = 1000  # of one sample
MAX_HEADER = 1 << 20  # a long-name or pax header larger than this is an attack, not a name
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$", re.DOTALL)


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
        self.size = tar_size(shard, file)
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
        if pending is not None and pending.end <= self.size:
            yield self._finished(pending)
        self.sha256 = self._file.sha256()
        if self._with_images and self._file.tell() != self.size:  # else a cut connection would look like a damaged tail
            raise ShardError(
                f"{self._shard.url}: {self._file.tell()} bytes were read, its size was {self.size}: the connection was cut, or "
                "the file changed meanwhile. Run the same command again."
            )

    def stored_bytes(self, end: int) -> int:
        """How much of the shard, as it is stored, lies before byte `end` of its tar. Of a sample that was worked on: how far the work is;
        reading is further."""
        return min(end, self.size) * self._shard.size // max(self.size, 1)

    def content(self, member: Member, limit: int | None = None) -> bytes:
        """The (first `limit`) bytes of a member of the sample that `samples()` just gave; only of a reader without images."""
        self._file.seek(member.data)
        return self._file.read_content(member.size if limit is None else min(member.size, limit))

    def _members(self) -> Iterator[Member]:
        """Members in tar order; stops at the first damage and describes it in `self.damage`."""
        if self.size == 0:
            raise ShardError(f"{self._shard.url}: the file is empty (0 bytes). Download or write it again.")
        offset, failure, opened = 0, "", False
        try:
            tar: tarfile.TarFile = tarfile.open(fileobj=self._file, mode="r:", errors="surrogateescape")  # type: ignore[call-overload]  # noqa: SIM115
            opened = True
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # tarfile keeps every header; a scan must not grow with the shard
                if info.size < 0 or tar.offset <= offset:
                    raise tarfile.ReadError("a member has a negative size")
                if changed := sorted(set(tar.pax_headers) - {"comment"}):
                    raise ShardError(
                        f"{self._shard.url}: has a global pax header ({', '.join(map(printable, changed))}) that changes all "
                        "members, so single members cannot be copied. Rewrite the shard without it."
                    )
                offset = tar.offset
                if offset <= self.size:
                    self.readable_end = offset
                yield _member(info, offset)
        except ShardError:
            raise
        except Exception as error:  # tarfile lets a dozen kinds out on hostile headers; all mean the same here
            failure = str(error) or type(error).__name__
        if not opened:
            raise ShardError(
                f"{self._shard.url}: not a tar archive ({failure}). If it is compressed, name it so: .tar.gz or .tar.zst."
            )
        self._describe_end(failure)

    def _describe_end(self, failure: str) -> None:
        """tarfile stops without a word at a bad header; only zero blocks or the end of the file are a proper end."""
        last = self._file.last_read
        proper_end = not failure and (last == b"" or last.count(0) == BLOCK)
        trailing = self._file.rest_has_content()
        if not proper_end:
            failure = failure or ("truncated header" if len(last) < BLOCK else "bad header checksum")
            lost = self.size - self.readable_end
            self.damage = f"damaged after byte {self.readable_end} ({failure}); the last {lost} bytes are unread"
        elif trailing:
            self.damage = f"more data follows the end of the archive at byte {self.readable_end}; it is unread (two tars in one file?)"

    def _extended(self, sample: Sample, member: Member) -> Sample:
        if len(sample.members) >= MAX_MEMBERS:
            raise ShardError(
                f"{self._shard.url}: sample {printable(member.key)!r} has more than {MAX_MEMBERS} members. Rewrite the shard "
                "so that every sample has a key of its own."
            )
        if any(member.extension == other.extension for other in sample.members):
            raise ShardError(
                f"{self._shard.url}: sample {printable(member.key)!r} has two members with extension .{printable(member.extension)}. "
                "Rewrite the shard so that every file name is unique."
            )
        if member.extension == self._caption_extension and member.end <= self.size:
            sample = self._captioned(sample, member)
        wanted = self._is_image(member) and member.end <= self.size
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
        """The member that holds the sample's image; None without one, or when it cannot be used."""
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


def _leaves_folder(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/")
