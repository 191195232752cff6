"""Models of which it is known whether their loops repeat an operation: what the stage test is tried on."""
