"""Run an iterator in a thread, a bounded number of items ahead of its consumer."""

import queue
import threading
from collections.abc import Iterator
from typing import Any


def ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """Yield the same items, produced by a background thread at most `depth` ahead."""
    waiting: queue.Queue = queue.Queue(depth)
    ended = threading.Event()

    def put(item: Any) -> bool:
        """Enqueue an item; return False once the consumer has stopped."""
        # With a timeout, since a blocked `put` would never notice that the consumer is gone.
        while not ended.is_set():
            try:
                waiting.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        """Produce the items in the background thread."""
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:  # raised again in the consumer's thread
            put((None, error))

    threading.Thread(target=work, daemon=True, name="read ahead").start()
    try:
        while True:
            item, error = waiting.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        ended.set()
