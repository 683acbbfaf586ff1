"""svlm-play: publish a recorded bag on its topics, where `ros2 bag play` is not installed.

Messages go out as recorded, byte for byte, unless --restamp or --raw ask for more.
Not for: showing a bag to the model without ROS (see main.py).
"""
import argparse
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
import importlib
from pathlib import Path
import signal
import struct
import sys
import time
from typing import Any

from rosbags.interfaces import Connection, QosDurability
from rosbags.rosbag2 import Reader

from svlm_ros.messages import NANOSECONDS
from svlm_ros.node.images import decode_compressed, ImageError
from svlm_ros.replay.bags import (
    BagError,
    base_topic,
    COMPRESSED_TYPE,
    open_bag,
    RAW_TYPE,
    read_messages,
)

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# Deep enough that a burst after a hiccup is not lost before a reliable reader has it.
QUEUE_DEPTH = 10


class PlayError(Exception):
    """The bag cannot be played as asked; the message says why."""


@dataclass
class Lateness:
    """How far behind its schedule the player published, in seconds."""

    messages: int = 0
    total: float = 0.0
    worst: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one message."""
        self.messages += 1
        self.total += seconds
        self.worst = max(self.worst, seconds)

    def __str__(self) -> str:
        mean = self.total / self.messages if self.messages else 0.0
        return (f'{self.messages} messages, late by {mean * 1e3:.1f} ms on average, '
                f'{self.worst * 1e3:.1f} ms at worst')


@dataclass
class Outlet:
    """Where the messages of one recorded topic go."""

    topic: str
    publisher: Any
    transform: Callable[[bytes], Any]
    skipped: list[str] = field(default_factory=list)

    def publish(self, data: bytes) -> None:
        """Publish one recorded message; one that cannot be decoded is skipped and remembered."""
        try:
            self.publisher.publish(self.transform(data))
        except ImageError as error:
            self.skipped.append(str(error))


def wait_until(deadline: float) -> None:
    """Sleep until a time of the monotonic clock.

    The signals are blocked for the whole program (see main) and taken here, so that none arrives
    in the middle of a publication.

    :raises KeyboardInterrupt: SIGINT or SIGTERM arrived.
    """
    timeout = max(0.0, deadline - time.monotonic())
    if signal.sigtimedwait(STOP_SIGNALS, timeout) is not None:
        raise KeyboardInterrupt


def begins_with_header(message_class: Any) -> bool:
    """Whether a message's first field is its std_msgs/Header."""
    fields = message_class.get_fields_and_field_types()
    return next(iter(fields.values()), None) == 'std_msgs/Header'


def restamp(data: bytes, stamp_ns: int) -> bytes:
    """Return a CDR message whose first field is a header with another stamp in it.

    CDR is 4 bytes of encapsulation, the second of which tells the byte order, then the fields in
    order: sec (int32) and nanosec (uint32) come first (OMG DDSI-RTPS 10, XCDR1).
    """
    order = '<' if data[1] & 1 else '>'
    return data[:4] + struct.pack(f'{order}iI', *divmod(stamp_ns, NANOSECONDS)) + data[12:]


def raw_image(compressed: Any, image_class: Any) -> Any:
    """Return a CompressedImage as an rgb8 Image with the same header.

    :raises ImageError: it cannot be decoded.
    """
    pixels = decode_compressed(compressed)  # [height, width, 3]
    height, width, _ = pixels.shape
    return image_class(header=compressed.header, height=height, width=width, encoding='rgb8',
                       is_bigendian=0, step=3 * width,
                       # An array.array is taken as it is; a list would be checked byte by byte.
                       data=array('B', pixels.tobytes()))


def message_class_of(message_type: str) -> Any:
    """Return the class of `package/msg/Name`, None where the package is not installed."""
    package, folder, name = message_type.split('/')
    try:
        return getattr(importlib.import_module(f'{package}.{folder}'), name)
    except (ImportError, AttributeError):
        return None


def select(reader: Reader, topics: Sequence[str], remaps: Mapping[str, str]) -> list[Connection]:
    """Return the connections of the named topics, or all.

    :raises PlayError: one of them, or one to remap, is not in the bag.
    """
    there = {connection.topic for connection in reader.connections}
    for topic in [*topics, *remaps]:
        if topic not in there:
            raise PlayError(f'no topic {topic} in the bag {reader.path}; '
                            f'it has {", ".join(sorted(there)) or "nothing"}')
    return [connection for connection in reader.connections
            if not topics or connection.topic in topics]


class Player:
    """Publishes the messages of an open bag.

    :param node: an rclpy node; it need not spin.
    :param options: as of `make_parser`, with `remap` as a dictionary.
    """

    def __init__(self, node: Any, reader: Reader, options: argparse.Namespace) -> None:
        self._node = node
        self._reader = reader
        self._rate: float = options.rate
        self._first_ns = reader.start_time + round(options.start_offset * NANOSECONDS)
        last_ns = reader.end_time - 1
        if options.duration is not None:
            last_ns = min(last_ns, self._first_ns + round(options.duration * NANOSECONDS))
        self._last_ns = last_ns
        self.lateness = Lateness()
        self.outlets: dict[str, Outlet] = {}
        self.unknown: list[str] = []
        self._connections = self._open_outlets(
            select(reader, options.topic, options.remap), options)
        self._clock = self._open_clock() if options.clock is not None else None
        self._clock_period = 1.0 / options.clock if options.clock is not None else 0.0

    def _open_outlets(self, connections: Sequence[Connection],
                      options: argparse.Namespace) -> list[Connection]:
        """Create the publishers; return the connections whose types are installed."""
        opened = []
        for connection in connections:
            message_class = message_class_of(connection.msgtype)
            if message_class is None:
                self.unknown.append(f'{connection.topic} ({connection.msgtype})')
                continue
            opened.append(connection)
            if connection.topic not in self.outlets:
                self.outlets[connection.topic] = self._outlet(connection, message_class, options)
        return opened

    def _outlet(self, connection: Connection, message_class: Any,
                options: argparse.Namespace) -> Outlet:
        from rclpy.serialization import deserialize_message
        topic, published_class = connection.topic, message_class
        transform: Callable[[bytes], Any] = bytes
        now: Callable[[], int] = time.time_ns
        if options.restamp and begins_with_header(message_class):
            def transform(data: bytes) -> Any:
                return restamp(data, now())
        if options.raw and connection.msgtype == COMPRESSED_TYPE:
            topic, published_class = base_topic(topic), message_class_of(RAW_TYPE)
            compressed = transform

            def transform(data: bytes) -> Any:
                return raw_image(deserialize_message(compressed(data), message_class),
                                 published_class)
        topic = options.remap.get(connection.topic, topic)
        publisher = self._node.create_publisher(
            published_class, topic, qos_of(connection, options.qos))
        return Outlet(topic, publisher, transform)

    def _open_clock(self) -> Any:
        from rosgraph_msgs.msg import Clock
        return self._node.create_publisher(Clock, '/clock', QUEUE_DEPTH)

    def wait_for_subscribers(self, count: int, timeout_sec: float) -> None:
        """Wait until every published topic has this many subscribers.

        :raises PlayError: some has not in time.
        """
        deadline = time.monotonic() + timeout_sec
        while missing := [outlet for outlet in self.outlets.values()
                          if outlet.publisher.get_subscription_count() < count]:
            if time.monotonic() > deadline:
                there = missing[0].publisher.get_subscription_count()
                raise PlayError(f'{missing[0].topic} has {there} subscribers after '
                                f'{timeout_sec:g} s; expected {count}: are they running, with the '
                                'same ROS_DOMAIN_ID and a compatible QoS?')
            wait_until(time.monotonic() + 0.05)

    def play(self) -> None:
        """Publish the bag once.

        :raises KeyboardInterrupt: SIGINT or SIGTERM arrived.
        """
        begin = time.monotonic()
        next_tick = begin
        for connection, log_ns, data in self._messages():
            due = begin + (log_ns - self._first_ns) / NANOSECONDS / self._rate
            while self._clock is not None and next_tick < due:
                wait_until(next_tick)
                self._tick(self._first_ns
                           + round((next_tick - begin) * self._rate * NANOSECONDS))
                next_tick += self._clock_period
            wait_until(due)
            if self._clock is not None:
                # The clock never lags behind what it dates.
                self._tick(log_ns)
            self.outlets[connection.topic].publish(data)
            self.lateness.add(time.monotonic() - due)

    def _messages(self) -> Iterator[tuple[Connection, int, bytes]]:
        for connection, log_ns, data in read_messages(self._reader, self._connections):
            if log_ns > self._last_ns:
                return
            if log_ns >= self._first_ns:
                yield connection, log_ns, data

    def _tick(self, time_ns: int) -> None:
        from builtin_interfaces.msg import Time
        from rosgraph_msgs.msg import Clock
        sec, nanosec = divmod(time_ns, NANOSECONDS)
        assert self._clock is not None
        self._clock.publish(Clock(clock=Time(sec=sec, nanosec=nanosec)))

    def drain(self, timeout_sec: float) -> None:
        """Wait until reliable readers have everything, so that leaving does not lose the end."""
        from rclpy.duration import Duration
        deadline = time.monotonic() + timeout_sec
        for outlet in self.outlets.values():
            left = max(0.0, deadline - time.monotonic())
            outlet.publisher.wait_for_all_acked(Duration(seconds=left))


def qos_of(connection: Connection, reliability: str) -> Any:
    """Return the QoS to publish with; a topic that was recorded latched stays latched."""
    from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
    profiles = getattr(connection.ext, 'offered_qos_profiles', [])
    latched = bool(profiles) and all(
        profile.durability == QosDurability.TRANSIENT_LOCAL for profile in profiles)
    return QoSProfile(
        depth=QUEUE_DEPTH,
        reliability=(ReliabilityPolicy.RELIABLE if reliability == 'reliable'
                     else ReliabilityPolicy.BEST_EFFORT),
        durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE)


def parse_remap(text: str) -> tuple[str, str]:
    """Return (recorded, published) of `/from:=/to`."""
    recorded, separator, published = text.partition(':=')
    if not (recorded and separator and published):
        raise argparse.ArgumentTypeError(f'is {text!r}; expected /from:=/to')
    return recorded, published


def split_ros_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return this program's arguments and, from `--ros-args` on, those of ROS."""
    if '--ros-args' not in arguments:
        return list(arguments), []
    index = list(arguments).index('--ros-args')
    return list(arguments[:index]), list(arguments[index:])


def positive(text: str) -> float:
    """Return a number above 0."""
    number = float(text)
    if not 0 < number < float('inf'):
        raise argparse.ArgumentTypeError(f'is {text}; expected a number above 0')
    return number


def not_negative(text: str) -> float:
    """Return a number of at least 0."""
    return 0.0 if float(text) == 0 else positive(text)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog='svlm-play', description='Publish a recorded bag on its topics. Large raw images '
        'need the Fast DDS profile of this package: set FASTRTPS_DEFAULT_PROFILES_FILE.',
        epilog='exit status: 0 played, or stopped by SIGINT or SIGTERM; 1 the subscribers did not '
        'come; 2 wrong arguments or files')
    parser.add_argument('bag', type=Path, help='rosbag2 folder, .mcap or .db3 file')
    parser.add_argument('--topic', action='append', default=[],
                        help='play only this topic; repeatable')
    parser.add_argument('--remap', type=parse_remap, action='append', default=[],
                        metavar='/FROM:=/TO', help='publish /FROM as /TO; repeatable')
    parser.add_argument('--rate', type=positive, default=1.0, help='speed; default 1')
    parser.add_argument('--loop', action='store_true',
                        help='start again at the end, with the same stamps, until stopped')
    parser.add_argument('--clock', type=positive, nargs='?', const=40.0, metavar='HZ',
                        help='publish bag time on /clock at HZ (default 40) and with each message')
    parser.add_argument('--start-offset', type=not_negative, default=0.0, metavar='SECONDS',
                        help='begin this far into the bag')
    parser.add_argument('--duration', type=positive, metavar='SECONDS',
                        help='play only this much of the bag')
    parser.add_argument('--wait-for-subscribers', type=int, metavar='N',
                        help='begin when every topic has N subscribers')
    parser.add_argument('--timeout', type=not_negative, default=30.0, metavar='SECONDS',
                        help='of --wait-for-subscribers; default 30')
    parser.add_argument('--raw', action='store_true',
                        help='decode compressed images and publish them as rgb8 on the topic '
                             'without /compressed')
    parser.add_argument('--restamp', action='store_true',
                        help='set the stamps of headers to the present')
    parser.add_argument('--qos', choices=('reliable', 'best_effort'), default='reliable',
                        help='reliability of the publishers; reliable suits every subscriber')
    return parser


def play(options: argparse.Namespace, ros_arguments: Sequence[str]) -> int:
    """Play a bag as the options say; return the exit status.

    :param ros_arguments: what follows `--ros-args`; a launch file may append it.
    :raises BagError, PlayError: nothing, or not all, was played.
    """
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    with open_bag(options.bag) as reader:
        rclpy.init(args=list(ros_arguments), signal_handler_options=SignalHandlerOptions.NO)
        try:
            player = Player(rclpy.create_node('svlm_play'), reader, options)
            for unknown in player.unknown:
                print(f'svlm-play: skipping {unknown}: its package is not installed',
                      file=sys.stderr)
            if not player.outlets:
                raise PlayError(f'nothing to play in the bag {options.bag}')
            try:
                if options.wait_for_subscribers:
                    player.wait_for_subscribers(options.wait_for_subscribers, options.timeout)
                player.play()
                while options.loop:
                    player.play()
                player.drain(timeout_sec=2.0)
            except KeyboardInterrupt:
                print('svlm-play: stopped', file=sys.stderr)
            report(player)
        finally:
            rclpy.try_shutdown()
    return EXIT_OK


def report(player: Player) -> None:
    """Print how it went."""
    for outlet in player.outlets.values():
        if outlet.skipped:
            print(f'svlm-play: skipped {len(outlet.skipped)} bad images of {outlet.topic}; '
                  f'the first: {outlet.skipped[0]}', file=sys.stderr)
    print(f'svlm-play: {player.lateness}', file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    own, ros_arguments = split_ros_arguments(sys.argv[1:] if arguments is None else arguments)
    options = make_parser().parse_args(own)
    options.remap = dict(options.remap)
    # Blocked before rclpy starts its threads, which inherit this: wait_until takes the signals.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return play(options, ros_arguments)
    except PlayError as error:
        print(f'svlm-play: {error}', file=sys.stderr)
        return EXIT_FAILED
    except BagError as error:
        print(f'svlm-play: {error}', file=sys.stderr)
        return EXIT_USAGE


if __name__ == '__main__':
    sys.exit(main())
