"""What a recipe may say, and the checks of what it says."""
