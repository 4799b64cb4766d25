"""Images: which there are, how they are split, decoded, augmented and fed."""
