"""TransformerLens models with live LoRA adapters, and what can be read from them."""
