"""A total time limit for calls that wait for other machines."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar


T = TypeVar("T")


def call_within(seconds: float, call: Callable[[], T]) -> T:
    """The result of a call that may take at most `seconds`.

    Timeouts of sockets limit the wait for the next byte, so that a server that sends a byte a second is waited for without
    end. After the limit the call goes on in a daemon thread, whose result is dropped.

    Raises:
        TimeoutError: the call takes longer.
        Exception: what the call raises.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(timeout=seconds)
