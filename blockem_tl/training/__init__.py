"""LoRA fine-tuning on completion tokens, with defences; and defences in a Trainer of your own (`defend`)."""
