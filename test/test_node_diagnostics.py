"""What `/diagnostics` says about an engine and cameras in every condition."""
from dataclasses import replace
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
import pytest

from svlm_ros.node.diagnostics import (
    camera_status,
    CameraHealth,
    engine_status,
    EngineHealth,
    Failures,
    MAX_KINDS,
)

ENGINE = EngineHealth(
    state='active', model='random', device='cpu', device_memory_bytes=3 * 2 ** 20, enabled=True,
    questions=1, answered=2, failed=3, events_dropped=0, load_failure='', last_error='',
    last_error_age_sec=None)
CAMERA = CameraHealth(
    name='front', topic='/front/image', watching=True, publishers=1, received=10, rate_hz=29.97,
    bad_images=0, last_bad_image='', recent_bad_image=False, silent_sec=None,
    frozen_sec=None, incompatible=(),
    latency_sec=0.25, rounds=4, round_seconds=0.1, frames_used=8, frames_dropped=2,
    frames_out_of_order=0, cache_used=50, cache_tokens=200)


class Log:
    """Collects what is logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize(('changes', 'level', 'message'), [
    ({}, DiagnosticStatus.OK, 'active'),
    ({'enabled': False}, DiagnosticStatus.OK, 'active, disabled by ~/set_enabled'),
    ({'last_error': 'it broke', 'last_error_age_sec': 1.0}, DiagnosticStatus.WARN,
     'active: it broke'),
    ({'last_error': 'it broke', 'last_error_age_sec': 60.0}, DiagnosticStatus.OK, 'active'),
    ({'state': 'unconfigured', 'load_failure': 'no model'}, DiagnosticStatus.ERROR,
     'unconfigured: no model'),
])
def test_the_engines_status(changes: dict[str, Any], level: bytes, message: str) -> None:
    status = engine_status('svlm', replace(ENGINE, **changes))
    assert (status.level, status.message) == (level, message)
    assert status.name == 'svlm: engine'
    assert status.hardware_id == 'random'


@pytest.mark.parametrize(('changes', 'level', 'words'), [
    ({}, DiagnosticStatus.OK, 'images come'),
    ({'received': 0}, DiagnosticStatus.OK, 'waiting for the first image'),
    ({'watching': False}, DiagnosticStatus.OK, 'not watched'),
    ({'silent_sec': 6.04, 'publishers': 0}, DiagnosticStatus.WARN,
     'no frame on /front/image for 6.0 s; 0 publishers: check the camera and the parameter'),
    ({'silent_sec': 6.0, 'publishers': 2}, DiagnosticStatus.WARN, '; 2 publishers: check the '),
    ({'incompatible': ('RELIABILITY',), 'silent_sec': 6.0}, DiagnosticStatus.WARN,
     'set qos_overrides./front/image.subscription.reliability to best_effort'),
    ({'recent_bad_image': True, 'last_bad_image': 'teapot8'}, DiagnosticStatus.WARN, 'teapot8'),
])
def test_a_cameras_status(changes: dict[str, Any], level: bytes, words: str) -> None:
    status = camera_status('svlm', replace(CAMERA, **changes))
    assert status.level == level
    assert words in status.message
    assert status.name == 'svlm: camera front'


def test_figures_are_shown_with_their_units() -> None:
    values = {pair.key: pair.value for pair in camera_status('svlm', CAMERA).values}
    assert values['rate (Hz)'] == '29.97'
    assert values['latency (s)'] == '0.250'
    assert values['cache fill (%)'] == '25.0'
    assert values['frames dropped'] == '2'
    values = {pair.key: pair.value for pair in engine_status('svlm', ENGINE).values}
    assert values['device memory (MiB)'] == '3.0'
    assert values['last error'] == 'none'


def test_failures_of_one_kind_are_logged_once_per_period_and_counted() -> None:
    log = Log()
    failures = Failures(log)
    for _ in range(5):
        failures.report('bad image', 'kind', period_sec=3600.0)
    failures.report('another', 'other kind', period_sec=3600.0)
    failures.report('no kind')
    assert log.lines == ['bad image', 'another', 'no kind']
    failures.report('bad image', 'kind', period_sec=1e-9)
    assert log.lines[-1] == 'bad image (4 more since the last such line)'
    assert failures.last == 'bad image'


def test_ever_new_kinds_of_failures_do_not_grow_the_memory() -> None:
    failures = Failures(Log())
    for index in range(3 * MAX_KINDS):
        failures.report('bad', f'kind {index}', period_sec=3600.0)
    assert len(failures._logged) <= MAX_KINDS
