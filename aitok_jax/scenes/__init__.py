"""The built-in world: furnished rooms, ray cast; knows nothing of training."""
