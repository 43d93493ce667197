"""Tests of the factory: one file a module."""
