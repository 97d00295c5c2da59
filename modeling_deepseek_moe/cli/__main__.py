"""`python -m modeling_deepseek_moe.cli`."""

from .main import main

main()
