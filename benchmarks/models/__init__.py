"""What swapping the norms is worth in models of transformers, made with random weights."""
