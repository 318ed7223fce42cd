"""What commands with a `--config` have in common."""
