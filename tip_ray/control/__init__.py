"""The lifetime of a run."""
