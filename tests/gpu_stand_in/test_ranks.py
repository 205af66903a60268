import json
import socket
import subprocess
import sys

import pytest

from tests.gpu_stand_in import build
from tests.gpu_stand_in.child import environment
from tests.gpu_stand_in.log import ROOT, WAIT

pytestmark = [pytest.mark.gpu_stand_in, pytest.mark.timeout(900)]


def iteration_of(ranks: int, stage: int) -> list[dict]:
    """What each rank says of one iteration; each is a machine of its own, with one GPU."""
    lacking = build.obstacle()
    if lacking:
        pytest.skip(lacking)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "tests.gpu_stand_in.iteration", "--stage", str(stage), "--dtype", "fp32"]
    common = {**environment(), "WORLD_SIZE": str(ranks)}
    common |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.fixture(scope="module")
def alone():
    return iteration_of(1, 0)[0]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_train_as_one_and_do_not_wait_for_their_gpus(stage, alone):
    ranks = iteration_of(2, stage)
    for rank in ranks:
        assert rank["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert not [place for place in rank[WAIT] if not place.startswith("deepspeed/")]
    for name, loss in alone["losses"].items():
        assert sum(rank["losses"][name] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-4)
    assert any("deepspeed/comm" in place for place in ranks[0]["launch"])  # they did meet
