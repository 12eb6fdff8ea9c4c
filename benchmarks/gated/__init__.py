"""Gated, grouped and per-head norms beside what people write."""
