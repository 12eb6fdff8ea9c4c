"""Executes PTX, what nvcc makes of csrc/cuda, on the CPU, and checks every step: see README.md."""
