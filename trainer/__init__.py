"""Batches -> a trained model."""
