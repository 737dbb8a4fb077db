"""SIGTERM and Ctrl-C while training: finish the step, save, leave; a second one leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch

from sae.train.distributed import max_over_ranks


class Interrupted(SystemExit):
    """Training stopped because a signal asked for it; exits with 128 + the signal's number.

    Attributes:
        is_saved: whether a checkpoint has the state.
    """

    def __init__(self, number: int, *, is_saved: bool):
        super().__init__(128 + number)
        self.is_saved = is_saved


class Interrupt:
    """Note signals while the block runs.

    Attributes:
        number: the signal that came, or 0.
    """

    def __init__(self, device: torch.device):
        self.number, self._device, self._before = 0, device, {}

    def __enter__(self) -> Interrupt:
        # Only the main thread may set handlers; elsewhere (notebook workers) signals are not ours.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self) -> int:
        """Return the signal that any process got, so that all stop at the same step."""
        flag = torch.tensor(self.number, device=self._device)
        return int(max_over_ranks(flag))

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
