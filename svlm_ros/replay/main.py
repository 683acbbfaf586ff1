"""svlm-replay: show a recorded bag to the model and write down what it says; needs no ROS.

Not for: publishing a bag on topics (see player.py).
"""
import argparse
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
import json
from pathlib import Path
import sys
import time
from typing import Any, TextIO

from rosbags.rosbag2 import Reader
from tqdm import tqdm

from svlm_ros.engine.config import ConfigError
from svlm_ros.engine.load import load_engine
from svlm_ros.engine.worker import Engine, EngineInfo
from svlm_ros.messages import (
    answer_fields,
    description_fields,
    failed_answer_fields,
    Fields,
    model_info_fields,
    NANOSECONDS,
)
from svlm_ros.node.images import decode_compressed, decode_image
from svlm_ros.replay.bags import (
    BadImage,
    BagError,
    Camera,
    count_messages,
    find_cameras,
    open_bag,
    OutputBag,
    read_images,
)
from svlm_ros.replay.interrupts import sigterm_interrupts
from svlm_ros.replay.questions import load_questions, QuestionError
from svlm_ros.replay.session import (
    Answered,
    Described,
    merge_timeline,
    pace,
    Report,
    Restarted,
    RoundFailed,
    Session,
    Unanswered,
)
from svlm_ros.replay.settings import add_options, Settings, settings_from

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

EPILOG = """\
The latency of a description is the bag time of the image that completed its round less the stamp
of its newest frame; the latency of an answer is 0. Neither contains the model's own time, so that
every replay of a bag writes the same bytes. An image that cannot be decoded is named, counted and
skipped.

exit status: 0 replayed; 1 a round or question failed, or no image could be decoded;
2 wrong arguments or files; 130 interrupted (what was said until then is written)
"""


class ModelError(Exception):
    """The model cannot be loaded; the message says which and why."""


@dataclass
class Tally:
    """What the summary and the exit status are made of."""

    rounds: int = 0
    frames: int = 0
    answers: int = 0
    bad_images: int = 0
    restarts: int = 0
    failed_rounds: int = 0
    failed_questions: int = 0

    def count(self, report: Report) -> None:
        """Add one report."""
        if isinstance(report, Described):
            self.rounds += 1
            self.frames += report.description.frames_used
        self.answers += isinstance(report, Answered)
        self.bad_images += isinstance(report, BadImage)
        self.restarts += isinstance(report, Restarted)
        self.failed_rounds += isinstance(report, RoundFailed)
        self.failed_questions += isinstance(report, Unanswered)

    @property
    def exit_status(self) -> int:
        """Whether everything went well, bad images apart."""
        failed = self.failed_rounds or self.failed_questions or not self.rounds
        return EXIT_FAILED if failed else EXIT_OK

    def __str__(self) -> str:
        parts = [f'{self.rounds} rounds of {self.frames} frames described',
                 f'{self.answers} questions answered']
        for count, what in ((self.bad_images, 'bad images skipped'),
                            (self.restarts, 'restarts because time jumped back'),
                            (self.failed_rounds, 'ROUNDS FAILED'),
                            (self.failed_questions, 'QUESTIONS FAILED')):
            if count:
                parts.append(f'{count} {what}')
        return ', '.join(parts)


class Outputs:
    """Everything that a replay writes: the terminal, JSON lines and a bag.

    :param start_ns: bag time that the terminal shows as 0.
    """

    def __init__(self, start_ns: int, terminal: TextIO | None, json_lines: TextIO | None,
                 bag: OutputBag | None) -> None:
        self._start_ns = start_ns
        self._terminal = terminal
        self._json_lines = json_lines
        self._bag = bag

    def model_info(self, fields: Fields) -> None:
        """Write what is loaded."""
        if fields['random_weights']:
            self.say(f'model {fields["model"]}: nothing was trained, the words mean nothing')
        self._record('model_info', self._start_ns, fields)

    def report(self, report: Report) -> None:
        """Write one report."""
        self.say(f'{(report.log_ns - self._start_ns) / NANOSECONDS:9.3f}  {line_of(report)}')
        kind, fields = record_of(report)
        self._record(kind, report.log_ns, fields)

    def say(self, line: str) -> None:
        """Print a line for people, above the progress bar."""
        if self._terminal is not None:
            tqdm.write(line, file=self._terminal)

    def _record(self, kind: str, log_ns: int, fields: Fields) -> None:
        if self._json_lines is not None:
            record = {'type': kind, 'log_time': log_ns, **fields}
            self._json_lines.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + '\n')
            self._json_lines.flush()    # whoever reads a pipe gets each line as it is said
        if self._bag is not None and kind in ('model_info', 'description', 'answer'):
            self._bag.write(f'/svlm/{kind}', log_ns, fields)


def record_of(report: Report) -> tuple[str, Fields]:
    """Return a report's kind and its fields; of descriptions and answers as in their messages."""
    if isinstance(report, Described):
        return 'description', description_fields(report.description, report.latency_sec)
    if isinstance(report, Answered):
        return 'answer', answer_fields(report.answer, report.question.id, latency_sec=0.0)
    if isinstance(report, Unanswered):
        question = report.question
        return 'answer', failed_answer_fields(
            question.stream, question.text, question.id, report.code, report.message,
            text=report.said, tokens=report.tokens)
    if isinstance(report, RoundFailed):
        return 'round_failed', {'stream': report.stream, 'error_code': int(report.code),
                                'error_msg': report.message}
    if isinstance(report, Restarted):
        return 'stream_restarted', {'stream': report.stream}
    return 'bad_image', {'stream': report.camera.name, 'topic': report.camera.topic,
                         'reason': report.reason}


def line_of(report: Report) -> str:
    """Return a report as people read it, without its time."""
    if isinstance(report, Described):
        said = report.description
        return f'{said.stream}: {"(silent)" if said.silent else said.text}'
    if isinstance(report, Answered):
        answer = report.answer
        return f'{answer.stream}: Q: {answer.question}  A: {answer.text}'
    if isinstance(report, Unanswered):
        return (f'{report.question.stream}: Q: {report.question.text}  '
                f'FAILED ({report.code.name}): {report.message}')
    if isinstance(report, RoundFailed):
        return f'{report.stream}: ROUND FAILED ({report.code.name}): {report.message}'
    if isinstance(report, Restarted):
        return f'{report.stream}: time jumped back, the stream starts anew'
    return f'{report.camera.name}: bad image on {report.camera.topic} skipped: {report.reason}'


def decode(message: Any) -> Any:
    """Return uint8 [height, width, 3] RGB of an Image or CompressedImage; may raise ImageError."""
    return decode_compressed(message) if hasattr(message, 'format') else decode_image(message)


def load_model_of(settings: Settings) -> Engine:
    """Load the model that the settings name.

    :raises ModelError: whatever goes wrong.
    """
    try:
        return load_engine(settings.model, settings.device, settings.dtype)
    except ImportError as error:
        raise ModelError(f'cannot load the model {settings.model!r}, a package is missing '
                         f'({error}); run: pip install "svlm_ros[engine]"') from error
    except Exception as error:  # every library has its own; people get one sentence
        reason = ' '.join(str(error).split())
        raise ModelError(f'cannot load the model {settings.model!r}: '
                         f'{type(error).__name__}: {reason}') from error


def parse_topic(text: str) -> tuple[str | None, str]:
    """Return (name or None, topic) of `name=/topic` or `/topic`."""
    name, equals, topic = text.rpartition('=')
    if equals and not name:
        raise argparse.ArgumentTypeError(f'{text!r} has an empty name; expected name=/topic')
    return name or None, topic if topic.startswith('/') else '/' + topic


def parse_rate(text: str) -> float:
    """Return a positive number."""
    rate = float(text)
    if not 0 < rate < float('inf'):
        raise argparse.ArgumentTypeError(f'is {text}; expected a number above 0')
    return rate


def make_parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(
        prog='svlm-replay', description='Show a recorded bag to the model and write down what it '
        'says: in process, deterministic, no frame dropped, no ROS needed.',
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('bag', type=Path, help='rosbag2 folder, .mcap or .db3 file')
    parser.add_argument('--topic', type=parse_topic, action='append', default=[],
                        metavar='[NAME=]/TOPIC', help='image topic, and the name of its stream; '
                        'repeatable. Default: every image topic of the bag')
    parser.add_argument('--questions', type=Path, metavar='YAML',
                        help='list of {time: SECONDS from the beginning of the bag, '
                             'question: TEXT, stream: NAME, max_tokens: N}; the last two are '
                             'optional')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='write a rosbag2 (MCAP) with /svlm/description, /svlm/answer and '
                             '/svlm/model_info; must not exist')
    parser.add_argument('--json', metavar='FILE', help='write JSON lines; - is standard output')
    parser.add_argument('--rate', type=parse_rate,
                        help='pace by bag time: 1 is as recorded. Default: as fast as possible')
    parser.add_argument('--params', type=Path, metavar='YAML',
                        help="the node's parameter file; options win over it")
    parser.add_argument('--quiet', action='store_true', help='only the summary and errors')
    add_options(parser)
    return parser


def replay(options: argparse.Namespace) -> int:
    """Replay a bag as the options say; return the exit status.

    :raises BagError, QuestionError, ConfigError, ModelError, OSError: nothing was replayed.
    """
    settings = settings_from(vars(options), options.params)
    with ExitStack() as stack:
        reader = stack.enter_context(open_bag(options.bag))
        cameras = find_cameras(reader, options.topic)
        names = [camera.name for camera in cameras]
        start_ns, end_ns = reader.start_time, reader.end_time - 1
        questions = load_questions(options.questions, start_ns, end_ns, names) \
            if options.questions is not None else []
        bag = OutputBag(options.output) if options.output is not None else None
        json_lines = _open_json(options.json, stack)
        engine = load_model_of(settings)
        stack.callback(engine.close)
        if bag is not None:
            # Only now: a folder left by a failed load would be in the way of the next attempt.
            stack.enter_context(bag)
        terminal = None if options.quiet or options.json == '-' else sys.stdout
        outputs = Outputs(start_ns, terminal, json_lines, bag)
        session = Session(engine, settings.stream, names, decode)
        outputs.model_info(model_info_fields(engine.info, settings.stream, names, start_ns))
        progress = stack.enter_context(_progress(reader, cameras, options.quiet))
        timeline = merge_timeline(_counted(read_images(reader, cameras), progress), questions)
        if options.rate is not None:
            timeline = pace(timeline, options.rate, time.monotonic, time.sleep)
        return _run(session.run(timeline), outputs, engine.info, start_ns)


def _run(reports: Iterator[Report], outputs: Outputs, info: EngineInfo, start_ns: int) -> int:
    """Write all reports and the summary; an interrupt or a damaged bag ends neither files."""
    tally, began, last_ns = Tally(), time.monotonic(), start_ns
    interrupted, damage = False, ''
    try:
        for report in reports:
            tally.count(report)
            outputs.report(report)
            last_ns = report.log_ns
    except KeyboardInterrupt:
        interrupted = True
    except BagError as error:
        damage = str(error)
    took, length = time.monotonic() - began, (last_ns - start_ns) / NANOSECONDS
    tqdm.write(f'{"interrupted: " if interrupted else ""}{tally}; {length:.1f} s of bag in '
               f'{took:.1f} s with model {info.model}', file=sys.stderr)
    if damage:
        print(f'svlm-replay: {damage}', file=sys.stderr)
        return EXIT_USAGE
    return EXIT_INTERRUPTED if interrupted else tally.exit_status


def _open_json(name: str | None, stack: ExitStack) -> TextIO | None:
    if name is None:
        return None
    if name == '-':
        return sys.stdout
    return stack.enter_context(open(name, 'w', encoding='utf-8'))


def _progress(reader: Reader, cameras: Sequence[Camera], quiet: bool) -> 'tqdm[Any]':
    """Return a progress bar over the cameras' messages; shown only on a terminal."""
    return tqdm(total=count_messages(reader, cameras), unit='image', file=sys.stderr,
                disable=True if quiet else None)


def _counted(images: Iterable[Any], progress: 'tqdm[Any]') -> Iterator[Any]:
    for image in images:
        yield image
        progress.update()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit status."""
    options = make_parser().parse_args(arguments)
    try:
        with sigterm_interrupts():
            return replay(options)
    except KeyboardInterrupt:
        print('svlm-replay: interrupted before the replay began', file=sys.stderr)
        return EXIT_INTERRUPTED
    except (BagError, QuestionError, ConfigError, ModelError, OSError) as error:
        print(f'svlm-replay: {error}', file=sys.stderr)
        return EXIT_USAGE


if __name__ == '__main__':
    sys.exit(main())
