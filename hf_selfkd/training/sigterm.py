"""Save a checkpoint and end when the process receives SIGTERM."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback
from transformers.utils import logging

from .callbacks import ends_epoch
from .distributed import on_any_process

logger = logging.get_logger(__name__)

# Status that a shell reports of a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM


class SaveOnSigterm(TrainerCallback):
    """After SIGTERM on any process, save a checkpoint at the end of the step and end the run.

    If the signal comes during an evaluation, the run ends after it. The last step of an epoch is saved twice: at once,
    because there may be no time for the epoch's evaluation, and after it, so that a resumed run loses nothing.
    """

    def __init__(self):
        self.received = False  # by this process
        self.ends = False  # known to all processes

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to SIGTERM; once the run has ended because of it, end the process as SIGTERM would have."""
        self.received = self.ends = False
        previous = signal.getsignal(signal.SIGTERM)
        is_main = threading.current_thread() is threading.main_thread()  # signal() works in no other
        if not is_main or previous in (signal.SIG_IGN, None):  # None: not installed by Python
            yield
            return
        signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
        if not (self.ends or self.received):
            return
        if callable(previous):
            previous(signal.SIGTERM, None)
        else:
            raise SystemExit(TERMINATED)

    def _receive(self, signum, frame) -> None:
        self.received = True

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Agree with the other processes."""
        self.ends = on_any_process(self.received, args.device)

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop."""
        if self.ends:
            logger.warning(f"Ending after step {state.global_step} because of SIGTERM. Resume from its checkpoint.")
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Save again after the end of an epoch; do nothing more for one that was cut short."""
        if self.ends and ends_epoch(state):
            control.should_save = True
        elif self.ends:
            control.should_log = control.should_evaluate = control.should_save = False
