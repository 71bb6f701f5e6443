"""The project's vocabulary, in flow order: Shard, Member, Sample, Word, DecodedImage. Score rows are columns: stages/score_table.py."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """One input shard. `stem` names every output made from it."""

    url: str
    stem: str  # path below the input folder, without its ending; unique in a run
    size: int  # bytes of its file


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a tar, headers included: bytes [start, end) of the archive."""

    name: str
    key: str  # "" when it belongs to no sample
    extension: str  # lower case, without the leading dot: "jpg", "v1.jpg"
    start: int  # first header block, long-name and pax headers included
    data: int  # first byte of the content
    size: int  # content bytes
    end: int  # first block after the padding


@dataclass(frozen=True, slots=True)
class Sample:
    """Members with one key, in tar order. Identity is (shard, index)."""

    index: int
    key: str
    members: tuple[Member, ...]
    image: bytes | None = None  # content of the image member; None when not read or when there is none
    status: str = "ok"
    reason: str = ""
    caption: str = ""  # "" when not asked for or when there is none, then `caption_reason` says why
    caption_reason: str = ""

    @property
    def end(self) -> int:
        """First byte of the tar behind its members."""
        return self.members[-1].end if self.members else 0


@dataclass(frozen=True, slots=True)
class Word:
    """A person's, which overrides the score of one sample of a shard. key: as score tables write it; reason: as decisions tell it."""

    index: int
    key: str
    release: bool
    reason: str


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """A sample after decoding. `pixels` is (3, H, W) uint8, or None with a status and a reason."""

    index: int
    key: str
    sha256: str  # of the image member's bytes, "" when there is none
    pixels: torch.Tensor | None
    width: int
    height: int
    status: str
    reason: str
    caption: str = ""
    caption_reason: str = ""
    end: int = 0  # first byte of the tar behind the sample's members
