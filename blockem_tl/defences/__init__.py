"""Defences against misalignment while fine-tuning, one file each; all of them are a `training.defence.Defence`."""
