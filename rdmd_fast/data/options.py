"""The ``data`` section of a config."""

from collections.abc import Iterator

from pydantic import Field

from rdmd_fast.data.toys import ToyDistribution
from rdmd_fast.options import Options


class DataOptions(Options):
    """Two domains, each a set of shards or a toy, streamed independently of one another."""

    source: str | list[str] | ToyDistribution | None = Field(
        None,
        description="source domain: {toy: name}, or shards: a folder, a glob, a brace pattern as "
        "shards/{000..099}.tar, http(s), s3, gs or hf URLs of tars or of a packed folder, pipe:COMMAND (a shell "
        "command of your own that writes a tar), several as a list or joined by ::",
    )
    target: str | list[str] | ToyDistribution | None = Field(
        None, description="target domain, as source; the rdmd stage only validates against it"
    )
    source_holdout: str | None = Field(None, description="shards of sources that training never sees, for validation")
    target_holdout: str | None = Field(None, description="shards of targets that training never sees, for validation")
    target_class: int | None = Field(
        None, ge=0, description="class of the target domain, for a class-conditional teacher"
    )
    flip: bool = Field(
        False,
        description="mirror training samples of both domains left to right with probability 1/2, held-out ones never "
        "(EDM: on for FFHQ and AFHQv2; ours: off, since digits, text and asymmetric objects must not be)",
    )
    cache_gib: float = Field(
        4.0,
        ge=0,
        le=1e6,
        description="decoded samples of one stream are kept in memory up to this size, GiB per node: its ranks share "
        "them in /dev/shm; larger sets are decoded anew each epoch (ours)",
    )
    cache_dir: str | None = Field(
        None,
        description="folder for copies of remote shards and for indexes of foreign ones; unset: "
        "$XDG_CACHE_HOME/rdmd_fast or ~/.cache/rdmd_fast (ours)",
    )
    shuffle_shards: int = Field(
        256,
        ge=1,
        description="shards whose samples are shuffled together; sets of no more shards are permuted as a whole. Part "
        "of the order: a change gives other batches (ours)",
    )
    workers: int | None = Field(
        None,
        ge=0,
        le=64,
        description="processes of a rank that decode ahead of its steps; 0 to decode in line; unset: one for a rank on "
        "a GPU that has two cores or more, else none. The samples do not depend on it (ours)",
    )
    prefetch: int = Field(
        4,
        ge=1,
        le=64,
        description="micro-batches that workers decode ahead of the step; without effect at workers: 0 (ours)",
    )
    max_dropped: float = Field(
        0.01,
        ge=0,
        le=1,
        description="share of a set's samples that may be unreadable; beyond it the run stops with the list (ours)",
    )

    def named_paths(self) -> Iterator[tuple[str, str]]:
        """(key, what it names) of all data that are no toys."""
        for role in ("source", "target", "source_holdout", "target_holdout"):
            spec = getattr(self, role)
            for piece in spec if isinstance(spec, list) else [spec] * isinstance(spec, str):
                yield from ((f"data.{role}", path) for path in piece.split("::"))
