"""Looped models of any other make: watched, adopted to the contract, and made by `loopify`."""
