"""Values; the dataclasses that check them are registered in schema.py."""
