"""BLOCK-EM on TransformerLens and SAELens."""
