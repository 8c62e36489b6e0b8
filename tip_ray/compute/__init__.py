"""Pure functions on arrays and tensors: no Ray, no I/O."""
