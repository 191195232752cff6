"""Do the loops re-run the same stages of inference? The stage test over the zoo, and over models of others."""
