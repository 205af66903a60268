"""What ``rdmd translate`` is made of: samples in, sizes, the generator's pass, files out, processes."""
