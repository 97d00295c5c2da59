"""What a checkpoint can be written as: plain and FP8 weights, transformers' types, DeepSeek's inference files."""
