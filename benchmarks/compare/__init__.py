"""Two results files against each other."""
