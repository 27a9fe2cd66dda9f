"""Objectives on several ranks."""
