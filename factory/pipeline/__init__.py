"""The stages, their keys and their order; previews of what they will take."""
