"""The words of the stories: who, what, and how things change. A story uses the first few of each list."""

from __future__ import annotations

KINDS = ("directions", "containers", "possessions")
WIDTH = {"directions": 6, "containers": 8, "possessions": 8}
"""Words in the sentence of a step, its full stop included."""
DIRECTIONS = ("north", "east", "south", "west")
TURNS = ("right", "back", "left")
"""How a person turns; the i-th by i + 1 quarters clockwise."""
NAMES = ("Tom", "Ann", "Bob", "Sue", "Max", "Eve", "Jim", "Liz", "Dan", "Amy", "Ben", "Ida", "Leo", "Mia", "Ned", "Joy",
         "Sam", "Kim", "Ray", "Una", "Tim", "Zoe", "Hal", "Fay", "Gus", "Ivy", "Roy", "Pam", "Ted", "Meg", "Ken", "Ada")
"""Those at even places are followed by he, the others by she."""
CONTAINERS = ("box", "bag", "jar", "cup", "tin", "pot", "case", "sack", "vase", "bowl", "chest", "crate")
ITEMS = ("ball", "key", "coin", "ring", "book", "lamp", "pen", "cap", "map", "doll", "drum", "fan", "bell", "kite",
         "rope", "shell", "stone", "stamp", "spoon", "brush", "clock", "glove", "whistle", "candle")
