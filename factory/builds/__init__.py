"""The build folder: its record, its layout, its integrity, and publishing it."""
