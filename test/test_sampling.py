"""Choosing tokens: greedy, sampled, penalised, and never a token that must not be said."""
import pytest

from svlm_ros.engine.config import ConfigError, SamplingConfig, StreamConfig

torch = pytest.importorskip('torch')
from svlm_ros.engine.sampling import Sampler  # noqa: E402

LOGITS = torch.tensor([0.0, 3.0, 2.9, -1.0, 9.0])
NEVER = torch.tensor([4])


def draws(config, count=200, words=(), key='camera/1'):
    sampler = Sampler(config, NEVER, key)
    return [sampler(LOGITS, lambda: list(words)) for _ in range(count)]


def test_greedy_takes_the_best_allowed_token():
    assert set(draws(SamplingConfig())) == {1}


def test_sampling_draws_more_than_one_token_and_repeats_with_its_seed():
    config = SamplingConfig(temperature=1.0)
    assert {1, 2} <= set(draws(config)) <= {0, 1, 2, 3}
    assert draws(config) == draws(config)
    assert draws(config) != draws(SamplingConfig(temperature=1.0, seed=1))
    assert draws(config) != draws(config, key='camera/2')


def test_top_p_leaves_the_tail_out():
    assert set(draws(SamplingConfig(temperature=1.0, top_p=0.6))) == {1, 2}
    assert set(draws(SamplingConfig(temperature=1.0, top_p=0.3))) == {1}


def test_the_repetition_penalty_makes_a_retained_word_less_likely():
    assert set(draws(SamplingConfig(repetition_penalty=1.5), words=[1])) == {2}
    assert set(draws(SamplingConfig(repetition_penalty=1.5), words=[])) == {1}


@pytest.mark.parametrize('setting', [
    {'temperature': -1.0}, {'temperature': float('nan')}, {'top_p': 0.0}, {'top_p': 1.1},
    {'top_p': float('nan')}, {'repetition_penalty': 0.0}, {'seed': -1}])
def test_sampling_out_of_range_is_refused(setting):
    with pytest.raises(ConfigError, match=next(iter(setting))):
        SamplingConfig(**setting)


@pytest.mark.parametrize('setting', [
    {'frame_rate_hz': 0.0}, {'frame_rate_hz': float('nan')}, {'frame_rate_hz': float('inf')},
    {'frame_rate_hz': 2.5}, {'round_duration_sec': 0.0}, {'round_duration_sec': float('nan')},
    {'vision_rounds': 0}, {'text_rounds': 0}, {'text_sink': -1}, {'text_window': 0},
    {'max_new_tokens': 0}, {'max_answer_tokens': 0}, {'max_question_tokens': 0},
    {'max_questions': 0}, {'min_pixels': 10}, {'max_pixels': 10}, {'max_context_tokens': 1},
    {'policy': 'all'}, {'positions': 'none'}, {'time_offset_sec': float('nan')}])
def test_a_stream_setting_out_of_range_is_refused_by_name(setting):
    with pytest.raises(ConfigError) as error:
        StreamConfig(**setting)
    name = next(iter(setting))
    assert name.removeprefix('max_').removeprefix('min_') in str(error.value)
