#!/usr/bin/env python3
"""Measures what an image costs the node, beside a bare rclpy subscriber. Not for: the engine.

    python bench/node_images.py                  the table of README.md, about two minutes
    python bench/node_images.py --help           other cameras, sizes, QoS, stalls

Every camera is a process of its own that publishes rgb8 at 30 Hz; the receiver is one process with
a SingleThreadedExecutor that takes every image and converts the 2 frames per second that a stream
samples, in one of three ways:

    node      the whole node with the model `null`, describing every round; its QoS is its own

    message   the baseline, a bare subscriber: rclpy makes a sensor_msgs/Image of every frame
    raw       the same with `raw=True`: rclpy hands over the serialised bytes; the stamp is read
              from them, and only sampled frames are deserialised

and with the allocator as it comes or with `svlm_ros.node.memory` applied (malloc: default, kept).
`service` is the time from taking the message to the end of the callback, `latency` from the
header's stamp to the end of the callback, CPU the receiver's share of one core, DDS threads
included. `lost` counts frames that were sent and never reached a callback.

Prediction, before the first run: both ways copy the image twice (out of Fast DDS, into a Python
object), so `raw` saves the second representation at most, about a third of the service time; the
profile decides what is lost, the way of subscribing does not. 640x480: 0.5 ms median, four cameras
at 30 Hz cost a tenth of a core; 1080p: 3 ms.

Outcome: right about what is lost, and about `raw`, which saves 0.2 ms a frame and about 3 % of a
core for four cameras: too little to read CDR by hand. Wrong about the rest until freed memory was
kept: the copies are cheap, but 4,500 page faults per 1080p frame (640 per 640x480 frame) made them
cost four to eight times as much.
"""
import argparse
from collections.abc import Callable, Iterator
import contextlib
from dataclasses import asdict, dataclass, replace
import functools
import json
import math
import os
from pathlib import Path
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from svlm_ros.node.images import decode_image  # noqa: E402
from svlm_ros.node.memory import keep_freed_memory  # noqa: E402

PROFILE = ROOT / 'config' / 'fastdds.xml'
SAMPLED_PER_SECOND = 2
# Little-endian CDR encapsulation (4 bytes), then the header's stamp: int32 sec, uint32 nanosec.
STAMP = struct.Struct('<iI')
STAMP_OFFSET = 4


@dataclass(frozen=True)
class Case:
    """One row of the table; field meanings as in `--help`."""

    cameras: int = 1
    width: int = 640
    height: int = 480
    rate_hz: float = 30.0
    seconds: float = 8.0
    take: str = 'message'
    profile_on: str = 'both'
    reliable: bool = False
    depth: int = 10
    malloc: str = 'kept'
    stall_sec: float = 0.0

    @property
    def frames(self) -> int:
        """Frames that each camera sends."""
        return round(self.rate_hz * self.seconds)


@dataclass(frozen=True)
class Measured:
    """What the receiver saw. Times in milliseconds."""

    received: int
    service_p50: float
    service_p99: float
    latency_p50: float
    latency_p99: float
    cpu_percent: float


def topic(camera: int) -> str:
    """Return the topic of a camera."""
    return f'camera_{camera}/image'


def qos(case: Case) -> Any:
    """Return the QoS of both ends."""
    from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
    return QoSProfile(
        depth=case.depth, history=HistoryPolicy.KEEP_LAST,
        reliability=(ReliabilityPolicy.RELIABLE if case.reliable
                     else ReliabilityPolicy.BEST_EFFORT))


def publish(case: Case, camera: int) -> None:
    """Be one camera: wait for the receiver, send `case.frames` frames at `case.rate_hz`, end.

    Publishes serialised bytes with a new stamp each, so that it costs little more than a driver in
    C++ would; on the wire it is the same.
    """
    import rclpy
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import Image
    rclpy.init()
    node = rclpy.create_node(f'camera_{camera}')
    publisher = node.create_publisher(Image, topic(camera), qos(case))
    picture = np.random.default_rng(camera).integers(
        0, 256, (case.height, case.width, 3), dtype=np.uint8)
    image = Image(height=case.height, width=case.width, encoding='rgb8', step=case.width * 3)
    image.header.frame_id = f'camera_{camera}'
    image.data = picture.tobytes()
    frame = bytearray(serialize_message(image))
    while publisher.get_subscription_count() == 0:
        time.sleep(0.02)
    time.sleep(0.5 + camera / case.rate_hz / case.cameras)
    start = time.monotonic()
    for index in range(case.frames):
        time.sleep(max(0.0, start + index / case.rate_hz - time.monotonic()))
        STAMP.pack_into(frame, STAMP_OFFSET, *divmod(time.time_ns(), 10 ** 9))
        publisher.publish(bytes(frame))
    time.sleep(1.0)
    node.destroy_node()
    rclpy.try_shutdown()


class Receiver:
    """The node's side of image topics: takes all frames, converts the sampled ones, notes times.

    :param taken_at: returns when the message in hand was taken, by `time.perf_counter`.
    """

    def __init__(self, case: Case, taken_at: Callable[[], float]) -> None:
        self._case = case
        self._taken_at = taken_at
        self._places = [-1] * case.cameras
        self._stalled_in = 0
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)
        self.service_ms: list[float] = []
        self.latency_ms: list[float] = []

    def on_message(self, camera: int, message: Any) -> None:
        """Take one frame of an ordinary subscription."""
        stamp = message.header.stamp
        if self._sampled(camera, stamp.sec, stamp.nanosec):
            decode_image(message)
        self.note(stamp.sec, stamp.nanosec)

    def on_bytes(self, camera: int, data: bytes) -> None:
        """Take one frame of a subscription with `raw=True`."""
        from rclpy.serialization import deserialize_message
        from sensor_msgs.msg import Image
        sec, nanosec = STAMP.unpack_from(data, STAMP_OFFSET)
        if self._sampled(camera, sec, nanosec):
            decode_image(deserialize_message(data, Image))
        self.note(sec, nanosec)

    def seconds_since_last(self) -> float:
        """Return how long no frame has come, 0 before the first."""
        return time.monotonic() - self._last[1] if self._first else 0.0

    def measured(self) -> Measured:
        """Return the summary of all frames."""
        if self._first is None:
            return Measured(0, *[math.nan] * 5)
        cpu, wall = (last - first for last, first in zip(self._last, self._first, strict=True))
        service, latency = (np.percentile(times, [50, 99]).tolist()
                            for times in (self.service_ms, self.latency_ms))
        return Measured(len(self.service_ms), service[0], service[1], latency[0], latency[1],
                        100 * cpu / max(wall, 1e-9))

    def _sampled(self, camera: int, sec: int, nanosec: int) -> bool:
        place = int((sec + nanosec / 1e9) * SAMPLED_PER_SECOND)
        new = self._places[camera] != place
        self._places[camera] = place
        return new

    def note(self, sec: int, nanosec: int) -> None:
        """Note that the frame with this stamp has been dealt with."""
        self.service_ms.append((time.perf_counter() - self._taken_at()) * 1e3)
        self.latency_ms.append((time.time_ns() - sec * 10 ** 9 - nanosec) / 1e6)
        self._last = (time.process_time(), time.monotonic())
        if self._first is None:
            self._first = self._last
        if sec > self._stalled_in and self._case.stall_sec:
            self._stalled_in = sec
            time.sleep(self._case.stall_sec)


def receive(case: Case) -> Measured:
    """Subscribe to every camera until they fall silent; return what it cost."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from sensor_msgs.msg import Image

    class TimedExecutor(SingleThreadedExecutor):
        """Notes when a message is taken: the callback alone would hide most of the cost."""

        taken_at = 0.0

        def _take_subscription(self, sub: Any) -> Any:
            self.taken_at = time.perf_counter()
            return super()._take_subscription(sub)

    if case.malloc == 'kept' and not keep_freed_memory():
        sys.exit('this C library has no mallopt; run with --malloc default')
    rclpy.init()
    node = rclpy.create_node('receiver')
    executor = TimedExecutor()
    executor.add_node(node)
    receiver = Receiver(case, lambda: executor.taken_at)
    callback = receiver.on_bytes if case.take == 'raw' else receiver.on_message
    for camera in range(case.cameras):
        node.create_subscription(Image, topic(camera), functools.partial(callback, camera),
                                 qos(case), raw=case.take == 'raw')
    give_up = time.monotonic() + 20.0 + case.seconds
    while time.monotonic() < give_up and receiver.seconds_since_last() < 1.5 + case.stall_sec:
        executor.spin_once(timeout_sec=0.2)
    node.destroy_node()
    rclpy.try_shutdown()
    return receiver.measured()


def receive_with_node(case: Case) -> Measured:
    """Run the node until the cameras fall silent; return what its image callbacks cost."""
    from svlm_ros.node import main as program
    from svlm_ros.node.cameras import Camera

    taken = {'at': 0.0}
    receiver = Receiver(case, lambda: taken['at'])
    on_message = Camera._on_message

    class TimedExecutor(program.SingleThreadedExecutor):
        def _take_subscription(self, sub: Any) -> Any:
            taken['at'] = time.perf_counter()
            return super()._take_subscription(sub)

    def timed(camera: Camera, message: Any) -> None:
        on_message(camera, message)
        receiver.note(message.header.stamp.sec, message.header.stamp.nanosec)

    def end_when_silent() -> None:
        give_up = time.monotonic() + 20.0 + case.seconds
        while time.monotonic() < give_up and receiver.seconds_since_last() < 1.5:
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    program.SingleThreadedExecutor = TimedExecutor      # type: ignore[misc]
    Camera._on_message = timed      # type: ignore[method-assign]
    threading.Thread(target=end_when_silent, daemon=True).start()
    names = ', '.join(f'camera_{camera}' for camera in range(case.cameras))
    program.main(['svlm_node', '--ros-args', '--log-level', 'warn', '-p', 'model:=null', '-p',
                  'autostart:=true', '-p', f'cameras:=[{names}]'])
    return receiver.measured()


@contextlib.contextmanager
def started(case: Case) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start one process per camera; end them whatever happens."""
    cameras = [subprocess.Popen(command(case, f'publish:{camera}'),
                                env=environment(case.profile_on in ('both', 'publisher')))
               for camera in range(case.cameras)]
    try:
        yield cameras
    finally:
        for process in cameras:
            process.terminate()
            process.wait()


def command(case: Case, role: str) -> list[str]:
    """Return the command line of one process of a case."""
    return [sys.executable, __file__, '--role', role, '--case', json.dumps(asdict(case))]


def environment(with_profile: bool) -> dict[str, str]:
    """Return the environment of one process."""
    env = dict(os.environ, ROS_AUTOMATIC_DISCOVERY_RANGE='LOCALHOST')
    for name in ('FASTRTPS_DEFAULT_PROFILES_FILE', 'FASTDDS_DEFAULT_PROFILES_FILE'):
        env.pop(name, None)
        if with_profile:
            env[name] = str(PROFILE)
    env.setdefault('ROS_DOMAIN_ID', '72')
    env.setdefault('ROS_LOG_DIR', tempfile.gettempdir())
    return env


def measure(case: Case) -> Measured:
    """Run one case in processes of its own."""
    with started(case) as cameras:
        done = subprocess.run(
            command(case, 'receive'), env=environment(case.profile_on in ('both', 'receiver')),
            stdout=subprocess.PIPE, check=True, timeout=60 + case.seconds)
        for process in cameras:
            process.wait(timeout=10)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


COLUMNS = ('cameras', 'profile on', 'malloc', 'QoS', 'depth', 'take', 'lost', 'service p50',
           'p99', 'latency p50', 'p99', 'CPU')


def row(case: Case, seen: Measured) -> str:
    """Return one line of the table."""
    sent = case.frames * case.cameras
    cells = (f'{case.cameras} x {case.width}x{case.height}', case.profile_on, case.malloc,
             'reliable' if case.reliable else 'best effort', str(case.depth), case.take,
             f'{sent - seen.received} of {sent}',
             f'{seen.service_p50:.2f}', f'{seen.service_p99:.2f}',
             f'{seen.latency_p50:.1f}', f'{seen.latency_p99:.1f}', f'{seen.cpu_percent:.0f} %')
    return '| ' + ' | '.join(cells) + ' |'


def table(base: Case) -> Iterator[Case]:
    """Yield the cases of the table: what each of profile, malloc and raw changes."""
    for cameras, width, height in ((1, 640, 480), (4, 640, 480), (1, 1920, 1080)):
        for profile_on, malloc, take in (
                ('none', 'default', 'message'), ('both', 'default', 'message'),
                ('both', 'kept', 'message'), ('both', 'kept', 'raw'), ('both', 'kept', 'node')):
            yield replace(base, cameras=cameras, width=width, height=height,
                          profile_on=profile_on, malloc=malloc, take=take)


def machine() -> str:
    """Return what this ran on."""
    models = [line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().split('\n')
              if line.startswith('model name')]
    return (f'{os.cpu_count()} cores of {(models or [platform.processor()])[0]}, '
            f'{platform.system()} {platform.release()}, Python {platform.python_version()}; '
            f'load before: {os.getloadavg()[0]:.1f}; times in ms')


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--seconds', type=float, default=Case.seconds, help='of each row')
    parser.add_argument('--depth', type=int, default=Case.depth, help='of the QoS, both ends')
    parser.add_argument('--reliable', action='store_true', help='instead of best effort')
    one = parser.add_argument_group('one row instead of the table')
    one.add_argument('--cameras', type=int, help='how many; asks for one row')
    one.add_argument('--size', default='640x480', help='WIDTHxHEIGHT')
    one.add_argument('--take', choices=('message', 'raw', 'node'), default=Case.take,
                     help='how to subscribe')
    one.add_argument('--profile-on', choices=('none', 'both', 'publisher', 'receiver'),
                     default=Case.profile_on, help='who uses config/fastdds.xml')
    one.add_argument('--malloc', choices=('default', 'kept'), default=Case.malloc,
                     help='whether the receiver keeps freed memory (svlm_ros.node.memory)')
    one.add_argument('--stall', type=float, default=Case.stall_sec, metavar='SEC',
                     help='hold up the executor this long once per second')
    parser.add_argument('--role', help=argparse.SUPPRESS)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    return parser


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """Yield what the command line asks for."""
    base = Case(seconds=given.seconds, depth=given.depth, reliable=given.reliable)
    if given.cameras is None:
        yield from table(base)
        return
    width, height = (int(number) for number in given.size.split('x'))
    yield replace(base, cameras=given.cameras, width=width, height=height, take=given.take,
                  profile_on=given.profile_on, malloc=given.malloc, stall_sec=given.stall)


def main() -> None:
    """Print the table, or be one process of it."""
    given = arguments().parse_args()
    if given.role == 'receive':
        case = Case(**json.loads(given.case))
        seen = receive_with_node(case) if case.take == 'node' else receive(case)
        print(json.dumps(asdict(seen)))
    elif given.role:
        publish(Case(**json.loads(given.case)), int(given.role.partition(':')[2]))
    else:
        print(f'{machine()}\n| {" | ".join(COLUMNS)} |\n|{" --- |" * len(COLUMNS)}')
        for case in cases(given):
            print(row(case, measure(case)), flush=True)


if __name__ == '__main__':
    main()
