"""What a run works with, checked and put together before anything is computed."""
