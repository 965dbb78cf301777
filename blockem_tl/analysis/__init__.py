"""Analyses of how misalignment re-emerges: patching, attribution, rerouting, and whether the SAE still reconstructs."""
