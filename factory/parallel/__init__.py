"""One stage's work in several processes."""
