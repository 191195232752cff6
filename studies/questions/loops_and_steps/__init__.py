"""Does a denoising step continue where the loops of the step before ended, or does it start anew?"""
