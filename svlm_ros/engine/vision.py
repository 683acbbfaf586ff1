"""Camera frames to the patches that the vision tower reads. Not for: decoding image messages.

The same values as transformers' Qwen2VLVideoProcessor (a test holds them together), computed where
the model is.
"""
from collections.abc import Sequence
import math

import numpy as np
import torch
from torch.nn import functional

from svlm_ros.engine.updates import EngineError, ErrorCode

# CLIP's normalisation, as in Qwen2.5-VL's preprocessor_config.json; per channel, of [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MAX_ASPECT_RATIO = 200


def fitted_size(height: int, width: int, unit: int, min_pixels: int,
                max_pixels: int) -> tuple[int, int]:
    """Return the height and width that a frame is scaled to (Qwen2-VL's "smart resize").

    Both are multiples of `unit`, their product lies within the limits, the shape is kept as
    well as that allows.

    :param unit: pixels per merged patch: patch size x merge size.
    :raises EngineError: the frame is too elongated for the limits.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise _too_elongated(height, width)
    fitted_height, fitted_width = (round(side / unit) * unit for side in (height, width))
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height, fitted_width = (
            max(unit, math.floor(side / shrink / unit) * unit) for side in (height, width))
    elif fitted_height * fitted_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        fitted_height, fitted_width = (
            math.ceil(side * grow / unit) * unit for side in (height, width))
    if fitted_height * fitted_width > max_pixels:
        raise _too_elongated(height, width)
    return fitted_height, fitted_width


def _too_elongated(height: int, width: int) -> EngineError:
    return EngineError(ErrorCode.ENGINE_FAILURE, (
        f'a frame of {width}x{height} is too elongated: it cannot be scaled within max_pixels'))


def scaled(images: Sequence[np.ndarray], size: tuple[int, int],
           device: torch.device) -> torch.Tensor:
    """Return images as uint8-valued float32 [frames, 3, height, width], scaled to `size`.

    Bicubic with antialiasing, rounded to whole values as image processors do.

    :param images: uint8 [height, width, 3] RGB, of any sizes.
    """
    frames = []
    for image in images:
        frame = torch.from_numpy(image).to(device).permute(2, 0, 1)[None]
        if frame.shape[-2:] != size:
            frame = functional.interpolate(frame.float(), size, mode='bicubic', antialias=True)
            frame = frame.round_().clamp_(0, 255)
        frames.append(frame.float())
    return torch.cat(frames)


def patches(frames: torch.Tensor, patch: int, merge: int, temporal: int) -> torch.Tensor:
    """Cut frames into normalised patches, in the order that the vision tower reads.

    :param frames: float32 [frames, 3, height, width], values 0 to 255; when their number is not
        a multiple of `temporal`, the last one is repeated.
    :return: float32 [t * h * w, 3 * temporal * patch * patch] with h, w in patches; rows are
        ordered (t, h / merge, w / merge, merge, merge), columns (channel, time, y, x).
    """
    missing = -frames.shape[0] % temporal
    if missing:
        frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
    mean, std = (torch.tensor(each, device=frames.device).view(3, 1, 1) for each in (MEAN, STD))
    frames = (frames / 255 - mean) / std
    count, channels, height, width = frames.shape
    grid = frames.view(count // temporal, temporal, channels, height // patch // merge, merge,
                       patch, width // patch // merge, merge, patch)
    rows = grid.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return rows.reshape(-1, channels * temporal * patch * patch)
