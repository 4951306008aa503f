"""Ctrl-C while a TensorRT library works."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupts:
    """Ctrl-C, put off while a library works that calls back.

    Python would raise `KeyboardInterrupt` inside the function that the library calls, often before its first line. The
    bindings swallow it there, and the library goes on, or says that the graph cannot be built.

    Attributes:
        is_pending: whether there was one; what the library calls may ask it to stop then.
    """

    def __init__(self) -> None:
        self.is_pending = False

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Note a Ctrl-C for so long, and raise `KeyboardInterrupt` at the end, whatever the library made of it.

        A program's own handler stays as it is; so does all in a thread that is not the main one, where none is called.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self.is_pending:
                raise KeyboardInterrupt from None

    def _note(self, number: int, frame: Any) -> None:
        self.is_pending = True
