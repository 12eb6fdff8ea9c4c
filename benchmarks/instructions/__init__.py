"""Instructions per element of the CPU kernels, counted, not timed."""
