"""Finds the files that are installed beside the Python package: interfaces and configuration.

Works from the source tree, from a pip and from a colcon installation, without ROS.
Not for: files inside the package, such as svlm_ros/data.
"""
import os
from pathlib import Path
import sys


def share_file(name: str) -> Path:
    """Return a file of share/svlm_ros, `msg/Answer.msg` or `config/svlm.yaml`.

    Looks in the source tree, beside the installed package (every layout keeps share/ in a folder
    above it), and in the ament index.

    :raises FileNotFoundError: it is nowhere.
    """
    package = Path(__file__).resolve().parent
    ament = filter(None, os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep))
    prefixes = [*package.parents, Path(sys.prefix), *map(Path, ament)]
    shared = [prefix / 'share/svlm_ros' / name for prefix in prefixes]
    for path in [package.parent / name, *shared]:
        if path.is_file():
            return path
    raise FileNotFoundError(f'the file {name} of svlm_ros is missing; install the package again')
