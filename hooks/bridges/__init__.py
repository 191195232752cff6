"""Other libraries' formats: TransformerLens, transformers, and checkpoints of other masked-diffusion code."""
