"""Tell from the records of a run whether it runs, how it ended, what was lost, and which command continues it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from igla_mega.monitor import heartbeat
from igla_mega.monitor.heartbeat import SILENT_SECONDS
from igla_mega.report.history import History

RESTART_SECONDS = 600.0
"""Time after which ranks that a launcher on another host has started again count as silent, in seconds."""
_STARTS = ("started", "resumed")
_FAILURES = ("failed", "killed", "hang")
_KINDS = {
    "finished": ("finished", "finished"),
    "stopping": ("stopped", "stopped"),
    "stopped": ("stopped", "stopped"),
    "requeued": ("stopped", "stopped, to be started again"),
    "failed": ("failed", "failed"),
    "killed": ("dead", "killed"),
    "hang": ("hung", "ended by the watchdog"),
    "hung": ("hung", "ended by the watchdog"),
    "restarting": ("restarting", "starting again"),
}
"""Event, or end in the heartbeat record -> kind of state, and the words for it."""


@dataclass(frozen=True)
class State:
    """State of a run as its page shows it."""

    kind: str
    """`running`, `restarting`, `finished`, `stopped`, `failed`, `dead`, `hung`, `stale` (no heartbeats) or `empty`."""
    says: str
    """The same as a phrase for the reader, with the time since."""
    cause: str = ""
    """Why it is not running; empty where nothing is to be explained."""
    command: str = ""
    """Command that resumes from the last checkpoint; empty if none is needed or known."""


def state_of(history: History, now: float | None = None) -> State:
    """Return the state of a run from its events and its heartbeat record; times of files play no role.

    Args:
        now: Unix time in seconds; None for the present.
    """
    now = time.time() if now is None else now
    record = heartbeat.read(history.folder)
    events = _since_start(history.events, record["since"] if record else 0.0)
    ends = [event for event in events if event["event"] in _KINDS]
    if record is None:
        return _without_record(history, ends, now)
    end = record["end"] or _end_of(ends, history, record)
    if end is None or (end["kind"] == "restarting" and not _restarts(record, end, now)):
        return _alive_or_not(history, record, now)
    kind, words = _KINDS.get(end["kind"], ("failed", end["kind"][:40]))
    if kind == "finished":
        # The same command may have been given again since: it found nothing left to do.
        times = [event["time"] for event in history.events if event["event"] == "finished" and event["time"]]
        return State(kind, f"{words}, {since(now - (times[-1] if times else end['time']))}")
    says = f"{words}, {since(now - end['time'])}"
    cause = _cause(events, end, history, record)
    return State(kind, says, cause, "" if kind == "restarting" else record["command"])


def _since_start(events: Sequence[Mapping[str, Any]], since_time: float) -> list[Mapping[str, Any]]:
    """Return the events of the last process: a resumed run keeps those of its predecessors."""
    # An event that an old version or a strange tool wrote may lack its time: its place in the file decides.
    found = [event for event in events if (event["time"] or since_time) >= since_time]
    starts = [index for index, event in enumerate(found) if event["event"] in _STARTS]
    return found[starts[-1] :] if starts else found


def _end_of(ends: Sequence[Mapping[str, Any]], history: History, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the end that the last event tells of, for a process that could not write it into its record."""
    if not ends:
        return None
    last = ends[-1]
    if last["event"] == "stopping" and _is_gone(record) and lost_steps(history, record):
        return None  # killed while it saved
    return {"kind": last["event"], "time": last["time"] or record["time"], "message": last["message"]}


def _without_record(history: History, ends: Sequence[Mapping[str, Any]], now: float) -> State:
    """Return the state of a folder without a heartbeat record: an older version wrote it, or nothing has trained."""
    if not history.events and not history.metrics.steps:
        return State("empty", "nothing written yet")
    if not ends:
        times = [event["time"] for event in history.events if event["time"]]
        age = f"; its last event was {since(now - times[-1])}" if times else ""
        return State("stale", "unknown", f"The folder has no heartbeat record{age}.")
    last = ends[-1]
    kind, words = _KINDS[last["event"]]
    says = f"{words}, {since(now - last['time'])}" if last["time"] else words
    return State(kind, says, "" if kind == "finished" else last["message"])


def _alive_or_not(history: History, record: Mapping[str, Any], now: float) -> State:
    """Return the state of a run that recorded no end, by the process table on its host, else by its last heartbeat."""
    here, age, host = heartbeat.is_here(record), max(0.0, now - record["time"]), record["host"]
    who, lost = f"Process {record['pid']} on {host}", _lost(history, record)
    if here and not heartbeat.is_alive(record):
        cause = f"{who} ended without a record: by SIGKILL, for want of memory, or with its machine.{lost}"
        return State("dead", f"dead, last alive {since(age)}", cause, record["command"])
    if age > SILENT_SECONDS:
        what = "is stopped (SIGSTOP)" if here else "has ended, or its machine or network is down"
        cause = f"{who} {what}; or the run cannot write to this folder, or this is a copy of it.{lost}"
        return State("stale", f"no heartbeat for {clock(age)}", cause, record["command"])
    if not history.metrics.steps:
        return State("empty", "no step yet")
    return State("running", "running" if here else f"running on {host}")


def _is_gone(record: Mapping[str, Any]) -> bool:
    return heartbeat.is_here(record) and not heartbeat.is_alive(record)


def _restarts(record: Mapping[str, Any], end: Mapping[str, Any], now: float) -> bool:
    """Return True while the launcher may still be starting the ranks again."""
    if heartbeat.is_here(record):
        return heartbeat.launcher_is_alive(record)
    return now - end["time"] < RESTART_SECONDS


def _cause(
    events: Sequence[Mapping[str, Any]], end: Mapping[str, Any], history: History, record: Mapping[str, Any]
) -> str:
    """Return why a run ended, and what was lost.

    Of several failures the first one counts: ranks that lose a peer fail after it, with errors about the connection.
    """
    kind, message = end["kind"], end["message"]
    if kind not in ("stopped", "stopping", "requeued"):
        first = next((event for event in events if event["event"] in _FAILURES and not event.get("echo")), None)
        message = first["message"] if first and kind != "restarting" else message
        message = message.strip().rstrip(".") + "."
        # The launcher's sentence and the error of a failed save have it already.
        return message if "lost" in message else f"{message}{_lost(history, record)}"
    return message.strip().rstrip(".") + "." + (_lost(history, record) if lost_steps(history, record) else "")


def lost_steps(history: History, record: Mapping[str, Any]) -> int:
    """Return how many steps were taken after the last complete checkpoint."""
    last = _last_step(history, record)
    return max(0, last - heartbeat.saved_step(history.folder, record, last))


def _last_step(history: History, record: Mapping[str, Any]) -> int:
    return int(history.metrics.steps[-1]) if history.metrics.steps else int(record["step"])


def _lost(history: History, record: Mapping[str, Any]) -> str:
    words = heartbeat.words_of(lost_steps(history, record))
    saved = heartbeat.saved_step(history.folder, record, _last_step(history, record))
    return f" {words[0].upper()}{words[1:]}; the last checkpoint is that of step {saved:,}."


def since(seconds: float) -> str:
    """Return a time in the past as text; a clock that is behind the writer's counts as now."""
    return f"{clock(seconds)} ago" if seconds >= 1 else "just now"


def clock(seconds: float) -> str:
    """Format a duration with its two largest units."""
    days, hours, minutes = int(seconds // 86400), int(seconds % 86400 // 3600), int(seconds % 3600 // 60)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
