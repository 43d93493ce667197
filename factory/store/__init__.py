"""Stage folders: their keys, locks, checksums and room."""
