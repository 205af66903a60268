import pytest
import torch

from rdmd_fast.kernels import philox
from rdmd_fast.kernels.image_normalize import image_normalize
from rdmd_fast.kernels.noise_forward import CounterNoise


def random_images(n=6, height=4, width=5, channels=3):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)
    return images.permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_maps_to_the_nearest_value_in_minus_one_to_one(dtype):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    exact = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    result = image_normalize(images, dtype).flatten()
    assert result.dtype == dtype and result[0] == -1 and result[-1] == 1
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2 + 1.2e-7
    assert torch.equal(result, -result.flip(0))


def test_result_is_channels_last_whatever_comes():
    images = random_images()
    for layout in (images, images.contiguous(), images[:, :, ::2]):
        result = image_normalize(layout)
        assert result.shape == layout.shape and result.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(result, layout / 127.5 - 1, rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("seed", [3, 2**64 - 1])
def test_flips_follow_the_lowest_bit_of_the_counter(seed):
    images, positions = random_images(32), torch.arange(32) + 2**32 - 7
    flipped = image_normalize(images, torch.float32, CounterNoise(seed, 10, positions))
    plain = image_normalize(images)
    bits = philox.words(seed, 10, positions, 1)[:, 0] & 1
    assert 4 < bits.sum() < 28
    for i, bit in enumerate(bits.tolist()):
        assert torch.equal(flipped[i], plain[i].flip(2) if bit else plain[i])
    assert flipped.is_contiguous(memory_format=torch.channels_last)


def test_flips_do_not_depend_on_the_batch_and_take_the_seed_from_a_tensor():
    images, positions = random_images(12), torch.arange(12)
    whole = image_normalize(images, torch.float32, CounterNoise(5, 10, positions))
    seed = torch.tensor([5])
    halves = [
        image_normalize(images[h], torch.float32, CounterNoise(seed, 10, positions[h]))
        for h in (slice(0, 5), slice(5, 12))
    ]
    assert torch.equal(whole, torch.cat(halves))


def test_what_is_no_batch_of_bytes_is_refused():
    with pytest.raises(TypeError, match="uint8"):
        image_normalize(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="want"):
        image_normalize(torch.zeros(3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="want"):
        image_normalize(random_images(6), torch.float32, CounterNoise(0, 10, torch.arange(5)))


INTERPRETED = """
import torch
from rdmd_fast.kernels.image_normalize import image_normalize, image_normalize_reference
from rdmd_fast.kernels.noise_forward import CounterNoise
torch.manual_seed(0)
torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
for n, height, width, channels in ((3, 7, 5, 3), (2, 8, 8, 1), (5, 2, 3, 4), (2, 64, 41, 3), (0, 4, 4, 3)):
    images = torch.randint(0, 256, (n, height, width, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    counters = CounterNoise(2**63 + 7, 10, torch.arange(n) + 2**32 - 2)
    tensor_seed = counters._replace(seed=torch.tensor([7 - 2**63]))
    for dtype, ulp, flip in (
        (torch.float32, 0, None), (torch.float32, 0, counters), (torch.float16, 0, tensor_seed),
        (torch.bfloat16, 2**-8, tensor_seed), (torch.bfloat16, 2**-8, None),
    ):
        actual, expected = image_normalize(images, dtype, flip), image_normalize_reference(images, dtype, flip)
        assert actual.dtype == dtype and actual.stride() == expected.stride()
        assert ((actual.double() - expected.double()).abs() <= ulp).all(), (images.shape, dtype, flip)

images = torch.randint(0, 256, (3, 3, 5, 4), dtype=torch.uint8)
operation = torch.ops.rdmd_fast.image_normalize.default
torch.library.opcheck(operation, (images, torch.float32, 7, None, 10, torch.arange(3)))
compiled = torch.compile(image_normalize, fullgraph=True, backend="aot_eager")
flip = CounterNoise(2**63 + 7, 10, torch.arange(3))
assert torch.equal(compiled(images, torch.float32, flip), image_normalize(images, torch.float32, flip))
"""


def test_kernel_equals_the_reference_to_the_bit(interpreted):
    interpreted(INTERPRETED)
