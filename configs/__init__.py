"""One file a family of set-ups; `--config=configs/X.py[:arguments]`. What they share is in `common`."""
