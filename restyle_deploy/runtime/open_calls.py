"""Which calls of a session are going on: closing it waits for them, and refuses later ones."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

Result = TypeVar("Result")


class OpenCalls:
    """Counts calls, each of them a `with` block, in any thread; and has one thread for those that go on later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count, self._is_closed = 0, False
        self._worker: ThreadPoolExecutor | None = None
        self._worker_ident: int | None = None  # of its thread

    @property
    def is_closed(self) -> bool:
        """Whether further calls are refused."""
        return self._is_closed

    def __enter__(self) -> None:
        with self._changed:
            if self._is_closed:
                raise ValueError("the session is closed")
            self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def run_later(self, work: Callable[[], Result]) -> "Future[Result]":
        """Have work done by the one thread, after what it was given before; it counts as a call from now on.

        Raises:
            ValueError: the session is closed.
        """

        def run() -> Result:
            self._worker_ident = threading.get_ident()
            try:
                return work()
            finally:
                self.__exit__(None, None, None)

        self.__enter__()
        try:
            with self._changed:
                if self._worker is None:
                    self._worker = ThreadPoolExecutor(1, thread_name_prefix="restyle-deploy")
                return self._worker.submit(run)
        except BaseException:  # the interpreter ends, and takes no more work
            self.__exit__(None, None, None)
            raise

    def close(self) -> None:
        """Refuse further calls, and wait for those that go on; safe to call twice, and in the thread of later work."""
        with self._changed:
            self._is_closed = True
            self._changed.wait_for(lambda: self._count == 0)
        if self._worker is not None:
            self._worker.shutdown(wait=threading.get_ident() != self._worker_ident)
