"""Start the ranks of this machine by torch's elastic agent, hand signals on to them, and say how they ended."""

import contextlib
import logging
import os
import signal
import socket
import sys

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from igla_mega.config.errors import ConfigError
from igla_mega.distributed import environment

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WRONG, REQUEUE, STUCK = 2, 75, 76
"""Exit codes of ranks that are the command's too: a user's mistake; asked to stop by a scheduler; found stuck."""
SAVE_SECONDS = 600
"""How long ranks may take to save and end when a node joins, before they are killed."""


def torchrun(
    nproc: int, *, nodes: tuple[int, int] = (1, 1), rendezvous: str | None = None, restarts: int = 0, run_id: str = ""
) -> int:
    """Start this same command as `nproc` ranks on this machine and return their exit code.

    Args:
        nodes: least and most machines; between them the run goes on with those that are there.
        rendezvous: HOST:PORT where several machines meet; the agent on HOST keeps it.
        restarts: how often ranks are started again after a failure.
        run_id: of the machines that belong together.

    Raises:
        ConfigError: the machines did not meet.
    """
    # What went wrong is said by the rank; torch's own account of it is a page of traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ[environment.LAUNCHER] = str(os.getpid())
    # Signals but this one are handed on: torch would kill ranks that take 30 s for their step and its save.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if nodes != (1, 1):
        # torch's agents keep the address of their first store: one that joins, or outlives it, would wait in vain.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # A node that is gone is missed after 15 s; those that are left wait so much longer for others.
    waits = {"last_call_timeout": 10, "keep_alive_interval": 5, "keep_alive_max_attempt": 3}
    handler = get_rendezvous_handler(
        RendezvousParameters(
            "c10d", rendezvous or "localhost:0", run_id or "igla-mega", nodes[0], nodes[1], None, **waits
        )
    )
    spec = WorkerSpec(
        role="igla-mega",
        local_world_size=nproc,
        entrypoint=sys.executable,
        args=("-m", "igla_mega", *sys.argv[1:]),
        rdzv_handler=handler,
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    agent = _Agent(spec, DefaultLogsSpecs())
    agent.fixed = nodes[0] == nodes[1]
    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, agent.hand_on)
    try:
        result = agent.run()
        return _exit_code(result, agent.asked) if result.is_failed() else 0
    except SignalException as stopped:
        return _code_of_signal(stopped.sigval)
    except RendezvousConnectionError:
        raise ConfigError(
            f"--rendezvous: {rendezvous} cannot be reached from {socket.gethostname()}, or what was there is gone.\n"
            "  Name a host and a free port that all nodes reach; a command on that host must run."
        ) from None
    except RendezvousError as error:
        raise ConfigError(
            f"--rendezvous: the nodes did not meet at {rendezvous or 'this machine'} ({type(error).__name__}).\n"
            f"  Start the same command on {nodes[0]} to {nodes[1]} nodes."
        ) from None
    finally:
        handler.shutdown()


class _Agent(LocalElasticAgent):
    """torch's agent, but that a run which was asked to stop is not started again."""

    asked: int = 0
    """The first signal that asked for a stop."""
    fixed: bool = True
    """Whether nodes neither come nor go: where they may, ranks end as asked and are started again in another number."""

    def hand_on(self, number: int, _) -> None:
        """Pass a signal on to the ranks, which finish their step and save; where there are none yet, end."""
        first, self.asked = not self.asked, self.asked or number
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if first and not ranks:
            raise SignalException(f"asked to stop by signal {number}", signal.Signals(number))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        codes = {one.exitcode for one in result.failures.values()}
        if WRONG in codes or (self.fixed and any(code == REQUEUE or code > 128 for code in codes)):
            self._remaining_restarts = 0  # another start would end the same way, or is for the scheduler
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self.asked:
            raise SignalException("asked to stop", signal.Signals(self.asked))
        if worker_group.state == WorkerState.HEALTHY:  # a node has joined: what was trained is saved first
            self._shutdown(signal.SIGTERM, SAVE_SECONDS)
        else:
            print("starting the ranks again, from the last checkpoint", file=sys.stderr, flush=True)
        super()._restart_workers(worker_group)


def _exit_code(result: RunResult, asked: int) -> int:
    """The first failure's, where it means something; peers that lose the first rank end with errors of their own."""
    rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
    codes = {one.exitcode for one in result.failures.values()}
    if STUCK in codes:
        return STUCK  # that rank has said why, and has ended the one that could not end by itself
    code = failure.exitcode
    if asked and (code < 0 or code in (REQUEUE, 128 + asked)):
        return _code_of_signal(asked)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (SIGKILL is also how a machine without memory left ends a process)" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was ended by {name}{hint}; the same command resumes", file=sys.stderr)
    return code if code in (WRONG, REQUEUE) or code > 128 else 1


def _code_of_signal(number: int) -> int:
    return 128 + number if number in (signal.SIGINT, signal.SIGHUP) else REQUEUE
