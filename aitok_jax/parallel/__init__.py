"""Many devices and processes as one run."""
