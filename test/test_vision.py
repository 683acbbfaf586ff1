"""Frames to patches: the same values as transformers' image processor."""
from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest

from svlm_ros.engine.updates import EngineError

torch = pytest.importorskip('torch')
from svlm_ros.engine.vision import fitted_size, patches, scaled  # noqa: E402

CPU = torch.device('cpu')


def processor():
    """Return transformers' processor that needs neither torchvision nor a GPU."""
    pytest.importorskip('PIL')
    module = pytest.importorskip('transformers.models.qwen2_vl.image_processing_pil_qwen2_vl')
    return module, module.Qwen2VLImageProcessorPil(min_pixels=28 * 28 * 4, max_pixels=364 * 644)


def picture(height, width):
    """Return a smooth picture, as cameras take them: scaling is compared on it."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / 23 + c) * np.cos(y / 17 - c) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.mark.parametrize('height, width', [(364, 644), (56, 84), (480, 640), (1080, 1920),
                                           (30, 40), (336, 448)])
def test_patches_equal_those_of_transformers(height, width):
    _, reference = processor()
    image = picture(height, width)
    expected = reference(image, return_tensors='pt')
    size = fitted_size(height, width, 28, 28 * 28 * 4, 364 * 644)
    got = patches(scaled([image], size, CPU), 14, 2, 2)
    assert expected['image_grid_thw'].tolist() == [[1, size[0] // 14, size[1] // 14]]
    # One step of 8 bits is 1 / 255 / 0.26 = 0.015; scaling may round to the neighbour.
    tolerance = 1e-5 if (height, width) == size else 0.02
    assert (got - expected['pixel_values']).abs().max() < tolerance


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_the_size_is_that_of_transformers_and_within_the_limits(height, width):
    module, _ = processor()
    try:
        size = fitted_size(height, width, 28, 3136, 234416)
    except EngineError:
        if max(height, width) <= 200 * min(height, width):
            expected = module.smart_resize(height, width, 28, 3136, 234416)
            assert expected[0] * expected[1] > 234416
        return
    assert size == module.smart_resize(height, width, 28, 3136, 234416)
    assert size[0] % 28 == 0 and size[1] % 28 == 0 and size[0] * size[1] <= 234416


def test_a_missing_frame_repeats_the_last_one():
    frames = scaled([picture(28, 56), picture(28, 56)[::-1].copy(), picture(28, 56)], (28, 56),
                    CPU)
    rows = patches(frames, 14, 2, 2)
    assert rows.shape == (2 * 2 * 4, 3 * 2 * 14 * 14)
    second = rows[8:].view(8, 3, 2, 14, 14)
    assert torch.equal(second[:, :, 0], second[:, :, 1])


def test_frames_of_other_sizes_are_scaled_to_the_one_asked_for():
    frames = scaled([picture(20, 30), picture(90, 50)], (28, 56), CPU)
    assert frames.shape == (2, 3, 28, 56)
    assert frames.min() >= 0 and frames.max() <= 255 and torch.equal(frames, frames.round())
