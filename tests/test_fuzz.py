"""Seeded mutants of tars and images: a row or a named failure each, never a traceback; what is kept is what was scored.

A mutant that ever failed is kept in tests/hostile (see its manifest), which the quick tests read.
"""

import hashlib
import random
import resource
import tarfile
import time
from pathlib import Path

import pytest
from builders import encoded, image_members, members, random_image, table, write_tar

from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.stages.images import decode_image

HOSTILE = Path(__file__).parent / "hostile"
ODD_NUMBERS = (b"\x80" + b"\0" * 11, b"\xff" * 12, b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"\0" * 12)
pytestmark = pytest.mark.slow


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def mutate_tar(data: bytes, rng: random.Random) -> bytes:
    """One to three changes: flipped bytes, odd sizes and types with a valid checksum, blocks twice, moved or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        block = rng.randrange(max(len(changed) // 512, 1)) * 512
        kind = rng.randrange(6)
        if kind == 0:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        elif kind == 1:
            changed[block + 124 : block + 136] = rng.choice(ODD_NUMBERS)
        elif kind == 2:
            changed[block + 156 : block + 157] = rng.choice(b"0123456789LKxgSDV\0").to_bytes()
        elif kind == 3:
            changed[block:block] = changed[block : block + 512 * rng.randint(1, 3)]
        elif kind == 4:
            del changed[block : block + 512]
        else:
            del changed[len(changed) - rng.randrange(len(changed)) :]
        if len(changed) < 1024:
            return bytes(data[:700])
        if kind in (1, 2):
            changed[block : block + 512] = with_checksum(bytes(changed[block : block + 512]).ljust(512, b"\0"))
    return bytes(changed)


@pytest.mark.parametrize("seed", range(4))
def test_a_mutant_of_a_tar_is_scored_or_named_and_what_is_kept_was_scored(scan_config, tmp_path, seed):
    rng, count = random.Random(seed), 250
    whole = [
        write_tar(tmp_path / "whole" / "a.tar", image_members([f"k{i}" for i in range(6)])).read_bytes(),
        write_tar(
            tmp_path / "whole" / "b.tar", image_members([f"{'long/' * 30}k{i}" for i in range(4)]), tarfile.PAX_FORMAT
        ).read_bytes(),
        *(
            path.read_bytes()
            for path in sorted((HOSTILE / "tars").glob("*.tar"))
            if 1024 <= path.stat().st_size < 1 << 17
        ),
    ]
    (tmp_path / "in").mkdir()
    for number in range(count):
        (tmp_path / "in" / f"{number:04d}.tar").write_bytes(
            mutate_tar(rng.choice([*whole[:2], rng.choice(whole)]), rng)
        )
    before, start = peak_mib(), time.monotonic()
    result = scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("absolute", threshold=4.0), force=True))
    assert peak_mib() - before < 512
    assert time.monotonic() - start < 2 * count
    out = tmp_path / "scanned"
    failed = {Path(text.partition(".tar:")[0]).name for text in (*result.failed, *result.cleaned.failed)}
    done = {path.stem for path in (out / "done").glob("*.json")}
    assert done | failed == {f"{number:04d}" for number in range(count)}
    assert not result.cleaned.failed
    assert [p for p in verify(str(out), deep=True).problems if "not scored" not in p] == []
    for path in sorted((out / "clean").glob("*.tar")):
        scored = {row["sha256"] for row in table(out, path.stem)}
        for name, _, content in members(path):
            assert hashlib.sha256(content).hexdigest() in scored or not name.endswith((".png", ".jpg", ".webp", ".gif"))


@pytest.mark.parametrize("seed", range(2))
def test_a_mutant_of_an_image_is_decoded_or_has_a_reason(seed):
    rng = random.Random(seed)
    kinds = [
        encoded(random_image(i, 48), kind)
        for i, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"))
    ]
    whole = kinds + [p.read_bytes() for p in sorted((HOSTILE / "images").iterdir()) if p.stat().st_size < 1 << 14]
    before, slowest, decoded = peak_mib(), 0.0, 0
    for _ in range(10_000):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 8) if data else 0):
            data[
                min(int(rng.expovariate(1 / 60)), len(data) - 1) if rng.random() < 0.5 else rng.randrange(len(data))
            ] = rng.randrange(256)
        start = time.monotonic()
        pixels, _, _, reason = decode_image(bytes(data), max_pixels=1 << 22)
        slowest = max(slowest, time.monotonic() - start)
        assert (pixels is None) == bool(reason)
        decoded += pixels is not None
    assert 0 < decoded < 10_000
    assert slowest < 20
    assert peak_mib() - before < 512
