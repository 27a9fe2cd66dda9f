"""Raw text to documents: every document kept or dropped with a reason."""
