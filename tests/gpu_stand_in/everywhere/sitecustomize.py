"""Every Python process on the stand-in, those that others start too: PYTHONPATH=tests/gpu_stand_in/everywhere:."""

from tests.gpu_stand_in import install

install()
