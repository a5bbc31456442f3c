"""Training loops that take turns, step by step, although each framework owns its own: each in a thread, one of which runs at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from threading import Semaphore, Thread

__all__ = ["Loop", "Paced", "use_one_arena"]

Loop = Callable[[Callable[[], None]], None]  # calls its argument at the end of every step
_M_ARENA_MAX = -8  # of glibc's mallopt


def use_one_arena() -> None:
    """Let all threads allocate as the main one does: glibc gives each an arena of its own, which hands memory back sooner."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


class Paced:
    """A training loop that makes one step for each call. The first call starts it."""

    def __init__(self, loop: Loop) -> None:
        self._go, self._paused = Semaphore(0), Semaphore(0)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, args=(loop,), daemon=True)

    def __call__(self) -> None:
        """Return at the end of the loop's next step, or of the loop. Raises what the loop raises, and RuntimeError after its end."""
        if self._thread.ident is None:
            self._thread.start()
        elif self._thread.is_alive():
            self._go.release()
        else:
            raise RuntimeError("Paced: the loop has ended; let it make more steps")
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Let the loop, whose last step has been made, end."""
        self()
        self._thread.join()

    def _run(self, loop: Loop) -> None:
        try:
            loop(self._pause)
        except BaseException as error:
            self._error = error
        finally:
            self._paused.release()

    def _pause(self) -> None:
        self._paused.release()
        self._go.acquire()
