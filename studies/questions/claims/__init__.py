"""The LoopMDM paper's claims about compute (2605.26106), tested on the models of the zoo."""
