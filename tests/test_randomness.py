import pytest
import torch

from rdmd_fast.errors import InputError
from rdmd_fast.kernels import philox
from rdmd_fast.randomness import Philox, Stream

NOISE = Stream.GENERATOR_NOISE


def test_stream_values_are_fixed_and_distinct():
    # Any change here changes every run that was ever recorded.
    names = """
        SOURCE_ORDER TARGET_ORDER SOURCE_POINTS TARGET_POINTS GENERATOR_SIGMA GENERATOR_NOISE FAKE_SIGMA
        FAKE_NOISE TEACHER_SIGMA TEACHER_NOISE SOURCE_FLIP HUE SAMPLER VALIDATION_SIGMA VALIDATION_NOISE
        EVALUATION SPLIT TARGET_FLIP SAMPLER_CHURN SAMPLER_CLASS
    """
    for value, name in enumerate(names.split()):
        assert Stream[name] == value
    assert len(set(Stream)) == len(Stream.__members__)  # an alias would share another's numbers


def test_image_elements_count_in_channels_last_order():
    positions = torch.tensor([0, 7, 2**34])
    x = Philox(3).normal(NOISE, positions, (3, 4, 5))
    assert x.shape == (3, 3, 4, 5) and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x.permute(0, 2, 3, 1).reshape(3, -1), philox.normal(3, NOISE, positions, 60))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 3, 4, 5)])
def test_other_shapes_count_in_row_major_order(shape):
    x = Philox(3).normal(NOISE, [1, 2], shape)
    assert x.shape == (2, *shape) and x.is_contiguous()
    assert torch.equal(x.flatten(), philox.normal(3, NOISE, torch.tensor([1, 2]), x[0].numel()).flatten())


def test_empty_batches_keep_their_shape():
    assert Philox(0).normal(NOISE, [], (3, 2, 2)).shape == (0, 3, 2, 2)


def test_uniform_is_fp64_in_the_open_interval():
    u = Philox(3).uniform(Stream.SPLIT, range(1000), 4)
    assert u.shape == (1000, 4) and u.dtype == torch.float64
    assert 0 < u.min() < 0.01 and 0.99 < u.max() < 1


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_an_input_error(seed):
    with pytest.raises(InputError, match="seed"):
        Philox(seed)


def test_permutation_is_one_and_follows_seed_stream_and_epoch():
    order = Philox(3).permutation(Stream.SOURCE_ORDER, 2, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, Philox(3).permutation(Stream.SOURCE_ORDER, 2, 1000))
    others = [
        Philox(4).permutation(Stream.SOURCE_ORDER, 2, 1000),
        Philox(3).permutation(Stream.TARGET_ORDER, 2, 1000),
        Philox(3).permutation(Stream.SOURCE_ORDER, 3, 1000),
    ]
    assert all((order == other).sum() < 20 for other in others)
    assert [len(Philox(3).permutation(Stream.SOURCE_ORDER, 0, n)) for n in (0, 1, 3)] == [0, 1, 3]


def test_permutation_sorts_64_bit_keys():
    words = philox.words(3, Stream.SPLIT, torch.tensor([5]), 100).view(50, 2).tolist()
    keys = [(high - 2**32 if high >= 2**31 else high) * 2**32 + low for high, low in words]
    expected = sorted(range(50), key=keys.__getitem__)
    assert Philox(3).permutation(Stream.SPLIT, 5, 50).tolist() == expected


def test_every_order_of_three_is_as_likely():
    orders = [tuple(Philox(3).permutation(Stream.SPLIT, epoch, 3).tolist()) for epoch in range(1200)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6 and sum((count - 200) ** 2 / 200 for count in counts) < 20.5  # chi-squared, p = 0.001
