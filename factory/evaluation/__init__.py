"""Loss, tasks, speed, and whether a difference is significant."""
