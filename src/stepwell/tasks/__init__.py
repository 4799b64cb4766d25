"""What a model is for: one file a task, with its loss per image, its meter, its checks and its words."""
