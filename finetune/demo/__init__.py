"""The demo: a task, a small base, a local Hub."""
