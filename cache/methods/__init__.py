"""One search per file; the file name is the value of `--method`."""
