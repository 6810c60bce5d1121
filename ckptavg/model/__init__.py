"""The user's model, loader and batches."""
