"""A rank that breaks, dies or hangs takes the job down, with its own error on top."""

import os
import signal
import time

import yaml
from material import toy_rdmd

CONFIG = toy_rdmd(checkpoint={"every": 2}, deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
# On rank 1 alone, in the third iteration.
RAISE = """
from rdmd_fast.errors import InputError
from rdmd_fast.rdmd import RDMD
iteration = RDMD.iteration
def spoilt(self, step):
    if rank == 1 and step == 2:
        {what}
    iteration(self, step)
RDMD.iteration = spoilt
"""


class Job:
    """Two ranks in a run folder."""

    def __init__(self, server, folder, *overrides, before=""):
        self.server, self.run, self.log = server, folder / "run", folder / "log"
        (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "run_dir": str(self.run)}))
        self.ranks = server.start(["--config", folder / "config.yaml", *overrides], 2, self.log, before)

    def until_training(self, seconds=120):
        metrics, deadline = self.run / "metrics.jsonl", time.monotonic() + seconds
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert metrics.exists(), self.log.read_text()

    def ended(self, seconds=120):
        return self.server.wait(self.ranks, seconds)

    def errors(self):
        """What the ranks said of it, in the order that they said it."""
        return [line for line in self.log.read_text().splitlines() if line.startswith(("rank ", "error: "))]


def test_exception_stands_on_top_and_the_other_rank_follows(rank_server, tmp_path):
    job = Job(rank_server, tmp_path, before=RAISE.format(what="raise RuntimeError('the cat sat on the optimizer')"))
    assert job.ended() == [1, 1]
    errors = job.errors()
    assert errors[0] == "rank 1: Traceback (most recent call last):"
    assert errors[-2] == "rank 1: RuntimeError: the cat sat on the optimizer"
    assert (
        errors[-1].startswith("rank 0: lost another rank, or could not reach it (")
        and "the first error above" in errors[-1]
    )
    assert sum(line.startswith("rank 0") for line in errors) == 1 and "Traceback" not in "".join(errors[1:])


def test_bad_input_that_one_rank_meets_ends_both(rank_server, tmp_path):
    what = "raise InputError('data.source: shard 7 is a photograph of a shard, pack it again')"
    job = Job(rank_server, tmp_path, before=RAISE.format(what=what))
    assert job.ended() == [1, 2]
    errors = job.errors()
    assert errors[0] == "error: data.source: shard 7 is a photograph of a shard, pack it again (rank 1)"
    assert len(errors) == 2 and errors[1].startswith("rank 0: lost another rank, or could not reach it (")
    assert "Traceback" not in job.log.read_text()


def test_bad_input_that_all_ranks_meet_is_told_once(rank_server, tmp_path):
    job = Job(rank_server, tmp_path, "train.global_batch_size=7")
    assert job.ended() == [2, 2]
    assert len(job.errors()) == 1 and "does not divide by 2 ranks" in job.errors()[0]


def test_killed_rank_takes_the_job_down(rank_server, tmp_path):
    job = Job(rank_server, tmp_path)
    job.until_training()
    os.kill(job.ranks[1], signal.SIGKILL)
    assert job.ended(60) == [1, -9]
    assert len(job.errors()) == 1 and job.errors()[0].startswith("rank 0: lost another rank, or could not reach it (")


TIMEOUTS = """
import os
import torch
from torch.distributed import distributed_c10d
from rdmd_fast import trainer
train = trainer.Training.train
def spoilt(self):
    groups = [group._get_backend(torch.device("cpu")) for group in distributed_c10d._world.pg_map]
    # In one write: both ranks have this log.
    os.write(1, f"timeouts {len(groups)} { {str(group.options._timeout) for group in groups} }\\n".encode())
    return train(self)
trainer.Training.train = spoilt
"""


def test_rank_that_hangs_is_given_up(rank_server, tmp_path):
    """The timeout reaches DeepSpeed's own groups too: theirs would be torch's 30 minutes."""
    job = Job(
        rank_server, tmp_path, "train.collective_timeout=10", "deepspeed.zero_optimization.stage=3", before=TIMEOUTS
    )
    job.until_training()
    os.kill(job.ranks[1], signal.SIGSTOP)
    try:
        assert rank_server.wait(job.ranks[:1], 60) == [1]
    finally:
        os.kill(job.ranks[1], signal.SIGKILL)
    assert len(job.errors()) == 1 and "no answer from another rank within train.collective_timeout" in job.errors()[0]
    assert "timeouts 2 {'0:00:10'}" in job.log.read_text()
