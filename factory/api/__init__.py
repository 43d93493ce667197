"""The Python interface: one function a command, and results that show themselves in a notebook."""
