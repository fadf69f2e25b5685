"""Stop a run at the end of a step when a signal asks for it."""

import os
import signal
import threading
import time

import torch
import torch.distributed as dist

REQUEUE = 75
"""Exit code of a run that a scheduler asked to stop: EX_TEMPFAIL of sysexits.h, the same command goes on."""
_BY_HAND = (signal.SIGINT, signal.SIGHUP)
_ASKED_ONCE_SECONDS = 2.0
"""A launcher hands on what its ranks were sent too: signals this close together are one."""


class StopRequest:
    """A signal asks for a stop at the end of the step, whoever gets it; a second one ends the process at once."""

    def __init__(self, alone: bool, device: torch.device):
        self._number, self._since, self._alone, self._device = 0, 0.0, alone, device
        self._agreed = 0
        # A thread hears them: the training thread may be inside a collective that does not return.
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()

    def _listen(self, heard: int) -> None:
        while numbers := os.read(heard, 64):
            for number in numbers:
                if not self._number:
                    self._number, self._since = number, time.monotonic()
                elif time.monotonic() - self._since > _ASKED_ONCE_SECONDS:
                    os.write(2, b"ended at once, as asked a second time; the last checkpoint is whole\n")
                    os._exit(128 + number)

    def requested(self) -> bool:
        """Whether any rank has been asked: signals do not reach all ranks within the same step."""
        # A scheduler's notice counts for more than an interrupt from the keyboard.
        own = self._number + 256 * (self._number not in _BY_HAND) if self._number else 0
        if not self._alone:
            asked = torch.tensor(float(own), device=self._device)
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            own = int(asked.item())
        self._agreed = own % 256
        return self.agreed

    @property
    def agreed(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return self._agreed > 0

    @property
    def name(self) -> str:
        """Of the signal that was agreed on."""
        return signal.Signals(self._agreed).name

    @property
    def exit_code(self) -> int:
        """Of a run that stopped: 75 where a scheduler asked, 128 and the signal where a person did, 0 unasked."""
        if not self._agreed:
            return 0
        return 128 + self._agreed if self._agreed in _BY_HAND else REQUEUE
