"""What stops a run, and what must not: signals, and a second run in the same workdir."""

import contextlib
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path


class Stopped(BaseException):
    """A signal asked the program to end. `code` is its exit status, 128 + the signal's number, which launchers restart on.

    agreed: all processes of the run end here, together.
    """

    def __init__(self, number: int, agreed: bool = False):
        super().__init__(signal.Signals(number).name)
        self.code, self.agreed = 128 + number, agreed


class Signals:
    """SIGTERM and SIGINT, while entered, raise `Stopped`, or wait in `received` for as long as `waiting` is entered.

    A second signal does not wait. Entered in the main thread.
    """

    def __init__(self):
        self.received: int | None = None
        self._waits = False

    def _handle(self, number, _):
        if not self._waits or self.received is not None:
            raise Stopped(number)
        self.received = number

    def __enter__(self):
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it the first signal is kept in `received`, for a loop that ends where it can be taken up again.

        Raises `Stopped` at its end where the loop did not.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.received is not None:
            raise Stopped(self.received)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of a workdir; the lock goes with the process, however that ends.

    Raises:
      BlockingIOError: another run holds it.
    """
    with (workdir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise BlockingIOError(f"another run writes to {workdir} ({owner}); wait for it, stop it, or use another --workdir") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
