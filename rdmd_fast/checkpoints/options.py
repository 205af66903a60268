"""Options of checkpoints."""

from typing import Literal

from pydantic import Field

from rdmd_fast.options import Options


class CheckpointOptions(Options):
    """What is kept to go on from."""

    every: int = Field(1000, ge=0, description="iterations between checkpoints, 0 for only at the end (ours)")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept (ours)")
    keep_every: int = Field(
        0, ge=0, description="iterations; checkpoints at its multiples are kept for good, 0 for none (ours)"
    )
    on_failure: Literal["stop", "warn"] = Field(
        "stop",
        description="where the run folder cannot be written, as on a full disk: stop ends the run, warn goes on "
        "without that checkpoint, picture or line; a run's last checkpoint and export must succeed (ours)",
    )
