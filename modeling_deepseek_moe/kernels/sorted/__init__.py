"""Expert products on tokens sorted by expert, in plain PyTorch."""
