"""The stages, their keys and their order, and previews of what they need."""
