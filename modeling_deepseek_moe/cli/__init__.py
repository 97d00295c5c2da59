"""The command `deepseek-moe`: thin verbs, whose work and whose imports are elsewhere."""
