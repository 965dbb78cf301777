"""SAELens SAEs: loading, reading chosen latents, and `LatentSet`, the latents K."""
