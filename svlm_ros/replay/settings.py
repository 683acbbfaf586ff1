"""The settings of a replay: command-line options over the node's parameter file over defaults.

Every field of StreamConfig and SamplingConfig is an option and a key. Not for: checking ranges
(see `svlm_ros.engine.config`) or declaring the node's parameters (see `svlm_ros.node`).
"""
import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, Field, fields
from pathlib import Path
import re
from typing import Any, get_args, get_type_hints

import yaml

from svlm_ros.engine.config import ConfigError, SamplingConfig, StreamConfig

# Parameters of the node that mean nothing in a replay: the bag decides about the cameras, and a
# question is answered however long that takes.
NODE_ONLY = frozenset({
    'autostart', 'cameras', 'topics', 'image_transport', 'silence_timeout_sec', 'publish_silence',
    'ask_timeout_sec', 'diagnostics_period_sec', 'max_question_length', 'null_token_delay_sec',
    'use_sim_time', 'qos_overrides'})
ENGINE_KEYS = ('model', 'device', 'dtype')


@dataclass(frozen=True)
class Settings:
    """What to load and what each stream retains."""

    model: str
    device: str
    dtype: str
    stream: StreamConfig


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per setting; an option that is not given leaves no trace."""
    parser.add_argument('--model', default=argparse.SUPPRESS, metavar='NAME',
                        help='checkpoint: a path or hub name; `random` (default) is untrained; '
                             '`null` is no model at all')
    parser.add_argument('--device', default=argparse.SUPPRESS,
                        help='torch device; `auto` (default) takes a GPU if there is one')
    parser.add_argument('--dtype', default=argparse.SUPPRESS,
                        choices=('auto', 'float32', 'bfloat16'), help='of the weights')
    group = parser.add_argument_group('settings of the streams')
    for kind, field in _setting_fields():
        hint = get_type_hints(kind)[field.name]
        option = '--' + field.name.replace('_', '-')
        text = f'{_help_text(kind, field.name)} Default: {field.default!r}'.replace('%', '%%')
        if hint is bool:
            group.add_argument(option, action=argparse.BooleanOptionalAction, help=text,
                               default=argparse.SUPPRESS)
        elif get_args(hint) and all(isinstance(choice, str) for choice in get_args(hint)):
            group.add_argument(option, choices=get_args(hint), help=text,
                               default=argparse.SUPPRESS)
        else:
            optional = type(None) in get_args(hint)
            group.add_argument(option, type=_optional_int if optional else hint, help=text,
                               metavar='N' if hint is not str else 'TEXT',
                               default=argparse.SUPPRESS)


def settings_from(options: Mapping[str, Any], params: Path | None) -> Settings:
    """Return the settings: `options` over the file `params` over the defaults.

    :param options: what was given on the command line; other keys are ignored.
    :raises ConfigError: a setting is unknown or out of range, or the file cannot be read.
    """
    values = load_parameters(params) if params is not None else {}
    names = [*ENGINE_KEYS, *(field.name for _, field in _setting_fields())]
    unknown = sorted(name for name in set(values) - set(names)
                     if name.split('.')[0] not in NODE_ONLY)
    if unknown:
        raise ConfigError(f'{params} sets {unknown[0]!r}; expected one of: {", ".join(names)}')
    values.update({name: options[name] for name in names if name in options})
    sampling = SamplingConfig(**_pick(SamplingConfig, values))
    try:
        return Settings(model=str(values.get('model', 'random')),
                        device=str(values.get('device', 'auto')),
                        dtype=str(values.get('dtype', 'auto')),
                        stream=StreamConfig(sampling=sampling, **_pick(StreamConfig, values)))
    except TypeError as error:
        raise ConfigError(f'a setting has the wrong type: {error}') from error


def load_parameters(path: Path) -> dict[str, Any]:
    """Return the parameters that a ROS parameter file sets for the node `svlm`.

    Sections apply as in ROS: `/**` to every node, then those that name the node.

    :raises ConfigError: the file cannot be read or is not a parameter file.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'cannot read the parameters {path}: {error}') from error
    except yaml.YAMLError as error:
        raise ConfigError(f'the parameters {path} are not YAML: '
                          f'{" ".join(str(error).split())}') from error
    sections = content if isinstance(content, dict) else {}
    values: dict[str, Any] = {}
    found = False
    for node in sorted(sections, key=lambda name: '*' not in str(name)):
        parameters = (sections[node] or {}).get('ros__parameters') \
            if isinstance(sections[node], dict | None) else None
        if isinstance(parameters, dict) and str(node).split('/')[-1] in ('*', '**', 'svlm'):
            values.update(parameters)
            found = True
    if not found:
        raise ConfigError(f'the parameters {path} have no section for the node; expected '
                          '`/**:` with `ros__parameters:` below it')
    return values


def _setting_fields() -> Iterator[tuple[type, Field[Any]]]:
    for kind in (StreamConfig, SamplingConfig):
        for field in fields(kind):
            if field.name != 'sampling':
                yield kind, field


def _pick(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of one configuration class; whole numbers may stand for floats in YAML."""
    hints = get_type_hints(kind)
    picked = {}
    for field in fields(kind):
        if field.name not in values:
            continue
        value, hint = values[field.name], hints[field.name]
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        allowed = get_args(hint) or (hint,)
        kinds = tuple(type(choice) if isinstance(choice, str) else choice for choice in allowed)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f'{field.name} is {value!r}; expected '
                              f'{" or ".join(sorted({kind.__name__ for kind in kinds}))}')
        picked[field.name] = value
    return picked


def _help_text(kind: type, name: str) -> str:
    """Return what the docstring of a configuration class says about one of its fields."""
    found = re.search(rf':param {name}:(.*?)(?=\n\s*:param|\n\s*\n|\Z)', kind.__doc__ or '', re.S)
    return ' '.join(found.group(1).split()) if found else ''


def _optional_int(text: str) -> int | None:
    return None if text.lower() == 'none' else int(text)
