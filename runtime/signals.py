"""Signals that end a run in good order."""

import signal

from runtime.distributed import World


class Interrupted(KeyboardInterrupt):
    """A signal that ends the program at once."""


class Interrupt:
    """A context that turns the first SIGINT, SIGTERM or SIGHUP into a flag, so that the current step can end and be
    saved, and SIGUSR1 into a wish to save.

    `signal` is the number of the first, or 0. A second one, and the first while `at_once` is set, raises `Interrupted`;
    later ones are ignored. Signals that were ignored before, as SIGHUP is after nohup, stay so."""

    SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # a system may lack some

    def __init__(self, at_once: bool = False):
        self.at_once, self.signal, self.save = at_once, 0, False

    def __enter__(self):
        numbers = [getattr(signal, name) for name in self.SIGNALS if hasattr(signal, name)]
        self._previous_handlers = {
            number: signal.signal(number, self._catch)
            for number in numbers
            if signal.getsignal(number) not in (signal.SIG_IGN, None)
        }
        return self

    def _catch(self, number, frame):
        name = signal.Signals(number).name
        if name == "SIGUSR1":
            self.save = True
        elif self.signal or self.at_once:
            for each in self._previous_handlers:
                signal.signal(each, signal.SIG_IGN)
            self.signal = number
            raise Interrupted(f"{name} ended it at once")
        else:
            self.signal = number

    def agree(self, world: World, progress: float, late: bool) -> tuple[float, str, bool]:
        """What all ranks do next, although clocks and signals differ between them.

        Returns the `progress` of rank 0; the status to stop with, or "" if no rank has had a signal or is `late`; and
        whether any rank has had SIGUSR1 since the last call."""
        asked, self.save = self.save, False
        progress, signaled, late, asked = world.max(progress if world.is_main else 0.0, self.signal, late, asked)
        return progress, "interrupted" if signaled else "time_limit" if late else "", bool(asked)

    def __exit__(self, *error):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
