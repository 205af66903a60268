"""Unpaired data: where the two domains come from."""

from __future__ import annotations

from pydantic import Field

from ..options import Options
from .toys import ToyDistribution


class DataOptions(Options):
    """Two domains, each a folder of shards or a toy, streamed independently of one another."""

    source: str | ToyDistribution | None = Field(None, description="source domain: a shard folder or {toy: name}")
    target: str | ToyDistribution | None = Field(
        None,
        description="target domain: a shard folder or {toy: name}; the rdmd stage only validates against it",
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
        description="decoded samples of one stream are kept in memory up to this size, GiB per rank (ours)",
    )
