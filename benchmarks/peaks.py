"""What the machine reaches: FLOP/s of a large matrix product by dtype, bytes/s of a large copy.

python -m benchmarks.peaks [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from benchmarks.networks import CUDA, DTYPES, matmul_peak
from benchmarks.step_measurements import processor
from benchmarks.timing import copy_bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    arguments = parser.parse_args()
    peaks = {
        "device": torch.cuda.get_device_name() if CUDA else processor(), "torch": torch.__version__,
        "copy_bandwidth": copy_bandwidth(), "matmul": {name: matmul_peak(name) for name in DTYPES},
    }  # fmt: skip
    products = ", ".join(f"{name} {rate / 1e12:.1f} TFLOP/s" for name, rate in peaks["matmul"].items())
    print(f"{peaks['device']}: copies {peaks['copy_bandwidth'] / 1e9:.0f} GB/s, matrix products {products}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(peaks, indent=1) + "\n")


if __name__ == "__main__":
    main()
