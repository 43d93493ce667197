"""Define what the user can request: choices, references, settings, recipes, requests."""
