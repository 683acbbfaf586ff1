"""Start, stop, failure and signals of the node's process, over DDS."""
from collections.abc import Iterator
import signal
import time
from typing import Any

from diagnostic_msgs.msg import DiagnosticStatus
from lifecycle_msgs.msg import Transition
import pytest
from ros_testing import ABORTED, Client, client_of, image, NodeProcess, ros, running_node, seconds
from rosgraph_msgs.msg import Clock

from svlm_ros.srv import Ask

BASE = 1000.0
LONG = ' '.join(f'word{index}' for index in range(120))

# A node whose model takes a minute to load, as a large one does from a slow disk.
SLOW_LOAD = """
import sys, time
import svlm_ros.node.node
svlm_ros.node.node.load_engine = lambda *_: time.sleep(60)
from svlm_ros.node.main import main
sys.exit(main())
"""


@pytest.fixture(scope='module', autouse=True)
def _ros() -> Iterator[None]:
    with ros():
        yield


def reliable(namespace: str) -> dict[str, str]:
    """Return the QoS override of a test in which every image counts."""
    return {f'qos_overrides./{namespace}/front/image.subscription.reliability': 'reliable'}


@pytest.fixture(scope='module')
def node() -> Iterator[NodeProcess]:
    with running_node('lifecycle', autostart=False, cameras=['front'],
                      diagnostics_period_sec=0.2, **reliable('lifecycle')) as process:
        yield process


@pytest.fixture(scope='module')
def shared_client(node: NodeProcess) -> Iterator[Client]:
    assert node.is_running
    with client_of('lifecycle') as one:
        one.wait_for_state('unconfigured')
        yield one


@pytest.fixture
def client(node: NodeProcess, shared_client: Client) -> Iterator[Client]:
    """Return a client of an unconfigured node."""
    for state, transition in (('active', Transition.TRANSITION_DEACTIVATE),
                              ('inactive', Transition.TRANSITION_CLEANUP)):
        if shared_client.state() == state:
            assert shared_client.transition(transition)
    shared_client.forget()
    yield shared_client
    assert node.is_running


def test_services_refuse_with_a_reason_while_the_node_is_not_active(client: Client) -> None:
    response = client.ask('hello')
    assert response.error_code == Ask.Response.NOT_ACTIVE
    assert 'unconfigured' in response.error_msg
    assert not client.reset().success
    status, result = client.goal_result(client.send_goal('hello'))
    assert (status, result.error_code) == (ABORTED, result.NOT_ACTIVE)
    client.wait_until(lambda: len(client.answers) == 2, 'two answer messages')
    assert client.transition(Transition.TRANSITION_CONFIGURE)
    assert 'inactive' in client.ask('hello').error_msg


def test_the_whole_lifecycle_works_twice(client: Client) -> None:
    for _ in range(2):
        client.forget()
        assert client.transition(Transition.TRANSITION_CONFIGURE)
        assert client.transition(Transition.TRANSITION_ACTIVATE)
        assert client.show_round(BASE).round_index == 0
        assert client.transition(Transition.TRANSITION_DEACTIVATE)
        client.wait_until(lambda: client.publisher('front/image').get_subscription_count() == 0,
                          'the end of the subscription')
        assert client.transition(Transition.TRANSITION_ACTIVATE)
        client.wait_until(lambda: client.publisher('front/image').get_subscription_count() == 1,
                          'a subscription')
        assert client.show_round(BASE + 5).round_index == 5, 'it remembers what it has seen'
        assert client.transition(Transition.TRANSITION_DEACTIVATE)
        assert client.transition(Transition.TRANSITION_CLEANUP)
        client.forget_publishers()


def test_deactivation_ends_the_answers_under_way(client: Client) -> None:
    assert client.set_parameters(null_token_delay_sec=0.1)[0].successful
    assert client.transition(Transition.TRANSITION_CONFIGURE)
    assert client.transition(Transition.TRANSITION_ACTIVATE)
    client.show_round(BASE)
    feedback: list[Any] = []
    goal = client.send_goal(LONG, on_feedback=feedback.append)
    client.wait_until(lambda: feedback, 'feedback')
    assert client.transition(Transition.TRANSITION_DEACTIVATE)
    status, result = client.goal_result(goal)
    assert (status, result.error_code) == (ABORTED, result.CANCELLED)
    assert LONG.startswith(result.answer)
    assert client.transition(Transition.TRANSITION_CLEANUP)
    assert client.set_parameters(null_token_delay_sec=0.0)[0].successful


def test_a_transition_that_is_not_possible_does_not_end_the_node(
        client: Client, node: NodeProcess) -> None:
    before = len(node.log)
    request = client.change_state_client.srv_type.Request(
        transition=Transition(id=Transition.TRANSITION_ACTIVATE))
    future = client.change_state_client.call_async(request)
    node.wait_for_log('Unexpected', before)
    client.change_state_client.remove_pending_request(future)
    assert client.state() == 'unconfigured'


def test_a_model_that_cannot_be_loaded_fails_configure_and_can_be_corrected(
        client: Client, node: NodeProcess) -> None:
    assert client.set_parameters(model='/no/such/folder')[0].successful
    before = len(node.log)
    assert not client.transition(Transition.TRANSITION_CONFIGURE)
    assert client.state() == 'unconfigured'
    node.wait_for_log("cannot load model '/no/such/folder'", before)
    client.wait_until(lambda: client.engine_status()[0] == DiagnosticStatus.ERROR
                      and '/no/such/folder' in client.engine_status()[1], 'diagnostics')
    assert client.set_parameters(model='null')[0].successful
    assert client.transition(Transition.TRANSITION_CONFIGURE)
    client.wait_until(lambda: client.engine_status()[0] != DiagnosticStatus.ERROR, 'diagnostics')


def test_cameras_and_topics_that_do_not_match_are_refused(client: Client) -> None:
    [result] = client.set_parameters(cameras=['front', 'front'])
    assert not result.successful
    assert 'each name once' in result.reason
    [result] = client.set_parameters(topics=['a', 'b'])
    assert not result.successful
    assert 'one per camera' in result.reason


def test_settings_may_change_before_configure_and_are_taken(client: Client) -> None:
    assert client.set_parameters(frame_rate_hz=4.0)[0].successful
    [result] = client.set_parameters(round_duration_sec=0.3)
    assert not result.successful
    assert 'whole number of frames' in result.reason
    assert client.transition(Transition.TRANSITION_CONFIGURE)
    client.wait_until(lambda: client.model_infos and client.model_infos[-1].frame_rate == 4.0,
                      'model info')
    [result] = client.set_parameters(frame_rate_hz=2.0)
    assert not result.successful
    assert client.transition(Transition.TRANSITION_CLEANUP)
    assert client.set_parameters(frame_rate_hz=2.0)[0].successful


def test_a_subscription_that_cannot_be_made_is_reported_and_the_node_lives() -> None:
    name = 'qos_overrides./wrong/front/image.subscription.reliability'
    with (running_node('wrong', cameras=['front'], **{name: 'mostly'}) as node,
          client_of('wrong') as client):
        line = node.wait_for_log('Failed to activate')
        assert 'mostly' in line
        client.wait_for_state('unconfigured')


# Signals: each needs a process of its own.

@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_unconfigured_node_with_status_0(number: signal.Signals) -> None:
    with running_node('signal', autostart=False) as node, client_of('signal') as client:
        client.wait_for_state('unconfigured')
        assert node.stop(number) == 0


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_a_generation_ends_the_node_with_status_0_and_answers(
        number: signal.Signals) -> None:
    namespace = f'busy{number.value}'
    with running_node(namespace, cameras=['front'], null_token_delay_sec=0.1,
                      **reliable(namespace)) as node, client_of(namespace) as client:
        client.wait_for_state('active')
        client.show_round(BASE)
        feedback: list[Any] = []
        goal = client.send_goal(LONG, on_feedback=feedback.append)
        client.wait_until(lambda: feedback, 'feedback')
        future = goal.get_result_async()
        client.spin(0.2)  # the request for the result must have arrived
        for offset in (1.0, 1.5):
            client.publisher('front/image').publish(image(BASE + offset))
        client.spin(0.1)
        assert node.stop(number) == 0
        result = client.result(future, 'the result').result
        assert result.error_code == result.CANCELLED
        assert 'shutting down' in result.error_msg
        assert 'Traceback' not in node.log


def test_control_c_again_and_again_is_one_clean_end() -> None:
    with running_node('twice', cameras=['front']) as node, client_of('twice') as client:
        client.wait_for_state('active')
        while node.is_running:  # also while the interpreter is on its way out
            node.send_signal(signal.SIGINT)
            time.sleep(0.01)
        assert node.wait_for_exit() == 0
        assert 'Traceback' not in node.log


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_loaded_ends_the_node_with_status_0(
        number: signal.Signals) -> None:
    with running_node('loading', program=['-c', SLOW_LOAD]) as node:
        node.wait_for_log('Loading model')
        assert node.stop(number) == 0
        assert 'Loading was interrupted' in node.log


def test_diagnostics_are_published_while_the_model_is_loaded() -> None:
    with (running_node('waiting', program=['-c', SLOW_LOAD], diagnostics_period_sec=0.1) as node,
          client_of('waiting') as client):
        client.wait_until(lambda: client.engine_status()[1] == 'loading', 'diagnostics')
        assert node.is_running


# Time.

def test_with_simulated_time_latency_is_exact_and_a_jump_back_begins_anew() -> None:
    with (running_node('sim', cameras=['front'], use_sim_time=True, **reliable('sim')) as node,
          client_of('sim') as client):
        client.wait_for_state('active')
        clock = client.publisher('/clock', Clock)

        def set_time(second: float) -> None:
            for _ in range(10):     # best effort, and the node may be busy
                clock.publish(Clock(clock=image(second).header.stamp))
                client.spin(0.05)

        set_time(BASE + 2.5)
        assert client.show_round(BASE).latency == 2.0
        before = len(node.log)
        set_time(BASE - 100.0)
        node.wait_for_log("Stream 'front' begins anew: the clock jumped by -102.5 s", before)
        description = client.show_round(BASE + 1)
        assert description.round_index == 0
        assert seconds(description.header.stamp) == BASE + 1.5
