"""The package as installed: one version everywhere, complete interfaces, programs that exist.

Not for: what the node, the engine or replay do.
"""
import ast
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
import os
from pathlib import Path
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

import svlm_ros
from svlm_ros.engine.updates import ErrorCode

ROOT = Path(__file__).resolve().parent.parent
INTERFACES = sorted(path.relative_to(ROOT) for kind in ('msg', 'srv', 'action')
                    for path in (ROOT / kind).glob(f'*.{kind}'))
SCRIPTS = sorted((ROOT / 'scripts').iterdir())


def interface_type(path: Path) -> type:
    return getattr(import_module(f'svlm_ros.{path.parent}'), path.stem)


def test_the_version_is_the_same_everywhere():
    package = ElementTree.parse(ROOT / 'package.xml').findtext('version')
    assert package == svlm_ros.__version__
    # The newest entry is of this version, or not released yet.
    newest = re.search(r'^(.+)\n-+$', (ROOT / 'CHANGELOG.rst').read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == 'Forthcoming' or newest[1].split()[0] == package


@pytest.mark.parametrize('path', INTERFACES, ids=str)
def test_every_interface_file_is_built_with_the_fields_it_has_now(path):
    """A stale build would pass all other tests and fail on the wire."""
    declared = []
    for section in (ROOT / path).read_text().split('\n---'):
        lines = (line.split('#')[0].split() for line in section.splitlines())
        declared.append([words[1] for words in lines if len(words) == 2 and '=' not in words[1]])
    built = interface_type(path)
    parts = {'msg': ('',), 'srv': ('Request', 'Response'),
             'action': ('Goal', 'Result', 'Feedback')}[str(path.parent)]
    types = [getattr(built, part) if part else built for part in parts]
    assert [list(each.get_fields_and_field_types()) for each in types] == declared


@pytest.mark.parametrize(('module', 'path'), [
    ('msg', ('Answer',)), ('srv', ('Ask', 'Response')), ('action', ('AnswerQuestion', 'Result'))])
def test_error_codes_are_the_same_in_interfaces_and_engine(module, path):
    target = import_module(f'svlm_ros.{module}')
    for name in path:
        target = getattr(target, name)
    assert {code.name: getattr(target, code.name) for code in ErrorCode} == {
        code.name: code.value for code in ErrorCode}


def test_no_interface_knows_an_error_code_that_the_engine_does_not():
    constant = re.compile(r'^uint16 (\w+)=(\d+)', re.MULTILINE)
    for path in INTERFACES:
        declared = {name: int(value) for name, value in
                    constant.findall((ROOT / path).read_text())}
        if declared:
            assert declared == {code.name: code.value for code in ErrorCode}, path


def test_every_console_program_exists():
    programs = [entry for entry in entry_points(group='console_scripts')
                if entry.module.startswith('svlm_ros.')]
    if not programs:
        pytest.skip('installed by colcon, which makes no console programs')
    for program in programs:
        assert callable(program.load()), program.name


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda path: path.name)
def test_every_script_for_ros_can_be_executed_and_calls_an_existing_function(script):
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith('#!/usr/bin/env python3\n')
    imported = [node for node in ast.walk(ast.parse(script.read_text()))
                if isinstance(node, ast.ImportFrom)]
    (statement,) = imported
    assert statement.module is not None
    for alias in statement.names:
        assert callable(getattr(import_module(statement.module), alias.name))


def test_every_script_for_ros_is_installed():
    cmake = (ROOT / 'CMakeLists.txt').read_text()
    assert sorted(re.findall(r'^  scripts/(\S+)$', cmake, re.MULTILINE)) == [
        script.name for script in SCRIPTS]


@pytest.mark.parametrize('module', [
    'svlm_ros.engine.worker', 'svlm_ros.engine.null', 'svlm_ros.node.main', 'svlm_ros.node.ask',
    'svlm_ros.replay.player', 'svlm_ros.msg'])
def test_a_program_without_a_model_does_not_load_torch(module):
    loaded = modules_after_importing(module)
    assert 'torch' not in loaded
    assert 'transformers' not in loaded


@pytest.mark.parametrize('path', sorted((ROOT / 'svlm_ros' / 'engine').glob('*.py')),
                         ids=lambda path: path.stem)
def test_the_engine_never_imports_ros(path):
    ros = re.compile(r'(rclpy|\w+_msgs|svlm_ros\.(node|msg|srv|action))\b')
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module or ''] if isinstance(node, ast.ImportFrom) else [])
        assert not [name for name in names if ros.match(name)]


@pytest.mark.parametrize('path', sorted((ROOT / 'svlm_ros' / 'node').glob('*.py')),
                         ids=lambda path: path.stem)
def test_the_node_never_touches_tensors(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                 else [node.module or ''] if isinstance(node, ast.ImportFrom) else [])
        assert not [name for name in names if name.split('.')[0] in ('torch', 'transformers')]


def modules_after_importing(module: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after importing `module`."""
    assert find_spec(module) is not None, module
    code = f'import sys, {module}; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT,
                          check=True, timeout=120)
    return set(done.stdout.split())
