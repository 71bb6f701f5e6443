"""An object store in memory of which one request goes wrong. `flaky://` paths."""

import io
from collections import Counter
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

FAULTS = ("refused", "response lost", "cut short")


class FlakyStore(MemoryFileSystem):
    """The `number`-th request of `kind` has `fault`; requests: how many of each kind were made."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests: ClassVar[Counter[str]] = Counter()
    kind, number, fault = "", 0, ""

    @classmethod
    def plan(cls, kind: str = "", number: int = 0, fault: str = "") -> None:
        cls.requests.clear()
        cls.kind, cls.number, cls.fault = kind, number, fault

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("flaky://").strip("/")

    def _goes_wrong(self, kind: str) -> str:
        """The fault of this request, "" for nearly all."""
        FlakyStore.requests[kind] += 1
        here = kind == self.kind and FlakyStore.requests[kind] == self.number
        if here and self.fault == "refused":
            raise OSError(f"503 SlowDown ({kind})")
        return self.fault if here else ""

    def _answer(self, fault: str, value: Any) -> Any:
        if fault == "response lost":
            raise TimeoutError("no response")
        return value

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        return self._answer(self._goes_wrong("list"), super().find(path, *arguments, **options))

    def exists(self, path: str, **_: Any) -> bool:
        return bool(self._answer(self._goes_wrong("head"), self._strip_protocol(path) in self.store))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        fault = self._goes_wrong("get")
        return bytes(self._answer(fault, self.store[self._strip_protocol(path)].getvalue()[start:end]))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":
            return super()._open(path, mode, **options)
        if path not in self.store:
            raise FileNotFoundError(path)
        fault, data = self._goes_wrong("get"), self.store[path].getvalue()
        return io.BytesIO(self._answer(fault, data[: len(data) // 2] if fault == "cut short" else data))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        fault = self._goes_wrong("put")
        super().put_file(lpath, rpath, **options)
        self._answer(fault, None)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        fault = self._goes_wrong("put")
        if mode == "create" and self._strip_protocol(path) in self.store:
            raise FileExistsError(path)
        super().pipe_file(path, value)
        self._answer(fault, None)

    def rm_file(self, path: str) -> None:
        fault = self._goes_wrong("delete")
        self.store.pop(self._strip_protocol(path), None)
        self._answer(fault, None)


fsspec.register_implementation("flaky", FlakyStore, clobber=True)
