"""A fitted seam: the linear update before a cut that starts the healing or replaces it."""
