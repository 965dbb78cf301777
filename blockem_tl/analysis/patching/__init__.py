"""Activation patching between base and a fine-tuned model (paper, section 5 and F.1)."""
