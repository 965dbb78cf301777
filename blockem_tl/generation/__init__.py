"""Replies under steering, many conditions at once: `generate`, the engines, and replies that are kept on disk."""
