"""Entry point of ``deepspeed rdmd_fast/train.py``, ``torchrun`` and ``python``: see trainer.py."""

import os
import sys
from pathlib import Path
from typing import NoReturn

# A script's own folder leads sys.path: `config`, `data` and `metrics` there would shadow other packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(str(Path(__file__).resolve().parent.parent))

from rdmd_fast.processes.entry import prepare_process  # noqa: E402
from rdmd_fast.processes.signals import StopSignal  # noqa: E402


def run_rank() -> NoReturn:
    """A whole process: it heeds signals before the seconds that imports take, and keeps no other rank waiting."""
    prepare_process()
    stop = StopSignal(launched="LOCAL_RANK" in os.environ).hold()
    from rdmd_fast.processes.failures import end_after_error, end_process
    from rdmd_fast.trainer import main

    try:
        status = main(stop=stop)
    except Exception as error:
        end_after_error(error)
    stop.ignore()
    end_process(status)


if __name__ == "__main__":
    run_rank()
