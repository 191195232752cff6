"""Does the stage test say what is true, on controls whose truth is known?"""
