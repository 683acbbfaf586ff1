"""Parameters: bounds, reasons, and the file that explains them; without DDS but where noted."""
from collections.abc import Iterator
from pathlib import Path
import re
from typing import Any

import pytest
from ros_testing import ros, running_node
import yaml

from svlm_ros.engine.config import ConfigError, SamplingConfig, StreamConfig
from svlm_ros.node.parameters import descriptor_of, settings_from, SPECS

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module', autouse=True)
def _ros() -> Iterator[None]:
    with ros():
        yield


def defaults(**changes: Any) -> dict[str, Any]:
    """Return the parameters' defaults with changes."""
    return {**{spec.name: spec.default for spec in SPECS}, **changes}


def test_the_defaults_are_those_of_the_engine() -> None:
    assert settings_from(defaults()).stream == StreamConfig()


def test_every_setting_of_a_stream_that_an_operator_needs_is_a_parameter() -> None:
    names = {spec.name for spec in SPECS}
    left_out = (set(StreamConfig.__dataclass_fields__) | set(
        SamplingConfig.__dataclass_fields__)) - names
    # For replay and for comparison with the published code.
    assert left_out == {'sampling', 'previous_text', 'reference', 'time_offset_sec'}


@pytest.mark.parametrize('spec', SPECS, ids=lambda spec: spec.name)
def test_every_parameter_is_taken(spec: Any) -> None:
    other: dict[str, Any] = {
        'dtype': 'bfloat16', 'image_transport': 'compressed', 'cameras': ['front'],
        'topics': ['elsewhere'], 'policy': 'full', 'positions': 'native', 'frame_rate_hz': 4.0,
        'top_p': 0.5, 'round_duration_sec': 2.0}
    value = other.get(spec.name, {bool: lambda old: not old, str: lambda old: f'{old}x',
                                  int: lambda old: old + 1, float: lambda old: old + 0.5,
                                  }.get(type(spec.default), list)(spec.default))
    assert value != spec.default
    assert settings_from(defaults(**{spec.name: value})) != settings_from(defaults())


def test_the_configuration_file_has_every_parameter_with_its_default() -> None:
    file = yaml.safe_load((ROOT / 'config/svlm.yaml').read_text())
    # Only a start from the file activates the node; a lifecycle manager's own start does not.
    assert file == {'/**': {'ros__parameters': defaults(autostart=True)}}


def test_the_configuration_file_marks_what_may_change_while_running() -> None:
    text = (ROOT / 'config/svlm.yaml').read_text()
    paragraphs = [part for part in text.split('\n\n') if ':' in part.splitlines()[-1]]
    for spec in SPECS:
        [paragraph] = [part for part in paragraphs
                       if part.splitlines()[-1].startswith(f'    {spec.name}:')]
        assert ('[live]' in paragraph) == spec.dynamic, spec.name


@pytest.mark.parametrize(('changes', 'reason'), [
    ({'model': ''}, 'model is empty'),
    ({'instruction': ' \n'}, 'instruction is empty'),
    ({'temperature': float('nan')}, 'temperature is nan'),
    ({'silence_timeout_sec': float('inf')}, 'silence_timeout_sec is inf'),
    ({'top_p': 0.0}, 'top_p is 0.0; expected above 0'),
    ({'image_transport': 'theora'}, "image_transport is 'theora'; expected one of"),
    ({'dtype': 'int8'}, "dtype is 'int8'; expected one of"),
    ({'policy': 'best'}, "policy is 'best'; expected one of"),
    ({'round_duration_sec': 0.75}, 'expected a whole number of frames'),
    ({'min_pixels': 500000}, 'min_pixels is 500000; expected 784 to max_pixels'),
    ({'cameras': []}, 'cameras is empty'),
    ({'cameras': ['a', 'a']}, 'expected each name once'),
    ({'cameras': ['my camera']}, "cameras has 'my camera'; expected letters"),
    ({'cameras': ['a', 'b'], 'topics': ['one']}, 'expected one per camera'),
    ({'topics': ['one/2two']}, "topics has 'one/2two'"),
])
def test_a_value_that_is_not_allowed_is_named_with_what_is(
        changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        settings_from(defaults(**changes))


@pytest.mark.parametrize(('changes', 'topics'), [
    ({}, ['camera/image']),
    ({'cameras': ['a', 'b']}, ['a/image', 'b/image']),
    ({'cameras': ['a', 'b'], 'topics': []}, ['a/image', 'b/image']),
    ({'cameras': ['a', 'b'], 'topics': ['', '/eye']}, ['a/image', '/eye']),
    ({'topics': ['/eye'], 'image_transport': 'compressed'}, ['/eye/compressed']),
])
def test_cameras_get_their_topics(changes: dict[str, Any], topics: list[str]) -> None:
    settings = settings_from(defaults(**changes))
    assert [camera.topic for camera in settings.cameras] == topics


def test_descriptors_show_description_bounds_and_when_a_parameter_may_change() -> None:
    for spec in SPECS:
        descriptor = descriptor_of(spec)
        assert len(descriptor.description) > 10
        assert descriptor.read_only == spec.read_only
        assert bool(descriptor.additional_constraints) == (not spec.dynamic and not spec.read_only)
        bounds = [*descriptor.integer_range, *descriptor.floating_point_range]
        assert len(bounds) == (0 if spec.bounds is None else 1)
        is_number = isinstance(spec.default, int | float) and not isinstance(spec.default, bool)
        assert is_number == (spec.bounds is not None), f'{spec.name}: every number has bounds'
        if spec.bounds is not None:
            assert (bounds[0].from_value, bounds[0].to_value) == spec.bounds
            assert spec.bounds[0] <= spec.default <= spec.bounds[1]


@pytest.mark.parametrize(('parameters', 'reason'), [
    ({'temperature': '.nan'}, 'temperature'),
    ({'max_questions': 0}, 'max_questions out of range'),
    ({'frame_rate_hz': 2}, 'write it with a decimal point'),
    ({'cameras': ['a', 'b'], 'topics': ['one']}, 'expected one per camera'),
])
def test_a_node_started_with_a_bad_value_says_so_and_ends_with_status_2(
        parameters: dict[str, Any], reason: str) -> None:
    with running_node('bad', **parameters) as node:
        assert node.wait_for_exit() == 2
        assert 'Parameter not allowed' in node.log
        assert reason in node.log
        assert 'Traceback' not in node.log
