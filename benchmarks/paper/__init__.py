"""The paper's models with every norm: time, quality, memory, invariances.

Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019.
"""
