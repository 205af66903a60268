"""The paper's figures (arXiv 2406.14762), each made from runs: ``rdmd figures``."""
