"""How models arrive and how they leave: teachers, other students, cards, weights, exported files."""
