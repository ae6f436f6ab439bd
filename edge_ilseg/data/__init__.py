"""Data sets, augmentation and what a step sees of them. No torch is imported here but in `loader`."""
