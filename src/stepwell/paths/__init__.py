"""Ways from a teacher to a student; each file reads from top to bottom."""
