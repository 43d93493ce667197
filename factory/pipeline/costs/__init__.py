"""What a build needs: disk, memory and time, and the work that a budget allows."""
