"""Speed only: what the kernels cost, counted without a GPU and timed on one. Correctness is the tests' business."""
