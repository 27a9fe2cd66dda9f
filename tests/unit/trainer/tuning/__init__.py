"""Checks and scores of tunings."""
