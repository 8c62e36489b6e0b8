"""What crosses a boundary: specs, tables, run states, errors. Imports nothing heavy."""
