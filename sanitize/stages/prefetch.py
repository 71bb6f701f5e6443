"""Samples → batches of decoded images, read, decoded and resized ahead by threads while the model works."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from sanitize.config import EncoderSpec
from sanitize.profile import Profile
from sanitize.records import DecodedImage, Sample
from sanitize.stages.images import decode_sample, resized

T = TypeVar("T")
AHEAD = 3  # batches in memory: one in the model, two on the way
PIXELS = 1 << 27  # held ahead, and as many in a batch: 400 MB as RGB; one image alone may have more


def image_batches(
    samples: Iterable[Sample],
    batch_size: int,
    threads: int,
    spec: EncoderSpec | None = None,
    profile: Profile | None = None,
) -> Iterator[list[DecodedImage]]:
    """Images in sample order, `batch_size` at a time; fewer in the last batch, and where they are so large that a batch
    reaches PIXELS. Reading happens in a thread of its own. spec: of the encoder at whose size they come; None = as they are.

    Errors of the reader surface here. Memory: AHEAD batches of undecoded images, PIXELS decoded ones and one batch.
    """
    batch: list[DecodedImage] = []
    size = 0
    with contextlib.closing(decode_ahead(samples, AHEAD * batch_size, threads, spec, profile)) as decoded:
        for image in decoded:
            batch.append(image)
            size += _pixels(image)
            if len(batch) == batch_size or size >= PIXELS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _pixels(image: DecodedImage) -> int:
    return image.pixels[0].numel() if image.pixels is not None else 0


def decode_ahead(
    samples: Iterable[Sample], ahead: int, threads: int, spec: EncoderSpec | None = None, profile: Profile | None = None
) -> Generator[DecodedImage, None, None]:
    """Images in sample order, up to `ahead` of them read, and up to PIXELS of them decoded, before they are asked for."""
    timed = profile or Profile()
    ready: queue.Queue[Future[DecodedImage] | BaseException | None] = queue.Queue(maxsize=ahead)
    stop = threading.Event()
    budget = _PixelBudget(PIXELS)

    def read(pool: ThreadPoolExecutor) -> None:
        last: BaseException | None = None
        try:
            for turn, sample in enumerate(timed.each("read", samples)):
                _put(ready, pool.submit(_decode, sample, turn, budget, spec, timed), stop)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            last = error
        _put(ready, last, stop)

    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        reader = threading.Thread(target=read, args=(pool,), name="read-shard")
        reader.start()
        try:
            while True:
                item = _waiting(timed, "waiting_for_read", ready.empty(), ready.get)
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                image = _waiting(timed, "waiting_for_decode", not item.done(), item.result)
                budget.give_back(_pixels(image))
                yield image
        finally:
            stop.set()
            budget.close()
            reader.join()


def _waiting(profile: Profile, stage: str, must_wait: bool, get: Callable[[], T]) -> T:
    """Timed only where there is something to wait for: most images are ready."""
    if not must_wait:
        return get()
    with profile.of(stage):
        return get()


class _PixelBudget:
    """Pixels that are decoded and not yet asked for. Taken in sample order: a later image must not hold what an earlier one,
    which is asked for first, waits for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = self._turn = 0
        self._open = True
        self._changed = threading.Condition()

    def take(self, turn: int, pixels: int) -> None:
        """Wait until it is this sample's turn and there is room, or nothing at all is held."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open or (turn == self._turn and self._has_room(pixels)))
            self._turn = turn + 1
            self._held += pixels
            self._changed.notify_all()

    def _has_room(self, pixels: int) -> bool:
        return not self._held or self._held + pixels <= self._limit

    def give_back(self, pixels: int) -> None:
        with self._changed:
            self._held -= pixels
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any longer."""
        with self._changed:
            self._open = False
            self._changed.notify_all()


def _decode(
    sample: Sample, turn: int, budget: _PixelBudget, spec: EncoderSpec | None, profile: Profile
) -> DecodedImage:
    taken: list[int] = []
    least = spec.image_size**2 if spec else 0  # what a smaller image becomes

    def take(pixels: int) -> None:
        pixels = max(pixels, least)
        with profile.pause():
            budget.take(turn, pixels)
        taken.append(pixels)

    with profile.of("decode"):
        image = decode_sample(sample, before_decoding=take)
    if spec and image.pixels is not None:
        with profile.of("resize"):
            image = replace(image, pixels=resized(image.pixels, spec.image_size, spec.resize))
    if not taken:
        budget.take(turn, 0)
    elif (held := _pixels(image)) != taken[0]:  # it failed while it was decoded, or has another size now
        budget.give_back(taken[0] - held)
    return image


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
