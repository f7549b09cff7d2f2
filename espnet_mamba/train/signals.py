"""SIGTERM and SIGUSR1: a cluster wants the machine back. The step under way is finished, saved, and the run ends."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class RunInterrupted(Exception):
    """The run was asked to stop; all of its processes raise this after the same step."""


class StopRequest:
    """Whether a signal has asked this run, in any of its processes, to stop."""

    def __init__(self, distributed: bool, device: str) -> None:
        self.distributed, self.device = distributed, device
        self.signal_name = ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while in the block; only a program's main thread can, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def check(self) -> None:
        """Agree with the other processes, a collective call, on whether to stop.

        Raises:
            RunInterrupted: one of them was asked to.
        """
        asked = bool(self.signal_name)
        if self.distributed:  # signals reach processes at different steps; leaving alone would hang the others
            flag = torch.tensor(float(asked), device=self.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
        if asked:
            raise RunInterrupted(self.signal_name or "a signal to another process of this run")

    def _receive(self, number: int, _frame: Any) -> None:
        if not self.signal_name:
            self.signal_name = signal.Signals(number).name
            logging.warning(f"{self.signal_name}: this run will save after the step under way, and end")


@contextmanager
def passed_on_to_children() -> Iterator[None]:
    """Hand the signals to child processes while in the block: ESPnet's spawn of a process per GPU only waits for them.

    A process without children dies of a signal as ever; training itself listens by ``StopRequest``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, _frame: Any) -> None:
        children = multiprocessing.active_children()
        for child in children:
            os.kill(child.pid, number)
        if not children:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def ignore_in_worker(_worker_id: int) -> None:
    """Be a DataLoader's ``worker_init_fn``: clusters signal whole jobs, and a worker that dies of it ends the run."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
