"""A file that is hashed while it is written."""

import hashlib
from typing import IO


class HashingWriter:
    """A writable file that knows the SHA-256 and the size of what went through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self.size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def close(self) -> None:
        """Kept open on purpose: `atomic_write` closes the file once all of it is known to be there."""

    def sha256(self) -> str:
        return self._digest.hexdigest()
