"""A small Qwen2.5-VL with random weights and a tokenizer of its own, built in code.

For tests, benchmarks and machines without a checkpoint: everything runs as with a trained model,
but the words mean nothing. Not for: loading checkpoints (see model.py).
"""
from tokenizers import AddedToken, decoders, models, pre_tokenizers, Tokenizer, trainers
import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from svlm_ros.engine.prompt import CHATML_TEMPLATE, SILENCE_TEXT

SPECIAL_TOKENS = (
    '<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>',
    '<|vision_pad|>', '<|image_pad|>', '<|video_pad|>')

# Whole words, so that random tokens read as words; every other text still encodes, byte by byte.
WORDS = (
    'a an the this that it its robot arm hand gripper camera table floor wall door window room '
    'shelf box can cup bottle bag ball chair person people red green blue yellow white black grey '
    'small large left right front behind above below near far in on at of to from with and or not '
    'is are was has have no yes one two three four moves turns opens closes enters leaves picks '
    'places holds drops reaches points stands walks falls appears still now again then here there '
    'what where when who how many which describe shows camera happens as system user assistant '
    'previous text you helpful light dark open closed empty full up down slowly quickly').split()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with ChatML and vision tokens; ` ...` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = [f' {word} {word}' for word in WORDS] * 2
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=4096, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(SILENCE_TEXT, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|im_end|>', pad_token='<|endoftext|>',
        extra_special_tokens=list(SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:]),
        chat_template=CHATML_TEMPLATE, clean_up_tokenization_spaces=False)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden_size: int = 128,
                layers: int = 4) -> Qwen2_5_VLForConditionalGeneration:
    """Return a random float32 model; the same seed gives the same weights.

    The gains are large, so that every word depends on what is seen and where it stands; the
    output head prefers whole words and the tokens that close a reply.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        text_config={
            'vocab_size': len(tokenizer), 'hidden_size': hidden_size, 'num_hidden_layers': layers,
            'intermediate_size': 3 * hidden_size, 'num_attention_heads': 4,
            'num_key_value_heads': 2, 'max_position_embeddings': 32768,
            'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6,
                                'mrope_section': _sections(hidden_size // 8)},
            'bos_token_id': None, 'eos_token_id': ids['<|im_end|>'],
            'pad_token_id': ids['<|endoftext|>'], 'tie_word_embeddings': False},
        vision_config={
            'depth': 2, 'hidden_size': 64, 'intermediate_size': 128, 'num_heads': 2,
            'out_hidden_size': hidden_size, 'fullatt_block_indexes': [1], 'window_size': 112,
            'tokens_per_second': 2, 'patch_size': 14, 'temporal_patch_size': 2,
            'spatial_merge_size': 2},
        image_token_id=ids['<|image_pad|>'], video_token_id=ids['<|video_pad|>'],
        vision_start_token_id=ids['<|vision_start|>'], vision_end_token_id=ids['<|vision_end|>'],
        tie_word_embeddings=False)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2:        # norms stay 1; biases are 0 or small
                if name.endswith('bias'):
                    weight.normal_(0, 0.1, generator=generator)
                continue
            gain = 2.0 if 'q_proj' in name or 'k_proj' in name else 1.0
            fan_in = 1 if 'embed_tokens' in name else weight[0].numel()
            weight.normal_(0, gain * fan_in ** -0.5, generator=generator)
        spoken = [f' {word}' for word in WORDS] + [SILENCE_TEXT, '<|im_end|>']
        pieces = [tokenizer.encode(each, add_special_tokens=False) for each in spoken]
        model.lm_head.weight[[piece[0] for piece in pieces if len(piece) == 1]] *= 3.0
    return model


def _sections(half: int) -> list[int]:
    """Split half a head's channels over t, h, w, as 2 : 3 : 3."""
    t = half // 4
    h = (half - t) // 2
    return [t, h, half - t - h]
