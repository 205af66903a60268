"""Interprets PTX, the assembly that Triton hands to NVIDIA's assembler, in NumPy.

``text`` reads it, ``machine`` runs blocks of threads, ``instructions`` is what each instruction computes, ``memory``
checks every access.
"""
