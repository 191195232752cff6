"""studies: runs that anyone can repeat. Scripts are here; what a question measures and says is in `questions`.

    python studies/pretrain.py --list              # what can be trained, and how long it takes
    python studies/claims.py --groups automaton    # the paper's claims, tested on one task
"""
