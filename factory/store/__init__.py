"""Keep stage folders: their keys, locks, checksums and disk space."""
