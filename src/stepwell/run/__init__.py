"""Where a run is kept, what it says while it works, and which device it works on."""
