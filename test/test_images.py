"""Every encoding and every broken image: what svlm_ros.node.images returns or refuses.

Not for: subscriptions and counting of bad images (test_node_stream.py).
"""
import array
import contextlib
from dataclasses import dataclass, replace
import itertools
from pathlib import Path
import sys
from types import ModuleType
from typing import Any

import cv2
from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from svlm_ros.node import images
from svlm_ros.node.images import decode_compressed, decode_image, ImageError

DATA = Path(__file__).resolve().parent / 'data'


@dataclass
class Image:
    """The fields of sensor_msgs/Image that count here."""

    height: int
    width: int
    encoding: str
    is_bigendian: int
    step: int
    data: Any


@dataclass
class Compressed:
    """The fields of sensor_msgs/CompressedImage that count here."""

    format: str
    data: Any


# Encoders, written from the definitions and not with OpenCV: RGB to samples [rows, width, ...].

def brightness(rgb: np.ndarray) -> np.ndarray:
    return rgb[..., 1]


def luma_chroma(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ITU-R BT.601, limited range."""
    red, green, blue = (rgb[..., k] / 255.0 for k in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return (np.rint(16 + 219 * luma).astype(np.uint8),
            np.rint(128 + 112 * (blue - luma) / 0.886).astype(np.uint8),
            np.rint(128 + 112 * (red - luma) / 0.701).astype(np.uint8))


def packed_422(rgb: np.ndarray, luma_first: bool) -> np.ndarray:
    """U and V of a pixel pair are taken from its left pixel."""
    luma, u, v = luma_chroma(rgb)
    chroma = np.where(np.arange(rgb.shape[1]) % 2 == 0, u, np.roll(v, 1, axis=1))
    return np.stack((luma, chroma) if luma_first else (chroma, luma), axis=-1)


def planar_420(rgb: np.ndarray, u_first: bool) -> np.ndarray:
    """U and V of a block of four are taken from its top left pixel."""
    luma, u, v = luma_chroma(rgb)
    pair = np.stack((u, v) if u_first else (v, u), axis=-1)[::2, ::2]
    return np.concatenate((luma, pair.reshape(-1, rgb.shape[1])))


def mosaic(rgb: np.ndarray, pattern: str) -> np.ndarray:
    """`pattern` names the first two pixels of the first row, then of the second."""
    samples = np.empty(rgb.shape[:2], np.uint8)
    for k, colour in enumerate(pattern):
        samples[k // 2::2, k % 2::2] = rgb[k // 2::2, k % 2::2, 'rgb'.index(colour)]
    return samples


def with_alpha(rgb: np.ndarray) -> np.ndarray:
    return np.concatenate((rgb, np.full_like(rgb[..., :1], 77)), axis=-1)


EIGHT_BIT = {
    'rgb8': lambda rgb: rgb,
    'bgr8': lambda rgb: rgb[..., ::-1],
    'rgba8': with_alpha,
    'bgra8': lambda rgb: with_alpha(rgb)[..., [2, 1, 0, 3]],
    'mono8': brightness,
    '8UC1': brightness,
    '8UC3': lambda rgb: rgb[..., ::-1],
    '8UC4': lambda rgb: with_alpha(rgb)[..., [2, 1, 0, 3]],
    'uyvy': lambda rgb: packed_422(rgb, luma_first=False),
    'yuv422': lambda rgb: packed_422(rgb, luma_first=False),
    'yuyv': lambda rgb: packed_422(rgb, luma_first=True),
    'yuv422_yuy2': lambda rgb: packed_422(rgb, luma_first=True),
    'nv12': lambda rgb: planar_420(rgb, u_first=True),
    'nv21': lambda rgb: planar_420(rgb, u_first=False),
    'bayer_rggb8': lambda rgb: mosaic(rgb, 'rggb'),
    'bayer_bggr8': lambda rgb: mosaic(rgb, 'bggr'),
    'bayer_gbrg8': lambda rgb: mosaic(rgb, 'gbrg'),
    'bayer_grbg8': lambda rgb: mosaic(rgb, 'grbg'),
}
SIXTEEN_BIT = {name[:-1] + '16': encode for name, encode in EIGHT_BIT.items()
               if name.startswith(('mono', 'rgb', 'bgr', 'bayer'))}
ENCODERS = EIGHT_BIT | SIXTEEN_BIT
GREY = {'mono8', '8UC1', 'mono16', '16UC1'}
YUV = {'uyvy', 'yuv422', 'yuyv', 'yuv422_yuy2', 'nv12', 'nv21'}
# 8-bit limited range has coarser steps than RGB: one step of chroma is up to 2.02 of blue.
YUV_TOLERANCE = 3


def message(encoding: str, samples: np.ndarray, padding: int = 0, bigendian: bool = False,
            height: int | None = None) -> Image:
    """Lay samples out as a message whose rows end in `padding` bytes of rubbish."""
    samples = np.ascontiguousarray(samples)
    if samples.dtype == np.uint16:
        samples = samples.astype('>u2' if bigendian else '<u2')
    row = samples.view(np.uint8).reshape(samples.shape[0], -1)
    padded = np.pad(row, ((0, 0), (0, padding)), constant_values=0xAB)
    return Image(samples.shape[0] if height is None else height, samples.shape[1], encoding,
                 int(bigendian), padded.shape[1], array.array('B', padded.tobytes()))


def encoded(encoding: str, rgb: np.ndarray, padding: int = 0, bigendian: bool = False) -> Image:
    """Return a picture as a message. 16-bit samples are 257 times the 8-bit ones."""
    samples = ENCODERS[encoding](rgb)
    if encoding in SIXTEEN_BIT:
        samples = samples.astype(np.uint16) * 257
    return message(encoding, samples, padding, bigendian, rgb.shape[0])


def blocks(columns: int = 4, rows: int = 3, size: int = 8, seed: int = 3) -> np.ndarray:
    """Return blocks of strong, different colours: chroma and mosaics are flat inside."""
    colours = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return colours.repeat(size, axis=0).repeat(size, axis=1)


def noise(height: int, width: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def inside_blocks(picture: np.ndarray, size: int = 8, margin: int = 2) -> np.ndarray:
    """Drop the pixels near block edges, where demosaicing mixes neighbours."""
    keep = np.arange(max(picture.shape[:2])) % size
    keep = (keep >= margin) & (keep < size - margin)
    return picture[keep[:picture.shape[0]]][:, keep[:picture.shape[1]]]


LAYOUTS = pytest.mark.parametrize(('padding', 'bigendian'), [
    (0, False), (0, True), (8, False), (8, True), (5, False), (5, True)])


def test_every_supported_encoding_has_a_row_in_this_table() -> None:
    assert set(images.ENCODINGS) == set(ENCODERS) | {'16UC1'}


@LAYOUTS
@pytest.mark.parametrize('encoding', ENCODERS)
def test_picture_comes_out_as_it_went_in(encoding: str, padding: int, bigendian: bool) -> None:
    picture = blocks()
    msg = encoded(encoding, picture, padding, bigendian)

    decoded = decode_image(msg)

    assert decoded.dtype == np.uint8
    assert decoded.shape == (24, 32, 3)
    assert decoded.flags.c_contiguous
    if encoding in GREY:
        np.testing.assert_array_equal(decoded, picture[..., [1, 1, 1]])
    elif encoding in YUV:
        np.testing.assert_allclose(decoded.astype(int), picture, atol=YUV_TOLERANCE)
    elif encoding.startswith('bayer'):
        np.testing.assert_array_equal(inside_blocks(decoded), inside_blocks(picture))
    else:
        np.testing.assert_array_equal(decoded, picture)


@LAYOUTS
def test_sixteen_bit_brightness_is_scaled_by_255_of_65535(padding: int, bigendian: bool) -> None:
    samples = np.array([[0, 128, 129, 257], [385, 386, 65406, 65535]], np.uint16)

    decoded = decode_image(message('mono16', samples, padding, bigendian))

    np.testing.assert_array_equal(decoded[..., 0], [[0, 0, 1, 1], [1, 2, 254, 255]])


@LAYOUTS
def test_depth_turns_grey_up_to_ten_metres(padding: int, bigendian: bool) -> None:
    millimetres = np.array([[0, 1000, 5020, 9980], [10000, 10001, 30000, 65535]], np.uint16)

    decoded = decode_image(message('16UC1', millimetres, padding, bigendian))

    np.testing.assert_array_equal(decoded[..., 2], [[0, 26, 128, 254], [255, 255, 255, 255]])


@pytest.mark.parametrize('as_buffer', [
    bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8),
    lambda data: array.array('B', data)])
@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', 'mono16', 'nv12'])
def test_any_buffer_of_bytes_will_do(encoding: str, as_buffer: Any) -> None:
    msg = encoded(encoding, blocks())
    expected = decode_image(msg).copy()

    decoded = decode_image(replace(msg, data=as_buffer(bytes(msg.data))))

    np.testing.assert_array_equal(decoded, expected)
    assert decoded.flags.writeable


def test_bytes_after_the_last_row_do_not_matter() -> None:
    msg = encoded('rgb8', blocks())
    longer = replace(msg, data=array.array('B', bytes(msg.data) + b'more'))
    np.testing.assert_array_equal(decode_image(longer), blocks())


@pytest.mark.parametrize('padding', [0, 5])
def test_picture_outlives_its_message(padding: int) -> None:
    msg = encoded('rgb8', noise(40, 60), padding)
    decoded = decode_image(msg)
    msg.data = None
    other = [bytearray(40 * 60 * 3) for _ in range(50)]
    np.testing.assert_array_equal(decoded, noise(40, 60))
    assert len(other) == 50


@settings(deadline=None, max_examples=300)
@given(encoding=st.sampled_from(sorted(ENCODERS)), width=st.integers(1, 70),
       height=st.integers(1, 50), padding=st.integers(0, 9), bigendian=st.booleans())
def test_any_size_is_decoded_or_refused_for_a_reason(encoding: str, width: int, height: int,
                                                     padding: int, bigendian: bool) -> None:
    even_width, even_height = width + width % 2, height + height % 2
    picture = noise(even_height, even_width)
    msg = encoded(encoding, picture, padding, bigendian)
    msg.width, msg.height = width, height

    possible = (
        (width % 2 == 0 or encoding not in YUV)
        and (height % 2 == 0 or encoding not in ('nv12', 'nv21'))
        and (min(width, height) >= 3 or not encoding.startswith('bayer')))
    if not possible:
        with pytest.raises(ImageError, match=f'{width}x{height} cannot be {encoding}'):
            decode_image(msg)
        return
    decoded = decode_image(msg)
    assert decoded.shape == (height, width, 3)
    if encoding in GREY:
        np.testing.assert_array_equal(decoded[..., 0], picture[:height, :width, 1])
    elif encoding not in YUV and not encoding.startswith('bayer'):
        np.testing.assert_array_equal(decoded, picture[:height, :width])


GOOD = encoded('bgr8', blocks())  # 32 x 24, 96 bytes a row, 2304 in all


@pytest.mark.parametrize(('change', 'reason'), [
    ({'encoding': 'rgb9'}, r"encoding 'rgb9' is not known; expected one of .*bgr8"),
    ({'encoding': ''}, r"encoding '' is not known"),
    ({'encoding': '32FC1'}, r"'32FC1' holds measurements .*subscribe to a colour image"),
    ({'encoding': '16SC1'}, r"'16SC1' holds measurements"),
    ({'width': 0}, r'size is 0x24'),
    ({'height': 0}, r'size is 32x0'),
    ({'width': 2 ** 32 - 1, 'height': 2 ** 32 - 1, 'step': 2 ** 32 - 1},
     r'size is 4294967295x4294967295; at most 67108864'),
    ({'step': 95}, r'step is 95; 32 pixels of bgr8 take 96 bytes'),
    ({'step': 0}, r'step is 0'),
    ({'encoding': 'bgra8'}, r'step is 96; 32 pixels of bgra8 take 128 bytes'),
    ({'height': 25}, r'data has 2304 bytes; 32x25 bgr8 with step 96 takes 2400'),
    ({'encoding': 'nv12'}, r'data has 2304 bytes; 32x24 nv12 with step 96 takes 3456'),
    ({'step': 97}, r'data has 2304 bytes; .* step 97 takes 2328'),
    ({'data': array.array('B')}, r'data has 0 bytes'),
    ({'encoding': 'uyvy', 'width': 31}, r'31x24 cannot be uyvy: .* a multiple of 2'),
    ({'encoding': 'nv21', 'height': 23}, r'32x23 cannot be nv21'),
    ({'encoding': 'bayer_rggb8', 'height': 2}, r'32x2 cannot be bayer_rggb8'),
])
def test_broken_image_is_refused_with_what_was_given(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_image(replace(GOOD, **change))


def jpeg(picture: np.ndarray, *options: int) -> bytes:
    return cv2.imencode('.jpg', picture[..., ::-1], options)[1].tobytes()


def png(picture: np.ndarray) -> bytes:
    return cv2.imencode('.png', picture[..., ::-1] if picture.ndim == 3 else picture)[1].tobytes()


@pytest.mark.parametrize('progressive', [0, 1])
@pytest.mark.parametrize('name', ['jpeg', 'jpg', 'rgb8; jpeg compressed bgr8', '', 'png'])
def test_jpeg_is_decoded_whatever_the_format_says(name: str, progressive: int) -> None:
    data = jpeg(blocks(), cv2.IMWRITE_JPEG_QUALITY, 100, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)

    decoded = decode_compressed(Compressed(name, array.array('B', data)))

    assert decoded.dtype == np.uint8
    assert decoded.shape == (24, 32, 3)
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable
    # Chroma is halved and rounded; 4 is below the distance of any two colours here.
    np.testing.assert_allclose(inside_blocks(decoded).astype(int), inside_blocks(blocks()), atol=4)


@pytest.mark.parametrize('name', ['png', 'rgb8; png compressed bgr8', '', 'jpeg'])
def test_png_is_decoded_exactly_whatever_the_format_says(name: str) -> None:
    decoded = decode_compressed(Compressed(name, array.array('B', png(noise(24, 33)))))
    np.testing.assert_array_equal(decoded, noise(24, 33))


def test_grey_and_transparent_compressed_images_become_rgb() -> None:
    picture = noise(24, 32)
    grey = decode_compressed(Compressed('png', png(picture[..., 1])))
    np.testing.assert_array_equal(grey, picture[..., [1, 1, 1]])
    clear = cv2.imencode('.png', with_alpha(picture)[..., [2, 1, 0, 3]])[1].tobytes()
    np.testing.assert_array_equal(decode_compressed(Compressed('png', clear)), picture)


def test_orientation_tag_does_not_turn_the_picture() -> None:
    data = jpeg(blocks())
    exif = (b'Exif\0\0MM\0*\0\0\0\x08\0\x01' + b'\x01\x12\0\x03\0\0\0\x01\0\x06\0\0' + b'\0' * 4)
    tagged = data[:2] + b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif + data[2:]
    decoded = decode_compressed(Compressed('jpeg', tagged))
    np.testing.assert_array_equal(decoded, decode_compressed(Compressed('jpeg', data)))


def test_real_frame_has_its_yellow_can() -> None:
    data = (DATA / 'g1_head_camera.jpg').read_bytes()

    decoded = decode_compressed(Compressed('jpeg', data))

    assert decoded.shape == (336, 448, 3)
    red, green, blue = decoded[195:215, 195:215].reshape(-1, 3).mean(axis=0)
    assert red > green > 2 * blue


@pytest.mark.parametrize('progressive', [0, 1])
def test_jpeg_cut_off_anywhere_is_refused(progressive: int) -> None:
    data = jpeg(noise(60, 80), cv2.IMWRITE_JPEG_PROGRESSIVE, progressive)
    for length in [*range(2, 700), *range(700, len(data) - 2, 97), len(data) - 2, len(data) - 1]:
        with pytest.raises(ImageError, match=r'the (JPEG|PNG) is cut off'):
            decode_compressed(Compressed('jpeg', data[:length]))


def test_thumbnail_does_not_hide_that_a_jpeg_is_cut_off() -> None:
    data, thumbnail = jpeg(noise(60, 80)), jpeg(noise(8, 8))
    app1 = b'\xff\xe1' + (len(thumbnail) + 2).to_bytes(2, 'big') + thumbnail
    whole = data[:2] + app1 + data[2:]
    assert decode_compressed(Compressed('jpeg', whole)).shape == (60, 80, 3)
    with pytest.raises(ImageError, match=r'the (JPEG|PNG) is cut off'):
        decode_compressed(Compressed('jpeg', whole[:-400]))


def test_png_cut_off_anywhere_is_refused() -> None:
    data = png(noise(20, 30))
    for length in range(8, len(data)):
        with pytest.raises(ImageError, match=r'the (JPEG|PNG) is cut off'):
            decode_compressed(Compressed('png', data[:length]))


@pytest.mark.parametrize('rest', [b'', b'\0' * 512, b'junk'])
def test_bytes_after_the_end_of_a_compressed_image_do_not_matter(rest: bytes) -> None:
    for data in (jpeg(blocks()), png(blocks())):
        assert decode_compressed(Compressed('', data + rest)).shape == (24, 32, 3)


def header_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG that claims another size."""
    data = bytearray(jpeg(blocks()))
    at = data.index(b'\xff\xc0') + 5
    data[at:at + 4] = height.to_bytes(2, 'big') + width.to_bytes(2, 'big')
    return bytes(data)


@pytest.mark.parametrize(('msg', 'reason'), [
    (Compressed('jpeg', b''), r"no data \(format 'jpeg'\)"),
    (Compressed('h264', b'\0\0\0\1abc'), r"neither JPEG nor PNG \(format 'h264', 7 bytes, .*00"),
    (Compressed('16UC1; compressedDepth png', b'\0' * 12 + png(blocks())), 'holds depth'),
    (Compressed('mono16; png compressed ', png(noise(5, 5)[..., 0].astype(np.uint16) * 257)),
     'the PNG has 16 bits per sample'),
    (Compressed('jpeg', header_of_size(65500, 65500)), 'size is 65500x65500; at most'),
    (Compressed('jpeg', header_of_size(0, 24)), 'size is 0x24'),
    (Compressed('jpeg', b'\xff\xd8nonsense\xff\xd9'), 'not a valid JPEG: no marker at byte 2'),
    (Compressed('jpeg', b'\xff\xd8\xff\xda\0\x02\xff\xd9'), 'not a valid JPEG: its size'),
    (Compressed('png', png(blocks())[:8] + png(blocks())[20:]), 'not a valid PNG'),
])
def test_broken_compressed_image_is_refused_with_what_was_given(
        msg: Compressed, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode_compressed(msg)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damaged_bytes_never_raise_anything_but_image_error(data: st.DataObject) -> None:
    good = data.draw(st.sampled_from([jpeg(blocks()), png(blocks())]))
    damaged = bytearray(good)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(good) - 1),
                                                  st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[at] = value
    with contextlib.suppress(ImageError):
        assert decode_compressed(Compressed('', bytes(damaged))).ndim == 3


@pytest.mark.parametrize('encoding', ['rgb8', 'bgr8', 'mono16', 'nv12', 'bayer_gbrg8'])
def test_messages_of_rclpy_and_of_rosbags_decode_alike(encoding: str) -> None:
    ros = pytest.importorskip('sensor_msgs.msg')
    serialization = pytest.importorskip('rclpy.serialization')
    rosbags = pytest.importorskip('rosbags.typesys')
    msg = encoded(encoding, blocks(), padding=6)
    sent = ros.Image(**{name: getattr(msg, name) for name in Image.__annotations__})
    cdr = serialization.serialize_message(sent)
    store = rosbags.get_typestore(rosbags.Stores.ROS2_JAZZY)

    by_rclpy = decode_image(serialization.deserialize_message(cdr, ros.Image))
    by_rosbags = decode_image(store.deserialize_cdr(cdr, 'sensor_msgs/msg/Image'))

    np.testing.assert_array_equal(by_rclpy, decode_image(msg))
    np.testing.assert_array_equal(by_rosbags, by_rclpy)
    assert by_rosbags.flags.writeable


def test_cv_bridge_and_opencv_give_the_same_pixels() -> None:
    if images._cv_bridge() is None:
        pytest.skip('needs the cv_bridge of a ROS installation, with the NumPy it was built for')
    compared = set()
    for encoding, padding, bigendian in itertools.product(ENCODERS, (0, 5, 8), (False, True)):
        layout = images._LAYOUTS[encoding]
        msg = encoded(encoding, noise(24, 32), padding, bigendian)
        by_cv_bridge = images._by_cv_bridge(msg)
        if by_cv_bridge is not None and images._right_in_cv_bridge(msg, layout):
            np.testing.assert_array_equal(images._by_opencv(msg, layout), by_cv_bridge,
                                          f'{encoding}, padding {padding}, {bigendian=}')
            compared.add(encoding)
    assert {'bgr8', 'mono16', 'bayer_grbg8', 'bayer_grbg16', 'yuv422'} <= compared


class Bridge:
    """Stands in for CvBridge: paints everything grey."""

    def imgmsg_to_cv2(self, msg: Image, encoding: str) -> np.ndarray:
        assert encoding == 'rgb8'
        return np.full((msg.height, msg.width, 3), 99, np.uint8)


@pytest.fixture
def cv_bridge(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install a package `cv_bridge` whose extension module lies in the file that is given."""
    def install(extension: str, numpy: str) -> None:
        package, boost, module = (ModuleType(name) for name in (
            'cv_bridge', 'cv_bridge.boost', 'cv_bridge.boost.cv_bridge_boost'))
        module.__file__ = extension
        package.CvBridge = Bridge  # type: ignore[attr-defined]
        boost.cv_bridge_boost = module  # type: ignore[attr-defined]
        for installed in (package, boost, module):
            monkeypatch.setitem(sys.modules, installed.__name__, installed)
        monkeypatch.setattr(np, '__version__', numpy)
        images._cv_bridge.cache_clear()

    yield install
    images._cv_bridge.cache_clear()


def test_cv_bridge_of_a_ros_installation_is_used(cv_bridge: Any) -> None:
    cv_bridge('/opt/ros/jazzy/lib/cv_bridge_boost.so', '1.26.4')
    assert (decode_image(encoded('bgr8', blocks())) == 99).all()


@pytest.mark.parametrize(('encoding', 'padding'), [('bgr8', 5), ('nv12', 0), ('16UC1', 0),
                                                   ('8UC3', 0), ('uyvy', 0)])
def test_cv_bridge_is_not_used_where_it_is_wrong(cv_bridge: Any, encoding: str,
                                                 padding: int) -> None:
    cv_bridge('/opt/ros/jazzy/lib/cv_bridge_boost.so', '1.26.4')
    msg = (message('16UC1', noise(24, 32)[..., 0].astype(np.uint16)) if encoding == '16UC1'
           else encoded(encoding, blocks(), padding))
    assert not (decode_image(msg) == 99).all()


def test_image_that_cv_bridge_refuses_is_decoded_without_it(
        cv_bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> np.ndarray:
        raise RuntimeError('Unrecognized image encoding')

    monkeypatch.setattr(Bridge, 'imgmsg_to_cv2', refuse)
    cv_bridge('/opt/ros/jazzy/lib/cv_bridge_boost.so', '1.26.4')
    np.testing.assert_array_equal(decode_image(encoded('bgr8', blocks())), blocks())


def test_cv_bridge_built_for_another_numpy_is_not_used(cv_bridge: Any) -> None:
    cv_bridge('/opt/ros/jazzy/lib/cv_bridge_boost.so', '2.0.1')
    np.testing.assert_array_equal(decode_image(encoded('bgr8', blocks())), blocks())


def test_port_of_cv_bridge_on_pypi_is_not_used(cv_bridge: Any) -> None:
    cv_bridge('/venv/site-packages/cv_bridge/boost/cv_bridge_boost.py', '1.26.4')
    np.testing.assert_array_equal(decode_image(encoded('bgr8', blocks())), blocks())
