"""The words of the stories: who, what, and how things change. A story uses the first few of each list."""

from __future__ import annotations

KINDS = ("directions", "containers", "possessions")
WIDTH = {"directions": 6, "containers": 8, "possessions": 8}
"""Words in the sentence of a step, its full stop included."""
DIRECTIONS = ("north", "east", "south", "west")
TURNS = ("right", "back", "left")
"""How a person turns; the i-th by i + 1 quarters clockwise."""
NAMES = ("Tom", "Ann", "Bob", "Sue", "Max", "Eve", "Jim", "Liz", "Dan", "Amy", "Ben", "Ida", "Leo", "Mia", "Ned", "Joy",
         "Sam", "Kim", "Ray", "Una", "Tim", "Zoe", "Hal", "Fay", "Gus", "Ivy", "Roy", "Pam", "Ted", "Meg", "Ken", "Ada",
         "Abe", "Bea", "Al", "Bess", "Art", "Cath", "Bill", "Cora", "Cal", "Dora", "Carl", "Edna", "Clay", "Ella",
         "Cole", "Emma", "Dave", "Enid", "Dean", "Etta", "Don", "Flo", "Doug", "Gail", "Earl", "Gwen", "Ed", "Hope",
         "Eli", "Ines", "Fred", "Iris", "Gary", "Jane", "Glen", "Jean", "Greg", "Jill", "Hank", "Joan", "Hugh", "June",
         "Ian", "Kate", "Jack", "Kay", "Jake", "Lena", "Joel", "Lily", "John", "Lois", "Josh", "Lucy", "Karl", "Mary",
         "Kurt", "Maud", "Lars", "May", "Luke", "Nell", "Mark", "Nina", "Matt", "Nora", "Mike", "Olga")
"""Those at even places are followed by he, the others by she."""
CONTAINERS = ("box", "bag", "jar", "cup", "tin", "pot", "case", "sack", "vase", "bowl", "chest", "crate")
ITEMS = ("ball", "key", "coin", "ring", "book", "lamp", "pen", "cap", "map", "doll", "drum", "fan", "bell", "kite",
         "rope", "shell", "stone", "stamp", "spoon", "brush", "clock", "glove", "whistle", "candle", "apple", "bead",
         "belt", "bone", "boot", "bottle", "bow", "bread", "brick", "broom", "button", "cake", "cane", "card", "carpet",
         "chain", "chalk", "cheese", "clip", "cloak", "cloth", "comb", "compass", "cork", "crown", "cushion", "dart",
         "dice", "egg", "feather", "fiddle", "flag", "flask", "flute", "fork", "fruit", "gem", "globe", "hammer",
         "harp", "hat", "helmet", "hook", "horn", "jewel", "kettle", "knife", "knot", "ladder", "lantern", "leaf",
         "lemon", "letter", "lock", "marble", "skate", "medal", "melon", "mirror", "mug", "nail", "necklace", "needle",
         "net", "nut", "onion", "orange", "paddle", "paint", "pear", "pebble", "pencil", "photo", "pill", "pin", "pipe",
         "plate", "plum", "poem", "purse", "quilt", "radio", "razor", "ribbon", "robe", "ruler", "saddle", "sandal",
         "saw", "scarf", "seed", "shoe", "silk", "soap", "sponge", "sword")
