"""The same build on rented hardware."""
