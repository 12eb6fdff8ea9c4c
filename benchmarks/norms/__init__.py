"""The norms alone, against PyTorch's and every peer's: the main benchmark (``make bench``)."""
