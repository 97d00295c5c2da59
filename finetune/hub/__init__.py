"""Publishing: what is staged, checked and uploaded."""
