"""Which training recipe makes a LoopMDM use its loops?"""
