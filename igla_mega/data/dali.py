"""Load micro-batches through an NVIDIA DALI pipeline, which runs ahead in its own threads and copies to the GPU."""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.data.micro_batch import SEQUENCES, MicroBatch
from igla_mega.data.prefetch import Make, steps_from


class Dali:
    """Loader that passes the micro-batches of `make` through a DALI pipeline."""

    def __init__(self, make: Make, depth: int):
        """Import DALI; the pipeline is built at the first step.

        Args:
            depth: number of micro-batches that the pipeline prefetches, at least 1.

        Raises:
            ConfigError: DALI is not installed.
        """
        try:
            from nvidia import dali
        except ImportError:
            raise ConfigError(
                "data.loader: dali is not installed.\n"
                "  pip install nvidia-dali-cuda120 (or cuda130), or set data.loader=native."
            ) from None
        self._dali = dali
        self._make, self._depth = make, max(depth, 1)
        self._next: tuple[int, Hashable] | None = None
        self._pipeline: Any = None
        self._source: Iterator[tuple[MicroBatch, bool]] = iter(())
        self._in_flight: deque[tuple[MicroBatch, bool]] = deque()
        """Batches in the pipeline, each with True if it is the last of its step. Their tensors come back from DALI."""

    def step(self, step: int, share: Any) -> Iterator[MicroBatch]:
        """Yield the micro-batches of a step, in order."""
        # The pipeline has already read ahead in step order: any other step discards it and builds a new one.
        if self._next != (step, share):
            self._source = steps_from(self._make, step, share)
            self._in_flight.clear()
            self._pipeline = self._built()
        self._next = None
        is_last = False
        while not is_last:
            tensors = [_tensor(output) for output in self._pipeline.run()]
            batch, is_last = self._in_flight.popleft()
            if is_last:
                self._next = step + 1, share
            changed: dict[str, Any] = dict(zip(SEQUENCES, tensors, strict=True))
            yield batch._replace(**changed)

    def _feed(self) -> tuple[np.ndarray, ...]:
        """Return the next micro-batch's arrays to DALI and queue its other fields, which DALI cannot carry."""
        batch, is_last = next(self._source)
        self._in_flight.append((batch, is_last))
        return tuple(getattr(batch, name).numpy() for name in SEQUENCES)

    def _built(self) -> Any:
        """Build the pipeline, on the current CUDA device if there is one."""
        cuda = torch.cuda.is_available()
        pipeline = self._dali.Pipeline(
            batch_size=1 << 16,  # DALI's bound on the rows of a micro-batch, not their number
            num_threads=1,
            device_id=torch.cuda.current_device() if cuda else None,
            prefetch_queue_depth=self._depth,
        )
        with pipeline:
            outputs = self._dali.fn.external_source(source=self._feed, num_outputs=len(SEQUENCES), batch=True)
            pipeline.set_outputs(*[output.gpu() if cuda else output for output in outputs])
        pipeline.build()
        return pipeline


def _tensor(samples: Any) -> torch.Tensor:
    """Return a copy of a DALI batch as one tensor; DALI reuses its own buffer for a later batch."""
    whole = samples.as_tensor()
    return torch.from_dlpack(whole).clone() if hasattr(whole, "__dlpack__") else torch.from_numpy(np.array(whole))
