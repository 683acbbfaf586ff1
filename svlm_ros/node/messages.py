"""Engine updates as rclpy messages: pure conversions, no node, no state.

Which value goes into which field is said in `svlm_ros.messages`, for bags as well.
Not for: images (see images.py) or diagnostics (see diagnostics.py).
"""
from collections.abc import Sequence
from typing import Any, TypeVar

from svlm_ros.action import AnswerQuestion
from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.updates import Description
from svlm_ros.engine.worker import EngineInfo
from svlm_ros.messages import description_fields, Fields, model_info_fields, NANOSECONDS
from svlm_ros.msg import Answer as AnswerMessage
from svlm_ros.msg import Description as DescriptionMessage
from svlm_ros.msg import ModelInfo
from svlm_ros.srv import Ask

Message = TypeVar('Message')


def fill(message: Message, fields: Fields) -> Message:
    """Set a message's fields, nested messages from nested dictionaries; return the message."""
    for name, value in fields.items():
        if isinstance(value, dict):
            fill(getattr(message, name), value)
        else:
            setattr(message, name, value)
    return message


def description_message(description: Description, now_ns: int) -> DescriptionMessage:
    """Return a description as it is published at `now_ns` of the node's clock."""
    latency_sec = (now_ns - description.stamp_ns) / NANOSECONDS
    return fill(DescriptionMessage(), description_fields(description, latency_sec))


def model_info_message(info: EngineInfo, config: StreamConfig, streams: Sequence[str],
                       now_ns: int) -> ModelInfo:
    """Return what is running, as it is published at `now_ns` of the node's clock."""
    return fill(ModelInfo(), model_info_fields(info, config, streams, now_ns))


def ask_response(answer: AnswerMessage) -> Ask.Response:
    """Return what the service `~/ask` responds when the question ended like this."""
    return Ask.Response(**_outcome(answer))


def action_result(answer: AnswerMessage) -> AnswerQuestion.Result:
    """Return the result of the action `~/answer_question` when the question ended like this."""
    return AnswerQuestion.Result(tokens=answer.tokens, **_outcome(answer))


def _outcome(answer: AnswerMessage) -> dict[str, Any]:
    return {'header': answer.header, 'stream': answer.stream, 'answer': answer.text,
            'confidence': answer.confidence, 'error_code': answer.error_code,
            'error_msg': answer.error_msg}
