"""One file per stop on the data's path."""
