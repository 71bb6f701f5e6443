"""A page of cards, tables and images: what commands without samples to decide on show, in the look of the report."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sanitize
from sanitize.pages.rendering import render

Card = tuple[str, str, str]  # name, value, note


@dataclass(frozen=True)
class Section:
    """columns, rows: a table, its first column as words; links: (name, relative address); shots: (data URI, caption)."""

    title: str
    text: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    links: Sequence[tuple[str, str]] = ()
    shots: Sequence[tuple[str, str]] = ()
    record: Sequence[tuple[str, str]] = ()


def plain_page(title: str, subtitle: str, cards: Sequence[Card], sections: Sequence[Section]) -> bytes:
    """One self-contained HTML file without any script."""
    return render("plain", title=title, subtitle=subtitle, version=sanitize.__version__, cards=cards, sections=sections)


def png_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def numbers_table(title: str, lines: Sequence[Mapping[str, float]], leave_out: Sequence[str] = ()) -> Section:
    """A line of named numbers in each row; names that a line lacks are empty."""
    names = [name for name in dict.fromkeys(name for line in lines for name in line) if name not in leave_out]
    rows = [[f"{line[name]:.5g}" if name in line else "" for name in names] for line in lines]
    return Section(title, columns=[name.replace("_", " ") for name in names], rows=rows)
