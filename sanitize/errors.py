"""What can go wrong, by who has to act on it. Every message says what failed, where, and how to fix it."""


class SanitizeError(Exception):
    """A problem the user can fix. `exit_code` is what the command returns.

    may_pass: a remote store was slow, throttled or cut the connection, so that the same request may succeed a little later.
    """

    exit_code = 2

    def __init__(self, message: str, *, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class ConfigError(SanitizeError):
    """A setting, an option or a YAML file is wrong."""


class ShardError(SanitizeError):
    """One shard cannot be read; the others go on without it."""


class CheckpointError(SanitizeError):
    """An encoder or detector file cannot be used."""


class StorageError(SanitizeError):
    """Reading or writing failed: missing folder, no permission, disk full."""


class RefusedError(SanitizeError):
    """The command could go on, but the result would probably harm the user. `--force` overrides."""

    exit_code = 3


def check(condition: bool, message: str) -> None:
    """Raises ConfigError unless the condition holds."""
    if not condition:
        raise ConfigError(message)
