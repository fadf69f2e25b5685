"""Stop a run at the end of a step when any rank has received a signal."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

REQUEUE = 75
"""Exit code of a run stopped by a scheduler: EX_TEMPFAIL of sysexits.h; the same command resumes it."""
_BY_HAND = (signal.SIGINT, signal.SIGHUP)
"""Signals of a terminal: after these a run is not to be requeued."""
_ASKED_ONCE_SECONDS = 2.0
"""Signals this close together count as one: a launcher forwards a signal that its ranks received directly too."""


class StopRequest:
    """Request to stop at the end of the step, by a signal to any rank; a second signal ends the process at once."""

    def __init__(self, alone: bool, device: torch.device):
        self._number, self._since, self._alone, self._device = 0, 0.0, alone, device
        self._agreed = 0
        # A thread reads them from a pipe: Python runs handlers in the main thread, which may be inside a collective
        # that does not return.
        heard, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: int) -> None:
        """Record the first signal; end the process at a second one."""
        while numbers := os.read(heard, 64):
            for number in numbers:
                if not self._number:
                    self._number, self._since = number, time.monotonic()
                elif time.monotonic() - self._since > _ASKED_ONCE_SECONDS:
                    # `print` could wait for a lock that the interrupted thread holds.
                    os.write(2, b"ended at once, as requested a second time; the last checkpoint is complete\n")
                    os._exit(128 + number)

    def requested(self) -> bool:
        """Return True if any rank has received a signal. Every rank calls it, after each step.

        All ranks must stop after the same step, but signals do not reach them all within one.
        """
        # The maximum over ranks decides: 256 ranks a scheduler's signal above one from the keyboard.
        own = self._number + 256 * (self._number not in _BY_HAND) if self._number else 0
        if not self._alone:
            highest = torch.tensor(float(own), device=self._device)
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
            own = int(highest.item())
        self._agreed = own % 256
        return self.agreed

    @property
    def agreed(self) -> bool:
        """True if the ranks have agreed to stop."""
        return self._agreed > 0

    @property
    def name(self) -> str:
        """Name of the signal that the ranks agreed on."""
        return signal.Signals(self._agreed).name

    @property
    def exit_code(self) -> int:
        """Exit code of the run: 75 after a scheduler's signal, 128 plus the number of a terminal's, 0 without one."""
        if not self._agreed:
            return 0
        return 128 + self._agreed if self._agreed in _BY_HAND else REQUEUE
