"""Ends a run whose rollout engine has died. verl waits for ever for a dead engine to take new weights.

A daemon thread of the trainer asks every rollout server for its health, over HTTP and past any proxy. A server that has
answered before and now twice refuses the connection or says that its engine is dead ends the run: the workers that wait
for it are killed, so that the trainer's own wait ends, and the trainer names the cause. A server that never answered
(a closed port between nodes) is not watched, which is said once; a slow answer is no death.
"""

from __future__ import annotations

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

EVERY_S, ANSWER_S, GRACE_S = 2.0, 10.0, 45.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class RolloutDied(RuntimeError):
    """A rollout server or its engine is gone."""


def health(address: str) -> str | None:
    """``None`` when the server at ``host:port`` is well or only slow, else what is wrong with it."""
    try:
        with _OPENER.open(f"http://{address}/health", timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError as error:
        return f"its health check answers {error.code}" if error.code >= 500 else None
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, TimeoutError) else f"no connection ({error.reason})"
    except TimeoutError:
        return None
    except (ConnectionError, OSError) as error:
        return f"no connection ({error})"


class Watchdog:
    """Watches servers from :meth:`start` until :meth:`stop`.

    Args:
        release: Called once, from the watching thread, when a server is found dead; ends what waits for it.
        every_s: Seconds between two looks.
        grace_s: Seconds that the process then has to end by itself, before it is ended.
        ask: The health check; as :func:`health`.
        end: Ends the process.
    """

    def __init__(
        self,
        release: Callable[[], None],
        *,
        every_s: float = EVERY_S,
        grace_s: float = GRACE_S,
        ask: Callable[[str], str | None] = health,
        end: Callable[[], None] = lambda: os._exit(1),
    ):
        self.release, self.every_s, self.grace_s, self.ask, self.end = release, every_s, grace_s, ask, end
        self.cause: str | None = None
        self._stopped = threading.Event()

    def start(self, addresses: Sequence[str]) -> None:
        """Watch those of ``addresses`` (``host:port``) that answer now."""
        silent = [address for address in addresses if self.ask(address) is not None]
        if silent:
            print(f"grad_routing: rollout servers {silent} cannot be asked for their health and are not watched")
        watched = [address for address in addresses if address not in silent]
        threading.Thread(target=self._watch, args=(watched,), name="rollout-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self, addresses: list[str]) -> None:
        suspected: set[str] = set()
        while addresses and not self._stopped.wait(self.every_s):
            wrong = {address: told for address in addresses if (told := self.ask(address)) is not None}
            dead = suspected & set(wrong)
            suspected = set(wrong)
            if dead and not self._stopped.is_set():
                self.cause = "; ".join(f"the rollout server at {one} died: {wrong[one]}" for one in sorted(dead))
                print(f"grad_routing: {self.cause}; the run ends", flush=True)
                self.release()
                if not self._stopped.wait(self.grace_s):
                    self.end()
                return

    @contextmanager
    def names_the_cause(self) -> Iterator[None]:
        """Errors that a dead server led to leave as :class:`RolloutDied`; an error ends the watch."""
        try:
            yield
        except BaseException as error:
            self.stop()
            if self.cause is None or not isinstance(error, Exception):
                raise
            raise RolloutDied(f"{self.cause}; its own error is in the log above") from error
