"""What a run's folder is, and what a finished run left in it."""
