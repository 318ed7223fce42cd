"""One run: its set-up, its loop, what it keeps."""
