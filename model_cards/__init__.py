"""Cards: of what is published after a run, of the released models, and of the demo's base."""
