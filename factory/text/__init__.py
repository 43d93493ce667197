"""Texts to measure, heal and evaluate on."""
