"""Programs on the stand-in, each in this process or many after one another.

python -m tests.gpu_stand_in.command rdmd_fast.cli translate --model …    # runs a module as `python -m` would
python -m tests.gpu_stand_in.command                                      # reads requests, see `serve`
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import runpy
import sys
import traceback

from tests.gpu_stand_in import install

install()  # in processes that multiprocessing starts as well, which import this module first


def serve() -> None:
    """For each line ``["module", "argument", …]`` call ``module.main(arguments)`` and answer with a line of JSON.

    Answers have ``status``, what was ``said`` (a traceback for an exception, whose status is 1), and ``wait``, ``copy``
    and ``launch``, counts by place. Standard error is left alone.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), file=answers, flush=True)


def answer(module: str, *arguments: str) -> dict:
    from tests.gpu_stand_in.device import recording
    from tests.gpu_stand_in.log import KINDS

    with recording() as log, contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            status = importlib.import_module(module).main(list(arguments))
        except Exception:
            traceback.print_exc(file=said)
            status = 1
    return {"status": status, "said": said.getvalue()} | {kind: log.table(kind) for kind in KINDS}


if __name__ == "__main__":
    if sys.argv[1:]:
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__")
    else:
        serve()
