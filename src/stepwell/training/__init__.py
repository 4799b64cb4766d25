"""How a model is trained: the loop, the optimizer, what every step of distillation shares."""
