"""NVIDIA DALI as loader: its pipeline's threads take the batches over, and copy them to the GPU where there is one."""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.data.micro_batch import SEQUENCES, MicroBatch
from igla_mega.data.prefetch import Make, steps_from


class Dali:
    """The micro-batches of `make`, through a DALI pipeline that runs ahead."""

    def __init__(self, make: Make, depth: int):
        """
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
        self._under_way: deque[tuple[MicroBatch, bool]] = deque()
        """Batches inside the pipeline, and whether each is the last of its step."""

    def step(self, step: int, share: Any) -> Iterator[MicroBatch]:
        """The micro-batches of a step, in order."""
        if self._next != (step, share):
            self._source = steps_from(self._make, step, share)
            self._under_way.clear()
            self._pipeline = self._built()
        self._next = None
        is_last = False
        while not is_last:
            tensors = [_tensor(output) for output in self._pipeline.run()]
            batch, is_last = self._under_way.popleft()
            if is_last:
                self._next = step + 1, share
            changed: dict[str, Any] = dict(zip(SEQUENCES, tensors, strict=True))
            yield batch._replace(**changed)

    def _feed(self) -> tuple[np.ndarray, ...]:
        batch, is_last = next(self._source)
        self._under_way.append((batch, is_last))
        return tuple(getattr(batch, name).numpy() for name in SEQUENCES)

    def _built(self) -> Any:
        cuda = torch.cuda.is_available()
        pipeline = self._dali.Pipeline(
            batch_size=1 << 16,
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
    """A batch of DALI's as one tensor of our own: it uses its memory again."""
    whole = samples.as_tensor()
    return torch.from_dlpack(whole).clone() if hasattr(whole, "__dlpack__") else torch.from_numpy(np.array(whole))
