"""rdmd_fast/train.py on the stand-in: python -m tests.gpu_stand_in.train --config FILE [key=value …]"""

import sys

from tests.gpu_stand_in import install

if __name__ == "__main__":
    install()
    from rdmd_fast.trainer import main

    sys.exit(main(sys.argv[1:]))
