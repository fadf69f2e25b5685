"""End a stuck run, and report which rank the others wait for, where each rank is, and the stack of the stuck one.

A thread of each rank writes that rank's heartbeat to the rendezvous store over a separate connection, so it continues
while the training thread is stuck. Two ranks read all heartbeats, in case one of the two is the stuck one; the first to
decide publishes a verdict, upon which every rank ends. A rank that receives no verdict for long enough ends by itself.
A run is stuck when no rank at all makes progress, or when a rank sends no heartbeats. A rank that takes long while the
others wait for it is not stuck as long as it makes progress.
"""

import contextlib
import datetime
import dis
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from igla_mega.config import json_text
from igla_mega.config.files import no_follow, read_text, write_text
from igla_mega.data.json_lines import ranges
from igla_mega.distributed.mesh import own_store
from igla_mega.engine.heartbeat import Heartbeat, followed
from igla_mega.train.trackers import write_event

HANG = "hang"
"""Folder in the run folder that holds reports of hangs, stacks and NCCL's flight records."""
EXIT_CODE = 76
"""Exit code of every rank of a run that was ended because it was stuck: EX_PROTOCOL of sysexits.h."""
LEARNED_FACTOR = 5
"""A rank may be silent for this multiple of its longest silence within a step, if that exceeds `hang_seconds`."""
SHOWN_PLACES = 32
"""Maximum number of different places of ranks that a report lists."""


@dataclass
class Sign:
    """Last heartbeat of a rank, as received by a watching rank."""

    text: bytes = b""
    """Heartbeat as stored, to detect a new one without parsing."""
    content: dict[str, Any] | None = None
    seen: float = 0.0
    """Time of arrival on the watcher's clock, in seconds."""
    moved: float = 0.0
    """Time of the last progress of the rank on the watcher's clock, in seconds."""


@contextmanager
def guarded(
    run_dir: Path, hang_seconds: int, patient_seconds: int, notify: Callable[[dict[str, Any]], None] | None = None
) -> Iterator[Heartbeat]:
    """Watch this rank and the others while the context is open.

    Args:
        hang_seconds: time without progress after which the run is ended; 0 disables the watchdog.
        patient_seconds: the same for operations that are known to be slow: a start, a save, the first step.
        notify: called with the event of a hang before the process ends; None where a launcher reports it.

    Raises:
        RuntimeError: a peer was lost; the message names it if it can be identified.
    """
    heartbeat = Heartbeat()
    if hang_seconds == 0:
        yield heartbeat
        return
    with followed(heartbeat):
        dog = Watchdog(heartbeat, run_dir, hang_seconds, max(hang_seconds, patient_seconds))
        dog.notify = notify
        dog.start()
        try:
            yield heartbeat
        except Exception as error:
            lost = dog.failed(error)
            if lost is not None:
                raise RuntimeError(lost) from error
            raise
        dog.stop()


class Watchdog:
    """Threads of one rank that send its heartbeat and end it when the run is stuck."""

    def __init__(self, heartbeat: Heartbeat, run_dir: Path, hang_seconds: float, patient_seconds: float):
        self.heartbeat, self.run_dir, self.folder = heartbeat, run_dir, run_dir / HANG
        self.hang_seconds, self.patient_seconds = hang_seconds, patient_seconds
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Seconds between heartbeats: a dozen of them within `hang_seconds`, so that a few lost ones are no alarm.
        self.interval = min(5.0, max(0.1, hang_seconds / 12))
        # A single process has no peers, and may have no rendezvous store.
        self._store = dist.HashStore() if self.world_size == 1 else own_store()
        # Restarted ranks may use the same store, which still holds the heartbeats of their predecessors.
        mark = torch.tensor([time.time_ns()])
        dist.broadcast(mark, src=0)
        self._store = dist.PrefixStore(f"watchdog/{mark.item()}", self._store)
        self._store.set_timeout(datetime.timedelta(seconds=max(1.0, hang_seconds)))
        self._main = threading.get_ident()
        # Two ranks, as far apart as possible: of one node's failure at most one is a victim.
        self._watches = self.rank in (0, self.world_size // 2)
        self._state, self._ended = "", threading.Event()
        self._quiet_since, self._longest_quiet, self._ticks = 0.0, 0.0, -1
        self._clock, self._last_reply, self._stack_sent = 0.0, 0.0, False
        self._busy = _Busy(self._main)
        self._signs = [Sign() for _ in range(self.world_size)]
        self._stacks: Any = None
        self.notify: Callable[[dict[str, Any]], None] | None = None
        self._reported: dict[str, Any] | None = None
        self._number = 0

    def start(self) -> None:
        """Start the threads."""
        with contextlib.suppress(OSError):  # without the folder, reports are still printed
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stacks = open(self._stack_file(self.rank), "w", opener=no_follow)  # noqa: SIM115 (open while the run lasts)
        for name, loop in (("talk", self._talk), ("guard", self._guard)):
            threading.Thread(target=loop, name=f"watchdog-{name}", daemon=True).start()

    def stop(self) -> None:
        """Stop watching, and publish that this rank ends without an error."""
        self._leave("done")

    def failed(self, error: Exception) -> str | None:
        """Publish that this rank ends, and why; return the message that names a lost peer, if that is the cause."""
        with contextlib.suppress(RuntimeError):
            # A verdict ends ranks one after another: this error may only be the echo of a peer that ended first.
            if self._store.check(["verdict"]):
                self._end([])
        text = str(error)
        # gloo and NCCL raise RuntimeError for everything; only the text tells a broken connection apart.
        peer_is_gone = any(words in text for words in ("onnection closed by peer", "onnection reset", "roken pipe"))
        self._leave("lost a peer" if peer_is_gone else f"failed: {text.splitlines()[0] if text else type(error)}")
        return self._lost_peer() if peer_is_gone else None

    def _leave(self, state: str) -> None:
        """Stop the threads, remove this rank's stack file, and publish `state` as the last heartbeat."""
        self._state = state
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                self._stack_file(self.rank).unlink()
                self.folder.rmdir()  # fails if a report is in it, as it should
        with contextlib.suppress(RuntimeError):
            self._publish()

    def _lost_peer(self) -> str | None:
        """Return the message that names a rank which ended without a reason, or None.

        A rank on this machine is looked up in the process table; one on another is taken for gone if no heartbeat of
        it arrives in the time of about four.
        """
        deadline = time.monotonic() + min(self.hang_seconds, 4 * self.interval + 1)
        before: list[bytes] = []
        while True:
            try:
                texts = self._store.multi_get([_key(rank) for rank in range(self.world_size)])
            except Exception:
                return None
            before = before or texts
            signs = [json_text.loads(text) for text in texts]
            if any(one["state"].startswith("failed") for one in signs):
                return None  # a peer has reported the cause itself
            gone = [one for one in signs if not one["state"] and _local(one) and not _alive(one)]
            if not gone and time.monotonic() > deadline:
                unchanged = [new == old for new, old in zip(texts, before, strict=True)]
                gone = [one for one, same in zip(signs, unchanged, strict=True) if same and not one["state"]]
            if gone or time.monotonic() > deadline:
                break
            time.sleep(self.interval / 2)
        if not gone:
            return None
        names = ", ".join(f"{one['rank']} (process {one['pid']} on {one['host']})" for one in gone)
        return (
            f"rank {names} is gone; its last heartbeat: {_place(gone[0])}. Rank {self.rank} was waiting for it: "
            f"{_place(self._sign())}.\n  The same command resumes from the last checkpoint."
        )

    def _sign(self) -> dict[str, Any]:
        """Return this rank's heartbeat, ready for JSON."""
        return {
            "rank": self.rank,
            "pid": os.getpid(),
            "started": _start_time(os.getpid()),
            "host": socket.gethostname(),
            "state": self._state,
            "ticks": self.heartbeat.ticks,
            "patience": self._patience(),
            **self.heartbeat.where(),
        }

    def _patience(self) -> float:
        """Return the time that this rank may go without progress in its current operation, in seconds."""
        if self.heartbeat.may_be_slow or self._busy.natively:
            return self.patient_seconds
        # A run whose steps are slow by nature raises its own bound, so that no user must find out `hang_seconds`.
        return max(self.hang_seconds, LEARNED_FACTOR * self._longest_quiet)

    def _publish(self) -> None:
        """Write this rank's heartbeat to the store."""
        # The number makes every heartbeat differ, even those of a rank that makes no progress.
        self._number += 1
        self._store.set(_key(self.rank), json.dumps({**self._sign(), "number": self._number}))

    def _talk(self) -> None:
        """Send this rank's heartbeat, obey a verdict, and read the others' heartbeats, until the rank ends."""
        began = False
        while not self._ended.is_set():
            self._arm()
            # Any error of the store is ignored here: `_guard` counts how long it has not answered.
            with contextlib.suppress(Exception):
                self._publish()
                if self._store.check(["verdict"]):
                    self._end(json_text.loads(self._store.get("verdict"))["stuck"])
                self._last_reply = self._clock
                self._send_stack()
                # `multi_get` blocks for a key that does not exist: wait for the first heartbeat of every rank.
                began = began or self._store.check([_key(rank) for rank in range(self.world_size)])
                if began and self._watches:
                    self._watch()
            self._ended.wait(self.interval)

    def _guard(self) -> None:
        """Advance this rank's clock, and end the rank if neither a verdict nor the store reaches it.

        The thread talks to no other process, so only the interpreter lock can delay it.
        """
        before = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # A suspended machine (or virtual machine) advances the clock by two intervals, not by its hours of sleep.
            self._clock += min(now - before, 2 * self.interval)
            before = now
            if self.heartbeat.ticks != self._ticks:
                # Minus one interval: the silence may have begun right after the look before.
                if not self.heartbeat.may_be_slow and self._ticks >= 0:
                    self._longest_quiet = max(self._longest_quiet, self._clock - self._quiet_since - self.interval)
                self._ticks, self._quiet_since = self.heartbeat.ticks, self._clock
                self._stack_sent = False
            self._busy.look(self._ticks, self._clock)
            quiet = self._clock - self._quiet_since
            unanswered = self._clock - self._last_reply
            if unanswered > self.hang_seconds and self.world_size > 1:
                self._report(
                    f"rank {self.rank} has not reached the rendezvous store for {unanswered:.0f} s: the process that "
                    f"holds it (the launcher of the first node, or rank 0) is stopped or gone, or the network is down."
                    f"\nthis rank: {_place(self._sign())}\n{self._stack()}"
                )
                self._end([])
            # Well after the watching ranks should have judged: they know more, and this message names no culprit.
            if quiet > 2 * self._patience() + 4 * self.interval:
                self._report(f"rank {self.rank} has made no progress for {quiet:.0f} s.\n{self._stack()}")
                self._end([])

    def _arm(self) -> None:
        """Restart the timer after which all stacks are written to this rank's file.

        faulthandler's thread needs no interpreter lock: it writes even if native code never releases the lock.
        """
        if self._stacks is not None:
            faulthandler.dump_traceback_later(max(0.8 * self.hang_seconds, 2 * self.interval), file=self._stacks)

    def _send_stack(self) -> None:
        """Publish this rank's stack once, at half of the time after which the run counts as stuck."""
        quiet = self._clock - self._quiet_since
        if quiet > self.hang_seconds / 2 and not self._stack_sent:
            self._store.set(f"stack/{self.rank}", self._stack())
            self._record_nccl()
            self._stack_sent = True

    def _stack(self) -> str:
        """Return the stack of the training thread as text."""
        frame = sys._current_frames().get(self._main)
        return "(most recent call last)\n" + "".join(traceback.format_stack(frame)) if frame else ""

    def _record_nccl(self) -> None:
        """Write the contents of NCCL's flight recorder to a file next to the report."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None and self._stacks is not None:
            (self.folder / f"nccl_rank_{self.rank}.json").write_bytes(dump())

    def _watch(self) -> None:
        """Read every rank's heartbeat, and judge if a rank sends none or no rank makes progress."""
        texts = self._store.multi_get([_key(rank) for rank in range(self.world_size)])
        for sign, text in zip(self._signs, texts, strict=True):
            if text == sign.text:
                continue
            content = json_text.loads(text)
            if sign.content is None or content["ticks"] != sign.content["ticks"] or content["state"]:
                sign.moved = self._clock
            sign.text, sign.content, sign.seen = text, content, self._clock
        running = [sign for sign in self._signs if sign.content and sign.content["state"] != "done"]
        if not running:
            return
        silent = [s for s in running if self._clock - s.seen > self.hang_seconds and not s.content["state"]]  # type: ignore
        quiet = min(self._clock - sign.moved for sign in running)
        # The most patient rank decides: the others wait for one that saves or compiles, which is no hang.
        patience = max(sign.content["patience"] for sign in running)  # type: ignore[index]
        # Two ranks watch; the counter lets only the first one judge.
        if (silent or quiet > patience) and self._store.add("judge", 1) == 1:
            self._judge([sign for sign in self._signs if sign.content], quiet)

    def _judge(self, signs: Sequence[Sign], quiet: float) -> None:
        """Report what is wrong, and publish the verdict that ends every rank."""
        contents = [sign.content for sign in signs if sign.content]
        # Shorter than `hang_seconds`: a stopped rank also stops the others, whose progress ends before its heartbeat.
        lateness = max(3 * self.interval, min(1.0, self.hang_seconds / 2))
        silent = [s.content for s in signs if self._clock - s.seen > lateness and s.content and not s.content["state"]]
        odd, why = (silent, _silence(silent)) if silent else odd_ones(contents)
        lines = [f"the run is stuck: no progress for {quiet:.0f} s. {why}"]
        places: dict[str, list[int]] = {}
        for one in contents:
            seen = "last seen: " if one in silent else ""
            places.setdefault(one["state"] or f"{seen}{_place(one)}", []).append(one["rank"])
        lines += [f"  rank {ranges(ranks)}: {place}" for place, ranks in list(places.items())[:SHOWN_PLACES]]
        for one in odd[:2]:
            if stack := self._stack_of(one):
                lines.append(f"stack of rank {one['rank']}: {stack.rstrip()}")
        lines.append("The same command resumes from the last checkpoint.")
        stuck = [{key: one[key] for key in ("rank", "pid", "host", "started")} for one in silent]
        self._report("\n".join(lines), max(one["step"] for one in contents))
        self._store.set("verdict", json.dumps({"stuck": stuck}))
        # This rank may hold the rendezvous store: it must answer until every rank has read the verdict.
        time.sleep(2.5 * self.interval)
        self._end(stuck)

    def _stack_of(self, one: dict[str, Any]) -> str:
        """Return the stack of a rank, from its message or from its file on a shared disk; empty if there is none."""
        rank = one["rank"]
        if rank == self.rank:
            return self._stack()
        if self._store.check([f"stack/{rank}"]):
            return self._store.get(f"stack/{rank}").decode()
        try:  # faulthandler writes it for a rank whose interpreter lock is never released
            return read_text(self._stack_file(rank))
        except OSError:
            return ""

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"stack_rank_{rank}.txt"

    def _report(self, text: str, step: int | None = None) -> None:
        """Print an error, write it to the hang folder, and append it to events.jsonl."""
        print(f"error: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = datetime.datetime.now().strftime("report_%Y%m%d_%H%M%S_%f.txt")
            write_text(self.folder / name, text + "\n")
            step = self.heartbeat.step if step is None else step
            self._reported = write_event(self.run_dir, "hang", step, text.splitlines()[0], report=f"{HANG}/{name}")

    def _end(self, stuck: Sequence[dict[str, Any]]) -> None:
        """End this process, and kill the stuck ones on this machine, which cannot act on a verdict."""
        for one in stuck:
            if one["pid"] != os.getpid() and _local(one) and _alive(one):
                with contextlib.suppress(OSError):
                    os.kill(one["pid"], signal.SIGKILL)
        if self._reported is not None and self.notify is not None:
            self.notify(self._reported)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not `sys.exit`: the training thread is stuck in a call that no exception interrupts.
        os._exit(EXIT_CODE)


class _Busy:
    """Detects a thread that computes within one call of native code: on a CPU a layer of 131,072 tokens takes minutes.

    A loop in Python does not count: it releases the interpreter lock at its backward jump, and is seen there. With
    CUDA the check is disabled, since a host thread that waits for the device spins and so uses CPU time as well.
    """

    def __init__(self, thread: int):
        self._thread, self.natively, self._spins = thread, False, torch.cuda.is_available()
        self._at: tuple | None = None
        self._since, self._worked = 0.0, 0.0

    def look(self, ticks: int, clock: float) -> None:
        """Update `natively`: True if the thread is at the same instruction as before and has used CPU time since."""
        frame = sys._current_frames().get(self._thread)
        if frame is None or self._spins:
            return
        worked = time.clock_gettime(time.pthread_getcpuclockid(self._thread))
        at = (ticks, id(frame), frame.f_lasti)
        if at != self._at:
            self._at, self._since, self._worked, self.natively = at, clock, worked, False
            return
        operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        jumps = operation == "RESUME" or "JUMP_BACKWARD" in operation
        # 2 % of a core: on an overloaded machine a computing thread gets little, but a waiting one gets nothing.
        self.natively = not jumps and worked - self._worked > 0.02 * (clock - self._since)


def odd_ones(signs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Return the ranks that the others wait for, and a sentence that says how that is known.

    Ranks outside any collective are waited for; of several, those that have entered the fewest collectives. If all are
    inside one, but not in the same one, those in the rarest collective are taken for the cause.
    """
    ended = [one for one in signs if one["state"]]
    if ended:
        return ended, f"Rank {ranges([one['rank'] for one in ended])} has ended ({ended[0]['state']})."
    behind = [one for one in signs if _is_behind(one, signs)]
    outside = [one for one in signs if not one["waiting"]]
    if outside and len(outside) < len(signs):
        odd = [one for one in outside if one in behind] or outside
        ranks = ranges([one["rank"] for one in odd])
        return odd, f"All wait for rank {ranks}, which is in no collective: it loops, sleeps or waits elsewhere."
    if outside:
        odd = behind or outside
        how = "is behind the others" if behind and len(signs) > 1 else "makes no progress"
        return odd, f"Rank {ranges([one['rank'] for one in odd])} {how}."
    kinds = Counter(str(one["collective"]) for one in signs)
    if len(kinds) == 1:
        return [], "All ranks are in the same collective: check the network between them."
    rarest = min(kinds.values())
    odd = behind or [one for one in signs if kinds[str(one["collective"])] == rarest]
    other = next(one for one in signs if one not in odd) if len(odd) < len(signs) else odd[0]
    return odd, (
        f"Ranks are in different collectives: rank {ranges([one['rank'] for one in odd])} in "
        f"{_collective(odd[0])}, rank {other['rank']} in {_collective(other)}."
    )


def _is_behind(one: dict[str, Any], signs: Sequence[dict[str, Any]]) -> bool:
    """Return True if a rank has entered fewer collectives of a group than another rank of that group."""
    issued = one["issued"]
    return any(issued[group] < other["issued"].get(group, 0) for other in signs for group in issued)


def _silence(silent: Sequence[dict[str, Any]]) -> str:
    """Return a sentence for each of the first four silent ranks: its process, its host and the likely cause."""
    return " ".join(
        f"Rank {one['rank']} (process {one['pid']} on {one['host']}) sends no heartbeats: {_look(one)}"
        for one in silent[:4]
    )


def _look(one: dict[str, Any]) -> str:
    """Return why a process may be silent, from its state in the kernel's process table if it is on this machine."""
    if not _local(one):
        return "its process is stopped, or its machine or network is down."
    if not _alive(one):
        return "its process is gone."
    with contextlib.suppress(psutil.Error):
        state = psutil.Process(one["pid"]).status()
        if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "its process is stopped (SIGSTOP, or a debugger)."
        if state == psutil.STATUS_DISK_SLEEP:
            return "its process waits for a device (a lost mount, or a driver)."
    return "native code holds its interpreter lock (GIL)."


def _place(one: dict[str, Any]) -> str:
    """Return where a rank is as text: `training, step 3, micro-batch 1, forward, after layer 2, in all_reduce ...`."""
    parts = [one["task"]]
    if one["step"]:
        parts.append(f"step {one['step']}")
    if one["micro_batch"]:
        parts.append(f"micro-batch {one['micro_batch']}")
    if one["phase"]:
        parts.append(one["phase"])
    if one["layer"]:
        parts.append(f"after layer {one['layer']}" if one["phase"] == "forward" else f"before layer {one['layer']}")
    if one["collective"]:
        parts.append(f"{'in' if one['waiting'] else 'last collective'} {_collective(one)}")
    return ", ".join(parts)


def _collective(one: dict[str, Any]) -> str:
    """Return the collective that a rank entered last as text: `all_reduce 5 of group 0`."""
    if not one["collective"]:
        return "none"
    name, group, number = one["collective"]
    return f"{name} {number} of group {group}" if number else f"{name} in group {group}"


def _key(rank: int) -> str:
    return f"sign/{rank}"


def _local(one: dict[str, Any]) -> bool:
    return one["host"] == socket.gethostname()


def _alive(one: dict[str, Any]) -> bool:
    """Return True if the process of a rank on this machine runs; the start time guards against a reused process id."""
    try:
        process = psutil.Process(one["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and _start_time(one["pid"]) == one["started"]
    except psutil.Error:
        return False


def _start_time(pid: int) -> float:
    """Return when a process started, in seconds since the epoch; 0 if it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
