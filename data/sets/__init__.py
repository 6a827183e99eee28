"""Data sets: text, rows, examples and batches."""
