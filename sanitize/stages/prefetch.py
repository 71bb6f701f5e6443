"""Samples → batches of decoded images, read and decoded ahead by threads while the model works."""

import contextlib
import itertools
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from sanitize.records import DecodedImage, Sample
from sanitize.stages.images import decode_sample

AHEAD = 3  # batches in memory: one in the model, two on the way


def image_batches(samples: Iterable[Sample], batch_size: int, threads: int) -> Iterator[list[DecodedImage]]:
    """Images in sample order, `batch_size` at a time (the last may be smaller). Reading happens in a thread of its own.

    Errors of the reader surface here. Memory: at most AHEAD batches of undecoded or decoded images.
    """
    with contextlib.closing(decode_ahead(samples, AHEAD * batch_size, threads)) as decoded:
        while batch := list(itertools.islice(decoded, batch_size)):
            yield batch


def decode_ahead(samples: Iterable[Sample], ahead: int, threads: int) -> Generator[DecodedImage, None, None]:
    """Images in sample order, up to `ahead` of them read and decoded before they are asked for."""
    ready: queue.Queue[Future[DecodedImage] | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()

    def read(pool: ThreadPoolExecutor) -> None:
        last: BaseException | None = None
        try:
            for sample in samples:
                _put(ready, pool.submit(decode_sample, sample), stop)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            last = error
        _put(ready, last, stop)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        reader = threading.Thread(target=read, args=(pool,), name="read-shard")
        reader.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item.result()
        finally:
            stop.set()
            reader.join()


def _put(
    ready: "queue.Queue[Future[DecodedImage] | BaseException | None]",
    item: Future[DecodedImage] | BaseException | None,
    stop: threading.Event,
) -> None:
    """Wait for room, but not for a consumer that has gone."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
            return
        except queue.Full:
            continue
