import pytest
import torch

from rdmd_fast.kernels.image_normalize import image_normalize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_maps_to_the_nearest_value_in_minus_one_to_one(dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    result = image_normalize(images, dtype).flatten()
    assert result.dtype == dtype and result[0] == -1 and result[-1] == 1
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 + 1.2e-7


def test_channels_last_stays():
    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    result = image_normalize(images)
    assert result.shape == (2, 3, 5, 4) and result.is_contiguous(memory_format=torch.channels_last)


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        image_normalize(torch.zeros(1, 3, 2, 2))
