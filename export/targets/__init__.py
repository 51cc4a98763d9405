"""One file per format; the file name is the value of `--format`."""
