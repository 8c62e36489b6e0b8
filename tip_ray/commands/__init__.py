"""The commands of `tip-ray`, one function each: options in, exit code out."""
