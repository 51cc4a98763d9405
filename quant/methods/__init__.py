"""One file per quantization method; the file name is the name on the command line."""
