"""Fine-tuning with transformers' Trainer and PEFT: LoRA targets in words, recipes, data, training and the demo."""
