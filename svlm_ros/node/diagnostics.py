"""What `/diagnostics` says: plain counts in, DiagnosticArray out; and the one place for failures.

Not for: measuring (see cameras.py and `svlm_ros.engine.worker`).
"""
from collections.abc import Sequence
from dataclasses import dataclass, field
import math
import time

from builtin_interfaces.msg import Time
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.impl.rcutils_logger import RcutilsLogger

# A failure shows as a warning in diagnostics for this long, so that a monitor at 1 Hz sees it.
RECENT_SEC = 10.0

# Kinds of failures whose logging is throttled; a camera could make up new ones for ever.
MAX_KINDS = 256


@dataclass(frozen=True)
class CameraHealth:
    """One camera now; rates over the time since the last report.

    :param silent_sec: seconds since the last image, None while images come or nothing is watched.
    :param frozen_sec: seconds since the stamps last advanced, None while they do.
    :param incompatible: names of QoS policies for which publishers were refused.
    :param latency_sec: of the newest description, None before the first.
    :param cache_tokens: tokens that the stream's cache holds, 0 where there is none.
    """

    name: str
    topic: str
    watching: bool
    publishers: int
    received: int
    rate_hz: float
    bad_images: int
    last_bad_image: str
    recent_bad_image: bool
    silent_sec: float | None
    frozen_sec: float | None
    incompatible: tuple[str, ...]
    latency_sec: float | None
    rounds: int
    round_seconds: float
    frames_used: int
    frames_dropped: int
    frames_out_of_order: int
    cache_used: int
    cache_tokens: int


@dataclass(frozen=True)
class EngineHealth:
    """The engine and the questions now. `load_failure` is empty unless the last load failed."""

    state: str
    model: str
    device: str
    device_memory_bytes: int
    enabled: bool
    questions: int
    answered: int
    failed: int
    events_dropped: int
    load_failure: str
    last_error: str
    last_error_age_sec: float | None


@dataclass
class Failures:
    """Reports failures: to the log, throttled per kind, and to diagnostics as the last error."""

    logger: RcutilsLogger
    last: str = ''
    _at: float | None = None
    _logged: dict[str, tuple[float, int]] = field(default_factory=dict)

    def report(self, message: str, kind: str = '', period_sec: float = 0.0) -> None:
        """Note a failure.

        :param kind: failures of one kind are logged once per `period_sec`, with their number.
        """
        now = time.monotonic()
        self.last, self._at = message, now
        if period_sec > 0.0:
            logged_at, unlogged = self._logged.get(kind, (-math.inf, 0))
            if now - logged_at < period_sec:
                self._logged[kind] = (logged_at, unlogged + 1)
                return
            if len(self._logged) >= MAX_KINDS:
                self._logged.clear()
            self._logged[kind] = (now, 0)
            if unlogged:
                message += f' ({unlogged} more since the last such line)'
        self.logger.warning(message)

    @property
    def age_sec(self) -> float | None:
        """Seconds since the last failure, None before the first."""
        return None if self._at is None else time.monotonic() - self._at


def diagnostic_array(stamp: Time, node_name: str, engine: EngineHealth,
                     cameras: Sequence[CameraHealth]) -> DiagnosticArray:
    """Return one status for the engine and one per camera."""
    array = DiagnosticArray(status=[
        engine_status(node_name, engine), *(camera_status(node_name, one) for one in cameras)])
    array.header.stamp = stamp
    return array


def engine_status(node_name: str, health: EngineHealth) -> DiagnosticStatus:
    """Return the engine's status: ERROR after a failed load, WARN after a recent failure."""
    level = DiagnosticStatus.OK
    message = health.state if health.enabled else f'{health.state}, disabled by ~/set_enabled'
    if health.load_failure:
        level, message = DiagnosticStatus.ERROR, f'{message}: {health.load_failure}'
    elif health.last_error_age_sec is not None and health.last_error_age_sec < RECENT_SEC:
        level, message = DiagnosticStatus.WARN, f'{message}: {health.last_error}'
    return _status(level, f'{node_name}: engine', message, health.model, {
        'state': health.state,
        'enabled': health.enabled,
        'model': health.model,
        'device': health.device,
        'device memory (MiB)': f'{health.device_memory_bytes / 2 ** 20:.1f}',
        'questions under way': health.questions,
        'questions answered': health.answered,
        'questions failed': health.failed,
        'events dropped': health.events_dropped,
        'last error': health.last_error or 'none',
        'last error age (s)': _number(health.last_error_age_sec),
    })


def camera_status(node_name: str, health: CameraHealth) -> DiagnosticStatus:
    """Return one camera's status: WARN when silent, frozen, refused or sending bad images."""
    level, message = DiagnosticStatus.OK, 'images come'
    if not health.watching:
        message = 'not watched'
    elif health.incompatible:
        level = DiagnosticStatus.WARN
        message = incompatible_qos_advice(health.topic, health.incompatible[-1])
    elif health.silent_sec is not None:
        level = DiagnosticStatus.WARN
        message = silence_message(health.topic, health.silent_sec, health.publishers)
    elif health.frozen_sec is not None:
        level = DiagnosticStatus.WARN
        message = frozen_message(health.topic, health.frozen_sec)
    elif health.recent_bad_image:
        level, message = DiagnosticStatus.WARN, health.last_bad_image
    elif health.received == 0:
        message = 'waiting for the first image'
    fill = health.cache_used / health.cache_tokens if health.cache_tokens else 0.0
    return _status(level, f'{node_name}: camera {health.name}', message, health.topic, {
        'topic': health.topic,
        'publishers': health.publishers,
        'images received': health.received,
        'rate (Hz)': f'{health.rate_hz:.2f}',
        'bad images': health.bad_images,
        'last bad image': health.last_bad_image or 'none',
        'latency (s)': _number(health.latency_sec),
        'rounds described': health.rounds,
        'time per round (s)': f'{health.round_seconds:.3f}',
        'frames used': health.frames_used,
        'frames dropped': health.frames_dropped,
        'frames out of order': health.frames_out_of_order,
        'cache fill (%)': f'{100 * fill:.1f}',
    })


def silence_message(topic: str, seconds: float, publishers: int) -> str:
    """Return what is said about a camera that sends nothing."""
    advice = ('check the camera and the parameter topics' if publishers == 0 else
              'check the camera driver and the QoS of its publisher')
    return (f'no frame on {topic} for {seconds:.1f} s; {publishers} publisher'
            f'{"" if publishers == 1 else "s"}: {advice}')


def frozen_message(topic: str, seconds: float) -> str:
    """Return what is said about a camera whose images all carry the same stamp."""
    return (f'the stamps of the images on {topic} have not advanced for {seconds:.1f} s, so there '
            'is nothing new to describe: check the clock of the camera driver or simulation')


def incompatible_qos_advice(topic: str, policy: str) -> str:
    """Return what is said about a publisher that offers less than the subscription asks for."""
    name = policy.lower()
    weakest = {'reliability': 'best_effort', 'durability': 'volatile'}
    value = f' to {weakest[name]}' if name in weakest else ''
    return (f'a publisher on {topic} offers incompatible {name}: no images from it; '
            f'set qos_overrides.{topic}.subscription.{name}{value}')


def _status(level: bytes, name: str, message: str, hardware_id: str,
            values: dict[str, object]) -> DiagnosticStatus:
    return DiagnosticStatus(
        level=level, name=name, message=message, hardware_id=hardware_id,
        values=[KeyValue(key=key, value=str(value)) for key, value in values.items()])


def _number(value: float | None) -> str:
    return 'none' if value is None else f'{value:.3f}'
