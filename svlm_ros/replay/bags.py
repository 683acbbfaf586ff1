"""Reads camera images from rosbag2 recordings and writes this package's messages into one.

Not for: ROS (no rclpy here; rosbags reads and writes sqlite3 and MCAP) or decoding pixels.
"""
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rosbags.interfaces import Connection, Nodetype
from rosbags.rosbag2 import Reader, StoragePlugin, Writer, WriterError
from rosbags.serde import SerdeError
from rosbags.typesys import get_types_from_msg, get_typestore, Stores
from rosbags.typesys.store import Typestore

from svlm_ros.messages import Fields, stamp_nanoseconds
from svlm_ros.share import share_file

RAW_TYPE = 'sensor_msgs/msg/Image'
COMPRESSED_TYPE = 'sensor_msgs/msg/CompressedImage'
COMPRESSED_SUFFIX = '/compressed'
# Depth, delivered as a CompressedImage that no JPEG or PNG decoder can read.
DEPTH_SUFFIX = '/compressedDepth'

OUTPUT_TYPES = {
    '/svlm/description': 'svlm_ros/msg/Description',
    '/svlm/answer': 'svlm_ros/msg/Answer',
    '/svlm/model_info': 'svlm_ros/msg/ModelInfo',
}


class BagError(Exception):
    """A bag cannot be read or written; the message says which, why and what to do."""


@dataclass(frozen=True)
class Camera:
    """One image topic of a bag, shown to the model as the stream `name`."""

    name: str
    topic: str
    message_type: str


@dataclass(frozen=True)
class BagImage:
    """An image message as recorded.

    :param log_ns: when it was recorded: bag time.
    :param stamp_ns: its header's stamp, or `log_ns` where that is zero.
    :param message: sensor_msgs Image or CompressedImage; its `data` is a uint8 array.
    """

    camera: Camera
    log_ns: int
    stamp_ns: int
    frame_id: str
    message: Any


@dataclass(frozen=True)
class BadImage:
    """An image that could not be read or decoded, and why."""

    camera: Camera
    log_ns: int
    reason: str


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn everything that a missing or damaged bag makes the storages raise into BagError."""
    try:
        yield
    except FileNotFoundError as error:
        what = 'folder has no metadata.yaml' if path.is_dir() else 'file or folder does not exist'
        raise BagError(f'cannot read the bag {path}: the {what}; give a rosbag2 folder, '
                       'or an .mcap or .db3 file') from error
    except Exception as error:  # SQLite, zstd, struct, YAML ...: each library raises its own
        reason = ' '.join(str(error).split()).rstrip('.') or type(error).__name__
        # MCAP's index is written last: without it this was a recorder that lost power.
        hint = '; if its recording was cut off, `mcap recover` repairs it' \
            if 'end magic' in reason else ''
        raise BagError(f'cannot read the bag {path}: {reason}{hint}') from error


@contextmanager
def open_bag(path: Path) -> Iterator[Reader]:
    """Open a rosbag2 folder, `.mcap` or `.db3` file.

    :raises BagError: it is missing or unreadable.
    """
    with _explained(path):
        reader = Reader(path)
        reader.open()
    with closing(reader):
        yield reader


def read_messages(reader: Reader,
                  connections: Sequence[Connection]) -> Iterator[tuple[Connection, int, bytes]]:
    """Yield (connection, bag time in ns, CDR bytes) in the order in which they were recorded.

    :raises BagError: the bag is damaged, which may show only here.
    """
    if not connections:
        return  # rosbags would read all of them
    with _explained(Path(str(reader.path))):
        messages = iter(reader.messages(connections))
    while True:
        with _explained(Path(str(reader.path))):
            message = next(messages, None)
        if message is None:
            return
        yield message


def image_connections(reader: Reader) -> list[Connection]:
    """Return the connections that carry camera images, by topic."""
    return sorted((connection for connection in reader.connections
                   if connection.msgtype in (RAW_TYPE, COMPRESSED_TYPE)
                   and not connection.topic.endswith(DEPTH_SUFFIX)),
                  key=lambda connection: connection.topic)


def base_topic(topic: str) -> str:
    """Return a topic less its image_transport: `/cam/image/compressed` -> `/cam/image`."""
    return topic.removesuffix(COMPRESSED_SUFFIX)


def default_name(topic: str) -> str:
    """Return a camera's name for a topic: `/head/image_raw/compressed` -> `head`."""
    parts = base_topic(topic).strip('/').split('/')
    if len(parts) > 1 and parts[-1].startswith('image'):
        parts.pop()
    return '_'.join(parts)


def find_cameras(reader: Reader, wanted: Sequence[tuple[str | None, str]] = ()) -> list[Camera]:
    """Return the cameras to replay.

    :param wanted: (name or None, topic) pairs; none takes every image topic, of a camera that was
        recorded both raw and compressed only the raw one.
    :raises BagError: there is no image topic, one wanted is not in the bag or holds no images, or
        two cameras have one name.
    """
    types = {connection.topic: connection.msgtype for connection in image_connections(reader)}
    if not types:
        there = ', '.join(sorted({f'{connection.topic} ({connection.msgtype})'
                                  for connection in reader.connections})) or 'nothing'
        raise BagError(f'no image topic in the bag {reader.path}; it holds {there}')
    for _, topic in wanted:
        if topic not in types:
            raise BagError(f'no image topic {topic} in the bag {reader.path}; '
                           f'it has {", ".join(types)}')
    if not wanted:
        wanted = [(None, topic) for topic in types
                  if base_topic(topic) == topic or base_topic(topic) not in types]
    cameras = [Camera(name or default_name(topic), topic, types[topic]) for name, topic in wanted]
    for names, what in (([camera.name for camera in cameras], 'name'),
                        ([camera.topic for camera in cameras], 'topic')):
        twice = sorted({value for value in names if names.count(value) > 1})
        if twice:
            raise BagError(f'the {what} {twice[0]!r} is given to two cameras; '
                           'name them apart with --topic NAME=/topic')
    return cameras


def count_messages(reader: Reader, cameras: Sequence[Camera]) -> int:
    """Return how many messages the cameras' topics hold."""
    topics = {camera.topic for camera in cameras}
    return sum(connection.msgcount for connection in reader.connections
               if connection.topic in topics)


def read_images(reader: Reader, cameras: Sequence[Camera]) -> Iterator[BagImage | BadImage]:
    """Yield the cameras' images in the order in which they were recorded."""
    by_topic = {camera.topic: camera for camera in cameras}
    connections = [connection for connection in image_connections(reader)
                   if connection.topic in by_topic]
    typestore = get_typestore(Stores.ROS2_JAZZY)
    for connection, log_ns, data in read_messages(reader, connections):
        camera = by_topic[connection.topic]
        try:
            message: Any = typestore.deserialize_cdr(data, connection.msgtype)
        # A cut message also runs out of bytes in the middle of a number.
        except (SerdeError, ValueError, IndexError, AssertionError, OSError) as error:
            yield BadImage(camera, log_ns, f'not a {connection.msgtype}: {error}')
            continue
        yield BagImage(camera, log_ns, stamp_nanoseconds(message.header.stamp) or log_ns,
                       message.header.frame_id, message)


def message_types() -> Typestore:
    """Return a type store that knows ROS 2's common messages and this package's."""
    typestore = get_typestore(Stores.ROS2_JAZZY)
    for message_type in OUTPUT_TYPES.values():
        _, folder, name = message_type.split('/')
        text = share_file(f'{folder}/{name}.msg').read_text(encoding='utf-8')
        typestore.register(get_types_from_msg(text, message_type))
    return typestore


def build_message(typestore: Typestore, message_type: str, fields: Mapping[str, Any]) -> object:
    """Return a message of the store's class; nested messages come as nested mappings."""
    values: dict[str, Any] = {}
    for name, (kind, detail) in typestore.fielddefs[message_type][1]:
        nested = kind == Nodetype.NAME
        values[name] = build_message(typestore, str(detail), fields[name]) if nested \
            else fields[name]
    return typestore.types[message_type](**values)


class OutputBag:
    """A new rosbag2 (MCAP) of this package's messages; a context manager.

    The same messages give the same bytes.

    :raises BagError: the folder exists or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._typestore = message_types()
        try:
            self._writer = Writer(path, version=9, storage_plugin=StoragePlugin.MCAP)
        except WriterError as error:
            raise BagError(f'cannot write the bag {path}: it exists already; '
                           'name another folder or remove it') from error

    def __enter__(self) -> 'OutputBag':
        try:
            self._writer.open()
        except (OSError, WriterError) as error:
            raise BagError(f'cannot write the bag {self._path}: {error}') from error
        self._connections = {
            topic: self._writer.add_connection(topic, message_type, typestore=self._typestore)
            for topic, message_type in OUTPUT_TYPES.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._writer.__exit__(kind, error, trace)

    def write(self, topic: str, log_ns: int, fields: Fields) -> None:
        """Append one message, said at bag time `log_ns`, to one of OUTPUT_TYPES' topics."""
        message_type = OUTPUT_TYPES[topic]
        message = build_message(self._typestore, message_type, fields)
        self._writer.write(self._connections[topic], log_ns,
                           self._typestore.serialize_cdr(message, message_type))
