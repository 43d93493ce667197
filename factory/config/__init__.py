"""What can be asked for: choices, references, settings, recipes, requests."""
