"""Start the ranks of this machine with torch's elastic agent, forward signals to them, and return their exit code."""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousError

from igla_mega.config.errors import ConfigError
from igla_mega.distributed import environment
from igla_mega.distributed.rendezvous import LoopbackRendezvous, keep_to_loopback, open_rendezvous

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
WRONG, REQUEUE, STUCK = 2, 75, 76
"""Exit codes that the command passes on from its ranks: a user's mistake; stopped by a scheduler; found stuck."""
SAVE_SECONDS = 600
"""Maximum time that ranks may take to save and end when a node joins, in seconds; then they are killed."""
Ended = Callable[[str, str, int], None]
"""Called with how the ranks ended, a sentence about it, and the exit code: see `train.ends.Launched`."""


def torchrun(
    nproc: int,
    *,
    nodes: tuple[int, int] = (1, 1),
    rendezvous: str | None = None,
    restarts: int = 0,
    run_dir: Path | None = None,
    ended: Ended | None = None,
) -> int:
    """Start this same command as `nproc` ranks on this machine and return their exit code.

    Args:
        nodes: minimum and maximum number of machines; the run continues with any number between them.
        rendezvous: HOST:PORT at which several machines meet; the agent on HOST serves it.
        restarts: how often the ranks are started again after a failure.
        run_dir: folder of the run, which several machines share.
        ended: called when the ranks have failed, before they are started again or at the end.

    Raises:
        ConfigError: the machines did not meet.
    """
    _set_environment(nproc, several_nodes=nodes != (1, 1))
    handler = _rendezvous(nodes, rendezvous, run_dir)
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
    agent.fixed, agent.ended, agent.oom_kills = nodes[0] == nodes[1], ended, _oom_kills()
    for number in STOPPING:
        # A signal that the parent ignores stays ignored: nohup ignores SIGHUP.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, agent.forward_signal)
    try:
        result = agent.run()
        return agent.report(result) if result.is_failed() else 0
    except SignalException as stopped:
        code = _code_of_signal(stopped.sigval)
        if agent.restarting and ended:  # ranks that get the signal themselves record that they stop
            ended("failed", f"{stopped.sigval.name} while the ranks were started again", code)
        return code
    except RendezvousConnectionError:
        raise _unreachable(rendezvous) from None
    except RendezvousError as error:
        raise ConfigError(
            f"--rendezvous: the nodes did not meet at {rendezvous or 'this machine'} ({type(error).__name__}).\n"
            f"  Start the same command on {nodes[0]} to {nodes[1]} nodes."
        ) from None
    finally:
        handler.shutdown()


def _rendezvous(nodes: tuple[int, int], address: str | None, run_dir: Path | None) -> RendezvousHandler:
    """Return where the agents of the run meet: behind the loopback interface for one machine."""
    if nodes == (1, 1):
        keep_to_loopback()
        return LoopbackRendezvous(run_dir.name if run_dir else "igla-mega")
    assert address is not None and run_dir is not None, "the command line asks for both"
    # A lost node is noticed after 15 s (5 s, three times); the remaining ones then wait 10 s for others to join.
    waits = {"last_call_timeout": 10, "keep_alive_interval": 5, "keep_alive_max_attempt": 3}
    try:
        return open_rendezvous(RendezvousParameters("c10d", address, run_dir.name, *nodes, None, **waits), run_dir)
    except RendezvousConnectionError:
        raise _unreachable(address) from None


def _unreachable(address: str | None) -> ConfigError:
    return ConfigError(
        f"--rendezvous: {address} cannot be reached from {socket.gethostname()}, or its server has ended.\n"
        "  Give a host and a free port that all nodes can reach; the command must also run on that host."
    )


def _set_environment(nproc: int, *, several_nodes: bool) -> None:
    """Set the environment variables and the log level that torch's agent and the ranks read."""
    # A failed rank prints its own error; torch's report of it is a page of traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    os.environ[environment.LAUNCHER] = str(os.getpid())
    # torch kills ranks 30 s after a signal that it handles, which is too short for a step and its save. So it handles
    # this one alone, and `_Agent.forward_signal` forwards the others.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if several_nodes:
        # An agent that shares the ranks' store keeps the address of its first one (dynamic_rendezvous.py:1146), so a
        # node that joins later, or outlives the node of that store, would wait for it forever.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


class _Agent(LocalElasticAgent):
    """torch's elastic agent, except that ranks are not restarted once a stop was requested."""

    stop_signal: int = 0
    """First signal that requested a stop; 0 if there was none."""
    fixed: bool = True
    """True if the number of nodes is fixed. Otherwise ranks may end on request and restart in a different number."""
    restarting: bool = False
    """True from a failure until the ranks run again."""
    oom_kills: int = 0
    """Number of processes of this machine that the kernel had killed for want of memory when the ranks started."""
    ended: Ended | None = None
    """Called with each end of the ranks."""
    _failed: RunResult | None = None
    """The last failure of ranks."""

    def forward_signal(self, number: int, _) -> None:
        """Forward a signal to the ranks, which finish their step and save; end at once if there are none yet."""
        first, self.stop_signal = not self.stop_signal, self.stop_signal or number
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if first and not ranks:
            raise SignalException(f"stop requested by signal {number}", signal.Signals(number))

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Return the state of the ranks, and disable restarts where another start would not help."""
        result = super()._monitor_workers(worker_group)
        codes = {one.exitcode for one in result.failures.values()}
        if result.failures:
            self._failed = result
        if WRONG in codes or (self.fixed and any(code == REQUEUE or code > 128 for code in codes)):
            # A mistake in the recipe fails again; after a stop request it is the scheduler that starts the run again.
            self._remaining_restarts = 0
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        """Restart the ranks, after a save if they are healthy; end instead if a stop was requested."""
        if self.stop_signal:
            raise SignalException("stop requested", signal.Signals(self.stop_signal))
        # Healthy ranks are restarted only when a node has joined. torch would kill them, and the steps since the last
        # checkpoint would be lost: SIGTERM makes them save first.
        if worker_group.state == WorkerState.HEALTHY:
            self._shutdown(signal.SIGTERM, SAVE_SECONDS)
        else:
            print("starting the ranks again, from the last checkpoint", file=sys.stderr, flush=True)
            self._shutdown()  # before the report: a rank that still runs would write that it does
            self.restarting = True
            if self._failed is not None and self.ended:
                _, message = _cause(self._failed, self.oom_kills)
                self.ended("restarting", f"{message}; the ranks are started again", 0)
        super()._restart_workers(worker_group)
        self.restarting = False

    def report(self, result: RunResult) -> int:
        """Report ranks that have failed for good; return the exit code of the command."""
        code = _exit_code(result, self.stop_signal)
        kind, message = _cause(result, self.oom_kills)
        if kind == "killed" and not self.stop_signal:
            print(f"error: {message}; the same command resumes", file=sys.stderr)
        if self.ended and (kind == "killed" or code not in (REQUEUE, 128 + self.stop_signal)):
            self.ended(kind, message, code)
        return code


def _exit_code(result: RunResult, stop_signal: int) -> int:
    """Return the exit code of the rank that failed first, if it is one that the command passes on, else 1."""
    _, failure = _first(result)
    codes = {one.exitcode for one in result.failures.values()}
    if STUCK in codes:
        # The rank with this code has reported the cause and killed the one that hung, which may have ended before it.
        return STUCK
    code = failure.exitcode
    if stop_signal and (code < 0 or code in (REQUEUE, 128 + stop_signal)):
        return _code_of_signal(stop_signal)
    return code if code in (WRONG, REQUEUE) or code > 128 else 1


def _first(result: RunResult) -> tuple:
    """Return the rank that failed first and its failure."""
    # By time, not by rank: ranks that lose a peer fail soon after it, with errors about the lost connection. Times are
    # whole seconds; of failures within one, a signal is the cause and an exit code the consequence. Not SIGTERM: torch
    # sends it to the ranks that are left.
    first = min(failure.timestamp for failure in result.failures.values())
    sent = -signal.SIGTERM
    return min(
        result.failures.items(),
        key=lambda item: (
            item[1].timestamp - first > 1,
            item[1].exitcode == sent,
            item[1].exitcode >= 0,
            item[1].timestamp,
        ),
    )


def _cause(result: RunResult, oom_kills: int) -> tuple[str, str]:
    """Return how the ranks ended, `killed`, `hung` or `failed`, and a sentence about the first of them."""
    rank, failure = _first(result)
    if STUCK in {one.exitcode for one in result.failures.values()}:
        return "hung", "the watchdog ended the run, which was stuck"
    if failure.exitcode >= 0:
        return "failed", f"rank {rank} ended first, with exit code {failure.exitcode}"
    name, hint = signal.Signals(-failure.exitcode).name, ""
    if name == "SIGKILL" and _oom_kills() > oom_kills:
        hint = " (out of memory: the kernel killed a process of this machine for it)"
    elif name == "SIGKILL":
        hint = " (the kernel also sends SIGKILL when memory is exhausted)"
    return "killed", f"rank {rank} was ended by {name}{hint}"


def _oom_kills() -> int:
    """Return how many processes the kernel has killed since boot because memory was exhausted; 0 if it is unknown."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(counters.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def _code_of_signal(number: int) -> int:
    """Return the exit code of a run that ended on a stop signal: as a shell's for a person, else REQUEUE."""
    return 128 + number if number in (signal.SIGINT, signal.SIGHUP) else REQUEUE
