"""Sources of rows for training and evaluation: arrays, memory-mapped files and Datasets."""
