"""How good a model is: metrics, perplexity, benchmarks, and talking to it."""
