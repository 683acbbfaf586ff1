"""Cuts a stream of frames into rounds by their stamps; keeps the newest when the model is late.

Pure bookkeeping, no torch and no ROS: the same stamps give the same rounds at any arrival speed.
Not for: scaling or encoding images.
"""
from collections import deque
from dataclasses import dataclass, replace
import math

from svlm_ros.engine.updates import Frame

# A frame may come this fraction of a sampling period early and still fill its place, so that a
# camera which runs at the sampling rate itself does not lose frames to the jitter of its stamps.
EARLY_TOLERANCE = 0.1


@dataclass(frozen=True)
class Round:
    """The frames of one round.

    :param index: rounds since the stream began: floor(stream time / round duration).
    :param frames: at least one, oldest first.
    :param restart: time jumped back before this round; the stream must forget what it knows.
    :param frames_dropped: sampled frames that were skipped since the previous round handed out.
    """

    index: int
    frames: tuple[Frame, ...]
    restart: bool = False
    frames_dropped: int = 0


class RoundAssembler:
    """Samples frames and groups them into rounds.

    A frame fills place k of the stream when it is the first at or after k / frame rate (less a
    small tolerance for jitter); a round is ready as soon as its last place is filled, or a frame
    of a later round arrives. Not thread-safe: its owner locks.

    :param frames_per_round: places per round.
    :param frame_rate_hz: places per second of stream time.
    :param max_ready: rounds kept ready; when one more is ready the oldest is dropped and counted.
        None keeps all (replay).
    """

    def __init__(self, frames_per_round: int, frame_rate_hz: float,
                 max_ready: int | None = None) -> None:
        self._frames_per_round = frames_per_round
        self._period_ns = 1e9 / frame_rate_hz
        self._max_ready = max_ready
        self.frames_dropped_total = 0
        self.out_of_order_total = 0
        self.clear()

    def clear(self) -> None:
        """Forget all frames and begin anew: the next frame is at stream time 0."""
        self._ready: deque[Round] = deque()
        self._dropped = 0
        self._open: list[Frame] = []
        self._begin(restarted=False)

    def _begin(self, restarted: bool) -> None:
        self._origin_ns: int | None = None
        self._newest_ns = 0
        self._place = -1
        self._restarted = restarted

    def wants(self, stamp_ns: int) -> bool:
        """Take note of a stamp; whether its frame would be sampled, or shows that time jumped.

        Cheap: call it before converting an image. A frame that it refuses needs no `push`.
        """
        if self._origin_ns is None or self._jumped_back(stamp_ns):
            return True
        return self._in_order(stamp_ns) and self._place_of(stamp_ns) > self._place

    def push(self, frame: Frame) -> None:
        """Take a frame; frames between the sampling places and out of order are ignored."""
        if self._origin_ns is not None and self._jumped_back(frame.stamp_ns):
            self.flush()
            self._begin(restarted=True)
        if self._origin_ns is None:
            self._origin_ns = frame.stamp_ns
        if not self._in_order(frame.stamp_ns):
            return
        place = self._place_of(frame.stamp_ns)
        if place <= self._place:
            return
        if self._round_of(place) != self._round_of(self._place):
            self.flush()
        self._place = place
        self._open.append(frame)
        if (place + 1) % self._frames_per_round == 0:
            self.flush()

    def flush(self) -> None:
        """Close the open round, complete or not: the stream ended or fell silent."""
        if not self._open:
            return
        self._ready.append(Round(self._round_of(self._place), tuple(self._open), self._restarted))
        self._open = []
        self._restarted = False
        while self._max_ready is not None and len(self._ready) > self._max_ready:
            late = self._ready.popleft()
            self._dropped += len(late.frames)
            self.frames_dropped_total += len(late.frames)
            if late.restart:
                self._ready[0] = replace(self._ready[0], restart=True)

    def pop(self) -> Round | None:
        """Hand out the oldest ready round, or None."""
        if not self._ready:
            return None
        dropped, self._dropped = self._dropped, 0
        return replace(self._ready.popleft(), frames_dropped=dropped)

    @property
    def has_ready(self) -> bool:
        """Whether `pop` would return a round."""
        return bool(self._ready)

    def _in_order(self, stamp_ns: int) -> bool:
        if stamp_ns < self._newest_ns:
            self.out_of_order_total += 1
            return False
        self._newest_ns = stamp_ns
        return True

    def _jumped_back(self, stamp_ns: int) -> bool:
        return stamp_ns <= self._newest_ns - self._period_ns * self._frames_per_round

    def _place_of(self, stamp_ns: int) -> int:
        assert self._origin_ns is not None
        return math.floor((stamp_ns - self._origin_ns) / self._period_ns + EARLY_TOLERANCE)

    def _round_of(self, place: int) -> int:
        return place // self._frames_per_round
