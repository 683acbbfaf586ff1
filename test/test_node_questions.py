"""Questions by service, action and command line: over DDS, with the node in its own process."""
from collections.abc import Iterator
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from ros_testing import (
    ABORTED,
    CANCELED,
    Client,
    client_of,
    image,
    NodeProcess,
    PATIENCE_SEC,
    ROOT,
    ros,
    running_node,
    seconds,
    SUCCEEDED,
)

from svlm_ros.msg import Answer
from svlm_ros.srv import Ask

NAMESPACE = 'questions'
BASE = 1000.0
LONG = ' '.join(f'word{index}' for index in range(120))


@pytest.fixture(scope='module', autouse=True)
def _ros() -> Iterator[None]:
    with ros():
        yield


@pytest.fixture(scope='module')
def node() -> Iterator[NodeProcess]:
    """Run a node that needs 0.1 s per token, so 0.4 s per round and 12 s for `LONG`."""
    with running_node(
            NAMESPACE, cameras=['front'], null_token_delay_sec=0.1, max_questions=2,
            **{f'qos_overrides./{NAMESPACE}/front/image.subscription.reliability': 'reliable'},
    ) as process:
        yield process


@pytest.fixture(scope='module')
def shared_client(node: NodeProcess) -> Iterator[Client]:
    assert node.is_running
    with client_of(NAMESPACE) as one:
        one.wait_for_state('active')
        one.publisher('front/image')
        yield one


@pytest.fixture
def client(node: NodeProcess, shared_client: Client) -> Iterator[Client]:
    """Return a client of a stream that has shown one round, at `BASE`."""
    assert shared_client.reset().success
    shared_client.show_round(BASE)
    shared_client.forget()
    yield shared_client
    assert node.is_running


def test_the_service_answers_about_the_newest_frame(client: Client) -> None:
    response = client.ask('is it there')
    assert response.error_code == Ask.Response.NONE, response.error_msg
    assert response.error_msg == ''
    assert response.answer == 'is it there'
    assert response.stream == 'front'
    assert seconds(response.header.stamp) == BASE + 0.5
    assert response.header.frame_id == 'front_optical'
    assert response.confidence == 1.0


def test_every_question_gives_one_answer_message_with_a_number_of_its_own(client: Client) -> None:
    client.ask('one')
    client.ask('', 'front')
    client.goal_result(client.send_goal('two words'))
    client.wait_until(lambda: len(client.answers) == 3, 'three answers')
    client.spin(0.2)
    assert [answer.question for answer in client.answers] == ['one', '', 'two words']
    assert [answer.error_code for answer in client.answers] == [
        Answer.NONE, Answer.INVALID_QUESTION, Answer.NONE]
    first = client.answers[0].question_id
    assert [answer.question_id for answer in client.answers] == [first, first + 1, first + 2]
    assert client.answers[2].tokens == 2
    assert client.answers[2].latency > 0.0


def test_a_question_during_a_description_leaves_both_whole(client: Client) -> None:
    for offset in (1.0, 1.5):
        client.publisher('front/image').publish(image(BASE + offset))
    response = client.ask('what now')
    assert response.answer == 'what now'
    client.wait_until(lambda: client.descriptions, 'the description')
    assert client.descriptions[0].text == '2 frames of 64x48'
    assert client.descriptions[0].round_index == 1


def test_the_action_streams_its_tokens_as_feedback(client: Client) -> None:
    feedback: list[Any] = []
    goal = client.send_goal('is the door open', on_feedback=feedback.append)
    status, result = client.goal_result(goal)
    assert status == SUCCEEDED
    assert result.error_code == result.NONE
    assert result.tokens == 4
    client.wait_until(lambda: len(feedback) == 4, 'four feedback messages')
    assert ''.join(one.feedback.text for one in feedback) == result.answer == 'is the door open'
    assert [one.feedback.tokens for one in feedback] == [1, 2, 3, 4]


def test_the_action_keeps_to_its_token_limit(client: Client) -> None:
    _, result = client.goal_result(client.send_goal('one two three four', max_tokens=2))
    assert (result.answer, result.tokens) == ('one two', 2)


def test_a_cancel_stops_the_answer_and_returns_what_was_said(client: Client) -> None:
    feedback: list[Any] = []
    goal = client.send_goal(LONG, on_feedback=feedback.append)
    client.wait_until(lambda: len(feedback) >= 3, 'feedback')
    client.result(goal.cancel_goal_async(), 'the response to the cancel')
    said_at_cancel = feedback[-1].feedback.tokens
    status, result = client.goal_result(goal)
    assert status == CANCELED
    assert result.error_code == result.CANCELLED
    assert LONG.startswith(result.answer)
    # One more token, and one that was on its way to this process.
    assert result.tokens <= said_at_cancel + 2
    client.spin(0.3)
    assert feedback[-1].feedback.tokens == result.tokens, 'no words after the result'
    assert client.ask('free again').answer == 'free again'


def test_several_goals_are_answered_at_once_and_one_too_many_is_refused(client: Client) -> None:
    first, second = client.send_goal(LONG), client.send_goal('a b c')
    busy, refused = client.goal_result(client.send_goal('too many'))
    assert (busy, refused.error_code) == (ABORTED, refused.BUSY)
    status, result = client.goal_result(second)
    assert (status, result.answer) == (SUCCEEDED, 'a b c')
    client.result(first.cancel_goal_async(), 'the response to the cancel')
    assert client.goal_result(first)[0] == CANCELED


def test_services_wait_side_by_side(client: Client) -> None:
    futures = [client.ask_client.call_async(Ask.Request(question=text)) for text in (
        'a b c d e f', 'a b')]
    assert [client.result(one, 'a response').answer for one in futures] == ['a b c d e f', 'a b']
    client.wait_until(lambda: len(client.answers) == 2, 'two answers')
    assert [one.question for one in client.answers] == ['a b', 'a b c d e f'], 'the shorter first'


def test_the_service_gives_up_in_time_and_returns_what_was_said(client: Client) -> None:
    assert client.set_parameters(ask_timeout_sec=0.5)[0].successful
    response = client.ask(LONG)
    assert client.set_parameters(ask_timeout_sec=30.0)[0].successful
    assert response.error_code == Ask.Response.TIMEOUT
    assert 'ask_timeout_sec' in response.error_msg
    assert LONG.startswith(response.answer)
    client.wait_until(lambda: client.answers, 'an answer message')
    assert client.answers[0].error_code == Answer.TIMEOUT
    assert client.ask('and again').error_code == Ask.Response.NONE


@pytest.mark.parametrize(('question', 'stream', 'code', 'reason'), [
    ('', 'front', Ask.Response.INVALID_QUESTION, 'empty'),
    (' \n', '', Ask.Response.INVALID_QUESTION, 'empty'),
    ('hello', 'side', Ask.Response.UNKNOWN_STREAM, 'front'),
])
def test_a_question_that_cannot_be_asked_is_refused_with_the_reason(
        client: Client, node: NodeProcess, question: str, stream: str, code: int,
        reason: str) -> None:
    before = len(node.log)
    response = client.ask(question, stream)
    assert response.error_code == code
    assert reason in response.error_msg
    assert response.error_msg in node.wait_for_log(response.error_msg, before)
    client.wait_until(lambda: response.error_msg in client.engine_status()[1], 'diagnostics')


def test_a_question_of_a_megabyte_is_refused_and_not_repeated(
        client: Client, node: NodeProcess) -> None:
    before = len(node.log)
    response = client.ask('why ' * 2 ** 18)
    assert response.error_code == Ask.Response.INVALID_QUESTION
    assert '1048576 characters' in response.error_msg
    assert 'max_question_length' in response.error_msg
    client.wait_until(lambda: client.answers, 'an answer message')
    assert len(client.answers[0].question) < 2000
    assert len(node.log) - before < 4000


def test_a_question_before_the_first_round_is_refused(client: Client) -> None:
    assert client.reset().success
    client.wait_until(lambda: client.ask('hello').error_code == Ask.Response.NO_FRAMES,
                      'the refusal')


def test_a_reset_ends_the_answers_under_way(client: Client) -> None:
    feedback: list[Any] = []
    goal = client.send_goal(LONG, on_feedback=feedback.append)
    client.wait_until(lambda: feedback, 'feedback')
    client.reset()
    status, result = client.goal_result(goal)
    assert (status, result.error_code) == (ABORTED, result.STREAM_RESET)


def test_disabling_ends_the_answers_under_way_and_refuses_new_ones(client: Client) -> None:
    feedback: list[Any] = []
    goal = client.send_goal(LONG, on_feedback=feedback.append)
    client.wait_until(lambda: feedback, 'feedback')
    client.set_enabled(False)
    status, result = client.goal_result(goal)
    assert (status, result.error_code) == (ABORTED, result.CANCELLED)
    assert 'disabled' in result.error_msg
    response = client.ask('hello')
    assert response.error_code == Ask.Response.NOT_ACTIVE
    assert 'set_enabled' in response.error_msg
    client.set_enabled(True)
    client.wait_until(lambda: client.publisher('front/image').get_subscription_count() == 1,
                      'a subscription')


# The command line.

def svlm_ask(*arguments: str, node: str = f'/{NAMESPACE}/svlm') -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, '-m', 'svlm_ros.node.ask', '--node', node, *arguments], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONUNBUFFERED': '1'})


@pytest.mark.parametrize('how', [[], ['--stream'], ['--service']])
def test_the_command_line_prints_the_answer(client: Client, how: list[str]) -> None:
    assert client.ask_client.service_is_ready()
    process = svlm_ask(*how, 'is the door open', '--wait', '20')
    out, err = process.communicate(timeout=2 * PATIENCE_SEC)
    assert (process.returncode, out, err) == (0, 'is the door open\n', '')


def test_control_c_on_the_command_line_cancels_the_answer(client: Client) -> None:
    process = svlm_ask('--stream', LONG, '--wait', '20')
    assert process.stdout is not None
    assert process.stdout.read(5) == 'word0'
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SEC)
    assert process.returncode == 130
    assert 'word119' not in out
    assert 'CANCELLED' in err
    client.wait_until(lambda: client.answers, 'the answer message')
    assert client.answers[0].error_code == Answer.CANCELLED


def test_the_command_line_says_why_a_question_failed(client: Client) -> None:
    assert client.ask_client.service_is_ready()
    process = svlm_ask('hello', '--camera', 'side', '--wait', '20')
    _, err = process.communicate(timeout=2 * PATIENCE_SEC)
    assert process.returncode == 1
    assert err.startswith('svlm-ask: UNKNOWN_STREAM: ')


def test_the_command_line_says_that_no_node_is_there() -> None:
    process = svlm_ask('hello', '--wait', '0.3', node='/nowhere')
    _, err = process.communicate(timeout=2 * PATIENCE_SEC)
    assert process.returncode == 3
    assert 'no node /nowhere' in err
