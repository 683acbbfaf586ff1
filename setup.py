"""Builds the package with pip where there is no ROS 2 installation; colcon never reads this file.

CMakeLists.txt says what is built and installed. This only drives it against the ROS wheels, and
hands what it installs to pip. Not for: metadata and dependencies, which are in pyproject.toml.
"""
from collections.abc import Iterator
import importlib.util
import os
from pathlib import Path
import shutil
import subprocess
import sys

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

NAME = 'svlm_ros'
ROOT = Path(__file__).parent.resolve()


def ros_wheels_prefix() -> Path:
    """Return the prefix of the ROS build tools: this environment, or the one pip builds in."""
    spec = importlib.util.find_spec('rosidl_adapter')
    if spec is None or spec.origin is None:
        raise SystemExit(
            'the ROS build tools are missing from this environment: run pip without '
            '--no-build-isolation, or install what pyproject.toml names under [build-system]')
    return Path(spec.origin).parents[4]  # PREFIX/lib/python3.N/site-packages/rosidl_adapter/


def data_files(stage: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (folder relative to the environment, files) of everything but Python modules."""
    for top in ('lib', 'share'):
        for folder, subfolders, names in os.walk(stage / top):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith('python3'))
            if names:
                yield (os.path.relpath(folder, stage),
                       [os.path.join(folder, name) for name in sorted(names)])


class CMakeBuild(build_py):
    """Configures, builds and installs CMakeLists.txt into a folder that pip packs."""

    def run(self) -> None:
        """Build, then give the modules to `build_lib` and all the rest to `data_files`."""
        if self.editable_mode:
            raise SystemExit(
                f'{NAME} cannot be installed editable: generated files would be missing. Run '
                '"pip install ." once and work from the source folder, which comes first there.')
        build = Path(self.get_finalized_command('build').build_temp).resolve() / 'cmake'
        stage = build / 'stage'
        modules = Path(self.build_lib) / NAME
        # CMake's cache names the environment of the last build, which pip may have removed since;
        # and a module that was deleted since must not come back from there.
        for leftover in (build, modules):
            shutil.rmtree(leftover, ignore_errors=True)

        prefix = str(ros_wheels_prefix())
        env = dict(os.environ)
        for variable in ('AMENT_PREFIX_PATH', 'CMAKE_PREFIX_PATH'):
            env[variable] = os.pathsep.join(filter(None, [prefix, env.get(variable)]))
        for arguments in (
                ['-S', str(ROOT), '-B', str(build), '-G', 'Ninja', '-DCMAKE_BUILD_TYPE=Release',
                 '-DBUILD_TESTING=OFF', f'-DCMAKE_INSTALL_PREFIX={stage}',
                 f'-DPython3_EXECUTABLE={sys.executable}'],
                ['--build', str(build)],
                ['--install', str(build)]):
            subprocess.run(['cmake', *arguments], env=env, check=True)

        installed, = stage.glob(f'lib/python3*/site-packages/{NAME}')
        shutil.copytree(installed, modules, ignore=shutil.ignore_patterns('__pycache__', '*.c'))
        self.distribution.data_files = list(data_files(stage))


class BinaryDistribution(Distribution):
    """Marks the wheel as built for one Python and one platform: it holds compiled interfaces."""

    def has_ext_modules(self) -> bool:
        """Return True although setuptools compiles nothing: CMake does."""
        return True


# Metadata beside the sources would be taken for an installed package when running from them.
METADATA = ROOT / 'build' / 'metadata'
METADATA.mkdir(parents=True, exist_ok=True)

setup(distclass=BinaryDistribution, cmdclass={'build_py': CMakeBuild},
      options={'egg_info': {'egg_base': str(METADATA.relative_to(ROOT))}})
