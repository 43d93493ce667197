"""The commands, a file for each kind; what several of them share is in `options`."""
