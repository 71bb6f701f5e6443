"""What every command has: errors in one line, exit codes, --quiet, and its result as lines for people or as --json."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

import click

from sanitize.config_loading import to_mapping
from sanitize.errors import SanitizeError

TRACEBACK = "SANITIZE_TRACEBACK"  # environment variable: crashes are shown whole
EXIT_CODES = """\b
Exit codes:
  0    done
  1    finished, but some shards failed or are damaged, or some samples cannot be read (named); verify: problems were found
  2    usage or configuration; or a crash, in one line
  3    refused, because the result would probably harm you (--force overrides)
  130  interrupted (Ctrl-C), 143 terminated (SIGTERM): what is finished is kept
"""


# what controls a terminal, turns the direction of text or is no character; line ends and tabs are ours
_HOSTILE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
LONGEST = 2000  # characters of a line: a key may have 64 KiB


def for_terminal(text: str) -> str:
    """What a terminal may be given: keys, captions and names come from strangers, so none of it is obeyed or fills the screen."""
    visible = _HOSTILE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    lines = visible.split("\n")
    return "\n".join(s if len(s) <= LONGEST else f"{s[:LONGEST]}... ({len(s)} characters)" for s in lines)


def tell_error(text: str) -> None:
    """A line on stderr."""
    click.echo(for_terminal(text), err=True)


class TerminalFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return for_terminal(super().format(record))


def _be_quiet(context: click.Context, _parameter: click.Parameter, quiet: bool) -> None:
    if quiet:
        context.meta["quiet"] = True
        logging.getLogger().setLevel(logging.WARNING)


quiet_option = click.option(
    "--quiet", is_flag=True, expose_value=False, callback=_be_quiet, help="Only warnings and results"
)


def _ask_for_json(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    context.meta["json"] = wanted


json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_ask_for_json, help="The result as one JSON object"
)


def tell(result: Any, *lines: str) -> None:
    """The result of a command on stdout: lines for people or, where --json asks for it, `result` (a dataclass, or plain values)."""
    if click.get_current_context().meta.get("json"):
        values = to_mapping(result) if dataclasses.is_dataclass(result) else result
        click.echo(json.dumps(plain_numbers(values), sort_keys=True))  # ASCII, whatever is in it
        return
    for line in lines:
        click.echo(for_terminal(line))


def cleaned(out: str, result: Any) -> str:
    """Of pass 2, a CleanResult, in one line."""
    total, cut = result.kept + result.removed, f"threshold {result.threshold:.4g}"
    said = f"; {result.reviewed} decided by a person" if result.reviewed else ""
    return f"{out}/clean: {result.kept} of {total} samples kept; {result.removed} in {out}/quarantine ({cut}{said})"


def exit_for_shards(failed: Sequence[str]) -> None:
    """With exit code 1 where shards failed; each message is told."""
    for message in failed:
        tell_error(f"shard: {message}")
    if failed:
        tell_error(f"{len(failed)} shard(s) failed or are damaged; everything else is done.")
        sys.exit(1)


def plain_numbers(value: Any) -> Any:
    """With numbers that JSON does not have (infinity, NaN) as text."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Command(click.Group):
    """Turns our errors into one line on stderr and an exit code. Every command has --quiet, and --json where it has a result."""

    def add_command(self, command: click.Command, name: str | None = None) -> None:
        for option in (quiet_option, json_option):
            command = option(command)
        command.epilog = EXIT_CODES
        super().add_command(command, name)

    def invoke(self, context: click.Context) -> Any:
        word, code = "interrupted", 130

        def terminate(*_: object) -> None:
            """SIGTERM, which a scheduler sends before it takes the machine away, ends a command as Ctrl-C does."""
            nonlocal word, code
            word, code = "terminated", 143
            raise KeyboardInterrupt

        with contextlib.suppress(ValueError):  # not the main thread: somebody else's process, whose signals stay
            signal.signal(signal.SIGTERM, terminate)
        try:
            return super().invoke(context)
        except SanitizeError as error:
            tell_error(f"error: {error}")
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"{word}; run the same command again to go on.", err=True)
            context.exit(code)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            why = " ".join(str(error).split())[:300]
            tell_error(
                f"error: failed unexpectedly ({type(error).__name__}: {why}). Finished files are kept. Please report it, with what the "
                f"same command says when {TRACEBACK}=1 is set."
            )
            context.exit(2)
