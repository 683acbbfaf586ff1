"""The fields of svlm_ros/msg/Description, Answer and ModelInfo as plain dictionaries.

The one place that says which engine value goes into which message field; the node fills rclpy
messages from these, replay fills bags and JSON lines. Nested messages are nested dictionaries.
Not for: serialising, publishing, or anything that needs ROS.
"""
from collections.abc import Sequence
from typing import Any

import svlm_ros
from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.updates import Answer, Description, ErrorCode
from svlm_ros.engine.worker import EngineInfo

Fields = dict[str, Any]

NANOSECONDS = 10 ** 9


def time_fields(stamp_ns: int) -> Fields:
    """Return the fields of a builtin_interfaces/Time."""
    sec, nanosec = divmod(stamp_ns, NANOSECONDS)
    return {'sec': sec, 'nanosec': nanosec}


def stamp_nanoseconds(stamp: Any) -> int:
    """Return a builtin_interfaces/Time, of rclpy or of rosbags, in nanoseconds since the epoch."""
    return int(stamp.sec) * NANOSECONDS + int(stamp.nanosec)


def header_fields(stamp_ns: int, frame_id: str) -> Fields:
    """Return the fields of a std_msgs/Header."""
    return {'stamp': time_fields(stamp_ns), 'frame_id': frame_id}


def description_fields(description: Description, latency_sec: float) -> Fields:
    """Return the fields of a svlm_ros/Description.

    :param latency_sec: from the newest frame's stamp to publication.
    """
    return {
        'header': header_fields(description.stamp_ns, description.frame_id),
        'oldest_stamp': time_fields(description.oldest_stamp_ns),
        'stream': description.stream,
        'round_index': description.round_index,
        'text': description.text,
        'silent': description.silent,
        'confidence': description.confidence,
        'frames_used': description.frames_used,
        'frames_dropped': description.frames_dropped,
        'latency': latency_sec,
    }


def answer_fields(answer: Answer, question_id: int, latency_sec: float) -> Fields:
    """Return the fields of a svlm_ros/Answer to a question that was answered.

    :param latency_sec: from the question's arrival to the end of the answer.
    """
    return {
        'header': header_fields(answer.stamp_ns, answer.frame_id),
        'stream': answer.stream,
        'question_id': question_id,
        'question': answer.question,
        'text': answer.text,
        'confidence': answer.confidence,
        'round_index': answer.round_index,
        'tokens': len(answer.token_ids),
        'latency': latency_sec,
        'error_code': int(ErrorCode.NONE),
        'error_msg': '',
    }


def failed_answer_fields(stream: str, question: str, question_id: int, code: ErrorCode,
                         message: str, *, text: str = '', tokens: int = 0,
                         latency_sec: float = 0.0) -> Fields:
    """Return the fields of a svlm_ros/Answer to a question that failed.

    Its header is empty and its confidence 0: it is based on no frame.

    :param text: what was said until the failure, in `tokens` tokens.
    """
    return {
        'header': header_fields(0, ''),
        'stream': stream,
        'question_id': question_id,
        'question': question,
        'text': text,
        'confidence': 0.0,
        'round_index': 0,
        'tokens': tokens,
        'latency': latency_sec,
        'error_code': int(code),
        'error_msg': message,
    }


def model_info_fields(info: EngineInfo, config: StreamConfig, streams: Sequence[str],
                      stamp_ns: int) -> Fields:
    """Return the fields of a svlm_ros/ModelInfo.

    `text_window` is 0 where previous text is never cut.
    """
    return {
        'header': header_fields(stamp_ns, ''),
        'version': svlm_ros.__version__,
        'model': info.model,
        'architecture': info.architecture,
        'random_weights': info.random_weights,
        'parameters': info.parameters,
        'dtype': info.dtype,
        'device': info.device,
        'instruction': config.instruction,
        'policy': config.policy,
        'positions': config.positions,
        'frame_rate': config.frame_rate_hz,
        'round_duration': config.round_duration_sec,
        'vision_rounds': config.vision_rounds,
        'text_rounds': config.text_rounds,
        'text_sink': config.text_sink,
        'text_window': config.text_window or 0,
        'max_new_tokens': config.max_new_tokens,
        'max_pixels': config.max_pixels,
        'cache_tokens': info.cache_tokens,
        'cache_bytes': info.cache_bytes * len(streams),
        'streams': list(streams),
    }
