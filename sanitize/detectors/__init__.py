"""Controls and baselines: each a function from images or embeddings to one score per sample, higher = more suspicious."""
