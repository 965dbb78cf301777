"""How much memory a run takes, before it runs: the library's own code on tensors without data."""
