"""What every pipeline does as a program: log with the time, and end with one line on an error of the user's."""

import contextlib
import logging
from collections.abc import Iterator

import torch

from sanitize import process
from sanitize.errors import SanitizeError


@contextlib.contextmanager
def command_line(*, commands_log: bool = True) -> Iterator[None]:
    """commands_log: let the commands that the pipeline calls tell their progress, too."""
    process.prepare()
    torch.set_num_threads(process.usable_cpus())  # torch is loaded already
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if not commands_log:
        logging.getLogger("sanitize").setLevel(logging.WARNING)
    try:
        yield
    except SanitizeError as error:
        raise SystemExit(f"error: {error}") from None
