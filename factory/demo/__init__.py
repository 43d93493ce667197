"""The embedded demo model, and the text and the task it is tried on."""
