"""Weight formats: one table in `formats`, which needs no torch; each format its own mathematics in a module."""
