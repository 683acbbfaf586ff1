"""Gives every pytest process a ROS graph of its own, before any test imports rclpy.

Not for: fixtures of single test modules.
"""
import os
from pathlib import Path
import socket
import sys
import tempfile

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Discovery on Linux has no free ports above domain 101; domain 0 is where everybody else is.
DOMAIN_IDS = range(1, 101)


def claim_domain_id() -> tuple[int, socket.socket]:
    """Return a domain id that no other test run on this machine has, and what holds it.

    An abstract socket name can be bound once and is free again when this process ends, however it
    ends. The search begins at the process id, so that unrelated programs are rarely met either.
    """
    for offset in DOMAIN_IDS:
        domain_id = DOMAIN_IDS[(os.getpid() + offset) % len(DOMAIN_IDS)]
        holder = socket.socket(socket.AF_UNIX)
        try:
            holder.bind(f'\0svlm_ros_test_domain_{domain_id}')
        except OSError:
            holder.close()
            continue
        return domain_id, holder
    raise RuntimeError(f'all ROS domains {DOMAIN_IDS.start} to {DOMAIN_IDS.stop - 1} are taken by '
                       'other test runs; end one, or choose one yourself: ROS_DOMAIN_ID=N')


def check_library_path() -> None:
    """Refuse to run with the library path of another environment's ROS wheels.

    The wheels set the path once, by running Python anew, and mark that in a variable which child
    processes inherit: a Python of another environment then loads the wrong libraries.
    """
    inherited = '_ROS_WHEELS_BOOTSTRAP_COMPLETE' in os.environ
    own = f'{sys.prefix}/lib' in os.environ.get('LD_LIBRARY_PATH', '').split(os.pathsep)
    if inherited and not own:
        pytest.exit('this shell was started by the Python of another environment with ROS wheels; '
                    'run: unset _ROS_WHEELS_BOOTSTRAP_COMPLETE LD_LIBRARY_PATH', returncode=4)


check_library_path()
if 'rclpy' in sys.modules:
    raise RuntimeError('rclpy was imported before test/conftest.py, too early to choose its '
                       'domain and log folder; which pytest plugin (-p) does that?')
if 'ROS_DOMAIN_ID' not in os.environ:
    _domain_id, _domain_holder = claim_domain_id()
    os.environ['ROS_DOMAIN_ID'] = str(_domain_id)
_log_folder = tempfile.TemporaryDirectory(prefix='svlm_ros_test_', ignore_cleanup_errors=True)
os.environ['ROS_LOG_DIR'] = _log_folder.name
os.environ['ROS_AUTOMATIC_DISCOVERY_RANGE'] = 'LOCALHOST'
# Programs that tests start run these sources too, from whatever folder.
os.environ['PYTHONPATH'] = os.pathsep.join(
    filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
# What a program says must come when it says it, also where nobody set this.
os.environ.pop('PYTHONUNBUFFERED', None)
# A test that needs a model must make it or skip, never fetch it.
os.environ['HF_HUB_OFFLINE'] = '1'


def pytest_report_header() -> str:
    """Say where to listen with another program while tests run."""
    return f'ROS_DOMAIN_ID={os.environ["ROS_DOMAIN_ID"]}'
