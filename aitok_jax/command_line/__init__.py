"""What commands have in common: `--config` and its overrides, `--help`, progress."""
