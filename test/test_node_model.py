"""The whole path with a model: images over DDS in, words of the streaming engine out."""
from collections.abc import Iterator

import pytest

pytest.importorskip('rclpy')
pytest.importorskip('torch')
from ros_testing import (
    CANCELED,
    Client,
    client_of,
    NodeProcess,
    ros,
    running_node,
    seconds,
    SUCCEEDED,
)

from svlm_ros.action import AnswerQuestion
from svlm_ros.msg import Answer

INSTRUCTION = 'Say what moves.'


@pytest.fixture(scope='module')
def node() -> Iterator[NodeProcess]:
    with running_node('seeing', model='random', cameras=['front'], max_new_tokens=6,
                      vision_rounds=3, text_rounds=3, max_answer_tokens=2000, max_questions=4,
                      max_question_tokens=64, temperature=1.0, instruction=INSTRUCTION,
                      ask_timeout_sec=60.0, **{
                          'qos_overrides./seeing/front/image.subscription.reliability': 'reliable',
                      }) as process:
        yield process


@pytest.fixture(scope='module')
def client(node: NodeProcess) -> Iterator[Client]:
    assert node.is_running
    with ros(), client_of('seeing') as one:
        one.wait_for_state('active')
        yield one


def test_every_round_is_described_in_words_with_its_stamps(client: Client) -> None:
    for second in range(100, 106):
        description = client.show_round(second)
        assert description.round_index == second - 100
        assert seconds(description.header.stamp) == second + 0.5
        assert seconds(description.oldest_stamp) == second
        assert description.text and not description.silent
        assert 0.0 < description.confidence < 1.0
        assert description.frames_used == 2
    texts = [description.text for description in client.descriptions]
    assert len(set(texts)) > 1


def test_model_info_says_what_runs(client: Client) -> None:
    client.wait_until(lambda: client.model_infos, 'model info')
    info = client.model_infos[-1]
    assert info.random_weights and info.architecture == 'Qwen2_5_VLForConditionalGeneration'
    assert info.parameters > 1_000_000 and info.cache_tokens > 0 and info.cache_bytes > 0
    assert (info.instruction, info.vision_rounds, list(info.streams)) == (
        INSTRUCTION, 3, ['front'])


def test_the_cache_fills_and_shows_in_diagnostics(client: Client) -> None:
    client.show_round(107)
    client.wait_until(
        lambda: float(client.camera_status('front')[2].get('cache fill (%)', 0)) > 1.0,
        'the fill of the cache')
    assert client.engine_status()[2]['device'] == 'cpu'


def test_a_cancelled_answer_stops_while_descriptions_go_on(client: Client) -> None:
    feedback = []
    goal = client.send_goal('what happened?', on_feedback=feedback.append)
    client.wait_until(lambda: len(feedback) > 3, 'feedback')
    client.show_round(109)
    client.result(goal.cancel_goal_async(), 'the cancel')
    status, result = client.goal_result(goal)
    assert status == CANCELED
    assert result.error_code == AnswerQuestion.Result.CANCELLED
    assert 3 < result.tokens < 2000
    said = ''.join(message.feedback.text for message in feedback)
    assert said and result.answer.startswith(said[:20])


def test_the_action_and_the_service_answer_in_words(client: Client) -> None:
    feedback = []
    goal = client.send_goal('what is it?', max_tokens=5, on_feedback=feedback.append)
    status, result = client.goal_result(goal)
    assert status == SUCCEEDED
    assert result.answer == ''.join(message.feedback.text for message in feedback)
    assert 1 <= result.tokens <= 5 and 0.0 < result.confidence <= 1.0


@pytest.mark.parametrize(('question', 'reason'), [
    ('robot ' * 150, 'at most 64 fit'), ('x' * 1_000_000, 'max_question_length')])
def test_a_question_that_is_too_long_is_refused(client: Client, question: str,
                                                reason: str) -> None:
    response = client.ask(question)
    assert response.error_code == Answer.INVALID_QUESTION
    assert reason in response.error_msg


def test_an_instruction_with_too_many_tokens_is_taken_back(client: Client,
                                                          node: NodeProcess) -> None:
    [result] = client.set_parameters(instruction='Tell me about the robot. ' * 40)
    assert result.successful        # its characters are fine; the engine counts tokens
    node.wait_for_log('Instruction refused: the instruction has')
    node.wait_for_log(f'Instruction: {INSTRUCTION}')
    assert client.model_infos[-1].instruction == INSTRUCTION
    client.show_round(111)


def test_a_loop_begins_anew_and_says_the_same(client: Client) -> None:
    client.reset()
    client.forget()
    first = [client.show_round(second).text for second in range(300, 303)]
    again = [client.show_round(second) for second in range(200, 203)]
    assert [description.round_index for description in again] == [0, 1, 2]
    assert [description.text for description in again] == first
