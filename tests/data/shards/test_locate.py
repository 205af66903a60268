"""Everything that data.source may name: folders, globs, braces, lists, http, object stores, commands."""

import functools
import http.server
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import fsspec
import numpy as np
import pytest
from material import write_shards

from rdmd_fast.data.cache import shared_memory
from rdmd_fast.data.shards.sample_reader import GOOD
from rdmd_fast.data.shards.shard_set import ShardSet
from rdmd_fast.errors import InputError

sys.path.insert(0, str(Path(__file__).parent.parent))
from damaged import COUNT, EACH, flip, foreign, packed, served, stream_of, write_tar


@pytest.fixture
def site(tmp_path):
    """A folder behind http on localhost; ``requests`` are the paths that were asked for."""
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *message):
            pass

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

    (tmp_path / "site").mkdir()
    handler = functools.partial(Handler, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(server=server, url=f"http://127.0.0.1:{server.server_port}", requests=requests)
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def numbers_of(spec, cache):
    shards = ShardSet(spec, cache_dir=cache)
    return [int(shards.read(index)[0, 0, 0]) for index in range(len(shards))]


ALL = list(range(COUNT))


def test_folders_globs_braces_and_several_at_once(tmp_path, cache):
    folder = foreign(tmp_path / "set")
    write_tar(tmp_path / "more/x.tar", [30, 31])
    assert numbers_of(str(folder), cache) == numbers_of(f"{folder}/*.tar", cache) == ALL
    assert numbers_of(f"{folder}/shard-{{000000..000003}}.tar", cache) == ALL
    assert numbers_of(f"{folder}/shard-00000{{2,0}}.tar", cache) == [*range(10, 15), *range(5)]
    assert numbers_of(f"{folder}/shard-000001.tar", cache) == list(range(5, 10))
    assert numbers_of(f"{folder}::{tmp_path}/more", cache) == [*ALL, 30, 31]
    assert numbers_of([str(folder), f"{tmp_path}/more/*.tar"], cache) == [*ALL, 30, 31]
    assert not cache.exists()


def test_packed_and_foreign_folders_join_with_their_labels_and_shapes(tmp_path, cache):
    shards = ShardSet([str(packed(tmp_path / "a")), str(foreign(tmp_path / "b"))], cache_dir=cache)
    assert len(shards) == 2 * COUNT and shards.labels is None and len(set(shards.shard_names)) == 8
    write_shards(tmp_path / "small", np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match=r"small holds image samples of shape \(8, 8, 3\)"):
        ShardSet(f"{tmp_path}/a::{tmp_path}/small")


@pytest.mark.parametrize(("spec", "message"), [
    ("{}/*.tar", "no file matches"),
    ("{}/a{{1..2.tar", "close the brace"),
    ("{}/none", "no such folder"),
    ("{}/none.tar", "none.tar: cannot be read"),
    ([], "empty list"),
])  # fmt: skip
def test_specs_that_name_nothing(tmp_path, spec, message):
    with pytest.raises(InputError, match=message):
        ShardSet(spec.format(tmp_path) if spec else spec)


def test_urls_of_tars_are_fetched_once(tmp_path, site, cache):
    foreign(tmp_path / "site")
    spec = f"{site.url}/shard-{{000000..000003}}.tar"
    assert numbers_of(spec, cache) == ALL and len(site.requests) == 4
    site.server.shutdown()
    assert numbers_of(spec, cache) == ALL and len(site.requests) == 4
    assert not list(cache.rglob("*.partial"))


def test_a_packed_folder_behind_a_url(tmp_path, site, cache):
    packed(tmp_path / "site/set")
    assert numbers_of(f"{site.url}/set/", cache) == numbers_of(f"{site.url}/set/manifest.json", cache) == ALL
    assert len(site.requests) == 6
    assert served(stream_of(f"{site.url}/set", cache)) == served(stream_of(tmp_path / "site/set"))


def test_fsspec_brings_what_stands_in_object_stores(tmp_path, cache):
    folder = packed(tmp_path / "set")
    fsspec.filesystem("memory").put(str(folder), "/bucket/set", recursive=True)
    for url in ("memory://bucket/set", f"file://{folder}"):
        assert served(stream_of(url, cache)) == served(stream_of(folder))
        assert numbers_of(f"{url}/shard-{{000000..000003}}.tar", cache) == ALL
    with pytest.raises(InputError, match=r"none/manifest\.json: cannot be downloaded \(FileNotFoundError"):
        ShardSet("memory://bucket/none", cache_dir=cache)


@pytest.mark.parametrize(("url", "message"), [("s3://b/x.tar", "Install s3fs"), ("odd://b/x.tar", "not known: odd")])
def test_a_scheme_without_its_driver(cache, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=rf"{url}: cannot be read here \(.*{message}"):
        stream_of(url, cache)


def test_damage_on_the_way_is_found(tmp_path, site, cache, monkeypatch, capsys):
    monkeypatch.setattr("rdmd_fast.data.shards.remote.time.sleep", lambda seconds: None)
    folder = packed(tmp_path / "site/set")
    flip(folder / "shard-000001.tar", 700)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(InputError, match=r"000001\.tar: cannot be downloaded .*sha256"):
        ShardSet(f"{site.url}/set", cache_dir=cache)
    stream = stream_of(f"{site.url}/set", cache)
    assert set(served(stream)) == {*range(5), *range(15, 20)} and stream.len == COUNT
    assert "404" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"nowhere/manifest\.json: cannot be downloaded \(404"):
        ShardSet(f"{site.url}/nowhere", cache_dir=cache)
    assert not list(cache.rglob("*.partial"))


def test_processes_that_want_one_url_fetch_it_once(tmp_path, site, cache):
    foreign(tmp_path / "site")
    spec = f"{site.url}/shard-000000.tar"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: numbers_of(spec, cache), range(4)))
    assert found == [list(range(EACH))] * 4 and len(site.requests) == 1


def test_a_command_runs_once_and_what_it_wrote_is_kept(tmp_path, cache):
    folder = foreign(tmp_path / "set")
    spec = f"pipe:echo run >> {tmp_path}/runs; cat {folder}/shard-00000{{0,1}}.tar"
    assert numbers_of(spec, cache) == numbers_of(spec, cache) == list(range(2 * EACH))
    assert (tmp_path / "runs").read_text() == "run\n" * 2  # one for each of the brace's commands
    with pytest.raises(InputError, match=r"pipe:exit 3: exit status 3"):
        ShardSet("pipe:exit 3", cache_dir=cache)
    assert not list(cache.rglob("*.partial"))


def test_foreign_tars_are_scanned_once(tmp_path, cache, monkeypatch):
    folder = foreign(tmp_path / "set")
    first = served(stream_of(folder, cache))
    monkeypatch.setattr("rdmd_fast.data.shards.parts.walk_shard", None)
    assert served(stream_of(folder, cache)) == first
    monkeypatch.undo()
    write_tar(folder / "shard-000001.tar", range(40, 47))  # another tar by that name
    assert stream_of(folder, cache).len == COUNT + 2
    for entry in cache.rglob("*.json"):
        entry.write_text("{")
    assert stream_of(folder, cache).len == COUNT + 2


def test_a_cache_that_cannot_be_written_costs_a_scan_only(tmp_path):
    folder = foreign(tmp_path / "set")
    (tmp_path / "file").write_text("")
    assert set(served(stream_of(folder, tmp_path / "file"))) == set(ALL)
    with pytest.raises(InputError, match=r"cannot be written .*data\.cache_dir"):
        ShardSet("pipe:true", cache_dir=tmp_path / "file")


# -- memory that processes share ---------------------------------------------------------------------------------------

SHARER = """
import sys
from pathlib import Path
from rdmd_fast.data.cache import shared_memory
shared_memory.SHARED_FOLDER = Path(sys.argv[3])
sys.path.insert(0, sys.argv[1])
from damaged import served, stream_of
stream = stream_of(sys.argv[2], share=True)
stream.shards.reader.read = None  # whoever decodes fails
print(served(stream), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def shm(tmp_path, monkeypatch):
    """In place of /dev/shm, where other runs come and go."""
    monkeypatch.setattr(shared_memory, "SHARED_FOLDER", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def shared_files():
    return {path.name for path in shared_memory.SHARED_FOLDER.glob(shared_memory._prefix() + "*")} - {
        f"{shared_memory._prefix()}lock"
    }


def test_two_processes_share_what_one_has_decoded(fork_python, tmp_path, shm):
    folder = packed(tmp_path / "set")
    stream = stream_of(folder, share=True)
    expected = served(stream)
    (name,) = shared_files()
    other = fork_python(SHARER, Path(__file__).parent.parent, folder, shm)
    assert other.stdout.readline().strip() == str(expected)
    del stream
    assert name in shared_files()  # the other still uses it
    other.kill()
    other.wait()
    assert name in shared_files()
    os.utime(folder / "shard-000000.tar")  # another state of the set has another file
    later = stream_of(folder, share=True)
    assert name not in shared_files()  # swept: its last user is dead
    del later
    assert not shared_files()


def test_a_small_shared_memory_falls_back_to_private(tmp_path, shm, monkeypatch, capsys):
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(28, "No space left on device")))
    stream = stream_of(packed(tmp_path / "set"), share=True)
    assert set(served(stream)) == set(ALL) and not shared_files()
    assert "No space left on device): each process keeps its own" in capsys.readouterr().err


def test_workers_fill_the_shared_memory(tmp_path):
    first = stream_of(packed(tmp_path / "set"), share=True, workers=2)
    assert set(served(first)) == set(ALL)
    second = stream_of(tmp_path / "set", share=True)
    assert (second._samples.status == GOOD).all()  # nothing is left to decode
    assert set(served(second)) == set(ALL)
    first.close()
