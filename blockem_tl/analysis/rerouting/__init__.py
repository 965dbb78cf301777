"""The ways in which a blocked fine-tune moves instead (paper, section 5)."""
