"""Track what this rank is doing: updated by the training thread with a few assignments, read by other threads."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_model_config
from torch import Tensor, nn

COLLECTIVES = {
    "allreduce": "all_reduce",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "allgather_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
    "monitored_barrier": "barrier",
    "send": "send",
    "recv": "recv",
    "recv_anysource": "recv",
}
"""Public name of each collective, by the method of torch's ProcessGroup that implements it."""
# Point-to-point operations do not count: their numbers differ between the ranks of a group.
_ONE_SIDED = ("send", "recv")
SAVER = "checkpoint"
"""Prefix of the names of threads that save checkpoints in the background; their collectives are not tracked."""


@dataclass
class Heartbeat:
    """Current position of a rank, and a counter that shows its progress.

    Written without a lock: a reader may see a mix of two moments, which is good enough for a report.
    """

    ticks: int = 0
    """Counter that every layer, micro-batch and collective increments; the rank is making progress while it changes."""
    task: str = "starting"
    """Current task: `starting`, `training`, `validation`, `saving`, ..."""
    step: int = 0
    """Current step, counted from 1."""
    phase: str = ""
    """Phase within the step: data, forward, backward, gradient reduce, loss, optimizer."""
    micro_batch: int = 0
    """Current micro-batch, counted from 1."""
    layer: int = 0
    """Current layer of the whole model, counted from 1."""
    collective: tuple[str, str, int] | None = None
    """Last collective entered: its name, its group's name, and its number within the group (0 for send and recv)."""
    waiting: bool = False
    """True while the rank is inside that collective."""
    issued: dict[str, int] = field(default_factory=dict)
    """Number of collectives entered so far, by group name."""
    waited: float = 0.0
    """Seconds spent in collectives so far, including waiting for other ranks; without an accelerator only, because
    calls on one return before the collective has run."""
    may_be_slow: bool = True
    """True if the current task may take long without a tick: a start, a save, the first step of a stage."""
    events: list[tuple[Any, Any]] | None = None
    """On an accelerator, pairs of events around every collective of a timed step; None while no step is timed."""

    def at(self, phase: str, micro_batch: int = 0) -> None:
        """Record the start of a phase of the step."""
        self.ticks += 1
        self.phase, self.micro_batch, self.layer = phase, micro_batch, 0

    @contextmanager
    def doing(self, task: str, *, may_be_slow: bool = False) -> Iterator[None]:
        """Set the task for the duration of a block, then restore the previous one."""
        before = self.task, self.may_be_slow, self.phase, self.micro_batch
        self.task, self.may_be_slow = task, may_be_slow
        self.at("")
        failed: BaseException | None = None
        try:
            yield
        except BaseException as error:
            failed = error
            raise
        finally:
            self.ticks += 1
            # After an error the position stays where it happened, for the report. A FloatingPointError is a bad step,
            # after which training may continue.
            if failed is None or isinstance(failed, FloatingPointError):
                self.task, self.may_be_slow, self.phase, self.micro_batch = before

    def drawn(self, batches: Iterator) -> Iterator:
        """Yield the micro-batches, and record which one is awaited and which one is being processed."""
        number = 0
        while True:
            number += 1
            self.at("data", number)
            batch = next(batches, None)
            if batch is None:
                return
            self.at("forward", number)
            yield batch

    def forward(self, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of a layer: record it, and add a hook for its backward pass."""
        self.ticks += 1
        self.layer = number
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(self.backward, number))

    def backward(self, number: int, gradient: Tensor) -> None:
        """Gradient hook of a layer's output: record the start of its backward pass."""
        self.ticks += 1
        self.phase, self.layer = "backward", number

    def where(self) -> dict[str, Any]:
        """Return the position as a dictionary that JSON can encode."""
        return {
            "task": self.task,
            "step": self.step,
            "phase": self.phase,
            "micro_batch": self.micro_batch,
            "layer": self.layer,
            "collective": self.collective,
            "waiting": self.waiting,
            "issued": dict(self.issued),
        }


@contextmanager
def followed(heartbeat: Heartbeat) -> Iterator[None]:
    """Record every collective that this process enters in the heartbeat, including those of libraries.

    Replaces methods of torch's ProcessGroup and `Work.wait` for the duration of the block: torch has no hook for this.
    """
    main = threading.get_ident()

    def in_background() -> bool:
        """Return True in a thread that saves a checkpoint."""
        return threading.get_ident() != main and threading.current_thread().name.startswith(SAVER)

    def tracked(name: str, call: Callable) -> Callable:
        """Wrap a method of ProcessGroup: record and number the collective."""

        def enter(group, *args, **kwargs):
            if in_background():
                return call(group, *args, **kwargs)
            # All ranks of a group enter its collectives in one order, so equal numbers mean the same collective.
            key, number = group.group_name, 0
            if name not in _ONE_SIDED:
                number = heartbeat.issued[key] = heartbeat.issued.get(key, 0) + 1
            heartbeat.collective = (name, key, number)
            return _timed(heartbeat, call, group, *args, **kwargs)

        return enter

    def tracked_wait(call: Callable) -> Callable:
        """Wrap `Work.wait`, in which an asynchronous collective spends its time."""
        return lambda work, *args, **kwargs: (
            call(work, *args, **kwargs) if in_background() else _timed(heartbeat, call, work, *args, **kwargs)
        )

    with ExitStack() as undo:
        for method, name in COLLECTIVES.items():
            # Restored from `vars`: getattr would return the function instead of its descriptor. Methods that this
            # version of torch does not have are skipped.
            if (descriptor := vars(dist.ProcessGroup).get(method)) is not None:
                setattr(dist.ProcessGroup, method, tracked(name, getattr(dist.ProcessGroup, method)))
                undo.callback(setattr, dist.ProcessGroup, method, descriptor)
        undo.callback(setattr, dist.Work, "wait", vars(dist.Work)["wait"])
        dist.Work.wait = tracked_wait(dist.Work.wait)  # type: ignore[method-assign]
        yield


def _timed(heartbeat: Heartbeat, call: Callable, *args, **kwargs):
    """Call a function and record its duration: on the host's clock, and by events while a step is timed."""
    heartbeat.ticks += 1
    heartbeat.waiting = True
    events = heartbeat.events
    if events is not None:
        before = torch.cuda.Event(enable_timing=True)
        before.record()
    start = time.perf_counter()
    try:
        return call(*args, **kwargs)
    finally:
        heartbeat.waited += time.perf_counter() - start
        heartbeat.waiting = False
        heartbeat.ticks += 1
        if events is not None:
            after = torch.cuda.Event(enable_timing=True)
            after.record()
            events.append((before, after))


def follow_layers(heartbeat: Heartbeat, chunks: Iterable[nn.Module]) -> None:
    """Record the forward and backward pass of each layer, and the reduction of gradients, in the heartbeat."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_hook(partial(heartbeat.forward, module.layer_number))
        config: Any = get_model_config(chunk)
        reduce = config.finalize_model_grads_func
        # Chunks may share one config: wrap its function only once.
        if reduce is not None and not isinstance(reduce, _RecordedReduce):
            config.finalize_model_grads_func = _RecordedReduce(heartbeat, reduce)


class _RecordedReduce:
    """Function that reduces gradients, and records in the heartbeat when it is called."""

    def __init__(self, heartbeat: Heartbeat, call: Callable):
        self.heartbeat, self.call = heartbeat, call

    def __call__(self, *args, **kwargs):
        self.heartbeat.at("gradient reduce")
        return self.call(*args, **kwargs)
