"""An object store in memory whose requests are counted and take time; one place that all of them pass. `store://` paths."""

import io
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class ObjectStore(MemoryFileSystem):
    """delay: seconds each request waits; requests: how many of each kind were made (list: one for every 1,000 names)."""

    protocol = "store"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    requests: ClassVar[Counter[str]] = Counter()
    delay = 0.0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix(f"{cls.protocol}://").strip("/")

    def request(self, kind: str, answer: Callable[[], Any]) -> Any:
        self.requests[kind] += 1
        time.sleep(self.delay)
        return answer()

    def find(self, path: str, *_: Any, detail: bool = False, **__: Any) -> Any:
        folder = self._strip_protocol(path).rstrip("/") + "/"
        names = [name for name in list(self.store) if name.startswith(folder)]
        for _page in range(len(names) // 1000):
            self.request("list", lambda: None)
        found = {name: {"name": name, "size": self.store[name].size, "type": "file"} for name in names}
        return self.request("list", lambda: found if detail else names)

    def isdir(self, path: str) -> bool:
        return bool(self.request("list", lambda: super(ObjectStore, self).isdir(path)))

    def exists(self, path: str, **_: Any) -> bool:
        return bool(self.request("head", lambda: self._strip_protocol(path) in self.store))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return bytes(self.request("get", lambda: self.store[self._strip_protocol(path)].getvalue()[start:end]))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode != "rb":  # of put_file, which counts
            return super()._open(path, mode, **options)
        if path not in self.store:
            raise FileNotFoundError(path)
        return io.BytesIO(self.request("get", self.store[path].getvalue))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.request("put", lambda: super(ObjectStore, self).put_file(lpath, rpath, **options))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if mode == "create" and self._strip_protocol(path) in self.store:
            raise FileExistsError(path)
        self.request("put", lambda: super(ObjectStore, self).pipe_file(path, value))

    def rm_file(self, path: str) -> None:
        self.request("delete", lambda: self.store.pop(self._strip_protocol(path), None))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Object stores have none."""


fsspec.register_implementation("store", ObjectStore, clobber=True)
