"""What lies on disk: folders of work, signed tensors, models. No file is lost by a bad input or a stopped process."""
