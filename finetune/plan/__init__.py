"""Whether a recipe fits, on the GPU and on the disk."""
