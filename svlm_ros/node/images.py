"""Turns ROS image messages into RGB arrays, or says why it cannot. Not for: topics or resizing.

Works on anything shaped like sensor_msgs/Image and CompressedImage (rclpy's messages, those that
rosbags deserialises), so it imports no ROS. Rules beyond sensor_msgs/image_encodings.hpp:

- 16-bit brightness (mono16, rgb16, bayer_*16, ...) is scaled by 255/65535, as cv_bridge does.
- 16UC1 is depth in millimetres (REP-118): 0 to 10 m become black to white and farther is white,
  the range rqt_image_view shows. The scale is fixed, so a distance keeps its grey over time.
- 8UC1, 8UC3 and 8UC4 name no colours: they are read as mono8, bgr8 and bgra8, OpenCV's order.
- Alpha is dropped. EXIF orientation is not applied: CameraInfo describes the pixels as stored.
- YUV is BT.601 limited range. The height of nv12 and nv21 is the picture's, without the chroma
  rows that follow it.
"""
from dataclasses import dataclass
import functools
import logging
from typing import Any, Protocol

import cv2
import numpy as np

log = logging.getLogger(__name__)

# 8192 x 8192, 200 MB as RGB: above any camera, below what a broken header may ask for.
MAX_PIXELS = 1 << 26
DEPTH_RANGE_MM = 10_000


class ImageError(ValueError):
    """An image message cannot be shown to a model; says what was given and what to do."""


class RawImage(Protocol):
    """The fields of sensor_msgs/Image that are read; `data` is a buffer of bytes."""

    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any


class CompressedImage(Protocol):
    """The fields of sensor_msgs/CompressedImage that are read; `data` is a buffer of bytes."""

    format: str
    data: Any


@dataclass(frozen=True)
class _Layout:
    """How an encoding lies in memory and becomes RGB.

    :param channels: samples per pixel (in nv12 and nv21, per pixel of the brightness plane).
    :param code: OpenCV's conversion to RGB; None where it is RGB already.
    :param bits: 8 or 16 per sample.
    :param white: sample value that becomes 255.
    :param least: smallest width and height; `multiple`: what they must be multiples of, as
        (width, height).
    :param chroma: a plane of half the height follows, with the same step.
    :param in_cv_bridge: cv_bridge has the same conversion.
    """

    channels: int
    code: int | None
    bits: int = 8
    white: int = 255
    least: int = 1
    multiple: tuple[int, int] = (1, 1)
    chroma: bool = False
    in_cv_bridge: bool = False

    @property
    def pixel_bytes(self) -> int:
        return self.channels * self.bits // 8


def _layouts() -> dict[str, _Layout]:
    layouts = {
        '8UC1': _Layout(1, cv2.COLOR_GRAY2RGB),
        '8UC3': _Layout(3, cv2.COLOR_BGR2RGB),
        '8UC4': _Layout(4, cv2.COLOR_BGRA2RGB),
        '16UC1': _Layout(1, cv2.COLOR_GRAY2RGB, bits=16, white=DEPTH_RANGE_MM),
        'nv12': _Layout(1, cv2.COLOR_YUV2RGB_NV12, multiple=(2, 2), chroma=True),
        'nv21': _Layout(1, cv2.COLOR_YUV2RGB_NV21, multiple=(2, 2), chroma=True),
    }
    for bits, white in ((8, 255), (16, 65535)):
        for name, channels, code in (
                ('mono', 1, cv2.COLOR_GRAY2RGB), ('rgb', 3, None), ('bgr', 3, cv2.COLOR_BGR2RGB),
                ('rgba', 4, cv2.COLOR_RGBA2RGB), ('bgra', 4, cv2.COLOR_BGRA2RGB)):
            layouts[f'{name}{bits}'] = _Layout(
                channels, code, bits, white, in_cv_bridge=bits == 16 or code is not None)
        # OpenCV names a Bayer pattern by its second row, ROS by its first.
        for name, code in (('rggb', cv2.COLOR_BayerBG2RGB), ('bggr', cv2.COLOR_BayerRG2RGB),
                           ('gbrg', cv2.COLOR_BayerGR2RGB), ('grbg', cv2.COLOR_BayerGB2RGB)):
            layouts[f'bayer_{name}{bits}'] = _Layout(
                1, code, bits, white, least=3, in_cv_bridge=True)
    for names, code in ((('yuv422', 'uyvy'), cv2.COLOR_YUV2RGB_UYVY),
                        (('yuv422_yuy2', 'yuyv'), cv2.COLOR_YUV2RGB_YUY2)):
        for name in names:
            # cv_bridge knows only the older name of each.
            layouts[name] = _Layout(2, code, multiple=(2, 1), in_cv_bridge=name == names[0])
    return layouts


_LAYOUTS = _layouts()
ENCODINGS = tuple(sorted(_LAYOUTS))


def decode_image(msg: RawImage) -> np.ndarray:
    """Return the picture of a sensor_msgs/Image.

    Where the message is rgb8 without padding the array shares the memory of `msg.data`, which it
    keeps alive; everything else is a new array.

    :return: uint8 [height, width, 3], RGB, C-contiguous, writable.
    :raises ImageError: unknown encoding, a size that is zero, absurd or impossible in this
        encoding, `step` or `data` too small.
    """
    layout = _layout_of(msg)
    _check_sizes(msg, layout)
    rgb = _by_cv_bridge(msg) if _right_in_cv_bridge(msg, layout) else None
    return np.require(_by_opencv(msg, layout) if rgb is None else rgb, requirements=['C', 'W'])


def decode_compressed(msg: CompressedImage) -> np.ndarray:
    """Return the picture of a sensor_msgs/CompressedImage: JPEG or PNG, whatever `format` says.

    :return: uint8 [height, width, 3], RGB, C-contiguous, writable.
    :raises ImageError: empty, neither JPEG nor PNG, cut off, broken, of absurd size, 16 bits per
        sample, or a depth image.
    """
    data = bytes(msg.data)
    if 'compressedDepth' in msg.format:
        raise ImageError(f'format {msg.format!r} holds depth, not a picture; subscribe to the '
                         'colour image of this camera')
    if not data:
        raise ImageError(f'no data (format {msg.format!r}); check the camera driver')
    if data.startswith(b'\xff\xd8'):
        width, height = _jpeg_size(data)
    elif data.startswith(b'\x89PNG\r\n\x1a\n'):
        width, height = _png_size(data)
    else:
        raise ImageError(f'neither JPEG nor PNG (format {msg.format!r}, {len(data)} bytes, the '
                         f'first are {data[:4].hex(" ")}); set the publisher to jpeg or png')
    _check_area(width, height)
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8),
                           cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        raise ImageError(f'the decoder refused it: {error}') from error
    if bgr is None:
        raise ImageError(f'cannot be decoded ({len(data)} bytes, format {msg.format!r}): it is '
                         'broken or cut off; check the camera and the network')
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def _layout_of(msg: RawImage) -> _Layout:
    layout = _LAYOUTS.get(msg.encoding)
    if layout is not None:
        return layout
    if msg.encoding.startswith(('32F', '64F', '8S', '16S', '32S')):
        raise ImageError(f'encoding {msg.encoding!r} holds measurements (depth, labels), not '
                         'brightness; subscribe to a colour image, or convert it in the driver')
    raise ImageError(f'encoding {msg.encoding!r} is not known; expected one of '
                     f'{", ".join(ENCODINGS)}')


def _check_sizes(msg: RawImage, layout: _Layout) -> None:
    _check_area(msg.width, msg.height)
    across, down = layout.multiple
    if msg.width % across or msg.height % down or min(msg.width, msg.height) < layout.least:
        raise ImageError(
            f'{msg.width}x{msg.height} cannot be {msg.encoding}: the width must be a multiple of '
            f'{across}, the height of {down}, both at least {layout.least}; check the encoding')
    row_bytes = msg.width * layout.pixel_bytes
    if msg.step < row_bytes:
        raise ImageError(f'step is {msg.step}; {msg.width} pixels of {msg.encoding} take '
                         f'{row_bytes} bytes a row; check the driver and the encoding')
    needed = _rows(msg, layout) * msg.step
    given = memoryview(msg.data).nbytes
    if given < needed:
        raise ImageError(f'data has {given} bytes; {msg.width}x{msg.height} {msg.encoding} with '
                         f'step {msg.step} takes {needed}; check the driver and the encoding')


def _check_area(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f'size is {width}x{height}; expected at least 1x1; check the driver')
    if width * height > MAX_PIXELS:
        raise ImageError(f'size is {width}x{height}; at most {MAX_PIXELS} pixels are accepted; '
                         'the message is broken, or the camera must be set to a smaller size')


def _rows(msg: RawImage, layout: _Layout) -> int:
    return msg.height * 3 // 2 if layout.chroma else msg.height


def _by_opencv(msg: RawImage, layout: _Layout) -> np.ndarray:
    """Return the RGB picture; a view of `msg.data` where nothing has to be converted."""
    samples = _samples(msg, layout)
    rgb = samples if layout.code is None else cv2.cvtColor(samples, layout.code)
    if layout.bits == 8:
        return rgb
    return cv2.convertScaleAbs(rgb, alpha=255 / layout.white)


def _samples(msg: RawImage, layout: _Layout) -> np.ndarray:
    """Return the samples in native byte order, [rows, width] or [rows, width, channels]."""
    order = '>' if msg.is_bigendian else '<'
    dtype = np.dtype(f'{order}u{layout.bits // 8}')
    shape: tuple[int, ...] = (_rows(msg, layout), msg.width)
    strides: tuple[int, ...] = (msg.step, layout.pixel_bytes)
    if layout.channels > 1:
        shape, strides = (*shape, layout.channels), (*strides, dtype.itemsize)
    samples = np.ndarray(shape, dtype, np.frombuffer(msg.data, np.uint8), strides=strides)
    # A step that is odd puts 16-bit samples where OpenCV cannot read them.
    if dtype.isnative and samples.flags.aligned:
        return samples
    return samples.astype(dtype.newbyteorder('='), order='C')


def _by_cv_bridge(msg: RawImage) -> np.ndarray | None:
    """Return the RGB picture; None where cv_bridge is not at hand or refuses the message."""
    bridge = _cv_bridge()
    if bridge is None:
        return None
    try:
        return bridge.imgmsg_to_cv2(msg, 'rgb8')
    except Exception as error:  # noqa: BLE001  versions differ in what they know and raise
        log.debug('cv_bridge refused %r: %s', msg.encoding, error)
        return None


def _right_in_cv_bridge(msg: RawImage, layout: _Layout) -> bool:
    """Whether cv_bridge converts this message without fault.

    It takes rows for whole numbers of pixels, so that other paddings shear the picture.
    """
    return layout.in_cv_bridge and msg.step % layout.pixel_bytes == 0


@functools.cache
def _cv_bridge() -> Any | None:
    """Return the CvBridge of a ROS installation, None where there is none that is safe.

    Its extension module is bound to the NumPy it was built with. The distributions' are built
    with NumPy 1; under NumPy 2 they can be imported, and then kill the process at the first call.
    The package of that name on PyPI is a port from ROS 1 without the extension module, and wrong.
    """
    if int(np.__version__.split('.')[0]) >= 2:
        return None
    try:
        from cv_bridge import CvBridge
        from cv_bridge.boost import cv_bridge_boost
    except ImportError as error:
        log.debug('no cv_bridge: %s', error)
        return None
    except Exception as error:  # noqa: BLE001  whatever an alien cv_bridge does, images must go on
        log.warning('cv_bridge is installed but cannot be imported (%s); using OpenCV', error)
        return None
    if cv_bridge_boost.__file__.endswith('.py'):
        log.debug('cv_bridge at %s is the port on PyPI; using OpenCV', cv_bridge_boost.__file__)
        return None
    return CvBridge()


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a JPEG (ITU-T T.81, annex B) that is not cut off.

    OpenCV 4 decodes one that is cut off into a picture that is grey from there on.
    """
    size = None
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ImageError(f'not a valid JPEG: no marker at byte {at}')
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        if marker == 0xDA:  # start of scan: from here on FF D9 is the end of the image
            if size is None:
                raise ImageError('not a valid JPEG: its size is missing')
            if data.find(b'\xff\xd9', at) < 0:
                break
            return size
        # Start of frame, of any process; DHT, JPG and DAC share its range.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 9 <= len(data):
            size = (int.from_bytes(data[at + 7:at + 9], 'big'),
                    int.from_bytes(data[at + 5:at + 7], 'big'))
        at += 2 + int.from_bytes(data[at + 2:at + 4], 'big')
    raise ImageError(f'the JPEG is cut off ({len(data)} bytes, no end marker); check the network '
                     'and the QoS of the publisher')


def _png_size(data: bytes) -> tuple[int, int]:
    """Return width and height of an 8-bit PNG (ISO/IEC 15948, 11.2) that is not cut off."""
    if b'IEND\xaeB`\x82' not in data:  # the end chunk is always the same
        raise ImageError(f'the PNG is cut off ({len(data)} bytes, no end chunk); check the '
                         'network and the QoS of the publisher')
    if data[12:16] != b'IHDR' or len(data) < 33:
        raise ImageError('not a valid PNG: it does not begin with its header')
    if data[24] > 8:
        raise ImageError(f'the PNG has {data[24]} bits per sample, expected at most 8: it is a '
                         'depth or raw image; subscribe to the colour image of this camera')
    return int.from_bytes(data[16:20], 'big'), int.from_bytes(data[20:24], 'big')
