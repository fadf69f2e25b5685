"""Where this rank is: kept up to date by the training thread for the cost of a few assignments, read by others."""

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
"""Of torch's ProcessGroup: method -> the name that its users know."""
_ONE_SIDED = ("send", "recv")
SAVER = "checkpoint"
"""What the names of threads begin with that save beside the training: their collectives are not the training's."""


@dataclass
class Heartbeat:
    """What a rank does now, and that it still does something."""

    ticks: int = 0
    """Counted up by every layer, micro-batch and collective: while it moves, the rank is alive."""
    task: str = "starting"
    """`starting`, `training`, `validation`, `saving`, ..."""
    step: int = 0
    """The step being taken, counted from 1."""
    phase: str = ""
    """Within it: data, forward, backward, gradient reduce, loss, optimizer."""
    micro_batch: int = 0
    """Counted from 1."""
    layer: int = 0
    """Of the whole model, counted from 1."""
    collective: tuple[str, str, int] | None = None
    """The last one entered: its name, its group's, and its number within the group (0: sent to one rank alone)."""
    waiting: bool = False
    """Whether the rank is inside it."""
    issued: dict[str, int] = field(default_factory=dict)
    """Collectives entered so far, by group."""
    waited: float = 0.0
    """Seconds spent in collectives so far, waiting for others included; without an accelerator."""
    may_be_slow: bool = True
    """Whether what is done now may take long without a sign: a start, a save, the first step of a stage."""
    events: list[tuple[Any, Any]] | None = None
    """On an accelerator, while a step is timed: events around every collective."""

    def at(self, phase: str, micro_batch: int = 0) -> None:
        """Enter a phase of the step."""
        self.ticks += 1
        self.phase, self.micro_batch, self.layer = phase, micro_batch, 0

    @contextmanager
    def doing(self, task: str, *, may_be_slow: bool = False) -> Iterator[None]:
        """Name what happens meanwhile."""
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
            # Where a run ends by an error, the place of that error is what is to be told.
            if failed is None or isinstance(failed, FloatingPointError):
                self.task, self.may_be_slow, self.phase, self.micro_batch = before

    def drawn(self, batches: Iterator) -> Iterator:
        """The micro-batches, saying which is waited for and which is gone through."""
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
        """Called behind a layer's forward pass."""
        self.ticks += 1
        self.layer = number
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(partial(self.backward, number))

    def backward(self, number: int, gradient: Tensor) -> None:
        """Called in front of a layer's backward pass."""
        self.ticks += 1
        self.phase, self.layer = "backward", number

    def where(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
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
    """Have the pulse follow every collective that this process enters, whoever calls it."""
    main = threading.get_ident()

    def aside() -> bool:
        return threading.get_ident() != main and threading.current_thread().name.startswith(SAVER)

    def entered(name: str, call: Callable) -> Callable:
        def enter(group, *args, **kwargs):
            if aside():
                return call(group, *args, **kwargs)
            key, number = group.group_name, 0
            if name not in _ONE_SIDED:
                number = heartbeat.issued[key] = heartbeat.issued.get(key, 0) + 1
            heartbeat.collective = (name, key, number)
            return timed(call, group, *args, **kwargs)

        return enter

    def timed(call: Callable, *args, **kwargs):
        heartbeat.ticks += 1
        heartbeat.waiting = True
        events = heartbeat.events
        if events is not None:
            begin = torch.cuda.Event(enable_timing=True)
            begin.record()
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            heartbeat.waited += time.perf_counter() - start
            heartbeat.waiting = False
            heartbeat.ticks += 1
            if events is not None:
                end = torch.cuda.Event(enable_timing=True)
                end.record()
                events.append((begin, end))

    def waited_for(call: Callable) -> Callable:
        return lambda work, *args, **kwargs: (
            call(work, *args, **kwargs) if aside() else timed(call, work, *args, **kwargs)
        )

    with ExitStack() as undo:
        for method, name in COLLECTIVES.items():
            if (descriptor := vars(dist.ProcessGroup).get(method)) is not None:
                setattr(dist.ProcessGroup, method, entered(name, getattr(dist.ProcessGroup, method)))
                undo.callback(setattr, dist.ProcessGroup, method, descriptor)
        undo.callback(setattr, dist.Work, "wait", vars(dist.Work)["wait"])
        dist.Work.wait = waited_for(dist.Work.wait)  # type: ignore[method-assign]
        yield


def follow_layers(heartbeat: Heartbeat, chunks: Iterable[nn.Module]) -> None:
    """Have the pulse follow the layers of model chunks, forward and backward, and the reduction of their gradients."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_hook(partial(heartbeat.forward, module.layer_number))
        config: Any = get_model_config(chunk)
        reduce = config.finalize_model_grads_func
        if reduce is not None and not isinstance(reduce, _Announced):
            config.finalize_model_grads_func = _Announced(heartbeat, reduce)


class _Announced:
    """A function that says that it is called."""

    def __init__(self, heartbeat: Heartbeat, call: Callable):
        self.heartbeat, self.call = heartbeat, call

    def __call__(self, *args, **kwargs):
        self.heartbeat.at("gradient reduce")
        return self.call(*args, **kwargs)
