"""Questions and training rows: read, checked for leaks, split, and turned into tokens."""
