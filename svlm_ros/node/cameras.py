"""One camera: its subscription, what came in, and whether it has fallen silent.

Callbacks only read the stamp, convert the frames that the engine wants, and hand them over.
Not for: pixels (see images.py) or choosing frames (see `svlm_ros.engine.rounds`).
"""
from collections.abc import Callable
from dataclasses import dataclass
import re
import time
from typing import Any

try:
    from rclpy.event_handler import QoSRequestedIncompatibleQoSInfo, SubscriptionEventCallbacks
except ImportError:     # Humble
    from rclpy.qos_event import QoSRequestedIncompatibleQoSInfo, SubscriptionEventCallbacks
from rclpy.node import Node
from rclpy.qos import (
    HistoryPolicy,
    qos_policy_name_from_kind,
    QoSDurabilityPolicy,
    QoSPolicyKind,
    QoSProfile,
    ReliabilityPolicy,
)
from rclpy.qos_overriding_options import QoSOverridingOptions
from rclpy.subscription import Subscription
from sensor_msgs.msg import CompressedImage, Image

from svlm_ros.engine.updates import Frame
from svlm_ros.engine.worker import StreamStats, Worker
from svlm_ros.messages import stamp_nanoseconds
from svlm_ros.node.diagnostics import (
    CameraHealth,
    Failures,
    frozen_message,
    incompatible_qos_advice,
    RECENT_SEC,
    silence_message,
)
from svlm_ros.node.images import decode_compressed, decode_image, ImageError
from svlm_ros.node.parameters import CameraSettings

# Sensor data QoS. Deep enough for the executor to be held up for 300 ms at 30 frames per second
# (bench/node_images.py --stall 0.3); every place costs the memory of one image in the middleware.
DEPTH = 10

# A camera that sends nothing but bad images does so at 30 per second.
BAD_IMAGE_LOG_PERIOD_SEC = 10.0

# Sizes and offsets in a reason do not make it another kind of failure.
_DIGITS = re.compile(r'\d+')

OVERRIDABLE = (QoSPolicyKind.HISTORY, QoSPolicyKind.DEPTH, QoSPolicyKind.RELIABILITY,
               QoSPolicyKind.DURABILITY)


@dataclass(frozen=True)
class Transport:
    """What is subscribed, and how its pixels are had: the one place where this is chosen."""

    message_type: type
    decode: Callable[[Any], Any]


TRANSPORTS = {
    'raw': Transport(Image, decode_image),
    'compressed': Transport(CompressedImage, decode_compressed),
}


class Camera:
    """Feeds one stream of the worker from one topic. Lives in the executor thread.

    :param now_ns: the node's clock, for images without a stamp.
    :raises RuntimeError: by `watch`, when a QoS override is not a policy's value.
    """

    def __init__(self, node: Node, settings: CameraSettings, transport: str, worker: Worker,
                 failures: Failures, now_ns: Callable[[], int]) -> None:
        self.name = settings.name
        self.topic = node.resolve_topic_name(settings.topic)
        self._node = node
        self._transport = TRANSPORTS[transport]
        self._worker = worker
        self._failures = failures
        self._now_ns = now_ns
        self._subscription: Subscription | None = None
        self._heard_at = 0.0
        self._silent = False
        self._newest_stamp_ns = -1
        self._advanced_at = 0.0
        self._frozen = False
        self._received = 0
        self._bad_images = 0
        self._bad_image = ''
        self._bad_image_at: float | None = None
        self._incompatible: dict[str, None] = {}
        self._warned_of_stamp = False
        self._reported = (time.monotonic(), 0)
        self.latency_sec: float | None = None

    @property
    def watching(self) -> bool:
        """Whether the topic is subscribed."""
        return self._subscription is not None

    def watch(self) -> None:
        """Subscribe."""
        profile = QoSProfile(
            history=HistoryPolicy.KEEP_LAST, depth=DEPTH,
            reliability=ReliabilityPolicy.BEST_EFFORT, durability=QoSDurabilityPolicy.VOLATILE)
        self._heard_at = self._advanced_at = time.monotonic()
        self._silent = self._frozen = False
        self._incompatible.clear()
        self._subscription = self._node.create_subscription(
            self._transport.message_type, self.topic, self._on_message, profile,
            event_callbacks=SubscriptionEventCallbacks(
                incompatible_qos=self._on_incompatible_qos),
            qos_overriding_options=QoSOverridingOptions(OVERRIDABLE))

    def unwatch(self) -> None:
        """Unsubscribe; what was seen of an unfinished round is still described."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None
            self._worker.flush(self.name)

    def check_silence(self, timeout_sec: float) -> None:
        """Warn, once each time, when no image or no new stamp has come for this long."""
        now = time.monotonic()
        if not self.watching or self._silent:
            return
        if now - self._heard_at >= timeout_sec:
            self._silent = True
            self._worker.flush(self.name)
            self._failures.report(silence_message(
                self.topic, now - self._heard_at, self._publishers()))
        elif now - self._advanced_at >= timeout_sec and not self._frozen:
            self._frozen = True
            self._worker.flush(self.name)
            self._failures.report(frozen_message(self.topic, now - self._advanced_at))

    def health(self, stats: StreamStats, cache_tokens: int) -> CameraHealth:
        """Return what diagnostics show; the rate is of the time since the last call."""
        now, publishers = time.monotonic(), self._publishers()
        since, received = self._reported
        self._reported = (now, self._received)
        return CameraHealth(
            name=self.name, topic=self.topic, watching=self.watching,
            publishers=publishers, received=self._received,
            rate_hz=(self._received - received) / max(now - since, 1e-3),
            bad_images=self._bad_images, last_bad_image=self._bad_image,
            recent_bad_image=(self._bad_image_at is not None
                              and now - self._bad_image_at < RECENT_SEC),
            silent_sec=now - self._heard_at if self._silent else None,
            frozen_sec=now - self._advanced_at if self._frozen else None,
            incompatible=tuple(self._incompatible) if publishers else (),
            latency_sec=self.latency_sec,
            rounds=stats.rounds, round_seconds=stats.round_seconds,
            frames_used=stats.frames_used, frames_dropped=stats.frames_dropped,
            frames_out_of_order=stats.frames_out_of_order,
            cache_used=stats.cache_used, cache_tokens=cache_tokens)

    def _on_message(self, message: Any) -> None:
        self._hear()
        stamp_ns = self._stamp(message)
        self._note_stamp(stamp_ns)
        if not self._worker.wants(self.name, stamp_ns):
            return
        try:
            image = self._transport.decode(message)
        except ImageError as error:
            self._note_bad_image(str(error))
            return
        self._worker.offer(self.name, Frame(image, stamp_ns, message.header.frame_id))

    def _hear(self) -> None:
        now = time.monotonic()
        if self._silent:
            self._silent = False
            self._node.get_logger().info(
                f'Frames on {self.topic} again after {now - self._heard_at:.1f} s')
        self._heard_at = now
        self._received += 1

    def _note_stamp(self, stamp_ns: int) -> None:
        """Take note of whether time goes on: rounds are cut by it alone."""
        if stamp_ns == self._newest_stamp_ns:
            return
        self._newest_stamp_ns = stamp_ns
        self._advanced_at = time.monotonic()
        if self._frozen:
            self._frozen = False
            self._node.get_logger().info(f'The stamps on {self.topic} advance again')

    def _stamp(self, message: Any) -> int:
        stamp_ns = stamp_nanoseconds(message.header.stamp)
        if stamp_ns == 0:
            stamp_ns = self._now_ns()
            if not self._warned_of_stamp:
                self._warned_of_stamp = True
                self._failures.report(f'Images on {self.topic} carry no stamp: the time of their '
                                      'arrival is used; let the camera driver set header.stamp')
        return stamp_ns

    def _note_bad_image(self, reason: str) -> None:
        self._bad_images += 1
        self._bad_image = f'skipped an image on {self.topic}: {reason}'
        self._bad_image_at = time.monotonic()
        self._failures.report(self._bad_image, f'{self.topic} {_DIGITS.sub("", reason)}',
                              BAD_IMAGE_LOG_PERIOD_SEC)

    def _on_incompatible_qos(self, event: QoSRequestedIncompatibleQoSInfo) -> None:
        policy = qos_policy_name_from_kind(event.last_policy_kind)
        self._incompatible[policy] = None
        self._failures.report(incompatible_qos_advice(self.topic, policy))

    def _publishers(self) -> int:
        return self._node.count_publishers(self.topic)
