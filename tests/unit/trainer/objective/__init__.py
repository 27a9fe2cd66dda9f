"""Objectives on one rank."""
