"""What decides whether the state's direction settles? One change of the LoopMDM at a time."""
