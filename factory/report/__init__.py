"""Cards, figures and tables: pure functions of a build."""
