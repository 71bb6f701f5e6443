"""An object store of which one request goes wrong. `flaky://` paths."""

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec

from benchmarks.object_store import ObjectStore

FAULTS = ("refused", "response lost", "cut short", "stale listing")


class FlakyStore(ObjectStore):
    """The `number`-th request of `kind` has `fault`."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    requests: ClassVar[Counter[str]] = Counter()
    kind, number, fault = "", 0, ""

    @classmethod
    def plan(cls, kind: str = "", number: int = 0, fault: str = "") -> None:
        cls.requests.clear()
        cls.kind, cls.number, cls.fault = kind, number, fault

    def request(self, kind: str, answer: Callable[[], Any]) -> Any:
        here = (kind, self.requests[kind] + 1) == (self.kind, self.number)
        if here and self.fault == "refused":
            self.requests[kind] += 1
            raise OSError(f"503 SlowDown ({kind})")
        value = super().request(kind, answer)
        if here and self.fault == "response lost":
            raise TimeoutError("no response")
        if here and self.fault == "stale listing" and kind == "list":  # of what we wrote, the latest is not there yet
            latest = [name for name in value if name.startswith("/out/")][-2:]
            value = (
                {name: info for name, info in value.items() if name not in latest}
                if isinstance(value, dict)
                else [name for name in value if name not in latest]
            )
        return value[: len(value) // 2] if here and self.fault == "cut short" and kind == "get" else value


fsspec.register_implementation("flaky", FlakyStore, clobber=True)
