"""Reads the questions that a replay asks, and when, from a YAML file.

    - {time: 4.0, question: 'What is on the table?'}
    - {time: 8.5, question: 'Is the door open?', stream: head_camera, max_tokens: 5}

Not for: asking them (see session.py).
"""
from collections.abc import Collection
from dataclasses import dataclass
import math
from pathlib import Path
from typing import Any

import yaml

from svlm_ros.messages import NANOSECONDS

KEYS = ('time', 'question', 'stream', 'max_tokens')


class QuestionError(ValueError):
    """The file of questions is wrong; says which entry, what was given and what is expected."""


@dataclass(frozen=True)
class Question:
    """One question of a replay.

    :param id: counts from 1 in the order of asking.
    :param log_ns: bag time at which it is asked.
    :param max_tokens: limit of its answer; None takes the setting `max_answer_tokens`.
    """

    id: int
    log_ns: int
    text: str
    stream: str
    max_tokens: int | None = None


def load_questions(path: Path, start_ns: int, end_ns: int,
                   streams: Collection[str]) -> list[Question]:
    """Return the questions of a file in the order in which they are asked.

    :param start_ns: bag time of the bag's first message.
    :param end_ns: of its last.
    :raises QuestionError: the file cannot be read or an entry is wrong.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (OSError, UnicodeDecodeError) as error:
        raise QuestionError(f'cannot read the questions {path}: {error}') from error
    except yaml.YAMLError as error:
        reason = ' '.join(str(error).split())
        raise QuestionError(f'the questions {path} are not YAML: {reason}') from error
    if not isinstance(content, list):
        raise QuestionError(f'the questions {path} are {_kind(content)}; expected a list of '
                            '{time: SECONDS, question: TEXT}')
    checked = []
    for number, entry in enumerate(content, 1):
        try:
            checked.append(_check(entry, start_ns, end_ns, streams))
        except QuestionError as error:
            raise QuestionError(f'question {number} in {path}: {error}') from None
    checked.sort(key=lambda entry: entry['log_ns'])
    return [Question(id=index, **entry) for index, entry in enumerate(checked, 1)]


def _check(entry: Any, start_ns: int, end_ns: int, streams: Collection[str]) -> dict[str, Any]:
    """Return the fields of a Question, less its id."""
    if not isinstance(entry, dict):
        raise QuestionError(f'is {_kind(entry)}; expected {{time: SECONDS, question: TEXT}}')
    unknown = [str(key) for key in entry if key not in KEYS]
    if unknown:
        raise QuestionError(f'has the unknown key {unknown[0]!r}; expected {", ".join(KEYS)}')
    seconds, text = entry.get('time'), entry.get('question')
    length = (end_ns - start_ns) / NANOSECONDS
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) \
            or not math.isfinite(seconds):
        raise QuestionError(f'time is {seconds!r}; expected seconds from the beginning of the bag')
    log_ns = start_ns + round(seconds * NANOSECONDS)
    if not start_ns <= log_ns <= end_ns:
        raise QuestionError(f'time is {seconds} s; expected 0 to {length:g}, the length of '
                            'the bag')
    if not isinstance(text, str) or not text.strip():
        raise QuestionError(f'question is {text!r}; expected text')
    stream = entry.get('stream')
    if stream is None:
        if len(streams) > 1:
            raise QuestionError(f'names no stream, but there are several: {", ".join(streams)}')
        stream = next(iter(streams))
    elif stream not in streams:
        raise QuestionError(f'stream is {stream!r}; expected one of: {", ".join(streams)}')
    limit = entry.get('max_tokens')
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise QuestionError(f'max_tokens is {limit!r}; expected a whole number of at least 1')
    return {'log_ns': log_ns, 'text': text, 'stream': stream, 'max_tokens': limit}


def _kind(value: Any) -> str:
    return 'empty' if value is None else f'a {type(value).__name__}'
