"""Tables inside Markdown pages: what stands between two marker comments is written anew from a result file."""

from collections.abc import Sequence

from sanitize import storage
from sanitize.config import check


def replace(page: str, name: str, text: str) -> None:
    """Put `text` between <!-- name: begin --> and <!-- name: end --> of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before = storage.read_bytes(page).decode()
    check(
        begin in before and end in before,
        f"{page}: the markers {begin} and {end} are missing. Put them around the table.",
    )
    head, tail = before.split(begin)[0], before.split(end)[1]
    storage.write_bytes(page, f"{head}{begin}\n{text}\n{end}{tail}".encode())


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
