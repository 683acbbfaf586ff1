"""A loaded checkpoint, ready to stream: the forward pass over our cache, and what it needs.

transformers owns the model's definition, its weights and its tokenizer. Its decoder layers get an
identity rotary embedding, so that raw queries and keys reach our attention function, which
rotates them. Not for: what is retained (context.py) or the loop (stream.py).
"""
from collections.abc import Sequence
import os
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)

from svlm_ros.engine.cache import attend, KVCache, NAME, RotaryRule, Step
from svlm_ros.engine.config import StreamConfig
from svlm_ros.engine.context import cache_tokens, Grid, scratch_tokens
from svlm_ros.engine.prompt import build_prompt
from svlm_ros.engine.random_model import build_model, build_tokenizer
from svlm_ros.engine.stream import Stream
from svlm_ros.engine.updates import EngineError, ErrorCode
from svlm_ros.engine.vision import fitted_size, patches, scaled
from svlm_ros.engine.worker import EngineInfo

AttentionInterface.register(NAME, attend)

RANDOM = 'random'       # the model name that builds random weights in code


class IdentityRotary(nn.Module):
    """Rotary embedding that turns nothing: cosines 1, sines 0, in the original's shape."""

    def __init__(self, original: nn.Module, hidden_size: int) -> None:
        super().__init__()
        with torch.no_grad():
            cos, _ = original(torch.zeros(1, 1, hidden_size), torch.zeros(3, 1, 1))
        self._shape = cos.shape

    def forward(self, hidden: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ones and zeros that broadcast over the tokens."""
        return hidden.new_ones(self._shape), hidden.new_zeros(self._shape)


class Model:
    """A Qwen2.5-VL checkpoint that opens streams (an Engine, as the worker drives it)."""

    def __init__(self, network: Qwen2_5_VLForConditionalGeneration, tokenizer: Any, name: str,
                 device: torch.device, dtype: torch.dtype) -> None:
        self.tokenizer = tokenizer
        self.prompt = build_prompt(tokenizer, network.config)
        self.device = device
        self.dtype = dtype
        self.suppressed = torch.tensor(self.prompt.suppressed, device=device)
        self._name = name
        self._network = network.to(device=device, dtype=dtype).eval()
        self._text = network.model.language_model
        self._text_config = network.config.get_text_config()
        self._vision_config = network.config.vision_config
        rotary = type(self._text.rotary_emb)(config=self._text_config)     # exact, in float32
        self._rule = RotaryRule(rotary.inv_freq.float().to(device),
                                _axes(rotary.mrope_section if hasattr(rotary, 'mrope_section')
                                      else self._text_config.rope_parameters['mrope_section'],
                                      device), float(rotary.attention_scaling))
        self._text.rotary_emb = IdentityRotary(rotary, self._text_config.hidden_size)
        self._text.config._attn_implementation = NAME
        self._cache_tokens = 0
        self._cache_bytes = 0

    @property
    def info(self) -> EngineInfo:
        """What is loaded; the cache figures are those of the stream opened last."""
        return EngineInfo(
            model=self._name, architecture=type(self._network).__name__,
            random_weights=self._name == RANDOM,
            parameters=sum(weight.numel() for weight in self._network.parameters()),
            dtype=str(self.dtype).removeprefix('torch.'), device=str(self.device),
            cache_tokens=self._cache_tokens, cache_bytes=self._cache_bytes)

    def open_stream(self, name: str, config: StreamConfig, chooser: Any = None) -> Stream:
        """Allocate a stream's cache.

        :param chooser: replaces the sampler (a TokenChooser); for tests.
        :raises EngineError: OUT_OF_MEMORY when the cache does not fit on the device.
        """
        slots = cache_tokens(self.prompt, config)
        scratch = scratch_tokens(self.prompt, config) * config.max_questions
        text = self._text_config
        cache = KVCache(
            text.num_hidden_layers, text.num_key_value_heads,
            getattr(text, 'head_dim', None) or text.hidden_size // text.num_attention_heads,
            scratch + slots, self._rule, self.dtype, self.device)
        self._cache_tokens, self._cache_bytes = slots, cache.bytes
        return Stream(self, name, config, cache, slots, scratch, chooser)

    def device_memory_bytes(self) -> int:
        """Bytes allocated on the GPU, 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == 'cuda' else 0

    def close(self) -> None:
        """Free the device; the model and its streams must not be used any more."""
        del self._network, self._text
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()

    def grid_of(self, images: Sequence[np.ndarray], config: StreamConfig) -> Grid:
        """Return the vision tokens that a round's frames will become.

        All frames of a round are scaled to the size of the newest one.
        """
        vision = self._vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        height, width = images[-1].shape[:2]
        height, width = fitted_size(height, width, unit, config.min_pixels, config.max_pixels)
        temporal = vision.temporal_patch_size
        return Grid(-(-len(images) // temporal), height // unit, width // unit,
                    temporal / config.frame_rate_hz * vision.tokens_per_second)

    @torch.inference_mode()
    def embed_frames(self, images: Sequence[np.ndarray], grid: Grid) -> torch.Tensor:
        """Return the merged vision embeddings of a round, [grid.tokens, hidden_size]."""
        vision = self._vision_config
        merge, patch = vision.spatial_merge_size, vision.patch_size
        size = (grid.height * merge * patch, grid.width * merge * patch)
        pixels = patches(scaled(images, size, self.device), patch, merge,
                         vision.temporal_patch_size)
        shape = torch.tensor([[grid.time, grid.height * merge, grid.width * merge]],
                             device=self.device)
        # cuDNN's default for float32 convolutions is TF32, three digits instead of seven.
        with torch.backends.cudnn.flags(allow_tf32=False):
            output = self._network.model.visual(pixels.to(self.dtype), grid_thw=shape)
        return output.pooler_output

    @torch.inference_mode()
    def embed_tokens(self, ids: Sequence[int]) -> torch.Tensor:
        """Return token embeddings, [tokens, hidden_size]."""
        return self._text.embed_tokens(torch.tensor(list(ids), device=self.device))

    @torch.inference_mode()
    def forward(self, embeddings: torch.Tensor, step: Step) -> torch.Tensor:
        """Run new tokens [tokens, hidden_size] through the decoder.

        :return: raw logits after the last one, float32 [vocabulary].
        """
        output = self._text(
            inputs_embeds=embeddings[None], use_cache=False, step=step,
            position_ids=torch.zeros(3, 1, len(embeddings), device=self.device),
            attention_mask={'full_attention': None, 'sliding_attention': None})
        return self._network.lm_head(output.last_hidden_state[0, -1:])[0].float()


def load_model(name: str, device: str = 'auto', dtype: str = 'auto',
               tokenizer: str | None = None) -> Model:
    """Load a checkpoint of the Qwen2.5-VL family.

    :param name: a local path, a hub name (also offline, from the hub's cache), or `random`.
    :param device: a torch device, or `auto`: the first GPU, else the CPU.
    :param dtype: `float32`, `bfloat16` or `auto`: bfloat16 on a GPU, float32 on a CPU.
    :param tokenizer: where the tokenizer is, if not with the checkpoint.
    :raises EngineError: there is no such checkpoint, or it is of another family.
    """
    place = _device(device)
    kind = {'auto': torch.float32 if place.type == 'cpu' else torch.bfloat16,
            'float32': torch.float32, 'bfloat16': torch.bfloat16}.get(dtype)
    if kind is None:
        raise EngineError(ErrorCode.ENGINE_FAILURE,
                          f'dtype is {dtype!r}; expected auto, float32 or bfloat16')
    if place.type == 'cpu':
        _share_the_processor()
    else:   # cuDNN's attention prepares a plan per sequence length: half a second each, and kept
        torch.backends.cuda.enable_cudnn_sdp(False)
    if name == RANDOM:
        words = build_tokenizer()
        return Model(build_model(words), words, name, place, kind)
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != 'qwen2_5_vl':
            raise EngineError(ErrorCode.ENGINE_FAILURE, (
                f'{name!r} is of the family {config.model_type!r}; expected qwen2_5_vl'))
        words = AutoTokenizer.from_pretrained(tokenizer or name)
        network = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name, dtype=kind, attn_implementation='sdpa')
    except (OSError, ValueError) as error:
        raise EngineError(ErrorCode.ENGINE_FAILURE, (
            f'the model {name!r} cannot be loaded: {error} (expected a folder with a Qwen2.5-VL '
            f'checkpoint, a hub name, or {RANDOM!r})')) from error
    return Model(network, words, name, place, kind)


def _device(name: str) -> torch.device:
    if name == 'auto':
        return torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineError(ErrorCode.ENGINE_FAILURE, f'device is {name!r}: {error}') from error
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise EngineError(ErrorCode.ENGINE_FAILURE,
                          f'device is {name!r}, but torch sees no GPU; use cpu or auto')
    return device


def _share_the_processor() -> None:
    """Leave half of the cores to the cameras and the rest of the robot.

    OpenMP's threads spin while they wait for each other: with as many as there are cores, any
    other busy process slows them down many times. OMP_NUM_THREADS, where set, is honoured.
    """
    if 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))


def _axes(sections: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return for each frequency the axis (t, h, w) that turns it."""
    return torch.tensor([i % 3 for i, count in enumerate(sections) for _ in range(count)],
                        device=device)
