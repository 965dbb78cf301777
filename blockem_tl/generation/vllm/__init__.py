"""The vLLM engine: each request of a running batch under its own steering condition."""
