"""What can be cut from a model, and how a narrower one is made."""
