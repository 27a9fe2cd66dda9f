"""Web archives: their bytes, records and pages."""
