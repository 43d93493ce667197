"""Run one stage's work in several processes."""
