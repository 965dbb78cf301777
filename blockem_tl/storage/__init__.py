"""Files that are whole or absent, the one key-value store, and every hash."""
