"""Measure the layers, choose some, cut them out, verify the result."""
