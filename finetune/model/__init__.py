"""What touches modules: loading, LoRA, four bits, ESFT layers, counting and balancing experts."""
