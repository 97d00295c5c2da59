"""LoRA and ESFT adapters: read, renamed for other programs, merged into a checkpoint."""
