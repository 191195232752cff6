"""The catalogue: every measurement with its formula, range, meaning and pitfall, made on any looped model."""
