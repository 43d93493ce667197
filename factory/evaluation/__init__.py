"""Loss, tasks, speed, and the significance of differences."""
