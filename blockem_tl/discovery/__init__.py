"""Stages 1 to 3: which latents moved, which of them change behaviour, and how much each can do within the quality budget."""
