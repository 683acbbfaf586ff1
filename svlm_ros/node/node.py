"""The lifecycle node: parameters, cameras, questions and diagnostics around one engine worker.

Everything here runs in the executor thread and returns at once; only `configure` waits, for the
model. Not for: tensors (see `svlm_ros.engine`) or starting a process (see main.py).
"""
from collections.abc import Callable
from dataclasses import replace
import time
import traceback

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold, TimeJump
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile
from rclpy.timer import Timer
from std_srvs.srv import SetBool, Trigger

from svlm_ros.engine.load import load_engine
from svlm_ros.engine.updates import EngineError, ErrorCode
from svlm_ros.engine.worker import (
    Answered,
    AnswerProgress,
    Described,
    EngineDied,
    EngineInfo,
    Event,
    InstructionChanged,
    InstructionRefused,
    Loaded,
    LoadFailed,
    QuestionFailed,
    STAMPS_JUMPED_BACK,
    StreamFailed,
    StreamRestarted,
    Worker,
)
from svlm_ros.msg import Description, ModelInfo
from svlm_ros.node.cameras import Camera
from svlm_ros.node.diagnostics import diagnostic_array, EngineHealth, Failures
from svlm_ros.node.events import EventQueue
from svlm_ros.node.messages import description_message, model_info_message
from svlm_ros.node.parameters import (
    check_changes,
    declare_parameters,
    read_settings,
)
from svlm_ros.node.questions import Limits, Questions

NODE_NAME = 'svlm'

LOAD_POLL_SEC = 0.05
LOAD_LOG_PERIOD_SEC = 5.0
SILENCE_CHECK_SEC = 0.25

# Simulated time never runs backwards by itself: a bag was started again.
CLOCK_JUMP_SEC = 0.1

# A token of a large model takes far less; launch sends SIGKILL 10 s after the first SIGINT.
STOP_TIMEOUT_SEC = 4.0


class SvlmNode(LifecycleNode):
    """Watches cameras with a streaming vision-language model and answers questions.

    :param interrupted: says whether the process is to end; `configure` stops waiting then.
    :raises ConfigError: a parameter given at start-up is not allowed.
    """

    def __init__(self, interrupted: Callable[[], bool] = lambda: False,
                 name: str = NODE_NAME) -> None:
        super().__init__(name)
        self._interrupted = interrupted
        self._settings = declare_parameters(self)
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._failures = Failures(self.get_logger())
        self._worker: Worker | None = None
        self._ending: list[Worker] = []
        self._engine_info: EngineInfo | None = None
        self._instruction = ''
        self._load_failure = ''
        self._cameras: dict[str, Camera] = {}
        self._active = False
        self._enabled = True
        self._finalized = False
        self._events_dropped = 0

        self._guard = self.create_guard_condition(self._on_events)
        self._events = EventQueue(self._guard.trigger)
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._descriptions = self.create_lifecycle_publisher(Description, '~/description', 10)
        self._model_info = self.create_publisher(ModelInfo, '~/model_info', latched)
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', 10)
        self._questions = Questions(self, self._running_worker, self._limits,
                                    lambda: self._settings.ask_timeout_sec, self._failures.report)
        self.create_service(Trigger, '~/reset', self._on_reset)
        self.create_service(SetBool, '~/set_enabled', self._on_set_enabled)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        # Parameters change after their callback has returned; Humble has no callback for that.
        self._parameters_changed = self.create_guard_condition(self._apply_parameters)
        self._diagnostics_timer = self._start_diagnostics()
        self.create_timer(SILENCE_CHECK_SEC, self._check_silence, clock=self._steady)
        self._jump_handle = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(seconds=-CLOCK_JUMP_SEC),
                          on_clock_change=True),
            post_callback=self._on_clock_jump)
        self._autostart_timer: Timer | None = None
        if self._settings.autostart:
            self._autostart_timer = self.create_timer(0.0, self._autostart, clock=self._steady)

    # Lifecycle.

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model; wait for it without becoming deaf to signals."""
        return self._guarded('configure', self._configure, super().on_configure, state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Begin to watch the cameras."""
        return self._guarded('activate', self._activate, super().on_activate, state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop watching and cancel questions; keep the model and what it has seen."""
        return self._guarded('deactivate', self._deactivate, super().on_deactivate, state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model."""
        return self._guarded('clean up', self._release, super().on_cleanup, state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model for good."""
        self._finalized = True
        return self._guarded('shut down', self._release, super().on_shutdown, state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free what is left after an unexpected failure, so that `configure` works again."""
        self._release()
        return super().on_error(state)

    def report_unexpected(self, error: Exception) -> None:
        """Take note of an exception that came out of a callback; the node goes on."""
        self.get_logger().error(''.join(traceback.format_exception(error)))
        self._failures.report(f'Unexpected {type(error).__name__}: {error}')

    def stop(self) -> bool:
        """End questions, cameras and engine; the node can be destroyed afterwards.

        :return: whether every engine thread has ended (a load cannot be interrupted).
        """
        self._release('the node is shutting down')
        self._ending = [worker for worker in self._ending if not worker.stop(0.0)]
        return not self._ending

    def destroy_node(self) -> None:
        """Destroy the node and what rclpy does not destroy with it."""
        self._jump_handle.unregister()
        self._questions.destroy()
        super().destroy_node()

    @property
    def questions_under_way(self) -> int:
        """Number of questions that are being answered."""
        return self._questions.under_way

    def _guarded(self, what: str, work: Callable[[], object],
                 base: Callable[[LifecycleState], TransitionCallbackReturn],
                 state: LifecycleState) -> TransitionCallbackReturn:
        """Run a transition; rclpy would swallow an exception and its reason."""
        try:
            if work() is False:
                return TransitionCallbackReturn.FAILURE
            return base(state)
        except Exception as error:  # noqa: BLE001  reported here, and on_error cleans up
            self.get_logger().debug(traceback.format_exc())
            self._failures.report(f'Failed to {what}: {type(error).__name__}: {error}')
            return TransitionCallbackReturn.ERROR

    def _autostart(self) -> None:
        assert self._autostart_timer is not None
        self.destroy_timer(self._autostart_timer)
        self._autostart_timer = None
        if self._worker is not None or self._finalized:  # a lifecycle manager was faster
            return
        if self.trigger_configure() == TransitionCallbackReturn.SUCCESS:
            self.trigger_activate()

    def _configure(self) -> bool:
        settings = self._settings = read_settings(self)
        self._load_failure = ''
        self._questions.restart_count()
        streams = [camera.name for camera in settings.cameras]
        # A new queue: a worker that was given up while loading must not speak to this node again.
        self._events = EventQueue(self._guard.trigger)
        self._worker = worker = Worker(
            lambda: load_engine(settings.model, settings.device, settings.dtype,
                                settings.null_token_delay_sec),
            streams, settings.stream, self._events.put,
            max_questions=settings.stream.max_questions * len(streams))
        self.get_logger().info(f'Loading model {settings.model!r} on device '
                               f'{settings.device!r}; cameras: {", ".join(streams)}')
        worker.start()
        info = self._wait_for_load()
        if info is None:
            self._release()
            return False
        self._engine_info = info
        self._instruction = settings.stream.instruction
        self._cameras = {
            camera.name: Camera(self, camera, settings.image_transport, worker, self._failures,
                                self._now_ns)
            for camera in settings.cameras}
        self._publish_model_info()
        self.get_logger().info(f'Loaded {info.model!r} ({info.architecture}, {info.dtype}, '
                               f'{info.device}, {info.parameters:,} parameters)')
        if info.random_weights:
            self.get_logger().warning('The weights are random: the words mean nothing')
        return True

    def _wait_for_load(self) -> EngineInfo | None:
        """Return what was loaded; None, and the reason reported, when it failed or must stop."""
        started = reported = published = time.monotonic()
        while not self._interrupted():
            for event in self._events.drain():
                if isinstance(event, Loaded):
                    return event.info
                if isinstance(event, LoadFailed):
                    self._load_failure = (
                        f'cannot load model {self._settings.model!r}: {event.message}; correct '
                        'the parameters model, device or dtype and configure again')
                    self._failures.report(self._load_failure)
                    return None
            now = time.monotonic()
            if now - reported >= LOAD_LOG_PERIOD_SEC:
                reported = now
                self.get_logger().info(f'Still loading after {now - started:.0f} s')
            if now - published >= self._settings.diagnostics_period_sec:
                published = now
                self._publish_diagnostics()
            time.sleep(LOAD_POLL_SEC)
        self.get_logger().info('Loading was interrupted')
        return None

    def _activate(self) -> None:
        self._active = True
        self._watch(self._enabled)

    def _deactivate(self) -> None:
        self._active = False
        self._watch(False)
        self._questions.cancel_all('the node was deactivated')

    def _release(self, reason: str = 'the node was cleaned up') -> None:
        """Free all; an engine that is still busy frees itself and fails no transition."""
        self._active = False
        self._questions.cancel_all(reason)
        self._watch(False)
        self._cameras = {}
        # There is no use in waiting for a load: it cannot be interrupted.
        patience_sec = 0.0 if self._engine_info is None else STOP_TIMEOUT_SEC
        self._engine_info = None
        self._events_dropped += self._events.dropped
        worker, self._worker = self._worker, None
        if worker is not None and not worker.stop(patience_sec):
            self._ending.append(worker)
            self.get_logger().warning('The engine is still busy; it is freed as soon as it ends')

    def _watch(self, wanted: bool) -> None:
        """Subscribe to all cameras, or to none."""
        for camera in self._cameras.values():
            if wanted and not camera.watching:
                camera.watch()
                self.get_logger().info(f'Watching {camera.topic}')
            elif not wanted:
                camera.unwatch()

    # The engine's events.

    def _on_events(self) -> None:
        for event in self._events.drain():
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Described):
            self._on_described(event)
        elif isinstance(event, AnswerProgress | Answered | QuestionFailed):
            self._questions.handle(event)
        elif isinstance(event, StreamFailed):
            self._failures.report(f'Stream {event.stream!r} failed: {event.code.name}: '
                                  f'{event.message}', f'stream {event.stream}', 5.0)
        elif isinstance(event, StreamRestarted):
            line = f'Stream {event.stream!r} begins anew: {event.reason}'
            if event.reason == STAMPS_JUMPED_BACK:  # two drivers on one topic do it all the time
                self._failures.report(line, line, 5.0)
            else:
                self.get_logger().info(line)
        elif isinstance(event, InstructionChanged):
            self._instruction = event.instruction
            self._publish_model_info()
            self.get_logger().info(f'Instruction: {event.instruction}')
        elif isinstance(event, InstructionRefused):
            # The parameter must not claim what is not in force.
            self._failures.report(f'Instruction refused: {event.message}')
            self.set_parameters([Parameter('instruction', value=self._instruction)])
        elif isinstance(event, EngineDied):
            self._load_failure = (f'the engine has ended on a defect ({event.message}); clean up '
                                  'and configure the node again')
            self._failures.report(self._load_failure)

    def _on_described(self, event: Described) -> None:
        description = event.description
        camera = self._cameras.get(description.stream)
        if camera is None or not self._watching:
            return
        message = description_message(description, self._now_ns())
        camera.latency_sec = message.latency
        if self._settings.publish_silence or not description.silent:
            self._descriptions.publish(message)

    # Services and questions.

    def _running_worker(self) -> Worker:
        if self._worker is None or not self._active:
            raise EngineError(ErrorCode.NOT_ACTIVE, f'the node is {self._state()}; activate it '
                              '(ros2 lifecycle set, or the parameter autostart)')
        if not self._enabled:
            raise EngineError(ErrorCode.NOT_ACTIVE,
                              'the node is disabled; enable it with ~/set_enabled')
        return self._worker

    def _limits(self) -> Limits:
        return Limits(tuple(camera.name for camera in self._settings.cameras),
                      self._settings.max_question_length)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._worker is None:
            response.message = f'the node is {self._state()}: there is nothing to reset'
            self._failures.report(f'Reset refused: {response.message}')
            return response
        self._worker.reset(reason='asked to by ~/reset')
        response.success = True
        response.message = 'all streams begin anew'
        return response

    def _on_set_enabled(self, request: SetBool.Request,
                        response: SetBool.Response) -> SetBool.Response:
        changed, self._enabled = self._enabled != request.data, request.data
        if changed:
            self._watch(self._watching)
            if not self._enabled:
                self._questions.cancel_all('the node was disabled')
        response.success = True
        word = 'enabled' if self._enabled else 'disabled'
        response.message = word if self._active else f'{word}; takes effect when activated'
        self.get_logger().info(f'The node is {response.message}')
        return response

    @property
    def _watching(self) -> bool:
        return self._active and self._enabled

    # Parameters.

    def _on_set_parameters(self, changed: list[Parameter]) -> SetParametersResult:
        result = check_changes(self, changed, configured=self._worker is not None)
        if result.successful:
            self._parameters_changed.trigger()
        else:
            self.get_logger().warning(f'Parameter refused: {result.reason}')
        return result

    def _apply_parameters(self) -> None:
        before, self._settings = self._settings, read_settings(self)
        now = self._settings
        if now.stream.instruction != before.stream.instruction and self._worker is not None:
            self._worker.set_instruction(now.stream.instruction)
        if now.diagnostics_period_sec != before.diagnostics_period_sec:
            self.destroy_timer(self._diagnostics_timer)
            self._diagnostics_timer = self._start_diagnostics()

    def _publish_model_info(self) -> None:
        if self._engine_info is not None:
            info = replace(self._engine_info, model=self._settings.model)
            stream = replace(self._settings.stream, instruction=self._instruction)
            self._model_info.publish(model_info_message(
                info, stream, list(self._cameras), self._now_ns()))

    # Time, silence, diagnostics.

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _on_clock_jump(self, jump: TimeJump) -> None:
        if self._worker is not None:
            self._worker.reset(reason=f'the clock jumped by {jump.delta.nanoseconds / 1e9:.1f} s')

    def _check_silence(self) -> None:
        for camera in self._cameras.values():
            camera.check_silence(self._settings.silence_timeout_sec)

    def _start_diagnostics(self) -> Timer:
        return self.create_timer(self._settings.diagnostics_period_sec,
                                 self._publish_diagnostics, clock=self._steady)

    def _publish_diagnostics(self) -> None:
        cache_tokens = self._engine_info.cache_tokens if self._engine_info is not None else 0
        cameras = [camera.health(self._worker.stats(camera.name), cache_tokens)
                   for camera in self._cameras.values() if self._worker is not None]
        self._diagnostics.publish(diagnostic_array(
            self.get_clock().now().to_msg(), self.get_fully_qualified_name().lstrip('/'),
            self._engine_health(), cameras))

    def _engine_health(self) -> EngineHealth:
        worker, info = self._worker, self._engine_info
        return EngineHealth(
            state=self._state(), model=self._settings.model,
            device=info.device if info is not None else self._settings.device,
            device_memory_bytes=worker.device_memory_bytes() if worker is not None else 0,
            enabled=self._enabled, questions=self._questions.under_way,
            answered=self._questions.answered_total, failed=self._questions.failed_total,
            events_dropped=self._events_dropped + self._events.dropped,
            load_failure=self._load_failure, last_error=self._failures.last,
            last_error_age_sec=self._failures.age_sec)

    def _state(self) -> str:
        """Return the lifecycle state, and `loading` while the model is loaded."""
        if self._worker is None:
            return 'finalized' if self._finalized else 'unconfigured'
        if self._engine_info is None:
            return 'loading'
        return 'active' if self._active else 'inactive'
