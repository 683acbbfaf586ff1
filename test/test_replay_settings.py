"""The settings of a replay: options over the node's parameter file over the defaults."""
import argparse
from dataclasses import fields
from pathlib import Path

import pytest

from svlm_ros.engine.config import ConfigError, SamplingConfig, StreamConfig
from svlm_ros.replay.settings import add_options, NODE_ONLY, Settings, settings_from
from svlm_ros.share import share_file


def settings(arguments: list[str], params: Path | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return settings_from(vars(parser.parse_args(arguments)), params)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / 'params.yaml'
    path.write_text(text, encoding='utf-8')
    return path


def test_without_options_the_defaults_of_the_engine_hold() -> None:
    assert settings([]) == Settings('random', 'auto', 'auto', StreamConfig())


def test_every_setting_of_a_stream_is_an_option() -> None:
    given = {
        'instruction': 'Say it.', 'previous_text': 'It was.', 'frame_rate_hz': 4.0,
        'round_duration_sec': 0.5, 'vision_rounds': 3, 'text_rounds': 4, 'text_sink': 5,
        'text_window': None, 'max_new_tokens': 6, 'max_answer_tokens': 7,
        'max_question_tokens': 8, 'max_questions': 9, 'min_pixels': 1000, 'max_pixels': 2000,
        'policy': 'full', 'positions': 'native', 'max_context_tokens': 300,
        'time_offset_sec': 1.5, 'temperature': 0.5, 'top_p': 0.25, 'repetition_penalty': 1.25,
        'seed': 10}
    arguments = ['--reference']
    for name, value in given.items():
        arguments += ['--' + name.replace('_', '-'), str(value)]
    sampling = SamplingConfig(0.5, 0.25, 1.25, 10)
    stream = {name: value for name, value in given.items()
              if name not in {field.name for field in fields(SamplingConfig)}}
    assert {*given, 'reference', 'sampling'} == {
        field.name for kind in (StreamConfig, SamplingConfig) for field in fields(kind)}
    assert settings(arguments).stream == StreamConfig(
        **stream, reference=True, sampling=sampling)  # type: ignore[arg-type]


def test_options_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    params = write(tmp_path, """
        svlm:
          ros__parameters: {text_rounds: 7, seed: 3}
        /**:
          ros__parameters:
            vision_rounds: 5
            text_rounds: 6
            frame_rate_hz: 4
            model: some/path
            autostart: true
            qos_overrides./camera/image.subscription.depth: 10
        other_node:
          ros__parameters: {vision_rounds: 1}
        """)
    result = settings(['--vision-rounds', '9'], params)
    assert result.model == 'some/path'
    assert result.stream == StreamConfig(vision_rounds=9, text_rounds=7, frame_rate_hz=4.0,
                                         sampling=SamplingConfig(seed=3))


@pytest.mark.parametrize(('text', 'reason'), [
    ('[', 'are not YAML'),
    ('', 'have no section for the node'),
    ('/**: {vision_rounds: 3}', 'have no section for the node'),
    ('/**: {ros__parameters: {vision_round: 3}}', "sets 'vision_round'; expected one of: model"),
    ('/**: {ros__parameters: {vision_rounds: many}}', "vision_rounds is 'many'; expected int"),
    ('/**: {ros__parameters: {vision_rounds: true}}', 'vision_rounds is True; expected int'),
    ('/**: {ros__parameters: {vision_rounds: 0}}', 'vision_rounds is 0; expected at least 1'),
    ('/**: {ros__parameters: {policy: best}}', "policy is 'best'; expected one of"),
])
def test_a_mistake_in_the_file_is_explained(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        settings([], write(tmp_path, text))


def test_every_parameter_of_the_node_means_the_same_or_is_known_to_mean_nothing() -> None:
    pytest.importorskip('rclpy')
    from svlm_ros.node.parameters import SPECS
    meaningful = {field.name for kind in (StreamConfig, SamplingConfig) for field in fields(kind)}
    meaningful |= {'model', 'device', 'dtype'}
    names = {spec.name for spec in SPECS}
    assert names - meaningful == NODE_ONLY - {'use_sim_time', 'qos_overrides'}


def test_the_shipped_parameter_file_is_the_defaults() -> None:
    assert settings([], share_file('config/svlm.yaml')) == settings([])
