"""Can a model fill more rows of an automaton than it was trained on, if it may loop more?"""
