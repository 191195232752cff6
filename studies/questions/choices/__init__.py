"""Does τ hang on how it is computed? The same exchanges under other clocks, masks, numbers of examples and measures."""
