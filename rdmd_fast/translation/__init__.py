"""What ``rdmd translate`` and ``rdmd baseline`` are made of: samples in, sizes, methods, files out, processes."""
