"""Where examples come from: built-in scenes, files on disk, and the pipeline that batches them."""
