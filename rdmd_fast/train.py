"""Entry point of ``deepspeed rdmd_fast/train.py``, ``torchrun`` and ``python``: see trainer.py."""

import sys
from pathlib import Path

# A script's own folder leads sys.path: `config`, `data` and `metrics` there would shadow other packages.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
sys.path.append(str(Path(__file__).resolve().parent.parent))

from rdmd_fast.trainer import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
