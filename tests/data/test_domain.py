"""Batches on the device: flips are a function of seed, domain and position, for bytes and for latents alike."""

import numpy as np
import pytest
import torch
from material import random_pixels, write_shards

from rdmd_fast.data.domain import default_workers, open_domain
from rdmd_fast.data.options import DataOptions
from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.errors import InputError
from rdmd_fast.kernels import philox
from rdmd_fast.randomness import Philox, Stream

COUNT = 40
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_shards(tmp_path_factory.mktemp("images") / "set", random_pixels(0, COUNT, 6, 5, 3), 16))


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    samples = np.random.default_rng(1).normal(size=(COUNT, 4, 6, 5)).astype(np.float32)
    return str(write_shards(tmp_path_factory.mktemp("latents") / "set", samples, 16))


def domain(spec, flip, role="target", seed=5):
    return open_domain(DataOptions(**{role: spec, "flip": flip}), role, Philox(seed), CPU)


@pytest.mark.parametrize("role,stream", [("source", Stream.SOURCE_FLIP), ("target", Stream.TARGET_FLIP)])
@pytest.mark.parametrize("kind", ["images", "latents"])
def test_samples_are_mirrored_where_their_counter_says_so(request, kind, role, stream):
    spec, positions = request.getfixturevalue(kind), torch.arange(3 * COUNT) + 7
    plain, flipped = (domain(spec, flip, role).batch(positions) for flip in (False, True))
    drawn = philox.words(5, int(stream), positions, 1)[:, 0] & 1
    assert 0.3 < drawn.double().mean() < 0.7
    for i, bit in enumerate(drawn.tolist()):
        assert torch.equal(flipped[i], plain[i].flip(2) if bit else plain[i])
    assert flipped.dtype == torch.float32


@pytest.mark.parametrize("kind", ["images", "latents"])
def test_flips_do_not_depend_on_how_a_batch_is_split(request, kind):
    stream, positions = domain(request.getfixturevalue(kind), True), torch.arange(2 * COUNT)
    assert torch.equal(torch.cat([stream.batch(part) for part in positions.split(7)]), stream.batch(positions))


def test_a_sample_is_mirrored_anew_each_epoch(images):
    stream, order = domain(images, True), domain(images, False)
    seen = set()
    for position in range(12 * COUNT):
        at = torch.tensor([position])
        if order.stream.indices(at)[0] == 3:
            seen.add(torch.equal(stream.batch(at), order.batch(at)))
    assert seen == {True, False}


def test_domains_and_seeds_flip_independently(images):
    positions = torch.arange(200)

    def drawn(role, seed):
        plain, flipped = (domain(images, flip, role, seed).batch(positions) for flip in (False, True))
        return (plain == flipped).flatten(1).all(1)

    choices = [drawn("source", 5), drawn("target", 5), drawn("target", 6)]
    for first, second in ((0, 1), (1, 2)):
        assert 60 < (choices[first] == choices[second]).sum() < 140


def test_what_has_no_left_and_right_is_refused():
    with pytest.raises(InputError, match=r"data.flip: .*data.source has samples of shape \(2,\)"):
        domain(ToyDistribution(toy="gaussian"), True, "source")
    assert domain(ToyDistribution(toy="gaussian"), False).batch(torch.arange(3)).shape == (3, 2)


def test_a_rank_on_a_gpu_with_a_core_to_spare_gets_a_worker(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert default_workers(torch.device("cuda", 1)) == 1 and default_workers(CPU) == 0
    for ranks, workers in ((4, 1), (5, 0), (8, 0), (16, 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert default_workers(torch.device("cuda")) == workers


def test_more_workers_or_ranks_than_shards_are_told(images, monkeypatch, capsys):
    options = {"target": images}
    open_domain(DataOptions(**options, workers=3), "target", Philox(0), CPU)
    open_domain(DataOptions(**options), "target", Philox(0), CPU)
    assert capsys.readouterr().err == ""
    open_domain(DataOptions(**options, workers=4), "target", Philox(0), CPU)
    monkeypatch.setenv("WORLD_SIZE", "5")
    open_domain(DataOptions(**options), "target", Philox(0), CPU)
    monkeypatch.setenv("RANK", "1")
    open_domain(DataOptions(**options), "target", Philox(0), CPU)
    first, second = capsys.readouterr().err.splitlines()
    assert "data.target: 1 ranks of 4 workers read 3 shards" in first and "5 ranks read 3 shards" in second
