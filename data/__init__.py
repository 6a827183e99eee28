"""Everything around the method: what is read and written, and the process around it."""
