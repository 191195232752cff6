"""Training: the run, its random draws, one step's gradient, evaluation, presets, FLOPs, the machine."""
