"""Result files, and the tables of Markdown pages: what stands between two marker comments is written anew from such a file."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from sanitize import storage
from sanitize.errors import check

Row = dict[str, Any]  # one line of a result file, column → value


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


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row, columns as in the first; fractions but the poison rate with four digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) and k != "poison_rate" else v for k, v in row.items()})
    storage.write_bytes(path, text.getvalue().encode())
