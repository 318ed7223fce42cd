"""Random access to examples on disk."""
