"""Running a transformers model with our attention: hooks, compiled layers, CUDA graphs."""
