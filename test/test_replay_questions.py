"""The file of questions of a replay: what is accepted, and how mistakes are explained."""
from pathlib import Path

import pytest

from svlm_ros.replay.questions import load_questions, Question, QuestionError

START_NS, END_NS = 1_000_000_000, 11_000_000_000


def load(tmp_path: Path, text: str, *streams: str) -> list[Question]:
    path = tmp_path / 'questions.yaml'
    path.write_text(text, encoding='utf-8')
    return load_questions(path, START_NS, END_NS, streams or ('front',))


def test_questions_are_sorted_and_numbered_by_time(tmp_path: Path) -> None:
    assert load(tmp_path, """
        - {time: 10, question: 'Last?', max_tokens: 7}
        - {time: 0.5, question: 'First?', stream: front}
        """) == [Question(1, 1_500_000_000, 'First?', 'front'),
                 Question(2, 11_000_000_000, 'Last?', 'front', 7)]


def test_no_questions_are_fine(tmp_path: Path) -> None:
    assert load(tmp_path, '[]') == []


@pytest.mark.parametrize(('text', 'reason'), [
    ('', 'are empty; expected a list'),
    ('time: 1', 'are a dict; expected a list'),
    ('[{time: 1, question: a?}', 'are not YAML'),
    ('[who]', 'question 1 in .* is a str; expected'),
    ('[{time: 1, question: a}, {time: 1}]', 'question 2 .* question is None; expected text'),
    ("[{time: 1, question: ' '}]", "question is ' '; expected text"),
    ('[{question: a}]', 'time is None; expected seconds'),
    ("[{time: '1', question: a}]", "time is '1'; expected seconds"),
    ('[{time: true, question: a}]', 'time is True; expected seconds'),
    ('[{time: .nan, question: a}]', 'time is nan; expected seconds'),
    ('[{time: -1, question: a}]', 'time is -1 s; expected 0 to 10'),
    ('[{time: 10.1, question: a}]', 'time is 10.1 s; expected 0 to 10'),
    ('[{time: 1, question: a, camera: front}]', "unknown key 'camera'"),
    ('[{time: 1, question: a, stream: back}]', "stream is 'back'; expected one of: front"),
    ('[{time: 1, question: a, max_tokens: 0}]', 'max_tokens is 0; expected a whole number'),
    ('[{time: 1, question: a, max_tokens: 1.5}]', 'max_tokens is 1.5; expected a whole number'),
])
def test_a_mistake_is_explained(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(QuestionError, match=reason):
        load(tmp_path, text)


def test_a_question_must_name_its_stream_where_there_are_several(tmp_path: Path) -> None:
    with pytest.raises(QuestionError, match='names no stream, but there are several: left, right'):
        load(tmp_path, '[{time: 1, question: a}]', 'left', 'right')


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / 'questions.yaml'
    path.write_bytes(b'\xff\xfe\x00')
    with pytest.raises(QuestionError, match='cannot read the questions'):
        load_questions(path, START_NS, END_NS, ['front'])
