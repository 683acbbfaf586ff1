"""The node's parameters: what can be set, within which bounds, and the settings they make.

Not for: the meaning of the stream's settings (see `svlm_ros.engine.config`,
which also checks them).
"""
from collections.abc import Mapping
from dataclasses import dataclass, fields
import math
import re
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    InvalidTopicNameException,
    ParameterUninitializedException,
)
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name

from svlm_ros.engine.config import ConfigError, SamplingConfig, StreamConfig

TRANSPORTS = ('raw', 'compressed')
DTYPES = ('auto', 'float32', 'bfloat16')

_CAMERA_NAME = re.compile(r'[A-Za-z][A-Za-z0-9_]*(/[A-Za-z][A-Za-z0-9_]*)*')
_STREAM = StreamConfig()
_SAMPLING = SamplingConfig()

ParameterValue = bool | int | float | str | list[str]


@dataclass(frozen=True)
class Spec:
    """One parameter.

    :param bounds: smallest and largest number allowed; None for what is not a number.
    :param dynamic: may change while the node is configured; all others only before `configure`.
    :param read_only: is read once, when the node starts.
    """

    name: str
    default: ParameterValue
    description: str
    bounds: tuple[float, float] | None = None
    dynamic: bool = False
    read_only: bool = False


SPECS: tuple[Spec, ...] = (
    Spec('autostart', False,
         'Configure and activate by itself at start-up, without lifecycle tools.',
         read_only=True),
    Spec('model', 'random',
         'Checkpoint of the Qwen2.5-VL family: a folder or a hub name. `random`: a small '
         'untrained model whose words mean nothing; `null`: no model, for tests of everything '
         'around it.'),
    Spec('device', 'auto', 'Torch device: auto, cpu, cuda, cuda:1 ...'),
    Spec('dtype', 'auto', 'Of the weights: auto, float32 or bfloat16.'),
    Spec('null_token_delay_sec', 0.0,
         'Only for model `null`: seconds per token, to make it as slow as a model.', (0.0, 10.0)),
    Spec('cameras', ['camera'], 'Names of the cameras; each is a stream of its own.'),
    Spec('topics', [''],
         'Base image topic of each camera, in the order of `cameras`; an empty string, or none at '
         'all, is `<name>/image`. With image_transport `compressed`, `/compressed` is appended.'),
    Spec('image_transport', 'raw', 'raw or compressed.'),
    Spec('silence_timeout_sec', 5.0,
         'Seconds without an image after which a camera counts as silent and is warned of.',
         (0.1, 3600.0), dynamic=True),
    Spec('instruction', _STREAM.instruction,
         'What to describe; a change takes effect with the next round.', dynamic=True),
    Spec('publish_silence', False,
         'Also publish the descriptions of rounds in which nothing was said.', dynamic=True),
    Spec('frame_rate_hz', _STREAM.frame_rate_hz,
         'Frames sampled from each camera per second; times round_duration_sec it must be whole.',
         (0.01, 120.0)),
    Spec('round_duration_sec', _STREAM.round_duration_sec,
         'Seconds of stream time that one description covers.', (0.05, 60.0)),
    Spec('vision_rounds', _STREAM.vision_rounds,
         'Newest rounds whose frames are retained.', (1, 100000)),
    Spec('text_rounds', _STREAM.text_rounds,
         'Newest rounds whose words stay in place.', (1, 100000)),
    Spec('text_sink', _STREAM.text_sink,
         'Tokens kept for ever from the beginning of what was said.', (0, 1000000)),
    Spec('text_window', _STREAM.text_window or 0,
         'Tokens kept from the end of what was said before the newest rounds.', (1, 1000000)),
    Spec('max_new_tokens', _STREAM.max_new_tokens, 'Token limit of a description.', (1, 100000)),
    Spec('min_pixels', _STREAM.min_pixels,
         'A smaller image is scaled up to this many pixels.', (784, 2 ** 26)),
    Spec('max_pixels', _STREAM.max_pixels,
         'A larger image is scaled down to this many pixels; bounds memory and time per round.',
         (784, 2 ** 26)),
    Spec('policy', _STREAM.policy,
         'What is retained: streaming, or to compare with: sliding_window, recompute, full.'),
    Spec('positions', _STREAM.positions,
         'contiguous (positions closed up every round) or native (never changed).'),
    Spec('max_context_tokens', _STREAM.max_context_tokens,
         'Size of the cache where the policy does not bound it (`full`).', (256, 10000000)),
    Spec('temperature', _SAMPLING.temperature,
         '0 always takes the likeliest word; higher is more varied.', (0.0, 10.0)),
    Spec('top_p', _SAMPLING.top_p,
         'Choose among the likeliest words that make up this share, above 0.', (0.0, 1.0)),
    Spec('repetition_penalty', _SAMPLING.repetition_penalty,
         'Above 1 makes words that were said less likely.', (0.1, 10.0)),
    Spec('seed', _SAMPLING.seed,
         'Of the random choice; the same images and seed give the same words.', (0, 2 ** 63 - 1)),
    Spec('max_questions', _STREAM.max_questions,
         'Questions answered at once per camera; one more is refused as busy.', (1, 64)),
    Spec('max_question_length', 1000,
         'Characters; a longer question is refused.', (1, 100000)),
    Spec('max_question_tokens', _STREAM.max_question_tokens,
         'Tokens; a longer question is refused.', (1, 100000)),
    Spec('max_answer_tokens', _STREAM.max_answer_tokens, 'Token limit of an answer.', (1, 100000)),
    Spec('ask_timeout_sec', 30.0,
         'Seconds within which the service ~/ask answers, if need be what was said until then.',
         (0.1, 3600.0), dynamic=True),
    Spec('diagnostics_period_sec', 1.0,
         'Seconds between two messages on /diagnostics.', (0.1, 60.0), dynamic=True),
)


@dataclass(frozen=True)
class CameraSettings:
    """A camera's name and the topic that is subscribed, relative to the node's namespace."""

    name: str
    topic: str


@dataclass(frozen=True)
class Settings:
    """All parameters, checked; one field per parameter or group of parameters."""

    autostart: bool
    model: str
    device: str
    dtype: str
    null_token_delay_sec: float
    cameras: tuple[CameraSettings, ...]
    image_transport: str
    silence_timeout_sec: float
    publish_silence: bool
    max_question_length: int
    ask_timeout_sec: float
    diagnostics_period_sec: float
    stream: StreamConfig


def settings_from(values: Mapping[str, Any]) -> Settings:
    """Check all parameters together.

    :param values: one value per name in `SPECS`.
    :raises ConfigError: what was given, what is expected.
    """
    for name in ('model', 'device', 'dtype', 'instruction'):
        if not values[name].strip():
            raise ConfigError(f'{name} is empty; expected text')
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f'{name} is {value}; expected a finite number')
    for name, allowed in (('image_transport', TRANSPORTS), ('dtype', DTYPES)):
        if values[name] not in allowed:
            raise ConfigError(f'{name} is {values[name]!r}; expected one of {allowed}')
    sampling = SamplingConfig(**{field.name: values[field.name]
                                 for field in fields(SamplingConfig)})
    stream = StreamConfig(sampling=sampling, **{
        field.name: values[field.name] for field in fields(StreamConfig) if field.name in values})
    return Settings(
        stream=stream,
        cameras=camera_settings(values['cameras'], values['topics'] or [],
                                values['image_transport']),
        **{field.name: values[field.name] for field in fields(Settings)
           if field.name not in ('stream', 'cameras')})


def camera_settings(names: list[str], topics: list[str],
                    transport: str) -> tuple[CameraSettings, ...]:
    """Pair cameras with topics.

    :raises ConfigError: a name or topic is not allowed, named twice, or the lists do not match.
    """
    if not names:
        raise ConfigError('cameras is empty; expected at least one name')
    if len(set(names)) != len(names):
        raise ConfigError(f'cameras is {names}; expected each name once')
    for name in names:
        if not _CAMERA_NAME.fullmatch(name):
            raise ConfigError(f'cameras has {name!r}; expected letters, digits, underscores and '
                              'inner slashes, beginning with a letter')
    if not any(topics):
        topics = [''] * len(names)
    if len(topics) != len(names):
        raise ConfigError(f'topics is {topics}; expected one per camera, in the order of '
                          f'cameras ({names})')
    suffix = '/compressed' if transport == 'compressed' else ''
    cameras = tuple(CameraSettings(name, (topic or f'{name}/image') + suffix)
                    for name, topic in zip(names, topics, strict=True))
    for camera in cameras:
        try:
            validate_topic_name(camera.topic)
        except InvalidTopicNameException as error:
            raise ConfigError(f'topics has {camera.topic!r}: {error}') from None
    return cameras


def descriptor_of(spec: Spec) -> ParameterDescriptor:
    """Return the descriptor that `ros2 param describe` shows."""
    descriptor = ParameterDescriptor(description=spec.description, read_only=spec.read_only)
    if not spec.dynamic and not spec.read_only:
        descriptor.additional_constraints = 'can be set only before the node is configured'
    if spec.bounds is not None and isinstance(spec.default, int):
        descriptor.integer_range = [IntegerRange(
            from_value=int(spec.bounds[0]), to_value=int(spec.bounds[1]))]
    elif spec.bounds is not None:
        descriptor.floating_point_range = [FloatingPointRange(
            from_value=float(spec.bounds[0]), to_value=float(spec.bounds[1]))]
    return descriptor


def declare_parameters(node: Node) -> Settings:
    """Declare all parameters and return what they are set to.

    :raises ConfigError: a value given at start-up is of the wrong type or not allowed.
    """
    try:
        for spec in SPECS:
            node.declare_parameter(spec.name, spec.default, descriptor_of(spec))
    except InvalidParameterTypeException as error:
        hint = '; write it with a decimal point' if isinstance(spec.default, float) else ''
        raise ConfigError(f'{error}{hint}') from None
    except InvalidParameterValueException as error:
        raise ConfigError(str(error)) from None
    return read_settings(node)


def read_settings(node: Node, changes: Mapping[str, Any] | None = None) -> Settings:
    """Return the settings as declared, with `changes` laid over them.

    :raises ConfigError: they are not allowed together.
    """
    values = {spec.name: _value(node, spec) for spec in SPECS}
    values.update(changes or {})
    return settings_from(values)


def check_changes(node: Node, changed: list[Parameter], configured: bool) -> SetParametersResult:
    """Accept or refuse a change of parameters, with the reason."""
    specs = {spec.name: spec for spec in SPECS}
    changes = {parameter.name: parameter.value for parameter in changed
               if parameter.name in specs}
    fixed = [name for name in changes if not specs[name].dynamic]
    if configured and fixed:
        return SetParametersResult(successful=False, reason=(
            f'{", ".join(fixed)} cannot change while the node is configured: '
            'clean it up, set it, then configure'))
    try:
        read_settings(node, changes)
    except ConfigError as error:
        return SetParametersResult(successful=False, reason=str(error))
    return SetParametersResult(successful=True)


def _value(node: Node, spec: Spec) -> Any:
    """Return a parameter's value; an empty list given at start-up arrives without a type."""
    try:
        value = node.get_parameter(spec.name).value
    except ParameterUninitializedException:
        value = None
    if value is None and isinstance(spec.default, list):
        return []
    return list(value) if isinstance(spec.default, list) else value
