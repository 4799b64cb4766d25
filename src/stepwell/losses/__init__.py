"""What a student learns from: a loss takes tensors and returns a scalar."""
