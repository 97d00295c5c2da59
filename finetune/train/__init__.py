"""One run, from a recipe to a saved model."""
