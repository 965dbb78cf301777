"""One run of an experiment on any preset: what it needs comes from `Setting`."""
