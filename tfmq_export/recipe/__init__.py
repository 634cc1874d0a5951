"""What quantization decides, as plain data: grids, integers, exponents and tables. Needs numpy alone."""
