"""What a user may set: options in groups, what losses imply, files of options. Nothing here imports torch."""
