"""Ends a run that is stuck, and says which rank it waits for, where each rank is, and what the odd one is doing.

Each rank has a thread that writes its pulse into the store the ranks met at, over a connection of its own: it goes on
while the training thread is stuck. Two ranks read all of them, in case one of them is the stuck one; a rank that hears
of no verdict passes one on itself in the end. A run is stuck when no rank at all makes progress, or when a rank gives
no sign of life: what takes long on one rank, while the others wait for it, is no reason.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from igla_mega.config import json_text
from igla_mega.distributed.mesh import own_store
from igla_mega.engine.heartbeat import Heartbeat, followed
from igla_mega.train.trackers import write_event

HANG = "hang"
"""Folder below the run's: reports of hangs, and what belongs to them."""
EXIT_CODE = 76
"""Of every rank of a run that was ended because it was stuck: EX_PROTOCOL of sysexits.h."""
LEARNED_FACTOR = 5
"""A rank may be quiet for so many times the longest silence of its steps so far, where that is more than asked for."""
SHOWN_PLACES = 32
"""In which ranks are, that a report lists."""


@dataclass
class Sign:
    """The last sign of life of a rank, as a watching rank knows it."""

    text: bytes = b""
    content: dict[str, Any] | None = None
    seen: float = 0.0
    """When it came, on the watcher's clock."""
    moved: float = 0.0
    """When the rank was last seen to have made progress."""


@contextmanager
def guarded(run_dir: Path, hang_seconds: int, patient_seconds: int) -> Iterator[Heartbeat]:
    """Watch this rank meanwhile, and the others.

    Args:
        hang_seconds: without progress, until the run is ended; 0 watches nothing.
        patient_seconds: the same for what is known to take long.

    Raises:
        RuntimeError: a peer was lost; the message says which, as far as can be known.
    """
    heartbeat = Heartbeat()
    if hang_seconds == 0:
        yield heartbeat
        return
    with followed(heartbeat):
        dog = Watchdog(heartbeat, run_dir, hang_seconds, max(hang_seconds, patient_seconds))
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
    """The watching threads of one rank."""

    def __init__(self, heartbeat: Heartbeat, run_dir: Path, hang_seconds: float, patient_seconds: float):
        self.heartbeat, self.run_dir, self.folder = heartbeat, run_dir, run_dir / HANG
        self.hang_seconds, self.patient_seconds = hang_seconds, patient_seconds
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.interval = min(5.0, max(0.1, hang_seconds / 12))
        # A single process has nobody to tell.
        self._store = dist.HashStore() if self.world_size == 1 else own_store()
        # Ranks that are started again may meet at the same store: its old signs are not theirs.
        mark = torch.tensor([time.time_ns()])
        dist.broadcast(mark, src=0)
        self._store = dist.PrefixStore(f"watchdog/{mark.item()}", self._store)
        self._store.set_timeout(datetime.timedelta(seconds=max(1.0, hang_seconds)))
        self._main = threading.get_ident()
        self._watches = self.rank in (0, self.world_size // 2)
        self._state, self._ended = "", threading.Event()
        self._quiet_since, self._longest_quiet, self._ticks = 0.0, 0.0, -1
        self._clock, self._last_reply, self._stack_sent = 0.0, 0.0, False
        self._busy = _Busy(self._main)
        self._signs = [Sign() for _ in range(self.world_size)]
        self._stacks: Any = None
        self._number = 0

    def start(self) -> None:
        """Begin to watch."""
        with contextlib.suppress(OSError):  # a report that can only be printed is a report
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stacks = open(self._stack_file(self.rank), "w")  # noqa: SIM115 (open while the run lasts)
        for name, loop in (("talk", self._talk), ("guard", self._guard)):
            threading.Thread(target=loop, name=f"watchdog-{name}", daemon=True).start()

    def stop(self) -> None:
        """End in peace: the others know that this rank is through."""
        self._leave("done")

    def failed(self, error: Exception) -> str | None:
        """Tell the others that this rank is ending, and why; where it has lost a peer, say which."""
        with contextlib.suppress(RuntimeError):
            if self._store.check(["verdict"]):  # a peer has only heard of it a moment earlier
                self._end([])
        text = str(error)
        peer_is_gone = any(words in text for words in ("onnection closed by peer", "onnection reset", "roken pipe"))
        self._leave("lost a peer" if peer_is_gone else f"failed: {text.splitlines()[0] if text else type(error)}")
        return self._lost_peer() if peer_is_gone else None

    def _leave(self, state: str) -> None:
        self._state = state
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not None:
            with contextlib.suppress(OSError):
                self._stack_file(self.rank).unlink()
                self.folder.rmdir()  # where nothing else lies in it
        with contextlib.suppress(RuntimeError):
            self._publish()

    def _lost_peer(self) -> str | None:
        """Which rank is gone, that did not say why: looked for until two signs of it should have come."""
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
                return None  # it has said why
            gone = [one for one in signs if not one["state"] and _local(one) and not _alive(one)]
            if not gone and time.monotonic() > deadline:
                still = [new == old for new, old in zip(texts, before, strict=True)]
                gone = [one for one, same in zip(signs, still, strict=True) if same and not one["state"]]
            if gone or time.monotonic() > deadline:
                break
            time.sleep(self.interval / 2)
        if not gone:
            return None
        names = ", ".join(f"{one['rank']} (process {one['pid']} on {one['host']})" for one in gone)
        return (
            f"rank {names} is gone; its last sign: {_place(gone[0])}. Rank {self.rank} was waiting for it: "
            f"{_place(self._sign())}.\n  The same command goes on from the last checkpoint."
        )

    def _sign(self) -> dict[str, Any]:
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
        """Seconds that this rank may make no progress in what it is at."""
        if self.heartbeat.may_be_slow or self._busy.natively:
            return self.patient_seconds
        return max(self.hang_seconds, LEARNED_FACTOR * self._longest_quiet)

    def _publish(self) -> None:
        self._number += 1
        self._store.set(_key(self.rank), json.dumps({**self._sign(), "number": self._number}))

    def _talk(self) -> None:
        """Tell the others where this rank is, hear whether the run is over, and read the others' signs."""
        began = False
        while not self._ended.is_set():
            self._arm()
            with contextlib.suppress(Exception):  # the guard counts how long the store does not answer
                self._publish()
                if self._store.check(["verdict"]):
                    self._end(json_text.loads(self._store.get("verdict"))["stuck"])
                self._last_reply = self._clock
                self._send_stack()
                began = began or self._store.check([_key(rank) for rank in range(self.world_size)])
                if began and self._watches:
                    self._watch()
            self._ended.wait(self.interval)

    def _guard(self) -> None:
        """Keep this rank's own time: it speaks to nobody, so nothing can hold it up but the interpreter."""
        before = time.monotonic()
        while not self._ended.wait(self.interval):
            now = time.monotonic()
            # Where the whole machine was asleep, nobody was late.
            self._clock += min(now - before, 2 * self.interval)
            before = now
            if self.heartbeat.ticks != self._ticks:
                if not self.heartbeat.may_be_slow and self._ticks >= 0:
                    self._longest_quiet = max(self._longest_quiet, self._clock - self._quiet_since - self.interval)
                self._ticks, self._quiet_since = self.heartbeat.ticks, self._clock
                self._stack_sent = False
            self._busy.look(self._ticks, self._clock)
            quiet = self._clock - self._quiet_since
            deaf = self._clock - self._last_reply
            if deaf > self.hang_seconds and self.world_size > 1:
                self._report(
                    f"rank {self.rank} has not reached the store that the ranks met at for {deaf:.0f} s: the process "
                    f"that keeps it (the launcher of the first node, or rank 0) is stopped or gone, or the network is."
                    f"\nthis rank: {_place(self._sign())}\n{self._stack()}"
                )
                self._end([])
            if quiet > 2 * self._patience() + 4 * self.interval:
                self._report(f"rank {self.rank} has made no progress for {quiet:.0f} s.\n{self._stack()}")
                self._end([])

    def _arm(self) -> None:
        """Have a thread without an interpreter write the stacks, should native code keep the interpreter to itself."""
        if self._stacks is not None:
            faulthandler.dump_traceback_later(max(0.8 * self.hang_seconds, 2 * self.interval), file=self._stacks)

    def _send_stack(self) -> None:
        quiet = self._clock - self._quiet_since
        if quiet > self.hang_seconds / 2 and not self._stack_sent:
            self._store.set(f"stack/{self.rank}", self._stack())
            self._record_nccl()
            self._stack_sent = True

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main)
        return "(most recent call last)\n" + "".join(traceback.format_stack(frame)) if frame else ""

    def _record_nccl(self) -> None:
        """Write what NCCL's flight recorder holds beside the report."""
        dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if dump is not None and self._stacks is not None:
            (self.folder / f"nccl_rank_{self.rank}.json").write_bytes(dump())

    def _watch(self) -> None:
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
        patience = max(sign.content["patience"] for sign in running)  # type: ignore[index]
        if (silent or quiet > patience) and self._store.add("judge", 1) == 1:
            self._judge([sign for sign in self._signs if sign.content], quiet)

    def _judge(self, signs: Sequence[Sign], quiet: float) -> None:
        """Say what is wrong, and have every rank end."""
        contents = [sign.content for sign in signs if sign.content]
        lateness = max(3 * self.interval, min(1.0, self.hang_seconds / 2))
        silent = [s.content for s in signs if self._clock - s.seen > lateness and s.content and not s.content["state"]]
        odd, why = (silent, _silence(silent)) if silent else odd_ones(contents)
        lines = [f"the run is stuck: no progress for {quiet:.0f} s. {why}"]
        places: dict[str, list[int]] = {}
        for one in contents:
            seen = "last seen: " if one in silent else ""
            places.setdefault(one["state"] or f"{seen}{_place(one)}", []).append(one["rank"])
        lines += [f"  rank {_ranges(ranks)}: {place}" for place, ranks in list(places.items())[:SHOWN_PLACES]]
        for one in odd[:2]:
            if stack := self._stack_of(one):
                lines.append(f"what rank {one['rank']} is doing: {stack.rstrip()}")
        lines.append("The same command goes on from the last checkpoint.")
        stuck = [{key: one[key] for key in ("rank", "pid", "host", "started")} for one in silent]
        self._report("\n".join(lines), max(one["step"] for one in contents))
        self._store.set("verdict", json.dumps({"stuck": stuck}))
        time.sleep(2.5 * self.interval)  # until every rank has heard
        self._end(stuck)

    def _stack_of(self, one: dict[str, Any]) -> str:
        rank = one["rank"]
        if rank == self.rank:
            return self._stack()
        if self._store.check([f"stack/{rank}"]):
            return self._store.get(f"stack/{rank}").decode()
        try:  # of a rank whose interpreter is held: written by a thread that needs none
            return self._stack_file(rank).read_text()
        except OSError:
            return ""

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"stack_rank_{rank}.txt"

    def _report(self, text: str, step: int | None = None) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            name = datetime.datetime.now().strftime("report_%Y%m%d_%H%M%S_%f.txt")
            (self.folder / name).write_text(text + "\n")
            step = self.heartbeat.step if step is None else step
            write_event(self.run_dir, "hang", step, text.splitlines()[0], report=f"{HANG}/{name}")

    def _end(self, stuck: Sequence[dict[str, Any]]) -> None:
        """End this process, and those of this machine that cannot end by themselves."""
        for one in stuck:
            if one["pid"] != os.getpid() and _local(one) and _alive(one):
                with contextlib.suppress(OSError):
                    os.kill(one["pid"], signal.SIGKILL)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)


class _Busy:
    """Whether a thread works within one call of native code: on a CPU a layer of 131,072 tokens may take minutes.

    A loop in Python is not taken for it: it hands the interpreter over where it jumps back. On an accelerator the host
    spins while it waits, so that its work says nothing.
    """

    def __init__(self, thread: int):
        self._thread, self.natively, self._spins = thread, False, torch.cuda.is_available()
        self._at: tuple | None = None
        self._since, self._worked = 0.0, 0.0

    def look(self, ticks: int, clock: float) -> None:
        """Called now and then."""
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
        # On a crowded machine it has little of a core; one that waits has nothing.
        self.natively = not jumps and worked - self._worked > 0.02 * (clock - self._since)


def odd_ones(signs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The ranks that the others wait for, and how that is known.

    Whoever is not inside a collective is waited for; of several, whoever has entered the fewest. Where all are inside
    one, they are in different ones, and the fewest are odd.
    """
    ended = [one for one in signs if one["state"]]
    if ended:
        return ended, f"Rank {_ranges([one['rank'] for one in ended])} has ended ({ended[0]['state']})."
    behind = [one for one in signs if _is_behind(one, signs)]
    outside = [one for one in signs if not one["waiting"]]
    if outside and len(outside) < len(signs):
        odd = [one for one in outside if one in behind] or outside
        ranks = _ranges([one["rank"] for one in odd])
        return odd, f"All wait for rank {ranks}, which is in no collective: it loops, sleeps or waits elsewhere."
    if outside:
        odd = behind or outside
        how = "is behind the others" if behind and len(signs) > 1 else "makes no progress"
        return odd, f"Rank {_ranges([one['rank'] for one in odd])} {how}."
    kinds = Counter(str(one["collective"]) for one in signs)
    if len(kinds) == 1:
        return [], "All ranks are in the same collective: look at the network between them."
    rarest = min(kinds.values())
    odd = behind or [one for one in signs if kinds[str(one["collective"])] == rarest]
    other = next(one for one in signs if one not in odd) if len(odd) < len(signs) else odd[0]
    return odd, (
        f"Ranks are in different collectives: rank {_ranges([one['rank'] for one in odd])} in "
        f"{_collective(odd[0])}, rank {other['rank']} in {_collective(other)}."
    )


def _is_behind(one: dict[str, Any], signs: Sequence[dict[str, Any]]) -> bool:
    """Whether a rank has entered fewer collectives of some group than another of that group."""
    issued = one["issued"]
    return any(issued[group] < other["issued"].get(group, 0) for other in signs for group in issued)


def _silence(silent: Sequence[dict[str, Any]]) -> str:
    return " ".join(
        f"Rank {one['rank']} (process {one['pid']} on {one['host']}) gives no sign of life: {_look(one)}"
        for one in silent[:4]
    )


def _look(one: dict[str, Any]) -> str:
    """What the kernel says of a process that is silent."""
    if not _local(one):
        return "stopped, or its machine or network is gone."
    if not _alive(one):
        return "its process is gone."
    with contextlib.suppress(psutil.Error):
        state = psutil.Process(one["pid"]).status()
        if state in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "its process is stopped (SIGSTOP, or a debugger)."
        if state == psutil.STATUS_DISK_SLEEP:
            return "its process waits for a device (a lost mount, or a driver)."
    return "native code keeps its interpreter to itself."


def _place(one: dict[str, Any]) -> str:
    """Where a rank is, in words."""
    parts = [one["task"]]
    if one["step"]:
        parts.append(f"step {one['step']}")
    if one["micro_batch"]:
        parts.append(f"micro-batch {one['micro_batch']}")
    if one["phase"]:
        parts.append(one["phase"])
    if one["layer"]:
        parts.append(f"behind layer {one['layer']}" if one["phase"] == "forward" else f"before layer {one['layer']}")
    if one["collective"]:
        parts.append(f"{'in' if one['waiting'] else 'last collective'} {_collective(one)}")
    return ", ".join(parts)


def _collective(one: dict[str, Any]) -> str:
    if not one["collective"]:
        return "none"
    name, group, number = one["collective"]
    return f"{name} {number} of group {group}" if number else f"{name} in group {group}"


def _ranges(ranks: Sequence[int]) -> str:
    """`0 to 3, 7`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def _key(rank: int) -> str:
    return f"sign/{rank}"


def _local(one: dict[str, Any]) -> bool:
    return one["host"] == socket.gethostname()


def _alive(one: dict[str, Any]) -> bool:
    """Whether the process of a rank of this machine is there, and no other has its number by now."""
    try:
        process = psutil.Process(one["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and _start_time(one["pid"]) == one["started"]
    except psutil.Error:
        return False


def _start_time(pid: int) -> float:
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0
