"""Data: arrays as sources of rows, and the files that hold them."""
