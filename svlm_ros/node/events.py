"""The way from the engine thread to the executor: a bounded queue that never loses an outcome.

Not for: what the events mean to the node (see node.py).
"""
from collections import deque
from collections.abc import Callable, Iterator
import threading

from svlm_ros.engine.worker import AnswerProgress, Described, Event

# Far above what a model makes in the time the executor needs for one callback.
CAPACITY = 1024


class EventQueue:
    """Hands events over from the engine thread (`put`) to the executor thread (`drain`).

    When full, descriptions and tokens are dropped and counted; how loads, questions and streams
    ended is always kept: somebody waits for it, and there are no more of them than questions.

    :param wake: called after each `put`; makes the executor call `drain`.
    """

    def __init__(self, wake: Callable[[], None], capacity: int = CAPACITY) -> None:
        self._wake = wake
        self._capacity = capacity
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self.dropped = 0

    def put(self, event: Event) -> None:
        """Append an event, from any thread."""
        with self._lock:
            if (len(self._events) >= self._capacity
                    and isinstance(event, AnswerProgress | Described)):
                self.dropped += 1
            else:
                self._events.append(event)
        self._wake()

    def drain(self) -> Iterator[Event]:
        """Yield what has come in, oldest first, without waiting for more."""
        with self._lock:
            events = list(self._events)
            self._events.clear()
        yield from events
