"""Whether a server replies, found out within a short time."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TIME_LIMIT_S = 2.0


def result_within(request: Callable[[], T], *, seconds: float = TIME_LIMIT_S) -> T:
    """The result of ``request``, which must end within ``seconds``.

    It runs in a thread, since the look-up of a host name has no time limit of its own. The thread goes on after the
    time limit, and does not keep the process alive.

    Raises:
        TimeoutError: there is no result in time.
        Exception: what ``request`` raises.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(request())
        except Exception as error:  # raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no reply within {seconds:g} s")
    return results[0]


def error_within(action: Callable[[], object], *, seconds: float = TIME_LIMIT_S) -> Exception | None:
    """The exception that ``action`` raises; None if it raises none; TimeoutError if it takes longer."""
    try:
        result_within(action, seconds=seconds)
    except Exception as error:  # the caller reports it
        return error
    return None


def no_reply(url: str) -> str | None:
    """Why the server of this URL does not reply within :data:`TIME_LIMIT_S` seconds; None if it does.

    A reply with an error, such as 404, is a reply. Proxies are used as the environment says (``HTTPS_PROXY``).
    """

    def request() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIME_LIMIT_S).close()
        except urllib.error.HTTPError as reply:
            reply.close()
        except urllib.error.URLError as error:
            raise error.reason if isinstance(error.reason, Exception) else error from error

    error = error_within(request)
    return None if error is None else reason(error)


def reason(error: Exception) -> str:
    """An exception as a short text."""
    return " ".join(str(error).split())[:200] or type(error).__name__
