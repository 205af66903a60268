"""Shards that a command writes, and what is lost of a damaged one."""

import pytest
from material import encoded, picture, write_tar

from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError

COUNT = 100


@pytest.fixture
def tar(tmp_path):
    path = tmp_path / "x.tar"
    write_tar(path, {f"{number:04d}.png": encoded(picture(number)) for number in range(COUNT)})
    return path


@pytest.mark.parametrize(("command", "said"), [
    ("exit 3 | cat {tar}", "exit status 3"),
    ("cat {tar} | (cat; exit 4) | cat", "exit status 4"),
    ("head -c 12000 {tar}", "12000 bytes came, which are no whole tar (truncated"),
    ("true", "0 bytes came, which are no whole tar"),
    ("echo not found", "10 bytes came, which are no whole tar"),
])  # fmt: skip
def test_what_a_failed_command_wrote_is_not_kept(tmp_path, tar, command, said):
    for tolerant in (False, True):
        with pytest.raises(InputError) as error:
            ShardSet(f"pipe:{command.format(tar=tar)}", tolerant, tmp_path / "cache")
        assert said in str(error.value)
        assert not list((tmp_path / "cache").rglob("*.tar*"))


def test_the_same_command_runs_again_once_it_is_mended(tmp_path, tar):
    source = tmp_path / "source.tar"
    source.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(InputError, match="no whole tar"):
        ShardSet(f"pipe:cat {source} | cat", True, tmp_path / "cache")
    source.write_bytes(tar.read_bytes())
    assert len(ShardSet(f"pipe:cat {source} | cat", True, tmp_path / "cache")) == COUNT
    source.unlink()
    assert len(ShardSet(f"pipe:cat {source} | cat", True, tmp_path / "cache")) == COUNT  # kept


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_losses_are_estimated_by_the_bytes_that_are_damaged(tmp_path, tar, share):
    data = bytearray(tar.read_bytes())
    first, end = int(0.1 * len(data)), int((0.1 + share) * len(data))
    data[first:end] = bytes(end - first)
    tar.write_bytes(data)
    shards = ShardSet(str(tar), tolerant=True, cache_dir=tmp_path / "cache")
    assert abs(len(shards) + shards.lost - COUNT) <= 0.15 * COUNT
    assert shards.lost == pytest.approx(share * COUNT, abs=0.15 * COUNT)
